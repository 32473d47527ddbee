"""The processes that `tipdistill train` starts: told of signals, and gone when it is."""

import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from tipdistill.recipes.launch import supervise

SIGNALS = Path(__file__).parents[2] / "src" / "tipdistill" / "signals.py"
# stands for `python -m accelerate.commands.launch ... -m tipdistill.cli train`, whose ranks have a session of their own
LAUNCHER = """
import subprocess, sys
rank = subprocess.Popen([sys.executable, "-c", *sys.argv[1:], "tipdistill.cli"], start_new_session=True)
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
    launcher = [LAUNCHER, RANK, str(tmp_path)]
    rank = [RANK, str(tmp_path), "tipdistill.cli"]
    parent = os.fork()
    if not parent:
        os._exit(
            supervise([sys.executable, "-c", *(launcher if request.param == "launcher" else rank)], {**os.environ})
        )
    while not list(tmp_path.iterdir()):
        time.sleep(0.05)
    rank = psutil.Process(int(next(tmp_path.iterdir()).name))
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
