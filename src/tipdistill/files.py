"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path, durable: bool = True) -> Iterator[Path]:
    """Give a path to write to, and put what was written in the place of `path` when the block ends without an error.

    A reader, or a run that goes on after a kill, finds the old file or the new one and never a part of either.

    Args:
        path: the file; its directory is there.
        durable: wait for the disk (fsync) first, so that a power cut leaves no empty file. Off for what is shown for a
            moment, or can be made again.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "a.txt"
        >>> with replacing(target) as partial:
        ...     _ = partial.write_text("whole")
        >>> target.read_text(), len(list(target.parent.iterdir()))
        ('whole', 1)
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield partial
        if durable:
            with partial.open("rb") as written:
                os.fsync(written.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str, durable: bool = True) -> Path:
    """Write a text file in full or not at all, see `replacing`; characters that UTF-8 lacks become "?".

    Example:
        >>> import tempfile
        >>> write_text(Path(tempfile.mkdtemp()) / "a.txt", "whole").read_text()
        'whole'
    """
    with replacing(path, durable) as partial:
        partial.write_text(text, encoding="utf-8", errors="replace")
    return path
