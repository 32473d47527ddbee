"""The columns of token records: those of all rollouts, and those that episodes add, written and checked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .kinds import token_kinds
from .parquet import DamagedRecordsError, check_kinds, remedy
from .types import Rollout, Verdict

STATISTICS = ("entropy", "reverse_kl", "forward_kl", "teacher_entropy", "student_logprob", "teacher_logprob")
TOP = pa.list_(pa.struct([("token_id", pa.int32()), ("token", pa.string()), ("probability", pa.float32())]))
ROLLOUTS_SCHEMA = pa.schema(
    [
        ("rollout", pa.int32()),
        ("prompt_id", pa.int32()),
        ("prompt", pa.string()),
        ("completion", pa.string()),
        ("tokens", pa.int32()),
        ("finished", pa.bool_()),
    ]
)
# where some rollout has turns
TOKEN_COLUMNS = pa.schema([("turn", pa.int16()), ("kind", pa.string())])
_RESULT = pa.struct([(name, pa.string()) for name in ("name", "arguments", "outcome", "text")])
_TURN = pa.struct(
    [
        ("role", pa.string()),
        ("first", pa.int32()),
        ("tokens", pa.int32()),
        ("text", pa.string()),
        ("results", pa.list_(_RESULT)),
    ]
)
ROLLOUT_COLUMNS = pa.schema(
    [("turns", pa.list_(_TURN)), ("ending", pa.string()), ("correct", pa.bool_()), ("verdict", pa.string())]
)


def tokens_schema(rules: Sequence[str] = ("soft_or",), turns: bool = False) -> pa.Schema:
    """Columns of tokens.parquet, in order; docs/records.md says what each holds.

    Args:
        rules: the first is the main rule (`kept`, `score`), each further one adds kept_<rule> and score_<rule>.
        turns: whether some rollout is an episode.

    Example:
        >>> tokens_schema(["soft_or", "q3"]).names[-4:]
        ['student_top5', 'teacher_top5', 'kept_q3', 'score_q3']
    """
    return pa.schema(
        [
            *((name, pa.int32()) for name in ("rollout", "position", "prompt_id", "token_id")),
            ("token", pa.string()),
            ("token_bytes", pa.binary()),
            *((name, pa.float32()) for name in STATISTICS),
            ("quadrant", pa.int8()),
            ("kept", pa.bool_()),
            ("score", pa.float32()),
            ("student_top5", TOP),
            ("teacher_top5", TOP),
            *(
                column
                for rule in rules[1:]
                for column in ((f"kept_{rule}", pa.bool_()), (f"score_{rule}", pa.float32()))
            ),
            *(TOKEN_COLUMNS if turns else ()),
        ]
    )


def token_columns(
    rollouts: Sequence[Rollout], pieces: Sequence[bytes], template: Mapping[str, Any] | None
) -> dict[str, pa.Array]:
    """Turn and kind of the tokens that the student wrote, without a value in rollouts without turns.

    Args:
        rollouts: in their order.
        pieces: token id → bytes.
        template: the tokenizer's `response_template`, where it has one.

    Returns:
        Name → column [N]; nothing where no rollout has turns.
    """
    if not any(rollout.turns for rollout in rollouts):
        return {}
    numbers: list[int | None] = []
    kinds: list[str | None] = []
    for rollout in rollouts:
        if not rollout.turns:
            numbers += [None] * len(rollout.completion_ids)
            kinds += [None] * len(rollout.completion_ids)
            continue
        assert sum(turn.tokens for turn in rollout.turns) == len(rollout.completion_ids), "turns cover the completion"
        number, before = 0, rollout.prompt
        for place, turn in enumerate(rollout.turns):
            if turn.role == "student":
                ids = rollout.completion_ids[turn.first : turn.first + turn.tokens]
                raw = [pieces[index] if index < len(pieces) else b"" for index in ids]
                numbers += [number] * len(raw)
                kinds += token_kinds(raw, template, before, called=place + 1 < len(rollout.turns))
                number += 1
            before = turn.text
    return {"turn": pa.array(numbers, pa.int16()), "kind": pa.array(kinds, pa.string())}


def rollout_columns(rollouts: Sequence[Rollout]) -> dict[str, pa.Array]:
    """Turns, ending and verdict of each rollout, without a value in those without turns.

    Args:
        rollouts: in their order.

    Returns:
        Name → column [R]; nothing where no rollout has turns.
    """
    if not any(rollout.turns for rollout in rollouts):
        return {}
    verdicts = [rollout.verdict if rollout.turns else None for rollout in rollouts]
    return {
        "turns": pa.array([_turns(rollout) if rollout.turns else None for rollout in rollouts], pa.list_(_TURN)),
        "ending": pa.array([rollout.ending if rollout.turns else None for rollout in rollouts], pa.string()),
        "correct": pa.array([None if verdict is None else bool(verdict.correct) for verdict in verdicts], pa.bool_()),
        "verdict": pa.array([None if verdict is None else _as_json(verdict) for verdict in verdicts], pa.string()),
    }


def _turns(rollout: Rollout) -> list[dict[str, Any]]:
    return [
        {
            "role": turn.role,
            "first": turn.first,
            "tokens": turn.tokens,
            "text": _storable(turn.text),
            "results": [
                {name: _storable(getattr(result, name)) for name in ("name", "arguments", "outcome", "text")}
                for result in turn.results
            ],
        }
        for turn in rollout.turns
    ]


def _storable(text: str) -> str:
    """Without halves of characters, which are no UTF-8."""
    return text.encode("utf-8", "replace").decode()


def _as_json(verdict: Verdict) -> str:
    figures = {str(name): float(value) for name, value in verdict.figures.items()}
    return json.dumps(
        {
            "parts": {str(name): bool(holds) for name, holds in verdict.parts.items()},
            "figures": {name: value if math.isfinite(value) else None for name, value in figures.items()},
        }
    )


def read_verdict(text: str) -> Verdict:
    """A verdict as the column `verdict` holds it; whether the episode is correct is another column, and False here.

    Args:
        text: JSON.

    Raises:
        ValueError: it is no verdict.

    Example:
        >>> read_verdict('{"parts": {"budget": false}, "figures": {"share": 0.5}}')
        Verdict(correct=False, parts={'budget': False}, figures={'share': 0.5})
    """
    said = json.loads(text)
    parts, figures = (said.get(name, {}) if isinstance(said, dict) else None for name in ("parts", "figures"))
    if not (
        isinstance(parts, dict)
        and isinstance(figures, dict)
        and all(isinstance(holds, bool) for holds in parts.values())
        and all(value is None or type(value) in (int, float) for value in figures.values())
        and all(math.isfinite(value or 0) for value in figures.values())
    ):
        raise ValueError(f"the verdict {text!r:.60} has no parts that hold or do not, and no figures")
    return Verdict(False, parts, {name: value for name, value in figures.items() if value is not None})


def check_columns(path: Path, schema: pa.Schema, added: pa.Schema) -> bool:
    """Whether a file has the columns of episodes; all of them or none, each of its kind.

    Args:
        path: of the file, for errors.
        schema: its own.
        added: `TOKEN_COLUMNS` or `ROLLOUT_COLUMNS`.

    Raises:
        DamagedRecordsError: it has some of them, or one of another kind.
    """
    missing = [name for name in added.names if name not in schema.names]
    if len(missing) == len(added.names):
        return False
    if missing:
        raise DamagedRecordsError(
            f"{path} has columns of episodes, but no {', '.join(missing)}: it is not whole. {remedy(path)}"
        )
    check_kinds(path, schema, added)
    return True


def check_turns(table: pa.Table) -> None:
    """Refuse episodes whose turns are not those of a completion, or that do not have as many tokens as are recorded.

    Args:
        table: rollouts with `ROLLOUT_COLUMNS`.

    Raises:
        ValueError: which rollout, and what is wrong.
    """
    for batch in table.to_batches():
        turns = batch.column("turns").flatten()
        results = turns.field("results").flatten()
        columns = [
            *(turns, results),
            *(turns.field(field.name) for field in _TURN),
            *(results.field(field.name) for field in _RESULT),
        ]
        if any(column.null_count for column in columns):
            raise ValueError("a turn or a result of a tool lacks a value.")
        roles, firsts, counts = (turns.field(name).to_pylist() for name in ("role", "first", "tokens"))
        ends = np.cumsum(pc.list_value_length(batch.column("turns")).fill_null(0)).tolist()
        rows = batch.select(["rollout", "tokens", "ending", "verdict"]).to_pylist()
        for row, start, end in zip(rows, [0, *ends], ends, strict=False):
            where = f"rollout {row['rollout']}"
            reached = written = 0
            for role, first, count in zip(roles[start:end], firsts[start:end], counts[start:end], strict=True):
                if role not in ("student", "tool") or first != reached or count < 0:
                    raise ValueError(f"{where}: a turn of {role!r:.20} at {first} of {count} tokens.")
                reached += count
                written += count if role == "student" else 0
            if end > start and (written != row["tokens"] or row["ending"] is None):
                said = f"{written} tokens in the student's turns and the ending {row['ending']!r:.20}"
                raise ValueError(f"{where} has {row['tokens']} tokens, but {said}.")
            if row["verdict"] is not None:
                read_verdict(row["verdict"])
