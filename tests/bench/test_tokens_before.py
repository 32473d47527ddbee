"""The figures of the tokens before distillation: intervals over rollouts, and rank correlations."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

spec = importlib.util.spec_from_file_location(
    "tokens_before", Path(__file__).parents[2] / "benchmarks" / "tokens_before.py"
)
tokens_before = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tokens_before)


def test_an_interval_is_over_rollouts_and_not_over_tokens():
    random = np.random.default_rng(0)
    of_rollout = random.normal(size=400)
    rollout = np.repeat(np.arange(400), 50)
    found = tokens_before.mean_over_rollouts(of_rollout[rollout], rollout)
    low, high = found["interval"]
    assert found["mean"] == pytest.approx(of_rollout.mean())
    # 50 tokens that are all alike are one observation
    assert (high - low) / 2 == pytest.approx(1.96 * of_rollout.std() / 20, rel=0.05)
    assert low < found["mean"] < high


def test_long_rollouts_weigh_what_their_tokens_do():
    value, rollout = np.array([1.0, 0.0, 0.0, 0.0]), np.array([0, 1, 1, 1])
    assert tokens_before.mean_over_rollouts(value, rollout)["mean"] == 0.25


def test_ranks_are_shared_by_ties():
    one = np.array([1.0, 2.0, 2.0, 10.0])
    assert tokens_before.rank_correlation(one, one**3) == pytest.approx(1)
    assert tokens_before.rank_correlation(one, -one) == pytest.approx(-1)
    # ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4
    assert tokens_before.rank_correlation(one, np.arange(4.0)) == pytest.approx(4.5 / np.sqrt(4.5 * 5))
