"""`tipdistill sweep` from end to end on tiny models: resuming, recomputing, workers that die, and what is refused."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import forks
import pytest
import yaml

from tipdistill import cli
from tipdistill.sweep import workers
from tipdistill.tasks import arithmetic

RATE = "rate0.001"
RULES = '''
"""Rules that fail, for tests."""
import os, pathlib, signal
FLAG = pathlib.Path(__file__).with_name("flag")

def dies(scores):
    if not FLAG.exists():
        FLAG.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return scores.entropy
dies.fields = ("entropy",)

def raises(scores):
    raise RuntimeError("the rule does not like these tokens")
raises.fields = ("entropy",)
'''


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a taught pair, prompts, a recipe and rules that fail."""
    root = tmp_path_factory.mktemp("world")
    for name, seed in (("teacher", 0), ("student", 1)):
        training = arithmetic.Training(layers=1, width=16, steps=2, learning_rate=1e-2, seed=seed)
        arithmetic.taught(name, training, root).rename(root / name)
    pairs = arithmetic.problems(32, 0)
    (root / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": arithmetic.prompt_of(*pair)}) + "\n" for pair in pairs)
    )
    recipe = {
        "model_name_or_path": str(root / "student"),
        "teacher_model_name_or_path": str(root / "teacher"),
        "dataset_name": str(root / "prompts.jsonl"),
        "per_device_train_batch_size": 4,
        "max_completion_length": 8,
        "max_steps": 3,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "record_rollouts": 0,
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (root / "failing_rules.py").write_text(RULES)
    return root


# every completion of such a student is wrong, so that its last characters stand for an answer: any figure will do
TASK = """
from tipdistill.tasks import arithmetic
problems = [(arithmetic.prompt_of(*pair), "1") for pair in arithmetic.problems(24, 0, held_out=True)]
task = {"problems": problems, "prompt": "own", "check": lambda response, answer: answer in response}
"""


@pytest.fixture
def grid(world, tmp_path, monkeypatch):
    """Writes a grid and returns its path and the arguments that run it into a directory of its own."""
    (world / "ones.py").write_text(TASK)
    monkeypatch.syspath_prepend(str(world))
    monkeypatch.setattr(workers, "START_METHOD", forks.context().get_start_method())

    def write(directory="swept", **changes):
        asked = {
            "base": str(world / "recipe.yaml"),
            "overrides": {"per_device_eval_batch_size": 16},
            "cells": {"all": 1.0, "random": [0.5]},
            "learning_rates": 1e-3,
            "seeds": [1, 2],
            "test": "ones.task[8:]",
            "num_samples": 2,
            **changes,
        }
        path = tmp_path / "grid.yaml"
        path.write_text(yaml.safe_dump(asked, sort_keys=False))
        return ["sweep", str(path), "--output_dir", str(tmp_path / directory), "--threads", "1", "--trust_recipe"]

    return write


def cells(directory: Path) -> dict[str, dict]:
    """What each finished cell came to, and the losses on the way there; all but time and memory."""
    found = {}
    for path in sorted(directory.glob("cells/*/cell.json")):
        result = json.loads(path.read_text())["result"]
        history = json.loads((path.parent / "trainer_state.json").read_text())["log_history"]
        result["losses"] = [entry["loss"] for entry in history if "loss" in entry]
        found[path.parent.name] = {key: result[key] for key in ("tasks", "trained_tokens", "losses")}
    return found


def written_at(directory: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in directory.glob("cells/*/cell.json")}


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.mark.slow
def test_killed_resumed_deleted_parallel_and_serial_come_to_the_same(grid, tmp_path, capsys):
    chosen = {"learning_rates": [1e-3, 1e-2], "validation": {"task": "ones.task[:8]", "seeds": [1]}, "seeds": [1]}
    assert cli.main([*grid(directory="whole", **chosen), "--workers", "1"]) == 0
    said = capsys.readouterr().out
    whole = cells(tmp_path / "whole")
    assert len(whole) == 2 * 2
    assert said.count(" chosen (") == 2
    assert "4/4" in said
    assert "min left" in said or "s left" in said
    table = (tmp_path / "whole" / "sweep.md").read_text()
    assert table in said
    result = json.loads((tmp_path / "whole" / "sweep.json").read_text())
    assert [row["seeds"] for row in result["rows"]] == [[1], [1]]
    for row in result["rows"]:
        assert 0 < row["tasks"]["ones.task[8:]"]["mean"] < 1
        assert row["peak_memory_gib"] > 0
        assert row["seconds"] > 0
    assert result["before"]["ones.task[8:]"]["seeds"] == 1

    # killed in the middle, with two workers at work, and resumed
    process = forks.start(forks.command, [*grid(directory="killed", **chosen), "--workers", "2"])
    wait_for(lambda: written_at(tmp_path / "killed"))
    process.kill()
    process.join()
    before = written_at(tmp_path / "killed")
    assert 1 <= len(before) < 4
    assert not (tmp_path / "killed" / "sweep.json").exists()
    assert cli.main([*grid(directory="killed", **chosen), "--workers", "2"]) == 0
    assert before.items() <= written_at(tmp_path / "killed").items(), "a finished cell was run again"
    assert cells(tmp_path / "killed") == whole

    # a cell deleted by hand
    victim = next(iter(sorted(whole)))
    shutil.rmtree(tmp_path / "killed" / "cells" / victim)
    kept = written_at(tmp_path / "killed")
    assert cli.main([*grid(directory="killed", **chosen), "--workers", "1"]) == 0
    assert kept.items() <= written_at(tmp_path / "killed").items()
    assert cells(tmp_path / "killed") == whole
    runs = json.loads((tmp_path / "killed" / "sweep.json").read_text())["runs"]
    assert sum(run["cells"] for run in runs if run["workers"] == 1) == 1
    assert sum(run["cells"] for run in runs) == 4
    assert all(run["measured"] and "commit" in run for run in runs)

    # a finished sweep is only counted again
    capsys.readouterr()
    now = written_at(tmp_path / "killed")
    assert cli.main(grid(directory="killed", **chosen)) == 0
    assert written_at(tmp_path / "killed") == now
    assert " chosen (" in capsys.readouterr().out

    # other settings are refused, and run again when that is asked for
    other = {"overrides": {"max_steps": 2, "per_device_eval_batch_size": 16}, "cells": {"all": 1.0}}
    changed = grid(directory="killed", **chosen, **other)
    assert cli.main(changed) == 2
    said = capsys.readouterr().err
    assert "2 finished cells" in said
    assert "with another settings.max_steps" in said
    assert "--rerun_changed" in said
    assert written_at(tmp_path / "killed") == now
    assert cli.main([*changed, "--rerun_changed", "--workers", "1"]) == 0
    assert "2 finished cells were made with other settings and run again" in capsys.readouterr().out
    again = {name: cell for name, cell in cells(tmp_path / "killed").items() if name.startswith("all-")}
    assert [len(cell["losses"]) for cell in again.values()] == [2, 2]


@pytest.mark.slow
def test_a_worker_that_dies_and_a_run_that_fails_cost_their_cells_alone(grid, world, tmp_path, capsys):
    (world / "flag").unlink(missing_ok=True)
    rules = {
        "all": 1.0,
        "dies": {"rule": "failing_rules.dies", "retentions": [0.5]},
        "raises": {"rule": "failing_rules.raises", "retentions": [0.5]},
    }
    argv = [*grid(cells=rules, seeds=[1]), "--workers", "1"]
    assert cli.main(argv) == 1
    said = capsys.readouterr().out
    assert "FAILED, ChildProcessError: its process was killed" in said
    assert "FAILED, RuntimeError: the rule does not like these tokens" in said
    assert "2 cells failed; the same command tries them again" in said
    assert list(written_at(tmp_path / "swept")) == [f"all-100-{RATE}-seed1"]
    result = json.loads((tmp_path / "swept" / "sweep.json").read_text())
    assert sorted(result["failed"]) == [f"dies-50-{RATE}-seed1", f"raises-50-{RATE}-seed1"]
    assert "| dies | 50 % | failed |" in said
    log = (tmp_path / "swept" / "workers.log").read_text()
    assert "the rule does not like these tokens" in log

    assert cli.main(argv) == 1  # the flag is there now, so that one of the two goes through
    assert len(written_at(tmp_path / "swept")) == 2
    assert "1 cells failed" in capsys.readouterr().out


@pytest.mark.slow
def test_a_cell_goes_on_from_its_checkpoint_and_models_may_be_dropped(grid, world, tmp_path):
    """A cell with a checkpoint is not trained from the start: its steps before it are not logged twice."""
    settings = {"seeds": [1], "cells": {"random": [0.5]}}
    saving = {"save_strategy": "steps", "save_steps": 2, "save_only_model": False}
    overrides = {"per_device_eval_batch_size": 16, **saving}
    assert cli.main([*grid(directory="whole", **settings, overrides=overrides), "--workers", "1"]) == 0
    whole = cells(tmp_path / "whole")
    (name,) = whole
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    cell = tmp_path / "half" / "cells" / name
    for left in ("cell.json", "trainer_state.json", "model.safetensors"):
        (cell / left).unlink()
    shutil.rmtree(cell / "checkpoint-3", ignore_errors=True)
    state = json.loads((cell / "checkpoint-2" / "trainer_state.json").read_text())
    next(entry for entry in state["log_history"] if "loss" in entry)["loss"] = (
        123.0  # a mark that only a resumed run keeps
    )
    (cell / "checkpoint-2" / "trainer_state.json").write_text(json.dumps(state))
    argv = grid(directory="half", **settings, overrides=overrides, keep_models=False)
    assert cli.main([*argv, "--workers", "1"]) == 0
    half = cells(tmp_path / "half")
    assert half[name]["losses"] == [123.0, *whole[name]["losses"][1:]]
    assert half[name]["tasks"] == whole[name]["tasks"]
    assert (tmp_path / "whole" / "cells" / name / "model.safetensors").exists()
    assert not [*cell.glob("*.safetensors"), *cell.glob("checkpoint-*")]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc to see the workers")
def test_an_interrupt_ends_everything_at_once(grid, tmp_path):
    argv, log = [*grid(overrides={"max_steps": 10**6}), "--workers", "2"], tmp_path / "log"
    process = forks.start(forks.command, argv, log=log)
    wait_for(lambda: list(tmp_path.glob("swept/cells/*/config.yaml")))
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(workers) == 2
    os.kill(process.pid, signal.SIGINT)  # to this process alone, as a scheduler sends it
    process.join(60)
    assert process.exitcode == 130
    assert log.read_text().splitlines()[-1] == "tipdistill sweep: interrupted."
    assert "FAILED" not in log.read_text()
    wait_for(lambda: not [pid for pid in workers if Path(f"/proc/{pid}").exists()], seconds=20)


def test_what_would_not_run_is_refused_before_anything_does(grid, world, tmp_path, capsys):
    for changes, said in (
        ({"overrides": {"max_stesp": 3}}, "there is no field 'max_stesp'. Did you mean 'max_steps'"),
        ({"overrides": {"model_name_or_path": "absent/student"}}, "absent/student"),
        ({"overrides": {"dataset_name": str(world / "promts.jsonl")}}, "promts.jsonl"),
        ({"cells": {"all": {"retentions": 1.0, "overrides": {"drift_retention": 3}}}}, "drift_retention must be in"),
        ({"base": "laptpo"}, "laptop"),
        ({"seed": [1]}, "there is no key 'seed' in a grid"),
    ):
        assert cli.main(grid(**changes)) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.splitlines()[-1].startswith("tipdistill sweep: ")
    assert cli.main(["sweep", str(tmp_path / "gird.yaml")]) == 2
    assert "Did you mean 'grid.yaml'" in capsys.readouterr().err
    assert cli.main([*grid(), "--workers", "0"]) == 2
    assert cli.main([*grid(), "--worker", "1"]) == 2
    assert "there is no flag --worker. Did you mean '--workers'" in capsys.readouterr().err
    assert not (tmp_path / "swept").exists()


def test_a_dry_run_says_what_would_run(grid, tmp_path, capsys):
    assert cli.main([*grid(), "--dry_run"]) == 0
    assert "4 cells in 2 rows, 0 finished; nothing was run." in capsys.readouterr().out
    assert not (tmp_path / "swept").exists()


def test_two_sweeps_in_one_directory_are_refused(grid, tmp_path, capsys):
    import fcntl

    (tmp_path / "swept").mkdir()
    with (tmp_path / "swept" / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert cli.main(grid()) == 2
    assert "another sweep is at work" in capsys.readouterr().err


def test_a_seed_in_a_path_is_the_cells(grid, world, tmp_path):
    from tipdistill.sweep import read_grid
    from tipdistill.sweep.cells import Cells

    path = grid(overrides={"model_name_or_path": f"{world}/student-{{seed}}"})[1]
    cells_of = Cells(read_grid(path), tmp_path)
    assert [cells_of.settings(cell)["model_name_or_path"] for cell in cells_of.every_cell()] == [
        f"{world}/student-{seed}" for seed in (1, 2, 1, 2)
    ]
