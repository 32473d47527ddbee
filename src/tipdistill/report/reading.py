"""Token records opened for reading, or one line that says why not."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

NEEDED = ("rollout", "position", "token_id", "token", "entropy", "reverse_kl")


@dataclass(frozen=True)
class Records:
    """A directory of token records.

    Attributes:
        directory: where they lie.
        tokens: one row per token, not read yet.
        rollouts: one row per rollout; None where there is no rollouts.parquet.
        sidecar: records.json; empty where there is none.
    """

    directory: Path
    tokens: pq.ParquetFile
    rollouts: pa.Table | None
    sidecar: dict[str, Any]


def open_records(directory: Path) -> Records:
    """Open a directory of token records.

    Raises:
        ValueError: a file is empty, cut off or no Parquet, holds no token, or lacks a column.
    """
    tokens = _parquet(directory / "tokens.parquet")
    missing = [name for name in NEEDED if name not in tokens.schema_arrow.names]
    if missing:
        raise ValueError(
            f"{directory / 'tokens.parquet'} has no column {', '.join(missing)}: these are no token records."
        )
    if tokens.metadata.num_rows == 0:
        raise ValueError(f"{directory / 'tokens.parquet'} holds no token: nothing was scored.")
    path = directory / "rollouts.parquet"
    rollouts = _parquet(path).read() if path.is_file() else None
    path = directory / "records.json"
    sidecar: dict[str, Any] = {}
    if path.is_file():
        try:
            sidecar = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is no JSON: {error}. Remove it, or score again.") from error
    return Records(directory, tokens, rollouts, sidecar if isinstance(sidecar, dict) else {})


def _parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, memory_map=True)
    except (pa.ArrowInvalid, OSError) as error:
        size = path.stat().st_size
        state = "is empty" if size == 0 else f"({size:,} bytes) is cut off or no Parquet file"
        raise ValueError(f"{path} {state}: it was not written to its end. Score again.") from error
