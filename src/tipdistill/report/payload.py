"""A dataset as the page's JSON and arrays."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from ..columns import ROLLOUT_COLUMNS
from ..records import STATISTICS, TOKENS_FILE, Records
from ..select import DRAWN
from ..select.normalize import clipped_entropy
from ..select.quadrants import NAMES
from .budgets import BUDGETED
from .confusions import CONTEXTS, confusions
from .dataset import Dataset, RuleChoice
from .density import Hexagons, hexagons
from .episodes import episode_payload, episodes_payload, longest_result
from .pack import Pack, short_floats
from .texts import joined_texts

TOP = 5
PROBABILITY_STEPS = 1000  # the page shows a tenth of a percent
BATCH_ROWS = 1 << 16
LONGEST_PROMPT = 4000  # characters shown
OCCURRENCES = 20
# rules whose score is another column of the page, and those whose score says nothing of a token
SCORED_BY = {"entropy": "entropy", "entropy_sampling": "entropy", "divergence": "reverse_kl", "random": None}


def dataset_payload(dataset: Dataset, pack: Pack, max_tokens: int, seed: int) -> dict[str, Any]:
    """Everything that the page shows of one set of records.

    The map, the shares and the confusions are of all tokens; the token view is of as many whole rollouts, drawn at
    random, as `max_tokens` hold.

    Args:
        dataset: the statistics.
        pack: takes the arrays.
        max_tokens: of the token view; one rollout is shown in any case.
        seed: of the draw.
    """
    divergence = dataset.scores.require("reverse_kl").double().clamp(min=0).numpy()
    raw = dataset.scores.require("entropy").float()
    entropy = clipped_entropy(raw).double().numpy()
    cells = hexagons(entropy, divergence, dataset.thresholds[1])
    shown = _drawn(np.bincount(dataset.rollout.numpy()), max_tokens, seed)
    in_view = shown[dataset.rollout.numpy()]
    first, choices = _first_choices_and_view(dataset, in_view)
    place = np.cumsum(in_view) - 1
    top = float(raw[torch.from_numpy(entropy >= 1)].min()) if (entropy >= 1).any() else float(raw.max())
    return {
        "tokens": len(divergence),
        "rollouts": len(dataset.numbers),
        "step": dataset.records.sidecar.get("step"),
        "settings": _settings(dataset.records.sidecar),
        "thresholds": list(dataset.thresholds),
        "entropy_range": [float(raw.min()), top],
        "differing": dataset.differing,
        "retentions": list(dataset.retentions),
        "rules": [_rule(choice) for choice in dataset.rules],
        "shares": _shares(dataset, divergence),
        "map": _map(dataset, cells, pack),
        "confusions": _confusions(dataset, first, divergence, in_view, place),
        "episodes": episodes_payload(dataset, divergence),
        "view": _view(dataset, cells, in_view, shown, choices, pack, max_tokens),
    }


def _rule(choice: RuleChoice) -> dict[str, Any]:
    return {
        "name": choice.name,
        "recorded": choice.recorded,
        "sampled": choice.budget in DRAWN,
        "whole": choice.budget not in BUDGETED,
    }


def _settings(sidecar: dict[str, Any]) -> list[list[str]]:
    """The sidecar as (name, value) pairs of text."""
    pairs: list[list[str]] = []

    def add(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                add(f"{prefix} · {key}" if prefix else str(key), inner)
        elif value is not None:
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            pairs.append([prefix.replace("_", " "), text[:200]])

    add("", sidecar)
    return pairs[:60]


def _drawn(lengths: np.ndarray, max_tokens: int, seed: int) -> np.ndarray:
    """bool [R]: rollouts in random order until the next one does not fit; all where all fit."""
    if lengths.sum() <= max_tokens:
        return np.ones(len(lengths), dtype=bool)
    order = np.random.default_rng(seed).permutation(len(lengths))
    fits = np.cumsum(lengths[order]) <= max_tokens
    shown = np.zeros(len(lengths), dtype=bool)
    shown[order[: max(1, int(fits.sum()))]] = True
    return shown


def _shares(dataset: Dataset, divergence: np.ndarray) -> dict[str, Any]:
    """Tokens and divergence (nats) of each quadrant, and of each quadrant what every rule keeps at every retention."""
    quadrant = dataset.quadrant.numpy()
    levels = len(dataset.retentions)
    kept_tokens, kept_mass = [], []
    for choice in dataset.rules:
        cell = quadrant.astype(np.int64) * levels + choice.level
        counts = np.bincount(cell, minlength=5 * levels).reshape(5, levels)[1:]
        mass = np.bincount(cell, weights=divergence, minlength=5 * levels).reshape(5, levels)[1:]
        kept_tokens.append(counts.cumsum(axis=1).T.tolist())
        kept_mass.append(np.round(mass.cumsum(axis=1), 4).T.tolist())
    return {
        "tokens": [int((quadrant == number).sum()) for number in NAMES],
        "mass": [float(divergence[quadrant == number].sum()) for number in NAMES],
        "kept_tokens": kept_tokens,
        "kept_mass": kept_mass,
    }


def _map(dataset: Dataset, cells: Hexagons, pack: Pack) -> dict[str, Any]:
    """The hexagons, and of each how many tokens every rule keeps at which retention first."""
    levels, count = len(dataset.retentions), len(cells.tokens)
    kept = [
        np.bincount(cells.of_token * levels + choice.level, minlength=count * levels).reshape(count, levels)
        for choice in dataset.rules
    ]
    return {
        "bottom": cells.bottom,
        "top": cells.top,
        "columns": cells.columns,
        "rows": cells.rows,
        "x": pack.add(cells.x, "f32"),
        "y": pack.add(cells.y, "f32"),
        "tokens": pack.add(cells.tokens, "u32"),
        "kept": [pack.add(counts, "u32") for counts in kept],
    }


class _FirstChoices:
    """Both models' most probable tokens at the confident mistakes (Q3), gathered batch by batch."""

    def __init__(self) -> None:
        self.ids: dict[str, list[np.ndarray]] = {"student": [], "teacher": []}
        self.probabilities: dict[str, list[np.ndarray]] = {"student": [], "teacher": []}
        self.texts: dict[str, list[pa.Array]] = {"student": [], "teacher": []}

    def take(self, whose: str, first: pa.StructArray) -> None:
        self.ids[whose].append(first.field("token_id").to_numpy(zero_copy_only=False))
        self.probabilities[whose].append(first.field("probability").to_numpy(zero_copy_only=False))
        self.texts[whose].append(first.field("token"))


def _first_choices_and_view(dataset: Dataset, in_view: np.ndarray) -> tuple[_FirstChoices, dict[str, pa.ListArray]]:
    """One pass over the top-5 columns: the first choices of every Q3 token, and all choices of the rollouts in view."""
    mistaken = dataset.quadrant.numpy() == 3
    first, start = _FirstChoices(), 0
    choices: dict[str, Any] = {"student": [], "teacher": []}
    for batch in _batches(dataset.records, ["student_top5", "teacher_top5"]):
        rows = slice(start, start + len(batch))
        start += len(batch)
        for whose in ("student", "teacher"):
            column = batch.column(f"{whose}_top5")
            if mistaken[rows].any():
                lists = column.filter(pa.array(mistaken[rows]))
                first.take(whose, lists.flatten().take(_starts(lists)))
            if in_view[rows].any():
                choices[whose].append(column.filter(pa.array(in_view[rows])))
    return first, {whose: pa.chunked_array(chunks).combine_chunks() for whose, chunks in choices.items()}


def _batches(records: Records, columns: list[str]) -> Iterator[pa.RecordBatch]:
    try:
        yield from records.tokens.iter_batches(BATCH_ROWS, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{records.directory / TOKENS_FILE} is damaged: {str(error).splitlines()[0]} Score again."
        ) from error


def _starts(lists: pa.ListArray) -> pa.Array:
    """Index of the first item of each list among the flattened; null where a list is empty."""
    lengths = np.asarray(pc.fill_null(pc.list_value_length(lists), 0))
    starts = np.cumsum(lengths) - lengths
    return pa.array(starts, mask=lengths == 0)


def _confusions(
    dataset: Dataset, first: _FirstChoices, divergence: np.ndarray, in_view: np.ndarray, place: np.ndarray
) -> dict[str, Any]:
    mistakes = np.flatnonzero(dataset.quadrant.numpy() == 3)
    if len(mistakes) == 0:
        return {"tokens": 0, "agreed": 0, "mass": 0.0, "contexts": list(CONTEXTS), "tables": [[] for _ in CONTEXTS]}
    ids = {whose: np.nan_to_num(np.concatenate(chunks), nan=-1).astype(np.int64) for whose, chunks in first.ids.items()}
    probability = {whose: np.nan_to_num(np.concatenate(chunks)) for whose, chunks in first.probabilities.items()}
    texts = {whose: pa.chunked_array(chunks) for whose, chunks in first.texts.items()}
    other = ids["student"] != ids["teacher"]
    wrong = mistakes[other]
    tables = []
    for context in CONTEXTS:
        table = []
        for kind in confusions(
            wrong,
            ids["student"][other],
            ids["teacher"][other],
            dataset.token_id,
            dataset.before,
            divergence,
            context,
        ):
            rows = np.searchsorted(mistakes, kind.tokens)
            seen = kind.tokens[in_view[kind.tokens]][:OCCURRENCES]
            table.append(
                {
                    "before": _before(dataset, kind.token, context),
                    "student": texts["student"][int(rows[0])].as_py(),
                    "teacher": texts["teacher"][int(rows[0])].as_py(),
                    "student_probability": round(float(probability["student"][rows].mean()), 4),
                    "teacher_probability": round(float(probability["teacher"][rows].mean()), 4),
                    "count": kind.count,
                    "mass": kind.mass,
                    "where": place[seen].tolist(),
                }
            )
        tables.append(table)
    return {
        "tokens": len(mistakes),
        "agreed": int((~other).sum()),
        "mass": float(divergence[wrong].sum()),
        "contexts": list(CONTEXTS),
        "tables": tables,
    }


def _before(dataset: Dataset, token: int, context: int) -> str:
    """The text of the tokens before one, as many as there are."""
    context = min(context, int(dataset.before[token]))
    return "".join(dataset.texts(slice(token - context, token)))


def _view(
    dataset: Dataset,
    cells: Hexagons,
    in_view: np.ndarray,
    shown: np.ndarray,
    choices: dict[str, pa.ListArray],
    pack: Pack,
    max_tokens: int,
) -> dict[str, Any]:
    texts, raw = dataset.tokens_of(in_view)
    # one table of strings for the tokens written and all those that could have been; "" is number 0
    columns = [texts, *(lists.flatten().field("token") for lists in choices.values())]
    coded = pa.chunked_array([pa.array([""]), *columns]).combine_chunks().dictionary_encode()
    index = coded.indices.to_numpy()[1:]
    own = np.split(index, np.cumsum([len(column) for column in columns])[:-1])
    rollout = dataset.rollout.numpy()[in_view]
    statistics = {
        name: pack.add(short_floats(getattr(dataset.scores, name).float().numpy()[in_view]), "f32")
        for name in STATISTICS
        if getattr(dataset.scores, name) is not None
    }
    view: dict[str, Any] = {
        "tokens": int(in_view.sum()),
        "strings": coded.dictionary.to_pylist(),
        "text": pack.add(own[0], "u32"),
        "parts": _parts(raw, dataset.before[in_view]),
        "quadrant": pack.add(dataset.quadrant.numpy()[in_view], "u8"),
        "hexagon": pack.add(cells.of_token[in_view], "u16"),
        "statistics": statistics,
        "levels": [pack.add(choice.level[in_view], "u8") for choice in dataset.rules],
        "scores": [
            SCORED_BY[choice.name]
            if choice.name in SCORED_BY and not choice.recorded
            else pack.add(short_floats(choice.score[in_view], 7), "f32")
            for choice in dataset.rules
        ],
        "kept": {name: pack.add(mask[in_view], "u8") for name, mask in dataset.kept.items()},
        "rollouts": _rollouts(dataset, shown, np.bincount(rollout, minlength=len(shown)), max_tokens),
    }
    if dataset.turn is not None and dataset.kind is not None:
        view["turn"] = pack.add(dataset.turn[in_view] + 1, "u16")  # 0: none
        view["kind"] = pack.add(dataset.kind[in_view] + 1, "u8")
    for whose, own_index in zip(choices, own[1:], strict=True):
        lists = choices[whose]
        lengths = np.asarray(pc.fill_null(pc.list_value_length(lists), 0))
        column = np.arange(len(own_index)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        row = np.repeat(np.arange(len(lengths)), lengths)
        inside = column < TOP
        token = np.zeros((len(lengths), TOP), dtype=np.uint32)
        token[row[inside], column[inside]] = own_index[inside]
        probability = np.zeros((len(lengths), TOP))
        probability[row[inside], column[inside]] = lists.flatten().field("probability").to_numpy()[inside]
        steps = np.round(probability.clip(0, 1) * PROBABILITY_STEPS)
        # column by column, which compresses better: first choices are near 1, fifth ones near 0
        view[f"{whose}_top"] = pack.add(token.T, "u32")
        view[f"{whose}_probability"] = pack.add(steps.T, "u16")
    return view


def _parts(raw: list[bytes | None], before: np.ndarray) -> list[list[Any]]:
    """(place, text) of tokens that are characters only together; never across rollouts or turns."""
    if not any(piece is not None for piece in raw):
        return []
    borders = [*np.flatnonzero(before == 0).tolist(), len(raw)]
    parts: list[list[Any]] = []
    for start, end in pairwise(borders):
        parts += [[start + place, text] for place, text in joined_texts(raw[start:end]).items()]
    return parts


def _rollouts(dataset: Dataset, shown: np.ndarray, lengths: np.ndarray, max_tokens: int) -> list[dict[str, Any]]:
    table = dataset.records.rollouts
    own = [name for name in ROLLOUT_COLUMNS.names if name in table.column_names]
    table = table.select(["rollout", "prompt_id", "prompt", "finished", "tokens", *own])
    wanted = pa.array(dataset.numbers[shown], type=table["rollout"].type)
    known = {row["rollout"]: row for row in table.filter(pc.is_in(table["rollout"], wanted)).to_pylist()}
    longest = longest_result(known.values(), max_tokens)
    rollouts = []
    for place in np.flatnonzero(shown).tolist():
        number = int(dataset.numbers[place])
        row = known[number]
        prompt = row["prompt"]
        if len(prompt) > LONGEST_PROMPT:
            prompt = f"{prompt[: LONGEST_PROMPT // 2]} […] {prompt[-LONGEST_PROMPT // 2 :]}"
        rollouts.append(
            {
                "rollout": number,
                "prompt": prompt,
                "prompt_id": row["prompt_id"],
                "tokens": int(lengths[place]),
                "finished": row["finished"],
                "episode": episode_payload(row, longest) if row.get("turns") else None,
            }
        )
        if row.get("turns") and row["tokens"] != lengths[place]:
            raise ValueError(
                f"the files in {dataset.records.directory} do not belong together: rollout {number} has "
                f"{row['tokens']} tokens in its turns, and {lengths[place]} in {TOKENS_FILE}. Score again."
            )
    return rollouts
