"""Memory and time of a step on machines that are not at hand, from the models' configurations alone."""

from __future__ import annotations

from typing import Any

import torch

from .machines import MACHINES, Machine
from .memory import Setup, memory, peak
from .models import read_config, sizes
from .replay import Compute
from .report import as_text, plan
from .time import step_time

__all__ = ["MACHINES", "Machine", "Setup", "as_text", "memory", "peak", "plan", "read_config", "setup_of", "step_time"]


def setup_of(
    student: Any,
    teacher: Any,
    *,
    student_dtype: torch.dtype = torch.bfloat16,
    teacher_dtype: torch.dtype = torch.bfloat16,
    bf16: bool = False,
    lora: tuple[int, tuple[str, ...] | str | None] | None = None,
    **settings: Any,
) -> Setup:
    """A `Setup` of two models by name or configuration.

    Args:
        student, teacher: a directory, a built-in name, a hub id, or a configuration.
        student_dtype, teacher_dtype: of the weights as they are loaded.
        bf16: mixed precision, as in TrainingArguments.
        lora: (rank, target modules).
        settings: fields of `Setup`.

    Example:
        >>> setup_of("Qwen/Qwen3-4B", "Qwen/Qwen3-8B", retention=0.5).kept
        4096
    """
    configs = [read_config(model) if isinstance(model, str) else model for model in (student, teacher)]
    texts = [config.to_json_string(use_diff=False) for config in configs]
    return Setup(
        student=Compute(texts[0], student_dtype, bf16, lora),
        teacher=Compute(texts[1], teacher_dtype, bf16),
        student_sizes=sizes(configs[0]),
        teacher_sizes=sizes(configs[1]),
        **settings,
    )
