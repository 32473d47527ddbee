"""Token records: what every token of the student's scored and who keeps it, as Parquet files that any tool reads.

A directory of records holds tokens.parquet, rollouts.parquet and records.json; docs/records.md has the columns. While
they are written, parts/ holds what is scored so far, each part a whole Parquet file: a killed run loses what came after
its last part, and goes on from there. What needs all tokens at once (percentiles, min-max, budgets over the batch) is
worked out when the parts are put together.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from .columns import (
    ROLLOUT_COLUMNS,
    ROLLOUTS_SCHEMA,
    STATISTICS,
    TOKEN_COLUMNS,
    TOP,
    check_columns,
    check_turns,
    rollout_columns,
    token_columns,
    tokens_schema,
)
from .documents import read_json
from .files import write_text
from .parquet import PARTS, DamagedRecordsError, check_kinds, check_sidecar, open_parquet, remedy, whole, write_tables
from .provenance import versions
from .select import SCOPES, Rule, kept_counts, resolve_rule, rule_fields, rule_name, select
from .select.quadrants import DIVERGENCE_THRESHOLD, ENTROPY_THRESHOLD, quadrant_shares, quadrants
from .types import Rollout, Scored, TokenScores, TopTokens
from .vocabulary import token_bytes

SCHEMA_VERSION = 1
# Tokens of a part, which is a row group of tokens.parquet too.
PART_TOKENS = 2**16
TOKENS_FILE, ROLLOUTS_FILE, SIDECAR_FILE = "tokens.parquet", "rollouts.parquet", "records.json"


@dataclass(frozen=True)
class About:
    """What records are of; written into records.json as it stands.

    Args:
        student, teacher: names or directories of the models.
        vocabulary: V, the vocabulary they share; entropy / log V is the normalised entropy.
        rules: selection rules as `select` takes them, the main one first; written down by their names.
        retention: share of the tokens that each rule keeps, in (0, 1].
        scope: "rollout" or "batch" (all the records); None: each rule's own.
        seed: of the sampling, and of rules that draw.
        temperature: of the sampling; it divides the logits of both models.
        entropy_threshold, divergence_threshold: borders of the quadrants, see `tipdistill.quadrants`.
        step: optimiser steps taken, for records of a training run; None otherwise.
        settings: anything else that shaped the records, of JSON's types.

    Raises:
        ValueError: an unknown rule or scope, a rule twice, no rule, or a retention or threshold out of range.
    """

    student: str
    teacher: str
    vocabulary: int
    rules: Sequence[str | Callable[[TokenScores], Tensor] | Rule] = ("soft_or",)
    retention: float = 0.5
    scope: str | None = None
    seed: int = 0
    temperature: float = 1.0
    entropy_threshold: float = ENTROPY_THRESHOLD
    divergence_threshold: float = DIVERGENCE_THRESHOLD
    step: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.rules or len(set(self.names())) < len(self.rules):
            raise ValueError(f"rules must name at least one rule, each once, got {self.names()}.")
        single = torch.ones(1, dtype=torch.int64)
        for rule in self.rules:
            kept_counts(single, self.retention, rule)  # refuses an unknown rule, and a retention that is no share
        nothing = TokenScores(entropy=torch.zeros(0), reverse_kl=torch.zeros(0))
        quadrants(nothing, self.entropy_threshold, self.divergence_threshold)
        if self.scope not in (None, *SCOPES):
            raise ValueError(f"scope must be one of {', '.join(SCOPES)}, got {self.scope!r}.")

    def names(self) -> list[str]:
        """The rules' names, as they stand in the columns and in records.json."""
        return [rule_name(rule) for rule in self.rules]

    def described(self) -> dict[str, Any]:
        """Everything, of JSON's types."""
        return {**asdict(self), "rules": self.names()}

    def fields(self) -> tuple[str, ...]:
        """Statistics to score: those of the schema and those that the rules read.

        Example:
            >>> About("s", "t", 9, rules=["soft_or", "gradient_norm"]).fields()[-2:]
            ('entropy_norm', 'gradient_norm')
        """
        read = [rule_fields(rule) or () for rule in self.rules]
        return tuple(dict.fromkeys([*STATISTICS, "entropy_norm", *(name for names in read for name in names)]))


@dataclass(frozen=True)
class Choice:
    """What a training step did with the tokens of its rollouts, where records are not to choose for themselves.

    Attributes:
        quadrant: int8 [N].
        kept: bool [N].
        score: float [N].
    """

    quadrant: Tensor
    kept: Tensor
    score: Tensor


class RecordsWriter:
    """Writes records as rollouts are scored, in memory that does not grow with their number.

    Args:
        directory: of the records, made if need be. Earlier records in it stay until the new ones are complete.
        tokenizer: the student's.
        about: what the records are of.
        part_tokens: tokens of a part.

    Raises:
        ValueError: `directory` holds parts of records with other settings.

    Example:
        >>> import tempfile
        >>> from tipdistill.tasks.arithmetic import build_tokenizer
        >>> top = TopTokens(torch.zeros(2, 5, dtype=torch.int64), torch.full((2, 5), 0.2))
        >>> directory, about = tempfile.mkdtemp(), About("student", "teacher", vocabulary=18)
        >>> scores = TokenScores(**{name: torch.zeros(2) for name in about.fields()})
        >>> with RecordsWriter(directory, build_tokenizer(), about) as writer:
        ...     writer.write([Rollout(0, "1+1=", (1, 10, 1, 11), (2, 16), True)], Scored(scores, top, top))
        >>> open_records(directory).tokens.read(["token", "quadrant"]).to_pydict()
        {'token': ['2', '$'], 'quadrant': [4, 4]}
    """

    def __init__(self, directory: str | Path, tokenizer: Any, about: About, part_tokens: int = PART_TOKENS) -> None:
        self.directory, self.about, self.part_tokens = Path(directory), about, part_tokens
        self._parts = self.directory / PARTS
        self._pieces = token_bytes(tokenizer)
        self._texts, self._bytes = _texts(self._pieces)
        self._template = getattr(getattr(tokenizer, "tokenizer", tokenizer), "response_template", None)
        self._extra = [name for name in about.fields() if name not in (*STATISTICS, "entropy_norm")]
        self._waiting: list[tuple[pa.Table, pa.Table]] = []  # tokens and rollouts of each call of `write`
        self._begin()
        self._number = len(_part_files(self._parts, TOKENS_FILE))
        self.rollouts = sum(len(_read_rollouts(path)) for path in _part_files(self._parts, ROLLOUTS_FILE))
        """Rollouts written so far; after a resume those of the parts that were found."""

    def __enter__(self) -> RecordsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is None:
            self.close()
        else:  # keep what there is; the same run goes on from here
            self.flush()

    def write(
        self,
        rollouts: Sequence[Rollout],
        scored: Scored,
        choice: Choice | None = None,
    ) -> None:
        """Take scored rollouts.

        Args:
            rollouts: R of them; together the student wrote N tokens of them.
            scored: the statistics `about.fields()` and both models' 5 likeliest tokens, in the order of the rollouts'
                tokens.
            choice: quadrant, choice and score of the main rule, where they are not to be worked out over all the
                records; for every call or for none.

        Raises:
            ValueError: a statistic is NaN or infinite (with the rollout and the token).
        """
        ids = [rollout.student_ids for rollout in rollouts]
        lengths = list(map(len, ids))
        numbers = np.arange(self.rollouts, self.rollouts + len(rollouts), dtype=np.int32)
        if not any(rollout.completion_ids for rollout in rollouts):
            raise ValueError("there is no completion token to record: every rollout is empty.")
        token_ids = np.concatenate([np.asarray(own, np.int32) for own in ids])
        columns: dict[str, Any] = {
            "rollout": np.repeat(numbers, lengths),
            "position": np.concatenate([np.flatnonzero(rollout.written) for rollout in rollouts]).astype(np.int32),
            "prompt_id": np.repeat(np.asarray([rollout.prompt_id for rollout in rollouts], np.int32), lengths),
            "token_id": token_ids,
            "token": _take(self._texts, token_ids),
            "token_bytes": _take(self._bytes, token_ids),
        }
        for name in (*STATISTICS, *self._extra):
            columns[name] = _numbers(scored.scores.require(name).float())
            self._check_finite(name, columns[name], columns["rollout"], columns["position"])
        if choice is not None:
            columns |= {"quadrant": _numbers(choice.quadrant), "kept": _numbers(choice.kept)}
            columns["score"] = _numbers(choice.score.float())
        for name, top in (("student_top5", scored.student_top), ("teacher_top5", scored.teacher_top)):
            columns[name] = self._top(top)
        columns |= token_columns(rollouts, self._pieces, self._template)
        described = pa.table(
            {
                "rollout": numbers,
                "prompt_id": [rollout.prompt_id for rollout in rollouts],
                "prompt": [_as_text(rollout.prompt.encode("utf-8", "replace")) for rollout in rollouts],
                "completion": [self._text_of(rollout.completion_ids) for rollout in rollouts],
                "tokens": lengths,
                "finished": [rollout.finished for rollout in rollouts],
            },
            schema=ROLLOUTS_SCHEMA,
        )
        for name, values in rollout_columns(rollouts).items():
            described = described.append_column(ROLLOUT_COLUMNS.field(name), values)
        self._waiting.append((pa.table(columns), described))  # both at once: Ctrl-C may come at any line
        self.rollouts += len(rollouts)
        if sum(len(tokens) for tokens, _ in self._waiting) >= self.part_tokens:
            self.flush()

    def flush(self) -> None:
        """Write what is held in memory as a part."""
        if not self._waiting:
            return
        # tokens first: a part counts once its rollouts are there
        for name, tables in zip((TOKENS_FILE, ROLLOUTS_FILE), zip(*self._waiting, strict=True), strict=True):
            write_tables(_part(self._parts, name, self._number), [_together(tables)])
        self._number += 1
        self._waiting = []

    def close(self) -> None:
        """Put the parts together into the records and remove them.

        Raises:
            ValueError: nothing was written.
        """
        self.flush()
        _assemble(self.directory, complete=True, about=self.about)
        (self._parts / SIDECAR_FILE).unlink()  # parts that do not say what they are of are never gone on with
        shutil.rmtree(self._parts)

    def _begin(self) -> None:
        """A fresh folder for parts, or that of the same records begun before."""
        described = json.loads(json.dumps(self.about.described()))
        try:
            known = read_json(self._parts / SIDECAR_FILE)
            if not isinstance(known, dict):
                raise ValueError("no settings")
        except (OSError, ValueError):
            shutil.rmtree(self._parts, ignore_errors=True)  # begun, and killed before it had said what it was
            self._parts.mkdir(parents=True)
            write_text(self._parts / SIDECAR_FILE, json.dumps(described))
            return
        differing = [name for name in described if known.get(name) != described[name]]
        if differing:
            raise ValueError(
                f"{self._parts} holds unfinished records with other settings ({', '.join(differing)} differ): finish "
                "them with the settings they had, remove the folder, or choose another output directory."
            )
        for path in _part_files(self._parts, TOKENS_FILE)[len(_part_files(self._parts, ROLLOUTS_FILE)) :]:
            path.unlink()

    def _check_finite(self, name: str, values: np.ndarray, rollout: np.ndarray, position: np.ndarray) -> None:
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            raise ValueError(
                f"{name} is {values[bad[0]]} in rollout {rollout[bad[0]]}, token {position[bad[0]]}: one model gives "
                "probability 0 to what the other can say, or has diverged. Check the weights and the dtype."
            )

    def _top(self, top: TopTokens) -> pa.Array:
        known = top.token_ids >= 0
        token_ids = _numbers(top.token_ids[known].to(torch.int32))
        entries = pa.StructArray.from_arrays(
            [pa.array(token_ids), _take(self._texts, token_ids), pa.array(_numbers(top.probability[known].float()))],
            fields=list(TOP.value_type),
        )
        ends = np.cumsum(np.append(0, _numbers(known.sum(1))), dtype=np.int32)
        return pa.ListArray.from_arrays(pa.array(ends), entries)

    def _text_of(self, token_ids: Iterable[int]) -> str:
        return _as_text(b"".join(self._pieces[index] if index < len(self._pieces) else b"" for index in token_ids))


@dataclass(frozen=True)
class Records:
    """A directory of records, opened.

    Attributes:
        directory: where they lie.
        tokens: one row per token that the student wrote, not read yet; in the order of rollout, then position.
        rollouts: one row per rollout.
        sidecar: records.json.
    """

    directory: Path
    tokens: pq.ParquetFile
    rollouts: pa.Table
    sidecar: dict[str, Any]

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Columns of tokens.parquet (None: all of them), in memory.

        Raises:
            ValueError: no such column.
            DamagedRecordsError: data that is damaged.
        """
        missing = [name for name in columns or () if name not in self.tokens.schema_arrow.names]
        if missing:
            raise ValueError(
                f"{self.directory / TOKENS_FILE} has no column {', '.join(missing)}; it has "
                f"{', '.join(self.tokens.schema_arrow.names)}."
            )
        path = self.directory / TOKENS_FILE
        with whole(path):
            table = self.tokens.read(columns=None if columns is None else list(columns))
            table.validate(full=True)  # text that is no UTF-8, lists that end before they begin
            for name in _NEVER_NULL & set(table.column_names):
                if table[name].null_count:
                    raise ValueError(f"column {name} has no value in some rows.")
            return table

    def scores(self) -> TokenScores:
        """The statistics of every token, and the normalised entropy."""
        table = self.read(STATISTICS)
        values = {name: torch.from_numpy(table[name].to_numpy().copy()) for name in STATISTICS}
        return TokenScores(**values, entropy_norm=values["entropy"] / np.log(self.sidecar["vocabulary"]))


def open_records(directory: str | Path) -> Records:
    """Open a directory of records, or say in one line why it holds none.

    Where the writing was interrupted before any records were complete, those written so far are put together first
    (`sidecar["complete"]` is then False).

    Args:
        directory: as written by `tipdistill score`, `TIPTrainer` or `RecordsWriter`.

    Raises:
        FileNotFoundError: there is no such directory.
        ValueError: no records in it, or of a later version.
        DamagedRecordsError: files that are empty, cut off, of another kind, or that do not belong together.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no directory {directory}.")
    if not (directory / TOKENS_FILE).is_file():
        if not _part_files(directory / PARTS, ROLLOUTS_FILE):
            raise ValueError(
                f"{directory} holds no token records (no {TOKENS_FILE}). `tipdistill score` writes them, and "
                "TIPTrainer into <output_dir>/records/step-<n>."
            )
        _assemble(directory, complete=False)
    tokens = open_parquet(directory / TOKENS_FILE)
    needed = tokens_schema()
    missing = [name for name in needed.names if name not in tokens.schema_arrow.names]
    if missing:
        raise DamagedRecordsError(
            f"{directory / TOKENS_FILE} has no column {', '.join(missing)}: these are no token records."
        )
    check_kinds(directory / TOKENS_FILE, tokens.schema_arrow, needed)
    turns = check_columns(directory / TOKENS_FILE, tokens.schema_arrow, TOKEN_COLUMNS)
    if tokens.metadata.num_rows == 0:
        raise DamagedRecordsError(f"{directory / TOKENS_FILE} holds no token: nothing was scored.")
    for name in (ROLLOUTS_FILE, SIDECAR_FILE):
        if not (directory / name).is_file():
            raise DamagedRecordsError(
                f"{directory} has a {TOKENS_FILE} but no {name}: the records are not whole. Score again."
            )
    rollouts = _read_rollouts(directory / ROLLOUTS_FILE)
    try:
        sidecar = read_json(directory / SIDECAR_FILE)
        check_sidecar(sidecar)
        written, promised = sidecar["schema_version"], sidecar["tokens"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        said = f"{error} is missing" if isinstance(error, KeyError) else error
        raise DamagedRecordsError(
            f"{directory / SIDECAR_FILE} is no sidecar of token records: {said}. Score again."
        ) from error
    if written > SCHEMA_VERSION:
        raise ValueError(
            f"{directory} was written with version {written} of the records, this tipdistill reads up to "
            f"{SCHEMA_VERSION}: pip install --upgrade tipdistill."
        )
    counted = int(np.sum(rollouts["tokens"].to_numpy()))
    if turns != ("turns" in rollouts.column_names):
        raise DamagedRecordsError(
            f"the files in {directory} do not belong together: of {TOKENS_FILE} and {ROLLOUTS_FILE} one is of "
            "episodes, and the other is not. Score again."
        )
    if not tokens.metadata.num_rows == counted == promised:
        raise DamagedRecordsError(
            f"the files in {directory} do not belong together: {TOKENS_FILE} has {tokens.metadata.num_rows} tokens, "
            f"{ROLLOUTS_FILE} {counted}, {SIDECAR_FILE} {promised}. Score again."
        )
    return Records(directory, tokens, rollouts, sidecar)


def joined_text(tokens: Sequence[str], raw: Sequence[bytes | None]) -> str:
    """The text of consecutive tokens, characters that were split between them put together.

    Args:
        tokens: column `token`.
        raw: column `token_bytes`.

    Example:
        >>> joined_text(["a", "�", "�"], [None, b"\\xf0\\x9f", b"\\x99\\x82"])
        'a🙂'
    """
    return _as_text(
        b"".join(text.encode() if piece is None else piece for text, piece in zip(tokens, raw, strict=True))
    )


# Putting parts together.


def _assemble(directory: Path, complete: bool, about: About | None = None) -> None:
    parts = directory / PARTS
    if about is None:
        with whole(parts / SIDECAR_FILE):
            about = About(**read_json(parts / SIDECAR_FILE))
    # a part whose rollouts are missing was never finished
    count = len(_part_files(parts, ROLLOUTS_FILE))
    opened = [open_parquet(path) for path in _part_files(parts, TOKENS_FILE)[:count]]
    if not any(part.metadata.num_rows for part in opened):
        raise ValueError(f"nothing was scored, so there are no records to write to {directory}.")
    with whole(parts):
        added, scores = _choose(opened, about)
    schema = tokens_schema(about.names(), turns=any("turn" in part.schema_arrow.names for part in opened))

    def pieces() -> Iterable[pa.Table]:
        row = 0
        for part in opened:
            with whole(parts):
                table = part.read()
            for name, values in added.items():
                table = table.append_column(name, pa.array(values[row : row + len(table)]))
            row += len(table)
            for column in (column for column in schema if column.name not in table.column_names):  # of no episodes
                table = table.append_column(column, pa.nulls(len(table), column.type))
            yield table.select(schema.names).cast(schema)

    rollouts = _together([_read_rollouts(path) for path in _part_files(parts, ROLLOUTS_FILE)])
    scored, promised = sum(part.metadata.num_rows for part in opened), sum(rollouts["tokens"].to_pylist())
    if scored != promised:
        raise DamagedRecordsError(
            f"the parts in {parts} do not belong together: {scored} tokens, of rollouts of {promised}. {remedy(parts)}"
        )
    quadrant = torch.from_numpy(added["quadrant"] if "quadrant" in added else _column(opened, "quadrant"))
    described = {
        "schema_version": SCHEMA_VERSION,
        "complete": complete,
        "rollouts": len(rollouts),
        "tokens": len(quadrant),
        "rule": about.names()[0],
        **about.described(),
        "scope": about.scope or resolve_rule(about.rules[0]).scope,
        "budgets": {rule_name(rule): resolve_rule(rule).budget for rule in about.rules},
        "quadrants": {
            f"q{number}": {"token_share": share, "divergence_share": mass}
            for (number, share), mass in zip(
                quadrant_shares(quadrant).items(),
                quadrant_shares(quadrant, scores.require("reverse_kl")).values(),
                strict=True,
            )
        },
        "versions": versions(("tipdistill", "torch", "transformers", "pyarrow")),
    }
    write_tables(directory / ROLLOUTS_FILE, [rollouts])
    write_text(directory / SIDECAR_FILE, json.dumps(described, indent=2) + "\n")
    write_tables(directory / TOKENS_FILE, pieces())


def _choose(parts: Sequence[pq.ParquetFile], about: About) -> tuple[dict[str, np.ndarray], TokenScores]:
    """Quadrants and every rule's choice over all tokens, but for what the parts hold already."""
    recorded = parts[0].schema_arrow.names
    wanted = [name for name in about.fields() if name != "entropy_norm"]
    scores = TokenScores(**{name: torch.from_numpy(_column(parts, name)) for name in wanted})
    scores = TokenScores(**dict(scores.present()), entropy_norm=scores.require("entropy") / np.log(about.vocabulary))
    rollout = torch.from_numpy(_column(parts, "rollout").astype(np.int64))
    added: dict[str, np.ndarray] = {}
    if "quadrant" not in recorded:
        added["quadrant"] = quadrants(scores, about.entropy_threshold, about.divergence_threshold).numpy()
    for place, rule in enumerate(about.rules):
        suffix = f"_{rule_name(rule)}" if place else ""
        if f"kept{suffix}" in recorded:
            continue
        generator = torch.Generator().manual_seed(about.seed)
        selection = select(scores, rule, about.retention, rollout, about.scope, generator)
        added |= {f"kept{suffix}": selection.mask.numpy(), f"score{suffix}": selection.score.numpy()}
    return added, scores


def _column(parts: Sequence[pq.ParquetFile], name: str) -> np.ndarray:
    return np.concatenate([part.read(columns=[name])[name].to_numpy() for part in parts])


def _together(tables: Sequence[pa.Table]) -> pa.Table:
    """Tables below each other; what those without episodes lack has no value."""
    return pa.concat_tables(tables, promote_options="default")


def _part(parts: Path, name: str, number: int) -> Path:
    return parts / name.replace(".", f"-{number:05d}.")


def _part_files(parts: Path, name: str) -> list[Path]:
    return sorted(parts.glob(name.replace(".", "-*.")))


# Files and text.


_NEVER_NULL = {"rollout", "position", "prompt_id", "token_id", "quadrant", "kept"}


def _read_rollouts(path: Path) -> pa.Table:
    file = open_parquet(path)
    missing = [name for name in ROLLOUTS_SCHEMA.names if name not in file.schema_arrow.names]
    if missing:
        raise DamagedRecordsError(f"{path} has no column {', '.join(missing)}: these are no rollouts. {remedy(path)}")
    check_kinds(path, file.schema_arrow, ROLLOUTS_SCHEMA)
    episodes = check_columns(path, file.schema_arrow, ROLLOUT_COLUMNS)
    with whole(path):
        table = file.read()
        table.validate(full=True)
        for name in ROLLOUTS_SCHEMA.names:
            if table[name].null_count:
                raise ValueError(f"column {name} has no value in some rows.")
        if len(table) and min(table["tokens"].to_pylist()) < 0:
            raise ValueError("a rollout of fewer than 0 tokens.")
        if episodes:
            check_turns(table)
        return table


def _texts(pieces: Sequence[bytes]) -> tuple[pa.Array, pa.Array]:
    """Text of every token id, and its bytes where they are no UTF-8; the last entry is for ids that no token has."""
    texts, raw = [], []
    for piece in (*pieces, b""):
        text = _as_text(piece)
        texts.append(text)
        raw.append(None if text.encode() == piece else piece)
    return pa.array(texts, pa.string()), pa.array(raw, pa.binary())


def _take(values: pa.Array, token_ids: np.ndarray) -> pa.Array:
    # rows that pad an lm_head have no token
    return values.take(pa.array(np.minimum(token_ids, len(values) - 1)))


def _as_text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")


def _numbers(values: Tensor) -> np.ndarray:
    return values.detach().cpu().numpy()
