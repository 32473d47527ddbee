"""SIGTERM, SIGUSR1 and Ctrl-C: a checkpoint, an exit code of 128 + the signal, and the same end later."""

import json
import os
import shlex
import signal
import time

import pytest
import yaml
from faults import victims
from faults import world as worlds

from tipdistill.signals import Interrupted, Stopped, StopRequest
from tipdistill.training.checkpoints import incomplete


def until(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.exitcode is None, "it ended before it was told to"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def saved(out):
    return sorted(int(path.name.partition("-")[2]) for path in out.glob("checkpoint-*"))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_saves_a_checkpoint_and_the_run_goes_on_to_the_same_end(world, tmp_path, name):
    signum = signal.Signals[name]
    settings = {"max_steps": 25, "save_strategy": "no", "logging_steps": 2, "record_rollouts": 0, "eval_steps": 20}
    told, straight, log = tmp_path / "told", tmp_path / "straight", tmp_path / "log"
    process = victims.Victim(worlds.train(world, told, **settings), log).start()
    until(lambda: log.exists() and "'loss'" in log.read_text(), process)
    os.kill(process.pid, signum)
    process.join(60)
    assert process.exitcode == 128 + signum, log.read_text()
    (step,) = saved(told)
    assert 0 < step < 25
    assert incomplete(told / f"checkpoint-{step}") is None
    lines = [line for line in log.read_text().splitlines() if "go on with" in line]
    assert lines == [
        f"{name}: step {step} of 25 is saved in {told}/checkpoint-{step}: go on with --resume_from_checkpoint true."
    ]
    assert not (told / "trainer_state.json").exists()
    if name != "SIGTERM":
        return
    for out in (told, straight):
        assert victims.run(victims.Victim(worlds.train(world, out, **settings), log)) == [0], log.read_text()
    ends, starts = worlds.outcome("train", told), worlds.outcome("train", straight)
    # the signal's step is logged beside the second, and a card is written with a checkpoint
    differ = {path for path in {*ends, *starts} if ends.get(path) != starts.get(path)}
    assert differ <= {"trainer_state.json", "README.md", "metrics.jsonl"}
    assert json.loads((told / "trainer_state.json").read_text())["global_step"] == 25


def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_step(world, tmp_path):
    argv = worlds.train(world, tmp_path / "run", max_steps=60, save_strategy="no", gradient_accumulation_steps=1)
    both = [victims.Victim(argv, tmp_path / f"log-{rank}", environment=worlds.rank(rank)) for rank in range(2)]
    processes = [victim.start() for victim in both]
    log = tmp_path / "log-0"
    until(lambda: log.exists() and "'loss'" in log.read_text(), processes[0])
    os.kill(processes[1].pid, signal.SIGTERM)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [143, 143], log.read_text()
    (step,) = saved(tmp_path / "run")
    assert incomplete(tmp_path / "run" / f"checkpoint-{step}") is None
    assert (tmp_path / "run" / f"checkpoint-{step}" / "rng_state_1.pth").exists()
    assert f"step {step} of 60 is saved" in log.read_text()
    assert "is saved" not in (tmp_path / "log-1").read_text()


def test_a_signal_before_the_first_step_ends_at_once(world, tmp_path):
    log = tmp_path / "log"
    argv = worlds.train(world, tmp_path / "run", eval_tasks="arithmetic[:400]")
    process = victims.Victim(argv, log).start()
    until(lambda: (tmp_path / "run" / "config.yaml").exists(), process)
    os.kill(process.pid, signal.SIGUSR1)
    process.join(60)
    assert process.exitcode == 128 + signal.SIGUSR1
    assert log.read_text().splitlines()[-1] == (
        "tipdistill train: stopped by SIGUSR1. No step was under way, so nothing is lost: start it again with: "
        + shlex.join(["tipdistill", *argv])
    )
    assert not saved(tmp_path / "run")


def test_a_sweep_tells_its_cells_and_finishes_them_later(world, tmp_path):
    out, log = tmp_path / "swept", tmp_path / "log"
    grid = yaml.safe_load((world / "grid.yaml").read_text())
    grid["overrides"] = {"max_steps": 25, "save_steps": 4}  # a cell that is not at its end when it is told
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    sweep = ["sweep", str(tmp_path / "grid.yaml"), *worlds.command("sweep", world, out)[2:]]
    process = victims.Victim(sweep, log, small=True).start()
    until(lambda: list(out.glob("cells/*/checkpoint-4")), process)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 143, log.read_text()
    assert "failed" not in log.read_text()
    assert "are kept: go on with: tipdistill " in log.read_text().splitlines()[-1]
    assert not list(out.glob("cells/*/cell.json"))
    assert victims.run(victims.Victim(sweep, log, small=True)) == [0]
    assert len(list(out.glob("cells/*/cell.json"))) == 2


def in_a_fork(act):
    """The exit status of a process that calls `act`."""
    child = os.fork()
    if not child:
        try:
            act()
        finally:
            os._exit(70)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_second_signal_of_the_same_kind_ends_at_once():
    def act():
        with StopRequest("later") as request:
            request.waits = True
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGTERM)
            assert request.signum == signal.SIGUSR1
            os.kill(os.getpid(), signal.SIGTERM)

    assert in_a_fork(act) == 143


def test_handlers_of_the_caller_are_called_and_come_back():
    calls = []
    before = signal.signal(signal.SIGTERM, lambda *arguments: calls.append(arguments[0]))
    own = signal.getsignal(signal.SIGTERM)
    try:
        with StopRequest("later") as request, request:
            request.waits, request.speaks = True, False
            os.kill(os.getpid(), signal.SIGTERM)
        assert (calls, request.signum) == ([signal.SIGTERM], signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)
    with pytest.raises(KeyboardInterrupt), StopRequest("later"):
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert issubclass(Interrupted, KeyboardInterrupt)
    assert issubclass(Stopped, SystemExit)
