"""A process that starts a run under a launcher, tells its ranks of signals, and takes them with it when it ends.

python -m tipdistill.supervise accelerate launch ... -m tipdistill.cli train ...
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import psutil

from .signals import EXIT_FILE, STARTED_BY, StopRequest, end_with_parent


def supervise(command: list[str], environment: dict[str, str]) -> int:
    """Run a command that trains, tell its ranks of signals, end it with this process; returns the run's exit code.

    accelerate and torchrun answer a signal by killing their ranks half a minute later. So the command gets none: its
    ranks do, finish their step and save. They leave the exit code in a file, since a launcher knows only its own.

    Args:
        command: `python ... -m tipdistill.cli train ...`, which may start others.
        environment: its variables.
    """
    with tempfile.TemporaryDirectory(prefix="tipdistill-") as folder:
        left = Path(folder) / "exit"
        variables = {**environment, EXIT_FILE: str(left), STARTED_BY: str(os.getpid())}
        # a session of its own: Ctrl-C in a terminal goes to whole groups of processes
        child = subprocess.Popen(command, env=variables, start_new_session=True, preexec_fn=_as_child)

        def kill() -> None:
            os.killpg(child.pid, signal.SIGKILL)  # ranks end with their parent

        told = False
        with StopRequest("every process is told", kill) as request:
            request.waits, request.speaks = True, False
            try:
                while True:
                    try:
                        code = child.wait(timeout=0.2)
                        break
                    except subprocess.TimeoutExpired:
                        if request.signum and not told:
                            told = _tell(child, request.signum)
            except BaseException:
                kill()
                raise
        if left.exists():
            return int(left.read_text())
        if request.signum and code:
            return 128 + request.signum
        return code if code >= 0 else 128 - code


def _as_child() -> None:
    """In the child, before it becomes the command; a launcher would end at SIGUSR1, ranks catch it again."""
    end_with_parent()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _tell(child: subprocess.Popen[bytes], signum: int) -> bool:
    """Send a signal to the processes that train, or end a launcher that has started none yet."""
    ranks = ranks_below(child.pid)
    for rank in ranks:
        with suppress(ProcessLookupError):
            os.kill(rank, signum)
    if not ranks:
        child.terminate()
    return True


def ranks_below(root: int) -> list[int]:
    """Ids of the processes that train, of a process and those that it started."""
    ranks: list[int] = []
    with suppress(psutil.NoSuchProcess):
        above = psutil.Process(root)
        for process in (above, *above.children(recursive=True)):
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                # workers of a rank look like it
                if _trains(process.cmdline()) and process.ppid() not in ranks:
                    ranks.append(process.pid)
    return ranks


def _trains(line: list[str]) -> bool:
    """Whether a command line is `python ... -m tipdistill.cli`, and not a launcher's that has this in it."""
    place = line.index("-m") if "-m" in line else 0
    return line[place + 1 : place + 2] == ["tipdistill.cli"] and all(word.startswith("-") for word in line[1:place])


if __name__ == "__main__":  # python -m tipdistill.supervise accelerate launch ..., as examples/slurm.sh does
    sys.exit(supervise(sys.argv[1:], {**os.environ}))
