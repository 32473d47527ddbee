"""The fields of a recipe, from schema.json: what `tipdistill train --help` prints, without loading any library.

`python -m tipdistill.recipes.schema` writes the file from the dataclasses.
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

from ..text import near_names

SCHEMA = Path(__file__).with_name("schema.json")
# What a run is usually made of, in the order of a recipe; the rest is TRL's and Trainer's. Ours are all among it.
SECTIONS = {
    "models": (
        *("model_name_or_path", "teacher_model_name_or_path", "dtype", "attn_implementation", "load_in_4bit"),
        *("use_peft", "lora_r", "lora_alpha", "lora_target_modules", "trust_remote_code"),
        *("teachers", "teacher_column", "teacher_prompt_column", "teacher_update"),
        *("teacher_offload", "teacher_url", "teacher_lm_head", "teacher_served_name", "teacher_top_k"),
        *("teacher_api_key_env", "teacher_timeout", "teacher_time_limit", "teacher_concurrency"),
    ),
    "prompts": (
        *("dataset_name", "dataset_config", "dataset_train_split", "prompt_column", "prompt_template", "apply_chat"),
        *("chat_template_kwargs", "max_prompt_length"),
    ),
    "rollouts": (
        *("num_generations", "max_completion_length", "temperature", "top_p", "top_k", "end_as_teacher"),
        *("use_vllm", "vllm_mode", "vllm_gpu_memory_utilization", "vllm_sync_tolerance", "rollout_ahead"),
    ),
    "tools": ("environment", "max_tool_calling_iterations", "max_tool_result_tokens", "tool_timeout"),
    "selection and loss": (
        *("selection_rule", "retention", "selection_scope", "normalization", "backward"),
        *("scoring_tokens", "beta", "mask_truncated_completions", "drift_factor", "drift_retention"),
    ),
    "optimisation": (
        *("per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "num_train_epochs"),
        *("learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "max_grad_norm"),
        *("bf16", "gradient_checkpointing", "seed"),
    ),
    "measuring": (
        *("eval_tasks", "eval_steps", "eval_num_samples", "eval_tasks_on_start", "logging_steps", "report_to"),
        *("score_logging_steps", "record_rollouts"),
    ),
    "machine and files": (
        *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "save_steps", "save_total_limit"),
        *("push_to_hub", "hub_model_id", "use_cpu", "accelerate_config", "num_processes"),
        *("dry_run", "verbose", "trust_recipe"),
    ),
}
# what the other commands call a field, which is a flag of `train` and `plan` too
SHORT = {
    "model": "model_name_or_path",
    "teacher": "teacher_model_name_or_path",
    "dataset": "dataset_name",
    "max_new_tokens": "max_completion_length",
}
_WIDTH = 100


def read_fields() -> dict[str, Any]:
    """Every field, those that are flags alone too: name → {"type", "description", "default", ...}, as in schema.json.

    Example:
        >>> read_fields()["retention"]["default"]
        0.5
    """
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    return {**schema["properties"], **schema["x-flags"]}


def check_flags(argv: list[str]) -> None:
    """Refuse a flag that no field has, before any library is loaded to say so.

    Args:
        argv: of `tipdistill train`.

    Raises:
        ValueError: which flag, and the nearest.

    Example:
        >>> check_flags(["--retension", "0.5"])
        Traceback (most recent call last):
        ValueError: there is no flag --retension. Did you mean --retention or --drift_retention?
    """
    names = [*read_fields(), *SHORT, "config"]
    for argument in argv:
        flag = argument.partition("=")[0]
        name = flag.removeprefix("--").replace("-", "_")
        if flag.startswith("--") and name not in names and name.removeprefix("no_") not in names:
            near = near_names(name, names)
            hint = f" Did you mean {' or '.join(f'--{word}' for word in near)}?" if near else ""
            raise ValueError(f"there is no flag {flag}.{hint}")


def help_text(everything: bool, recipes: list[str]) -> str:
    """What `tipdistill train --help` prints.

    Args:
        everything: every field, and not only those of `SECTIONS`.
        recipes: names of the packaged recipes.
    """
    fields = read_fields()
    lines = [
        "usage: tipdistill train --config RECIPE [--field value ...]",
        "",
        *textwrap.wrap(f"RECIPE is a YAML file or one of: {', '.join(recipes)}.", _WIDTH),
        *textwrap.wrap(
            "Every field below stands in a recipe as `field: value`, and overrides it as `--field value`. A recipe is "
            "code where it names functions or sets variables: read one from elsewhere before --trust_recipe.",
            _WIDTH,
        ),
    ]
    sections = dict(SECTIONS)
    if everything:
        shown = {name for names in sections.values() for name in names}
        sections["further fields of TRL's and Trainer's"] = tuple(
            name for name in sorted(fields) if name not in shown and name != "env"
        )
    for title, names in sections.items():
        lines += ["", f"{title}:"]
        for name in names:
            lines += _described(name, fields[name])
    if not everything:
        lines += ["", "`tipdistill train --help all` lists every field, those of TRL and Trainer too."]
    return "\n".join(lines)


def _described(name: str, field: dict[str, Any]) -> list[str]:
    default = field.get("default")
    text = field["description"] + ("" if default in (None, "") else f" [{json.dumps(default)}]")
    names = [f"--{name}", *(f"--{short}" for short, field_name in SHORT.items() if field_name == name)]
    return [
        f"  {', '.join(names)}",
        *textwrap.wrap(text, _WIDTH - 6, initial_indent="      ", subsequent_indent="      "),
    ]
