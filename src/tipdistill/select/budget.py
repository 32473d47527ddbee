"""How many tokens are kept, and which: exact counts, top-k with stable ties, draws without replacement."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor


def share_of(lengths: Tensor, retention: float) -> Tensor:
    """max(1, ⌊ρ·m⌋) tokens of each rollout of m tokens, 0 of an empty one (paper Eq. 8).

    ρ is read as the decimal that was written: ⌊0.29 · 100⌋ is 29, although 0.29 · 100 is 28.999… in floating point.

    Args:
        lengths: int64 [R], tokens of each rollout.
        retention: ρ in (0, 1].

    Example:
        >>> share_of(torch.tensor([0, 3, 10, 100]), 0.29).tolist()
        [0, 1, 2, 29]
    """
    ratio = Fraction(retention).limit_denominator(1_000_000)
    return (lengths * ratio.numerator // ratio.denominator).clamp(min=1).minimum(lengths)


def top_k(score: Tensor, group: Tensor, counts: Tensor) -> Tensor:
    """Mask of the `counts[g]` highest scores of each group g; of equal scores the earlier token wins.

    Args:
        score: float [N].
        group: int64 [N] in [0, G).
        counts: int64 [G].

    Example:
        >>> top_k(torch.tensor([1.0, 2.0, 2.0, 0.0]), torch.tensor([0, 0, 0, 1]), torch.tensor([1, 1])).tolist()
        [False, True, False, True]
    """
    order = torch.argsort(score, descending=True, stable=True)
    order = order[torch.argsort(group[order], stable=True)]
    sizes = torch.bincount(group, minlength=len(counts))
    starts = sizes.cumsum(0) - sizes
    rank = torch.arange(len(score), device=score.device) - starts[group[order]]
    mask = torch.zeros(len(score), dtype=torch.bool, device=score.device)
    mask[order] = rank < counts[group[order]]
    return mask


def race(weight: Tensor, generator: torch.Generator | None) -> Tensor:
    """Scores whose top k are k draws without replacement, each ∝ weight (an exponential race).

    Token i arrives after E_i / w_i with E_i ~ Exp(1); the first k to arrive are distributed as k successive draws.
    Tokens of weight 0 arrive after all others, in random order, so that a budget is met where too few have weight.

    Args:
        weight: float [N], ≥ 0.
        generator: source of randomness, on the device of `weight`; None: torch's default.

    Example:
        >>> race(torch.tensor([1.0, 0.0]), torch.Generator().manual_seed(0)).argmax()
        tensor(0)
    """
    arrival = torch.empty(len(weight), dtype=torch.float64, device=weight.device).exponential_(generator=generator)
    return -arrival / weight.double().clamp(min=1e-200)
