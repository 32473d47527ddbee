"""What a terminal shows of a sweep: a line per finished cell, and a bar with the time left."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from .grid import Cell, Grid, Row
from .result import outcome


class Board:
    """A line per finished cell, and in a terminal a bar.

    Args:
        grid: whose cells run.
        finished: how many of them were finished before.
        workers: cells at a time.
        threads: of each.
    """

    def __init__(self, grid: Grid, finished: int, workers: int, threads: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        from ..terminal import PlainConsole

        self.total, self.ended = grid.number_of_cells(), 0
        self.workers, self.began = workers, time.monotonic()
        self.since: dict[str, float] = {}
        self.seconds: list[float] = []
        self.console = PlainConsole()
        self.progress = Progress(
            BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), console=self.console
        )
        self.bar = self.progress.add_task("", total=self.total)
        before = f", {finished} finished before" if finished else ""
        self.say(f"{self.total} cells in {len(grid.rows)} rows{before}; {workers} workers, {threads} threads each.")

    def __enter__(self) -> Board:
        if self.console.is_terminal:
            self.progress.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.progress.stop()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(text, soft_wrap=True, highlight=False)

    def started(self, cell: Cell) -> None:
        """A worker has the cell."""
        self.since[cell.key] = time.monotonic()

    def kept(self, cell: Cell) -> None:
        """The cell was finished before this sweep began."""
        self.ended += 1

    def finished(self, cell: Cell, result: Mapping[str, Any]) -> None:
        """The cell has its figures."""
        figures = ", ".join(f"{name} {outcome(task):.3f}" for name, task in result["tasks"].items())
        self._ended(cell, figures)

    def failed(self, cell: Cell, why: str) -> None:
        """The cell has none."""
        self._ended(cell, f"FAILED, {why}")

    def say_rate(self, row: Row, rate: float | None, means: Mapping[float, float]) -> None:
        """Print which learning rate was chosen for a row."""
        candidates = ", ".join(f"{candidate:g}: {mean:.3f}" for candidate, mean in means.items())
        chosen = "no rate came through" if rate is None else f"rate {rate:g} chosen ({candidates})"
        self.say(f"{row.key}: {chosen}")

    def refresh(self) -> None:
        """Redraw the bar."""
        self.progress.update(self.bar, completed=self.ended, description=self._now())

    def _ended(self, cell: Cell, text: str) -> None:
        self.ended += 1
        seconds = time.monotonic() - self.since.pop(cell.key)
        self.seconds.append(seconds)
        elapsed = time.monotonic() - self.began
        left = f", {self._left()}" if self._left() else ""
        self.say(f"{elapsed:6.0f} s  {self.ended}/{self.total}  {cell.key}: {text} ({seconds:.0f} s){left}")

    def _now(self) -> str:
        elapsed = time.monotonic() - self.began
        return f"{elapsed:.0f} s  {len(self.since)} running  {self._left()}"

    def _left(self) -> str:
        if not self.seconds:
            return ""
        each = sum(self.seconds) / len(self.seconds)
        running = sum(min(each, time.monotonic() - since) for since in self.since.values())
        seconds = ((self.total - self.ended) * each - running) / self.workers
        return f"about {seconds:.0f} s left" if seconds < 120 else f"about {seconds / 60:.0f} min left"
