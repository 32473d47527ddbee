"""What the trainer needs of accelerate beyond its public face: the teacher sharded like the student."""

from __future__ import annotations

import copy
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType

from ._trl import maybe_gather_lm_head_ctx, prepare_deepspeed

__all__ = ["calling_lm_head", "check_sharding", "keep_output_dtype", "prepare_teacher", "reading_lm_head"]


def prepare_teacher(teacher: Any, accelerator: Accelerator) -> Any:
    """A frozen teacher as the engine runs it: sharded under FSDP2 and ZeRO-3, whole on every device elsewhere.

    accelerate shards a model together with its optimizer and leaves one without an optimizer as it is, so a teacher
    prepared in its `evaluation_mode` would have to fit on every GPU.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return prepare_deepspeed(teacher, accelerator)
    if not getattr(accelerator, "is_fsdp2", False):
        return accelerator.prepare_model(teacher, evaluation_mode=True)
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model  # here, since releases without FSDP2 lack it
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    plugin = accelerator.state.fsdp_plugin
    own = copy.copy(plugin)  # the student's plugin remembers the layers it wraps, which the teacher may not have
    if getattr(teacher, "_no_split_modules", None) and own.transformer_cls_names_to_wrap is not None:
        own.transformer_cls_names_to_wrap = None
        own.auto_wrap_policy = transformer_auto_wrap_policy
    accelerator.state.fsdp_plugin = own
    try:
        return fsdp2_prepare_model(accelerator, teacher).requires_grad_(False).eval()
    finally:
        accelerator.state.fsdp_plugin = plugin


def keep_output_dtype(accelerator: Accelerator) -> None:
    """Let FSDP2 return what a forward computes: scores and loss are float32, whatever the parameters are cast to.

    accelerate's mixed precision casts outputs to bfloat16 as well. Called before the student is sharded, in `train`.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)


def check_sharding(accelerator: Accelerator) -> None:
    """Refuse a run whose sharding was asked for and silently replaced, as accelerate does on a CPU.

    Raises:
        ValueError: FSDP or DeepSpeed was asked for and is not what runs, or FSDP is of version 1.
    """
    for name, engine, kind in (
        ("ACCELERATE_USE_FSDP", "FSDP", DistributedType.FSDP),
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed", DistributedType.DEEPSPEED),
    ):
        if os.environ.get(name, "false").lower() == "true" and accelerator.distributed_type != kind:
            raise ValueError(
                f"{engine} was asked for ({name}) and accelerate runs {accelerator.distributed_type.value} instead: "
                f"{engine} needs GPUs. Launch with GPUs and without use_cpu, or without {engine}."
            )
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError(
            "FSDP version 1 flattens the lm_heads that the loss reads, so it is not supported: set fsdp_version: 2 "
            "(`accelerate to-fsdp2` converts a configuration)."
        )


def shards_weights() -> bool:
    """Whether each process of this run holds a part of the weights; known before an Accelerator is there."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    by_fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return by_fsdp or os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3" or is_deepspeed_zero3_enabled()


@contextmanager
def calling_lm_head(layer: Any) -> Iterator[None]:
    """Let a whole model be called once, although its lm_head is read and not called afterwards.

    ZeRO-3 remembers which modules were called and fetches their weights ahead the next time; those of an lm_head would
    be on their way when they are gathered to be read. So the call passes by its hooks.

    Args:
        layer: the lm_head.
    """
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if not is_deepspeed_zero3_enabled():
        yield
        return
    forward: Callable[..., Any] = layer.forward
    own = layer.__dict__.get("forward")
    hooks = [(module, module._forward_pre_hooks, module._forward_hooks) for module in layer.modules()]

    def gathered(*arguments: Any, **options: Any) -> Any:
        with maybe_gather_lm_head_ctx(*layer.parameters()):
            return forward(*arguments, **options)

    for module, _, _ in hooks:
        module._forward_pre_hooks, module._forward_hooks = OrderedDict(), OrderedDict()
    layer.forward = gathered
    try:
        yield
    finally:
        del layer.forward
        if own is not None:
            layer.forward = own
        for module, before, after in hooks:
            module._forward_pre_hooks, module._forward_hooks = before, after


def reading_lm_head(layer: Any) -> AbstractContextManager[Any]:
    """While a loss reads the weights of an lm_head, they are whole; under ZeRO-3 until its backward has ended.

    Each is read as an attribute of its module. ZeRO-3 sees that inside a forward, fetches what lies in parts, and keeps
    it to the end of the backward, where its gradient has to find it whole. `parameters()` passes by unseen.

    Args:
        layer: the lm_head, as it is or wrapped by PEFT.
    """
    parameters = [getattr(module, name) for module in layer.modules() for name in module._parameters]
    return maybe_gather_lm_head_ctx(*parameters)
