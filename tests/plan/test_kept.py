"""The plan of a backward through the kept positions alone: against what autograd stores, and against its own laws."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.measure import stored_bytes
from benchmarks.plan import Case
from tipdistill.plan import MACHINES, memory, plan, read_config, setup_of, step_time
from tipdistill.plan.report import _ways, as_text
from tipdistill.training.kept import kept_states, read

CASE = Case(width=128, layers=3, vocabulary=4096, teacher_width=128, teacher_layers=1, micro_batch=4, prompt=16)
MACHINE = MACHINES["h100"]


@pytest.fixture
def small():
    """Of published widths and three layers."""
    student, teacher = (read_config(name) for name in ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B"))
    student.num_hidden_layers = teacher.num_hidden_layers = 3
    student.layer_types, teacher.layer_types = student.layer_types[:3], teacher.layer_types[:3]
    options = {"retention": 0.1, "prompt": 128, "completion": 384, "micro_batch": 2, "accumulation": 2}
    return setup_of(student, teacher, checkpointing=False, **options)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_what_autograd_stores_is_about_what_was_planned(share):
    model = AutoModelForCausalLM.from_config(CASE.config(), dtype=torch.float32).train()
    length, rows = CASE.prompt + 240, 4
    ids = torch.zeros(rows, length, dtype=torch.long)
    kept = torch.zeros(rows, length, dtype=torch.bool)
    kept[:, CASE.prompt :: round(1 / share)] = True
    reading = read(model, ids, torch.ones_like(ids))
    with stored_bytes(model) as stored:
        kept_states(model, reading, kept)
    setup = replace(CASE.setup(), micro_batch=rows, accumulation=1, prompt=CASE.prompt, completion=240)
    setup = replace(setup, rule="soft_or", retention=int(kept.sum()) / (rows * 240), backward="kept")
    planned = memory(replace(setup, checkpointing=True))["loss"]
    assert planned["activations"] + planned["KV cache"] == pytest.approx(stored(), rel=0.25)


def test_it_is_read_once_and_the_kept_share_goes_forward_and_backward(small):
    running = replace(small, normalization="running")
    kept = replace(running, backward="kept")
    assert kept.kept_share == pytest.approx(0.1 * 384 / 512, rel=0.03)
    ratio = 1 / 3 + kept.kept_share
    part = "student forward and backward"
    assert step_time(kept, MACHINE)[part] / step_time(running, MACHINE)[part] == pytest.approx(ratio)
    recomputed = replace(kept, checkpointing=True)
    assert step_time(recomputed, MACHINE) == step_time(kept, MACHINE)
    assert memory(recomputed) == memory(kept)


def test_it_stores_less_the_fewer_are_kept(small):
    running = replace(small, normalization="running")

    def stored(retention):
        return memory(replace(running, backward="kept", retention=retention))["loss"]["activations"]

    assert stored(0.1) < 0.3 * memory(running)["loss"]["activations"]
    assert stored(0.1) < stored(0.5) < memory(running)["loss"]["activations"]


def test_a_plan_says_what_other_settings_would_take(small):
    planned = plan(small, MACHINE)
    names = [row["setting"] for row in planned["settings"]]
    assert names == ["as the recipe has it", "normalization: running", "backward: kept, normalization: running"]
    seconds = [row["without_rollout_seconds"] for row in planned["settings"]]
    assert seconds[0] > seconds[1] > seconds[2]
    assert "| backward: kept, normalization: running" in as_text(planned)
    # where a setting is refused, or is the recipe's own, it is not offered
    for change, expected in (
        ({"rule": "all", "retention": 1.0}, names[:1]),
        ({"gpus": 8, "sharding": "zero3"}, names[:2]),
        ({"normalization": "running", "backward": "kept"}, [names[0], "backward: full"]),
        ({"normalization": "running"}, [names[0], "backward: kept"]),
        ({"teacher_place": "offload"}, [names[0], "backward: kept"]),
        ({"teacher_place": "server"}, [names[0], "backward: kept"]),
    ):
        offered = [row["setting"] for row in plan(replace(small, **change), MACHINE)["settings"]]
        assert [name for name in offered if "server on" not in name] == expected


def test_a_teacher_that_is_moved_away_scores_ahead_of_the_loss(small):
    running = replace(small, normalization="running")
    moved = {name: change(running) for degrees in _ways(running) for name, change in degrees}
    for name in ("teacher_offload: true", "the teacher on a server of its own"):
        assert moved[name].normalization == "batch"
        assert moved[name].scores_ahead
    assert moved["use_peft: true (LoRA)"].normalization == "running"
