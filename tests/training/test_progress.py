"""What a run shows, and metrics.jsonl."""

import io
import json
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerState

from tipdistill.terminal import PlainConsole
from tipdistill.training.progress import COLUMNS, METRICS_FILE, MetricsFile, StepTable

STEP = {
    "loss": 0.5,
    "reverse_kl": 0.4,
    "selection/kept_divergence_share": 0.9,
    "selection/kept_fraction": 0.25,
    "selection/dropped_divergence": 0.05,
    "completions/mean_length": 31.5,
    "tokens_per_second": 1234.5,
}


def state_at(step, steps=20):
    return TrainerState(global_step=step, max_steps=steps, is_world_process_zero=True)


@pytest.fixture
def args(tmp_path):
    return SimpleNamespace(output_dir=str(tmp_path / "run"))


def rows(args):
    path = f"{args.output_dir}/{METRICS_FILE}"
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_every_metric_is_a_line(args):
    file = MetricsFile()
    file.on_train_begin(args, state_at(0), None)
    file.on_log(args, state_at(1), None, logs={"loss": torch.tensor(0.5), "q3": math.nan, "name": "a", "whole": 3})
    file.on_log(args, state_at(2), None, logs={"loss": 0.25})
    assert rows(args) == [
        {"step": 1, "loss": 0.5, "q3": None, "name": "a", "whole": 3},
        {"step": 2, "loss": 0.25},
    ]


def test_a_resumed_run_goes_on_and_a_new_one_begins_anew(args):
    file = MetricsFile()
    file.on_train_begin(args, state_at(0), None)
    for step in (1, 2, 3):
        file.on_log(args, state_at(step), None, logs={"loss": float(step)})
    with open(f"{args.output_dir}/{METRICS_FILE}", "a", encoding="utf-8") as written:
        written.write('{"step": 4, "lo')  # killed in the middle of a line
    file.on_train_begin(args, state_at(2), None)
    file.on_log(args, state_at(3), None, logs={"loss": 30.0})
    assert [(row["step"], row["loss"]) for row in rows(args)] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    file.on_train_begin(args, state_at(0), None)
    assert rows(args) == []


def test_a_process_that_is_not_the_main_one_writes_nothing(args, tmp_path):
    state = TrainerState(global_step=1, max_steps=2, is_world_process_zero=False)
    file, table = MetricsFile(), StepTable(PlainConsole(file=io.StringIO()))
    for callback in (file, table):
        callback.on_train_begin(args, state, None)
        callback.on_log(args, state, None, logs=STEP)
    assert not (tmp_path / "run").exists()
    assert table.console.file.getvalue() == ""


def test_a_file_that_cannot_be_written_is_a_warning(args, tmp_path, caplog):
    (tmp_path / "run").write_text("a file where the directory should be")
    file = MetricsFile()
    file.on_train_begin(args, state_at(0), None)
    file.on_log(args, state_at(1), None, logs=STEP)
    assert caplog.text.count("metrics.jsonl was not written") == 2


def table_of(*logs, terminal=False):
    """What is printed of (step, logs) pairs."""
    screen = io.StringIO()
    table = StepTable(PlainConsole(file=screen, width=100, force_terminal=terminal, soft_wrap=True))
    table.on_train_begin(None, state_at(0), None)
    for step, logged in logs:
        table.on_step_end(None, state_at(step), None)
        table.on_log(None, state_at(step), None, logs=logged)
    table.on_train_end(None, state_at(logs[-1][0]), None)
    return screen.getvalue()


def test_a_step_is_a_row_under_its_headings():
    heads, first, second = table_of((1, STEP), (20, {"loss": 0.125, "reverse_kl": math.nan})).splitlines()
    assert heads.split() == ["step", "loss", "KL", "kept", "KL", "dropped", "kept", "length", "tokens/s", "left"]
    # the kept quarter holds 0.9 of the divergence: 0.4 · 0.9 / 0.25
    assert first.split()[:7] == ["1", "0.5000", "1.4400", "0.0500", "25.0%", "32", "1,234"]
    assert second.split() == ["20", "0.1250", "–", "–", "–", "–", "–", "0:00:00"]
    assert len({len(heads), len(first), len(second)}) == 1
    assert [width for _, width, *_ in COLUMNS] == [9, 9, 11, 7, 8, 10]


def test_an_evaluation_is_a_line_of_its_results():
    printed = table_of(
        (5, {"eval_reverse_kl_heldout/mean": 0.78, "eval_reverse_kl_heldout/truncated": 0.5, "epoch": 1.0}),
        (5, {"eval_sums/mean_at_4": 0.5, "eval_loss": 0.25, "eval_runtime": 3.0}),
        (5, {"train_runtime": 9.0}),
    )
    assert printed.splitlines()[1:] == ["     5  reverse_kl_heldout/mean 0.78", "     5  sums/mean_at_4 0.5, loss 0.25"]


def test_a_terminal_has_a_bar_that_goes_away():
    printed = table_of((1, STEP), (20, STEP), terminal=True)
    assert "step 0 of 20" in printed or "step 1 of 20" in printed
    assert printed.rstrip("\n").endswith("\x1b[?25h\r\x1b[1A\x1b[2K") or "\x1b[?25h" in printed
