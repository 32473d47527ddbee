"""Rules that others propose, offered by name like the rest and **not measured by us**: nobody here trained with them.

Each is the formula of its source, as far as that is known; docs/rules.md says where a constant is ours. One was tried,
`signal_to_curvature`, and failed. A rule moves to rules.py when docs/replication.md has a figure of it.

The score of a weight rule is the token's weight in the loss. A function that reads where tokens stand in their rollouts
takes their `Order` beside the scores.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..types import TokenScores
from .normalize import Scales, between_percentiles, clipped_entropy, extremes
from .order import Order
from .rule import Rule
from .rules import either, entropy

REJECTED = 0.01  # weight of a token whose proposal the teacher does not accept
# Ours; the sources' formulas are known here without these constants.
MIN_OVERLAP, PENALTY, LEAST_WEIGHT = 0.5, 0.1, 0.05


def hellinger(scores: TokenScores) -> Tensor:
    """‖√P_S − √P_T‖₂ / √2 (LATF of AdaKD, arXiv 2510.11615)."""
    return scores.require("hellinger")


def entropy_jsd(scores: TokenScores) -> Tensor:
    """(H / log V) · (JSD / log 2), with the Jensen-Shannon divergence at β = ½ (the code base of TIP's authors)."""
    return entropy(scores) * (scores.require("jsd").clamp(min=0) / math.log(2))


def teachability(scores: TokenScores, scales: Scales | None = None) -> Tensor:
    """N(D) · N(C): D the forward KL on both models' likeliest tokens, C the teacher's mass on the student's.

    N clips to the 5th and 95th percentile and scales to [0, 1] (arXiv 2605.26844).
    """
    divergence, compatibility = scores.require("top16_forward_kl"), scores.require("top16_teacher_mass")
    return between_percentiles(divergence, scales=scales) * between_percentiles(compatibility, scales=scales)


def teachability_soft_or(scores: TokenScores, scales: Scales | None = None) -> Tensor:
    """ĥ + N(DC) − ĥ·N(DC) with the D and C of `teachability` (arXiv 2605.26844)."""
    h = clipped_entropy(scores.require("entropy_norm"), scales)
    return either(h, between_percentiles(teachability(scores, scales), scales=scales))


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


def confidence_ratio(scores: TokenScores, scales: Scales | None = None) -> Tensor:
    """(1 + α(1 − H_T / max H_T)) · (1 + β · H_S / max H_S), scaled to mean 1 (FiRe-OPD, arXiv 2606.02684).

    α = β = 1 are ours.
    """
    h, teacher = (scores.require(name).clamp(min=0) for name in ("entropy", "teacher_entropy"))
    scales, tiny = scales or Scales(), torch.finfo(h.dtype).tiny
    (_, teachers), (_, students) = scales.ends(teacher, extremes), scales.ends(h, extremes)
    weight = (2 - teacher / teachers.clamp(min=tiny)) * (1 + h / students.clamp(min=tiny))
    _, mean = scales.ends(weight, lambda values: (torch.zeros_like(values[0]), values.mean()))
    # others' largest may be less than one of these, which then would weigh less than nothing
    return (weight / mean).clamp(min=0)


def entropy_gap(scores: TokenScores) -> Tensor:
    """sigmoid(H_S − H_T), in nats (TSD-KD, arXiv 2603.13260)."""
    return torch.sigmoid(scores.require("entropy") - scores.require("teacher_entropy"))


def cumulative_advantage(scores: TokenScores, order: Order) -> Tensor:
    """1 + ½ (1 − Σ_{s<t} |a_s| / Σ_s |a_s|) with a = log P_T/P_S of the sampled token (IW-OPD, arXiv 2606.22600)."""
    size = (scores.require("teacher_logprob") - scores.require("student_logprob")).abs()
    total = order.total(size)
    return (1.5 - 0.5 * torch.where(total > 0, order.before(size) / total.clamp(min=1e-300), 0.0)).float()


def signal_to_curvature(scores: TokenScores) -> Tensor:
    """‖g‖² / gᵀHg with g = P_S − P_T, H = diag(P_S) − P_S P_Sᵀ (paper Eq. 6)."""
    return scores.require("signal_to_curvature")


CONTRIB: dict[str, Rule] = {
    "hellinger": Rule(hellinger, ("hellinger",)),
    "entropy_jsd_sampling": Rule(entropy_jsd, ("entropy_norm", "jsd"), "sample"),
    "teachability": Rule(
        teachability, ("top16_forward_kl", "top16_teacher_mass"), scope="batch", every_rollout=True, scaled=True
    ),
    "teachability_soft_or": Rule(
        teachability_soft_or,
        ("entropy_norm", "top16_forward_kl", "top16_teacher_mass"),
        scope="batch",
        every_rollout=True,
        scaled=True,
    ),
    "selectkd": Rule(selectkd, ("argmax_in_top5",), "weight"),
    "position": Rule(position, (), "weight", ordered=True),
    "prefix_compatibility": Rule(prefix_compatibility, ("top16_overlap",), "weight", ordered=True),
    "confidence_ratio": Rule(confidence_ratio, ("entropy", "teacher_entropy"), "weight", scaled=True),
    "entropy_gap": Rule(entropy_gap, ("entropy", "teacher_entropy"), "weight"),
    "cumulative_advantage": Rule(cumulative_advantage, ("student_logprob", "teacher_logprob"), "weight", ordered=True),
    # tried, and below where training began on all three tasks: docs/replication.md
    "signal_to_curvature": Rule(signal_to_curvature, ("signal_to_curvature",)),
}
