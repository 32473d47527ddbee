"""Directories that one run at a time writes to."""

import fcntl
import os
import signal
import sys
import time

import pytest

from tipdistill.files import LOCK, alone, put_in_place


def child(act):
    """Start a process that calls `act` and then waits to be killed."""
    pid = os.fork()
    if not pid:
        try:
            act()
            time.sleep(60)
        finally:
            os._exit(0)
    return pid


def reap(pid):
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def held_by_another(directory):
    def hold():
        with alone(directory, "evaluation"):
            (directory / "held").touch()
            time.sleep(60)

    pid = child(hold)
    while not (directory / "held").exists():
        time.sleep(0.01)
    return pid


def test_the_second_is_told_who_is_first_and_a_dead_one_holds_nothing(tmp_path):
    pid = held_by_another(tmp_path)
    try:
        with (
            pytest.raises(ValueError, match=rf"another evaluation is at work in .*\(process {pid} on "),
            alone(tmp_path),
        ):
            pass
    finally:
        reap(pid)
    assert (tmp_path / LOCK).exists()
    with alone(tmp_path), alone(tmp_path):  # again inside, in the same process
        pass
    assert not (tmp_path / LOCK).exists()


def test_a_fork_does_not_hold_what_its_dead_parent_held(tmp_path):
    with alone(tmp_path):
        pid = child(lambda: None)
    try:
        with alone(tmp_path):
            pass
    finally:
        reap(pid)


def test_a_file_system_without_locks_costs_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(fcntl.LOCK_EX and 38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    with alone(tmp_path):
        pass
    assert "without locks" in caplog.text


@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "in two moves"])
def test_a_directory_is_put_in_the_place_of_another(tmp_path, monkeypatch, at_once):
    if not at_once:
        monkeypatch.setattr("tipdistill.files._exchange", lambda source, target: False)
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "content").write_text(name)
    put_in_place(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old" / "content").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems replace a directory in two moves")
def test_a_directory_is_never_absent_while_another_takes_its_place(tmp_path, monkeypatch):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "content").write_text(name)
    monkeypatch.setattr("pathlib.Path.rename", lambda *_: pytest.fail("a move that leaves the place empty"))
    put_in_place(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old" / "content").read_text() == "new"
