"""Counts are exact, ties are stable, draws follow the distribution of successive draws."""

import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tipdistill.select.budget import race, share_of, top_k

LENGTHS = [*range(401), 1000, 4096, 8192, 999_983, 1_000_000, 10_000_000]


def expected_share(length: int, numerator: int, denominator: int) -> int:
    return min(length, max(1, length * numerator // denominator))


@pytest.mark.parametrize("digits", [1, 2, 3])
def test_share_is_exact_for_every_decimal(digits):
    lengths = torch.tensor(LENGTHS)
    denominator = 10**digits
    for numerator in range(1, denominator + 1):
        expected = (lengths * numerator // denominator).clamp(min=1).minimum(lengths)
        assert torch.equal(share_of(lengths, float(f"{numerator}e-{digits}")), expected), numerator


@pytest.mark.parametrize(("retention", "length", "kept"), [(0.29, 100, 29), (0.1, 30, 3), (0.7, 10, 7), (1 / 3, 9, 3)])
def test_share_is_exact_where_floating_point_is_not(retention, length, kept):
    assert share_of(torch.tensor([length]), retention).tolist() == [kept]


@settings(deadline=None)
@given(st.integers(1, 10**6), st.integers(1, 10**6), st.integers(0, 10**7))
def test_share_is_exact_for_every_fraction(numerator, denominator, length):
    numerator, denominator = sorted((numerator, denominator))
    kept = share_of(torch.tensor([length]), numerator / denominator).item()
    assert kept == expected_share(length, numerator, denominator)


@settings(deadline=None)
@given(st.integers(1, 10**7), st.integers(1, 400))
def test_share_of_the_rest_is_exact(millionths, length):
    """1 − ρ, as the complement of a rule takes it, carries the error of a subtraction."""
    retention = float(f"{millionths}e-7")
    if retention == 1:
        return
    kept = share_of(torch.tensor([length]), 1 - retention).item()
    assert kept == expected_share(length, 10**7 - millionths, 10**7)


def brute_force_top_k(score, group, counts):
    mask = [False] * len(score)
    for number, count in enumerate(counts):
        members = [token for token in range(len(score)) if group[token] == number]
        for token in sorted(members, key=lambda token: (-score[token], token))[:count]:
            mask[token] = True
    return mask


@settings(deadline=None)
@given(st.data())
def test_top_k_equals_a_sort_of_every_group(data):
    tokens = data.draw(st.integers(1, 40))
    groups = data.draw(st.integers(1, 5))
    # few distinct values, so that ties are the rule
    score = data.draw(st.lists(st.sampled_from([-1.5, -0.0, 0.0, 0.5, 2.0]), min_size=tokens, max_size=tokens))
    group = data.draw(st.lists(st.integers(0, groups - 1), min_size=tokens, max_size=tokens))
    counts = [data.draw(st.integers(0, group.count(number))) for number in range(groups)]
    mask = top_k(torch.tensor(score, dtype=torch.float64), torch.tensor(group), torch.tensor(counts))
    assert mask.tolist() == brute_force_top_k(score, group, counts)


def test_of_equal_scores_the_earlier_token_wins():
    score, group = torch.zeros(5000), torch.arange(5000) % 2
    mask = top_k(score, group, torch.tensor([700, 900]))
    assert mask[0::2].tolist() == [True] * 700 + [False] * 1800
    assert mask[1::2].tolist() == [True] * 900 + [False] * 1600


def subset_probabilities(weights, draws):
    """Probability of each set of `draws` tokens, drawn one after the other, each ∝ weight among those left."""
    probabilities = Counter()
    for order in itertools.permutations(range(len(weights)), draws):
        probability, left = 1.0, sum(weights)
        for token in order:
            probability *= weights[token] / left
            left -= weights[token]
        probabilities[frozenset(order)] += probability
    return probabilities


def chi_square(key, weights, draws, rollouts):
    tokens = len(weights)
    group = torch.arange(rollouts).repeat_interleave(tokens)
    mask = top_k(key, group, torch.full((rollouts,), draws)).view(rollouts, tokens)
    seen = Counter(frozenset(row.nonzero()[:, 0].tolist()) for row in mask)
    expected = subset_probabilities(weights, draws)
    assert math.isclose(sum(expected.values()), 1.0)
    return sum((seen[kept] - rollouts * p) ** 2 / (rollouts * p) for kept, p in expected.items())


def test_a_race_is_successive_draws_without_replacement():
    weights, draws, rollouts = (0.5, 0.3, 0.15, 0.05), 2, 20_000
    # 6 pairs, so 5 degrees of freedom: a correct sampler exceeds 25.7 once in 10,000 seeds
    bound = 25.7
    weight = torch.tensor(weights).repeat(rollouts)
    key = race(weight, torch.Generator().manual_seed(0))
    assert chi_square(key, weights, draws, rollouts) < bound
    # the bound tells other samplers apart: w·u, and the race without its weights
    uniform = torch.rand(len(weight), generator=torch.Generator().manual_seed(0))
    assert chi_square(weight * uniform, weights, draws, rollouts) > 10 * bound
    unweighted = race(torch.ones_like(weight), torch.Generator().manual_seed(0))
    assert chi_square(unweighted, weights, draws, rollouts) > 10 * bound


def test_tokens_of_weight_0_come_last_in_random_order():
    weight = torch.tensor([0.0, 0.3, 0.0, 1e-45, 0.0, 0.7])
    orders = {
        tuple(race(weight, torch.Generator().manual_seed(seed)).argsort(descending=True).tolist()) for seed in range(40)
    }
    assert all(set(order[:3]) == {1, 3, 5} for order in orders)
    assert len({order[3:] for order in orders}) == 6


def test_a_race_needs_no_weight_at_all():
    key = race(torch.zeros(8), torch.Generator().manual_seed(0))
    assert torch.isfinite(key).all()
    assert len(key.unique()) == 8
