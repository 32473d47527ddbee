"""Percentile clip and min-max over the tokens given: a micro-batch, a batch, or the batch of all ranks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

ENTROPY_PERCENTILE = 0.98


def percentile(values: Tensor, share: float) -> Tensor:
    """The `share` quantile with linear interpolation, as numpy computes it, for any number of values.

    Args:
        values: float [N], N ≥ 1.
        share: in [0, 1].

    Returns:
        float [], a scalar tensor.

    Example:
        >>> percentile(torch.tensor([0.0, 1.0, 2.0, 4.0]), 0.5)
        tensor(1.5000)
    """
    position = share * (len(values) - 1)
    below = math.floor(position)
    # torch.quantile takes 2²⁴ values at most, and kthvalue quadratic time where they come in falling order
    highest = torch.topk(values, len(values) - below).values
    low, high = highest[-1], highest[-2:][0]
    return low + (high - low) * (position - below)


def min_max(values: Tensor) -> Tensor:
    """(x − min) / (max − min), in [0, 1]; 0 everywhere where all values are equal.

    Args:
        values: float [N], N ≥ 1.

    Example:
        >>> min_max(torch.tensor([2.0, 3.0, 6.0]))
        tensor([0.0000, 0.2500, 1.0000])
    """
    low, high = values.min(), values.max()
    spread = high - low
    return torch.where(spread > 0, (values - low) / torch.where(spread > 0, spread, 1.0), 0.0)


def clipped_entropy(entropy_norm: Tensor) -> Tensor:
    """ĥ: clip at the 98th percentile of the tokens given, then min-max (paper §6).

    Where the percentile is the minimum itself (98 % of the tokens are equally certain) the clip would map every token
    to the same number and the entropy would drop out of every rule, so the maximum is used instead.

    Args:
        entropy_norm: float [N], H(P_S) / log V.

    Example:
        >>> clipped_entropy(torch.tensor([0.0] * 99 + [0.5])).max()
        tensor(1.)
    """
    top = percentile(entropy_norm, ENTROPY_PERCENTILE)
    top = torch.where(top > entropy_norm.min(), top, entropy_norm.max())
    return min_max(torch.minimum(entropy_norm, top))


def between_percentiles(values: Tensor, low: float = 0.05, high: float = 0.95) -> Tensor:
    """Clip to two percentiles of the tokens given, then scale to [0, 1].

    Where the two are equal (nine tokens in ten agree) minimum and maximum take their place; where all values are equal
    each becomes 1, so that a product is left to its other factors.

    Args:
        values: float [N], N ≥ 1.
        low, high: which percentiles, as shares.

    Example:
        >>> between_percentiles(torch.arange(101.0))[[0, 50, 100]].tolist()
        [0.0, 0.5, 1.0]
    """
    bottom, top = percentile(values, low), percentile(values, high)
    if bool(values.min() == values.max()):
        return torch.ones_like(values)
    return min_max(values.clamp(bottom, top) if bool(bottom < top) else values)
