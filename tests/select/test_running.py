"""Choices by the scales and thresholds of the step before: `running_of` and `select(running=...)`."""

import json

import pytest
import torch

from tipdistill import RULES, TokenScores, select
from tipdistill.select import COMPLEMENT, DRAWN, Running, resolve_rule, running_of
from tipdistill.types import STATISTICS

NAMES = [*RULES, f"{COMPLEMENT}soft_or", f"{COMPLEMENT}entropy_sampling"]
TOKENS, ROLLOUTS = 6000, 30


def scores_of(seed: int, tokens: int = TOKENS) -> TokenScores:
    """Skewed as a language model's: most tokens certain and agreed upon."""
    generator = torch.Generator().manual_seed(seed)
    return TokenScores(
        **{
            name: torch.rand(tokens, generator=generator).pow(3) * (-1 if name.endswith("logprob") else 1)
            for name in STATISTICS
        }
    )


def rollouts(tokens: int = TOKENS) -> torch.Tensor:
    return torch.arange(tokens) * ROLLOUTS // tokens


def generators(numbers) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(1000 + int(number)) for number in numbers]


def part(scores: TokenScores, rows: torch.Tensor) -> TokenScores:
    return scores.map(lambda value: value[rows])


@pytest.mark.parametrize("scope", ["rollout", "batch"])
@pytest.mark.parametrize("name", NAMES)
def test_a_choice_depends_on_no_token_of_another_rollout(name, scope):
    running = running_of(scores_of(0), name, 0.2, rollouts(), scope)
    scores, rollout = scores_of(1), rollouts()
    whole = select(scores, name, 0.2, rollout, scope, generators(range(ROLLOUTS)), running)
    for own in (rollout < 7, rollout == 7, rollout > 7):
        numbers = rollout[own].unique()
        alone = select(part(scores, own), name, 0.2, rollout[own], scope, generators(numbers), running)
        assert torch.equal(alone.mask, whole.mask[own])
        torch.testing.assert_close(alone.weight, whole.weight[own])


SPENDING = [name for name in NAMES if resolve_rule(name).budget not in ("all", "weight")]


@pytest.mark.parametrize("name", [name for name in SPENDING if name != "random"])  # whose scores are equal: see below
def test_a_threshold_of_like_tokens_keeps_about_the_budget(name):
    running = running_of(scores_of(0), name, 0.2, rollouts(), "batch")
    kept = select(scores_of(1), name, 0.2, rollouts(), "batch", generators(range(ROLLOUTS)), running).mask
    # 1,200 tokens: the count's standard deviation is below 3 % of it, twice over
    assert float(kept.float().mean()) == pytest.approx(0.2, rel=0.15)


def test_random_tokens_are_drawn_at_their_rate():
    running = running_of(scores_of(0), "random", 0.2, rollouts(), "batch")
    kept = select(scores_of(1), "random", 0.2, rollouts(), "batch", torch.Generator().manual_seed(0), running).mask
    assert float(kept.float().mean()) == pytest.approx(0.2, rel=0.1)


# a budget over the batch that is drawn is another draw by a threshold; its mean is tested below
EXACT = [(name, scope) for name in NAMES for scope in ("rollout", "batch")]
EXACT = [(name, scope) for name, scope in EXACT if scope == "rollout" or resolve_rule(name).budget not in DRAWN]


@pytest.mark.parametrize(("name", "scope"), EXACT)
def test_the_very_tokens_that_were_read_are_chosen_as_without(name, scope):
    """With the scales and the threshold of the same tokens a choice is the exact one, but for what is drawn."""
    rule = resolve_rule(name)
    scores, rollout = scores_of(0), rollouts()
    running = running_of(scores, name, 0.2, rollout, scope)
    exact = select(scores, name, 0.2, rollout, scope, torch.Generator().manual_seed(0))
    again = select(scores, name, 0.2, rollout, scope, torch.Generator().manual_seed(0), running)
    if rule.every_rollout and scope == "batch":  # the best of each rollout come on top of the threshold's
        assert bool((again.mask | ~exact.mask).all())
        return
    assert torch.equal(again.mask, exact.mask)
    if rule.budget == "weight":
        torch.testing.assert_close(again.weight, exact.weight / exact.weight.mean())
    elif rule.budget == "importance":
        torch.testing.assert_close(again.weight, exact.weight)


def test_inverse_probabilities_are_right_on_average():
    """Σ w·x / (ρ·N) over many draws is the mean of x over all tokens, whatever the threshold."""
    scores, rollout = scores_of(1, 400), torch.zeros(400, dtype=torch.int64)
    value = scores.require("entropy").double()
    for threshold_of in (scores_of(0, 400), scores_of(1, 400).map(lambda statistic: 3 * statistic)):
        running = running_of(threshold_of, "gradient_norm_sampling", 0.1, rollout, "batch")
        means = []
        for seed in range(4000):
            generator = torch.Generator().manual_seed(seed)
            kept = select(scores, "gradient_norm_sampling", 0.1, rollout, "batch", generator, running)
            means.append(float((kept.weight.double() * value).sum() / (0.1 * 400)))
        means = torch.tensor(means)
        error = float(means.std()) / len(means) ** 0.5
        assert float(means.mean()) == pytest.approx(float(value.mean()), abs=4 * error)


def test_values_beyond_the_ends_are_clipped_to_them():
    running = Running(scales=((0.0, 0.5), (0.0, 2.0)))
    scores = TokenScores(entropy_norm=torch.tensor([0.9, 0.1, 0.0]), reverse_kl=torch.tensor([0.0, 9.0, 1.0]))
    assert select(scores, "soft_or", 0.5, running=running).score.tolist() == [1.0, 1.0, 0.5]


def test_it_is_json_and_back():
    for name in NAMES:
        running = running_of(scores_of(0), name, 0.2, rollouts(), "batch")
        assert Running.of_state(json.loads(json.dumps(running.state()))) == running


def test_a_generator_for_each_rollout_is_asked_for():
    with pytest.raises(ValueError, match="one generator for each of the 30 rollouts, got 2"):
        select(scores_of(0), "random", 0.2, rollouts(), "rollout", generators(range(2)))


def test_a_rule_takes_the_order_or_the_scales():
    from tipdistill.select import Rule

    with pytest.raises(ValueError, match="not both"):
        Rule(lambda *arguments: arguments[0].require("entropy"), ("entropy",), ordered=True, scaled=True)
