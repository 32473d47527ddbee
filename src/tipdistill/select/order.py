"""Where each token stands in its rollout, for rules that read positions or what came before."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Order:
    """Places of N tokens in their rollouts; the tokens of a rollout are taken in the order they are given in.

    Attributes:
        group: int64 [N], the rollout of each token, numbered from 0.
        position: int64 [N], tokens of the same rollout that came before.
        length: int64 [N], tokens of the same rollout.
    """

    group: Tensor
    position: Tensor
    length: Tensor

    @staticmethod
    def of(rollout: Tensor) -> Order:
        """The order of tokens by the rollout that each belongs to, int64 [N]; rollouts may be interleaved.

        Example:
            >>> order = Order.of(torch.tensor([7, 3, 7, 7]))
            >>> order.position.tolist(), order.length.tolist()
            ([0, 0, 1, 2], [3, 1, 3, 3])
        """
        _, group, sizes = rollout.unique(return_inverse=True, return_counts=True)
        by_rollout = group.argsort(stable=True)
        starts = sizes.cumsum(0) - sizes
        position = torch.empty_like(group)
        position[by_rollout] = torch.arange(len(group), device=group.device) - starts[group[by_rollout]]
        return Order(group, position, sizes[group])

    def before(self, values: Tensor) -> Tensor:
        """Sum of the values of the earlier tokens of the same rollout, float64 [N].

        Example:
            >>> Order.of(torch.tensor([7, 3, 7, 7])).before(torch.tensor([1.0, 5.0, 2.0, 4.0])).tolist()
            [0.0, 0.0, 1.0, 3.0]
        """
        by_rollout = self.group.argsort(stable=True)
        position = self.position[by_rollout]
        sums = values[by_rollout].double()
        # doubling steps that never cross into another rollout, whose sums would round these away
        step = 1
        while step <= int(position.max()):
            sums = torch.where(position >= step, sums + sums.roll(step), sums)
            step *= 2
        before = torch.empty_like(sums)
        before[by_rollout] = torch.where(position > 0, sums.roll(1), 0.0)
        return before

    def total(self, values: Tensor) -> Tensor:
        """Sum of the values of all tokens of the same rollout, float64 [N].

        Example:
            >>> Order.of(torch.tensor([7, 3, 7, 7])).total(torch.tensor([1.0, 5.0, 2.0, 4.0])).tolist()
            [7.0, 5.0, 7.0, 7.0]
        """
        values = values.double()
        return torch.zeros_like(values).index_add_(0, self.group, values)[self.group]
