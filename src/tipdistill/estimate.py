"""What a training step will take at each retention: memory counted from the graph, time measured on the device."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .loss import fused_divergence_loss
from .plan.memory import fused_workspace
from .score.models import head_of, hidden_states
from .types import Rollout

_ROUNDS = 3


def step_estimate(
    student: Any,
    teacher: Any,
    rollouts: Sequence[Rollout],
    retentions: Sequence[float],
    *,
    micro_batch: int = 8,
    temperature: float = 1.0,
    seconds_before: float = 0.0,
) -> dict[str, Any]:
    """Peak memory (GiB) and time (s) of a full fine-tuning step on these rollouts, for each retention.

    Time = rollouts and scoring as they were measured + the median of three forwards and backwards of one micro-batch
    whose loss is over ⌊ρ·n⌋ of its n tokens, times the step's tokens over the micro-batch's. The optimiser's own time
    is left out. Memory = weights of both models + gradients and AdamW's two moments in the weights' dtype + what
    autograd saves for the backward of the micro-batch (counted through its hooks, so the same on every device) + the
    tiles and gradients of the head. The last two came to 0.9 to 1.3 times what was really allocated on a CPU. No
    gradient checkpointing, no sharding, one device. On CUDA the peak of the measured forward and backward is given too.

    Args:
        student, teacher: transformers models on one device.
        rollouts: of one training step.
        retentions: shares of the tokens.
        micro_batch: rollouts of a forward (`per_device_train_batch_size`).
        temperature: of the sampling.
        seconds_before: what sampling and scoring these rollouts took.

    Returns:
        {"assumptions": str, "device": str, "rows": [{"retention", "step_seconds", "peak_memory_gib", ...}]}, of JSON's
        types. Where the device's memory did not suffice, the figures of that retention are None.
    """
    # the longest, since a batch is padded to them
    chosen = sorted(rollouts, key=lambda rollout: -len(rollout.prompt_ids) - len(rollout.completion_ids))[:micro_batch]
    device = student.get_input_embeddings().weight.device
    tokens, of_micro_batch = (sum(len(one.completion_ids) for one in some) for some in (rollouts, chosen))
    flags = [(parameter, parameter.requires_grad) for parameter in student.parameters()]
    student.requires_grad_(True)
    try:
        rows = [
            _row(student, teacher, chosen, retention, temperature, seconds_before, tokens / of_micro_batch)
            for retention in retentions
        ]
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    return {
        "assumptions": f"full fine-tuning with AdamW (moments in the weights' dtype), {len(rollouts)} rollouts "
        f"({tokens:,} tokens) a step in micro-batches of {len(chosen)}, no gradient checkpointing, both models on one "
        "device; without the optimiser's own time",
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device} ({torch.get_num_threads()} threads)",
        "seconds_before": seconds_before,
        "rows": rows,
    }


def _row(
    student: Any,
    teacher: Any,
    rollouts: Sequence[Rollout],
    retention: float,
    temperature: float,
    seconds_before: float,
    micro_batches: float,
) -> dict[str, Any]:
    device = student.get_input_embeddings().weight.device
    row: dict[str, Any] = {"retention": retention, "step_seconds": None, "peak_memory_gib": None}
    parameters = list(student.parameters())
    try:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        taken, saved, head = [], 0, 0
        for _ in range(_ROUNDS):
            started = time.perf_counter()
            saved, head = _forward_and_backward(student, teacher, rollouts, retention, temperature, parameters)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken.append(time.perf_counter() - started)
    except torch.OutOfMemoryError:
        return row
    trained = sum(parameter.nbytes for parameter in parameters)
    held = trained + sum(parameter.nbytes for parameter in teacher.parameters())
    row["step_seconds"] = seconds_before + micro_batches * sorted(taken)[_ROUNDS // 2]
    row["peak_memory_gib"] = (held + 3 * trained + saved + head) / 2**30
    row["activations_gib"] = saved / 2**30
    if device.type == "cuda":
        row["measured_forward_backward_peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return row


def _forward_and_backward(
    student: Any,
    teacher: Any,
    rollouts: Sequence[Rollout],
    retention: float,
    temperature: float,
    parameters: Sequence[Tensor],
) -> tuple[int, int]:
    """One forward and backward; bytes that autograd saved of it, and bytes that the head stage takes."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    seen: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.no_grad():
        teacher_head = head_of(teacher, hidden_states(teacher, rollouts))
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        student_head = head_of(student, hidden_states(student, rollouts))
        rows = torch.arange(max(1, int(retention * len(student_head.hidden))), device=student_head.hidden.device)
        student_head = replace(student_head, hidden=student_head.hidden[rows])
        teacher_head = replace(teacher_head, hidden=teacher_head.hidden[rows])
        loss = fused_divergence_loss(student_head, teacher_head, temperature=temperature)
        torch.autograd.grad(loss, list(parameters), allow_unused=True)
    vocabulary = min(len(student_head.weight), len(teacher_head.weight))
    widths = student_head.hidden.shape[1], teacher_head.hidden.shape[1]
    workspace = fused_workspace(len(rows), vocabulary, *widths, student_head.hidden.dtype, rows.device.type)
    kept = student_head.hidden.nbytes + teacher_head.hidden.nbytes
    return sum(seen.values()), workspace + 2 * kept + 4 * student_head.weight.numel()
