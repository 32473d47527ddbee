"""tipdistill train: one configuration from a recipe and flags, checked, then trained.

Everything is refused in the order of its cost: names, then files, then tokenizers and data, then weights.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import traceback
from argparse import Action, ArgumentTypeError, Namespace
from dataclasses import dataclass, field, fields
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, IterableDataset
from transformers import AutoConfig, AutoProcessor
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    TrlParser,
    get_dataset,
    get_peft_config,
    get_quantization_config,
)
from trl.cli.accelerate_config import resolve_accelerate_config_argument
from trl.scripts.utils import DatasetConfig

from ..config import TIPConfig
from ..data import drop_long_prompts, load_prompts, prepare_prompts, prompt_lengths
from ..vocabulary import check_same_tokenizer, shared_vocabulary
from .recipes import recipe_names, recipe_path

# field that asks for a package: (module, pip command)
_EXTRAS = {
    "use_peft": ("peft", 'pip install "tipdistill[peft]"'),
    "use_vllm": ("vllm", 'pip install "tipdistill[vllm]"'),
    "deepspeed": ("deepspeed", 'pip install "tipdistill[deepspeed]"'),
    "load_in_4bit": ("bitsandbytes", "pip install bitsandbytes"),
    "load_in_8bit": ("bitsandbytes", "pip install bitsandbytes"),
}
# Asked of one run, so never part of a configuration that is written down; a token is never written at all.
_OF_ONE_RUN = ("dry_run", "overwrite_output_dir", "resume_from_checkpoint", "hub_token", "push_to_hub_token")
_SECRET = re.compile("token|key|secret|password", re.IGNORECASE)
_VERSIONS = ("tipdistill", "trl", "transformers", "accelerate", "datasets", "torch")


@dataclass
class TIPScriptArguments(ScriptArguments):
    """TRL's script arguments, and how prompts are read, checked and launched here.

    Args:
        prompt_column: column that holds the prompts.
        prompt_template: text around plain prompts, with "{prompt}" where the prompt goes.
        apply_chat: turn plain prompts into one user message, so that the chat template applies. Off by default, as in
            TRL: a plain prompt is continued as it stands.
        max_prompt_length: drop prompts with more tokens (chat template included) and say how many.
        overwrite_output_dir: start afresh in a directory that holds a run; its checkpoints are deleted.
        dry_run: check everything but the weights, print the configuration and what a step holds, train nothing.
        accelerate_config: start through accelerate, with one of TRL's presets (multi_gpu, zero2, zero3, fsdp2, ...) or
            a file of `accelerate config`; "none" for no launcher.
        num_processes: processes to start; the preset's own number where None.
    """

    prompt_column: str = field(default="prompt", metadata={"help": "Column that holds the prompts."})
    prompt_template: str | None = field(
        default=None, metadata={"help": "Text around plain prompts, with '{prompt}' where the prompt goes."}
    )
    apply_chat: bool = field(
        default=False,
        metadata={"help": "Turn plain prompts into one user message, so that the chat template applies."},
    )
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Drop prompts with more tokens than this, chat template included."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Start afresh in a directory that holds a run; deletes its checkpoints."}
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Check everything but the weights, print the configuration, train nothing."}
    )
    accelerate_config: str | None = field(
        default=None,
        metadata={"help": "Start through accelerate: one of TRL's presets (multi_gpu, zero2, zero3, ...) or a file."},
    )
    num_processes: int | None = field(default=None, metadata={"help": "Processes that accelerate starts."})

    def __post_init__(self) -> None:
        for name in ("max_prompt_length", "num_processes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")


@dataclass(frozen=True)
class Request:
    """What was asked for: the parsed configuration, and every resolved value as it would stand in a YAML file."""

    script: TIPScriptArguments
    config: TIPConfig
    model: ModelConfig
    mixture: DatasetMixtureConfig
    values: dict[str, Any]


_TYPES = (TIPScriptArguments, TIPConfig, ModelConfig, DatasetMixtureConfig)


class _Parser(TrlParser):
    def error(self, message: str) -> Any:
        raise ValueError(message)  # argparse would print three hundred flags first


def main(argv: list[str]) -> int:
    """Distil as the recipe and the flags say; returns the exit code.

    Args:
        argv: `--config F.yaml` (a file or a packaged recipe's name) and any field as a flag.

    Raises:
        ValueError, FileNotFoundError, ImportError: anything that can be refused before weights are loaded.
    """
    parser, flags, environment = _read_arguments(argv)
    namespace = _check_arguments(parser, flags)
    os.environ.update(environment)
    resume = _resume(namespace)
    launch = [] if namespace.dry_run else _launch_arguments(namespace)
    if launch:
        return _launch(launch, argv)
    request = _build(parser, flags, environment)
    return _train(request, resume)


def parse(argv: list[str]) -> Request:
    """The configuration that a recipe and flags make: YAML sets defaults, flags override.

    Raises:
        ValueError: an unknown key or flag (the nearest are given), a value of the wrong type, a missing model.

    Example:
        >>> request = parse(["--model_name_or_path", "s", "--teacher_model_name_or_path", "t", "--dataset_name", "d",
        ...                  "--use_cpu", "--retention", "0.2"])
        >>> request.config.retention, request.config.selection_rule
        (0.2, 'soft_or')
    """
    parser, flags, environment = _read_arguments(argv)
    _check_arguments(parser, flags)
    return _build(parser, flags, environment)


# Arguments.


def _read_arguments(argv: list[str]) -> tuple[_Parser, list[str], dict[str, str]]:
    """A parser whose defaults are the YAML file's, the remaining flags, and the file's environment variables."""
    parser = _Parser(
        _TYPES,
        prog="tipdistill train",
        usage="tipdistill train --config RECIPE [--field value ...]",
        description="RECIPE is a YAML file or one of: " + ", ".join(recipe_names()),
        allow_abbrev=False,
    )
    source, flags = _take_config(argv)
    if source is None:
        return parser, flags, {}
    path = _config_path(source)
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold a mapping of fields to values, got {type(settings).__name__}.")
    environment = settings.pop("env", None) or {}
    if not isinstance(environment, dict):
        raise ValueError(f"{path}: `env` must map names of environment variables to values, got {environment!r}.")
    _check_settings(path, settings, parser)
    parser.set_defaults_with_config(**settings)
    return parser, flags, {name: str(value) for name, value in environment.items()}


def _take_config(argv: list[str]) -> tuple[str | None, list[str]]:
    sources, flags, rest = [], [], iter(argv)
    for argument in rest:
        if argument == "--config":
            sources.append(next(rest, ""))
        elif argument.startswith("--config="):
            sources.append(argument.removeprefix("--config="))
        else:
            flags.append(argument)
    if len(sources) > 1 or "" in sources:
        raise ValueError("--config takes one YAML file or the name of one packaged recipe.")
    return (sources[0] if sources else None), flags


def _config_path(source: str) -> Path:
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml") and path.name != source:
        siblings = [sibling.name for sibling in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise FileNotFoundError(f"there is no file {source}.{_nearest(path.name, siblings)}")
    return recipe_path(source)


def _field_names() -> list[str]:
    return [field.name for kind in _TYPES for field in fields(kind) if field.init]


def _check_settings(path: Path, settings: dict[str, Any], parser: _Parser) -> None:
    actions: dict[str, Action] = {}
    for action in parser._actions:
        actions.setdefault(action.dest, action)  # a later action of the same name is its --no_ form
    for name, value in settings.items():
        if name not in _field_names():
            raise ValueError(f"{path}: there is no field {name!r}.{_nearest(str(name), _field_names())}")
        _check_value(f"{path}: {name}", value, actions[name])
    for entry in settings.get("datasets") or []:
        known = [field.name for field in fields(DatasetConfig)]
        for name in entry if isinstance(entry, dict) else [entry]:
            if name not in known:
                raise ValueError(f"{path}: datasets: there is no field {name!r}.{_nearest(str(name), known)}")


def _check_value(where: str, value: Any, action: Action) -> None:
    """What argparse checks of a flag and not of a default: type and choice."""
    if value == action.default or action.nargs == "+" or not callable(action.type):
        return
    try:
        converted = action.type("null" if value is None else str(value))
    except (ValueError, ArgumentTypeError) as error:
        kind = {"string_to_bool": "true or false"}.get(action.type.__name__, f"of type {action.type.__name__}")
        raise ValueError(f"{where} must be {kind}, got {value!r}.") from error
    if action.choices and converted not in action.choices:
        choices = [str(choice) for choice in action.choices]
        raise ValueError(f"{where} must be one of {', '.join(choices)}, got {value!r}.{_nearest(str(value), choices)}")


def _check_arguments(parser: _Parser, flags: list[str]) -> Namespace:
    """The values as parsed, once flags are known, a model, a teacher and prompts named, and packages installed."""
    namespace, unknown = parser.parse_known_args(flags)
    for argument in unknown:
        if argument.startswith("-"):
            name = argument.lstrip("-").partition("=")[0].replace("-", "_")
            near = difflib.get_close_matches(name, _field_names(), n=3, cutoff=0.6)
            hint = f" Did you mean {' or '.join(f'--{word}' for word in near)}?" if near else ""
            raise ValueError(f"there is no flag {argument.partition('=')[0]}.{hint}")
        raise ValueError(f"unexpected argument {argument!r}: a recipe is given as --config {argument}.")
    for name, what in (("model_name_or_path", "student"), ("teacher_model_name_or_path", "teacher")):
        if not getattr(namespace, name):
            raise ValueError(f"no {what} given: name it with --{name}, a directory or a hub id.")
    if bool(namespace.dataset_name) == bool(namespace.datasets):
        raise ValueError(
            "prompts come from --dataset_name (a hub id, a JSONL, JSON or Parquet file, or a directory) or from "
            "`datasets` in the YAML file: give one of the two."
        )
    if namespace.dataset_streaming and namespace.num_generations > 1:
        raise ValueError(
            f"num_generations = {namespace.num_generations} repeats prompts, which a stream cannot: set "
            "dataset_streaming to false."
        )
    for name, (module, command) in _EXTRAS.items():
        if getattr(namespace, name):
            _require(module, f"{name} = {getattr(namespace, name)}", command)
    return namespace


def _require(module: str, asked_by: str, command: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ImportError(f"{asked_by} needs the package {module}, which is not installed: {command}")


def _build(parser: _Parser, flags: list[str], environment: dict[str, str]) -> Request:
    namespace, _ = parser.parse_known_args(flags)
    script, config, model, mixture = parser.parse_args_into_dataclasses(flags, look_for_args_file=False)
    values = {name: _plain(getattr(namespace, name)) for name in _field_names() if name not in _OF_ONE_RUN}
    shareable = {name: value for name, value in environment.items() if not _SECRET.search(name)}
    if shareable:
        values["env"] = shareable
    return Request(script, config, model, mixture, values)


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(repr(word) for word in near)}?" if near else ""


# What a run would overwrite, and how it is started.


def _resume(namespace: Namespace) -> str | None:
    """The checkpoint to resume from, if any; refuses to start over a run that is already there."""
    asked, directory = namespace.resume_from_checkpoint, Path(namespace.output_dir or "trainer_output")
    if asked in (None, False) or str(asked).lower() in ("false", "none"):
        held = [*sorted(directory.glob("checkpoint-*")), *sorted(directory.glob("*.safetensors"))]
        if held and not namespace.overwrite_output_dir and not namespace.dry_run:
            raise ValueError(
                f"{directory} already holds a run ({', '.join(path.name for path in held[:3])}): continue it with "
                "--resume_from_checkpoint true, start over with --overwrite_output_dir true, or choose another "
                "--output_dir."
            )
        return None
    if namespace.overwrite_output_dir:
        raise ValueError("resume_from_checkpoint and overwrite_output_dir contradict each other: give one of them.")
    if str(asked).lower() == "true":
        from ..trainer import last_complete_checkpoint

        found = last_complete_checkpoint(directory)
        if found is None:
            raise ValueError(f"there is no complete checkpoint in {directory} to resume from.")
        return found
    if not (Path(asked) / "trainer_state.json").is_file():
        siblings = [path.name for path in Path(asked).parent.glob("checkpoint-*")]
        raise FileNotFoundError(
            f"--resume_from_checkpoint {asked}: no checkpoint there (trainer_state.json is missing)."
            f"{_nearest(Path(asked).name, siblings)}"
        )
    return str(asked)


def _launch_arguments(namespace: Namespace) -> list[str]:
    """Arguments of `accelerate launch`, empty where this process is to train itself."""
    # a process that a launcher started must not start one again
    if "LOCAL_RANK" in os.environ or "TIPDISTILL_LAUNCHED" in os.environ:
        return []
    preset, processes = _accelerate_config(namespace), namespace.num_processes
    if preset is None:
        return ["--multi_gpu", "--num_processes", str(processes)] if (processes or 1) > 1 else []
    arguments = resolve_accelerate_config_argument(["--accelerate_config", preset])
    settings = yaml.safe_load(Path(arguments[1]).read_text(encoding="utf-8"))
    if settings.get("distributed_type") == "DEEPSPEED":
        _require("deepspeed", f"accelerate_config = {preset}", _EXTRAS["deepspeed"][1])
    return arguments + (["--num_processes", str(processes)] if processes else [])


def _accelerate_config(arguments: Any) -> str | None:
    preset = arguments.accelerate_config
    return None if preset is None or preset.lower() in ("", "none", "null") else preset


def _launch(launch: list[str], argv: list[str]) -> int:
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch, "-m", "tipdistill.cli", "train", *argv]
    return subprocess.run(command, env={**os.environ, "TIPDISTILL_LAUNCHED": "1"}, check=False).returncode


def _num_processes(request: Request) -> int:
    """Processes of the run: those running now, or in a dry run those that would be started."""
    script = request.script
    if not script.dry_run or request.config.world_size > 1:
        return request.config.world_size
    preset = _accelerate_config(script)
    if script.num_processes is None and preset is not None:
        path = resolve_accelerate_config_argument(["--accelerate_config", preset])[1]
        return int(yaml.safe_load(Path(path).read_text(encoding="utf-8")).get("num_processes", 1))
    return script.num_processes or 1


# The run.


def _train(request: Request, resume: str | None) -> int:
    script, config, model = request.script, request.config, request.model
    main_process = config.process_index == 0
    tokenizer, teacher_tokenizer, described = _check_models(request)
    train_dataset, dropped = _prompts(request, "train", tokenizer)
    eval_dataset = _prompts(request, "test", tokenizer)[0] if config.eval_strategy != "no" else None
    described |= _describe_steps(request, train_dataset, dropped, tokenizer)
    if main_process:
        if script.dry_run:
            print(_as_yaml(request.values), end="")
        print("\n".join(f"# {label:<10}{text}" for label, text in described.items()), flush=True)
    if script.dry_run:
        return 0

    from ..trainer import TIPTrainer

    config.model_init_kwargs = {
        "revision": model.model_revision,
        "trust_remote_code": config.trust_remote_code,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **_as_dict(config.model_init_kwargs),
    }
    config.teacher_model_init_kwargs = {
        "revision": config.teacher_model_revision,
        "trust_remote_code": config.trust_remote_code,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **_as_dict(config.teacher_model_init_kwargs),
    }
    trainer = TIPTrainer(
        model=model.model_name_or_path,
        teacher_model=config.teacher_model_name_or_path,
        args=config,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        teacher_processing_class=teacher_tokenizer,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )
    output_dir = Path(config.output_dir)
    if main_process:
        if script.overwrite_output_dir:
            # a stale checkpoint would outlive the new ones and be what a later resume finds
            for checkpoint in output_dir.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
        write_config(request.values, output_dir / "config.yaml")
    try:
        trainer.train(resume_from_checkpoint=resume)
    except (ValueError, OSError):
        traceback.print_exc()  # whatever fails this late is no matter of a flag: one line would not do
        raise
    trainer.save_model(config.output_dir)
    trainer.accelerator.print(f"The distilled student is in {config.output_dir}.")
    if config.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
    trainer.end()
    return 0


def _as_dict(value: Any) -> dict[str, Any]:
    assert value is None or isinstance(value, dict), "TrainingArguments turns JSON strings into dicts"
    return value or {}


def _check_models(request: Request) -> tuple[Any, Any, dict[str, str]]:
    """Both tokenizers, once they and the lm_heads agree, and a line on each model. Loads no weights."""
    config, model = request.config, request.model
    loaded, described = [], {}
    for who, flag, name, revision in (
        ("student", "--model_name_or_path", model.model_name_or_path, model.model_revision),
        ("teacher", "--teacher_model_name_or_path", config.teacher_model_name_or_path, config.teacher_model_revision),
    ):
        options = {"revision": revision, "trust_remote_code": config.trust_remote_code}
        try:
            architecture = AutoConfig.from_pretrained(name, **options)
            processor = AutoProcessor.from_pretrained(name, truncation_side="left", padding_side="left", **options)
        except (OSError, ValueError) as error:
            raise ValueError(f"the {who} could not be read ({flag} {name}): {error}") from error
        rows = architecture.get_text_config().vocab_size
        loaded.append((processor, rows))
        described[who] = f"{name} ({architecture.model_type}, {rows:,} rows in its lm_head)"
    (tokenizer, rows), (teacher_tokenizer, teacher_rows) = loaded
    check_same_tokenizer(tokenizer, teacher_tokenizer)
    size = len(getattr(tokenizer, "tokenizer", tokenizer))
    shared = shared_vocabulary(rows, teacher_rows, num_tokens=size)
    described["tokenizer"] = f"the same for both: {size:,} tokens; the divergence runs over {shared:,} rows"
    return tokenizer, teacher_tokenizer, described


def _prompts(request: Request, purpose: str, tokenizer: Any) -> tuple[Dataset | IterableDataset, int]:
    """The prompts to train or evaluate on, and how many were dropped for their length."""
    script, mixture = request.script, request.mixture
    split = script.dataset_train_split if purpose == "train" else script.dataset_test_split
    shape = {"column": script.prompt_column, "template": script.prompt_template, "as_chat": script.apply_chat}
    if mixture.datasets:
        splits = get_dataset(mixture)
        if purpose not in splits:
            raise ValueError("evaluation needs a test split: set test_split_size beside `datasets`.")
        dataset = prepare_prompts(splits[purpose], name="the mixture", **shape)
    else:
        dataset = load_prompts(
            script.dataset_name, split, config=script.dataset_config, streaming=script.dataset_streaming, **shape
        )
    if not isinstance(dataset, Dataset):
        if script.max_prompt_length is not None:
            raise ValueError("max_prompt_length counts tokens ahead, which a stream cannot: unset dataset_streaming.")
        return dataset, 0
    if not isinstance(dataset[0]["prompt"], str) and not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"the prompts are conversational{' (apply_chat)' if script.apply_chat else ''}, but the tokenizer of "
            f"{request.model.model_name_or_path} has no chat template: use plain prompts or an instruction-tuned model."
        )
    if script.max_prompt_length is None:
        return dataset, 0
    return drop_long_prompts(
        dataset, tokenizer, script.max_prompt_length, _as_dict(request.config.chat_template_kwargs)
    )


def _describe_steps(request: Request, dataset: Any, dropped: int, tokenizer: Any) -> dict[str, str]:
    config = request.config
    rollouts = config.per_device_train_batch_size * config.gradient_accumulation_steps * _num_processes(request)
    per_step = rollouts // config.num_generations
    tokens = rollouts * config.max_completion_length
    described = {
        "step": f"{per_step:,} prompts × {config.num_generations} rollouts × up to {config.max_completion_length:,} "
        f"tokens = {tokens:,} completion tokens, trained on by {config.selection_rule} at retention {config.retention}"
    }
    if isinstance(dataset, Dataset):
        prompts = dataset["prompt"][:]
        longest = max(prompt_lengths(prompts, tokenizer, _as_dict(config.chat_template_kwargs)))
        kind = "plain" if isinstance(prompts[0], str) else "conversational"
        described["prompts"] = f"{len(prompts):,}, {kind}, the longest has {longest:,} tokens"
        if request.script.max_prompt_length is not None:
            described["prompts"] += f" ({dropped:,} longer than {request.script.max_prompt_length:,} dropped)"
    steps: int | None = config.max_steps if config.max_steps > 0 else None
    if steps is None and isinstance(dataset, Dataset) and len(dataset) >= per_step:
        steps = math.ceil(config.num_train_epochs * (len(dataset) // per_step))
    if steps is not None:
        described["steps"] = f"{steps:,}"
    return described


# The configuration on disk.


def _as_yaml(values: dict[str, Any]) -> str:
    defaults = {}
    for kind in _TYPES:
        for entry in fields(kind):
            default = entry.default_factory() if callable(entry.default_factory) else entry.default
            defaults[entry.name] = _plain(default)
    given = {name: value for name, value in values.items() if name not in defaults or value != defaults[name]}
    rest = {name: value for name, value in values.items() if name not in given}
    versions = ", ".join(f"{package} {version(package)}" for package in _VERSIONS)
    return "".join(
        [
            f"# {versions}, Python {platform.python_version()}\n",
            yaml.safe_dump(given, sort_keys=False, allow_unicode=True) if given else "",
            "# left at their defaults\n",
            yaml.safe_dump(rest, sort_keys=False, allow_unicode=True),
        ]
    )


def write_config(values: dict[str, Any], path: Path) -> None:
    """Write a configuration that `--config` reads back, in one move, so that a killed run leaves no half of it.

    Args:
        values: field → value, as in `Request.values`.
        path: the file, replaced if it is there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(_as_yaml(values), encoding="utf-8")
    partial.replace(path)
