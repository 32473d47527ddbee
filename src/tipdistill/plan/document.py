"""The tables of docs/scaling.md: the paper's pairs and a teacher of 671B parameters, on 1 to 1,024 GPUs.

<!-- plan:qwen3-8b-4b -->
(the tables)
<!-- /plan -->
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from . import setup_of
from .memory import Setup, memory, peak
from .report import _table, changes, fits, plan, retention_table
from .time import MACHINES, step_time

GPUS = (1, 8, 64, 1024)
MACHINE = MACHINES["h200"]
# Rollouts of a step: 8 prompts × 16 (the paper's Table 9), and one per GPU where there are more GPUs.
ROLLOUTS = 128
_GIB, _GB = 2**30, 1e9
_BLOCK = re.compile(r"(<!-- plan:([\w.-]+) -->\n).*?(<!-- /plan -->)", re.S)

# name: (student, teacher, how more than one GPU shares them, GPUs that share vLLM's copy)
PAIRS = {
    "qwen3-8b-4b": ("Qwen/Qwen3-4B", "Qwen/Qwen3-8B", "zero2", 1),
    "llama-70b-8b": ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.3-70B-Instruct", "zero3", 1),
    "qwen2.5-14b-1.5b": ("Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-14B-Instruct", "zero2", 1),
    "moe-671b-8b": ("Qwen/Qwen3-8B", "moe-671b-qwen3-vocabulary", "zero3", 1),
    "moe-671b-32b": ("Qwen/Qwen3-32B", "moe-671b-qwen3-vocabulary", "zero3", 4),
}
# Peak memory in GB at 100, 50 and 10 % of the tokens (paper, Tables 3 and 4), and the GPUs it was trained on.
PAPER = {
    "qwen3-8b-4b": (72.0, 38.1, 35.3, 8),
    "llama-70b-8b": (41.6, 32.1, 31.9, 8),
    "qwen2.5-14b-1.5b": (35.8, 19.7, 14.9, 4),
}


def scenario(name: str, gpus: int) -> Setup:
    """A pair as its packaged recipe has it (those of 671B as the Llama pair), on H200s.

    Example:
        >>> scenario("qwen3-8b-4b", 8).accumulation
        16
    """
    student, teacher, sharding, parallel = PAIRS[name]
    alone = gpus == 1
    return setup_of(
        student,
        teacher,
        student_dtype=torch.float32,
        teacher_dtype=torch.bfloat16,
        bf16=True,
        gpus=gpus,
        memory=int(MACHINE.memory_gib * _GIB),
        sharding="none" if alone else sharding,
        teacher_place="sharded" if sharding == "zero3" and not alone else "resident",
        accumulation=max(1, ROLLOUTS // gpus),
        optimizer="adamw_torch",
        engine="colocate",
        vllm_sleeps=True,
        vllm_parallel=1 if alone else parallel,
    )


def scale_table(name: str) -> str:
    """One pair on each number of GPUs: memory, time, the bottleneck, and what Soft-OR at 0.1 changes."""
    rows = []
    for gpus in GPUS:
        setup = scenario(name, gpus)
        phase, taken = peak(memory(setup))
        enough = fits(setup, taken)
        seconds = step_time(setup, MACHINE)
        total = sum(seconds.values())
        largest = sorted(seconds, key=seconds.__getitem__, reverse=True)[:2]
        rows.append(
            [
                f"{gpus:,}",
                f"{setup.rollouts * gpus:,}",
                f"{taken / _GIB:.0f} ({phase})",
                "yes" if enough else "no: " + "; ".join(changes(setup)),
                f"{total:.0f}",
                ", ".join(f"{part} {seconds[part] / total:.0%}" for part in largest),
                _saving(setup, batch_normalization=True),
                _saving(setup, batch_normalization=False),
            ]
        )
    header = ["GPUs", "rollouts", "peak (GiB)", "fits", "step (s)", "most of it", "Soft-OR 0.1, batch", "micro_batch"]
    return _table(header, rows)


def _saving(setup: Setup, batch_normalization: bool) -> str:
    """Change of the time without rollout against all tokens."""
    every, some = (
        step_time(
            replace(setup, rule=rule, retention=retention, batch_normalization=batch_normalization),
            MACHINE,
        )
        for rule, retention in (("all", 1.0), ("soft_or", 0.1))
    )
    before, after = (sum(parts.values()) - parts["rollout"] for parts in (every, some))
    return f"{after / before - 1:+.1%}"


def memory_beside_paper() -> str:
    """The plan's peaks outside the rollout beside the paper's, in GB (10⁹ bytes), on as many GPUs."""
    rows = []
    for name, (*published, gpus) in PAPER.items():
        ours, phases = [], []
        for retention in (1.0, 0.5, 0.1):
            setup = scenario(name, gpus)
            setup = replace(setup, rule="all" if retention == 1 else "soft_or", retention=retention)
            found = memory(setup)
            del found["rollout"]
            phase, taken = peak(found)
            ours.append(f"{taken / _GB:.1f}")
            phases.append(phase)
        rows.append([name, str(gpus), *(f"{value:.1f}" for value in published), *ours, phases[1]])
    header = ["pair", "GPUs", "paper: 100 %", "50 %", "10 %", "plan: all tokens", "Soft-OR 0.5", "0.1", "in the phase"]
    return _table(header, rows)


def retention_of(name: str, gpus: int = 64) -> str:
    """What selection buys one pair, at each retention."""
    return retention_table(plan(scenario(name, gpus), MACHINE, (1.0, 0.5, 0.2, 0.1)))


BLOCKS: dict[str, Callable[[], str]] = {
    **{name: partial(scale_table, name) for name in PAIRS},
    "paper": memory_beside_paper,
    "retention": partial(retention_of, "qwen3-8b-4b", 8),
}


def rendered(text: str, only: str | None = None) -> str:
    """The text of a document with its tables as the plan gives them now.

    Args:
        text: Markdown.
        only: the one block to make anew; None: all.

    Raises:
        ValueError: a marker names no table.

    Example:
        >>> rendered("no marker")
        'no marker'
    """

    def block(match: re.Match[str]) -> str:
        name = match[2]
        if name not in BLOCKS:
            raise ValueError(f"there is no plan {name!r}; there are {', '.join(BLOCKS)}.")
        return match[0] if only not in (None, name) else f"{match[1]}{BLOCKS[name]()}\n{match[3]}"

    return _BLOCK.sub(block, text)


def update(document: Path) -> bool:
    """Rewrite the marked tables of a document; whether anything changed."""
    before = document.read_text(encoding="utf-8")
    after = rendered(before)
    if after != before:
        partial_file = document.with_name(f".{document.name}.partial")
        partial_file.write_text(after, encoding="utf-8")
        partial_file.replace(document)
    return after != before
