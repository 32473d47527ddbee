"""Each score is its formula, and reads what it declares and nothing else."""

from dataclasses import fields as dataclass_fields
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tipdistill import RULES, TokenScores, select
from tipdistill.select import needs_teacher, rule_fields
from tipdistill.select.normalize import clipped_entropy, min_max

STATISTICS = [field.name for field in dataclass_fields(TokenScores)]
SAMPLED = ("random", "entropy_sampling")


def random_scores(tokens=200, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return TokenScores(**{name: torch.rand(tokens, generator=generator, dtype=dtype) ** 3 for name in STATISTICS})


def numpy_clipped(entropy):
    clipped = np.minimum(entropy, np.quantile(entropy, 0.98))
    return (clipped - clipped.min()) / (clipped.max() - clipped.min())


def numpy_min_max(values):
    return (values - values.min()) / (values.max() - values.min())


FORMULAS = {
    "all": lambda s: np.ones_like(s.entropy_norm),
    "random": lambda s: np.ones_like(s.entropy_norm),
    "entropy": lambda s: s.entropy_norm,
    "entropy_sampling": lambda s: s.entropy_norm,
    "soft_or": lambda s: 1 - (1 - numpy_clipped(s.entropy_norm)) * (1 - numpy_min_max(s.reverse_kl)),
    "soft_or_log": lambda s: 1 - (1 - numpy_clipped(s.entropy_norm)) * (1 - numpy_min_max(np.log(s.reverse_kl + 1e-4))),
    "q3": lambda s: s.forward_kl * (1 - numpy_clipped(s.entropy_norm)),
    "divergence": lambda s: s.reverse_kl,
    "hellinger": lambda s: s.hellinger,
    "gradient_norm": lambda s: s.gradient_norm,
    "signal_to_curvature": lambda s: s.signal_to_curvature,
}


@pytest.mark.parametrize("rule", RULES)
def test_score_is_its_formula(rule):
    scores = random_scores()
    expected = FORMULAS[rule](scores.map(lambda value: value.numpy()))
    torch.testing.assert_close(RULES[rule].score(scores), torch.from_numpy(expected), rtol=1e-12, atol=1e-12)


def chosen(scores, rule, retention=0.3):
    return select(scores, rule, retention, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("rule", [name for name in RULES if rule_fields(name)])
def test_a_rule_reads_what_it_declares_and_nothing_else(rule):
    scores = random_scores()
    undeclared = [name for name in STATISTICS if name not in rule_fields(rule)]
    expected = chosen(scores, rule)
    without = replace(scores, **dict.fromkeys(undeclared))
    poisoned = replace(scores, **{name: torch.full_like(scores.entropy, torch.nan) for name in undeclared})
    for given_scores in (without, poisoned):
        picked = chosen(given_scores, rule)
        assert torch.equal(picked.mask, expected.mask)
        assert torch.equal(picked.score, expected.score)
    for name in rule_fields(rule):
        with pytest.raises(ValueError, match=f"statistic '{name}' was not computed"):
            chosen(replace(scores, **{name: None}), rule)


@pytest.mark.parametrize("rule", ["entropy", "entropy_sampling", "random", "all"])
def test_entropy_rules_never_look_at_the_teacher(rule):
    assert not needs_teacher(rule)
    assert not needs_teacher(f"complement:{rule}") if rule != "all" else True
    # not even its shape is known where the teacher was never projected
    entropies = TokenScores(entropy_norm=random_scores().entropy_norm)
    assert torch.equal(chosen(entropies, rule).mask, chosen(random_scores(), rule).mask)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule not in (*SAMPLED, "all", "entropy")])
def test_the_other_rules_need_the_teacher(rule):
    assert needs_teacher(rule)


@pytest.mark.parametrize("rule", RULES)
def test_the_divergence_that_is_trained_does_not_change_the_choice(rule):
    scores = random_scores()
    other = replace(scores, divergence=scores.divergence.flip(0) * 100)
    assert torch.equal(chosen(scores, rule).mask, chosen(other, rule).mask)


@settings(deadline=None)
@given(st.data())
@pytest.mark.parametrize("rule", ["soft_or", "soft_or_log"])
def test_soft_or_is_at_least_each_part_and_at_most_1(rule, data):
    tokens = data.draw(st.integers(1, 50))
    one = st.floats(0, 1, width=32)
    column = st.lists(one, min_size=tokens, max_size=tokens)
    h = torch.tensor(data.draw(column))
    delta = 10 * torch.tensor(data.draw(column))
    score = RULES[rule].score(TokenScores(entropy_norm=h, reverse_kl=delta))
    part = min_max(delta if rule == "soft_or" else (delta + 1e-4).log())
    rounding = 2e-7  # two float32 operations on numbers ≤ 1
    assert bool((score >= clipped_entropy(h) - rounding).all())
    assert bool((score >= part - rounding).all())
    assert bool((score <= 1).all())


def test_soft_or_is_exactly_1_where_either_part_is():
    """A score of 1 ± rounding would let noise, not the order of the tokens, break the ties of the clipped ones."""
    delta = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    h = torch.linspace(0, 1, 1000)
    score = RULES["soft_or"].score(TokenScores(entropy_norm=h, reverse_kl=delta))
    saturated = (clipped_entropy(h) == 1) | (min_max(delta) == 1)
    assert saturated.sum() > 15
    assert bool((score[saturated] == 1).all())


def test_soft_or_keeps_the_order_of_small_scores():
    """1 − (1 − h)(1 − δ) would round the many solved tokens to a few values, and a large budget is spent among them."""
    small = torch.cat([torch.linspace(0, 1e-6, 1000), torch.ones(50)])
    score = RULES["soft_or"].score(TokenScores(entropy_norm=small, reverse_kl=small))
    assert len(score[:1000].unique()) == 1000


def test_soft_or_log_tells_small_divergences_apart_beside_a_large_one():
    scores = TokenScores(entropy_norm=torch.zeros(4), reverse_kl=torch.tensor([0.0, 1e-3, 1e-1, 13.0]))
    linear, logarithmic = RULES["soft_or"].score(scores), RULES["soft_or_log"].score(scores)
    assert linear[2] < 0.01 < 0.5 < logarithmic[2]
    assert linear.argsort().tolist() == logarithmic.argsort().tolist() == [0, 1, 2, 3]


def test_rounding_below_0_is_no_error():
    """A sum in low precision can leave the entropy of a certain token, or the divergence of an agreed one, below 0."""
    scores = TokenScores(entropy_norm=torch.tensor([-1e-8, 0.5, 0.2]), reverse_kl=torch.tensor([-1e-3, 0.1, 0.0]))
    generator = torch.Generator().manual_seed(0)
    assert select(scores, "entropy_sampling", 0.5, generator=generator).mask.sum() == 1
    assert select(scores, "soft_or_log", 0.5).mask.tolist() == [False, True, False]
