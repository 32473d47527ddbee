"""The processes that `tipdistill train` starts: told of signals, and gone when it is."""

import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from tipdistill.supervise import _trains, supervise

SIGNALS = Path(__file__).parents[1] / "src" / "tipdistill" / "signals.py"
# stands for `python -m accelerate.commands.launch ... -m tipdistill.cli train`, whose ranks have a session of their own
LAUNCHER = """
import subprocess, sys
rank = subprocess.Popen([sys.executable, "-u", *sys.argv[1:]], start_new_session=True)
sys.exit(rank.wait())
"""
# says that it is there, then waits for a signal, and leaves its code as a rank does
RANK = f"""
import os, runpy, signal, sys, time
ours = runpy.run_path({str(SIGNALS)!r})
ours["end_with_parent"]()
def told(signum, frame):
    open(os.environ[ours["EXIT_FILE"]], "w").write(str(128 + signum))
    sys.exit(0)
for signum in ours["STOPPING"]:
    signal.signal(signum, told)
open(sys.argv[1] + "/" + str(os.getpid()), "w").close()
time.sleep(60)
"""


@pytest.fixture
def started(tmp_path, request):
    """The id of a process that supervises, and the rank that it started, itself or through a launcher."""
    ranks, package = tmp_path / "ranks", tmp_path / "path" / "tipdistill"
    for folder in (ranks, package):
        folder.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "cli.py").write_text(RANK)
    rank = ["-m", "tipdistill.cli", str(ranks)]
    command = [sys.executable, *(["-c", LAUNCHER, *rank] if request.param == "launcher" else rank)]
    parent = os.fork()
    if not parent:
        os._exit(supervise(command, {**os.environ, "PYTHONPATH": str(package.parent)}))
    while not list(ranks.iterdir()):
        time.sleep(0.05)
    rank = psutil.Process(int(next(ranks.iterdir()).name))
    yield parent, rank
    if rank.is_running():
        rank.kill()


def both(test):
    return pytest.mark.parametrize("started", ["launcher", "rank"], indirect=True)(test)


@both
def test_a_signal_reaches_the_rank_and_its_code_comes_back(started):
    parent, _ = started
    os.kill(parent, signal.SIGUSR1)
    assert os.waitstatus_to_exitcode(os.waitpid(parent, 0)[1]) == 128 + signal.SIGUSR1


@both
def test_no_rank_outlives_a_parent_that_was_killed(started):
    parent, rank = started
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    rank.wait(30)
    assert not rank.is_running()


def test_ranks_are_told_from_launchers_and_from_their_own_parent():
    rank = ["python", "-u", "-m", "tipdistill.cli", "train", "--config", "laptop"]
    assert _trains(rank)
    for launcher in (
        ["python", "-m", "accelerate.commands.launch", "--num_processes", "2", *rank[2:]],
        ["python", "/bin/accelerate", "launch", *rank[2:]],
        ["python", "/bin/torchrun", "--nproc_per_node", "2", *rank[2:]],
        ["python", "/bin/tipdistill", "train"],
        [],
    ):
        assert not _trains(launcher)
