"""What stops a run: SIGTERM, SIGUSR1 and Ctrl-C, and the end of the process that started this one.

Exit codes are 128 + the signal's number. While a student trains, the first signal waits for the end of the step
(`StopRequest`); elsewhere it ends the command at once (`stopping_at_once`).
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# where a process under accelerate leaves its exit code for the `tipdistill train` that started accelerate
EXIT_FILE = "TIPDISTILL_EXIT_FILE"
STARTED_BY = "TIPDISTILL_STARTED_BY"
_PR_SET_PDEATHSIG = 1
_ECHO_SECONDS = 1.0


class Stopped(SystemExit):
    """SIGTERM or SIGUSR1 ended the work in order; `code` is 128 + its number.

    Attributes:
        told: whether the user was told how to go on.
    """

    told = False


class Interrupted(KeyboardInterrupt):
    """Ctrl-C ended the work in order, and the user was told how to go on."""


def stop(signum: int, message: str | None = None) -> NoReturn:
    """Say `message` on standard error, and raise what the signal stands for.

    Args:
        signum: of STOPPING.
        message: how to go on; "" where another process says it, None where nobody has yet.

    Raises:
        KeyboardInterrupt: for SIGINT.
        SystemExit: with code 128 + signum, for the others.

    Example:
        >>> stop(signal.SIGTERM)
        Traceback (most recent call last):
        tipdistill.signals.Stopped: 143
    """
    if message:
        print(f"{signal.Signals(signum).name}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    if signum == signal.SIGINT:
        raise Interrupted if message is not None else KeyboardInterrupt
    stopped = Stopped(128 + signum)
    stopped.told = message is not None
    raise stopped


def _at_once(signum: int, frame: FrameType | None) -> None:
    stop(signum)


@contextmanager
def stopping_at_once() -> Iterator[None]:
    """SIGTERM and SIGUSR1 raise `Stopped`, as Ctrl-C raises KeyboardInterrupt; outside of the main thread nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.signal(signum, _at_once) for signum in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        _restore(before)


def _restore(before: dict[signal.Signals, Any]) -> None:
    for signum, handler in before.items():
        signal.signal(signum, signal.SIG_DFL if handler is None else handler)  # None: one that C code set


class StopRequest:
    """While entered, the first signal is kept in `signum`, and a second one of its kind ends the process at once.

    Handlers are those of the main thread; elsewhere nothing is caught. A handler of the caller's own is called too.
    Entered again inside, it does nothing.

    Args:
        notice: what becomes of the first signal, in words; it is said when it arrives. Before that there is anything
            to wait for (`waits` is False) a signal ends the work at once.
        at_end: called before the process ends at once.

    Example:
        >>> with StopRequest("the step is finished first") as request:
        ...     request.waits = True
        ...     os.kill(os.getpid(), signal.SIGUSR1)
        >>> request.signum == signal.SIGUSR1
        True
    """

    def __init__(self, notice: str, at_end: Callable[[], None] | None = None) -> None:
        self.notice, self.at_end = notice, at_end
        self.signum, self.waits, self.speaks = 0, False, True
        self._arrived: dict[int, float] = {}
        self._before: dict[signal.Signals, Any] = {}
        self._entered = 0

    def __enter__(self) -> StopRequest:
        self._entered += 1
        if self._entered == 1 and threading.current_thread() is threading.main_thread():
            self.signum, self._arrived = 0, {}
            for signum in STOPPING:
                # a shell ignores Ctrl-C for what it starts in the background, and means it
                if signum != signal.SIGINT or signal.getsignal(signum) is not signal.SIG_IGN:
                    self._before[signum] = signal.signal(signum, self._arrive)
        return self

    def __exit__(self, *error: object) -> None:
        self._entered -= 1
        if not self._entered:
            _restore(self._before)
            self._before, self.waits = {}, False

    @property
    def is_outermost(self) -> bool:
        """Whether leaving the block that was entered last ends it."""
        return self._entered == 1

    def _arrive(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if signum in self._arrived:
            if EXIT_FILE in os.environ and now - self._arrived[signum] < _ECHO_SECONDS:
                return  # the same signal, once from whoever sent it to all processes and once from our parent
            if self.at_end is not None:
                self.at_end()
            os._exit(128 + signum)
        self._arrived[signum] = now
        before = self._before.get(signal.Signals(signum))
        if callable(before) and before not in (signal.default_int_handler, _at_once):
            before(signum, frame)
        if not self.waits:
            stop(signum)
        self.signum = self.signum or signum
        if self.speaks:
            name = signal.Signals(signum).name
            os.write(2, f"\n{name}: {self.notice}; the same signal again ends it at once.\n".encode())


def end_with_parent() -> None:
    """Let this process be killed when the one that started it ends, however that comes about."""
    parent, named = os.getppid(), os.environ.get(STARTED_BY)
    if sys.platform != "linux":

        def watch() -> None:
            while os.getppid() == parent:
                time.sleep(1)
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent or (named is not None and not os.path.exists(f"/proc/{named}")):
        os._exit(1)  # it ended before this was asked for
