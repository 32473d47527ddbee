"""Episodes as the page shows them: how they went, where their signals sit, and each as a conversation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow.compute as pc

from ..columns import read_verdict
from ..kinds import KINDS
from .dataset import Dataset

# Characters that are shown. What a tool said may be of any length, and the page is to open all the same.
LONGEST_RESULT = 4000
SHORTEST_RESULT = 200
RESULTS_PER_TOKEN = 40
LONGEST_NAME = 120
LONGEST_ARGUMENTS = 300
MOST_PARTS = 60
MOST_TURNS = 12


def episodes_payload(dataset: Dataset, divergence: np.ndarray) -> dict[str, Any] | None:
    """How all episodes went, and of each kind of token and each turn the quadrants, the divergence and what is kept.

    Args:
        dataset: the statistics of all tokens.
        divergence: float [N], nats.

    Returns:
        None where there is no episode.
    """
    if dataset.turn is None or dataset.kind is None:
        return None
    table = dataset.records.rollouts
    table = table.filter(pc.is_valid(table["turns"])).select(["turns", "ending", "correct"])
    turns = pc.list_flatten(table["turns"])
    results = pc.list_flatten(pc.struct_field(turns, "results"))
    outcomes = Counter(pc.struct_field(results, "outcome").to_pylist())
    correct = table["correct"].drop_null().to_pylist()
    late = np.minimum(dataset.turn, MOST_TURNS)
    names = [f"turn {number}" for number in range(MOST_TURNS)] + [f"turn {MOST_TURNS} and later"]
    return {
        "count": len(table),
        "judged": len(correct),
        "correct": sum(correct),
        "turns": pc.struct_field(turns, "role").to_pylist().count("student"),
        "calls": sum(outcomes.values()),
        "failures": [[_short(name, LONGEST_NAME), number] for name, number in _failures(outcomes)],
        "endings": [
            [_short(name, LONGEST_NAME), number] for name, number in Counter(table["ending"].to_pylist()).most_common(8)
        ],
        "kinds": _groups(dataset, divergence, dataset.kind, KINDS),
        "by_turn": _groups(dataset, divergence, late, names),
    }


def _failures(outcomes: Counter[str]) -> list[tuple[str, int]]:
    return [(name, number) for name, number in outcomes.most_common(8) if name != "ok"]


def _groups(dataset: Dataset, divergence: np.ndarray, group: np.ndarray, names: Iterable[str]) -> list[dict[str, Any]]:
    """Of each group that has tokens: how many, in which quadrants, their divergence, and what each rule keeps of it."""
    levels, quadrant = len(dataset.retentions), dataset.quadrant.numpy()
    rows = []
    for number, name in enumerate(names):
        inside = group == number
        if not inside.any():
            continue
        kept = [np.bincount(choice.level[inside], minlength=levels).cumsum().tolist() for choice in dataset.rules]
        rows.append(
            {
                "name": name,
                "tokens": int(inside.sum()),
                "quadrants": np.bincount(quadrant[inside], minlength=5)[1:].tolist(),
                "mass": float(divergence[inside].sum()),
                "kept": kept,
            }
        )
    return rows


def longest_result(rows: Iterable[Mapping[str, Any]], max_tokens: int) -> int:
    """How many characters of each result are shown, so that all of them together do not outgrow the tokens.

    Args:
        rows: of rollouts.parquet.
        max_tokens: that are shown.

    Example:
        >>> rows = [{"turns": [{"results": [{}] * 3}]}, {"turns": None}]
        >>> longest_result(rows, 100_000), longest_result(rows, 60), longest_result(rows, 1)
        (4000, 800, 200)
    """
    results = sum(len(turn["results"]) for row in rows for turn in row.get("turns") or ())
    return max(SHORTEST_RESULT, min(LONGEST_RESULT, RESULTS_PER_TOKEN * max_tokens // max(1, results)))


def episode_payload(row: Mapping[str, Any], longest: int) -> dict[str, Any]:
    """An episode: its turns in order, a number of tokens where the student wrote, else what the tools answered.

    Args:
        row: of rollouts.parquet.
        longest: characters of a result that are shown.
    """
    verdict = read_verdict(row["verdict"]) if row["verdict"] is not None else None
    parts = list(verdict.parts.items()) if verdict else []
    if len(parts) > MOST_PARTS:  # what fails is shown first
        parts = sorted(parts, key=lambda part: part[1])
    figures = list(verdict.figures.items()) if verdict else []
    return {
        "turns": [
            turn["tokens"] if turn["role"] == "student" else [_result(result, longest) for result in turn["results"]]
            for turn in row["turns"]
        ],
        "ending": _short(row["ending"], LONGEST_NAME),
        "correct": row["correct"],
        "parts": [[_short(name, LONGEST_NAME), holds] for name, holds in parts[:MOST_PARTS]],
        "more_parts": max(0, len(parts) - MOST_PARTS),
        "figures": [[_short(name, LONGEST_NAME), value] for name, value in figures[:MOST_PARTS]],
    }


def _result(result: Mapping[str, str], longest: int) -> dict[str, Any]:
    text = result["text"]
    cut = max(0, len(text) - longest)
    ahead = len(text) if not cut else longest * 3 // 4
    return {
        "name": _short(result["name"], LONGEST_NAME),
        "arguments": _short(result["arguments"], LONGEST_ARGUMENTS),
        "outcome": _short(result["outcome"], LONGEST_NAME),
        "text": text[:ahead],
        "cut": cut,
        "end": text[ahead + cut :],
    }


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
