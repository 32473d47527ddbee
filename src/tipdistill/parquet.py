"""Parquet files of token records: written whole, read with checksums, and one error that names a damaged one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .files import replacing

PARTS = "parts"  # folder of what is scored so far
# what pyarrow and the parsers raise of files that are damaged
FAULTS = (
    *(pa.ArrowException, OSError, MemoryError, ValueError, KeyError, TypeError, IndexError, AttributeError),
    *(OverflowError, RecursionError, NotImplementedError),
)
_KINDS = (
    *(pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean),
    *(
        lambda kind: pa.types.is_string(kind) or pa.types.is_large_string(kind),
        lambda kind: pa.types.is_binary(kind) or pa.types.is_large_binary(kind),
    ),
)


class DamagedRecordsError(ValueError):
    """A file of token records is not as it was written; which one, and what to do."""


def open_parquet(path: Path) -> pq.ParquetFile:
    """A Parquet file whose pages are checked as they are read.

    Raises:
        DamagedRecordsError: an empty file, one that was cut off, or none of Parquet's.
    """
    try:
        # a bit that flipped in a page shows by the page's checksum
        file = pq.ParquetFile(path, memory_map=True, page_checksum_verification=True)
        assert file.schema_arrow is not None
    except FAULTS as error:
        size = path.stat().st_size if path.is_file() else 0
        state = "is empty" if size == 0 else f"({size:,} bytes) is cut off or no Parquet file"
        raise DamagedRecordsError(f"{path} {state}: it was not written to its end. {remedy(path)}") from error
    return file


@contextmanager
def whole(path: Path) -> Iterator[None]:
    """Whatever is wrong with a file, as one error with its name."""
    try:
        yield
    except DamagedRecordsError:
        raise
    except FAULTS as error:
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise DamagedRecordsError(f"{path} is damaged: {said.rstrip('.')}. {remedy(path)}") from error


def remedy(path: Path) -> str:
    """What to do about a damaged file of records; one of `PARTS` is made again when its folder is gone."""
    folder = next((place for place in (path, path.parent) if place.name == PARTS), None)
    return f"Remove {folder} and score again." if folder is not None else "Score again."


def check_kinds(path: Path, schema: pa.Schema, needed: pa.Schema) -> None:
    """Refuse columns of another kind; another tool may have written another width of integers or texts."""
    for column in needed:
        kind = schema.field(column.name).type
        if not _is_alike(column.type, kind):
            raise DamagedRecordsError(
                f"{path} has a column {column.name} of {kind}, not of {column.type}. {remedy(path)}"
            )


def _is_alike(needed: pa.DataType, given: pa.DataType) -> bool:
    if pa.types.is_list(needed) and pa.types.is_list(given):
        return _is_alike(needed.value_type, given.value_type)
    if pa.types.is_struct(needed) and pa.types.is_struct(given):
        fields = {field.name: field.type for field in given}
        return all(field.name in fields and _is_alike(field.type, fields[field.name]) for field in needed)
    return any(is_kind(needed) and is_kind(given) for is_kind in _KINDS)


def write_tables(path: Path, tables: Iterable[pa.Table]) -> None:
    """One row group per table; there is at least one."""
    with replacing(path) as partial:
        writer: pq.ParquetWriter | None = None
        try:
            for table in tables:
                writer = writer or pq.ParquetWriter(partial, table.schema, compression="zstd", write_page_checksum=True)
                writer.write_table(table)
        finally:
            if writer is not None:
                writer.close()


def check_sidecar(sidecar: Any) -> None:
    """Refuse values of a records.json that no records have; what is left out has a default.

    Raises:
        ValueError: which value.
    """

    def is_number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

    def is_count(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0

    if not isinstance(sidecar, dict):
        raise ValueError(f"it holds a {type(sidecar).__name__}")
    checks = {
        "schema_version": is_count,
        "tokens": is_count,
        "rollouts": is_count,
        "vocabulary": is_count,
        "step": lambda value: value is None or is_count(value),
        "rule": lambda value: isinstance(value, str),
        "rules": lambda value: isinstance(value, list) and all(isinstance(rule, str) for rule in value),
        "retention": lambda value: is_number(value) and 0 < value <= 1,
        "scope": lambda value: value in (None, "rollout", "batch"),
        "entropy_threshold": is_number,
        "divergence_threshold": is_number,
    }
    for name, allowed in checks.items():
        if name in sidecar and not allowed(sidecar[name]):
            raise ValueError(f"{name} is {sidecar[name]!r:.60}")
