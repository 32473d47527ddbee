"""Where signals sit: what is written of a group of tokens is what the records hold of it."""

import json

import pytest
from episodes import SCRIPTS, acting_tokenizer, drawn, played

from benchmarks import measure, signals
from benchmarks.table import TABLES
from tipdistill.records import About, RecordsWriter, open_records
from tipdistill.types import Rollout

TOKENIZER = acting_tokenizer()
RULES = ("q3", "soft_or")


def record(directory, rollouts):
    about = About("student", "teacher", len(TOKENIZER), rules=RULES, retention=0.2)
    with RecordsWriter(directory, TOKENIZER, about) as writer:
        writer.write(rollouts, drawn(rollouts, about, len(TOKENIZER)))
    return directory


def test_a_group_has_the_mean_of_its_tokens_and_the_share_that_each_rule_keeps(tmp_path):
    plain = Rollout(9, "p", (1,), tuple(range(30)), True)
    directory = record(tmp_path, [*played(TOKENIZER, SCRIPTS.values()), plain])
    result = signals.run_signals(directory, "trip")
    rows = [row for row in open_records(directory).read().to_pylist() if row["turn"] is not None]
    tests = {
        "argument": lambda row: row["kind"] == "argument",
        "answer": lambda row: row["kind"] == "answer",
        "turn 2": lambda row: row["turn"] == 2,
        "all": lambda row: True,
    }
    for group, test in tests.items():
        inside = [row for row in rows if test(row)]
        entry = result["groups"][group]
        assert entry["tokens"] == len(inside) > 0
        assert entry["share"] == pytest.approx(len(inside) / len(rows))
        assert entry["entropy"] == pytest.approx(sum(row["entropy"] for row in inside) / len(inside), rel=1e-5)
        assert entry["kept"]["q3"] == pytest.approx(sum(row["kept"] for row in inside) / len(inside))
        assert entry["kept"]["soft_or"] == pytest.approx(sum(row["kept_soft_or"] for row in inside) / len(inside))
        shares = [sum(row["quadrant"] == number for row in inside) / len(inside) for number in (1, 2, 3, 4)]
        assert entry["quadrants"] == pytest.approx(shares)
    assert result["settings"]["rollouts"] == len(SCRIPTS) + 1
    rollouts = open_records(directory).rollouts.to_pylist()
    judged = [row["correct"] for row in rollouts if row["correct"] is not None]
    assert result["correct"] == pytest.approx(sum(judged) / len(judged))
    assert 0 < result["correct"] < 1
    table = TABLES["signals-trip"](result)
    assert f"| turn 2 | {result['groups']['turn 2']['share']:.0%}".replace("%", " %") in table


def test_records_without_episodes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has no column kind"):
        signals.run_signals(record(tmp_path, [Rollout(0, "p", (1,), tuple(range(30)), True)]), "trip")


def test_beside_the_signals_stands_how_often_each_model_is_right(tmp_path):
    directory = record(tmp_path / "records", played(TOKENIZER, SCRIPTS.values()))
    scores = {"problems": 256, "num_samples": 4, "mean_at_k": 0.875, "standard_error": 0.0156}
    for model, mean in (("teacher", 0.875), ("student", 0.25)):
        (tmp_path / model).mkdir()
        tasks = {"trip": {**scores, "mean_at_k": mean, "turns": 5.0}}
        (tmp_path / model / "metrics.json").write_text(json.dumps({"tasks": tasks}))
    assert "hard score" not in TABLES["signals-trip"](signals.run_signals(directory, "trip"))
    result = signals.run_signals(directory, "trip", [tmp_path / "teacher", tmp_path / "student"])
    assert result["evaluated"] == {"teacher": scores, "student": {**scores, "mean_at_k": 0.25}}
    table = TABLES["signals-trip"](result)
    assert "| teacher | 0.875 ± 0.016 | 256 | 4 |" in table
    with pytest.raises(ValueError, match="is an evaluation of trip, not of maths"):
        signals.run_signals(directory, "maths", [tmp_path / "teacher"])
    with pytest.raises(ValueError, match=r"has no metrics.json: tipdistill eval --output_dir \S+ writes it"):
        signals.run_signals(directory, "trip", [tmp_path])


def test_the_planning_pair_passes_its_gates_and_its_page_says_so():
    result = json.loads((measure.RESULTS / "signals-trip.json").read_text(encoding="utf-8"))
    teacher, student = (result["evaluated"][model] for model in ("teacher", "student"))
    assert teacher["problems"] == student["problems"] == 256
    assert teacher["mean_at_k"] >= 0.9
    assert 0.2 <= student["mean_at_k"] <= 0.6
    assert result["groups"]["all"]["quadrants"][2] >= 0.02
    page = " ".join((measure.ROOT / "docs" / "trip.md").read_text(encoding="utf-8").split())
    assert "teacher's plans are right nine times in ten, the student's once in four" in page
    assert round(10 * teacher["mean_at_k"]) == 9
    assert round(4 * student["mean_at_k"], 1) == 1
