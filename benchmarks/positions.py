"""How much of a loss's forward the kept tokens do not depend on, by rule: what `training.scoring.trimmed` leaves out.

A forward over a micro-batch has so many positions: its rollouts, times the columns of prompt and completion, padding
included. Rollouts without a kept token are left out, and columns after the last one. Counted on rollouts of a real
pair; `python -m tipdistill.tasks smollm2` writes it first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tipdistill.provenance import environment
from tipdistill.rollout import generate
from tipdistill.score.models import score_rollouts
from tipdistill.select import resolve_rule, rule_fields, select
from tipdistill.tasks.instructions import as_chat, heldout_prompts
from tipdistill.training.scoring import trimmed
from tipdistill.types import Rollout

from . import measure

ROOT = Path("runs/smollm2")
MICRO_BATCH = 8
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
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = root / "models"
    if not (folder / "student").is_dir():
        raise ValueError(f"there is no {folder / 'student'}: run `python -m tipdistill.tasks smollm2` first.")
    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(folder / "student", padding_side="left")
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder / role).eval().requires_grad_(False)
        for role in ("student", "teacher")
    )
    asked = [as_chat(text) for text in heldout_prompts()[:prompts]]
    fields = list(dict.fromkeys(field for rule, *_ in ROWS for field in rule_fields(rule) or ()))
    entries: dict[str, dict[str, Any]] = {}
    for number, rollouts in enumerate(
        generate(student, tokenizer, asked, max_new_tokens=tokens, seed=1, batch_size=len(asked) // batches)
    ):
        scores = score_rollouts(student, teacher, rollouts, fields).scores
        lengths = torch.tensor([len(one.completion_ids) for one in rollouts])
        rollout = torch.repeat_interleave(lengths)
        for rule, retention, scope in ROWS:
            scope = scope or resolve_rule(rule).scope
            draw = torch.Generator().manual_seed(number)
            kept = select(scores, rule=rule, retention=retention, rollout=rollout, scope=scope, generator=draw).mask
            entry = entries.setdefault(
                f"{rule} {retention:.0%} {scope}", {"rule": rule, "retention": retention, "scope": scope, "counts": []}
            )
            entry["counts"].append(positions(rollouts, kept))
        say(f"batch {number + 1} of {batches}")
    for entry in entries.values():
        every, rows, columns = (sum(values) for values in zip(*entry.pop("counts"), strict=True))
        entry |= {"without_rollouts": rows / every, "without_columns_too": columns / every}
    return {
        "benchmark": "positions",
        "preset": "smollm2",
        **environment("cpu", threads),
        "settings": {"prompts": len(asked), "tokens": tokens, "batches": batches, "micro_batch": MICRO_BATCH},
        "rules": entries,
    }


def positions(rollouts: Sequence[Rollout], kept: torch.Tensor) -> tuple[int, int, int]:
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
    parts = kept.split([len(rollout.completion_ids) for rollout in rollouts])
    for first in range(0, len(rollouts), MICRO_BATCH):
        some, own = rollouts[first : first + MICRO_BATCH], parts[first : first + MICRO_BATCH]
        width = max(len(rollout.completion_ids) for rollout in some)
        prompt = max(len(rollout.prompt_ids) for rollout in some)
        masks = {
            "prompt_mask": torch.stack([torch.arange(prompt).flip(0) < len(rollout.prompt_ids) for rollout in some]),
            "completion_mask": torch.stack([torch.arange(width) < len(rollout.completion_ids) for rollout in some]),
        }
        mask = torch.stack([torch.nn.functional.pad(part, (0, width - len(part))) for part in own])
        rows = mask.any(1)
        if not rows.any():
            rows[0] = True
        left = {name: value[rows] for name, value in masks.items()}
        whole, _ = trimmed(left, left["completion_mask"])
        cut, _ = trimmed(masks, mask)
        totals[0] += len(some) * (prompt + width)
        totals[1] += sum(value.numel() for value in whole.values())
        totals[2] += sum(value.numel() for value in cut.values())
    return totals[0], totals[1], totals[2]


def main(argv: list[str] | None = None) -> int:
    """Count and write benchmarks/results/positions-smollm2.json.

    Raises:
        ValueError: no models there.
    """
    parser = measure.parser("positions", __doc__)
    parser.add_argument("--root", type=Path, help="of `python -m tipdistill.tasks smollm2` (default runs/smollm2)")
    parser.add_argument("--prompts", type=int, help="held-out ones, each answered once")
    parser.add_argument("--threads", type=int, help="of torch (default 2)")
    return measure.run("positions", run_positions, parser, argv)


if __name__ == "__main__":
    measure.end(main)
