"""Each score is its formula, and reads what it declares and nothing else."""

from dataclasses import fields as dataclass_fields
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tipdistill import RULES, TokenScores, select
from tipdistill.select import Order, Rule, kept_counts, needs_teacher, rule_fields
from tipdistill.select.normalize import clipped_entropy, min_max

STATISTICS = [field.name for field in dataclass_fields(TokenScores)]
SAMPLED = ("random", "entropy_sampling", "entropy_jsd_sampling")
# 200 tokens of five rollouts of different lengths, interleaved
ROLLOUT = torch.tensor([(7 * token * token) % 11 % 5 for token in range(200)])


def random_scores(tokens=200, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return TokenScores(**{name: torch.rand(tokens, generator=generator, dtype=dtype) ** 3 for name in STATISTICS})


def numpy_clipped(entropy):
    clipped = np.minimum(entropy, np.quantile(entropy, 0.98))
    return (clipped - clipped.min()) / (clipped.max() - clipped.min())


def numpy_min_max(values):
    return (values - values.min()) / (values.max() - values.min())


def between(values):
    low, high = np.quantile(values, 0.05), np.quantile(values, 0.95)
    return (np.clip(values, low, high) - low) / (high - low)


def soft_or(h, delta):
    return 1 - (1 - h) * (1 - delta)


def per_rollout(of_rollout):
    """A formula of one rollout's tokens in their order, applied to each rollout."""

    def formula(s):
        score, rollout = np.empty_like(s.entropy), ROLLOUT.numpy()
        for number in np.unique(rollout):
            mine = rollout == number
            score[mine] = of_rollout(s.map(lambda value, mine=mine: value[mine]), mine.sum())
        return score

    return formula


def position(s, length):
    return np.array([0.25 + 0.75 / (1 + np.exp(-((t - 0.5) / length - 0.3) / 0.1)) for t in range(1, length + 1)])


def prefix_compatibility(s, length):
    weight, bad = [], 0
    for overlap in s.top16_overlap:
        bad += overlap < 0.5
        weight.append(min(max(1 - 0.1 * bad, 0), 1) + 0.05)
    return np.array(weight)


def cumulative_advantage(s, length):
    a = np.abs(s.teacher_logprob - s.student_logprob)
    return np.array([1 + 0.5 * (1 - a[:t].sum() / a.sum()) for t in range(length)])


def confidence_ratio(s):
    weight = (1 + (1 - s.teacher_entropy / s.teacher_entropy.max())) * (1 + s.entropy / s.entropy.max())
    return weight / weight.mean()


def teachability(s):
    return between(s.top16_forward_kl) * between(s.top16_teacher_mass)


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
    "gradient_norm_sampling": lambda s: s.gradient_norm,
    "signal_to_curvature": lambda s: s.signal_to_curvature,
    "entropy_jsd_sampling": lambda s: s.entropy_norm * s.jsd / np.log(2),
    "teachability": teachability,
    "teachability_soft_or": lambda s: soft_or(numpy_clipped(s.entropy_norm), between(teachability(s))),
    "selectkd": lambda s: np.where(s.argmax_in_top5 > 0.5, 1.0, 0.01),
    "position": per_rollout(position),
    "prefix_compatibility": per_rollout(prefix_compatibility),
    "confidence_ratio": confidence_ratio,
    "entropy_gap": lambda s: 1 / (1 + np.exp(s.teacher_entropy - s.entropy)),
    "cumulative_advantage": per_rollout(cumulative_advantage),
}


@pytest.mark.parametrize("rule", RULES)
def test_score_is_its_formula(rule):
    scores = random_scores()
    expected = FORMULAS[rule](scores.map(lambda value: value.numpy()))
    order = [Order.of(ROLLOUT)] if RULES[rule].ordered else []
    score = RULES[rule].score(scores, *order)
    # a weight is float32 and of the order of 1, a score that ranks is as precise as what it reads
    close = 1e-6 if RULES[rule].budget == "weight" else 1e-12
    torch.testing.assert_close(score.double(), torch.from_numpy(expected), rtol=close, atol=close)


def chosen(scores, rule, retention=0.3):
    return select(scores, rule, retention, ROLLOUT[: len(scores)], generator=torch.Generator().manual_seed(0))


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


@pytest.mark.parametrize("rule", ["entropy", "entropy_sampling", "random", "all", "position"])
def test_entropy_rules_never_look_at_the_teacher(rule):
    assert not needs_teacher(rule)
    assert rule in ("all", "position") or not needs_teacher(f"complement:{rule}")
    # not even its shape is known where the teacher was never projected
    entropies = TokenScores(entropy_norm=random_scores().entropy_norm)
    assert torch.equal(chosen(entropies, rule).mask, chosen(random_scores(), rule).mask)


@pytest.mark.parametrize(
    "rule", [rule for rule in RULES if rule not in ("all", "random", "entropy", "entropy_sampling", "position")]
)
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
    share = st.floats(0, 1, width=32)
    column = st.lists(share, min_size=tokens, max_size=tokens)
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


# Rules that weigh, read positions, or read the likeliest tokens


def test_weight_rules_keep_every_token_and_weigh_it():
    scores = random_scores()
    for name, rule in RULES.items():
        if rule.budget != "weight":
            continue
        for retention in (0.1, 1.0):
            picked = chosen(scores, name, retention)
            assert picked.mask.all(), name
            assert torch.equal(picked.weight, picked.score), name
            assert len(picked.weight.unique()) > 1, name


def test_a_weight_of_0_drops_the_token_and_a_negative_one_is_refused():
    scores = TokenScores(entropy=torch.tensor([0.0, 2.0, 0.5]))
    picked = select(scores, Rule(lambda s: s.require("entropy"), ("entropy",), "weight"))
    assert picked.mask.tolist() == [False, True, True]
    assert picked.weight.tolist() == [0.0, 2.0, 0.5]
    with pytest.raises(ValueError, match="a weight rule's score must be ≥ 0"):
        select(scores, Rule(lambda s: -s.require("entropy"), ("entropy",), "weight"))


def test_tokens_of_a_rollout_come_in_their_order():
    """Where rollouts are interleaved, a token's place is among those of its own rollout."""
    picked = select(TokenScores(entropy=torch.ones(6)), "position", rollout=torch.tensor([4, 9, 4, 9, 9, 4]))
    assert torch.equal(picked.weight[[0, 2, 5]], picked.weight[[1, 3, 4]])
    assert bool((picked.weight[[0, 2, 5]].diff() > 0).all())


def test_a_function_may_read_the_order():
    def first_tokens(scores, order):
        return -order.position.float()

    first_tokens.fields, first_tokens.ordered = (), True
    scores = TokenScores(entropy=torch.ones(6))
    assert select(scores, first_tokens, 0.5, torch.tensor([0, 0, 0, 0, 1, 1])).mask.tolist() == [
        True, True, False, False, True, False,
    ]  # fmt: skip


def test_what_came_before_is_exact_in_long_rollouts():
    """Sums of one rollout do not take the rounding of what other rollouts summed to."""
    values = torch.cat([torch.full((1000,), 1e12, dtype=torch.float64), torch.full((3,), 1e-3, dtype=torch.float64)])
    order = Order.of(torch.arange(1003) // 1000)
    # 1e15 in float64 has a step of 1/8: the difference of two global sums would be 0 or 1/8
    assert order.before(values)[1000:].tolist() == pytest.approx([0.0, 1e-3, 2e-3])


def test_teachability_spends_over_the_batch_and_leaves_no_rollout_out():
    divergence = torch.tensor([9.0, 8.0, 7.0, 6.0, 0.1, 0.3, 0.2, 0.0])
    scores = TokenScores(top16_forward_kl=divergence, top16_teacher_mass=torch.linspace(1, 0.9, 8))
    rollout = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    kept = select(scores, "teachability", 0.5, rollout).mask
    assert kept.tolist() == [True, True, True, False, False, True, False, False]
    assert kept.sum() == kept_counts(torch.tensor([4, 4]), 0.5, "teachability", scope="batch").item()
    # fewer than there are rollouts: one of each all the same
    kept = select(scores, "teachability", 0.1, rollout).mask
    assert kept.nonzero()[:, 0].tolist() == [0, 5]
    assert kept_counts(torch.tensor([4, 4]), 0.1, "teachability", scope="batch").item() == 2
    assert select(scores, "teachability", 0.5, rollout, scope="rollout").mask.view(2, 4).sum(1).tolist() == [2, 2]


@pytest.mark.parametrize("constant", ["top16_forward_kl", "top16_teacher_mass"])
def test_a_factor_that_says_nothing_leaves_the_other_to_decide(constant):
    """Clipping maps every value to the same number, and the product must not become 0 for all."""
    varying = torch.rand(50, generator=torch.Generator().manual_seed(0))
    names = ("top16_forward_kl", "top16_teacher_mass")
    scores = TokenScores(**{name: torch.ones(50) if name == constant else varying for name in names})
    kept = select(scores, "teachability", 0.2).mask
    assert varying[kept].min() > varying[~kept].max() - 1e-6 or len(varying[kept].unique()) < 10
    assert RULES["teachability"].score(scores).unique().numel() > 40
    # nine in ten agree: the few others still count
    scores = TokenScores(top16_forward_kl=(varying > 0.97).float(), top16_teacher_mass=torch.ones(50))
    assert RULES["teachability"].score(scores).max() == 1.0


def test_a_weight_rule_has_no_complement():
    with pytest.raises(ValueError, match="take the complement of a rule that drops something"):
        select(random_scores(), "complement:position")
