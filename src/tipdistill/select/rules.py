"""One pure function per rule: TokenScores → a score per token.

The higher a score, the sooner a token is kept; the score of a weight rule is the token's weight in the loss. A function
that reads where tokens stand in their rollouts takes their `Order` beside the scores.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..types import TokenScores
from .normalize import between_percentiles, clipped_entropy, min_max
from .order import Order

LOG_FLOOR = 1e-4  # nats
REJECTED = 0.01  # weight of a token whose proposal the teacher does not accept
# Ours; the sources' formulas are known here without these constants.
MIN_OVERLAP, PENALTY, LEAST_WEIGHT = 0.5, 0.1, 0.05


def uniform(scores: TokenScores) -> Tensor:
    """The same score for every token (controls)."""
    _, some = next(scores.present())
    return torch.ones_like(some)


def entropy(scores: TokenScores) -> Tensor:
    """h = H(P_S) / log V (paper Eq. 2, §6 with δ̂ = 0)."""
    # rounding can leave a certain token just below 0, and nothing is drawn with a negative probability
    return scores.require("entropy_norm").clamp(min=0)


def soft_or(scores: TokenScores) -> Tensor:
    """ĥ + δ̂ − ĥ·δ̂ with δ = KL(P_S ‖ P_T) (paper Eq. 7)."""
    return _either(clipped_entropy(scores.require("entropy_norm")), min_max(scores.require("reverse_kl")))


def soft_or_log(scores: TokenScores) -> Tensor:
    """Soft-OR with δ̂ = min-max of log(δ + 10⁻⁴): small divergences keep their order beside a few large ones (ours)."""
    delta = min_max((scores.require("reverse_kl").clamp(min=0) + LOG_FLOOR).log())
    return _either(clipped_entropy(scores.require("entropy_norm")), delta)


def q3(scores: TokenScores) -> Tensor:
    """KL(P_T ‖ P_S) · (1 − ĥ): confident and wrong; the *forward* KL ranks (paper §7.3)."""
    return scores.require("forward_kl") * (1 - clipped_entropy(scores.require("entropy_norm")))


def divergence(scores: TokenScores) -> Tensor:
    """δ = KL(P_S ‖ P_T) (paper B.2)."""
    return scores.require("reverse_kl")


def hellinger(scores: TokenScores) -> Tensor:
    """‖√P_S − √P_T‖₂ / √2 (LATF of AdaKD, arXiv 2510.11615)."""
    return scores.require("hellinger")


def gradient_norm(scores: TokenScores) -> Tensor:
    """‖P_S ∘ (log P_S/P_T − KL)‖₂, the norm of the reverse-KL gradient at the logits (ours)."""
    return scores.require("gradient_norm")


def signal_to_curvature(scores: TokenScores) -> Tensor:
    """‖g‖² / gᵀHg with g = P_S − P_T, H = diag(P_S) − P_S P_Sᵀ (paper Eq. 6)."""
    return scores.require("signal_to_curvature")


def entropy_jsd(scores: TokenScores) -> Tensor:
    """(H / log V) · (JSD / log 2), with the Jensen-Shannon divergence at β = ½ (the code base of TIP's authors)."""
    return entropy(scores) * (scores.require("jsd").clamp(min=0) / math.log(2))


def teachability(scores: TokenScores) -> Tensor:
    """N(D) · N(C): D the forward KL on both models' likeliest tokens, C the teacher's mass on the student's.

    N clips to the 5th and 95th percentile and scales to [0, 1] (arXiv 2605.26844).
    """
    divergence, compatibility = scores.require("top16_forward_kl"), scores.require("top16_teacher_mass")
    return between_percentiles(divergence) * between_percentiles(compatibility)


def teachability_soft_or(scores: TokenScores) -> Tensor:
    """ĥ + N(DC) − ĥ·N(DC) with the D and C of `teachability` (arXiv 2605.26844)."""
    return _either(clipped_entropy(scores.require("entropy_norm")), between_percentiles(teachability(scores)))


def selectkd(scores: TokenScores) -> Tensor:
    """1 where the student's likeliest token is among the teacher's 5 likeliest, else 0.01 (arXiv 2510.24021)."""
    return torch.where(scores.require("argmax_in_top5") > 0.5, 1.0, REJECTED)


def position(scores: TokenScores, order: Order) -> Tensor:
    """¼ + ¾ · sigmoid((f − 0.3) / 0.1) with f = (t − ½) / length for the t-th token (PW-OPSD, arXiv 2605.21606)."""
    fraction = (order.position + 0.5) / order.length
    return 0.25 + 0.75 * torch.sigmoid((fraction - 0.3) / 0.1)


def prefix_compatibility(scores: TokenScores, order: Order) -> Tensor:
    """clip(1 − w · bad, 0, 1) + w₀, bad the tokens so far with a top-k overlap below θ (Prune-OPD, arXiv 2605.07804).

    k = 16; θ = 0.5, w = 0.1 and w₀ = 0.05 are ours. The token itself counts.
    """
    bad = (scores.require("top16_overlap") < MIN_OVERLAP).double()
    return ((1 - PENALTY * (order.before(bad) + bad)).clamp(0, 1) + LEAST_WEIGHT).float()


def confidence_ratio(scores: TokenScores) -> Tensor:
    """(1 + α(1 − H_T / max H_T)) · (1 + β · H_S / max H_S), scaled to mean 1 (FiRe-OPD, arXiv 2606.02684).

    α = β = 1 are ours.
    """
    h, teacher = (scores.require(name).clamp(min=0) for name in ("entropy", "teacher_entropy"))
    tiny = torch.finfo(h.dtype).tiny
    weight = (2 - teacher / teacher.max().clamp(min=tiny)) * (1 + h / h.max().clamp(min=tiny))
    return weight / weight.mean()


def entropy_gap(scores: TokenScores) -> Tensor:
    """sigmoid(H_S − H_T), in nats (TSD-KD, arXiv 2603.13260)."""
    return torch.sigmoid(scores.require("entropy") - scores.require("teacher_entropy"))


def cumulative_advantage(scores: TokenScores, order: Order) -> Tensor:
    """1 + ½ (1 − Σ_{s<t} |a_s| / Σ_s |a_s|) with a = log P_T/P_S of the sampled token (IW-OPD, arXiv 2606.22600)."""
    size = (scores.require("teacher_logprob") - scores.require("student_logprob")).abs()
    total = order.total(size)
    return (1.5 - 0.5 * torch.where(total > 0, order.before(size) / total.clamp(min=1e-300), 0.0)).float()


def _either(h: Tensor, delta: Tensor) -> Tensor:
    """h + δ − h·δ; in this form exactly 1 where either is 1, so that rounding does not order the saturated tokens."""
    return h + delta * (1 - h)
