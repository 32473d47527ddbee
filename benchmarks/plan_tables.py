"""What `tipdistill plan` says of the paper's pairs and of a teacher of 671B parameters, on 1 to 1,024 GPUs, as tables.

<!-- plan:qwen3-8b-4b -->
(the tables)
<!-- /plan -->
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch

from tipdistill.files import write_text
from tipdistill.plan import setup_of
from tipdistill.plan.beside import best_split
from tipdistill.plan.memory import Setup, memory, peak
from tipdistill.plan.report import changes, fits, plan, retention_table
from tipdistill.plan.time import MACHINES, step_time
from tipdistill.text import check_known, markdown_table, replace_blocks

from . import measure

DOCUMENTS = ("docs/scaling.md", "benchmarks/results/plan.md")
GPUS = (1, 8, 64, 1024)
MACHINE = MACHINES["h200"]
# Rollouts of a step: 8 prompts × 16 (the paper's Table 9), and one per GPU where there are more GPUs.
ROLLOUTS = 128
_GIB, _GB = 2**30, 1e9

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
        normalization="running",
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
                _saving(setup, "batch"),
                _saving(setup, "running"),
            ]
        )
    header = ["GPUs", "rollouts", "peak (GiB)", "fits", "step (s)", "most of it", "Soft-OR 0.1, batch", "running"]
    return markdown_table(header, rows)


def _saving(setup: Setup, normalization: str) -> str:
    """Change of the time without rollout against all tokens."""
    every, some = (
        step_time(
            replace(setup, rule=rule, retention=retention, normalization=normalization),
            MACHINE,
        )
        for rule, retention in (("all", 1.0), ("soft_or", 0.1))
    )
    before, after = (sum(parts.values()) - parts["rollout"] for parts in (every, some))
    return f"{after / before - 1:+.1%}"


def ahead_table() -> str:
    """The paper's pairs with rollouts by vLLM on the training's GPUs, and by a server on some of them."""
    rows = []
    for name in PAPER:
        for gpus in GPUS[1:]:
            setup = scenario(name, gpus)
            together, split = sum(step_time(setup, MACHINE).values()), best_split(setup, MACHINE)
            assert split is not None, "several GPUs can be split"
            ahead = max(split.rollout, split.training)
            rows.append(
                [
                    name,
                    f"{gpus:,}",
                    f"{together:.0f}",
                    f"{split.writers:,}",
                    f"{split.rollout + split.training:.0f}",
                    f"{ahead:.0f}",
                    f"{ahead / together - 1:+.0%}",
                ]
            )
    header = ["pair", "GPUs", "colocate (s)", "writers", "server, in turn (s)", "ahead (s)", "ahead against colocate"]
    return markdown_table(header, rows)


def memory_beside_paper() -> str:
    """The plan's peaks outside the rollout beside the paper's, in GB (10⁹ bytes), on as many GPUs."""
    rows = []
    for name, (*published, gpus) in PAPER.items():
        ours, phases = [], []
        for retention in (1.0, 0.5, 0.1):
            setup = scenario(name, gpus)
            setup = replace(setup, rule="all" if retention == 1 else "soft_or", retention=retention)
            by_phase = memory(setup)
            del by_phase["rollout"]
            phase, taken = peak(by_phase)
            ours.append(f"{taken / _GB:.1f}")
            phases.append(phase)
        rows.append([name, str(gpus), *(f"{value:.1f}" for value in published), *ours, phases[1]])
    header = ["pair", "GPUs", "paper: 100 %", "50 %", "10 %", "plan: all tokens", "Soft-OR 0.5", "0.1", "in the phase"]
    return markdown_table(header, rows)


def retention_of(name: str, gpus: int = 64) -> str:
    """What selection buys one pair, at each retention."""
    return retention_table(plan(scenario(name, gpus), MACHINE, (1.0, 0.5, 0.2, 0.1)))


# Each takes a minute of a core, and stands in two documents at most.
BLOCKS: dict[str, Callable[[], str]] = {
    **{name: cache(partial(scale_table, name)) for name in PAIRS},
    "paper": cache(memory_beside_paper),
    "ahead": cache(ahead_table),
    "retention": cache(partial(retention_of, "qwen3-8b-4b", 8)),
}


def rendered(text: str) -> str:
    """The text of a document with its tables as the plan gives them now.

    Args:
        text: Markdown.

    Raises:
        ValueError: a mark names no table; the nearest is given.

    Example:
        >>> rendered("no mark")
        'no mark'
    """

    def block(name: str) -> str:
        check_known("plan", name, BLOCKS)
        return BLOCKS[name]()

    return replace_blocks(text, "plan", block)


def main(argv: list[str] | None = None) -> int:
    """Rewrite the marked tables of documents.

    Raises:
        ValueError: a mark names no table; the nearest is given.
    """
    parser = measure.parser("plan_tables", __doc__)
    parser.add_argument("documents", nargs="*", help=f"Markdown files (default {', '.join(DOCUMENTS)})")
    options = parser.parse_args(argv)
    for name in options.documents or [measure.ROOT / document for document in DOCUMENTS]:
        document = Path(name)
        before = document.read_text(encoding="utf-8")
        after = rendered(before)
        if after != before:
            write_text(document, after)
        print(f"{document}: {'rewritten' if after != before else 'as the plan has it'}")
    return 0


if __name__ == "__main__":
    measure.end(main)
