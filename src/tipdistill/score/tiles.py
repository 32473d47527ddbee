"""One tile of logits: the projection that makes it, and the products that carry its gradient back.

`Projection` is an lm_head without hidden states; `Gradients` is where the gradients of a backward add up. Everything
that computes in tiles (chunked.py, triton.py, top.py) is made of these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..types import Head

# Stands for a logit of −∞, and so does whatever is lower: its square is finite and its exponential 0, so that sums stay
# free of NaN. A logit as far above 0 is refused, with NaN and +∞.
NEGATIVE = -1e18

# On a CPU torch.mm is the BLAS it was built with; oneDNN, which torch ships beside it, takes a tenth less time for a
# projection (docs/engine.md). torch offers it for float32 under this private name alone, so torch.mm is the fallback.
# Not for the gradients: it sums thousands of columns one after another, and loses a bit where the BLAS sums in blocks.
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
if ONEDNN:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _(hidden: Sequence[int], weight: Sequence[int], *rest: Any, **options: Any) -> int:
        """What FlopCounterMode counts for it: torch leaves it out."""
        return 2 * hidden[0] * hidden[1] * weight[0]


# (statistics of rows, the first of them, behind the last) → their factors in a loss, float [R]
Choose = Callable[[dict[str, Tensor], int, int], Tensor]


@dataclass(frozen=True)
class Projection:
    """An lm_head without its hidden states, truncated to the shared vocabulary."""

    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None
    temperature: float

    @staticmethod
    def of(head: Head, vocabulary: int, temperature: float) -> Projection:
        bias = None if head.bias is None else head.bias.detach()[:vocabulary]
        return Projection(head.weight.detach()[:vocabulary], bias, head.logit_scale, head.softcap, temperature)

    def rows(self, start: int, stop: int, hidden: Tensor) -> Tensor:
        """Rows [start, stop) of the weight, in the dtype that `hidden` is multiplied in."""
        return _operand(self.weight[start:stop], hidden)

    def logits(self, hidden: Tensor, weight: Tensor, start: int) -> Tensor:
        """Logits of the weight's `rows` from `start` on, float32 (float64); −∞ becomes NEGATIVE."""
        out = project(hidden, weight)
        if self.bias is not None:
            out.add_(self.bias[start : start + len(weight)].to(out.dtype))
        if self.softcap is None:
            if self.scale != 1.0:
                out.mul_(self.scale)
        else:
            out.mul_(self.logit_scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)
        return out.clamp_(min=NEGATIVE)

    def slope(self, logits: Tensor) -> Tensor | None:
        """∂ logits / ∂ (hidden @ weight.T) where it is no constant; `scale` is the constant part."""
        if self.softcap is None:
            return None
        # tanh = logits · temperature / softcap, and tanh' = 1 − tanh²
        return (logits * (self.temperature / self.softcap)).square_().neg_().add_(1.0)

    @property
    def scale(self) -> float:
        return self.logit_scale / self.temperature


def accumulation_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _keeps_half(hidden: Tensor) -> bool:
    """Whether matmuls run on half-precision operands with float32 results (a GPU does; a CPU converts first)."""
    return hidden.is_cuda and hidden.dtype in (torch.float16, torch.bfloat16)


def _operand(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.to(like.dtype if _keeps_half(like) else accumulation_dtype(like))


def project(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden @ weight.T in float32 (float64 for float64)."""
    if _keeps_half(hidden):
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    if ONEDNN and hidden.dtype == torch.float32 and not hidden.is_cuda:
        return torch.ops.mkldnn._linear_pointwise(hidden, weight, None, "none", [], "")
    return torch.mm(hidden, weight.t())


def _accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in total's dtype."""
    if right.dtype == total.dtype:
        total.addmm_(left, right)
    else:  # half-precision operands, float32 total
        total.add_(torch.mm(left.to(right.dtype), right, out_dtype=torch.float32))


def without_infinities(weight: Tensor) -> Tensor:
    """0 for weights of ±∞: a token whose logit they make −∞ has a gradient of 0, and 0 · ∞ is none.

    Example:
        >>> without_infinities(torch.tensor([1.0, -math.inf]))
        tensor([1., 0.])
    """
    return weight.masked_fill(weight.isinf(), 0.0)


def _like(tile: Tensor, memory: Tensor) -> Tensor:
    """A tensor of a tile's shape in memory that is there."""
    return memory[: tile.numel()].view(tile.shape)


def _spans(size: int, step: int) -> Iterator[tuple[int, int]]:
    for start in range(0, size, step):
        yield start, min(start + step, size)


def _even(size: int, most: int) -> int:
    """The step that covers `size` in as few steps as `most` does, of nearly equal length."""
    return max(1, math.ceil(size / max(1, math.ceil(size / most))))


def packed(lengths: Sequence[int], most: int) -> list[tuple[int, int]]:
    """Spans of rows that hold whole groups, up to `most` rows each; a longer group has one of its own.

    Args:
        lengths: rows of each group, one after the other.
        most: rows.

    Example:
        >>> packed([2, 3, 0, 4, 7], 5)
        [(0, 5), (5, 9), (9, 16)]
    """
    spans: list[tuple[int, int]] = []
    row = 0
    for length in lengths:
        if spans and row + length - spans[-1][0] <= most:
            spans[-1] = spans[-1][0], row + length
        elif length:
            spans.append((row, row + length))
        row += length
    return spans


@dataclass
class Gradients:
    """Where the gradients of one backward accumulate, float32 (or float64); None for what needs none."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @staticmethod
    def zeros(hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool]) -> Gradients:
        dtype = accumulation_dtype(hidden)

        def zeros(like: Tensor | None, need: bool) -> Tensor | None:
            if like is None or not need:
                return None
            return torch.zeros(like.shape, dtype=dtype, device=like.device)

        return Gradients(zeros(hidden, needs[0]), zeros(weight, needs[1]), zeros(bias, needs[2]))

    def add(self, gradient: Tensor, hidden: Tensor, weight: Tensor, row: int, start: int) -> None:
        """Add the products of one tile: rows from `row`, vocabulary from `start`."""
        rows, columns = gradient.shape
        if self.hidden is not None:
            _accumulate(self.hidden[row : row + rows], gradient, weight)
        if self.weight is not None:
            _accumulate(self.weight[start : start + columns], gradient.t(), hidden)
        if self.bias is not None:
            self.bias[start : start + columns] += gradient.sum(0)
