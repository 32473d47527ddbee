"""`python -m tipdistill.tasks modular`: the models and the prompts of a small task, where its recipe looks for them."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

import torch

from ..terminal import say
from . import WRITTEN_TASKS


def main(argv: list[str] | None = None) -> int:
    """Teach a task's teacher and student and write its training prompts; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tipdistill.tasks", description=__doc__)
    parser.add_argument("task", choices=WRITTEN_TASKS)
    parser.add_argument("--output_dir", type=Path, help="default: runs/<task>; what is there already is kept")
    parser.add_argument("--prompts", type=int, default=8192, help="how many, distinct, none of them held out")
    options = parser.parse_args(argv)
    # one thread: at this size more of them are slower, and the weights are the same on every machine of a kind
    torch.set_num_threads(1)
    task = import_module(f".{options.task}", __package__).TASK
    root = options.output_dir or Path("runs") / options.task

    def report(name: str, step: int, loss: float) -> None:
        if step % 100 == 0:
            print(f"{name}: step {step}, loss {loss:.4f}", flush=True)

    task.prepare(root, options.prompts, report)
    say(f"{root / 'models'} and {root / 'prompts.jsonl'} are ready for `tipdistill train`.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
