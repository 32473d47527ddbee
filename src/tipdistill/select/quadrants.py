"""The four quadrants of tokens by entropy and divergence (paper Table 1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..types import TokenScores
from .normalize import clipped_entropy

ENTROPY_THRESHOLD = 0.2
DIVERGENCE_THRESHOLD = 0.1
NAMES = {1: "uncertain, wrong", 2: "uncertain, agreed", 3: "confident and wrong", 4: "solved"}


@torch.no_grad()
def quadrants(
    scores: TokenScores,
    entropy_threshold: float = ENTROPY_THRESHOLD,
    divergence_threshold: float = DIVERGENCE_THRESHOLD,
) -> Tensor:
    """The quadrant of every token (paper Table 1).

    Q1: ĥ ≥ a, δ ≥ b · Q2: ĥ ≥ a, δ < b · Q3: ĥ < a, δ ≥ b · Q4: ĥ < a, δ < b, with ĥ the entropy clipped at its 98th
    percentile and min-max normalised over the tokens given, as Soft-OR reads it, and δ the reverse KL. The paper gives
    no thresholds; these are a choice, made where medians are useless because most tokens are solved.

    Args:
        scores: statistics with entropy_norm (or entropy) and reverse_kl (nats), float [N].
        entropy_threshold: a, in [0, 1].
        divergence_threshold: b, in nats.

    Returns:
        int8 [N], in 1..4.

    Raises:
        ValueError: a statistic is missing or NaN, or a threshold is out of range.

    Example:
        >>> scores = TokenScores(entropy_norm=torch.tensor([1.0, 1.0, 0.0, 0.0]),
        ...                      reverse_kl=torch.tensor([1.0, 0.0, 1.0, 0.0]))
        >>> quadrants(scores).tolist()
        [1, 2, 3, 4]
    """
    if not 0 <= entropy_threshold <= 1:
        raise ValueError(f"entropy_threshold must be in [0, 1], got {entropy_threshold}.")
    if not (math.isfinite(divergence_threshold) and divergence_threshold >= 0):
        raise ValueError(f"divergence_threshold must be a number of nats ≥ 0, got {divergence_threshold}.")
    # the normaliser drops out of ĥ, so the plain entropy serves where the normalised one was not computed
    entropy = scores.require("entropy") if scores.entropy_norm is None else scores.entropy_norm
    delta = scores.require("reverse_kl")
    if entropy.shape != delta.shape or delta.ndim != 1:
        raise ValueError(f"entropy and reverse_kl must be [N], got {list(entropy.shape)} and {list(delta.shape)}.")
    if len(delta) == 0:
        return torch.zeros(0, dtype=torch.int8, device=delta.device)
    if bool((entropy + delta).isnan().any()):
        raise ValueError("an entropy or a reverse_kl is NaN, so its token has no quadrant: the logits were not finite.")
    uncertain, wrong = clipped_entropy(entropy.float()) >= entropy_threshold, delta >= divergence_threshold
    return (4 - 2 * uncertain.to(torch.int8) - wrong.to(torch.int8)).to(torch.int8)


def quadrant_shares(quadrant: Tensor, weight: Tensor | None = None) -> dict[int, float]:
    """Share of the tokens, or of what they weigh, in each quadrant: Σ w·1[quadrant = q] / Σ w.

    Args:
        quadrant: int8 [N] in 1..4, N ≥ 1, see `quadrants`.
        weight: float [N] ≥ 0, for example the reverse KL; None: tokens count 1 each.

    Returns:
        Quadrant → share; all 0 where nothing weighs anything.

    Raises:
        ValueError: no token, or weights of another shape.

    Example:
        >>> quadrant = torch.tensor([1, 4, 4, 4], dtype=torch.int8)
        >>> quadrant_shares(quadrant)
        {1: 0.25, 2: 0.0, 3: 0.0, 4: 0.75}
        >>> quadrant_shares(quadrant, torch.tensor([3.0, 1.0, 0.0, 0.0]))
        {1: 0.75, 2: 0.0, 3: 0.0, 4: 0.25}
    """
    if len(quadrant) == 0:
        raise ValueError("there is no token to take shares of.")
    if weight is not None and weight.shape != quadrant.shape:
        raise ValueError(f"weight must be {list(quadrant.shape)} like the quadrants, got {list(weight.shape)}.")
    counted = torch.ones_like(quadrant, dtype=torch.float64) if weight is None else weight.detach().double()
    total = counted.sum().item() or 1.0
    return {number: counted[quadrant == number].sum().item() / total for number in NAMES}
