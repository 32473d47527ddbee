"""The interval holds the truth about as often as it says, whichever part of the variance is large."""

import numpy as np
import pytest

from tipdistill.sweep import Bootstrap, interval
from tipdistill.sweep.bootstrap import student_t_quantile

TRIALS = 400


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
@pytest.mark.parametrize(
    ("of_seeds", "of_problems", "of_both"),
    [(0.02, 0.0, 0.0), (0.02, 0.2, 0.2), (0.0, 0.3, 0.2), (0.0, 0.0, 0.3), (0.01, 0.05, 0.3)],
)
def test_the_interval_covers_the_truth(seeds, of_seeds, of_problems, of_both):
    random, problems = np.random.default_rng(seeds), 96
    bootstrap = Bootstrap(seeds, problems, draws=2000)
    hits = 0
    for _ in range(TRIALS):
        table = (
            of_seeds * random.standard_normal((seeds, 1))
            + of_problems * random.standard_normal((1, problems))
            + of_both * random.standard_normal((seeds, problems))
        )
        low, high = interval(bootstrap.of(table))
        hits += low <= 0 <= high
    # 95 % less three standard errors of 400 trials; more is allowed where a seed at a problem is what scatters
    assert hits / TRIALS > 0.95 - 3 * (0.95 * 0.05 / TRIALS) ** 0.5


def test_the_plain_bootstrap_would_not_cover():
    """The widening is what makes the test above pass."""
    random, bootstrap = np.random.default_rng(0), Bootstrap(3, 96, draws=2000)
    bootstrap._seeds = bootstrap._seeds / bootstrap._seeds.max() * (1 - 1 / 3)  # the largest share of one seed is 1
    tables = (np.repeat(random.standard_normal((3, 1)), 96, axis=1) for _ in range(TRIALS))
    hits = sum(low <= 0 <= high for low, high in (interval(bootstrap.of(table)) for table in tables))
    assert hits / TRIALS < 0.85


def test_an_interval_of_binary_answers_covers_and_is_of_use():
    random, bootstrap = np.random.default_rng(1), Bootstrap(5, 128, draws=2000)
    hits, widths = 0, []
    for _ in range(TRIALS):
        difficulty = random.beta(2, 0.5, size=128)
        skill = random.normal(0, 0.01, size=(5, 1))
        truth = 0.8
        table = random.binomial(4, np.clip(difficulty + skill, 0, 1)) / 4
        low, high = interval(bootstrap.of(table))
        hits += low <= truth <= high
        widths.append(high - low)
    assert hits / TRIALS > 0.91
    # a normal interval over the problems' true spread (0.214) is 0.074 wide
    assert np.mean(widths) < 0.12


def test_draws_are_deterministic_and_linear_so_that_differences_are_paired():
    random = np.random.default_rng(2)
    first, second = random.random((4, 30)), random.random((4, 30))
    bootstrap = Bootstrap(4, 30)
    np.testing.assert_array_equal(Bootstrap(4, 30).of(first), bootstrap.of(first))
    np.testing.assert_allclose(bootstrap.of(first) - bootstrap.of(second), bootstrap.of(first - second), atol=1e-12)
    # a constant lead is certain, however much both scatter together
    low, high = interval(bootstrap.of(first + 0.25) - bootstrap.of(first))
    assert low == pytest.approx(0.25)
    assert high == pytest.approx(0.25)


def test_one_seed_leaves_the_problems_and_one_problem_the_seeds():
    table = np.array([[0.0, 1.0] * 50])
    low, high = interval(Bootstrap(1, 100).of(table))
    assert (low, high) == pytest.approx((0.5 - 1.96 * 0.05, 0.5 + 1.96 * 0.05), abs=0.012)
    low, high = interval(Bootstrap(4, 1).of(np.array([[0.0], [0.0], [1.0], [1.0]])))
    assert low < 0 < 1 < high  # Student's t with three degrees of freedom is wide
    with pytest.raises(ValueError, match="a seed and a problem at least"):
        Bootstrap(0, 3)


@pytest.mark.parametrize(("degrees", "quantile"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (9, 2.2622), (30, 2.0423)])
def test_quantiles_of_student_are_those_of_the_tables(degrees, quantile):
    assert student_t_quantile(degrees) == pytest.approx(quantile, rel=2e-4)
