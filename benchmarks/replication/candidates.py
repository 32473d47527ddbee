"""Rules for small budgets that were tried beside `gradient_norm_sampling` and did not do better.

PYTHONPATH=. tipdistill sweep benchmarks/replication/screening/candidates.yaml --trust_recipe
"""

import torch
from torch import Tensor

from tipdistill import TokenScores
from tipdistill.select import Order, Rule

NORM = ("gradient_norm",)
UNIFORM = 0.3


def norm(scores: TokenScores) -> Tensor:
    return scores.require("gradient_norm").clamp(min=0)


def geometric_mean_score(scores: TokenScores) -> Tensor:
    return (norm(scores) * scores.require("reverse_kl").clamp(min=0)).sqrt()


def on_the_teachers_path_score(scores: TokenScores, order: Order) -> Tensor:
    """The norm, less what the tokens before it are less likely under the teacher than under the student."""
    lead = (scores.require("student_logprob") - scores.require("teacher_logprob")).clamp(min=0)
    return norm(scores) * torch.exp(-order.before(lead)).float()


def mixed_score(scores: TokenScores) -> Tensor:
    """Part of the draws go to all tokens alike, so that no weight is above 1 / `UNIFORM`."""
    value = norm(scores).double()
    return (1 - UNIFORM) * value / value.sum().clamp(min=1e-300) + UNIFORM / len(value)


# drawn, and not corrected for it
drawn = Rule(norm, NORM, "sample")
drawn_by_root = Rule(lambda scores: norm(scores).sqrt(), NORM, "sample")
drawn_by_square = Rule(lambda scores: norm(scores) ** 2, NORM, "sample")
# the highest
geometric_mean = Rule(geometric_mean_score, ("gradient_norm", "reverse_kl"))
on_the_teachers_path = Rule(
    on_the_teachers_path_score, ("gradient_norm", "student_logprob", "teacher_logprob"), ordered=True
)
# drawn and weighed by the inverse probability, as gradient_norm_sampling
by_divergence = Rule(lambda scores: scores.require("reverse_kl").clamp(min=0), ("reverse_kl",), "importance")
by_root = Rule(lambda scores: norm(scores).sqrt(), NORM, "importance")
mixed = Rule(mixed_score, NORM, "importance")
