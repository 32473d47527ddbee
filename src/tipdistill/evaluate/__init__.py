"""Measure: completions of a task, checked, and what they say: mean@k, pass@k, maj@k."""

from .answers import Verdict, Verifiers, is_correct
from .metrics import deviation_over_samples, majority, mean_at_k, pass_at_k
from .verifier import extract_answer

__all__ = [
    "Verdict",
    "Verifiers",
    "deviation_over_samples",
    "extract_answer",
    "is_correct",
    "majority",
    "mean_at_k",
    "pass_at_k",
]
