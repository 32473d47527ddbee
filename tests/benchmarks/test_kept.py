"""The backward through kept positions at equal seconds: what docs/scaling.md shows of the sweep that judged it."""

from statistics import fmean

from sweeps import result_and_grid

from benchmarks.replication.results import LANGUAGE_MODEL
from benchmarks.table import TABLES

RESULT, GRID = result_and_grid("kept", "modular")
ROWS = {row["name"]: row for row in RESULT["rows"]}


def test_the_result_is_that_of_the_grid():
    for name, row in ROWS.items():
        assert row["overrides"]["max_steps"] == int(name.split(", ")[2].split()[0])
        assert row["overrides"].get("backward", "full") == name.split(", ")[1]
        assert row["seeds"] == GRID["seeds"]


def test_a_difference_is_paired_by_seed_with_the_longest_run_on_random_tokens():
    lines = TABLES["kept-modular"](RESULT).splitlines()[3:]
    beside = ROWS["random, full, 80 steps"]["tasks"]["modular[64:]"]["by_seed"]
    for line, (name, row) in zip(lines, ROWS.items(), strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        by_seed = row["tasks"]["modular[64:]"]["by_seed"]
        mean = fmean(by_seed[seed] - beside[seed] for seed in beside)
        expected = "" if name == "random, full, 80 steps" else f"{mean:+.3f}".replace("-", "−")
        assert cells[-1].partition(" ±")[0] == expected
        assert cells[-2] == f"{row['seconds']:.0f}"


def test_at_equal_seconds_it_is_level_with_random_tokens_on_the_language_model():
    """As the page says: between the two lengths of a row its divergence is taken to fall evenly."""
    result, grid = result_and_grid("kept", LANGUAGE_MODEL)
    (task,) = grid["test"]
    rows = {row["name"]: (row["seconds"], row["tasks"][task]["mean"]) for row in result["rows"]}

    def after(seconds, name):
        (first, began), (last, ended) = (rows[f"{name}, {steps} steps"] for steps in (20, 30))
        return began + (seconds - first) / (last - first) * (ended - began)

    seconds, kept = rows["sampling, kept, 30 steps"]
    assert abs(kept - after(seconds, "random, full")) < 0.01
    seconds, full = rows["sampling, full, 20 steps"]
    assert 0.005 < after(seconds, "sampling, kept") - full < 0.03  # "a little behind"
