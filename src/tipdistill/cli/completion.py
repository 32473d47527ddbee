"""tipdistill completion: what a shell needs to complete commands, flags and files after the tab key."""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import Any

from ..recipes import recipe_names
from ..recipes.fields import SHORT, read_fields
from .flags import Parser

SHELLS = ("bash", "zsh")
_DIRECTORIES = ("output_dir", "model", "teacher", "model_name_or_path", "teacher_model_name_or_path")
_FILES = ("config", "dataset", "dataset_name", "output", "json", "paths", "grid", "tasks")


def main(argv: list[str]) -> int:
    """Print a shell's completion script; returns the exit code.

    Args:
        argv: the shell.

    Raises:
        ValueError: a shell that is none of `SHELLS`.
    """
    options = parser().read(argv)
    import shtab

    print(shtab.complete(every_command(), options.shell))
    return 0


def parser() -> Parser:
    """The arguments of `tipdistill completion`."""
    parser = Parser(
        "completion",
        "Print a completion script, once, to a file: for bash "
        "~/.local/share/bash-completion/completions/tipdistill, for zsh _tipdistill in a directory of $fpath.",
        defaults=False,
    )
    parser.add_argument("shell", choices=SHELLS)
    return parser


def every_command() -> argparse.ArgumentParser:
    """One parser with a subparser for each command, with all of its flags.

    Example:
        >>> "--retention" in every_command().format_help()
        False
        >>> every_command().parse_args(["train", "--retention", "0.2"]).retention
        '0.2'
    """
    from . import COMMANDS

    whole = argparse.ArgumentParser(prog="tipdistill", allow_abbrev=False)
    whole.add_argument("--version", action="store_true", help="print the version")
    commands = whole.add_subparsers(dest="command")
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, parents=_parents(name, module), add_help=False)
        if name in ("train", "plan"):
            _add_fields(command)
        if name == "recipes":
            command.add_argument("what", nargs="?", choices=("show", "schema"))
            command.add_argument("name", nargs="?", choices=recipe_names())
        for action in command._actions:  # argparse has no public list of them
            if action.choices is None and (completed := _completed(action.dest)):
                # an attribute that shtab reads and argparse does not know
                action.complete = completed  # type: ignore[attr-defined]
    return whole


def _parents(name: str, module: str) -> list[Any]:
    if name in ("train", "recipes"):  # which read their arguments in other ways
        return []
    return [import_module(module, __package__).parser()]


def _add_fields(command: argparse.ArgumentParser) -> None:
    """The fields of a recipe as flags, but those that the command has as its own."""
    own = {flag for action in command._actions for flag in action.option_strings}
    for name, field in {"config": {"description": "recipe"}, **read_fields()}.items():
        flags = [f"--{name}", *(f"--{short}" for short, full in SHORT.items() if full == name)]
        flags = [flag for flag in flags if flag not in own]
        if flags and name != "env":
            choices = [str(choice) for choice in field.get("enum", []) if choice is not None]
            help_text = field["description"].replace("%", "%%")
            command.add_argument(*flags, dest=name, choices=choices or None, help=help_text)


def _completed(dest: str) -> Any:
    import shtab

    if dest in _DIRECTORIES:
        return shtab.DIRECTORY
    return shtab.FILE if dest in _FILES else None
