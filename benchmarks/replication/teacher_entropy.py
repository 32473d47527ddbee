"""Rules that look at the teacher's entropy alone, for the paper's claim that it says almost nothing.

PYTHONPATH=. tipdistill sweep benchmarks/replication/teacher/modular.yaml
"""

from torch import Tensor

from tipdistill import TokenScores
from tipdistill.select import Rule


def teacher_entropy(scores: TokenScores) -> Tensor:
    return scores.require("teacher_entropy")


def teacher_certainty(scores: TokenScores) -> Tensor:
    return -scores.require("teacher_entropy")


highest = Rule(teacher_entropy, ("teacher_entropy",))
lowest = Rule(teacher_certainty, ("teacher_entropy",))
