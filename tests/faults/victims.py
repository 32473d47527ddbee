"""Commands that are killed: forked from a process that has imported everything, with `preload.c` in front of libc."""

from __future__ import annotations

import ctypes
import sys
import time
import traceback
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

import forks

ACTIONS = {"count": 0, "kill": 1, "half": 2, "full": 3}


@dataclass(frozen=True)
class Fault:
    """What happens at the `number`-th operation on files below `directory`.

    `kill`: SIGKILL before it; `half`: half of the write, then SIGKILL; `full`: from then on writes fail with ENOSPC;
    `count`: nothing, the operations are counted.
    """

    directory: Path
    action: str
    number: int = 0


@dataclass
class Victim:
    """One command in one process.

    Attributes:
        argv: of `tipdistill`.
        log: takes what it prints.
        fault: what happens to it.
        small: replace slow parts of the demo, see `_make_small`.
        environment: further variables.
    """

    argv: list[str]
    log: Path
    fault: Fault | None = None
    small: bool = False
    environment: dict[str, str] = field(default_factory=dict)

    def start(self) -> BaseProcess:
        return forks.start(_run, self, log=self.log, environment=self.environment)


def run(*victims: Victim, seconds: float = 300) -> list[int]:
    """Start them together and wait; when one is killed the others are, as a launcher does. Returns the exit codes."""
    processes = [victim.start() for victim in victims]
    deadline = time.monotonic() + seconds
    while any(process.exitcode is None for process in processes):
        late = time.monotonic() > deadline
        if late or any(process.exitcode for process in processes):
            for process in processes:
                process.join(0 if late else 5)
                process.kill()
        for process in processes:
            process.join(0.02)
    return [process.exitcode for process in processes]


def _run(victim: Victim) -> int:
    if victim.small:
        _make_small()
    library = ctypes.CDLL(str(forks.library()))
    if victim.fault is not None:
        fault = victim.fault
        library.fault_arm(str(fault.directory).encode(), ACTIONS[fault.action], ctypes.c_long(fault.number))
    code = 70
    try:
        code = forks.command(victim.argv)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    if victim.fault is not None and victim.fault.action == "count":
        library.fault_seen.restype = ctypes.c_long
        print(f"operations {library.fault_seen()}", flush=True)
    return code


def _make_small() -> None:
    """The demo teaches and trains for a few steps."""
    from dataclasses import replace

    from tipdistill import demo

    demo.TAUGHT["demo-quick"] = {"teacher": 4, "student": 4}
    tiny = {"layers": 1, "width": 32}
    small_task = replace(
        demo.arithmetic.TASK,
        teacher=replace(demo.arithmetic.TASK.teacher, **tiny),
        student=replace(demo.arithmetic.TASK.student, **tiny),
    )
    demo.arithmetic.TASK = small_task
    for name in ("taught", "sample", "score", "problems"):
        if hasattr(demo.arithmetic, name):
            setattr(demo.arithmetic, name, getattr(small_task, name))
    demo._MAP_PROMPTS = 8
    whole = demo.read_grid

    def small(path: Path) -> object:
        grid = whole(path)
        return replace(grid, overrides={**grid.overrides, **_FEW}, test=("arithmetic[:8]",), rows=grid.rows[:2])

    demo.read_grid = small


_FEW = {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 16}
