"""SmolLM2's pair, and micro-batches of its rollouts, for what is measured on it.

`python -m tipdistill.tasks smollm2` writes it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tipdistill.score.forward import last_hidden_states
from tipdistill.select import select
from tipdistill.types import Rollout, Selection, TokenScores

from . import measure

ROOT = Path("runs/smollm2")
MICRO_BATCH = 8


def read_pair(root: Path, threads: int) -> tuple[Any, Any, Any]:
    """Tokenizer, student and teacher; the teacher's parameters need no gradient.

    Args:
        root: of `python -m tipdistill.tasks smollm2`.
        threads: of torch.

    Raises:
        ValueError: no models there.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = root / "models"
    if not (folder / "student").is_dir():
        raise ValueError(f"there is no {folder / 'student'}: run `python -m tipdistill.tasks smollm2` first.")
    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(folder / "student", padding_side="left")
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder / role).eval() for role in ("student", "teacher"))
    return tokenizer, student, teacher.requires_grad_(False)


def parser(module: str, description: str) -> argparse.ArgumentParser:
    """Of a measurement on the pair: where it is, how many prompts, and threads."""
    options = measure.parser(module, description)
    options.add_argument("--root", type=Path, help="of `python -m tipdistill.tasks smollm2` (default runs/smollm2)")
    options.add_argument("--prompts", type=int, help="each answered once")
    options.add_argument("--threads", type=int, help="of torch (default 2)")
    return options


def chosen(
    scores: TokenScores, rollouts: Sequence[Rollout], rule: str, retention: float, scope: str, seed: int
) -> Selection:
    """What a rule keeps of the tokens of some rollouts."""
    rollout = torch.repeat_interleave(torch.tensor([len(one.completion_ids) for one in rollouts]))
    draw = torch.Generator().manual_seed(seed)
    return select(scores, rule=rule, retention=retention, rollout=rollout, scope=scope, generator=draw)


def micro_batches(rollouts: Sequence[Rollout], weight: Tensor) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Tokens of eight rollouts at a time, padded as a trainer has them, and the weights of their completions [B, T].

    Args:
        rollouts: of a generation batch.
        weight: [N], of their tokens, or bool.

    Example:
        >>> rollouts = [Rollout(0, "", (1, 2), (3, 4, 5), True), Rollout(1, "", (1,), (2,), True)]
        >>> ((tokens, weight),) = micro_batches(rollouts, torch.tensor([True, False, False, True]))
        >>> tokens["prompt_ids"].tolist(), weight.tolist()
        ([[1, 2], [0, 1]], [[True, False, False], [True, False, False]])
    """
    parts = weight.split([len(rollout.completion_ids) for rollout in rollouts])
    for first in range(0, len(rollouts), MICRO_BATCH):
        some, own = rollouts[first : first + MICRO_BATCH], parts[first : first + MICRO_BATCH]
        width = max(len(rollout.completion_ids) for rollout in some)
        prompt = max(len(rollout.prompt_ids) for rollout in some)
        tokens: dict[str, list[Tensor]] = {}
        for rollout in some:
            ids, written = torch.tensor(rollout.prompt_ids), torch.tensor(rollout.completion_ids)
            left, right = (prompt - len(ids), 0), (0, width - len(written))
            for name, values, gap in (
                ("prompt_ids", ids, left),
                ("prompt_mask", torch.ones_like(ids), left),
                ("completion_ids", written, right),
                ("completion_mask", torch.ones_like(written), right),
            ):
                tokens.setdefault(name, []).append(pad(values, gap))
        batch = {name: torch.stack(values) for name, values in tokens.items()}
        yield batch, torch.stack([pad(part, (0, width - len(part))) for part in own])


def whole(tokens: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, P + T] of prompts with their completions."""
    ids, mask = (torch.cat([tokens[f"prompt_{name}"], tokens[f"completion_{name}"]], 1) for name in ("ids", "mask"))
    return ids, mask


def completion_states(model: Any, tokens: dict[str, Tensor]) -> Tensor:
    """What the lm_head projects at each completion token, [B, T, H]."""
    return last_hidden_states(model, *whole(tokens))[:, tokens["prompt_ids"].shape[1] - 1 : -1]
