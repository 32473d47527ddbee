"""From verdicts to numbers: mean@k, its two deviations, pass@k and maj@k."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from statistics import fmean, stdev


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
    _check_rows(correct)
    shares = [fmean(map(bool, row)) for row in correct]
    return fmean(shares), stdev(shares) / math.sqrt(len(shares)) if len(shares) > 1 else math.nan


def deviation_over_samples(correct: Sequence[Sequence[bool]]) -> float:
    """Standard deviation of the accuracy of the j-th completions, over j = 1 … k; what papers print after a ±.

    It says how much a single run over the problems scatters, and nothing about other problems: for that, see the
    standard error of `mean_at_k`.

    Args:
        correct: P rows of k verdicts each.

    Returns:
        In [0, 1]; NaN where k = 1.

    Raises:
        ValueError: as `mean_at_k`.

    Example:
        >>> round(deviation_over_samples([[True, False], [True, False]]), 4)
        0.7071
    """
    _check_rows(correct)
    runs = [fmean(map(bool, column)) for column in zip(*correct, strict=True)]
    return stdev(runs) if len(runs) > 1 else math.nan


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


def majority(votes: Sequence[Hashable | None]) -> int | None:
    """Index of the first vote for what most voted for; of equal camps the one that was first.

    Args:
        votes: what each completion answered, equivalent answers as equal values; None: no answer, no vote.

    Returns:
        Index into `votes`; None where nobody voted.

    Example:
        >>> majority(["7", "5", None, "5"]), majority([None])
        (1, None)
    """
    camps = Counter(vote for vote in votes if vote is not None)
    if not camps:
        return None
    return votes.index(camps.most_common(1)[0][0])  # of equal counts `most_common` gives the one met first


def _check_rows(correct: Sequence[Sequence[bool]]) -> None:
    lengths = {len(row) for row in correct}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            "correct must hold at least one problem, and as many verdicts for each, at least one; got "
            f"{len(correct)} problems with {sorted(lengths) or 'no'} verdicts."
        )
