"""What a function costs: the matmuls it does and the memory it takes, counted and not timed."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import measure


def matmul_flops(function):
    """Floating-point operations of all matmuls (2 per multiply-add)."""

    def addmm_(total, left, right, **kwargs):
        return 2 * left[0] * left[1] * right[1]

    # torch's own registry leaves the in-place form out
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_}) as counter:
        function()
    return counter.get_total_flops()


def peak_bytes(function):
    """The most memory that tensors allocated by `function` held at once, in bytes."""
    return measure.peak_bytes(function, "cpu")
