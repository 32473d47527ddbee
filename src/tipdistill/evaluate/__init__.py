"""Measure: from the correctness of sampled completions to mean@k and pass@k."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

__all__ = ["mean_at_k", "pass_at_k"]


def mean_at_k(correct: Sequence[Sequence[bool]]) -> tuple[float, float]:
    """mean@k, the share of correct completions, and its standard error.

    p̄ = (1 / P) Σ_i c_i / k for c_i correct ones of the k completions of problem i; s.e. = s / √P with s the standard
    deviation of c_i / k over the P problems, so that completions of one problem do not count as independent.

    Args:
        correct: P rows of k verdicts each.

    Returns:
        Mean and standard error, both in [0, 1]; the standard error of a single problem is NaN.

    Raises:
        ValueError: no problem, no completion, or rows of different lengths.

    Example:
        >>> mean_at_k([[True, True], [True, False], [False, False]])[0]
        0.5
    """
    lengths = {len(row) for row in correct}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            "correct must hold at least one problem, and as many verdicts for each, at least one; got "
            f"{len(correct)} problems with {sorted(lengths) or 'no'} verdicts."
        )
    shares = [fmean(map(bool, row)) for row in correct]
    return fmean(shares), stdev(shares) / math.sqrt(len(shares)) if len(shares) > 1 else math.nan


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The unbiased estimate of pass@k: the chance that k of n samples hold a correct one.

    1 − C(n − c, k) / C(n, k) (Chen et al. 2021, "Evaluating Large Language Models Trained on Code", Eq. 1).

    Args:
        num_samples: n, completions of one problem.
        num_correct: c, how many of them are correct, in [0, n].
        k: how many are drawn, in [1, n].

    Returns:
        A probability, in [0, 1].

    Raises:
        ValueError: a count is no integer or out of range.

    Example:
        >>> pass_at_k(num_samples=4, num_correct=1, k=2)
        0.5
    """
    for name, value, low, high in (
        ("num_samples", num_samples, 1, None),
        ("num_correct", num_correct, 0, num_samples),
        ("k", k, 1, num_samples),
    ):
        # `bool` is an `int`, and a verdict passed for a count would go unseen
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{name} must be an integer, got {value!r}.")
        if value < low or (high is not None and value > high):
            allowed = f"at least {low}" if high is None else f"in [{low}, num_samples = {high}]"
            raise ValueError(f"{name} must be {allowed}, got {value}.")
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)
