"""Runs of verl under which our loss would be wrong, each refused with what to set instead (docs/verl.md lists them).

`check_launch` calls these on a whole configuration, before a GPU is taken; the loss calls them again in a run.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from ..select import rule_fields

STRATEGIES = ("fsdp", "fsdp2")


def check_trl() -> None:
    """Refuse a TRL beside verl that stops its workers.

    Raises:
        ValueError: TRL 1 or later is installed.
    """
    try:
        installed = version("trl")
    except PackageNotFoundError:
        return
    if int(installed.split(".")[0]) >= 1:
        raise ValueError(
            f"TRL {installed} is installed, and verl's FSDP workers import AutoModelForCausalLMWithValueHead from it, "
            "which TRL 1 does not have: pip uninstall trl (tipdistill's verl integration does not need it)."
        )


def check_strategy(strategy: str) -> None:
    """Refuse engines whose logits are not whole.

    Args:
        strategy: `actor.strategy`.

    Raises:
        ValueError: it is not one of `STRATEGIES`.

    Example:
        >>> check_strategy("fsdp2")
    """
    if strategy not in STRATEGIES:
        raise ValueError(
            f"actor.strategy={strategy} is not supported: Megatron shards the vocabulary's logits and VeOmni may fuse "
            f"them. Set actor_rollout_ref.actor.strategy to one of {', '.join(STRATEGIES)}."
        )


def check_temperature(temperature: Any) -> None:
    """Refuse temperatures at which verl's student and teacher are not comparable.

    Args:
        temperature: `rollout.temperature`, or the tensor of it in a batch.

    Raises:
        ValueError: it is not 1.

    Example:
        >>> check_temperature(torch.ones(3))
    """
    temperature = temperature if isinstance(temperature, Tensor) else torch.tensor(float(_unwrapped(temperature)))
    if bool((temperature != 1).any()):
        raise ValueError(
            f"rollout.temperature must be 1.0, got {temperature.unique().tolist()}: verl divides the student's logits "
            "by it and not the teacher's, so their divergence would be of two different temperatures."
        )


def _unwrapped(value: Any) -> Any:
    return getattr(value, "data", value)  # tensordict's NonTensorData


def check_fused(fused: bool, loss_config: Any) -> None:
    """Refuse fused kernels where the loss reads logits.

    Args:
        fused: `model.use_fused_kernels`.
        loss_config: a SelectedLossConfig.

    Raises:
        ValueError: both are asked for.
    """
    if fused and loss_config.given == "top_k":
        raise ValueError(
            f"loss_mode={loss_config.loss_mode} needs the student's logits, and with fused kernels there are none: set "
            "actor_rollout_ref.model.use_fused_kernels=False."
        )


def check_sequence_parallel(size: int) -> None:
    """Refuse ranks that hold a part of each rollout.

    Args:
        size: `ulysses_sequence_parallel_size`.

    Raises:
        ValueError: it is above 1.

    Example:
        >>> check_sequence_parallel(1)
    """
    if size > 1:
        raise ValueError(
            f"ulysses_sequence_parallel_size={size} is not supported: a rank then holds a part of each rollout. Set it "
            "to 1; packing (use_remove_padding) and dynamic micro-batches are fine."
        )


def check_entropy(computed: bool, loss_config: Any) -> None:
    """Refuse a rule that reads the entropy where verl does not compute it.

    Args:
        computed: whether verl computes it.
        loss_config: a SelectedLossConfig.

    Raises:
        ValueError: it does not, and the logits are not ours to compute it from.
    """
    reads = rule_fields(loss_config.selection_rule) or ()
    if loss_config.given == "sampled" and not computed and not {"entropy", "entropy_norm"}.isdisjoint(reads):
        raise ValueError(
            f"selection_rule={loss_config.selection_rule!r} reads the student's entropy, which verl computes beside "
            f"loss_mode={loss_config.loss_mode} only on request: set actor_rollout_ref.actor.calculate_entropy=True."
        )
