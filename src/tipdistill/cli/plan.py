"""tipdistill plan: what a recipe takes on machines that are not at hand, from configurations alone."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import yaml
from trl.cli.accelerate_config import resolve_accelerate_config_argument

from ..bench.measure import write
from ..extras import EXTRAS, require
from ..plan import MACHINES, Machine, Setup, as_text, plan, read_config, setup_of
from ..plan.document import update
from ..plan.memory import ENGINES, OPTIMIZERS, SHARDING, TEACHERS
from ..recipes.read import read_values
from ..select import resolve_rule
from ..text import nearest

_DESCRIPTION = """\
Memory and time per GPU of a recipe, from the models' configurations alone: nothing is loaded, no GPU is needed.
Any field of `tipdistill train` overrides the recipe's, as there: --retention 0.2 --per_device_train_batch_size 4 ..."""
_RATES = {
    "flops": "peak dense bf16 flop/s of a GPU",
    "bandwidth": "bytes/s of its memory",
    "link": "bytes/s to the GPUs of its node",
    "network": "bytes/s to other nodes",
    "utilization": "share of the peak that models reach",
    "head_utilization": "share of the peak that the lm_heads reach",
    "bandwidth_utilization": "share of every bandwidth that is reached",
    "kernel_launch": "seconds per layer and token of transformers' generate, at least",
    "node": "GPUs of a node",
}


def main(argv: list[str]) -> int:
    """Print the plan of a recipe; 0 whether it fits or not.

    Args:
        argv: `--config`, the machines, and any field of `tipdistill train`.

    Raises:
        ValueError: an unknown flag, key or name (the nearest is given), or a size that cannot be.
    """
    own, rest = _parser().parse_known_args(argv)
    if own.markdown:
        if rest:
            raise ValueError(f"--markdown rewrites a document and takes nothing else, got {' '.join(rest)}.")
        print(f"{own.markdown}: {'rewritten' if update(own.markdown) else 'as the plan has it'}")
        return 0
    _check_numbers(own)
    values = read_values(rest)
    machine = _machine(own)
    found = plan(_setup(values, own, machine), machine)
    head = f"{values.model_name_or_path} from {values.teacher_model_name_or_path} on {own.gpus:,} × {own.gpu.upper()}"
    print(f"{head}\n\n{as_text(found)}")
    if own.json:
        write(own.json, found)
        print(f"\nwritten: {own.json}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tipdistill plan",
        usage="tipdistill plan --config RECIPE [--gpus N] [--memory GIB] [--json FILE] [--field value ...]",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--gpus", type=int, default=1, help="GPUs of the run (default 1)")
    add("--gpu", default="h100", help=f"{', '.join(MACHINES)}: rates and memory (default h100)")
    add("--memory", type=float, help="GiB of one GPU (default: the GPU's own)")
    add("--sharding", help=f"{', '.join(SHARDING)} (default: as accelerate_config has it)")
    add("--teacher_place", help=f"{', '.join(TEACHERS)} (default: as teacher_offload and the sharding have it)")
    add("--prompt_tokens", type=int, help="tokens of a prompt (default: max_prompt_length, else 1024)")
    add("--json", type=Path, help="write the plan to this file as well")
    add("--markdown", type=Path, metavar="DOCUMENT", help="rewrite the tables of a document such as docs/scaling.md")
    for name, what in _RATES.items():
        add(f"--{name}", type=int if name == "node" else float, help=f"{what} (default: the GPU's)")
    return parser


def _check_numbers(own: argparse.Namespace) -> None:
    for name in ("gpus", "memory", "prompt_tokens", *_RATES):
        value = getattr(own, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name} must be a positive number, got {value}.")
        if name.endswith("utilization") and value is not None and value > 1:
            raise ValueError(f"--{name} is a share of the peak, at most 1, got {value}.")
    for name, known in (("gpu", MACHINES), ("sharding", SHARDING), ("teacher_place", TEACHERS)):
        value = getattr(own, name)
        if value is not None and value not in known:
            raise ValueError(f"--{name} must be one of {', '.join(known)}, got {value!r}.{nearest(value, list(known))}")


def _machine(own: argparse.Namespace) -> Machine:
    given = {name: getattr(own, name) for name in _RATES if getattr(own, name) is not None}
    if own.memory is not None:
        given["memory_gib"] = own.memory
    return replace(MACHINES[own.gpu], **given)


def _setup(values: argparse.Namespace, own: argparse.Namespace, machine: Machine) -> Setup:
    _check_values(values, own.gpus)
    sharding = own.sharding or _sharding(values.accelerate_config)
    if sharding != "none" and own.gpus == 1:
        sharding = "none"  # nothing to share with
    place = own.teacher_place or (
        "offload" if values.teacher_offload else "sharded" if sharding in ("zero3", "fsdp2") else "resident"
    )
    if place == "sharded" and own.gpus == 1:
        place = "resident"
    if place == "offload" and sharding != "none":
        raise ValueError(f"teacher_offload moves a whole teacher, and {sharding} shards it: leave one of the two off.")
    lora = None
    if values.use_peft:
        require("peft", "use_peft", EXTRAS["use_peft"][1])
        targets = values.lora_target_modules
        if isinstance(targets, list):
            targets = targets[0] if targets == ["all-linear"] else tuple(targets)
        lora = (values.lora_r, targets)
    student, teacher = (
        read_config(name, revision, bool(values.trust_remote_code))
        for name, revision in (
            (values.model_name_or_path, values.model_revision),
            (values.teacher_model_name_or_path, values.teacher_model_revision),
        )
    )
    of_teacher = (_as_dict(values.teacher_model_init_kwargs)).get("dtype", values.dtype)
    of_student = (_as_dict(values.model_init_kwargs)).get("dtype", values.dtype)
    engine = ("colocate" if values.vllm_mode == "colocate" else "server") if values.use_vllm else "transformers"
    assert engine in ENGINES
    prompt = own.prompt_tokens or values.max_prompt_length or 1024
    return setup_of(
        student,
        teacher,
        student_dtype=_dtype(of_student, student),
        teacher_dtype=_dtype(of_teacher, teacher),
        bf16=not values.fp16 if values.bf16 is None else bool(values.bf16),
        lora=lora,
        gpus=own.gpus,
        memory=int(machine.memory_gib * 2**30),
        sharding=sharding,
        teacher_place=place,
        micro_batch=values.per_device_train_batch_size,
        accumulation=values.gradient_accumulation_steps,
        prompt=prompt,
        completion=values.max_completion_length,
        rule=values.selection_rule,
        retention=values.retention,
        scope=values.selection_scope or resolve_rule(values.selection_rule).scope,
        batch_normalization=values.normalization == "batch",
        logs_divergence=values.score_logging_steps > 0,
        scoring_tokens=values.scoring_tokens,
        checkpointing=bool(values.gradient_checkpointing),
        optimizer=_optimizer(values.optim),
        engine=engine,
        vllm_share=values.vllm_gpu_memory_utilization,
        vllm_parallel=values.vllm_tensor_parallel_size,
        vllm_sleeps=bool(values.vllm_enable_sleep_mode),
        padded=values.per_device_train_batch_size > 1,
    )


def _check_values(values: argparse.Namespace, gpus: int) -> None:
    """What `TIPConfig` would refuse; it is not built here, since it sets up devices."""
    resolve_rule(values.selection_rule)
    for name in (
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "num_generations",
        "max_completion_length",
        "vllm_tensor_parallel_size",
    ):
        if getattr(values, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(values, name)}.")
    for name in ("retention", "vllm_gpu_memory_utilization"):
        if not 0 < getattr(values, name) <= 1:
            raise ValueError(f"{name} must be in (0, 1], got {getattr(values, name)}.")
    for name in ("scoring_tokens", "score_logging_steps"):
        if getattr(values, name) < 0:
            raise ValueError(f"{name} must be at least 0, got {getattr(values, name)}.")
    batch = values.per_device_train_batch_size * values.gradient_accumulation_steps * gpus
    if batch % values.num_generations:
        raise ValueError(
            f"num_generations ({values.num_generations}) must divide the generation batch of {batch:,} rollouts "
            f"({values.per_device_train_batch_size} × {values.gradient_accumulation_steps} × {gpus:,} GPUs)."
        )
    if gpus % values.vllm_tensor_parallel_size and values.use_vllm and values.vllm_mode == "colocate":
        raise ValueError(
            f"vllm_tensor_parallel_size ({values.vllm_tensor_parallel_size}) must divide the {gpus:,} GPUs."
        )


def _sharding(preset: str | None) -> str:
    """What an accelerate preset or file shards."""
    if preset is None or preset.lower() in ("", "none", "null"):
        return "none"
    path = resolve_accelerate_config_argument(["--accelerate_config", preset])[1]
    settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    kind = settings.get("distributed_type", "NO")
    if kind in ("NO", "MULTI_GPU", "MULTI_CPU"):
        return "none"
    stage = (settings.get("deepspeed_config") or {}).get("zero_stage")
    if kind == "DEEPSPEED" and stage in (2, 3):
        return f"zero{stage}"
    if kind == "FSDP" and (settings.get("fsdp_config") or {}).get("fsdp_version") == 2:
        return "fsdp2"
    raise ValueError(f"accelerate_config = {preset} is not planned: ZeRO-2, ZeRO-3 and FSDP2 are; give --sharding.")


def _optimizer(name: Any) -> str:
    name = str(name.value if isinstance(name, Enum) else name)
    if name not in OPTIMIZERS:
        raise ValueError(f"optim = {name} is not planned; {', '.join(OPTIMIZERS)} are.{nearest(name, OPTIMIZERS)}")
    return name


def _dtype(name: Any, config: Any) -> torch.dtype:
    """Of the weights as they are loaded; "auto": as they were saved, bfloat16 where the configuration does not say."""
    if name in (None, "auto"):
        saved = getattr(config.get_text_config(), "dtype", None)
        return saved if isinstance(saved, torch.dtype) else torch.bfloat16
    dtype = getattr(torch, str(name), None)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, got {name!r}.")
    return dtype


def _as_dict(value: Any) -> dict[str, Any]:
    return (yaml.safe_load(value) if isinstance(value, str) else value) or {}
