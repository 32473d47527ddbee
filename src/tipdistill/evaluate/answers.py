"""Answers checked in processes of their own, each under a time limit: model output is hostile text."""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import math
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from . import verifier

SECONDS = 10.0
_START_SECONDS = 120.0


@dataclass(frozen=True)
class Verdict:
    """What was found of one response.

    Attributes:
        correct: whether it gives the reference answer.
        answer: the answer it gives, None where there is none.
        decided: False where the time limit ran out or the process died; the response then counts as wrong.
    """

    correct: bool
    answer: str | None = None
    decided: bool = True


def is_correct(response: str, answer: str) -> bool:
    r"""Whether a response gives the answer: its last boxed one, or the last one given, checked by math-verify.

    Integers are compared as integers ("025" is 25). The check runs in a process of its own, which is started by the
    first call and kept; an expression that takes longer than 10 seconds is wrong.

    Args:
        response: what a model wrote.
        answer: the reference, LaTeX or text.

    Returns:
        True or False.

    Raises:
        TypeError: one of them is no string.

    Example:
        >>> is_correct(r"Half of it, so $\boxed{\frac{1}{2}}$.", "0.5"), is_correct("The answer is 24.", "025")
        (True, False)
    """
    for name, value in (("response", response), ("answer", answer)):
        if not isinstance(value, str):
            raise TypeError(f"{name} must be a string, got {type(value).__name__}.")
    return _shared().judge([(response, answer)])[0].correct


class Verifiers:
    """Processes that check answers; a context manager.

    Args:
        processes: how many, started as they are needed; None: one per core, at most 4.
        seconds: time limit of one answer.

    Raises:
        ValueError: a number out of range.
        ImportError: math-verify is not installed.

    Example:
        >>> with Verifiers(1) as verifiers:
        ...     verifiers.judge([(r"\\boxed{2}", "2")])[0].correct
        True
    """

    def __init__(self, processes: int | None = None, seconds: float = SECONDS) -> None:
        if processes is None:
            processes = min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
        if processes < 1 or not seconds > 0:
            raise ValueError(f"processes must be ≥ 1 and seconds > 0, got {processes} and {seconds}.")
        if importlib.util.find_spec("math_verify") is None:
            raise ImportError("answers are checked by math-verify, which is not installed: pip install math-verify")
        self.processes = processes
        self.seconds = seconds
        self._idle: SimpleQueue[_Process] = SimpleQueue()
        for _ in range(processes):
            self._idle.put(_Process())

    def judge(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Verdicts of (response, reference) pairs, in their order."""
        replies = self._ask([{"response": response, "reference": reference} for response, reference in pairs])
        return [
            Verdict(False, decided=False) if reply is None else Verdict(reply["correct"], reply.get("answer"))
            for reply in replies
        ]

    def groups(self, answers: Sequence[str | None]) -> list[int | None]:
        """Equivalent answers get the same number, the index of the first of them; None stays None.

        An answer that could not be compared in time is a group of its own.
        """
        first: dict[str, int] = {}
        representatives: list[int] = []
        groups: list[int | None] = []
        for index, answer in enumerate(answers):
            if answer is None:
                groups.append(None)
                continue
            if answer not in first:
                first[answer] = index
                for representative in representatives:
                    reply = self._ask([{"answer": answer, "reference": answers[representative]}])[0]
                    if reply is None:
                        break
                    if reply["correct"]:
                        first[answer] = representative
                        break
                else:
                    representatives.append(index)
            groups.append(first[answer])
        return groups

    def _ask(self, requests: list[dict[str, Any]]) -> list[dict[str, Any] | None]:
        def ask(request: dict[str, Any]) -> dict[str, Any] | None:
            process = self._idle.get()
            try:
                return process.ask(request, self.seconds)
            finally:
                self._idle.put(process)

        if len(requests) == 1:
            return [ask(requests[0])]
        with ThreadPoolExecutor(self.processes) as pool:
            return list(pool.map(ask, requests))

    def close(self) -> None:
        """End the processes; the next question starts them anew."""
        processes = [self._idle.get() for _ in range(self.processes)]
        for process in processes:
            process.end()
            self._idle.put(process)

    def __enter__(self) -> Verifiers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Process:
    """One verifying process, started when it is asked and killed when it is late."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.unread = b""

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any] | None:
        if self.process is None or self.process.poll() is not None:
            self._start(seconds)
        assert self.process is not None
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
            return self._read(seconds)
        except (TimeoutError, EOFError, BrokenPipeError):
            self.end()
            return None

    def _start(self, seconds: float) -> None:
        self.unread = b""
        self.process = subprocess.Popen(
            # by path and without its folder on the module path: it must not load the package, and torch with it
            [sys.executable, "-P", str(Path(verifier.__file__)), str(math.ceil(seconds) + 5)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # an interrupt from the keyboard is the parent's to handle
        )
        try:
            self._read(_START_SECONDS)
        except (TimeoutError, EOFError) as error:
            self.end()
            raise RuntimeError(
                f"the process that checks answers did not start; try: {sys.executable} -P {verifier.__file__} 10"
            ) from error

    def _read(self, seconds: float) -> Any:
        assert self.process is not None
        assert self.process.stdout is not None
        deadline = time.monotonic() + seconds
        while b"\n" not in self.unread:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.process.stdout], [], [], left)[0]:
                raise TimeoutError
            piece = os.read(self.process.stdout.fileno(), 1 << 16)
            if not piece:
                raise EOFError
            self.unread += piece
        line, _, self.unread = self.unread.partition(b"\n")
        return json.loads(line)

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                assert pipe is not None
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
            self.process = None


_lock = threading.Lock()
_of_process: dict[int, Verifiers] = {}


def _shared() -> Verifiers:
    """The verifiers of `is_correct`, one per process: pipes are not shared with a fork."""
    with _lock:
        if os.getpid() not in _of_process:
            verifiers = _of_process[os.getpid()] = Verifiers(1)
            atexit.register(verifiers.close)
        return _of_process[os.getpid()]
