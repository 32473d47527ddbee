"""Files that are written whole or not at all, and directories that one run at a time writes to."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

LOCK = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_held: dict[Path, IO[str]] = {}


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


def sync_tree(directory: Path) -> None:
    """Wait until every file below a directory is on the disk."""
    for folder, _, names in os.walk(directory):
        for path in (*(Path(folder, name) for name in names), Path(folder)):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def put_in_place(source: Path, target: Path) -> None:
    """Rename a file or a directory, which replaces what stands in its place; where the system can, in one move."""
    if not target.is_dir() or target.is_symlink():
        source.replace(target)
    elif _exchange(source, target):
        shutil.rmtree(source)
    else:
        aside = source.with_name(f"{source.name}.replaced")
        target.rename(aside)
        source.rename(target)
        shutil.rmtree(aside)


def _exchange(source: Path, target: Path) -> bool:
    """Let two paths change places, so that neither is absent at any time; False where the system cannot."""
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    at_cwd, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2(at_cwd, os.fsencode(source), at_cwd, os.fsencode(target), exchange) == 0


@contextmanager
def alone(directory: str | Path, doing: str = "run") -> Iterator[None]:
    """Hold a directory against other runs as long as the block, or this process, lasts; it is made where it is missing.

    The lock is the kernel's, so a process that is dead holds none. Where this process holds the directory already,
    nothing more is done. A file system without locks costs a warning.

    Args:
        directory: what the run writes to.
        doing: what kind of run this is, for whoever comes second.

    Raises:
        ValueError: another process holds it; it is named.

    Example:
        >>> import tempfile
        >>> with alone(tempfile.mkdtemp()) as _, alone(tempfile.mkdtemp()):
        ...     pass
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory.resolve() / LOCK
    if path in _held:
        yield
        return
    file = _lock(path, directory, doing)
    if file is None:
        yield
        return
    _held[path] = file
    try:
        yield
    finally:
        del _held[path]
        with suppress(OSError):  # the directory may be gone by now
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                path.unlink()
        file.close()


def _lock(path: Path, directory: Path, doing: str) -> IO[str] | None:
    while True:
        file = path.open("a+", errors="replace")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # whoever held it before may have removed the file that was just locked
            if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                file.close()
                continue
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                file.seek(0)
                what, _, process = " ".join(file.read(300).split()).partition(", ")
                file.close()
                raise ValueError(
                    f"another {what or doing} is at work in {directory}{process and f' ({process})'}: wait until it "
                    "has ended, or choose another output_dir."
                ) from error
            file.close()
            if error.errno not in _NO_LOCKS:
                raise
            logging.getLogger(__name__).warning(
                f"{directory} is on a file system without locks ({error.strerror}): start no second run there."
            )
            return None
        with suppress(OSError):  # a full disk: the lock holds without its holder's name
            file.truncate(0)
            file.write(f"{doing}, process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        return file


def _leave_to_parent() -> None:
    for file in _held.values():
        file.close()  # a fork shares the lock, and would hold it when this process is dead
    _held.clear()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_leave_to_parent)
