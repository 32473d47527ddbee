"""Processes that cost no imports: forked from a server that has imported everything once, for all tests of a session.

Reading torch, transformers and TRL takes a process of its own many seconds, and what is started here is started to be
killed, told or waited for, or to be one of several. That the installed command and the workers of a sweep start anew is
seen where that is the question (tests/cli/test_train.py, tests/cli/test_launch.py, tests/test_demo.py).
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


@cache
def library() -> Path | None:
    """What strikes the processes of tests/faults from inside libc; None without a C compiler."""
    if shutil.which("cc") is None:
        return None
    source = HERE / "faults" / "preload.c"
    built = Path(os.environ.get("TMPDIR", "/tmp")) / f"tipdistill-faults-{os.getuid()}-{int(source.stat().st_mtime)}.so"
    if not built.exists():
        partial = built.with_suffix(f".{os.getpid()}")
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", partial, source, "-ldl"], check=True)
        partial.replace(built)
    return built


@cache
def context() -> multiprocessing.context.ForkServerContext:
    """The server, started with the library in front of libc: there is one of a test process, and it serves all."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["faults.imports"])
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    changed = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if library() is not None:
        changed["LD_PRELOAD"] = str(library())
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return context


def start(
    target: Callable[..., Any],
    *arguments: Any,
    log: Path | None = None,
    environment: Mapping[str, str] | None = None,
    group: bool = False,
) -> BaseProcess:
    """A process that calls a function and ends with what it returns.

    Args:
        target, arguments: what it calls, of a module that a fork can import.
        log: takes what it prints.
        environment: further variables.
        group: make it the leader of a process group of its own, as a shell does.
    """
    asked = (target, arguments, log, dict(environment or {}), group)
    process = context().Process(target=_run, args=asked)
    process.start()
    return process


def run(target: Callable[..., Any], *arguments: Any, seconds: float = 300, **options: Any) -> int:
    """The exit code of such a process."""
    process = start(target, *arguments, **options)
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
    assert process.exitcode is not None
    return process.exitcode


def _run(
    target: Callable[..., Any],
    arguments: tuple[Any, ...],
    log: Path | None,
    environment: Mapping[str, str],
    group: bool,
) -> None:
    if group:
        os.setsid()
    # a shell's background jobs are started with Ctrl-C ignored, and would hand that on
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if log is not None:
        with log.open("a") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
    assert "faults.imports" in sys.modules, "the fork server could not import what every process needs"
    os.environ.pop("LD_PRELOAD", None)
    os.environ.update(environment)
    # in the order of standard error; to mypy it may be any text stream, here it is the interpreter's own
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    code = 70
    try:
        code = target(*arguments)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def ranks(target: Callable[..., Any], *arguments: Any, logs: list[Path], seconds: float = 300) -> list[int]:
    """The exit codes of as many processes as logs, told of each other as a launcher of one host tells them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        start(target, *arguments, log=log, environment=rank(number, len(logs), port)) for number, log in enumerate(logs)
    ]
    for process in processes:
        process.join(seconds)
    for process in processes:
        process.kill()
        process.join()
    return [process.exitcode for process in processes]  # type: ignore[misc]  # a process that was joined has one


def rank(number: int, count: int, port: int, hosts: int = 1) -> dict[str, str]:
    """What a launcher tells one of `count` processes."""
    of_a_host = count // hosts
    told = {"RANK": number, "LOCAL_RANK": number % of_a_host, "GROUP_RANK": number // of_a_host}
    told |= {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": of_a_host, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in told.items()}}


def command(argv: list[str]) -> int:
    """`tipdistill`; the workers that it starts are forked too."""
    from tipdistill import cli
    from tipdistill.sweep import workers

    workers.START_METHOD = "fork"
    return cli.main(argv)


def small_demo(grids: Path, taught: dict[str, int], argv: list[str]) -> int:
    """`tipdistill demo --quick` with another folder of grids, and models that are taught for fewer steps."""
    from tipdistill import demo

    demo.GRIDS = grids
    demo.TAUGHT["demo-quick"] = taught
    return command(argv)


def module(name: str, argv: list[str]) -> int:
    """`python -m NAME`, of a module with a `main` that reads the command line."""
    sys.argv = [name, *argv]
    return import_module(name).main() or 0


def script(code: str, argv: list[str]) -> int:
    """`python -c CODE`."""
    sys.argv = ["-c", *argv]
    exec(compile(code, "<script>", "exec"), {"__name__": "__main__"})
    return 0
