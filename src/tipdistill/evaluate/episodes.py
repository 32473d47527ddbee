"""What an evaluation keeps and counts of episodes, in which the model calls tools and an environment judges."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from ..environments import Acting, Worlds, read_environment
from ..types import ENDINGS, Verdict
from .engines import Completion
from .task import Task


def acting_of(task: Task, rows: Sequence[Mapping[str, Any]]) -> Acting | None:
    """The tools of a task's environment, to begin from the rows; None where it has no environment.

    Raises:
        ValueError: an environment that gives no verdict.
    """
    if task.environment is None:
        return None
    factory = read_environment(task.environment)
    made = factory()
    if not hasattr(made, "get_reward") and not hasattr(made, "_verdict"):
        raise ValueError(
            f"the environment of {task.name} does not say what was done right: give it a method get_reward() -> float."
        )
    return Acting(
        Worlds(factory=factory, seconds=task.tool_timeout),
        rows,
        task.max_tool_calling_iterations,
        task.max_tool_result_tokens,
        task.tool_timeout,
    )


def kept_of(completion: Completion) -> dict[str, Any]:
    """What a sample's row says of an episode: its transcript, counts of calls and failures, and the verdict.

    Args:
        completion: with turns.
    """
    results = [result for turn in completion.turns for result in turn.results]
    verdict = completion.verdict or Verdict(False)
    return {
        "transcript": [
            {"role": turn.role, "text": turn.text, "results": [asdict(result) for result in turn.results]}
            for turn in completion.turns
        ],
        "ending": completion.ending,
        "turns": sum(turn.role == "student" for turn in completion.turns),
        "calls": len(results),
        "failures": dict(Counter(result.outcome for result in results if result.outcome != "ok")),
        "parts": dict(verdict.parts),
        "figures": dict(verdict.figures),
        "correct": bool(verdict.correct),
        "answer": completion.turns[-1].text,
        "decided": True,
    }


def is_episode(row: dict[str, Any]) -> bool:
    """Whether what a sample's row says of an episode, where it is one, is of its types.

    Args:
        row: from a file, which may be damaged.
    """
    if "transcript" not in row:
        return True
    numbers = [row.get("turns"), row.get("calls")]
    for name in ("failures", "parts", "figures"):
        if not isinstance(row.get(name), dict):
            return False
        numbers += row[name].values()
    return row.get("ending") in ENDINGS and all(
        isinstance(number, (bool, int, float)) and math.isfinite(number) for number in numbers
    )


def summary(every: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over episodes: turns, calls, failures of each kind, endings, and what their environment gives figures of.

    Args:
        every: rows of samples, see `of_episode`.
    """

    def means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        names = dict.fromkeys(name for row in rows for name in row)
        return {name: fmean(float(row[name]) for row in rows if name in row) for name in names}

    failures = dict.fromkeys(name for row in every for name in row["failures"])
    return {
        "turns": fmean(row["turns"] for row in every),
        "calls": fmean(row["calls"] for row in every),
        "failures": {name: fmean(row["failures"].get(name, 0) for row in every) for name in failures},
        "endings": {name: fmean(row["ending"] == name for row in every) for name in ENDINGS},
        "parts": means([row["parts"] for row in every]),
        "figures": means([row["figures"] for row in every]),
    }
