"""How much of a loss's forward the kept tokens do not depend on, by rule: what `training.scoring.trimmed` leaves out.

A forward over a micro-batch has so many positions: its rollouts, times the columns of prompt and completion, padding
included. Rollouts without a kept token are left out, and columns after the last one. Counted on rollouts of a real
pair, and timed: the student's forward, the loss of the kept tokens and the backward, over all positions and over those
that are left, one after the other. `python -m tipdistill.tasks smollm2` writes the pair first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tipdistill.loss import fused_divergence_loss
from tipdistill.provenance import environment
from tipdistill.rollout import generate
from tipdistill.score.models import head_of, score_rollouts
from tipdistill.select import resolve_rule, rule_fields
from tipdistill.tasks.instructions import as_chat, heldout_prompts
from tipdistill.training.scoring import trimmed
from tipdistill.types import Rollout

from . import measure
from .smollm2 import MICRO_BATCH, ROOT, chosen, completion_states, micro_batches, parser, read_pair

# rule, retention, scope; None: the rule's own
ROWS: tuple[tuple[str, float, str | None], ...] = (
    *(("soft_or", retention, None) for retention in (0.5, 0.2, 0.1)),
    ("q3", 0.1, None),
    ("random", 0.1, None),
    *(("soft_or", retention, "batch") for retention in (0.1, 0.02)),
    *(("gradient_norm_sampling", retention, "batch") for retention in (0.5, 0.1, 0.05, 0.02)),
    *(("random", retention, "batch") for retention in (0.1, 0.02)),
)


def run_positions(
    root: Path = ROOT,
    prompts: int = 64,
    tokens: int = 64,
    batches: int = 4,
    threads: int = 2,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Sample and score a student, and count by rule what a loss of micro-batches of eight would go over.

    Args:
        root: of `python -m tipdistill.tasks smollm2`.
        prompts: held-out ones, each answered once.
        tokens: of an answer, at most.
        batches: steps; each has prompts / batches rollouts.
        threads: of torch.
        say: takes a line of progress.

    Raises:
        ValueError: no models there.
    """
    tokenizer, student, teacher = read_pair(root, threads)
    asked = [as_chat(text) for text in heldout_prompts()[:prompts]]
    fields = list(dict.fromkeys(field for rule, *_ in ROWS for field in rule_fields(rule) or ()))
    entries: dict[str, dict[str, Any]] = {}
    for number, rollouts in enumerate(
        generate(student, tokenizer, asked, max_new_tokens=tokens, seed=1, batch_size=len(asked) // batches)
    ):
        scores = score_rollouts(student, teacher, rollouts, fields).scores
        if not number:  # the first forward and backward allocate what the others find there
            seconds(student, teacher, *next(micro_batches(rollouts, torch.ones(len(scores), dtype=torch.bool))))
        for rule, retention, scope in ROWS:
            scope = scope or resolve_rule(rule).scope
            kept = chosen(scores, rollouts, rule, retention, scope, seed=number).mask
            entry = entries.setdefault(
                f"{rule} {retention:.0%} {scope}",
                {"rule": rule, "retention": retention, "scope": scope, "counts": [], "timed": []},
            )
            entry["counts"].append(positions(rollouts, kept))
            entry["timed"] += [seconds(student, teacher, *batch) for batch in micro_batches(rollouts, kept)]
        say(f"batch {number + 1} of {batches}")
    for entry in entries.values():
        every, rows, columns = (sum(values) for values in zip(*entry.pop("counts"), strict=True))
        whole, cut = (sum(values) for values in zip(*entry.pop("timed"), strict=True))
        entry |= {"without_rollouts": rows / every, "without_columns_too": columns / every, "time": cut / whole}
    return {
        "benchmark": "positions",
        "preset": "smollm2",
        **environment("cpu", threads),
        "settings": {"prompts": len(asked), "tokens": tokens, "batches": batches, "micro_batch": MICRO_BATCH},
        "rules": entries,
    }


def positions(rollouts: Sequence[Rollout], kept: Tensor) -> tuple[int, int, int]:
    """Positions of the forwards of a step: of all rollouts, of those with a kept token, and up to the last of these.

    Args:
        rollouts: of a generation batch.
        kept: bool [N], their tokens.

    Example:
        >>> rollouts = [Rollout(0, "", (1, 2), (3, 4, 5), True), Rollout(1, "", (1,), (2,), True)]
        >>> positions(rollouts, torch.tensor([True, False, False, False]))
        (10, 5, 3)
    """
    totals = [0, 0, 0]
    for tokens, mask in micro_batches(rollouts, kept):
        rows = mask.any(1)
        if not rows.any():
            rows[0] = True
        left = {name: value[rows] for name, value in tokens.items()}
        for index, (batch, asked) in enumerate(
            ((tokens, tokens["completion_mask"]), (left, left["completion_mask"]), (tokens, mask))
        ):
            cut, _ = trimmed(batch, asked)
            totals[index] += cut["prompt_mask"].numel() + cut["completion_mask"].numel()
    return totals[0], totals[1], totals[2]


def seconds(student: Any, teacher: Any, tokens: dict[str, Tensor], kept: Tensor) -> tuple[float, float]:
    """Time of the student's forward, the loss and the backward, over all positions and over those that are left.

    Args:
        student, teacher: the teacher's forward, which has scored before, is not timed.
        tokens, kept: of `micro_batches`.
    """

    with torch.no_grad():
        of_teacher = head_of(teacher, completion_states(teacher, tokens)[kept])
    taken = []
    for batch, asked in ((tokens, kept), trimmed(tokens, kept)):
        student.zero_grad()
        began = time.perf_counter()
        fused_divergence_loss(head_of(student, completion_states(student, batch)[asked]), of_teacher).backward()
        taken.append(time.perf_counter() - began)
    return taken[0], taken[1]


def main(argv: list[str] | None = None) -> int:
    """Count and write benchmarks/results/positions-smollm2.json.

    Raises:
        ValueError: no models there.
    """
    return measure.run("positions", run_positions, parser("positions", __doc__), argv)


if __name__ == "__main__":
    measure.end(main)
