"""A probe's advice on cases where the answer is known."""

from dataclasses import replace

import pytest
import torch

from tipdistill.advice import recommend, warnings_of
from tipdistill.types import Rollout, TokenScores


def row_of(rule, retention, share, low, **others):
    return {
        "rule": rule,
        "retention": retention,
        "kept": retention,
        "divergence_share": 0.9,
        "q2_of_kept": 0.1,
        "descent": share,
        "descent_share": share,
        "descent_interval": [low, share],
        "descent_share_interval": [low, 1.0],
        "over_random_interval": [0.1, 0.2],
        **others,
    }


ALL = row_of("all", 1.0, 1.0, 1.0, over_random_interval=None)


def test_the_least_retention_that_keeps_the_signal_is_recommended():
    rows = [
        ALL,
        row_of("soft_or", 0.5, 1.0, 0.99),
        row_of("soft_or", 0.2, 0.97, 0.93),
        row_of("q3", 0.2, 0.99, 0.95),
        row_of("q3", 0.1, 0.95, 0.8),
        row_of("q3", 0.05, 1.0, 0.99),
        row_of("random", 0.2, 0.5, 0.4),
    ]
    best = recommend(rows, [])
    assert (best["rule"], best["retention"]) == ("q3", 0.2)
    assert "random tokens: 0.50" in best["reason"]
    best = recommend(rows, [((("q3", 0.1), ("q3", 0.2)), "known to fail")])
    assert (best["rule"], best["retention"]) == ("soft_or", 0.2)


def test_all_tokens_where_no_rule_keeps_the_signal():
    rows = [ALL, row_of("q3", 0.2, 0.95, 0.5), row_of("random", 0.2, 0.5, 0.4)]
    assert recommend(rows, [])["rule"] == "all"


def advice(rows, rollouts, uncertain_share=0.3, prompts=80, heaviest=0.1, largest=2.0):
    count = 100
    quadrant = torch.full((count,), 4, dtype=torch.int8)
    quadrant[: int(uncertain_share * count)] = 2
    quadrant[-3:] = 3
    delta = torch.zeros(count, dtype=torch.float64)
    delta[-3:] = torch.tensor([1.0, 1.0, largest])
    warnings = warnings_of(rows, TokenScores(reverse_kl=delta), quadrant, rollouts, prompts, heaviest, ["soft_or"])
    return [text for _, text in warnings]


@pytest.fixture
def finished():
    return [Rollout(number, "p", (1,), (2, 3), finished=True) for number in range(4)]


def test_a_budget_smaller_than_the_uncertain_share_is_warned_of(finished):
    spent = {"q2_of_kept": 0.9}
    assert (
        "soft_or at 0.2 keeps fewer, and spends up to 90% of them on tokens both models agree on"
        in advice([ALL, row_of("soft_or", 0.2, 0.1, 0.1, **spent)], finished)[0]
    )
    assert not advice([ALL, row_of("soft_or", 0.5, 1, 0.9, **spent)], finished)
    assert not advice([ALL, row_of("gradient_norm", 0.2, 1, 0.9, **spent)], finished)


def test_a_rule_that_turns_away_is_warned_of_at_small_budgets(finished):
    assert "may collapse in training" in advice([ALL, row_of("q3", 0.05, 1, 1)], finished)[0]
    assert not advice([ALL, row_of("q3", 0.1, 1, 1)], finished)


def test_a_warning_names_all_that_it_is_about_at_once(finished):
    beside = {"over_random_interval": [-0.1, 0.3]}
    rows = [ALL, *(row_of(rule, at, 1, 0.9, **beside) for at in (0.5, 0.05) for rule in ("soft_or", "q3"))]
    collapse, alike = advice(rows, finished)
    assert collapse.startswith("q3 at 0.05 may collapse")
    assert alike.startswith("soft_or at 0.5 and 0.05, q3 at 0.5 and 0.05 is not told apart")


@pytest.mark.parametrize(
    ("rows", "options", "text"),
    [
        ([ALL, row_of("q3", 0.2, 1, 0.9, over_random_interval=[-0.1, 0.3])], {}, "not told apart from random"),
        ([ALL], {"largest": 500.0}, "dwarfs the others"),
        ([ALL], {"heaviest": 0.6}, "one prompt makes up 60% of the squared gradient norms"),
        ([ALL], {"prompts": 9}, "9 prompts are few"),
        ([{**ALL, "descent_interval": [-0.1, 1.0]}], {}, "does not reliably lower the held-out loss"),
    ],
    ids=["random", "outlier", "heavy", "few", "noise"],
)
def test_further_warnings(finished, rows, options, text):
    (found,) = advice(rows, finished, **options)
    assert text in found


def test_rollouts_cut_at_the_limit_are_warned_of(finished):
    cut = [replace(rollout, finished=False) for rollout in finished]
    assert "were cut at the length limit" in advice([ALL], cut)[0]
