"""The plan against the models' own tensors, and against its own laws."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.measure import stored_bytes
from benchmarks.plan import CASES, TOLERANCE, Case, expected, measure
from tipdistill.plan import MACHINES, memory, peak, plan, read_config, replay, setup_of, step_time
from tipdistill.plan.memory import TEACHERS, fused_workspace, most_chosen
from tipdistill.plan.models import PUBLISHED, sizes
from tipdistill.plan.report import changes, fits
from tipdistill.score import chunked

SMALL = Case(width=128, layers=3, vocabulary=4096, teacher_width=128, teacher_layers=1, micro_batch=4, prompt=16)
LIVE = {
    "Soft-OR 0.2, accumulated": replace(SMALL, accumulation=2, retention=0.2, completion=64),
    "all tokens, checkpointed": replace(
        SMALL, rule="all", checkpointing=True, layers=6, vocabulary=2048, completion=64
    ),
    "bf16, Llama": replace(SMALL, bf16=True, architecture="llama", tied=False),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LIVE)
def test_a_real_step_takes_what_was_planned(name):
    _, predicted = expected(LIVE[name])
    assert predicted == pytest.approx(measure(LIVE[name]), rel=TOLERANCE)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_the_replay_saves_what_autograd_saves(padded, bf16):
    case = replace(SMALL, bf16=bf16)
    model = AutoModelForCausalLM.from_config(case.config(), dtype=torch.float32).train()
    mask = torch.ones(2, 64, dtype=torch.long)
    if padded:
        mask[0, 0] = 0
    with (
        stored_bytes(model) as stored,
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        hidden = model.base_model(torch.zeros(2, 64, dtype=torch.long), mask, use_cache=False).last_hidden_state
    found = replay.training(case.setup().student, 2, 16, 48, 8, 0, 0, 0, padded=padded)
    assert found.saved == pytest.approx(stored() + hidden.nbytes, rel=0.02)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_two_short_copies_say_what_a_deep_model_takes(monkeypatch, bf16, checkpointing):
    student = replace(SMALL, layers=10, bf16=bf16).setup().student
    shape = (student, 2, 16, 48, 8, 0, 0, 2**20)
    options = {"checkpointing": checkpointing, "accumulated": True}
    short = (replay.training(*shape, **options), replay.forward(student, 2, 64, cached=True))
    monkeypatch.setattr(replay, "_MORE", 10)
    assert short == (replay.training(*shape, **options), replay.forward(student, 2, 64, cached=True))


def test_published_sizes_are_the_models():
    billions = {
        "Qwen/Qwen3-4B": 4.02,
        "Qwen/Qwen3-8B": 8.19,
        "Qwen/Qwen3-32B": 32.76,
        "meta-llama/Llama-3.3-70B-Instruct": 70.55,
        "Qwen/Qwen2.5-14B-Instruct": 14.77,
        "deepseek-ai/DeepSeek-V3": 671.03,
    }
    assert {name: round(sizes(read_config(name)).parameters / 1e9, 2) for name in billions} == billions
    assert set(billions) <= set(PUBLISHED)
    active = sizes(read_config("deepseek-ai/DeepSeek-V3"))
    assert 36e9 < active.backbone + active.lm_head < 38e9  # published: 37B activated


@pytest.fixture
def small():
    """Of published widths and three layers, which are counted one by one; deeper ones follow from short copies."""
    student, teacher = (read_config(name) for name in ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B"))
    student.num_hidden_layers = teacher.num_hidden_layers = 3
    student.layer_types, teacher.layer_types = student.layer_types[:3], teacher.layer_types[:3]
    return setup_of(student, teacher, prompt=128, completion=384, micro_batch=2, accumulation=2)


def total(setup):
    return peak(memory(setup))[1]


def test_more_of_anything_takes_no_less(small):
    assert total(replace(small, completion=768)) > total(small)
    assert total(replace(small, micro_batch=4, accumulation=1)) >= total(replace(small, accumulation=1))
    assert total(replace(small, retention=1.0)) >= total(replace(small, retention=0.1))
    assert total(replace(small, checkpointing=False)) > total(small)
    assert total(replace(small, optimizer="sgd")) < total(small)


def test_what_is_shared_shrinks_with_the_gpus(small):
    for sharding in ("fsdp2", "zero3"):
        eight, many = (
            memory(replace(small, sharding=sharding, teacher_place="sharded", gpus=gpus))["loss"] for gpus in (8, 64)
        )
        for part in ("student weights", "optimizer state", "gradients", "teacher weights"):
            assert many[part] * 8 == pytest.approx(eight[part], rel=1e-6)
        assert many["activations"] == eight["activations"]
    zero2 = memory(replace(small, sharding="zero2", gpus=8))["loss"]
    assert zero2["student weights"] == memory(small)["loss"]["student weights"]
    assert zero2["optimizer state"] < memory(small)["loss"]["optimizer state"]


def test_the_teacher_takes_its_place(small):
    weights = {place: memory(replace(small, teacher_place=place)) for place in TEACHERS if place != "sharded"}
    teacher = small.teacher_sizes
    assert weights["resident"]["loss"]["teacher weights"] == teacher.parameters * 2
    assert weights["offload"]["loss"]["teacher weights"] == teacher.lm_head * 2
    assert weights["offload"]["score"]["teacher weights"] == teacher.parameters * 2
    assert weights["server"]["score"]["teacher weights"] == 0
    assert weights["lm_head"]["score"]["teacher weights"] == teacher.lm_head * 2


def test_cached_hidden_states_are_those_of_the_kept_rows(small):
    found = memory(replace(small, retention=0.25))["loss"]["teacher hidden states"]
    assert found == 4 * 96 * 2048 * 2  # rollouts · ⌊ρ·m⌋ · H_T · bf16
    assert memory(replace(small, rule="all"))["loss"]["teacher hidden states"] == 0


def test_lora_trains_no_more_than_its_adapters(small):
    pytest.importorskip("peft")
    lora = replace(small, student=replace(small.student, lora=(8, None)))
    parts = memory(lora)["loss"]
    assert parts["optimizer state"] < 0.02 * memory(small)["loss"]["optimizer state"]
    assert parts["gradients"] < 0.02 * memory(small)["loss"]["gradients"]


def test_what_does_not_fit_is_told_what_to_change(small):
    assert plan(small, MACHINES["h100"], (1.0, 0.1))["change"] == []
    tight = replace(small, memory=int(0.95 * total(small) / 0.92))
    assert not fits(tight, total(tight))
    *names, last = changes(tight)
    assert names
    assert last.split()[0] in ("then", "together")
    impossible = replace(small, memory=2**20)
    assert changes(impossible) == ["nothing that is planned here is enough: take a smaller student"]


def test_time_adds_up_and_follows_the_rates(small):
    seconds = step_time(small, MACHINES["h100"])
    half = step_time(small, replace(MACHINES["h100"], flops=MACHINES["h100"].flops / 2))
    assert half["teacher"] == pytest.approx(2 * seconds["teacher"])
    assert half["optimizer"] == seconds["optimizer"]
    assert seconds["communication"] == 0
    assert step_time(replace(small, gpus=8), MACHINES["h100"])["communication"] > 0
    found = plan(small, MACHINES["h100"], (1.0, 0.1))
    assert found["retentions"][1]["lm_heads_seconds"] < found["retentions"][0]["lm_heads_seconds"]


def test_the_workspace_is_the_engine_s():
    assert fused_workspace(10**6, 150_000, 2560, 4096, torch.float32, "cpu") < 60 * 2**20
    assert fused_workspace(4, 1000, 32, 32, torch.float32, "cpu") < 2**20
    triton = pytest.importorskip("tipdistill.score.triton")
    tiles = 2 * triton.TILE.tokens * triton.TILE.columns * 4
    of_token = 2 * 150_000 * 2
    for rows, gpu, held in ((1000, 80 * 2**30, 1000 * of_token), (10**6, 2**36, 2**36 * triton.WORKSPACE_SHARE)):
        taken = fused_workspace(rows, 150_000, 2560, 4096, torch.bfloat16, "cuda", lends=False, memory=gpu)
        assert taken == held + tiles
    hidden = torch.empty(10**5, 2560, dtype=torch.bfloat16, device="meta")
    for memory_of, device in ((16 * triton.INTERPRETED_WORKSPACE, "cuda"), (0, "cpu")):
        engine = triton if device == "cuda" else chunked
        rows = engine.choice_rows(hidden if device == "cuda" else hidden.float(), 150_000)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        assert most_chosen(150_000, dtype, device, memory_of) == rows
    assert CASES["Soft-OR 0.5"].setup().kept == 8 * 64


def test_tokens_that_are_chosen_in_the_loss_are_projected_once_where_their_logits_can_be_held(small):
    ahead, running = (replace(small, normalization=name) for name in ("batch", "running"))
    assert [setup.chooses_in_one_pass for setup in (ahead, running)] == [False, True]
    assert step_time(running, MACHINES["h100"])["lm_heads"] < step_time(ahead, MACHINES["h100"])["lm_heads"]
    for change in ({"completion": 10**5}, {"rule": "entropy"}, {"backward": "kept"}, {"teacher_place": "offload"}):
        assert not replace(running, **change).chooses_in_one_pass
    # all tokens of a micro-batch are one group, unless the scales are those of the step before
    assert replace(running, normalization="micro_batch").chooses_in_one_pass
    long = replace(running, micro_batch=64, completion=1000)
    assert long.chooses_in_one_pass
    assert not replace(long, normalization="micro_batch").chooses_in_one_pass
