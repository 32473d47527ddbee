"""The estimate of a step's memory against what tensors really held."""

import pytest
import torch
from measure import peak_bytes
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tipdistill import estimate as module
from tipdistill.estimate import step_estimate
from tipdistill.types import Rollout


@pytest.fixture
def pair(tiny_model_dir):
    return [AutoModelForCausalLM.from_pretrained(tiny_model_dir("llama", role)) for role in ("student", "teacher")]


ROLLOUTS = [Rollout(number, "", (3, 4, 5), tuple(range(5, 60)), True) for number in range(12)]


@pytest.mark.parametrize("retention", [1.0, 0.1])
def test_memory_is_what_a_forward_and_backward_holds(retention):
    """At sizes where activations and logits outweigh what a backward needs for a moment."""
    config = Qwen3Config(
        vocab_size=2000,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
    )
    student, teacher = Qwen3ForCausalLM(config), Qwen3ForCausalLM(config).requires_grad_(False)
    parameters = list(student.parameters())

    def run():
        return module._forward_and_backward(student, teacher, ROLLOUTS[:8], retention, 1.0, parameters)

    saved, head = run()
    expected = saved + head + sum(parameter.nbytes for parameter in parameters)  # gradients are held as well
    assert 0.75 < expected / peak_bytes(run) < 1.33


def test_fewer_tokens_take_less(pair):
    found = step_estimate(*pair, ROLLOUTS, (1.0, 0.5, 0.1), micro_batch=8, seconds_before=3.0)
    memory = [row["peak_memory_gib"] for row in found["rows"]]
    assert memory == sorted(memory, reverse=True)
    assert memory[0] > memory[-1]
    assert all(row["step_seconds"] > 3.0 for row in found["rows"])
    assert "12 rollouts (660 tokens) a step in micro-batches of 8" in found["assumptions"]
    assert found["device"].startswith("cpu")


def test_a_device_that_is_too_small_gives_no_figure(pair, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(module, "_forward_and_backward", full)
    (row,) = step_estimate(*pair, ROLLOUTS, (0.5,))["rows"]
    assert (row["step_seconds"], row["peak_memory_gib"]) == (None, None)


def test_the_student_s_flags_are_left_as_they_were(pair):
    pair[0].requires_grad_(False)
    step_estimate(*pair, ROLLOUTS, (0.5,), micro_batch=2)
    assert not any(parameter.requires_grad for parameter in pair[0].parameters())
    assert all(parameter.grad is None for parameter in pair[0].parameters())
