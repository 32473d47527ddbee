"""The script for a GPU, without one: its stages in tiny sizes, its time limits, and what it writes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is built for Linux")

import torch

from benchmarks import gpu_lease, gpu_stages, measure, targets
from benchmarks.gpu_lease import LIMITS, lease, run_stage
from benchmarks.gpu_stages import STAGES, sizes_of

ROOT = Path(__file__).parents[2]
needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels are not interpreted")


def written_by(stage, into, does=""):
    """A stage that takes milliseconds: it writes a result and then does what is said."""
    result = {"card": "some-card", "versions": {"torch": "1"}} if stage == "versions" else {"of": stage}
    code = (
        "import json, os, subprocess, sys, time\n"
        f"def write(complete): json.dump({{'complete': complete, 'result': {result!r}}}, open({str(into)!r}, 'w'))\n"
        f"write(False)\n{does}\nwrite(True)"
    )
    return [sys.executable, "-S", "-c", code]


@pytest.fixture
def run(tmp_path):
    """Runs a lease of three stages; `does` is what one of them does."""

    def of(does=None, limits=None, budget=60.0, **options):
        limits = limits or dict.fromkeys(("versions", "head", "step"), 30.0)

        def command(stage, into):
            return written_by(stage, into, (does or {}).get(stage, ""))

        said = []
        about = {"sources": "abc", "dry_run": False, "say": said.append} | options
        path, result = lease(tmp_path / "gpu.json", limits, budget, command, **about)
        return path, result, said

    return of


def test_the_file_is_written_after_each_stage(run, tmp_path):
    seen = tmp_path / "seen"
    spy = f"open({str(seen)!r}, 'w').write(open({str(tmp_path / 'gpu.json')!r}).read())"
    path, result, _ = run({"step": spy})
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    assert {name: entry["state"] for name, entry in result["stages"].items()} == dict.fromkeys(result["stages"], "done")
    assert result["stages"]["head"]["result"] == {"of": "head"}
    assert set(json.loads(seen.read_text())["stages"]) == {"versions", "head"}
    assert [name for name in os.listdir(tmp_path) if name.startswith(".")] == []


def test_a_stage_is_killed_at_its_limit_with_what_it_started_and_what_it_had_is_kept(run, tmp_path):
    pid = tmp_path / "pid"
    hangs = (
        "child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(pid)!r}, 'w').write(str(child.pid))\ntime.sleep(60)"
    )
    began = time.monotonic()
    _, result, _ = run({"head": hangs}, {"versions": 30.0, "head": 1.0, "step": 30.0})
    assert time.monotonic() - began < 20
    head = result["stages"]["head"]
    assert (head["state"], head["reason"], head["result"]) == ("killed", "its limit of 1 s", {"of": "head"})
    assert result["stages"]["step"]["state"] == "done"
    deadline = time.monotonic() + 5
    while _lives(int(pid.read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _lives(int(pid.read_text()))


def _lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_stage_that_fails_says_why_and_the_others_run(run):
    _, result, _ = run({"head": "sys.exit(3)", "step": "os.kill(os.getpid(), 9)"})
    assert result["stages"]["head"] | {"seconds": 0} == {
        "state": "failed",
        "seconds": 0,
        "limit": 30,
        "reason": "exit code 3",
        "result": {"of": "head"},
    }
    assert result["stages"]["step"]["reason"] == "exit code -9"


def test_the_budget_shortens_and_then_skips(run):
    limits = {"versions": 30.0, "head": 30.0, "step": 30.0}
    _, result, said = run({"head": "time.sleep(60)"}, limits, budget=2.0, shortest=1.0)
    head, step = result["stages"]["head"], result["stages"]["step"]
    assert (head["state"], head["shortened_from"]) == ("killed", 30.0)
    assert step == {"state": "skipped", "reason": "the budget of 2 s was used up"}
    assert any("shortened from 30 s by the budget" in line for line in said)
    assert result["seconds"] < 10


def test_it_goes_on_after_what_is_done(run):
    run({"step": "sys.exit(1)"})
    _, result, said = run({"head": "sys.exit('it ran again')"})
    assert [entry["state"] for entry in result["stages"].values()] == ["done"] * 3
    assert "== head: there already" in said
    _, result, _ = run({"head": "sys.exit(1)"}, only=["head"])
    assert [entry["state"] for entry in result["stages"].values()] == ["done", "failed", "done"]
    _, result, _ = run({"step": "sys.exit(1)"}, sources="of other code")
    assert [entry["state"] for entry in result["stages"].values()] == ["done", "done", "failed"]


def test_where_there_is_no_gpu_nothing_else_is_run(tmp_path):
    path, result = lease(tmp_path / "r.json", LIMITS, 60.0, lambda stage, into: [sys.executable, "-c", "exit(1)"])
    assert path is None
    assert list(result["stages"]) == ["versions"]
    assert not (tmp_path / "r.json").exists()


def test_ended_from_outside_it_takes_its_stage_with_it(tmp_path):
    began = tmp_path / "began"
    code = (
        "import signal, sys\nfrom benchmarks import gpu_lease\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        f"stage = [sys.executable, '-S', '-c', \"import os, time; open({str(began)!r}, 'w').write(str(os.getpid())); "
        'time.sleep(60)"]\n'
        "from pathlib import Path\ngpu_lease.run_stage(stage, Path('none.json'), 50.0)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    try:
        deadline = time.monotonic() + 30
        while not (began.exists() and began.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 143
        assert not _lives(int(began.read_text()))
    finally:
        process.kill()


def test_limits_are_of_the_stages_that_are_there():
    assert list(LIMITS) == ["versions", "tests", "micro", "head", "errors", "memory", "profile", "step", "switches"]
    assert set(LIMITS) == set(STAGES)
    assert gpu_lease.BUDGET <= 9 * 60


def test_a_stage_that_ends_without_a_result_has_failed(tmp_path):
    entry = run_stage([sys.executable, "-S", "-c", ""], tmp_path / "none.json", 20.0)
    assert (entry["state"], entry["reason"]) == ("failed", "it ended without a result")


@needs_interpreter
@pytest.mark.parametrize("stage", list(STAGES))
def test_every_stage_runs_on_a_cpu_in_tiny_sizes(stage, capfd, monkeypatch):
    flushed = []
    result = STAGES[stage](sizes_of(dry_run=True), lambda so_far: flushed.append(json.loads(json.dumps(so_far))))
    json.dumps(result)
    if stage == "versions":
        assert (result["card"], result["versions"]["torch"]) == ("cpu", torch.__version__)
        assert result["left_out"]["head: liger"] == "it needs a GPU"
    elif stage == "tests":
        assert result["counts"] == {"PASSED": 1, "FAILED": 1, "SKIPPED": 1}
        assert result["failed"] == ["test_some.py::test_fails"]
        assert result["complete"]
    elif stage == "micro":
        assert all(entry["flops_per_second"] > 0 for entry in result["matmul"].values())
        assert all(entry["seconds"] > 0 for entry in result["kernels"].values())
    elif stage in ("head", "step"):
        entries = result["variants"]
        assert {"triton", "triton soft_or 0.5", "plain"} <= set(entries) or {"trl", "tip soft_or 0.5"} == set(entries)
        assert not [entry["refused"] for entry in entries.values() if "refused" in entry]
        assert [len(so_far["variants"]) for so_far in flushed] == [len(entries)] * len(flushed)
    elif stage == "errors":
        assert len(result["cases"]) == 12
        case = result["cases"]["bfloat16, uncertain, log-ratio 1"]
        assert case["scores and their backward"]["weight"] < 3e-2
    elif stage == "memory":
        assert all(case["growth"] > 0 for case in result["cases"].values())
    elif stage == "profile":
        for case in result["cases"].values():
            shares = [kernel["share"] for kernel in case["longest"]]
            assert sorted(shares, reverse=True) == shares
            assert sum(shares) <= 1 + 1e-6
    elif stage == "switches":
        assert set(result["cases"]) | set(result["left_out"]) == {name for name, *_ in gpu_stages.SWITCHES}
        of_tiles = result["cases"]["tile"]["rules"]["triton"]
        assert of_tiles["4096 x 4096 x 256 x 1"]["over_first"] == 1
        assert of_tiles["2048 x 8192 x 256 x 1"]["over_first"] > 0
    assert flushed or stage in ("versions", "tests")


@needs_interpreter
@pytest.mark.slow
def test_the_command_dry_runs_with_torch_triton_and_transformers_alone(tmp_path):
    """Every stage in a process of its own; here two, and the one that is left out without TRL."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "for name in ('trl', 'datasets', 'accelerate', 'liger_kernel'): sys.modules[name] = None\n"
        "import importlib.util\nfind = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name.split('.')[0] in sys.modules and "
        "sys.modules[name.split('.')[0]] is None else find(name, *a)\n"
    )
    path = tmp_path / "gpu.json"
    arguments = ["--dry_run", "--output", str(path), "--commit", "abc", "--only", "micro", "step"]
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "src")])}
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_lease", *arguments],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    result = json.loads(path.read_text())
    assert {name: entry["state"] for name, entry in result["stages"].items()} == {
        "versions": "done",
        "micro": "done",
        "step": "done",
    }
    assert "it needs TRL's trainer" in result["stages"]["step"]["result"]["left_out"]
    assert "step: left out, trl, datasets, accelerate: not installed" in ended.stdout
    assert "not measured  time / TRL, Soft-OR 0.5 (at most 0.65)" in ended.stdout
    assert (result["commit"], result["card"], result["dry_run"]) == ("abc", "cpu", True)


def test_lines_are_those_of_the_engine():
    entry = {"ratio": {"trl": {"median": 0.66}}, "over_floor": {"median": 1.2}}
    stages = {
        "tests": {"complete": True, "failed": []},
        "head": {"variants": {"triton soft_or 0.5": entry}},
        "memory": {"cases": {"triton": {"growth": 1.01}}},
        "step": {"variants": {"tip soft_or 0.5": {"above_ratio": {"plain": 0.3}}}},
    }
    holds = {line["line"]: line["holds"] for line in targets.lines(stages)}
    assert holds["time / TRL, Soft-OR 0.5"] is False
    assert [line for line, held in holds.items() if held] == [
        "tests that fail",
        "time / floor, Soft-OR 0.5",
        "extra memory at growing vocabularies, most / least, triton",
        "memory of a step above what it must hold, Soft-OR 0.5 / plain",
    ]
    assert sum(held is None for held in holds.values()) == 6
    assert all(line["holds"] is None for line in targets.lines({}))


def test_tests_cut_short_hold_no_line_and_a_failure_breaks_it():
    cut_short = gpu_stages.read_tests(["[gw0] [ 10%] PASSED t.py::test_a "], lambda result: None)
    assert targets.lines({"tests": cut_short})[0]["holds"] is None
    failed = gpu_stages.read_tests(["[gw0] [ 10%] FAILED t.py::test_a "], lambda result: None)
    assert targets.lines({"tests": failed})[0]["holds"] is False


def test_a_card_names_its_file_and_a_switch_its_value():
    assert gpu_stages.card_of("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"
    assert measure.ROOT == ROOT
