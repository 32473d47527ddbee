"""From the cells' counts to the table."""

import csv
import io

import numpy as np
import pytest
from grids import grid_of

from tipdistill.sweep import chosen_rate, csv_text, markdown, summarise
from tipdistill.sweep.result import compared, counts_of, divergences_of, gain_share

TEST, VALIDATION = "arithmetic[8:24]", "arithmetic[:8]"


def figures(*, test=None, validation=None, before=None):
    tasks = {TEST: test, VALIDATION: validation}
    found = {
        "tasks": {
            name: {"correct": list(counts), "num_samples": 2, "mean_tokens": 43.0, "truncated": 0.0}
            for name, counts in tasks.items()
            if counts is not None
        },
        "trained_tokens": 100,
        "seconds": 2.0,
        "peak_memory_gib": 0.5,
        "threads": 1,
    }
    if before is not None:
        found["before"] = {TEST: {**figures(test=before)["tasks"][TEST]}}
    return found


def test_the_best_rate_on_validation_is_chosen_and_a_failed_one_is_not(tmp_path):
    grid = grid_of(tmp_path, learning_rates=[1e-3, 3e-4, 1e-4], seeds=[1, 2], validation_seeds=[0])
    row = grid.rows[1]
    cells = {cell.learning_rate: cell.key for cell in grid.first_cells(row)}
    results = {
        cells[1e-3]: figures(validation=[2, 1]),
        cells[3e-4]: figures(validation=[2, 1]),
        cells[1e-4]: figures(validation=[1, 1]),
    }
    rate, means = chosen_rate(grid, row, results)
    assert rate == 3e-4  # of equal ones the smaller
    assert means == {1e-3: 0.75, 3e-4: 0.75, 1e-4: 0.5}
    del results[cells[3e-4]]
    assert chosen_rate(grid, row, results)[0] == 1e-3
    assert chosen_rate(grid, row, {}) == (None, {})


@pytest.fixture
def result(tmp_path):
    grid = grid_of(tmp_path, learning_rates=[1e-3], seeds=[1, 2, 3])
    random = np.random.default_rng(0)
    accuracy = {"all-100": 0.9, "soft_or-50": 0.88, "soft_or-20": 0.85, "random-20": 0.5}
    results = {}
    for row in grid.rows:
        for cell in grid.last_cells(row, 1e-3):
            counts = random.binomial(2, accuracy[row.key], 16).tolist()
            before = random.binomial(2, 0.2, 16).tolist() if cell.on_start else None
            results[cell.key] = figures(test=counts, before=before)
    del results["random-20-rate0.001-seed3"]
    return summarise(grid, results, {"random-20-rate0.001-seed3": "RuntimeError: it burnt"}), results


def test_rows_hold_means_and_paired_differences(result):
    found, results = result
    rows = {f"{row['rule']}-{100 * row['retention']:g}": row for row in found["rows"]}
    whole, half, fifth, control = (rows[key]["tasks"][TEST] for key in rows)
    every = [results[f"soft_or-20-rate0.001-seed{seed}"]["tasks"][TEST]["correct"] for seed in (1, 2, 3)]
    assert fifth["mean"] == pytest.approx(np.mean(every) / 2)
    assert fifth["interval"][0] < fifth["mean"] < fifth["interval"][1]
    assert half["to_all"]["mean"] == pytest.approx(half["mean"] - whole["mean"])
    assert half["to_random"] is None  # there is no random at 50 %
    assert whole["to_all"] is None
    assert fifth["to_random"]["seeds"] == 2  # those that random has too
    paired = [np.mean(every[seed]) / 2 - control["by_seed"][str(seed + 1)] for seed in (0, 1)]
    assert fifth["to_random"]["mean"] == pytest.approx(np.mean(paired))
    low, high = fifth["to_random"]["interval"]
    assert low < fifth["to_random"]["mean"] < high
    started = found["before"][TEST]["mean"]
    assert half["gain_share"]["mean"] == pytest.approx((half["mean"] - started) / (whole["mean"] - started))
    assert rows["random-20"]["seeds"] == [1, 2]
    assert counts_of(fifth) == dict(zip((1, 2, 3), every, strict=True))
    assert compared(counts_of(fifth), counts_of(control), 2) == fifth["to_random"]


def test_an_accuracy_whose_seeds_collapsed_in_part_has_an_interval_within_0_and_1(tmp_path):
    """Two seeds of three are at 1, one is at 0: Student's t with two degrees of freedom reaches far beyond."""
    grid = grid_of(tmp_path, learning_rates=[1e-3], seeds=[1, 2, 3])
    found = {
        cell.key: figures(test=[0 if cell.seed == 1 else 2] * 16, before=[0] * 16 if cell.on_start else None)
        for row in grid.rows
        for cell in grid.last_cells(row, 1e-3)
    }
    figure = summarise(grid, found, {})["rows"][1]["tasks"][TEST]
    assert figure["mean"] == pytest.approx(2 / 3)
    assert figure["interval"] == [0, 1]


def test_a_share_of_no_gain_is_none():
    flat = {0: [1, 1, 0, 2], 1: [1, 0, 1, 2]}
    assert gain_share(flat, flat, flat, 2) is None
    assert gain_share(flat, flat, {}, 2) is None
    with pytest.raises(ValueError, match="without a seed in common"):
        compared({0: [1]}, {1: [1]}, 2)


def test_draws_without_a_gain_are_left_out_before_they_divide():
    # of four problems one draw in 256 takes nothing but the last, and gains exactly nothing
    rows = {0: [1, 1, 1, 0]}
    with np.errstate(all="raise"):
        share = gain_share(rows, rows, {0: [0] * 4})
    assert share is not None
    assert (share["mean"], share["interval"], share["seeds"]) == (1.0, [1.0, 1.0], 1)


def test_one_seed_is_called_one(tmp_path):
    grid = grid_of(tmp_path, learning_rates=[1e-3], seeds=[3])
    row_cells = {
        cell.key: figures(test=[1] * 16, before=[0] * 16 if cell.on_start else None)
        for row in grid.rows
        for cell in grid.last_cells(row, 1e-3)
    }
    result = summarise(grid, row_cells, {})
    assert result["interval"] == "95 %, paired bootstrap over problems, 10,000 draws"
    assert "(one seed, 3)" in markdown(result)


def test_text_says_what_the_figures_are(result):
    found, _ = result
    text = markdown(found)
    lines = text.splitlines()
    assert lines[0] == f"**{TEST}**"
    assert lines[2].startswith("| rule | retention | accuracy (mean@2) | − all tokens | − random |")
    assert lines[4].startswith("| before distillation |  | 0.")
    assert [line.split(" | ")[0] for line in lines[5:9]] == ["| all", "| soft_or", "| soft_or", "| random"]
    assert {line.count("|") for line in lines[2:9]} == {11}
    assert "3 seeds: 1, 2, 3" in text
    assert "Failed: random-20-rate0.001-seed3: RuntimeError: it burnt" in text
    rows = list(csv.DictReader(io.StringIO(csv_text(found))))
    assert len(rows) == 4
    fifth = found["rows"][2]["tasks"][TEST]
    assert float(rows[2]["to_random"]) == fifth["to_random"]["mean"]
    assert float(rows[2]["mean_low"]) == fifth["interval"][0]
    assert rows[1]["to_random"] == ""


def test_a_row_whose_cells_all_failed_is_a_row_still(tmp_path):
    grid = grid_of(tmp_path, learning_rates=[1e-3], seeds=[1])
    results = {"all-100-rate0.001-seed1": figures(test=[1] * 16, before=[0] * 16)}
    found = summarise(grid, results, {"soft_or-50-rate0.001-seed1": "it burnt"})
    assert "| soft_or | 50 % | failed |" in markdown(found)
    assert len(csv_text(found).splitlines()) == 5


@pytest.fixture
def divergences(tmp_path):
    """The same rows measured by a divergence, of which less is better."""
    grid = grid_of(tmp_path, learning_rates=[1e-3], seeds=[1, 2, 3])
    random = np.random.default_rng(0)
    level = {"all-100": 0.2, "soft_or-50": 0.22, "soft_or-20": 0.3, "random-20": 0.5}
    results = {}
    for row in grid.rows:
        for cell in grid.last_cells(row, 1e-3):
            values = (level[row.key] * random.uniform(0.9, 1.1, 16)).tolist()
            results[cell.key] = of_divergence(test=values, before=[1.0] * 16 if cell.on_start else None)
    return summarise(grid, results, {}), results


def of_divergence(*, test=None, validation=None, before=None):
    given = figures(test=test, validation=validation, before=before)
    for tasks in (given["tasks"], given.get("before", {})):
        for figure in tasks.values():
            figure["divergence"] = figure.pop("correct")
    return given


def test_of_divergences_the_rate_with_the_least_is_chosen(tmp_path):
    grid = grid_of(tmp_path, learning_rates=[1e-3, 3e-4, 1e-4], seeds=[1, 2], validation_seeds=[0])
    row = grid.rows[1]
    cells = {cell.learning_rate: cell.key for cell in grid.first_cells(row)}
    results = {
        cells[1e-3]: of_divergence(validation=[0.5, 0.3]),
        cells[3e-4]: of_divergence(validation=[0.2, 0.2]),
        cells[1e-4]: of_divergence(validation=[0.1, 0.3]),
    }
    assert chosen_rate(grid, row, results) == (1e-4, {1e-3: 0.4, 3e-4: 0.2, 1e-4: 0.2})


def test_rows_of_a_divergence_have_signed_differences_and_shares_of_the_fall(divergences):
    found, results = divergences
    rows = {f"{row['rule']}-{100 * row['retention']:g}": row["tasks"][TEST] for row in found["rows"]}
    whole, _, fifth, control = (rows[key] for key in rows)
    every = np.array([results[f"soft_or-20-rate0.001-seed{seed}"]["tasks"][TEST]["divergence"] for seed in (1, 2, 3)])
    assert fifth["mean"] == pytest.approx(every.mean())
    assert divergences_of(fifth)[2] == pytest.approx(every[1], rel=1e-5)
    assert fifth["to_all"]["mean"] == pytest.approx(fifth["mean"] - whole["mean"])
    assert fifth["to_random"]["interval"][1] < 0  # below random for certain
    share = fifth["gain_share"]
    assert share["mean"] == pytest.approx((1 - fifth["mean"]) / (1 - whole["mean"]))
    assert share["interval"][0] < share["mean"] < share["interval"][1] < 1
    assert control["gain_share"]["mean"] < share["mean"]
    assert rows["all-100"]["interval"][0] > 0


def test_text_calls_a_divergence_by_its_name(divergences):
    found, _ = divergences
    assert "| divergence, nats (less is better) |" in markdown(found)
    assert "accuracy" not in markdown(found)
    (line, *_) = csv.DictReader(io.StringIO(csv_text(found)))
    assert (line["measure"], float(line["mean"])) == ("divergence", found["rows"][0]["tasks"][TEST]["mean"])
