"""Percentile clip and min-max over the tokens given: a micro-batch, a batch, or the batch of all ranks.

Each of these reads a low and a high end off the tokens and scales by them. With `Scales` the ends are remembered, and
other tokens are scaled by the very same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

ENTROPY_PERCENTILE = 0.98


class Scales:
    """The ends that a rule's scalings read, in the order in which it asks: those of its tokens, or those of others.

    Args:
        known: (low, high) of each scaling, as `read` had them of other tokens; None: they are read off the tokens.

    Example:
        >>> scales = Scales()
        >>> min_max(torch.tensor([1.0, 3.0, 5.0]), scales)
        tensor([0.0000, 0.5000, 1.0000])
        >>> scales.read
        [(1.0, 5.0)]
        >>> min_max(torch.tensor([0.0, 2.0]), Scales(scales.read))
        tensor([0.0000, 0.2500])
    """

    def __init__(self, known: Sequence[tuple[float, float]] | None = None) -> None:
        self._known = None if known is None else list(known)
        self._read: list[tuple[Tensor, Tensor]] = []
        self._asked = 0

    @property
    def read(self) -> list[tuple[float, float]]:
        """The ends that were read."""
        return [(float(low), float(high)) for low, high in self._read]

    def ends(self, values: Tensor, of: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Low and high end of the next scaling, scalar tensors.

        Args:
            values: float [N].
            of: reads them off the values.
        """
        if self._known is None:
            self._read.append(of(values))
            return self._read[-1]
        low, high = self._known[self._asked]
        self._asked += 1
        return values.new_tensor(low), values.new_tensor(high)


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


def min_max(values: Tensor, scales: Scales | None = None) -> Tensor:
    """(x − min) / (max − min), in [0, 1]; 0 everywhere where all values are equal.

    Args:
        values: float [N], N ≥ 1.
        scales: where minimum and maximum come from; None: these values.

    Example:
        >>> min_max(torch.tensor([2.0, 3.0, 6.0]))
        tensor([0.0000, 0.2500, 1.0000])
    """
    return _between(values, *_ends(values, extremes, scales))


def clipped_entropy(entropy_norm: Tensor, scales: Scales | None = None) -> Tensor:
    """ĥ: clip at the 98th percentile of the tokens given, then min-max (paper §6).

    Where the percentile is the minimum itself (98 % of the tokens are equally certain) the clip would map every token
    to the same number and the entropy would drop out of every rule, so the maximum is used instead.

    Args:
        entropy_norm: float [N], H(P_S) / log V.
        scales: where minimum and percentile come from; None: these values.

    Example:
        >>> clipped_entropy(torch.tensor([0.0] * 99 + [0.5])).max()
        tensor(1.)
    """
    return _between(entropy_norm, *_ends(entropy_norm, _clip, scales))


def between_percentiles(values: Tensor, low: float = 0.05, high: float = 0.95, scales: Scales | None = None) -> Tensor:
    """Clip to two percentiles of the tokens given, then scale to [0, 1].

    Where the two are equal (nine tokens in ten agree) minimum and maximum take their place; where all values are equal
    each becomes 1, so that a product is left to its other factors.

    Args:
        values: float [N], N ≥ 1.
        low, high: which percentiles, as shares.
        scales: where the percentiles come from; None: these values.

    Example:
        >>> between_percentiles(torch.arange(101.0))[[0, 50, 100]].tolist()
        [0.0, 0.5, 1.0]
    """

    def ends(values: Tensor) -> tuple[Tensor, Tensor]:
        bottom, top = percentile(values, low), percentile(values, high)
        return (bottom, top) if bool(bottom < top) else extremes(values)

    bottom, top = _ends(values, ends, scales)
    return _between(values, bottom, top) if bool(bottom < top) else torch.ones_like(values)


def _ends(
    values: Tensor, of: Callable[[Tensor], tuple[Tensor, Tensor]], scales: Scales | None
) -> tuple[Tensor, Tensor]:
    return of(values) if scales is None else scales.ends(values, of)


def extremes(values: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum and maximum."""
    return values.min(), values.max()


def _clip(entropy_norm: Tensor) -> tuple[Tensor, Tensor]:
    top = percentile(entropy_norm, ENTROPY_PERCENTILE)
    low, high = extremes(entropy_norm)
    return low, torch.where(top > low, top, high)


def _between(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Clipped to [low, high] and scaled to [0, 1]; 0 where the two are one."""
    spread = high - low
    scaled = (torch.maximum(torch.minimum(values, high), low) - low) / torch.where(spread > 0, spread, 1.0)
    return torch.where(spread > 0, scaled, 0.0)
