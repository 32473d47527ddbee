"""What a run logged: its training history, from wherever it was left."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..documents import parse_json, read_json

_ACCURACY = re.compile(r"(^|[_/])(accuracy|(mean|pass|maj)(@|_at_)(\d+|k))$", re.IGNORECASE)
_DIVERGENCE = re.compile(r"eval_(reverse|forward)_kl\w*/mean$")
_NUMBERED = re.compile(r"checkpoint-[0-9]+")
MOST_CELLS = 12
METRICS = "metrics.jsonl"
_NOT_SERIES = {"step", "epoch", "total_flos"}


@dataclass(frozen=True)
class Run:
    """The history of one run.

    Attributes:
        name: how the report calls it.
        series: metric → ([steps], [values]), finite values only.
    """

    name: str
    series: dict[str, tuple[list[int], list[float]]] = field(default_factory=dict)


def is_accuracy(metric: str) -> bool:
    """Whether a metric is an accuracy, by its name.

    Example:
        >>> [is_accuracy(name) for name in ("accuracy", "eval_math500/mean_at_16", "loss", "time/rollout")]
        [True, True, False, False]
    """
    return _ACCURACY.search(metric) is not None


def is_divergence(metric: str) -> bool:
    """Whether a metric is a held-out divergence, by its name.

    Example:
        >>> [is_divergence(name) for name in ("eval_reverse_kl_heldout/mean", "reverse_kl", "eval_sums/mean_at_1")]
        [True, False, False]
    """
    return _DIVERGENCE.match(metric) is not None


def read_runs(directory: Path) -> list[Run]:
    """The histories in a directory: a run's own, its newest readable checkpoint's, or those of the cells of a sweep.

    Args:
        directory: of a run (`trainer_state.json`, `checkpoint-*/trainer_state.json`, or `metrics.jsonl` where nothing
            was saved), or of a sweep or a demo (`cells/*/trainer_state.json`).

    Returns:
        No run where there is no history, or more than `MOST_CELLS` of them: nobody can tell so many curves apart.

    Raises:
        ValueError: a history that is there cannot be read.
    """
    name = directory.resolve().name
    for path in (directory / "trainer_state.json", *_checkpoints(directory)):
        if path.is_file():
            try:
                return [Run(name, _series(read_json(path)["log_history"]))]
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
                if path.parent == directory:
                    raise ValueError(f"{path} is no trainer state that can be read: {error}") from error
                # an interrupted save; an older checkpoint may be whole
    if (directory / METRICS).is_file():
        return [Run(name, _series(_logged(directory / METRICS)))]
    cells = sorted(path.parent for path in (directory / "cells").glob("*/trainer_state.json"))
    return [run for cell in cells for run in read_runs(cell)] if len(cells) <= MOST_CELLS else []


def _logged(path: Path) -> Iterator[dict[str, Any]]:
    """The entries of a metrics.jsonl; a line that is none, such as the last one of a run that was killed, is left."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = parse_json(line, str(path))
        except ValueError:
            continue
        step = entry.get("step") if isinstance(entry, dict) else None
        if isinstance(step, int) and not isinstance(step, bool):
            yield entry


def _checkpoints(directory: Path) -> list[Path]:
    numbered = [path for path in directory.glob("checkpoint-*") if _NUMBERED.fullmatch(path.name)]
    newest_first = sorted(numbered, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True)
    return [path / "trainer_state.json" for path in newest_first]


def _series(entries: Iterable[dict[str, Any]]) -> dict[str, tuple[list[int], list[float]]]:
    """Metric → points. A step that was logged twice (a resumed run) counts as it was logged last."""
    points: dict[str, dict[int, float]] = {}
    for place, entry in enumerate(entries, start=1):
        step = int(entry.get("step", place))
        for metric, value in entry.items():
            if metric in _NOT_SERIES or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if math.isfinite(value):
                points.setdefault(metric, {})[step] = float(value)
    return {metric: ([*sorted(at)], [at[step] for step in sorted(at)]) for metric, at in points.items()}
