"""One configuration from YAML and flags over TRL's dataclasses and ours, with every unknown name refused."""

from __future__ import annotations

import dataclasses
import datetime
import platform
from argparse import Action, ArgumentTypeError, Namespace
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from enum import Enum
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser
from trl.scripts.utils import DatasetConfig

from ..config import TIPConfig, check_values
from ..documents import parse_mapping, read_yaml
from ..dotted import names_only
from ..extras import check_packages
from ..files import write_text
from ..redact import is_secret_variable, without_secrets
from ..teachers.named import read_teachers
from ..text import near_names, nearest
from . import recipe_names, recipe_path
from .fields import SHORT
from .trust import FLAG, OF_MODELS, check_environment, code_named, confirm, without_code

# Asked of one run, so never part of a configuration that is written down; a token is never written at all.
_OF_ONE_RUN = (
    *("dry_run", "overwrite_output_dir", "resume_from_checkpoint", "trust_recipe", "verbose"),
    *("hub_token", "push_to_hub_token"),
)
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
        verbose: print warnings of Python's and bars of other libraries too.
        trust_recipe: run the code that the recipe names (docs/security.md). A flag alone: no recipe vouches for itself.
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
    verbose: bool = field(
        default=False, metadata={"help": "Print other libraries' warnings and bars too, which train.log holds."}
    )
    trust_recipe: bool = field(default=False, metadata={"help": "Run the code that the recipe names."})

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


TYPES = (TIPScriptArguments, TIPConfig, ModelConfig, DatasetMixtureConfig)


class _Parser(TrlParser):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for action in self._actions:
            if dict in _kinds(action.dest) and action.type is str:
                action.type = partial(_mapping_flag, action.dest)

    def error(self, message: str) -> Any:
        raise ValueError(message)  # argparse would print three hundred flags first


@dataclass(frozen=True)
class Arguments:
    """YAML and flags, parsed and checked, before the dataclasses (which set up devices) are built from them.

    Attributes:
        parser, flags: what they were parsed by and from.
        environment: variables that the recipe sets.
        values: field → value.
        code: what the recipe names of code, see `trust.code_named`; once it is trusted, but for a dry run.
    """

    parser: _Parser
    flags: list[str]
    environment: dict[str, str]
    values: Namespace
    code: list[str]


def parse(argv: list[str]) -> Request:
    """The configuration that a recipe and flags make: YAML sets defaults, flags override.

    Args:
        argv: `--config F.yaml` (a file or a packaged recipe's name) and any field as a flag.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown key or flag (the nearest are given), a value of the wrong type, a missing model.
        ImportError: a field asks for a package that is not installed.

    Example:
        >>> request = parse(["--model_name_or_path", "s", "--teacher_model_name_or_path", "t", "--dataset_name", "d",
        ...                  "--use_cpu", "--retention", "0.2"])
        >>> request.config.retention, request.config.selection_rule
        (0.2, 'soft_or')
    """
    return build(read_arguments(argv))


def read_arguments(argv: list[str]) -> Arguments:
    """Parse and check; see `parse`."""
    parser, flags, path, settings = _with_config(argv)
    values = _check_arguments(parser, flags)
    code = _code_of(path, settings, values, flags)
    if code and not values.dry_run:
        assert path is not None
        confirm(path, code)
        flags = [*flags, FLAG]
    check_packages(values)
    if values.dry_run and not values.trust_recipe and "trust_remote_code" in code:
        flags = [*flags, "--trust_remote_code", "false"]  # the models' own code is code that the recipe names
    for name in OF_MODELS if values.dry_run else ():
        if any(entry.startswith(f"{name}.") for entry in code):
            parser.set_defaults(**{name: without_code(settings[name])})
    return Arguments(parser, flags, check_environment(str(path), settings.get("env")), values, code)


def read_values(argv: list[str]) -> Namespace:
    """YAML and flags with their names and types checked, and nothing else: no package, no dataset, no device is needed.

    Raises:
        FileNotFoundError, ValueError: as `parse`.

    Example:
        >>> read_values(["--config", "laptop", "--retention", "0.2"]).retention
        0.2
    """
    parser, flags, path, settings = _with_config(argv)
    values = _known_flags(parser, flags)
    if path is not None:
        confirm(path, _code_of(path, settings, values, flags))
    return values


def build(arguments: Arguments) -> Request:
    """The dataclasses of checked arguments; their own checks run here."""
    with names_only() if arguments.values.dry_run else nullcontext():
        script, config, model, mixture = arguments.parser.parse_args_into_dataclasses(
            arguments.flags, look_for_args_file=False
        )
    fields_of_run = [name for name in _field_names() if name not in _OF_ONE_RUN]
    values = {name: without_secrets(_plain(getattr(arguments.values, name))) for name in fields_of_run}
    shareable = {name: value for name, value in arguments.environment.items() if not is_secret_variable(name)}
    if shareable:
        values["env"] = shareable
    return Request(script, config, model, mixture, values)


def _with_config(argv: list[str]) -> tuple[_Parser, list[str], Path | None, dict[str, Any]]:
    """A parser whose defaults are the YAML file's, the remaining flags, the file, and what it says."""
    parser = _Parser(
        TYPES,
        prog="tipdistill train",
        usage="tipdistill train --config RECIPE [--field value ...]",
        description="RECIPE is a YAML file or one of: "
        + ", ".join(recipe_names())
        + f". A recipe is code where it names functions or sets variables: read one from elsewhere before {FLAG}.",
        allow_abbrev=False,
    )
    source, flags = _take_config(argv)
    if source is None:
        return parser, flags, None, {}
    path = config_path(source)
    settings = read_recipe(path)
    fields_given = {name: value for name, value in settings.items() if name != "env"}
    fields_given = _check_settings(path, fields_given, parser)
    settings = {**settings, **fields_given}
    check_environment(str(path), settings.get("env"))
    parser.set_defaults_with_config(**fields_given)
    return parser, flags, path, settings


def read_recipe(path: Path) -> dict[str, Any]:
    """The fields of a recipe's file, and its `env`; their names and types are not checked here.

    Raises:
        ValueError: it cannot be read, or holds no mapping.
    """
    settings = read_yaml(path) or {}
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold a mapping of fields to values, got {type(settings).__name__}.")
    return settings


def is_packaged(path: Path) -> bool:
    """Whether a recipe comes with tipdistill, and so with the code that runs it."""
    return path.parent == recipe_path("laptop").parent


def _code_of(path: Path | None, settings: dict[str, Any], values: Namespace, flags: list[str]) -> list[str]:
    """What the recipe, and not a flag in its place, names of code that nobody has vouched for."""
    if path is None or values.trust_recipe or is_packaged(path):
        return []
    given = {flag.removeprefix("--").partition("=")[0].replace("-", "_") for flag in flags if flag.startswith("--")}
    return code_named({name: value for name, value in settings.items() if name not in given}, f"{path}: ")


def _take_config(argv: list[str]) -> tuple[str | None, list[str]]:
    sources, flags, rest = [], [], iter(argv)
    for argument in rest:
        if argument == "--config":
            sources.append(next(rest, ""))
        elif argument.startswith("--config="):
            sources.append(argument.removeprefix("--config="))
        else:
            name, equals, value = argument.partition("=")
            flags.append(f"--{SHORT.get(name[2:], name[2:])}{equals}{value}" if name.startswith("--") else argument)
    if len(sources) > 1 or "" in sources:
        raise ValueError("--config takes one YAML file or the name of one packaged recipe.")
    return (sources[0] if sources else None), flags


def config_path(source: str) -> Path:
    """The file that `--config` names: a path, or a packaged recipe's name.

    Raises:
        FileNotFoundError, ValueError: there is none of that name; the nearest are given.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if source not in recipe_names() and path.suffix in (".yaml", ".yml"):
        siblings = [sibling.name for sibling in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise FileNotFoundError(f"there is no file {source}.{nearest(path.name, siblings + recipe_names())}")
    return recipe_path(source)


def in_recipes(name: str) -> bool:
    """Whether a field may stand in a recipe; one that asks something of a single run is a flag alone.

    Example:
        >>> in_recipes("retention"), in_recipes("trust_recipe")
        (True, False)
    """
    return name != "trust_recipe"


def _field_names() -> list[str]:
    return [field.name for kind in TYPES for field in fields(kind) if field.init]


@cache
def _kinds(name: str) -> tuple[Any, ...]:
    """The types that a field takes, without what stands in their brackets."""
    for kind in TYPES:
        hint = get_type_hints(kind).get(name)
        if hint is not None:
            parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
            return tuple(get_origin(part) or part for part in parts if part is not NoneType)
    return ()


def _mapping(where: str, name: str, value: Any) -> Any:
    """A field that takes a mapping, from what stands for it: a mapping, JSON text of one, or of some fields a path."""
    if name == "teachers":
        read_teachers(value, where)
        return parse_mapping(value, where) if isinstance(value, str) else value
    if name.endswith("_kwargs"):
        options = parse_mapping(value, where)
        if options and isinstance(options.get("trust_remote_code"), str):
            raise ValueError(f"{where}: trust_remote_code must be true or false, and not a text.")
        return options
    if not isinstance(value, str) or value.lstrip().startswith("{"):
        parse_mapping(value, where)
    return value


def _mapping_flag(name: str, text: str) -> Any:
    try:
        return _mapping("its value", name, text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from error  # argparse names the flag


def _text(where: str, value: Any) -> Any:
    """A field that takes a text, of a plain value what its flag would be."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float | datetime.date):
        return str(value)
    raise ValueError(f"{where} must be a text, got {value!r:.60}.")


def _check_settings(path: Path, settings: dict[str, Any], parser: _Parser) -> dict[str, Any]:
    """The settings, those that take mappings and texts as such, once names and types are right."""
    checked: dict[str, Any] = {}
    actions: dict[str, Action] = {}
    for action in parser._actions:
        actions.setdefault(action.dest, action)  # a later action of the same name is its --no_ form
    for name, value in settings.items():
        if name == "trust_recipe":
            raise ValueError(f"{path}: no recipe vouches for itself: give {FLAG} on the command line.")
        if name not in _field_names():
            raise ValueError(f"{path}: there is no field {name!r}.{nearest(str(name), _field_names())}")
        where, kinds = f"{path}: {name}", _kinds(name)
        if dict in kinds and str in kinds:
            checked[name] = _mapping(where, name, value)
            continue
        checked[name] = value = _text(where, value) if kinds == (str,) else value
        if isinstance(value, set | bytes) or (isinstance(value, dict) and dict not in kinds):
            raise ValueError(f"{where} takes no such value: {value!r:.60}.")
        _check_value(where, value, actions[name])
    datasets = settings.get("datasets") or []
    if not isinstance(datasets, list):
        raise ValueError(f"{path}: datasets must be a list of mappings, got {datasets!r:.60}.")
    for entry in datasets:
        known = [field.name for field in fields(DatasetConfig)]
        for name in entry if isinstance(entry, dict) else [entry]:
            if name not in known:
                raise ValueError(f"{path}: datasets: there is no field {name!r:.60}.{nearest(str(name), known)}")
    return checked


def _check_value(where: str, value: Any, action: Action) -> None:
    """What argparse checks of a flag and not of a default: type and choice."""
    if (value is None and action.default is None) or action.nargs == "+" or not callable(action.type):
        return
    try:
        converted = action.type("null" if value is None else str(value))
    except (ValueError, ArgumentTypeError) as error:
        name = getattr(action.type, "__name__", "value")
        kind = {"string_to_bool": "true or false"}.get(name, f"of type {name}")
        raise ValueError(f"{where} must be {kind}, got {value!r}.") from error
    if action.choices and converted not in action.choices:
        choices = [str(choice) for choice in action.choices]
        raise ValueError(f"{where} must be one of {', '.join(choices)}, got {value!r}.{nearest(str(value), choices)}")


def _known_flags(parser: _Parser, flags: list[str]) -> Namespace:
    """The values as parsed, once flags are known, a model and a teacher named."""
    namespace, unknown = parser.parse_known_args(flags)
    for argument in unknown:
        if argument.startswith("-"):
            name = argument.lstrip("-").partition("=")[0].replace("-", "_")
            near = near_names(name, _field_names())
            hint = f" Did you mean {' or '.join(f'--{word}' for word in near)}?" if near else ""
            raise ValueError(f"there is no flag {argument.partition('=')[0]}.{hint}")
        raise ValueError(f"unexpected argument {argument!r}: a recipe is given as --config {argument}.")
    for name, what in (("model_name_or_path", "student"), ("teacher_model_name_or_path", "teacher")):
        if not getattr(namespace, name) and not (what == "teacher" and (namespace.teacher_url or namespace.teachers)):
            raise ValueError(f"no {what} given: name it with --{name}, a directory or a hub id.")
    return namespace


def _check_arguments(parser: _Parser, flags: list[str]) -> Namespace:
    """The values as parsed, once models and prompts are named and our own values are in range."""
    namespace = _known_flags(parser, flags)
    if bool(namespace.dataset_name) == bool(namespace.datasets):
        raise ValueError(
            "prompts come from --dataset_name (a hub id, a JSONL, JSON or Parquet file, or a directory) or from "
            "`datasets` in the YAML file: give one of the two."
        )
    if (namespace.dataset_streaming or namespace.streaming) and namespace.num_generations > 1:
        raise ValueError(
            f"num_generations = {namespace.num_generations} repeats prompts, which a stream does not: read the dataset "
            "whole (dataset_streaming and streaming false)."
        )
    check_values(namespace)
    return namespace


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def as_yaml(values: dict[str, Any]) -> str:
    """A configuration as YAML: versions in a comment, what was set, then what was left at its default."""
    defaults = {}
    for kind in TYPES:
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
    write_text(path, as_yaml(values))
