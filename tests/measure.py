"""What a function costs: the matmuls it does and the memory it takes, counted and not timed."""

import torch
from torch.utils.flop_counter import FlopCounterMode


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
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
