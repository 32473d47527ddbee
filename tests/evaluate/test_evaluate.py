"""mean@k and pass@k against definitions that a reader can check by hand."""

import math
from itertools import combinations

import pytest

import tipdistill as tip
from tipdistill.evaluate import mean_at_k, pass_at_k


@pytest.mark.parametrize("num_samples", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_one(num_samples):
    for num_correct in range(num_samples + 1):
        verdicts = [True] * num_correct + [False] * (num_samples - num_correct)
        for k in range(1, num_samples + 1):
            subsets = list(combinations(verdicts, k))
            share = sum(any(subset) for subset in subsets) / len(subsets)
            assert pass_at_k(num_samples, num_correct, k) == pytest.approx(share, abs=1e-12)


def test_pass_at_1_is_the_share_of_correct_ones():
    assert pass_at_k(1000, 137, 1) == pytest.approx(0.137)


def test_pass_at_k_stays_finite_where_binomials_overflow_a_float():
    assert 0 < pass_at_k(10_000, 1, 5_000) < 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((0, 0, 1), "num_samples"),
        ((4, 5, 1), "num_correct"),
        ((4, -1, 1), "num_correct"),
        ((4, 1, 0), "k must"),
        ((4, 1, 5), "k must"),
        ((4.0, 1, 1), "num_samples"),
        ((4, True, 1), "num_correct"),
    ],
)
def test_pass_at_k_refuses_counts_that_cannot_be(arguments, named):
    with pytest.raises(ValueError, match=named):
        pass_at_k(*arguments)


def test_mean_at_k_and_its_standard_error_over_problems():
    mean, error = mean_at_k([[True, True], [True, False], [False, False], [False, True]])
    shares = [1.0, 0.5, 0.0, 0.5]
    variance = sum((share - 0.5) ** 2 for share in shares) / 3
    assert mean == 0.5
    assert error == pytest.approx(math.sqrt(variance / 4))


def test_completions_of_one_problem_do_not_count_as_independent():
    once, four_times = [[True], [False], [True]], [[True] * 4, [False] * 4, [True] * 4]
    assert mean_at_k(once) == mean_at_k(four_times)


def test_one_problem_has_a_mean_and_no_error():
    mean, error = mean_at_k([[True, False, False, False]])
    assert mean == 0.25
    assert math.isnan(error)


@pytest.mark.parametrize("correct", [[], [[]], [[True], [True, False]]])
def test_mean_at_k_refuses_what_has_no_mean(correct):
    with pytest.raises(ValueError, match="as many verdicts"):
        mean_at_k(correct)


def test_the_package_offers_it():
    assert tip.evaluate.pass_at_k is pass_at_k
