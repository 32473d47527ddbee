"""docs/replication.md says what the results say, and a verdict is a function of an interval."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from tipdistill.sweep import Cell, Grid, read_grid, summarise

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("replicate", ROOT / "benchmarks" / "replicate.py")
replicate = importlib.util.module_from_spec(spec)
sys.modules["replicate"] = replicate  # a dataclass looks its module up
spec.loader.exec_module(replicate)
GRIDS = sorted((ROOT / "benchmarks" / "replication").rglob("*.yaml"))


def test_the_document_is_what_the_results_give():
    text = replicate.DOCUMENT.read_text(encoding="utf-8")
    assert replicate.rendered(text, replicate.load(replicate.RESULTS)) == text, "run: python benchmarks/replicate.py"
    assert {name for _, name, _ in replicate._BLOCK.findall(text)} == set(replicate.BLOCKS)


def assert_tables(text: str) -> None:
    """Every table has its rule under its header, and rows as wide as that."""
    lines = [line if line.startswith("|") else "" for line in ["", *text.splitlines()]]
    for number, line in enumerate(lines):
        if line and not lines[number - 1]:
            assert set(lines[number + 1]) == set("| -"), lines[number + 1]
        elif line:
            assert line.count(" | ") == lines[number - 1].count(" | "), line


def test_every_table_of_the_document_is_one():
    assert_tables(replicate.DOCUMENT.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: str(path.relative_to(GRIDS[0].parent)))
def test_every_grid_can_be_read_and_names_where_it_runs(path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # of the candidates
    grid = read_grid(path)
    assert grid.output_dir.name == path.stem
    assert f"tipdistill sweep {path.relative_to(ROOT).as_posix()}" in path.read_text(encoding="utf-8")
    if path.parent.name == "replication":
        assert path.stem in replicate.TASKS
        assert len(grid.seeds) >= 5
        rows = {(row.name, row.retention) for row in grid.rows}
        asked = {at for one in (*replicate.CLAIMS, *replicate.CONTROLS) for at in (one.first, one.second)}
        assert asked <= rows, f"rows that a claim needs are missing: {asked - rows}"
    if path.parent.name == replicate.RATES:
        beside = read_grid(path.parents[1] / path.name)
        assert {row.key for row in grid.rows} == {row.key for row in beside.rows if row.name != replicate.GUARDED}
        assert (grid.test, grid.seeds) == ((beside.validation_task,), beside.validation_seeds)
        assert (grid.base, grid.overrides, grid.num_samples) == (beside.base, beside.overrides, beside.num_samples)
        assert min(grid.learning_rates) > max(beside.learning_rates)
    if path.parent.name == replicate.TEACHER:
        assert path.stem in replicate.TASKS
        assert len(grid.seeds) >= 5
        asked = {at for one in replicate.TEACHERS_ENTROPY for at in (one.first, one.second)}
        assert asked == {(row.name, row.retention) for row in grid.rows}
        beside = read_grid(path.parents[1] / path.name)  # the task as the other rows have it
        assert (grid.seeds, grid.test, grid.num_samples) == (beside.seeds, beside.test, beside.num_samples)
        assert (grid.base, grid.overrides, grid.learning_rates) == (
            beside.base,
            beside.overrides,
            beside.learning_rates,
        )


@pytest.mark.parametrize(
    ("low", "high", "kind", "margin", "said"),
    [
        (0.01, 0.05, "above", 0.0, "holds"),
        (0.001, 0.015, "above", 0.0, "holds"),
        (-0.01, 0.05, "above", 0.0, "undecided"),
        (-0.01, 0.015, "above", 0.0, "does not hold"),  # a tie at best
        (-0.4, -0.2, "above", 0.0, "does not hold"),
        (0.05, 0.2, "above", 0.1, "undecided"),
        (0.11, 0.2, "above", 0.1, "holds"),
        (0.01, 0.09, "above", 0.1, "does not hold"),
        (-0.01, 0.0, "matches", 0.02, "holds"),
        (-0.05, 0.03, "matches", 0.02, "undecided"),
        (-0.05, -0.03, "matches", 0.02, "does not hold"),
        (-0.01, 0.015, "level", 0.02, "holds"),
        (0.001, 0.015, "level", 0.02, "holds"),  # a difference, and a small one
        (-0.03, 0.015, "level", 0.02, "undecided"),
        (0.001, 0.03, "level", 0.02, "does not hold"),
        (-0.4, -0.2, "level", 0.02, "does not hold"),
        (0.01, 0.04, "below", 0.05, "holds"),
        (0.01, 0.06, "below", 0.05, "undecided"),
        (0.05, 0.06, "below", 0.05, "does not hold"),
    ],
)
def test_a_verdict_is_a_function_of_the_interval(low, high, kind, margin, said):
    assert replicate.verdict(low, high, kind, margin) == said


def test_tasks_that_agree_give_one_verdict():
    assert replicate.overall(["holds"] * 3) == "**holds**"
    assert replicate.overall(["holds", "undecided", "holds"]) == "holds: 2, undecided: 1"
    assert replicate.overall(["holds", "holds", replicate.NOT_RUN]) == "holds: 2"  # two tasks are not all three
    assert replicate.overall([replicate.NOT_RUN] * 3) == replicate.NOT_RUN


def figures(cell: Cell, counts: list[int]) -> dict:
    task = {"correct": counts, "num_samples": 4, "mean_tokens": 43.0, "truncated": 0.0}
    found = {"tasks": dict.fromkeys(cell.tasks, task), "trained_tokens": 10, "seconds": 2.0}
    if cell.on_start:
        found["before"] = {name: {**task, "correct": [0, 1, 2] * (len(counts) // 3)} for name in cell.tasks}
    return {**found, "peak_memory_gib": 0.5, "threads": 1}


@pytest.fixture
def results(tmp_path):
    """What the planted grid would give if Soft-OR were as good as all tokens, and Q3 and chance were not."""
    asked = yaml.safe_load((ROOT / "benchmarks" / "replication" / "planted.yaml").read_text(encoding="utf-8"))
    asked |= {"learning_rates": 1e-3}
    asked.pop("validation")
    path = tmp_path / "planted.yaml"
    path.write_text(yaml.safe_dump(asked, sort_keys=False))
    grid: Grid = read_grid(path)
    random = np.random.default_rng(0)
    found = {}
    for row in grid.rows:
        chance = {"all": 0.95, "soft_or": 0.95, "gradient_norm": 0.95, "random": 0.3}.get(row.rule, 0.6)
        for cell in grid.last_cells(row, 1e-3):
            found[cell.key] = figures(cell, random.binomial(4, chance, 192).tolist())
    result = summarise(grid, found, {})
    environment = {"hardware": {"cpu": "a CPU", "threads": 1}, "versions": {"torch": "2", "trl": "1"}}
    return {"planted": {**result, **environment, "workers": 2, "commit": "abc", "measured": "2026-11-24"}}


def test_blocks_say_what_the_rows_say(results):
    claims = replicate.verdicts(results, replicate.CLAIMS).splitlines()
    assert claims[0] == "| claim | addition | modular | machine | in all |"
    assert "does not hold: −0.3" in next(line for line in claims if line.startswith("| 1. Entropy sampling"))
    assert "| holds: +0.3" in next(line for line in claims if line.startswith("| 4. "))
    assert all(line.count("|") == 6 for line in claims)
    assert claims[2].endswith(f"| {replicate.NOT_RUN} | {replicate.NOT_RUN} | does not hold: 1 |")
    table = replicate.BLOCKS["table6"](results).splitlines()
    assert table[0] == "|  | before | all tokens 100 % | Soft-OR 50 % | bottom half 50 % | random 50 % |"
    assert table[2].startswith("| addition | 0.250 [")
    assert table[3].startswith("| − all tokens |  |  | ")
    small = replicate.small_budgets(results)
    assert "| gradient norm, over the batch | 0.9" in small
    assert " of the gain |" in small
    ours = replicate.ours(results).splitlines()
    beaten = next(line for line in ours if line.startswith("| gradient norm, over the batch − Q3, over the batch"))
    assert "| holds: +0.3" in beaten
    tied = next(line for line in ours if line.startswith("| gradient norm, over the batch − Soft-OR, over the batch"))
    assert "holds: +" not in tied.replace("does not hold", "no")
    gain = replicate.of_the_gain(results).splitlines()
    assert any(line.startswith("| random, over the batch, 2 % | does not hold: ") for line in gain)
    shares = [int(line.split(" %")[0].rsplit(" ", 1)[1]) for line in gain[2:]]
    assert shares == sorted(shares)
    assert set(shares) == {2, 5, 10, 20}
    guarded = replicate.guard(results).splitlines()
    assert [line.split(" | ")[1] for line in guarded[2:]] == [
        *("all tokens, 100 %", "Q3, over the batch, 2 %", "Q3, raised by the drift guard, 2 %", "Q3, 20 %"),
        "gradient norm, sampled, over the batch, 2 %",
    ]
    assert "guard" not in small + "".join(gain)
    assert "a CPU, 2 × 1 threads" in replicate.runs(results)


def test_the_teachers_entropy_is_judged_by_its_own_grids(results, tmp_path, monkeypatch):
    renamed = {"soft_or": "highest teacher entropy", "q3": "lowest teacher entropy"}
    rows = [{**row, "name": renamed.get(row["name"], row["name"])} for row in results["planted"]["rows"]]
    found = {f"{replicate.TEACHER}/planted": {**results["planted"], "rows": rows}}
    monkeypatch.setattr(replicate, "BEFORE", tmp_path / "none.json")
    table = replicate.teachers_entropy(found).splitlines()
    assert table[2].startswith("| Its normalised mean is below 0.05 | not run |")
    assert table[3].startswith("| Its rank correlation with the divergence | not run |")
    highest, _, _, lowest = table[4:]
    assert highest.startswith(
        "| The highest 50 % by the teacher's entropy do as well as random tokens | does not hold: +0."
    )
    assert lowest.startswith(
        "| The lowest 10 % by the teacher's entropy do as well as random tokens | does not hold: +0."
    )
    entropies = {
        "teacher_entropy_norm": {"mean": 0.04, "interval": [0.03, 0.06]},
        "student_entropy_norm": {"mean": 0.5},
    }
    ranks = {"rank_correlation_with_reverse_kl": {"teacher_entropy": -0.4, "student_entropy": 0.8}}
    before = {"planted": {**entropies, **ranks}}
    (tmp_path / "some.json").write_text(json.dumps({"tasks": before}))
    monkeypatch.setattr(replicate, "BEFORE", tmp_path / "some.json")
    said = replicate.teachers_entropy(found)
    assert "| undecided: 0.040 [0.030, 0.060] (student's 0.500) | not run | not run | undecided: 1 |" in said
    assert "| −0.40 (student's 0.80) | not run | not run |  |" in said
    assert_tables(said)


def test_memory_falls_where_a_whole_step_needs_less(tmp_path, monkeypatch):
    head = {"plain": 1000, "chunked": 200, "chunked soft_or 0.5": 100, "chunked soft_or 0.2": 100}
    step = {"plain": 500, "tip all": 200, "tip soft_or 0.5": 196, "tip soft_or 0.2": 150}
    head["chunked soft_or 0.1"], step["tip soft_or 0.1"] = 190, 210
    for name, variants, key in (("HEAD", head, "extra_bytes"), ("STEP", step, "peak_bytes")):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"variants": {one: {key: count} for one, count in variants.items()}}))
        monkeypatch.setattr(replicate, name, path)
    assert replicate.memory({}).splitlines()[2:] == [
        "| Soft-OR at 50 % | does not hold | −2 % | −50 % | −61 % | −90 % |",
        "| Soft-OR at 20 % | holds | −25 % | −50 % | −70 % | −90 % |",
        "| Soft-OR at 10 % | does not hold | 5 % | −5 % | −58 % | −81 % |",
    ]


def test_a_higher_rate_is_compared_with_the_best_that_was_offered(results):
    def row(retention, mean):
        tasks = {"arithmetic[:64]": {"mean": mean}}
        return {"name": "all" if retention == 1.0 else "soft_or", "retention": retention, "tasks": tasks}

    rows = [{**one, "validation": {"0.001": 0.5, "0.0003": 0.4}} for one in results["planted"]["rows"]]
    higher = {"rows": [row(1.0, 0.3), row(0.5, 0.75), row(0.2, 0.4)], "test": ["arithmetic[:64]"]}
    higher |= {"learning_rates": [0.003]}
    table = replicate.higher_rates({"planted": {**results["planted"], "rows": rows}, "rates/planted": higher})
    assert (
        table.splitlines()[0] == "| task | tried at | rows | better there | median change | all tokens | most of all |"
    )
    assert table.splitlines()[2] == "| addition | 0.003 | 3 | 1 | −0.100 | −0.200 | Soft-OR 50 % +0.250 |"
    assert table.splitlines()[3].startswith(f"| modular | {replicate.NOT_RUN} |")
    assert_tables(table)
    listed = replicate.rates({"planted": {**results["planted"], "rows": rows}, "rates/planted": higher})
    assert "| addition | Soft-OR | 50 % | 0.001 | 0.001: 0.500, 0.0003: 0.400 | 0.003: 0.750 |" in listed


@pytest.mark.parametrize("name", replicate.TASKS)
def test_random_rows_that_were_run_twice_are_the_same(name):
    """As docs/replication.md says of the grids that select by the teacher's entropy."""
    results = replicate.load(replicate.RESULTS)
    for retention in (0.5, 0.1):
        first, again = (replicate.figure_of(results[grid], ("random", retention)) for grid in (name, f"teacher/{name}"))
        assert len(first["correct"]) == 5
        assert first["correct"] == again["correct"]


def test_a_resumed_sweep_names_every_commit_of_its_cells(results):
    runs = [{"commit": name, "measured": "2026-11-24", "workers": 1, "cells": 3} for name in ("one", "two")]
    said = replicate.runs({"planted": {**results["planted"], "runs": runs}})
    assert "| a CPU, 1 × 1 threads |" in said
    assert "| one and two, 2026-11-24 |" in said
    said = replicate.runs({"planted": {**results["planted"], "runs": [*runs, {"cells": 2}]}})
    assert "| one and two and unknown, 2026-11-24 and unknown |" in said


def test_results_are_kept_whole_and_the_document_is_written_from_them(results, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs" / "planted").mkdir(parents=True)
    (tmp_path / "runs" / "planted" / "sweep.json").write_text(json.dumps(results["planted"]))
    document = tmp_path / "document.md"
    document.write_text("a\n<!-- sweep:table3 -->\nold\n<!-- /sweep -->\nb\n")
    for name, value in (("ROOT", tmp_path), ("RESULTS", tmp_path / "kept"), ("DOCUMENT", document)):
        monkeypatch.setattr(replicate, name, value)
    (tmp_path / "runs" / "teacher" / "modular").mkdir(parents=True)
    (tmp_path / "runs" / "teacher" / "modular" / "sweep.json").write_text(json.dumps(results["planted"]))
    assert replicate.main(["--collect", str(tmp_path / "runs")]) == 0
    kept = ["kept/planted.json", "kept/planted.csv", "kept/teacher/modular.json", "kept/teacher/modular.csv"]
    assert [line.removeprefix("kept ") for line in capsys.readouterr().out.splitlines()] == kept
    assert set(replicate.load(tmp_path / "kept")) == {"planted", "teacher/modular"}
    kept = json.loads((tmp_path / "kept" / "planted.json").read_text())
    one, two = (found["rows"][3]["tasks"]["arithmetic[64:]"] for found in (kept, results["planted"]))
    assert one["correct"] == two["correct"]
    assert one["mean"] == pytest.approx(two["mean"], rel=1e-5)
    text = document.read_text()
    assert "old" not in text
    assert "| addition | 0.250 [" in text
    document.write_text("<!-- sweep:table33 -->\n<!-- /sweep -->\n")
    with pytest.raises(ValueError, match="there is no block 'table33'"):
        replicate.main([])
