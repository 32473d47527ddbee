"""From a recipe's fields to a `Setup`: which engine, which sharding, which dtypes a run would have."""

from __future__ import annotations

from argparse import Namespace
from enum import Enum
from typing import Any

import torch
from trl.cli.accelerate_config import resolve_accelerate_config_argument

from ..config import usual_normalization
from ..documents import parse_yaml, read_yaml
from ..environments import Limits
from ..extras import EXTRAS, require
from ..select import resolve_rule
from ..teachers.named import SELF, NamedTeacher, named_teachers
from ..text import nearest
from . import setup_of
from .machines import Machine
from .memory import ENGINES, OPTIMIZERS, Setup
from .models import read_config, sizes


def setup_of_recipe(
    values: Namespace,
    machine: Machine,
    gpus: int = 1,
    sharding: str | None = None,
    teacher_place: str | None = None,
    prompt_tokens: int | None = None,
    turns: int | None = None,
    result_tokens: int | None = None,
) -> Setup:
    """What a recipe would run.

    Args:
        values: of `recipes.read.read_values`.
        machine: its memory is the setup's.
        gpus: of the run.
        sharding: one of `SHARDING`; None: as accelerate_config has it.
        teacher_place: one of `TEACHERS`; None: as teacher_url, teacher_offload and the sharding have it.
        prompt_tokens: tokens of a prompt; None: max_prompt_length, else 1024.
        turns, result_tokens: of an episode, where the recipe has an environment; None: as many as it may have, and of
            its completion three quarters at most.

    Raises:
        ValueError: a value that `TIPConfig` would refuse, or that is not planned.
        ImportError: LoRA without peft.
    """
    _check_values(values, gpus)
    sharding = sharding or sharding_of(values.accelerate_config)
    if sharding != "none" and gpus == 1:
        sharding = "none"  # nothing to share with
    named, names = _teachers(values)
    place = teacher_place or _teacher_place(values, named, sharding)
    if place == "sharded" and gpus == 1:
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
    student, *teachers = (
        read_config(name, revision, bool(values.trust_remote_code))
        for name, revision in ((values.model_name_or_path, values.model_revision), *names)
    )
    teacher, *others = sorted(teachers, key=lambda config: -sizes(config).parameters)
    dtype_of_teacher = (_as_dict(values.teacher_model_init_kwargs)).get("dtype", values.dtype)
    of_student = (_as_dict(values.model_init_kwargs)).get("dtype", values.dtype)
    turns, results = _episode(values, turns, result_tokens)
    engine = ("colocate" if values.vllm_mode == "colocate" else "server") if values.use_vllm else "transformers"
    assert engine in ENGINES
    return setup_of(
        student,
        teacher,
        student_dtype=_dtype(of_student, student),
        teacher_dtype=_dtype(dtype_of_teacher, teacher),
        bf16=not values.fp16 if values.bf16 is None else bool(values.bf16),
        lora=lora,
        gpus=gpus,
        memory=int(machine.memory_gib * 2**30),
        sharding=sharding,
        teacher_place=place,
        other_teachers=sum(
            (sizes(other).lm_head if place == "offload" else sizes(other).parameters)
            * _dtype(dtype_of_teacher, other).itemsize
            for other in others
        ),
        micro_batch=values.per_device_train_batch_size,
        accumulation=values.gradient_accumulation_steps,
        prompt=prompt_tokens or values.max_prompt_length or 1024,
        completion=values.max_completion_length,
        turns=turns,
        results=results,
        rule=values.selection_rule,
        retention=values.retention,
        scope=values.selection_scope or resolve_rule(values.selection_rule).scope,
        normalization=values.normalization or _usual_normalization(values, place),
        backward=values.backward,
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


def _teachers(values: Namespace) -> tuple[list[NamedTeacher], list[tuple[str, str | None]]]:
    """The teachers that a recipe names, and name and revision of each whose sizes are known, once each."""
    named = named_teachers(values.teacher_model_name_or_path, values)
    if len(named) == 1 and values.teacher_url is not None:
        served = values.teacher_model_name_or_path or values.teacher_lm_head
        known = [(served, None)] if served else []
    else:
        known = [
            (values.model_name_or_path, values.model_revision)
            if one.model == SELF
            else (one.model or one.args.teacher_lm_head, one.args.teacher_model_revision)
            for one in named
            if one.args.teacher_url is None or one.args.teacher_lm_head is not None
        ]
    if not known:
        raise ValueError(
            "the sizes of a teacher on a server are not asked for here: give the model that it serves as "
            "--teacher_lm_head (hidden states) or --teacher_model_name_or_path (log-probabilities)."
        )
    return named, list(dict.fromkeys(known))


def _episode(values: Namespace, turns: int | None, result_tokens: int | None) -> tuple[int, int]:
    """Turns of the student's in a rollout, and tokens of the tools' results in it."""
    if getattr(values, "environment", None) is None:
        if turns is not None or result_tokens is not None:
            raise ValueError("--turns and --result_tokens are of a recipe with an environment, and this one has none.")
        return 1, 0
    completion = values.max_completion_length
    turns = turns or (values.max_tool_calling_iterations or Limits.rounds) + 1
    if result_tokens is None:
        result_tokens = min((turns - 1) * values.max_tool_result_tokens, completion * 3 // 4)
    if not 0 <= result_tokens < completion:
        raise ValueError(
            f"--result_tokens must leave tokens of the {completion:,} (max_completion_length) to the student, got "
            f"{result_tokens:,}."
        )
    if turns > completion - result_tokens or (turns == 1 and result_tokens):
        raise ValueError(
            f"--turns {turns:,} and --result_tokens {result_tokens:,} do not go together: each turn has a token of the "
            f"{completion:,} or more, and results stand between two turns."
        )
    return turns, result_tokens


def _teacher_place(values: Namespace, named: list[NamedTeacher], sharding: str) -> str:
    if values.teacher_url:
        return "lm_head" if values.teacher_lm_head else "server"
    if values.use_peft and [one.model for one in named] == [SELF]:
        return "student"
    if values.teacher_offload:
        return "offload"
    return "sharded" if sharding in ("zero3", "fsdp2") else "resident"


def _usual_normalization(values: Namespace, place: str) -> str:
    """That of a recipe which names none, with its teacher where the plan puts it."""
    usual = usual_normalization(values, values.teacher_model_name_or_path)
    return usual if place in ("resident", "sharded") else "batch"


def _check_values(values: Namespace, gpus: int) -> None:
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


def sharding_of(preset: str | None) -> str:
    """What an accelerate preset or file shards."""
    if preset is None or preset.lower() in ("", "none", "null"):
        return "none"
    path = resolve_accelerate_config_argument(["--accelerate_config", preset])[1]
    settings = read_yaml(path)
    if not isinstance(settings, dict):
        raise ValueError(f"accelerate_config = {preset} must hold a mapping, as `accelerate config` writes it.")
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
    given = (parse_yaml(value, "model_init_kwargs") if isinstance(value, str) else value) or {}
    if not isinstance(given, dict):
        raise ValueError(f"model_init_kwargs must be a mapping, got {given!r:.60}.")
    return given
