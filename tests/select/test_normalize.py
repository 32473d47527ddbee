"""Percentile, clip and min-max over the tokens given."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tipdistill.select.normalize import clipped_entropy, min_max, percentile

FINITE = st.floats(-1e6, 1e6, allow_subnormal=False)


@settings(deadline=None)
@given(st.lists(FINITE, min_size=1, max_size=60), st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.5, 0.98, 1.0])))
def test_percentile_is_numpys(values, share):
    ours = percentile(torch.tensor(values, dtype=torch.float64), share).item()
    assert ours == pytest.approx(float(np.quantile(values, share)), rel=1e-12, abs=1e-9)


def test_percentile_of_more_values_than_torch_quantile_takes():
    # in falling order: torch.kthvalue would take hours
    values = torch.arange(2**24 + 2, dtype=torch.float64).flip(0)
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(values, 0.98)
    assert percentile(values, 0.98).item() == pytest.approx(0.98 * (2**24 + 1), rel=1e-14)


@settings(deadline=None)
@given(st.lists(FINITE, min_size=2, max_size=60))
def test_min_max_spans_0_to_1_and_keeps_the_order(values):
    given_values = torch.tensor(values, dtype=torch.float64)
    ours = min_max(given_values)
    if len(set(values)) == 1:
        assert ours.tolist() == [0.0] * len(values)
    else:
        assert (ours.min().item(), ours.max().item()) == (0.0, 1.0)
    assert bool((ours[given_values.argsort()].diff() >= 0).all())


def test_entropy_is_clipped_at_its_98th_percentile():
    entropy = torch.arange(101, dtype=torch.float64) / 100  # the 98th percentile is 0.98
    expected = (torch.arange(101, dtype=torch.float64) / 98).clamp(max=1)
    torch.testing.assert_close(clipped_entropy(entropy), expected)


def test_the_clip_takes_the_outlier_out_of_the_normaliser():
    entropy = torch.cat([torch.linspace(0, 0.1, 1001), torch.ones(1)])
    # half of the ordinary range, of which the clip leaves 98 %; without it, a twentieth
    assert clipped_entropy(entropy)[500].item() == pytest.approx(0.5 / 0.98, abs=2e-3)
    assert min_max(entropy)[500].item() == pytest.approx(0.05)


def test_equal_entropies_are_0_everywhere():
    assert clipped_entropy(torch.full((7,), 0.4)).tolist() == [0.0] * 7


def test_one_token_is_0():
    assert clipped_entropy(torch.tensor([0.4])).tolist() == [0.0]
