"""Token records → what the page shows of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ..columns import TOKEN_COLUMNS
from ..kinds import KINDS
from ..records import STATISTICS, TOKENS_FILE, Records
from ..select import COMPLEMENT, DRAWN, RULES, draw, resolve_rule
from ..select.budget import ranks
from ..select.quadrants import DIVERGENCE_THRESHOLD, ENTROPY_THRESHOLD, quadrants
from ..select.rule import BUDGETS
from ..types import Selection, TokenScores
from .budgets import BOTTOM, BUDGETED, RETENTIONS, computable_rules, keep_levels, ranking
from .texts import joined_texts, shown_bytes


@dataclass(frozen=True)
class RuleChoice:
    """A rule and what it would keep.

    Attributes:
        name: as `select` takes it.
        level: uint8 [N], see `keep_levels`.
        score: float32 [N].
        recorded: ranked by the score that was recorded, not recomputed.
        budget: what it does with its score, see `Rule`. "all" and "weight" keep every token at any retention.
    """

    name: str
    level: np.ndarray
    score: np.ndarray
    recorded: bool
    budget: str


@dataclass(frozen=True)
class Dataset:
    """The statistics of all tokens of one set of records.

    Attributes:
        records: where they come from.
        rollout: int64 [N] in 0..R−1, ascending.
        numbers: int [R], what the records call each rollout.
        before: int64 [N], how many of the student's tokens stand before each, back to the last result of a tool.
        turn: int64 [N], number of the student's turn; −1 in rollouts that are no episodes. None: there is no episode.
        kind: int64 [N], places in `KINDS`; −1 and None as for turns.
        token_id: int [N].
        scores: statistics, float32 [N] each.
        quadrant: int8 [N], by the thresholds.
        thresholds: (ĥ, nats).
        differing: share of the tokens whose recorded quadrant is another one.
        retentions: ascending to 1.
        rules: in the order to offer them.
        kept: what was recorded as kept, rule → bool [N].
    """

    records: Records
    rollout: Tensor
    numbers: np.ndarray
    before: np.ndarray
    turn: np.ndarray | None
    kind: np.ndarray | None
    token_id: np.ndarray
    scores: TokenScores
    quadrant: Tensor
    thresholds: tuple[float, float]
    differing: float
    retentions: tuple[float, ...]
    rules: tuple[RuleChoice, ...]
    kept: dict[str, np.ndarray]

    def selection(self, rule: str, retention: float) -> Selection:
        """What a rule of `rules` keeps at one of `retentions`."""
        choice = next(choice for choice in self.rules if choice.name == rule)
        mask = torch.from_numpy(choice.level <= self.retentions.index(retention))
        return Selection(mask, mask.float(), torch.from_numpy(choice.score))

    @cached_property
    def _text_columns(self) -> tuple[pa.Array, pa.Array]:
        table = self.records.read(["token", "token_bytes"])
        return table["token"].combine_chunks(), table["token_bytes"].combine_chunks()

    def tokens_of(self, mask: np.ndarray) -> tuple[pa.Array, list[bytes | None]]:
        """Text of each token of a mask (bytes that are no text written out as bytes), and those bytes."""
        texts, raw = (column.filter(pa.array(mask)) for column in self._text_columns)
        if raw.null_count == len(raw):
            return texts, [None] * len(texts)
        pieces = raw.to_pylist()
        shown = [
            text if piece is None else shown_bytes(piece) for text, piece in zip(texts.to_pylist(), pieces, strict=True)
        ]
        return pa.array(shown, type=pa.string()), pieces

    def texts(self, rows: slice) -> list[str]:
        """Text of neighbouring tokens of one rollout, characters put together."""
        texts, raw = (column[rows].to_pylist() for column in self._text_columns)
        joined = joined_texts(raw)
        return [joined.get(place, text) for place, text in enumerate(texts)]


def load_dataset(records: Records, rule: str | None = None, retention: float | None = None, seed: int = 0) -> Dataset:
    """Read the statistics of every token, and rank them by every rule that they suffice for.

    Args:
        records: as opened.
        rule: to offer first; None: the one that was recorded.
        retention: to offer in addition to `RETENTIONS`, in (0, 1].
        seed: of the rules that draw.

    Raises:
        ValueError: statistics that are NaN or infinite, rows in no order, a rule that the records do not suffice for.
    """
    path, sidecar = records.directory / TOKENS_FILE, records.sidecar
    names = records.tokens.schema_arrow.names
    extra = [name for name in names if name.startswith(("kept_", "score_"))]
    episodes = [name for name in TOKEN_COLUMNS.names if name in names]
    wanted = ["rollout", "position", "token_id", *STATISTICS, "quadrant", "kept", "score", *episodes, *extra]
    table = records.read(wanted)
    column = {name: table[name].combine_chunks() for name in wanted}
    numbers, inverse = np.unique(column["rollout"].to_numpy(), return_inverse=True)
    if bool((np.diff(inverse) < 0).any()):
        raise ValueError(f"the rows of {path} are not in the order of their rollouts: sort by rollout, position.")
    rollout = torch.from_numpy(inverse.astype(np.int64))
    turn, kind = _turns_and_kinds(column, path) if episodes else (None, None)
    statistics = {name: _finite(column[name], name, path) for name in STATISTICS}
    for name in ("entropy", "reverse_kl"):
        if statistics[name] is None:
            raise ValueError(f"{path} has no {name} of some tokens: they were scored without the teacher.")
    scores = TokenScores(**{name: torch.from_numpy(value) for name, value in statistics.items() if value is not None})
    # every rule reads ratios of entropies, so that log V, where it is unknown, drops out
    scores = replace(scores, entropy_norm=scores.require("entropy"))

    thresholds = (
        float(sidecar.get("entropy_threshold", ENTROPY_THRESHOLD)),
        float(sidecar.get("divergence_threshold", DIVERGENCE_THRESHOLD)),
    )
    quadrant = quadrants(scores, *thresholds)
    differing = float((column["quadrant"].to_numpy() != quadrant.numpy()).mean())

    recorded_rule = str(sidecar["rule"]) if "rule" in sidecar else None
    given = retention if retention is not None else sidecar.get("retention")
    retentions = tuple(sorted({*RETENTIONS, *([float(given)] if given is not None else [])}))
    rules = _rules(scores, rollout, retentions, column, recorded_rule, sidecar, path, seed)
    first = rule or recorded_rule
    offered = [choice.name for choice in rules]
    if rule in RULES and RULES[rule].budget not in BUDGETED and rule not in offered:
        raise ValueError(
            f"the rule {rule!r} keeps every token at any retention, and these records do not hold its scores: there is "
            "nothing to show of it."
        )
    if rule is not None and rule not in offered:
        raise ValueError(
            f"the records in {records.directory} do not suffice for the rule {rule!r}; they do for "
            f"{', '.join(offered)}. `tipdistill score --rules {rule}` records its scores."
        )
    rules = tuple(sorted(rules, key=lambda choice: choice.name != first))
    kept = {name: column[name].to_numpy(zero_copy_only=False) for name in wanted if name.startswith("kept")}
    return Dataset(
        records=records,
        rollout=rollout,
        numbers=numbers,
        before=_places(inverse if turn is None else inverse * (turn.max() + 2) + turn),
        turn=turn,
        kind=kind,
        token_id=column["token_id"].to_numpy(),
        scores=scores,
        quadrant=quadrant,
        thresholds=thresholds,
        differing=differing,
        retentions=retentions,
        rules=rules,
        kept={(recorded_rule or "recorded") if name == "kept" else name[5:]: mask for name, mask in kept.items()},
    )


def _places(stretch: np.ndarray) -> np.ndarray:
    """Of each item, how many neighbours before it are equal to it."""
    begins = np.flatnonzero(np.diff(stretch, prepend=stretch[0] - 1))
    return np.arange(len(stretch)) - np.repeat(begins, np.diff(begins, append=len(stretch)))


def _turns_and_kinds(column: dict[str, pa.Array], path: Path) -> tuple[np.ndarray, np.ndarray]:
    turn = column["turn"].fill_null(-1).to_numpy().astype(np.int64)
    coded = column["kind"].dictionary_encode()
    unknown = [kind for kind in coded.dictionary.to_pylist() if kind not in KINDS]
    if unknown or turn.min() < -1 or turn.max() >= 2**15:
        said = f"the kind {unknown[0]!r:.40}" if unknown else f"a turn from {turn.min()} to {turn.max()}"
        raise ValueError(f"{path} has {said}; kinds are {', '.join(KINDS)}, and turns count from 0.")
    places = np.array([*(KINDS.index(kind) for kind in coded.dictionary.to_pylist()), -1])
    return turn, places[coded.indices.fill_null(-1).to_numpy()]


def _finite(values: pa.Array, name: str, path: Path) -> np.ndarray | None:
    """float32 [N], or None where some were not computed."""
    if values.null_count:
        return None
    array = np.array(values.to_numpy(), dtype=np.float32)
    if not np.isfinite(array).all():
        first = int(np.flatnonzero(~np.isfinite(array))[0])
        raise ValueError(
            f"{name} is {array[first]} in row {first} of {path}: the logits of a model were not finite, or one gives "
            "probability 0 to what the other can say. Such a token has no place on the map."
        )
    return array


def _rules(
    scores: TokenScores,
    rollout: Tensor,
    retentions: Sequence[float],
    column: dict[str, pa.Array],
    recorded_rule: str | None,
    sidecar: dict[str, Any],
    path: Path,
    seed: int,
) -> tuple[RuleChoice, ...]:
    """Rules ranked by their recorded scores (the whole batch's normalisation is in them), or else recomputed.

    A rule that draws keeps first what the records say that it drew, and draws the rest anew.
    """
    choices: dict[str, RuleChoice] = {}
    recorded = {name[6:]: (name, f"kept_{name[6:]}") for name in column if name.startswith("score_")}
    if recorded_rule is not None and "score" in column:
        recorded = {recorded_rule: ("score", "kept")} | recorded
    computable = computable_rules(scores)
    for name in dict.fromkeys([*computable, *recorded]):
        budget, like = _budget(name, sidecar)
        drawn = column.get(recorded[name][1]) if name in recorded else None
        score = _finite(column[recorded[name][0]], recorded[name][0], path) if name in recorded else None
        generator = torch.Generator().manual_seed(seed)
        if score is not None:
            kept_by = torch.from_numpy(score)
            order = draw(resolve_rule(like), kept_by, generator) if budget in DRAWN else kept_by
        elif name in computable:
            kept_by, order = ranking(scores, name, generator)
        else:
            continue
        if budget not in BUDGETED:
            level = np.zeros(len(kept_by), dtype=np.uint8)
        else:
            if budget in DRAWN and drawn is not None:
                # a complement keeps what comes last
                ahead = torch.tensor(drawn.to_numpy(zero_copy_only=False) ^ resolve_rule(like).complement)
                order = ahead * len(order) - ranks(order, torch.zeros_like(rollout), 1).double()
            level = keep_levels(order, rollout, retentions, like, sidecar.get("scope") or resolve_rule(like).scope)
        choices[name] = RuleChoice(name, level, kept_by.numpy(), recorded=score is not None, budget=budget)
    # those that look at every token first, then the draws, then the control that keeps what is left
    return tuple(sorted(choices.values(), key=lambda choice: (choice.name == BOTTOM, choice.budget in DRAWN)))


def _budget(name: str, sidecar: dict[str, Any]) -> tuple[str, str]:
    """What a rule does with its score, and a rule of ours that does the same.

    A rule of somebody's own is not looked up: its code need not be here, and reading records must run none. The records
    say what it did; those that do not are of rules that kept the highest scores.
    """
    inner = name.removeprefix(COMPLEMENT)
    if inner in RULES:
        return resolve_rule(name).budget, name
    budgets = sidecar.get("budgets")
    known = budgets.get(name) if isinstance(budgets, dict) else None
    budget = known if known in BUDGETS else "top"
    if name != inner:
        return budget, BOTTOM if budget == "top" else f"{COMPLEMENT}random"
    return budget, {"sample": "random", "importance": "gradient_norm_sampling"}.get(budget, "soft_or")
