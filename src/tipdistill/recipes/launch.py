"""How `tipdistill train` starts its processes, and the launches that it refuses.

accelerate answers some requests for several processes or for sharding with less than was asked, and says nothing: one
process for `--cpu --num_processes 2`, DDP for FSDP on a CPU, processes that each train alone where there is no GPU.
"""

from __future__ import annotations

import os
from argparse import Namespace
from typing import Any

import torch
from trl.cli.accelerate_config import resolve_accelerate_config_argument

from ..documents import read_yaml
from ..extras import EXTRAS, require
from ..text import nearest

PRESETS = ("single_gpu", "multi_gpu", "fsdp2", "zero1", "zero2", "zero3")
_SHARDED = {"FSDP": "FSDP", "DEEPSPEED": "DeepSpeed"}


def launch_arguments(namespace: Namespace) -> list[str]:
    """Arguments of `accelerate launch`, empty where this process is to train itself.

    Raises:
        ValueError: fewer processes than asked for would start, or other than sharded as asked for.
        ImportError: the preset's engine is not installed.
    """
    if is_launched():
        return []
    processes = namespace.num_processes
    source, settings = _settings(namespace)
    if source is None:
        if (processes or 1) == 1:
            return []
        _check_devices(f"num_processes = {processes}", "MULTI_GPU", processes, namespace)
        return ["--multi_gpu", "--num_processes", str(processes)]
    kind = str(settings.get("distributed_type", "NO"))
    count = num_processes(namespace)
    asked = f"accelerate_config = {namespace.accelerate_config}"
    if kind == "DEEPSPEED":
        require("deepspeed", asked, EXTRAS["deepspeed"][1])
    if kind == "FSDP" and int((settings.get("fsdp_config") or {}).get("fsdp_version", 1)) == 1:
        raise ValueError(
            f"{asked} is FSDP version 1, which flattens the lm_heads that the loss reads: take fsdp2, or set "
            "fsdp_version: 2 (`accelerate to-fsdp2` converts a file)."
        )
    if count > 1 and (kind in ("NO", "MULTI_CPU") or settings.get("use_cpu")):
        raise ValueError(
            f"{asked} starts one process (distributed_type: {kind}, use_cpu: {bool(settings.get('use_cpu'))}), not "
            f"the {count} asked for: take multi_gpu, with --use_cpu true on a CPU, or --num_processes 1."
        )
    machines = int(settings.get("num_machines") or 1)
    _check_devices(asked, kind, count, namespace, machines)
    return ["--config_file", source, *(["--num_processes", str(processes)] if processes else [])]


def num_processes(namespace: Any) -> int:
    """Processes that were asked for, by number or by the accelerate configuration."""
    if namespace.num_processes is not None:
        return namespace.num_processes
    settings = _settings(namespace)[1]
    if str(settings.get("distributed_type", "NO")) == "NO":  # TRL's single_gpu says 8 all the same
        return 1
    return int(settings.get("num_processes") or 1)


def is_launched() -> bool:
    """Whether a launcher started this process, which then must not start one again."""
    return "LOCAL_RANK" in os.environ or "TIPDISTILL_LAUNCHED" in os.environ


def check_launched(use_cpu: bool) -> None:
    """Refuse, in a process that is about to train, a launch that gave it less than was asked for.

    Raises:
        ValueError: what was asked for, what runs instead, and how to get it.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and not use_cpu and not devices():
        raise ValueError(
            f"{started} processes were started (WORLD_SIZE) and there is no GPU, so each would train alone: add "
            "--use_cpu true to train together over gloo."
        )
    # accelerate's simple launcher exports where the processes would meet, and starts one
    simple = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ
    ranks = ("LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    if simple and not any(name in os.environ for name in ranks):
        raise ValueError(
            "accelerate was asked for several processes and started one (accelerate launch --cpu does): use torchrun "
            "--nproc_per_node N -m tipdistill.cli train ... --use_cpu true. Where one is meant, unset MASTER_ADDR."
        )
    for name, engine in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if os.environ.get(name, "false").lower() == "true" and (use_cpu or not devices()):
            raise ValueError(_needs_gpus(name, engine, use_cpu))


def devices() -> int:
    """Accelerators of this machine that a process could use."""
    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def _settings(namespace: Any) -> tuple[str | None, dict[str, Any]]:
    """The accelerate configuration asked for: its path and what it says."""
    preset = namespace.accelerate_config
    if preset is None or preset.lower() in ("", "none", "null"):
        return None, {}
    try:
        path = resolve_accelerate_config_argument(["--accelerate_config", preset])[1]
    except ValueError as error:
        raise ValueError(
            f"accelerate_config = {preset} is no file and none of TRL's presets ({', '.join(PRESETS)})."
            f"{nearest(preset, PRESETS)}"
        ) from error
    settings = read_yaml(path)
    if not isinstance(settings, dict):
        raise ValueError(f"accelerate_config = {preset} must hold a mapping, as `accelerate config` writes it.")
    return path, settings


def _check_devices(asked: str, kind: str, count: int, namespace: Namespace, machines: int = 1) -> None:
    """Refuse more processes than there are GPUs to run them, and sharding without any."""
    here, use_cpu = devices(), bool(namespace.use_cpu)
    if kind in _SHARDED and (use_cpu or not here):
        raise ValueError(_needs_gpus(asked, _SHARDED[kind], use_cpu))
    if count == 1 or use_cpu:
        return
    if not here:
        raise ValueError(
            f"{asked} asks for {count} processes and there is no GPU, so each would train alone: add --use_cpu true to "
            "train together over gloo, or leave it out."
        )
    if count > here * machines:
        raise ValueError(
            f"{asked} asks for {count} processes on {machines} machine(s) with {here} GPU(s) each: give "
            f"--num_processes {here * machines}."
        )


def _needs_gpus(asked: str, engine: str, use_cpu: bool) -> str:
    why = "use_cpu is set" if use_cpu else "there is none here"
    instead = (
        "each process would train alone" if engine == "DeepSpeed" and not use_cpu else "accelerate would run plain DDP"
    )
    return (
        f"{asked} asks for {engine}, which needs GPUs, and {why}: {instead} in its place. Leave it out, or take "
        "multi_gpu with --use_cpu true to try a run on a CPU."
    )
