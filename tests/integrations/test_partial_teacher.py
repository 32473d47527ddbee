"""Rules beside a teacher that tells little, and weights that turn an engine's mean into that of the kept tokens."""

from dataclasses import replace

import pytest
import torch

from tipdistill import RULES, Selection, TokenScores, select
from tipdistill.integrations.partial_teacher import (
    GIVEN,
    available_rules,
    check_rule,
    check_scope,
    loss_weights,
    seed_of,
    select_rollouts,
)

LENGTHS = [7, 1, 12, 3, 20]


def scores_and_rollouts(seed=0):
    draw = torch.Generator().manual_seed(seed)
    tokens = sum(LENGTHS)
    names = ("entropy", "entropy_norm", "teacher_entropy", "reverse_kl", "forward_kl", "jsd", "gradient_norm")
    rollout = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    return TokenScores(**{name: torch.rand(tokens, generator=draw) for name in names}), rollout


SEEDS = [seed_of(torch.arange(length)) for length in LENGTHS]


@pytest.mark.parametrize("given", GIVEN)
def test_a_rule_can_be_had_where_the_teacher_tells_what_it_reads(given):
    available = available_rules(given, 32)
    for name, rule in RULES.items():
        assert (name in available) == set(GIVEN[given]).issuperset(rule.fields)
        if name in available:
            assert check_rule(name, given, 32) == rule
        else:
            with pytest.raises(ValueError, match=rf"{name}.* Rules that can be had: all, random"):
                check_rule(name, given, 32)
    assert {"soft_or", "entropy", "random", "divergence"} <= set(available)


@pytest.mark.parametrize(
    ("rule", "given", "k", "message"),
    [
        ("soft_ro", "top_k", 32, "Did you mean 'soft_or'"),
        ("teachability", "top_k", 32, "student's likeliest tokens, whichever they are"),
        ("cumulative_advantage", "top_k", 32, "need not be among them"),
        ("selectkd", "top_k", 4, "5 likeliest tokens: topk=4"),
        ("prefix_compatibility", "top_k", 8, "16 likeliest tokens: topk=8"),
        ("q3", "sampled", None, "'forward_kl', which the teacher's sampled token does not give"),
        ("tipdistill.select.contrib:hellinger", "top_k", 32, "does not say what it reads"),
    ],
)
def test_refused_rules_say_why(rule, given, k, message):
    with pytest.raises(ValueError, match=message):
        check_rule(rule, given, k)


def test_a_budget_over_the_batch_needs_the_whole_batch():
    with pytest.raises(ValueError, match="set normalization=batch"):
        check_scope("batch", "rollout", RULES["soft_or"])
    check_scope("batch", "batch", RULES["soft_or"])
    for scope, normalization, hint in (("bach", "batch", "'batch'"), ("batch", "rolout", "'rollout'")):
        with pytest.raises(ValueError, match=f"Did you mean {hint}"):
            check_scope(scope, normalization, RULES["soft_or"])


@pytest.mark.parametrize("rule", ["soft_or", "q3", "random", "entropy_sampling", "gradient_norm", "confidence_ratio"])
def test_rollout_normalization_does_not_depend_on_the_split(rule):
    scores, rollout = scores_and_rollouts()
    whole = select_rollouts(scores, rollout, SEEDS, rule, 0.4, normalization="rollout")
    for numbers in ([0], [1, 2], [3, 4]):
        own = torch.isin(rollout, torch.tensor(numbers))
        part = select_rollouts(
            scores.map(lambda values, own=own: values[own]),
            rollout[own] - numbers[0],
            [SEEDS[number] for number in numbers],
            rule,
            0.4,
            normalization="rollout",
        )
        assert torch.equal(part.weight, whole.weight[own])
        assert torch.equal(part.mask, whole.mask[own])


@pytest.mark.parametrize("scope", ["rollout", "batch"])
def test_batch_normalization_is_select(scope):
    scores, rollout = scores_and_rollouts()
    ours = select_rollouts(scores, rollout, SEEDS, "soft_or", 0.4, scope)
    assert torch.equal(ours.mask, select(scores, "soft_or", 0.4, rollout, scope).mask)
    drawn = [select_rollouts(scores, rollout, SEEDS, "random", 0.4, scope).mask for _ in range(2)]
    assert torch.equal(*drawn)
    other = select_rollouts(scores, rollout, [seed + 1 for seed in SEEDS], "random", 0.4, scope).mask
    assert not torch.equal(drawn[0], other)


@pytest.mark.parametrize("over", ["rollout", "batch"])
def test_the_engines_mean_over_all_tokens_becomes_that_over_the_kept(over):
    scores, rollout = scores_and_rollouts()
    losses = scores.require("forward_kl").double()
    for rule in ("soft_or", "entropy_gap"):
        picked = select_rollouts(scores, rollout, SEEDS, rule, 0.4)
        mean = (losses * loss_weights(replace(picked, weight=picked.weight.double()), rollout, over)).mean()
        w = picked.weight.double()
        if over == "batch":
            expected = (w * losses).sum() / w.sum()
        else:
            of_rollouts = [
                (w * losses)[rollout == number].sum() / w[rollout == number].sum() for number in range(len(LENGTHS))
            ]
            expected = sum(m * value for m, value in zip(LENGTHS, of_rollouts, strict=True)) / sum(LENGTHS)
        torch.testing.assert_close(mean, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("normalization", ["rollout", "batch"])
def test_inverse_probabilities_make_the_engines_mean_right_on_average(normalization):
    """Not at every draw, as a division by Σ w would: the mean of many draws is the mean over all tokens."""
    scores, rollout = scores_and_rollouts()
    losses = scores.require("gradient_norm").double().square()
    means = []
    for draw in range(1000):
        seeds = [seed + 1000 * draw for seed in SEEDS]
        picked = select_rollouts(scores, rollout, seeds, "gradient_norm_sampling", 0.3, normalization=normalization)
        assert picked.inverse_probability
        over = "rollout" if normalization == "rollout" else "batch"
        means.append((losses * loss_weights(replace(picked, weight=picked.weight.double()), rollout, over)).mean())
    values = torch.stack(means)
    assert values.std() > 0
    assert abs(values.mean() - losses.mean()) < 5 * values.std() / 1000**0.5


def test_a_rollout_without_weight_adds_nothing():
    weight = torch.tensor([0.0, 0.0, 2.0, 1.0])
    rollout = torch.tensor([4, 4, 9, 9])  # rollout numbers in between have no token
    assert loss_weights(Selection(weight > 0, weight, weight), rollout, "rollout").tolist() == pytest.approx(
        [0, 0, 4 / 3, 2 / 3]
    )
    nothing = torch.zeros(4)
    assert loss_weights(Selection(nothing > 0, nothing, nothing), rollout, "batch").tolist() == [0, 0, 0, 0]
