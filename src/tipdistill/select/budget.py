"""How many tokens are kept, and which: exact counts, top-k with stable ties, draws without replacement."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor


def share_of(lengths: Tensor, retention: float) -> Tensor:
    """max(1, ⌊ρ·m⌋) tokens of each rollout of m tokens, 0 of an empty one (paper Eq. 8).

    ρ is read as the fraction that was written: ⌊0.29 · 100⌋ is 29, although 0.29 · 100 is 28.999… in floating point.

    Args:
        lengths: int64 [B], tokens of each rollout.
        retention: ρ in (0, 1].

    Returns:
        int64 [B], tokens.

    Example:
        >>> share_of(torch.tensor([0, 3, 10, 100]), 0.29).tolist()
        [0, 1, 2, 29]
    """
    # Eight digits: fractions that short lie further apart than a float's error, and lengths up to 10¹⁰ do not overflow.
    ratio = Fraction(retention).limit_denominator(10**8)
    return (lengths * ratio.numerator // ratio.denominator).clamp(min=1).minimum(lengths)


def top_k(score: Tensor, group: Tensor, counts: Tensor) -> Tensor:
    """Mask of the `counts[g]` highest scores of each group g; of equal scores the earlier token wins (paper Eq. 8).

    Args:
        score: float [N], finite.
        group: int64 [N] in [0, G), in any order.
        counts: int64 [G], tokens.

    Returns:
        bool [N].

    Example:
        >>> top_k(torch.tensor([1.0, 2.0, 2.0, 0.0]), torch.tensor([0, 0, 0, 1]), torch.tensor([1, 1])).tolist()
        [False, True, False, True]
    """
    return ranks(score, group) < counts[group]


def ranks(score: Tensor, group: Tensor) -> Tensor:
    """Place of each token among those of its group, 0 for the highest score; of equal scores the earlier token wins.

    Args:
        score: float [N], finite.
        group: int64 [N] in [0, G), in any order.

    Returns:
        int64 [N].

    Example:
        >>> ranks(torch.tensor([1.0, 2.0, 2.0, 0.0]), torch.tensor([0, 0, 0, 1])).tolist()
        [2, 0, 1, 0]
    """
    # + 0.0 makes −0.0 equal to 0.0 for every device's sort
    order = torch.argsort(score + 0.0, descending=True, stable=True)
    order = order[torch.argsort(group[order], stable=True)]
    sizes = torch.bincount(group)
    starts = sizes.cumsum(0) - sizes
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(score), device=score.device) - starts[group[order]]
    return rank


def race(weight: Tensor, generator: torch.Generator | None) -> Tensor:
    """Scores whose top k are k draws without replacement, each ∝ weight (an exponential race).

    Token i arrives after E_i / w_i with E_i ~ Exp(1); the first k to arrive are distributed as k successive draws, as
    with the Gumbel top-k trick. Tokens of weight 0 arrive after all others, in random order, so that a budget is met
    where too few have weight. Drawn on the generator's device: a CPU generator gives every device the same draw.

    Args:
        weight: float [N], ≥ 0.
        generator: source of randomness; None: torch's default for the device of `weight`.

    Returns:
        float64 [N].

    Example:
        >>> race(torch.tensor([1.0, 0.0]), torch.Generator().manual_seed(0)).argmax()
        tensor(0)
    """
    device = weight.device if generator is None else generator.device
    arrival = torch.empty(len(weight), dtype=torch.float64, device=device).exponential_(generator=generator)
    # the least float32 above 0 is 10⁻⁴⁵, so a weight of 0 is far behind it
    return -arrival.to(weight.device) / weight.double().clamp(min=1e-200)
