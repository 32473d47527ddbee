"""Quadrants: thresholds, names, shares."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tipdistill import TokenScores, quadrants
from tipdistill.select.quadrants import quadrant_shares


def scores_of(entropy, divergence):
    return TokenScores(entropy_norm=torch.as_tensor(entropy), reverse_kl=torch.as_tensor(divergence))


def test_each_quadrant_is_where_the_paper_has_it():
    uncertain_wrong, uncertain_agreed, confident_wrong, solved = (1.0, 5.0), (1.0, 0.0), (0.0, 5.0), (0.0, 0.0)
    tokens = torch.tensor([uncertain_wrong, uncertain_agreed, confident_wrong, solved])
    quadrant = quadrants(scores_of(tokens[:, 0], tokens[:, 1]))
    assert quadrant.tolist() == [1, 2, 3, 4]
    assert quadrant.dtype == torch.int8


def test_thresholds_belong_to_the_upper_side():
    # the clip leaves 0.98 as the maximum of ĥ's range, so that ĥ = 0.2 is met exactly by an entropy of 0.196
    entropy = torch.arange(101, dtype=torch.float64) / 100
    entropy[20] = 0.196
    divergence = torch.full((101,), 0.1, dtype=torch.float64)
    divergence[50] = 0.0999
    quadrant = quadrants(TokenScores(entropy_norm=entropy, reverse_kl=divergence))
    assert quadrant[[19, 21]].tolist() == [3, 1]
    assert quadrant[50] == 2
    assert quadrants(scores_of([0.0, 1.0], [0.1, 0.1])).tolist() == [3, 1]


def test_thresholds_can_be_chosen():
    scores = scores_of([0.0, 0.3, 0.6, 1.0], [0.0, 0.05, 0.5, 3.0])
    assert quadrants(scores).tolist() == [4, 2, 1, 1]
    assert quadrants(scores, entropy_threshold=0.5).tolist() == [4, 4, 1, 1]
    assert quadrants(scores, divergence_threshold=1.0).tolist() == [4, 2, 2, 1]


def test_entropy_in_nats_gives_the_same_quadrants():
    entropy, divergence = torch.linspace(0, 1, 50), torch.linspace(3, 0, 50)
    nats = TokenScores(entropy=entropy * 11.9, reverse_kl=divergence)
    assert torch.equal(quadrants(nats), quadrants(scores_of(entropy, divergence)))


@settings(deadline=None)
@given(st.integers(1, 50), st.integers(0, 1000), st.floats(0, 1), st.floats(0, 5))
def test_every_token_has_one_quadrant_and_shares_add_up(tokens, seed, entropy_threshold, divergence_threshold):
    generator = torch.Generator().manual_seed(seed)
    entropy, divergence = torch.rand(2, tokens, generator=generator)
    quadrant = quadrants(scores_of(entropy, 6 * divergence), entropy_threshold, divergence_threshold)
    assert set(quadrant.tolist()) <= {1, 2, 3, 4}
    for weight in (None, divergence):
        shares = quadrant_shares(quadrant, weight)
        assert list(shares) == [1, 2, 3, 4]
        assert sum(shares.values()) == pytest.approx(1)


def test_shares_are_of_the_tokens_or_of_what_they_weigh():
    quadrant = torch.tensor([1, 1, 3, 4, 4, 4, 4, 4, 4, 4], dtype=torch.int8)
    assert quadrant_shares(quadrant) == {1: 0.2, 2: 0.0, 3: 0.1, 4: 0.7}
    weight = torch.tensor([1.0, 2.0, 6.0, 1.0, 0, 0, 0, 0, 0, 0])
    assert quadrant_shares(quadrant, weight) == {1: 0.3, 2: 0.0, 3: 0.6, 4: 0.1}
    assert quadrant_shares(quadrant, torch.zeros(10)) == {1: 0.0, 2: 0.0, 3: 0.0, 4: 0.0}


def test_no_token_has_no_shares():
    assert quadrants(scores_of(torch.zeros(0), torch.zeros(0))).shape == (0,)
    with pytest.raises(ValueError, match="no token"):
        quadrant_shares(torch.zeros(0, dtype=torch.int8))


@pytest.mark.parametrize(
    ("thresholds", "message"),
    [
        ({"entropy_threshold": 1.5}, r"entropy_threshold must be in \[0, 1\], got 1.5"),
        ({"entropy_threshold": float("nan")}, "entropy_threshold"),
        ({"divergence_threshold": -1.0}, "divergence_threshold must be a number of nats ≥ 0, got -1.0"),
        ({"divergence_threshold": float("inf")}, "divergence_threshold"),
    ],
)
def test_thresholds_out_of_range_are_refused(thresholds, message):
    with pytest.raises(ValueError, match=message):
        quadrants(scores_of([0.5, 0.1], [0.5, 0.1]), **thresholds)


@pytest.mark.parametrize("entropy", [[float("nan"), 0.1], [0.1, 0.2]])
def test_a_token_without_a_distribution_has_no_quadrant(entropy):
    with pytest.raises(ValueError, match="is NaN"):
        quadrants(scores_of(entropy, [0.5, 0.5 if entropy[0] != 0.1 else float("nan")]))


def test_an_infinite_divergence_is_a_high_one():
    assert quadrants(scores_of([0.0, 1.0], [float("inf"), 0.0])).tolist() == [3, 2]


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"must be \[N\], got \[2\] and \[3\]"):
        quadrants(scores_of([0.0, 1.0], [0.0, 1.0, 2.0]))
    with pytest.raises(ValueError, match="weight must be"):
        quadrant_shares(torch.ones(3, dtype=torch.int8), torch.ones(2))
    with pytest.raises(ValueError, match="statistic 'reverse_kl' was not computed"):
        quadrants(TokenScores(entropy_norm=torch.ones(3)))
