"""docs/replication.md and its tables say what the results say, and a verdict is a function of an interval."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from benchmarks.replication import __main__ as replication
from benchmarks.replication import claims, tables
from benchmarks.replication.results import RATES, RESULTS, TASKS, TEACHER, figure_of, load
from tipdistill.sweep import Cell, Grid, read_grid, summarise
from tipdistill.tasks import arithmetic, machine, modular, smollm2

ROOT = Path(__file__).parents[2]
GRIDS = sorted((ROOT / "benchmarks" / "replication").rglob("*.yaml"))


@pytest.fixture(scope="module")
def kept():
    """The results in the repository."""
    return load(RESULTS)


@pytest.mark.parametrize("path", replication.DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_document_is_what_the_results_give(path, kept):
    text = path.read_text(encoding="utf-8")
    assert tables.rendered(text, kept) == text, "run: python -m benchmarks.replication"
    assert_tables(text)


def test_every_table_stands_in_a_document():
    documents = "".join(path.read_text(encoding="utf-8") for path in replication.DOCUMENTS)
    assert set(re.findall(r"<!-- sweep:([\w-]+) -->", documents)) == set(tables.BLOCKS)


def test_the_prose_has_the_figures_of_the_code():
    text = " ".join(replication.DOCUMENTS[0].read_text(encoding="utf-8").split())
    lengths = {"addition": arithmetic.COMPLETION_TOKENS, "modular": modular.TASK.completion_tokens}
    lengths["machine"] = machine.TASK.completion_tokens
    for name, tokens in lengths.items():
        assert re.search(rf"- \*\*{name}\*\*: [^*]*, {tokens} tokens\.", text)
    assert f"traced over {machine.STEPS} steps" in text
    assert f"where it is below {claims.TIE}, a tie at best" in text
    assert f'above −{claims.TIE}, "nearly matches" above −{claims.NEARLY}; ' in text
    assert f'"much better" is by more than {claims.MUCH:.2f}.' in text
    before = json.loads(tables.BEFORE.read_text(encoding="utf-8"))["tasks"]
    little = [name for name in TASKS if before[name]["student_entropy_norm"]["mean"] < tables.ALMOST_NONE]
    assert ("two of the three students have little too" in text) == (len(little) == 2)
    assert len(replication.DOCUMENTS[0].read_text(encoding="utf-8").splitlines()) <= 150


def assert_tables(text: str) -> None:
    """Every table has its rule under its header, and rows as wide as that."""
    lines = [line if line.startswith("|") else "" for line in ["", *text.splitlines()]]
    for number, line in enumerate(lines):
        if line and not lines[number - 1]:
            assert set(lines[number + 1]) == set("| -"), lines[number + 1]
        elif line:
            assert line.count(" | ") == lines[number - 1].count(" | "), line


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_grid_can_be_read_and_names_where_it_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    smollm2.write_prompts(Path("runs/smollm2"))  # which the language model's grids measure on
    grid = read_grid(path)
    assert grid.output_dir.name == path.stem
    assert f"tipdistill sweep {path.relative_to(ROOT).as_posix()}" in path.read_text(encoding="utf-8")
    if path.parent.name == "replication":
        assert path.stem in TASKS
        assert len(grid.seeds) >= 5
        rows = {(row.name, row.retention) for row in grid.rows}
        asked = {at for claim in (*claims.CLAIMS, *claims.CONTROLS) for at in (claim.first, claim.second)}
        assert asked <= rows, f"rows that a claim needs are missing: {asked - rows}"
    if path.parent.name == RATES:
        beside = read_grid(path.parents[1] / path.name)
        assert {row.key for row in grid.rows} == {row.key for row in beside.rows if row.name != tables.GUARDED}
        assert (grid.test, grid.seeds) == ((beside.validation_task,), beside.validation_seeds)
        assert (grid.base, grid.overrides, grid.num_samples) == (beside.base, beside.overrides, beside.num_samples)
        assert min(grid.learning_rates) > max(beside.learning_rates)
    if path.parent.name == TEACHER:
        assert path.stem in TASKS
        assert len(grid.seeds) >= 5
        asked = {at for claim in claims.TEACHERS_ENTROPY for at in (claim.first, claim.second)}
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
    assert claims.verdict(low, high, kind, margin) == said


def test_tasks_that_agree_give_one_verdict():
    assert claims.overall(["holds"] * 3) == "**holds**"
    assert claims.overall(["holds", "undecided", "holds"]) == "holds: 2, undecided: 1"
    assert claims.overall(["holds", "holds", claims.NOT_RUN]) == "holds: 2"  # two tasks are not all three
    assert claims.overall([claims.NOT_RUN] * 3) == claims.NOT_RUN


def figures(cell: Cell, counts: list[int]) -> dict:
    task = {"correct": counts, "num_samples": 4, "mean_tokens": 43.0, "truncated": 0.0}
    measured = {"tasks": dict.fromkeys(cell.tasks, task), "trained_tokens": 10, "seconds": 2.0}
    if cell.on_start:
        measured["before"] = {name: {**task, "correct": [0, 1, 2] * (len(counts) // 3)} for name in cell.tasks}
    return {**measured, "peak_memory_gib": 0.5, "threads": 1}


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
    measured = {}
    for row in grid.rows:
        chance = {"all": 0.95, "soft_or": 0.95, "gradient_norm": 0.95, "random": 0.3}.get(row.rule, 0.6)
        for cell in grid.last_cells(row, 1e-3):
            measured[cell.key] = figures(cell, random.binomial(4, chance, 192).tolist())
    result = summarise(grid, measured, {})
    environment = {"hardware": {"cpu": "a CPU", "threads": 1}, "versions": {"torch": "2", "trl": "1"}}
    return {"planted": {**result, **environment, "workers": 2, "commit": "abc", "measured": "2026-11-24"}}


def test_blocks_say_what_the_rows_say(results):
    lines = tables.BLOCKS["claims"](results).splitlines()
    assert lines[0] == "| claim | in all | addition | modular | machine | SmolLM2, of the gain |"
    assert "does not hold: −0.3" in next(line for line in lines if line.startswith("| 1. Entropy sampling"))
    assert "| holds: +0.3" in next(line for line in lines if line.startswith("| 4. "))
    assert all(line.count("|") == 7 for line in lines)
    assert " | does not hold: 1 | does not hold: −0." in lines[2]
    assert lines[2].endswith(f"| {claims.NOT_RUN} | {claims.NOT_RUN} | {claims.NOT_RUN} |")
    table = tables.BLOCKS["table6"](results).splitlines()
    assert table[0] == "|  | before | all tokens 100 % | Soft-OR 50 % | bottom half 50 % | random 50 % |"
    assert table[2].startswith("| addition | 0.250 [")
    assert table[3].startswith("| − all tokens |  |  | ")
    small = tables.small_budgets(results)
    assert "| gradient norm, over the batch | 0.9" in small
    assert " of the gain |" in small
    ours = tables.ours(results).splitlines()
    beaten = next(line for line in ours if line.startswith("| gradient norm, over the batch − Q3, over the batch"))
    assert "| holds: +0.3" in beaten
    tied = next(line for line in ours if line.startswith("| gradient norm, over the batch − Soft-OR, over the batch"))
    assert "holds: +" not in tied.replace("does not hold", "no")
    gain = tables.of_the_gain(results).splitlines()
    assert any(line.startswith("| random, over the batch, 2 % | does not hold: ") for line in gain)
    shares = [int(line.split(" %")[0].rsplit(" ", 1)[1]) for line in gain[2:]]
    assert shares == sorted(shares)
    assert set(shares) == {2, 5, 10, 20}
    guarded = tables.guard(results).splitlines()
    assert [line.split(" | ")[1] for line in guarded[2:]] == [
        *("all tokens, 100 %", "Q3, over the batch, 2 %", "Q3, raised by the drift guard, 2 %", "Q3, 20 %"),
        "gradient norm, sampled, over the batch, 2 %",
    ]
    assert "guard" not in small + "".join(gain)
    assert "a CPU, 2 × 1 threads" in tables.runs(results)


def test_the_teachers_entropy_is_judged_by_its_own_grids(results, tmp_path, monkeypatch):
    renamed = {"soft_or": "highest teacher entropy", "q3": "lowest teacher entropy"}
    rows = [{**row, "name": renamed.get(row["name"], row["name"])} for row in results["planted"]["rows"]]
    of_teacher = {f"{TEACHER}/planted": {**results["planted"], "rows": rows}}
    monkeypatch.setattr(tables, "BEFORE", tmp_path / "none.json")
    table = tables.teachers_entropy(of_teacher).splitlines()
    assert table[2].startswith("| Its normalised mean is below 0.05 | not run | not run |")
    assert table[3].startswith("| Its rank correlation with the divergence |  | not run |")
    highest, _, _, lowest = table[4:]
    for line, rows in ((highest, "highest 50 %"), (lowest, "lowest 10 %")):
        start = f"| The {rows} by the teacher's entropy do as well as random tokens |"
        assert line.startswith(f"{start} does not hold: 1 | does not hold: +0.")
    entropies = {
        "teacher_entropy_norm": {"mean": 0.04, "interval": [0.03, 0.06]},
        "student_entropy_norm": {"mean": 0.5},
    }
    ranks = {"rank_correlation_with_reverse_kl": {"teacher_entropy": -0.4, "student_entropy": 0.8}}
    before = {"planted": {**entropies, **ranks}}
    (tmp_path / "some.json").write_text(json.dumps({"tasks": before}))
    monkeypatch.setattr(tables, "BEFORE", tmp_path / "some.json")
    text = tables.teachers_entropy(of_teacher)
    assert "| undecided: 1 | undecided: 0.040 [0.030, 0.060] (student's 0.500) | not run | not run |" in text
    assert "|  | −0.40 (student's 0.80) | not run | not run |" in text
    assert_tables(text)


def test_memory_falls_where_a_whole_step_needs_less(tmp_path, monkeypatch):
    head = {"plain": 1000, "chunked": 200, "chunked soft_or 0.5": 100, "chunked soft_or 0.2": 100}
    step = {"plain": 500, "tip all": 200, "tip soft_or 0.5": 196, "tip soft_or 0.2": 150}
    head["chunked soft_or 0.1"], step["tip soft_or 0.1"] = 190, 210
    for name, variants, key in (("HEAD", head, "extra_bytes"), ("STEP", step, "peak_bytes")):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"variants": {variant: {key: count} for variant, count in variants.items()}}))
        monkeypatch.setattr(tables, name, path)
    assert tables.memory({}).splitlines()[2:] == [
        "| Soft-OR at 50 % | does not hold | −2 % | −50 % | −61 % | −90 % |",
        "| Soft-OR at 20 % | holds | −25 % | −50 % | −70 % | −90 % |",
        "| Soft-OR at 10 % | does not hold | 5 % | −5 % | −58 % | −81 % |",
    ]


def test_a_higher_rate_is_compared_with_the_best_that_was_offered(results):
    def row(retention, mean):
        tasks = {"arithmetic[:64]": {"mean": mean}}
        return {"name": "all" if retention == 1.0 else "soft_or", "retention": retention, "tasks": tasks}

    rows = [{**kept, "validation": {"0.001": 0.5, "0.0003": 0.4}} for kept in results["planted"]["rows"]]
    higher = {"rows": [row(1.0, 0.3), row(0.5, 0.75), row(0.2, 0.4)], "test": ["arithmetic[:64]"]}
    higher |= {"learning_rates": [0.003]}
    table = tables.higher_rates({"planted": {**results["planted"], "rows": rows}, "rates/planted": higher})
    assert (
        table.splitlines()[0] == "| task | tried at | rows | better there | median change | all tokens | most of all |"
    )
    assert table.splitlines()[2] == "| addition | 0.003 | 3 | 1 | −0.100 | −0.200 | Soft-OR 50 % +0.250 |"
    assert table.splitlines()[3].startswith(f"| modular | {claims.NOT_RUN} |")
    assert_tables(table)
    listed = tables.rates({"planted": {**results["planted"], "rows": rows}, "rates/planted": higher})
    assert "| addition | Soft-OR | 50 % | 0.001 | 0.001: 0.500, 0.0003: 0.400 | 0.003: 0.750 |" in listed


@pytest.mark.parametrize("name", TASKS)
def test_random_rows_that_were_run_twice_are_the_same(name):
    """As docs/replication.md says of the grids that select by the teacher's entropy."""
    results = load(RESULTS)
    for retention in (0.5, 0.1):
        first, again = (figure_of(results[grid], ("random", retention)) for grid in (name, f"teacher/{name}"))
        assert len(first["correct"]) == 5
        assert first["correct"] == again["correct"]


def test_a_resumed_sweep_names_every_commit_of_its_cells(results):
    runs = [{"commit": name, "measured": "2026-11-24", "workers": 1, "cells": 3} for name in ("one", "two")]
    said = tables.runs({"planted": {**results["planted"], "runs": runs}})
    assert "| a CPU, 1 × 1 threads |" in said
    assert "| one and two, 2026-11-24 |" in said
    said = tables.runs({"planted": {**results["planted"], "runs": [*runs, {"cells": 2}]}})
    assert "| one and two and unknown, 2026-11-24 and unknown |" in said


def test_the_short_answer_sorts_the_claims_by_their_verdicts(results):
    text = " ".join(tables.in_short(dict.fromkeys(TASKS, results["planted"])).split())
    holds, does_not, differ = re.split(r" ?- \*\*[^:]*\*\*: ", text)[1:]
    assert "The top half by Soft-OR is much better than the bottom half; " in holds
    assert "Entropy sampling at 50 % matches or beats all tokens; " in does_not
    answers = f"{holds}{does_not}{differ}".replace("; ", ".").count(".")
    assert answers == len(claims.CLAIMS) + len(claims.CONTROLS) + (differ == "nothing.")
    text = " ".join(tables.in_short(results).split())
    assert "**Holds on all three tasks**: nothing. " in text  # one task is not all three


def test_results_are_kept_whole_and_the_documents_are_written_from_them(results, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs" / "planted").mkdir(parents=True)
    (tmp_path / "runs" / "planted" / "sweep.json").write_text(json.dumps(results["planted"]))
    (tmp_path / "runs" / "teacher" / "modular").mkdir(parents=True)
    (tmp_path / "runs" / "teacher" / "modular" / "sweep.json").write_text(json.dumps(results["planted"]))
    document = tmp_path / "document.md"
    document.write_text("a\n<!-- sweep:table3 -->\nold\n<!-- /sweep -->\nb\n")
    monkeypatch.setattr(replication, "RESULTS", tmp_path / "kept")
    monkeypatch.setattr(replication, "DOCUMENTS", (document,))
    assert replication.main(["--collect", str(tmp_path / "runs")]) == 0
    paths = ["planted.json", "planted.csv", "teacher/modular.json", "teacher/modular.csv"]
    assert [line.removeprefix("kept ") for line in capsys.readouterr().out.splitlines()] == paths
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["planted.csv", "planted.json", "teacher"]
    assert set(load(tmp_path / "kept")) == {"planted", "teacher/modular"}
    kept = json.loads((tmp_path / "kept" / "planted.json").read_text())
    figure, measured = (result["rows"][3]["tasks"]["arithmetic[64:]"] for result in (kept, results["planted"]))
    assert figure["correct"] == measured["correct"]
    assert figure["mean"] == pytest.approx(measured["mean"], rel=1e-5)
    text = document.read_text()
    assert "old" not in text
    assert "| addition | 0.250 [" in text
    document.write_text("<!-- sweep:table33 -->\n<!-- /sweep -->\n")
    with pytest.raises(ValueError, match=r"block must be one of .*, got 'table33'. Did you mean 'table3'"):
        replication.main([])
