"""What a run shows while it trains: a line for every step that is logged, and every metric in a file."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn
from transformers import TrainerCallback

from ..files import write_text
from ..terminal import PlainConsole

logger = logging.getLogger(__name__)
METRICS_FILE = "metrics.jsonl"


class MetricsFile(TrainerCallback):
    """Writes every metric that is logged to <output_dir>/metrics.jsonl, a JSON object a line, as it comes.

    A resumed run goes on in the file, without what had come after its checkpoint; a new run begins a new one. What is
    not finite stands as null. A run that is finished already leaves the file as it is. A file that cannot be written
    costs a warning, not the run.
    """

    _finished = False

    def on_train_begin(self, args, state, control, **kwargs):
        self._finished = 0 < state.max_steps <= state.global_step
        if not state.is_world_process_zero or self._finished:
            return
        path = Path(args.output_dir) / METRICS_FILE
        kept = "".join(
            f"{line}\n" for line in _lines(path) if state.global_step and _step_of(line) <= state.global_step
        )

        def begin() -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, kept)

        self._try(begin)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs or self._finished:
            return
        line = json.dumps({"step": state.global_step, **{name: _plain(value) for name, value in logs.items()}})

        def append() -> None:
            with (Path(args.output_dir) / METRICS_FILE).open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")

        self._try(append)

    def _try(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except OSError as error:
            logger.warning(f"{METRICS_FILE} was not written: {error}")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _step_of(line: str) -> float:
    """The step of a line; infinite where the line is none, as the last one of a run that was killed."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
    return step if isinstance(step, int) else math.inf


def _plain(value: Any) -> Any:
    if isinstance(value, bool | int | str) or value is None:
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        return str(value)
    return number if math.isfinite(number) else None


def _share(logs: Mapping[str, Any]) -> float | None:
    return logs.get("selection/kept_fraction")


def _kept_divergence(logs: Mapping[str, Any]) -> float | None:
    """Mean reverse KL of the kept tokens: what they hold of the divergence, over what they are of the tokens."""
    mean, kept, share = logs.get("reverse_kl"), logs.get("selection/kept_divergence_share"), _share(logs)
    return None if mean is None or kept is None or not share else float(mean * kept / share)


# (heading, width, value of a log, format); the time left stands in none of them
COLUMNS: tuple[tuple[str, int, Callable[[Mapping[str, Any]], float | None], str], ...] = (
    ("loss", 9, lambda logs: logs.get("loss"), ".4f"),
    ("KL kept", 9, _kept_divergence, ".4f"),
    ("KL dropped", 11, lambda logs: logs.get("selection/dropped_divergence"), ".4f"),
    ("kept", 7, _share, ".1%"),
    ("length", 8, lambda logs: logs.get("completions/mean_length"), ".0f"),
    ("tokens/s", 10, lambda logs: logs.get("tokens_per_second"), ",.0f"),
)


class StepTable(TrainerCallback):
    """Prints a row for every step that is logged, and a line for every evaluation.

    The divergences are mean reverse KLs (nats); the length is the rollouts' mean number of tokens; the time left is
    that of the steps to come, as fast as those so far. On a terminal a bar follows each step.

    Args:
        console: where to; None: standard output.
    """

    def __init__(self, console: PlainConsole | None = None) -> None:
        self.console = console or PlainConsole(soft_wrap=True)
        self._bar: Progress | None = None
        self._begun, self._first = 0.0, 0

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        self._begun, self._first = time.monotonic(), state.global_step
        heads = "".join(f"{name:>{width}}" for name, width, *_ in COLUMNS)
        self.console.print(f"{'step':>{_width(state)}}{heads}{'left':>10}", style="bold")
        if self.console.is_terminal:
            columns = (TextColumn("step {task.completed} of {task.total}"), BarColumn())
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._bar.add_task("", total=state.max_steps, completed=state.global_step)
            self._bar.start()

    def on_step_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def close(self) -> None:
        """Take the bar away; a run that fails ends without `on_train_end`."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        if "loss" in logs:
            step, values = f"{state.global_step:>{_width(state)}}", [value(logs) for _, _, value, _ in COLUMNS]
            cells = [
                f"{'–' if number is None or not math.isfinite(number) else format(number, form):>{width}}"
                for number, (_, width, _, form) in zip(values, COLUMNS, strict=True)
            ]
            self._say(step + "".join(cells) + f"{self._left(state):>10}")
        results = [f"{name.removeprefix('eval_')} {value:.4g}" for name, value in logs.items() if _is_result(name)]
        if results:
            self._say(f"{state.global_step:>{_width(state)}}  {', '.join(results)}")

    def _say(self, line: str) -> None:
        self.console.print(line)
        logging.getLogger("tipdistill.run").info(line)

    def _left(self, state: Any) -> str:
        done = state.global_step - self._first
        if done < 1:
            return "–"
        seconds = (time.monotonic() - self._begun) / done * (state.max_steps - state.global_step)
        return str(timedelta(seconds=round(seconds)))


def _width(state: Any) -> int:
    return max(6, len(str(state.max_steps)) + 1)


def _is_result(name: str) -> bool:
    """Whether a figure is an evaluation's result, and no detail of it."""
    return name == "eval_loss" or (name.startswith("eval_") and (name.endswith("/mean") or "/mean_at_" in name))
