"""`python -m tipdistill.tasks modular`: the models and the prompts of a task, where its recipe looks for them.

Of deepplanning it is the prompts alone, from the user's directory: `python -m tipdistill.tasks deepplanning DIR`.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib import import_module
from pathlib import Path

import torch

from ..environments.deepplanning import prompts as deepplanning
from ..environments.deepplanning.data import LANGUAGES
from ..files import write_text
from ..terminal import say
from ..text import printable
from . import WRITTEN_TASKS, smollm2


def main(argv: list[str] | None = None) -> int:
    """Make a task's teacher and student and write its training prompts; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tipdistill.tasks", description=__doc__)
    parser.add_argument("task", choices=(*WRITTEN_TASKS, "trip", "smollm2", "deepplanning"))
    parser.add_argument("directory", nargs="?", help="of deepplanning: the benchmark, see docs/deepplanning.md")
    parser.add_argument("--output_dir", type=Path, help="default: runs/<task>; what is there already is kept")
    parser.add_argument("--prompts", type=int, default=8192, help="how many, distinct, none of them held out")
    parser.add_argument(
        "--layers", type=int, default=smollm2.LAYERS, help="how many of its teacher's 30 smollm2's student lacks"
    )
    parser.add_argument("--language", choices=(*LANGUAGES, "both"), default="en", help="of deepplanning's prompts")
    options = parser.parse_args(argv)
    root = options.output_dir or Path("runs") / options.task
    if (options.task == "deepplanning") != (options.directory is not None):
        parser.error("deepplanning, and no other task, takes the directory of the benchmark: deepplanning DIR")
    if options.task == "deepplanning":
        return _write_deepplanning(options.directory, options.language, root)
    if options.task == "smollm2":
        try:
            smollm2.prepare(root, options.layers, say)
        except (ImportError, ValueError, OSError) as error:
            print(f"python -m tipdistill.tasks: {error}", file=sys.stderr)
            return 2
        say(f"{root / 'models'} and {root / 'prompts.jsonl'} are ready for `tipdistill train --config smollm2`.")
        return 0
    # one thread: at this size more of them are slower, and the weights are the same on every machine of a kind
    torch.set_num_threads(1)
    task = import_module(f".{options.task}", __package__)
    prepare = task.prepare if options.task == "trip" else task.TASK.prepare

    def report(name: str, step: int, loss: float) -> None:
        if step % 100 == 0:
            print(f"{name}: step {step}, loss {loss:.4f}", flush=True)

    try:
        prepare(root, options.prompts, report)
    except (ValueError, OSError) as error:
        print(f"python -m tipdistill.tasks: {printable(error)}", file=sys.stderr)
        return 2
    say(f"{root / 'models'} and {root / 'prompts.jsonl'} are ready for `tipdistill train`.")
    return 0


def _write_deepplanning(directory: str, language: str, root: Path) -> int:
    languages = LANGUAGES if language == "both" else (language,)
    try:
        rows = [row for language in languages for row in deepplanning.rows(directory, language, "train")]
        root.mkdir(parents=True, exist_ok=True)
        path = root / "train.jsonl"
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    except (ValueError, OSError) as error:
        print(f"python -m tipdistill.tasks: {printable(error)}", file=sys.stderr)
        return 2
    say(f"{path} holds {len(rows)} prompts for `tipdistill train --config qwen3-14b-1.7b-deepplanning`.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
