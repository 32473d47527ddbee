"""One pure function per rule: TokenScores → a score per token.

The higher a score, the sooner a token is kept. registry.py gives each a name and says what is done with it; contrib.py
holds the rules that we offer and have not measured. Rules that scale by the tokens given take `Scales`: see there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import TokenScores
from .normalize import Scales, clipped_entropy, min_max

LOG_FLOOR = 1e-4  # nats


def uniform(scores: TokenScores) -> Tensor:
    """The same score for every token (controls)."""
    _, some = next(scores.present())
    return torch.ones_like(some)


def entropy(scores: TokenScores) -> Tensor:
    """h = H(P_S) / log V (paper Eq. 2, §6 with δ̂ = 0)."""
    # rounding can leave a certain token just below 0, and nothing is drawn with a negative probability
    return scores.require("entropy_norm").clamp(min=0)


def soft_or(scores: TokenScores, scales: Scales | None = None) -> Tensor:
    """ĥ + δ̂ − ĥ·δ̂ with δ = KL(P_S ‖ P_T) (paper Eq. 7)."""
    return either(
        clipped_entropy(scores.require("entropy_norm"), scales), min_max(scores.require("reverse_kl"), scales)
    )


def soft_or_log(scores: TokenScores, scales: Scales | None = None) -> Tensor:
    """Soft-OR with δ̂ = min-max of log(δ + 10⁻⁴): small divergences keep their order beside a few large ones (ours)."""
    delta = min_max((scores.require("reverse_kl").clamp(min=0) + LOG_FLOOR).log(), scales)
    return either(clipped_entropy(scores.require("entropy_norm"), scales), delta)


def q3(scores: TokenScores, scales: Scales | None = None) -> Tensor:
    """KL(P_T ‖ P_S) · (1 − ĥ): confident and wrong; the *forward* KL ranks (paper §7.3)."""
    return scores.require("forward_kl") * (1 - clipped_entropy(scores.require("entropy_norm"), scales))


def divergence(scores: TokenScores) -> Tensor:
    """δ = KL(P_S ‖ P_T) (paper B.2)."""
    return scores.require("reverse_kl")


def gradient_norm(scores: TokenScores) -> Tensor:
    """‖P_S ∘ (log P_S/P_T − KL)‖₂, the norm of the reverse-KL gradient at the logits (ours)."""
    return scores.require("gradient_norm")


def either(h: Tensor, delta: Tensor) -> Tensor:
    """h + δ − h·δ; in this form exactly 1 where either is 1, so that rounding does not order the saturated tokens."""
    return h + delta * (1 - h)
