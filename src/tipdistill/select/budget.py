"""How many tokens are kept, and which: exact counts, top-k with stable ties, draws without replacement."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor

LEAST = 1e-200  # in the place of a weight of 0: far behind the least float32 above it, 10⁻⁴⁵


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
    return ranks(score, group, len(counts)) < counts[group]


def ranks(score: Tensor, group: Tensor, groups: int) -> Tensor:
    """Place of each token among those of its group, 0 for the highest score; of equal scores the earlier token wins.

    Args:
        score: float [N], finite.
        group: int64 [N] in [0, G), in any order.
        groups: G; to look it up, the host would wait for a GPU.

    Returns:
        int64 [N].

    Example:
        >>> ranks(torch.tensor([1.0, 2.0, 2.0, 0.0]), torch.tensor([0, 0, 0, 1]), 2).tolist()
        [2, 0, 1, 0]
    """
    # + 0.0 makes −0.0 equal to 0.0 for every device's sort
    order = torch.argsort(score + 0.0, descending=True, stable=True)
    order = order[torch.argsort(group[order], stable=True)]
    sizes = torch.zeros(groups, dtype=torch.int64, device=group.device).index_add_(0, group, torch.ones_like(group))
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
    return _arriving(lambda time: time.exponential_(generator=generator), weight, generator)


def priority(weight: Tensor, generator: torch.Generator | None) -> Tensor:
    """Scores whose top k are a priority sample: −u_i / w_i with u_i uniform on (0, 1].

    Given the k + 1st, −r, token i is among the first k with probability min(1, w_i · r), so that `inclusion` knows what
    to divide by; of all samples of k tokens with known probabilities none has a smaller variance, up to one token more
    (Duffield, Lund and Thorup, J. ACM 54(6), 2007). Tokens of weight 0 come last, in random order.

    Args:
        weight: float [N], ≥ 0.
        generator: source of randomness; None: torch's default for the device of `weight`.

    Returns:
        float64 [N].

    Example:
        >>> priority(torch.tensor([1.0, 0.0]), torch.Generator().manual_seed(0)).argmax()
        tensor(0)
    """
    return _arriving(lambda time: 1 - time.uniform_(generator=generator), weight, generator)


def _arriving(times: Callable[[Tensor], Tensor], weight: Tensor, generator: torch.Generator | None) -> Tensor:
    """−t_i / w_i with the times that `times` draws into an empty float64 [N], on the generator's device."""
    device = weight.device if generator is None else generator.device
    drawn = times(torch.empty(len(weight), dtype=torch.float64, device=device))
    return -drawn.to(weight.device) / weight.double().clamp(min=LEAST)


def inclusion(weight: Tensor, order: Tensor, group: Tensor, counts: Tensor) -> Tensor:
    """Probability with which each token of a priority sample is kept, given the first that is not.

    π_i = min(1, w_i · r), −r the `counts[g]` + 1st highest of `order` in the token's group g; 1 where all are kept.

    Args:
        weight: float [N], ≥ 0, what `priority` was given.
        order: float64 [N], what it returned.
        group: int64 [N] in [0, G), in any order.
        counts: int64 [G], tokens kept of each group.

    Returns:
        float64 [N]; that of a dropped token says nothing.

    Example:
        >>> weight, order = torch.tensor([4.0, 1.0, 1.0]), torch.tensor([-0.1, -0.2, -0.5], dtype=torch.float64)
        >>> inclusion(weight, order, torch.zeros(3, dtype=torch.int64), torch.tensor([2])).tolist()
        [1.0, 0.5, 0.5]
    """
    first_out = ranks(order, group, len(counts)) == counts[group]
    bound = torch.full((len(counts),), math.inf, dtype=torch.float64, device=order.device)
    bound[group[first_out]] = -order[first_out]
    return (weight.double().clamp(min=LEAST) * bound[group]).clamp(max=1)


def reaching(weight: Tensor, threshold: float) -> Tensor:
    """Probability with which `priority` places each token at `threshold` or above: min(1, −w_i · threshold).

    Args:
        weight: float [N], ≥ 0, what `priority` was given.
        threshold: negative, from other tokens, so that it says nothing of what was drawn here.

    Returns:
        float64 [N].

    Example:
        >>> reaching(torch.tensor([4.0, 1.0]), -0.5).tolist()
        [1.0, 0.5]
    """
    return (weight.double().clamp(min=LEAST) * -threshold).clamp(max=1)
