"""Packages that are wanted only when they are asked for, and the command that installs each."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

from .text import check_known

_BITSANDBYTES = ("bitsandbytes", "pip install bitsandbytes")
# field that asks for a package: (module, pip command)
EXTRAS = {
    "use_peft": ("peft", 'pip install "tipdistill[peft]"'),
    "use_vllm": ("vllm", 'pip install "tipdistill[vllm]"'),
    "deepspeed": ("deepspeed", 'pip install "tipdistill[deepspeed]"'),
    "use_liger_kernel": ("liger_kernel", "pip install liger-kernel"),
    "load_in_4bit": _BITSANDBYTES,
    "load_in_8bit": _BITSANDBYTES,
}
# of `report_to`: (module, pip command)
TRACKERS = {
    "azure_ml": ("azureml", "pip install azureml-sdk"),
    "clearml": ("clearml", "pip install clearml"),
    "codecarbon": ("codecarbon", "pip install codecarbon"),
    "comet_ml": ("comet_ml", "pip install comet-ml"),
    "dagshub": ("dagshub", "pip install dagshub mlflow"),
    "dvclive": ("dvclive", "pip install dvclive"),
    "flyte": ("flytekit", "pip install flytekit"),
    "kubeflow": ("kubeflow", "pip install kubeflow"),
    "mlflow": ("mlflow", "pip install mlflow"),
    "neptune": ("neptune", "pip install neptune"),
    "swanlab": ("swanlab", "pip install swanlab"),
    "tensorboard": ("tensorboard", "pip install tensorboard"),
    "trackio": ("trackio", "pip install trackio"),
    "wandb": ("wandb", "pip install wandb"),
}
# the beginning of an optimizer's name: (module, pip command); those with other beginnings are torch's
_OPTIMIZERS = {
    "galore": ("galore_torch", "pip install galore-torch"),
    "apollo": ("apollo_torch", "pip install apollo-torch"),
    "lomo": ("lomo_optim", "pip install lomo-optim"),
    "adalomo": ("lomo_optim", "pip install lomo-optim"),
    "grokadamw": ("grokadamw", "pip install grokadamw"),
    "schedule_free": ("schedulefree", "pip install schedulefree"),
    "stable_adamw": ("optimi", "pip install torch-optimi"),
    "adamw_torch_4bit": ("torchao", "pip install torchao"),
    "adamw_torch_8bit": ("torchao", "pip install torchao"),
    "adamw_anyprecision": ("torchdistx", "pip install torchdistx"),
    "adamw_torch_npu": ("torch_npu", "pip install torch-npu"),
    "adamw_torch_xla": ("torch_xla", "pip install torch-xla"),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb", "ademamix", "lion", "paged", "rmsprop_bnb"), _BITSANDBYTES),
}
# of `attn_implementation`: (module, pip command). transformers takes kernels in the place of each
_ATTENTION = {
    "flash_attention_2": ("flash_attn", "pip install flash-attn, or pip install kernels"),
    "flash_attention_3": ("flash_attn_interface", "pip install kernels"),
    "flash_attention_4": ("flash_attn", "pip install flash-attn-4, or pip install kernels"),
}
_PLAIN_ATTENTION = ("eager", "sdpa", "flex_attention")


def require(module: str, asked_by: str, command: str) -> None:
    """Raise an ImportError that names the pip command where `module` is not installed."""
    if importlib.util.find_spec(module) is None:
        raise ImportError(f"{asked_by} needs the package {module}, which is not installed: {command}")


def check_packages(values: Any) -> None:
    """Refuse a configuration that asks for packages that are not here, or for a tracker or an attention that is none.

    Args:
        values: has the fields of a training configuration: those of `EXTRAS`, report_to, optim, attn_implementation.

    Raises:
        ValueError: an unknown tracker or attention; the nearest is given.
        ImportError: the package, and the command that installs it.

    Example:
        >>> from types import SimpleNamespace
        >>> check_packages(SimpleNamespace(report_to="wandbd"))
        Traceback (most recent call last):
        ValueError: report_to must be one of ...
    """
    for name, (module, command) in EXTRAS.items():
        value = getattr(values, name, None)
        if value:
            require(module, f"{name} = {value}", command)
    for tracker in _trackers(getattr(values, "report_to", None)):
        check_known("report_to", tracker, (*TRACKERS, "all", "none"))
        if tracker in TRACKERS and not (tracker == "tensorboard" and importlib.util.find_spec("tensorboardX")):
            require(TRACKERS[tracker][0], f"report_to = {tracker}", TRACKERS[tracker][1])
    optimizer = getattr(values, "optim", None)
    optimizer = str(getattr(optimizer, "value", optimizer))
    for start, (module, command) in _OPTIMIZERS.items():
        if optimizer.startswith(start):
            require(module, f"optim = {optimizer}", command)
    if optimizer.startswith("galore") and "8bit" in optimizer:
        require(_BITSANDBYTES[0], f"optim = {optimizer}", _BITSANDBYTES[1])
    attention = getattr(values, "attn_implementation", None)
    if attention is None:
        return
    if "/" in attention:  # a kernel on the hub
        require("kernels", f"attn_implementation = {attention}", "pip install kernels")
        return
    check_known("attn_implementation", attention, (*_PLAIN_ATTENTION, *_ATTENTION))
    if attention in _ATTENTION and importlib.util.find_spec("kernels") is None:
        module, command = _ATTENTION[attention]
        require(module, f"attn_implementation = {attention}", command)


def _trackers(report_to: Any) -> Iterator[str]:
    for name in [report_to] if isinstance(report_to, str) else report_to or []:
        yield str(name)
