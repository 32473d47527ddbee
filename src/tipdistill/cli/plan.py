"""tipdistill plan: what a recipe takes on machines that are not at hand, from configurations alone."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path

from ..files import write_text
from ..plan import MACHINES, as_text, plan
from ..plan.machines import read_machine
from ..plan.memory import SHARDING, TEACHERS
from ..plan.recipe import setup_of_recipe
from ..recipes.read import read_values
from ..terminal import say
from ..text import check_known
from .flags import Parser

_DESCRIPTION = """\
Memory and time per GPU of a recipe, from the models' configurations alone: nothing is loaded, no GPU is needed.
Any field of `tipdistill train` overrides the recipe's, as there: --retention 0.2 --per_device_train_batch_size 4 ..."""


def main(argv: list[str]) -> int:
    """Print the plan of a recipe; 0 whether it fits or not.

    Args:
        argv: `--config`, the machines, and any field of `tipdistill train`.

    Raises:
        ValueError: an unknown flag, key or name (the nearest is given), or a size that cannot be.
        FileNotFoundError: no such recipe or machine file.
    """
    own, rest = parser().parse_known_args(argv)
    for name in ("gpus", "memory", "prompt_tokens", "turns"):
        value = getattr(own, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name} must be a positive number, got {value}.")
    for name, known in (("sharding", SHARDING), ("teacher_place", TEACHERS)):
        if getattr(own, name) is not None:
            check_known(f"--{name}", getattr(own, name), known)
    machine = read_machine(own.machine)
    if own.memory is not None:
        machine = replace(machine, memory_gib=own.memory)
    values = read_values(rest)
    setup = setup_of_recipe(
        values,
        machine,
        own.gpus,
        own.sharding,
        own.teacher_place,
        own.prompt_tokens,
        own.turns,
        own.result_tokens,
    )
    planned = plan(setup, machine)
    where = own.machine.upper() if own.machine in MACHINES else own.machine
    teachers = ", ".join(values.teachers or [values.teacher_model_name_or_path or values.teacher_lm_head])
    say(f"{values.model_name_or_path} from {teachers} on {own.gpus:,} × {where}\n")
    say(as_text(planned))
    if own.json:
        own.json.parent.mkdir(parents=True, exist_ok=True)
        write_text(own.json, json.dumps(planned, indent=1) + "\n")
        say(f"\nwritten: {own.json}")
    return 0


def parser() -> Parser:
    """The flags of `tipdistill plan` that no recipe has."""
    parser = Parser("plan", _DESCRIPTION, defaults=False)
    parser.usage = "tipdistill plan --config RECIPE [--gpus N] [--machine NAME] [--json FILE] [--field value ...]"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--gpus", type=int, default=1, help="GPUs of the run (default 1)")
    add("--machine", default="h100", help=f"a GPU's rates: {', '.join(MACHINES)}, or FILE.yaml (default h100)")
    add("--memory", type=float, help="GiB of one GPU (default: the machine's own)")
    add("--sharding", help=f"{', '.join(SHARDING)} (default: as accelerate_config has it)")
    add("--teacher_place", help=f"{', '.join(TEACHERS)} (default: as the recipe has it)")
    add("--prompt_tokens", type=int, help="tokens of a prompt (default: max_prompt_length, else 1024)")
    add("--turns", type=int, help="of the student's in an episode with tools (default: as many as it may have)")
    add("--result_tokens", type=int, help="of all results in an episode (default: turns × the most that one may have)")
    add("--json", type=Path, help="write the plan to this file as well")
    return parser
