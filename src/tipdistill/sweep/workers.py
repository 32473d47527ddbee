"""Worker processes that share the cores, end with their parent, and cost one job where one of them dies."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

START_METHOD = "spawn"  # torch's threads do not survive a fork


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def process_pool(workers: int, threads: int, log: Path) -> ProcessPoolExecutor:
    """Processes that do one job after the other; the death of one breaks the pool.

    Args:
        workers: how many.
        threads: of each.
        log: takes what they print.
    """
    context = multiprocessing.get_context(START_METHOD)
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(threads, log))


def _begin(threads: int, log: Path) -> None:
    """Set a worker up: quiet, on its share of the cores, and gone when its parent is."""
    # Ctrl-C reaches all processes of a terminal, and the parent tells its workers what to do; SIGTERM is its word
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with log.open("a") as said:  # warnings and progress bars would tear the live table
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch
    import transformers

    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "only workers wait for their parent"
    parent.join()
    os._exit(1)


class Workers:
    """Processes that stay for many jobs, each with a pool of its own, so that the death of one costs its job alone.

    Args:
        count: processes at a time.
        threads: of each.
        log: takes what they print.
    """

    def __init__(self, count: int, threads: int, log: Path) -> None:
        self._others = set(multiprocessing.active_children())
        self._new = lambda: process_pool(1, threads, log)
        self._idle = [self._new() for _ in range(count)]
        self._busy: dict[Future[Any], tuple[Any, ProcessPoolExecutor]] = {}

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is not None:
            for process in set(multiprocessing.active_children()) - self._others:
                process.terminate()  # a job that nobody waits for would hold the exit up until it is done
        for pool in (*self._idle, *(pool for _, pool in self._busy.values())):
            pool.shutdown(wait=error[0] is None, cancel_futures=True)

    def tell_to_stop(self) -> None:
        """Send every process SIGTERM and wait: one that trains ends its step and saves first."""
        for process in set(multiprocessing.active_children()) - self._others:
            process.terminate()
        wait(self._busy)

    def kill(self) -> None:
        """End every process at once."""
        for process in set(multiprocessing.active_children()) - self._others:
            process.kill()

    @property
    def idle(self) -> int:
        """How many processes have no job."""
        return len(self._idle)

    @property
    def busy(self) -> int:
        """How many processes have one."""
        return len(self._busy)

    def start(self, key: Any, function: Callable[..., Any], *arguments: Any) -> None:
        """Give a job to an idle process.

        Args:
            key: what `finished` calls it.
            function, arguments: of a module, so that they can be sent.
        """
        pool = self._idle.pop()
        self._busy[pool.submit(function, *arguments)] = key, pool

    def finished(self, timeout: float) -> list[tuple[Any, Future[Any]]]:
        """Jobs that ended since the last call, waiting up to `timeout` seconds for one.

        The future of a job whose process died raises ChildProcessError; another process takes its place.
        """
        done, _ = wait(self._busy, timeout, FIRST_COMPLETED)
        ended = []
        for future in done:
            key, pool = self._busy.pop(future)
            if isinstance(future.exception(), BrokenProcessPool):
                pool.shutdown(wait=False)
                pool = self._new()
                future = Future()
                future.set_exception(ChildProcessError("its process was killed (out of memory?)"))
            self._idle.append(pool)
            ended.append((key, future))
        return ended
