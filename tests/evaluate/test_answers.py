"""A hostile answer costs itself and nothing else."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tipdistill.evaluate import Verdict, Verifiers, verifier

ENDLESS = r"\boxed{9^{9^{9^{9}}}}"


@pytest.fixture(scope="module")
def verifiers():
    with Verifiers(2, seconds=1.0) as two:
        two.judge([(r"\boxed{1}", "1")] * 4)  # start the processes outside the times below
        yield two


@pytest.mark.parametrize(
    "response",
    [
        ENDLESS,
        r"\boxed{10^{10^{10}}}",
        r"\boxed{" + "(" * 3000 + "}",
        r"\boxed{\frac{" * 2000,
        r"\boxed{" + "9" * 100_000 + "}",
        r"\boxed{__import__('os').system('kill -9 0')}",
        "\x00\ud800 \\boxed{\x00}",
        "answer is " + "$" * 5000,
    ],
)
def test_hostile_responses_are_wrong_in_time_and_the_next_is_right(verifiers, response):
    start = time.monotonic()
    hostile, sane = verifiers.judge([(response, "5x"), (r"\boxed{5x}", "5x")])
    assert not hostile.correct
    assert sane == Verdict(True, "5x")
    assert time.monotonic() - start < 20  # the limit, and a process started anew beside other work


def test_verdicts_keep_their_order_and_say_what_was_undecided(verifiers):
    pairs = [(rf"\boxed{{{n}}}", str(n % 3)) for n in range(6)]
    pairs.insert(2, (ENDLESS, "5"))
    verdicts = verifiers.judge(pairs)
    assert [verdict.correct for verdict in verdicts] == [True, True, False, True, False, False, False]
    assert [verdict.decided for verdict in verdicts] == [True, True, False, True, True, True, True]


def test_a_process_that_is_killed_costs_one_answer(verifiers):
    with Verifiers(1, seconds=20) as verifiers:
        assert verifiers.judge([(r"\boxed{1}", "1")])[0].correct
        process = verifiers._idle.get()
        os.kill(process.process.pid, signal.SIGKILL)
        verifiers._idle.put(process)
        time.sleep(0.2)
        assert verifiers.judge([(r"\boxed{1}", "1")])[0].correct


def test_a_process_whose_parent_was_killed_ends_by_itself():
    command = [sys.executable, "-P", verifier.__file__, "2"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert json.loads(process.stdout.readline()) == "ready"
        process.stdin.write(json.dumps({"response": ENDLESS, "reference": "5"}).encode() + b"\n")
        process.stdin.close()
        assert process.wait(timeout=30) == -signal.SIGALRM


def test_closed_verifiers_leave_no_process():
    verifiers = Verifiers(1)
    verifiers.judge([(r"\boxed{1}", "1")])
    process = verifiers._idle.get()
    pid = process.process.pid
    verifiers._idle.put(process)
    verifiers.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert verifiers.judge([(r"\boxed{1}", "1")])[0].correct
    verifiers.close()


def test_a_verifying_process_does_not_load_torch(verifiers):
    process = verifiers._idle.get()
    try:
        maps = Path(f"/proc/{process.process.pid}/maps").read_text()
    except FileNotFoundError:
        pytest.skip("no /proc on this system")
    finally:
        verifiers._idle.put(process)
    assert "sympy" in maps or "python" in maps
    assert "torch" not in maps


def test_equivalent_answers_are_one_group(verifiers):
    answers = ["0.5", r"\frac{1}{2}", None, "2", "0.5", "1/2", "3"]
    assert verifiers.groups(answers) == [0, 0, None, 3, 0, 0, 6]


def test_settings_are_checked():
    with pytest.raises(ValueError, match="processes must be ≥ 1"):
        Verifiers(0)
    with pytest.raises(ValueError, match="seconds > 0"):
        Verifiers(1, 0)
