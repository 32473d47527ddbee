"""Commands that are killed: forked from a process that has imported everything, with `preload.c` in front of libc."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import forkserver
from pathlib import Path

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
        small: replace slow parts of a sweep or of the demo, see `_make_small`.
        environment: further variables.
    """

    argv: list[str]
    log: Path
    fault: Fault | None = None
    small: bool = False
    environment: dict[str, str] = field(default_factory=dict)

    def start(self) -> multiprocessing.process.BaseProcess:
        process = _context().Process(target=_run, args=(self,))
        process.start()
        return process


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


@cache
def _library() -> Path:
    source = Path(__file__).with_name("preload.c")
    library = (
        Path(os.environ.get("TMPDIR", "/tmp")) / f"tipdistill-faults-{os.getuid()}-{int(source.stat().st_mtime)}.so"
    )
    if not library.exists():
        built = library.with_suffix(f".{os.getpid()}")
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", built, source, "-ldl"], check=True)
        built.replace(library)
    return library


@cache
def _context() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["faults.imports"])
    os.environ["LD_PRELOAD"] = str(_library())
    paths = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [paths])])
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["LD_PRELOAD"]
        if paths is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = paths
    return context


def _run(victim: Victim) -> None:
    with victim.log.open("a") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    assert "faults.imports" in sys.modules, "the fork server could not import what every victim needs"
    os.environ.pop("LD_PRELOAD", None)
    os.environ.update(victim.environment)
    from tipdistill import cli

    if victim.small:
        _make_small()
    library = ctypes.CDLL(str(_library()))
    if victim.fault is not None:
        fault = victim.fault
        library.fault_arm(str(fault.directory).encode(), ACTIONS[fault.action], ctypes.c_long(fault.number))
    code = 70
    try:
        code = cli.main(victim.argv)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    if victim.fault is not None and victim.fault.action == "count":
        library.fault_seen.restype = ctypes.c_long
        print(f"operations {library.fault_seen()}", flush=True)
    os._exit(code)


def _make_small() -> None:
    """Workers are forked instead of started anew, and the demo teaches and trains for a few steps."""
    from dataclasses import replace

    from tipdistill import demo
    from tipdistill.sweep import workers

    spawning = multiprocessing.get_context
    workers.multiprocessing.get_context = lambda _: spawning("fork")
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
