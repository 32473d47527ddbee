"""Training histories are found wherever a run leaves them."""

import json

import pytest

from tipdistill.report.history import MOST_CELLS, read_runs
from tipdistill.report.sources import MOST_STEPS, find_sources

ENTRIES = [
    {"step": 1, "loss": 2.0, "epoch": 0.1, "note": "text"},
    {"step": 2, "loss": 1.0, "quadrants/q3": 0.1},
    {"step": 2, "eval_loss": 0.7, "eval_math500/mean_at_16": 0.5},
    {"step": 2, "loss": 0.9},  # logged again by a resumed run
    {"step": 3, "loss": float("nan")},
]


def put(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def test_a_runs_own_state_comes_before_its_checkpoints(tmp_path):
    put(tmp_path / "run" / "trainer_state.json", {"log_history": ENTRIES})
    put(tmp_path / "run" / "checkpoint-9" / "trainer_state.json", {"log_history": []})
    (run,) = read_runs(tmp_path / "run")
    assert run.name == "run"
    assert run.series == {
        "loss": ([1, 2], [2.0, 0.9]),
        "quadrants/q3": ([2], [0.1]),
        "eval_loss": ([2], [0.7]),
        "eval_math500/mean_at_16": ([2], [0.5]),
    }


def test_the_newest_whole_checkpoint_is_read(tmp_path):
    for step, text in ((9, {"log_history": ENTRIES}), (10, '{"log_history": [{"st'), (100, "")):
        put(tmp_path / f"checkpoint-{step}" / "trainer_state.json", text)
    for name in ("1000", "²"):
        (tmp_path / f"checkpoint-{name}").mkdir()
    (run,) = read_runs(tmp_path)
    assert run.series["loss"] == ([1, 2], [2.0, 0.9])


def test_a_run_that_saved_nothing_has_the_curves_that_it_logged(tmp_path):
    lines = ['{"step": 1, "loss": 2.0}', "", "[]", '{"step": 2, "loss": 1.0, "lr": null}', '{"step": 3, "lo']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    (run,) = read_runs(tmp_path)
    assert run.series == {"loss": ([1, 2], [2.0, 1.0])}
    (tmp_path / "trainer_state.json").write_text('{"log_history": [{"step": 9, "loss": 0.5}]}')
    (run,) = read_runs(tmp_path)  # what was saved at the end comes first
    assert run.series == {"loss": ([9], [0.5])}


def test_a_sweeps_cells(tmp_path):
    for name in ("q3-10", "all-100"):
        put(tmp_path / "cells" / name / "trainer_state.json", {"log_history": ENTRIES})
    (tmp_path / "cells" / "unfinished").mkdir()
    runs = read_runs(tmp_path)
    assert [run.name for run in runs] == ["all-100", "q3-10"]
    assert read_runs(tmp_path / "cells" / "q3-10") == [runs[1]]
    for number in range(MOST_CELLS - 1):
        put(tmp_path / "cells" / f"more-{number}" / "trainer_state.json", {"log_history": ENTRIES})
    assert read_runs(tmp_path) == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"log_history": 3}', '{"log_history": [3]}'])
def test_a_state_that_cannot_be_read_is_named(tmp_path, text):
    put(tmp_path / "trainer_state.json", text)
    with pytest.raises(ValueError, match=r"trainer_state.json is no trainer state that can be read"):
        read_runs(tmp_path)


def test_steps_are_in_order_and_thinned_out_evenly(tmp_path):
    for step in range(0, 130, 10):
        put(tmp_path / "run" / "records" / f"step-{step}" / "tokens.parquet", "")
    put(tmp_path / "run" / "records" / "step-5" / "records.json", "{}")  # killed before its tokens were written
    sources = find_sources([tmp_path / "run"])
    assert [path.name for path in sources.records.values()] == [
        "step-0",
        "step-20",
        "step-50",
        "step-70",
        "step-100",
        "step-120",
    ]
    assert len(sources.records) == MOST_STEPS
    assert sources.left_out == 13 - MOST_STEPS


def test_directories_of_one_name_are_told_apart(tmp_path):
    for parent in ("a", "b"):
        put(tmp_path / parent / "run" / "trainer_state.json", {"log_history": ENTRIES})
        put(tmp_path / parent / "run" / "tokens.parquet", "")
    sources = find_sources([tmp_path / "a" / "run", tmp_path / "b" / "run"])
    assert list(sources.records) == ["a/run", "b/run"]
    assert [run.name for run in sources.runs] == ["a/run", "b/run"]
    with pytest.raises(ValueError, match="was given twice"):
        find_sources([tmp_path / "a" / "run", tmp_path / "b" / ".." / "a" / "run"])


def test_nothing_to_report_says_what_was_looked_for(tmp_path):
    with pytest.raises(ValueError, match=r"neither token records .* nor a training history .* nor a probe.json"):
        find_sources([tmp_path])
    with pytest.raises(FileNotFoundError, match=r"there is no .*nowhere"):
        find_sources([tmp_path / "nowhere"])
    put(tmp_path / "file.txt", "")
    with pytest.raises(ValueError, match="is a file"):
        find_sources([tmp_path / "file.txt"])
