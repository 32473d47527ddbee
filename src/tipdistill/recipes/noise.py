"""What libraries say while a run trains goes into its log file; on the screen stands what the run itself says."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import transformers

LOG_FILE = "train.log"
# of libraries whose messages do not reach the root logger
_OWN = ("transformers", "datasets", "py.warnings")


@contextmanager
def quiet(verbose: bool) -> Iterator[None]:
    """Print no warning of Python's (FutureWarning and the like) and no bar over loaded weights.

    Messages that libraries log stay on the screen: they are about the run. Downloads keep their bars.

    Args:
        verbose: print everything after all.
    """
    if verbose:
        yield
        return
    bars = transformers.utils.logging.is_progress_bar_enabled(), datasets.utils.logging.is_progress_bar_enabled()
    python = logging.getLogger("py.warnings")
    silent, propagated = logging.NullHandler(), python.propagate
    showwarning = warnings.showwarning
    logging.captureWarnings(True)
    python.addHandler(silent)
    python.propagate = False
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.captureWarnings(False)
        warnings.showwarning = showwarning
        python.removeHandler(silent)
        python.propagate = propagated
        if bars[0]:
            transformers.utils.logging.enable_progress_bar()
        if bars[1]:
            datasets.utils.logging.enable_progress_bar()


@contextmanager
def logged(directory: Path) -> Iterator[logging.Logger]:
    """Append what this run and its libraries say, warnings among it, to <directory>/train.log.

    Yields:
        The logger whose lines stand in the file alone.
    """
    handler = logging.FileHandler(directory / LOG_FILE, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    own = logging.getLogger("tipdistill.run")
    own.setLevel(logging.INFO)
    propagated, own.propagate = own.propagate, False
    listened = [logging.getLogger(name) for name in ("", *_OWN)]
    root = listened[0]
    # Python prints warnings of a root without handlers by itself, and would no more
    screen = None if root.handlers else logging.lastResort
    if screen is not None:
        root.addHandler(screen)
    for logger in (own, *listened):
        logger.addHandler(handler)
    try:
        yield own
    finally:
        for logger in (own, *listened):
            logger.removeHandler(handler)
        if screen is not None:
            root.removeHandler(screen)
        own.propagate = propagated
        handler.close()
