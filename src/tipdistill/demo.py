"""The whole method on a small task, on the CPU, in minutes: teach two models, run a packaged grid, draw the map.

A teacher and a student are taught addition from scratch (the student from corrupted solutions). Then the student is
distilled on its own rollouts, on all tokens, on a half, a fifth and a tenth of them: each a cell of `sweep/demo.yaml`.
Models and cells that are finished are kept, so a killed demo goes on where it stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from statistics import fmean
from typing import Any

from .evaluate import mean_at_k
from .files import alone, write_text
from .report.tip_map import tip_map
from .select import select
from .select.quadrants import quadrant_shares, quadrants
from .sweep import Grid, read_grid
from .sweep.cells import Cells
from .sweep.result import counts_of
from .sweep.run import LOG, run_sweep
from .sweep.workers import Workers
from .tasks import arithmetic, load_task
from .tasks.written import point_to
from .text import markdown_table, with_error

GRIDS = Path(str(files("tipdistill"))) / "sweep"
# packaged grid → optimiser steps that each model is taught before distillation
TAUGHT = {
    "demo": {"teacher": 1000, "student": 700},
    "demo-quick": {"teacher": 300, "student": 500},
}
PLANTED = (
    "The student's errors were planted in the data it was taught from (dropped carries, wrong digit sums), so this "
    "shows the mechanism and is no independent replication of the paper."
)
_MAP_PROMPTS = 256


def demo_grid(name: str = "demo", output_dir: Path | None = None, seed: int = 0) -> Grid:
    """A packaged grid on the models and the prompts that `run` makes in its output directory.

    Args:
        name: "demo" or "demo-quick".
        output_dir: where everything goes; None: as the grid has it.
        seed: of prompts, sampling and selection.

    Example:
        >>> [row.name for row in demo_grid("demo-quick").rows]
        ['all tokens', 'Soft-OR', 'Q3', 'random']
    """
    grid = read_grid(GRIDS / f"{name}.yaml")
    root = output_dir or grid.output_dir
    made_here = {
        "model_name_or_path": str(root / "models" / "student"),
        "teacher_model_name_or_path": str(root / "models" / "teacher"),
        "dataset_name": str(root / "prompts.jsonl"),
    }
    return replace(grid, output_dir=root, seeds=(seed,), overrides={**grid.overrides, **made_here})


def run(
    grid: Grid, taught: Mapping[str, int], workers: int, threads: int, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Teach, distil every cell, and write results.json, results.md and tip_map.png where the grid says.

    Args:
        grid: as `demo_grid` returns it, with one seed.
        taught: optimiser steps of "teacher" and "student".
        workers: processes at a time.
        threads: of each process.
        say: takes a line of progress.

    Returns:
        What results.json holds: one row per row of the grid, the teacher's accuracy, the quadrants before distillation.

    Raises:
        ChildProcessError: a model could not be taught, or a cell failed; what is finished is kept.
        ValueError: another demo or sweep is at work in the directory.
    """
    with alone(grid.output_dir, "demo"):  # models are taught, and the picture drawn, outside of the sweep's own lock
        return _run(grid, taught, workers, threads, say)


def _run(
    grid: Grid, taught: Mapping[str, int], workers: int, threads: int, say: Callable[[str], None]
) -> dict[str, Any]:
    root, (seed,), (test,) = grid.output_dir, grid.seeds, grid.test
    cells = Cells(grid, root)
    started = time.monotonic()
    teaching = {f"the {name}": (_teach, name, taught[name], root) for name in ("teacher", "student")}
    for name, is_new in in_workers(teaching, workers, threads, root / LOG):
        say(f"{time.monotonic() - started:6.0f} s  {name} is {'taught' if is_new else 'taught before'}")
    settings = demo_settings(cells, taught)
    arithmetic.TASK.write_prompts(root / "prompts.jsonl", settings["steps"] * settings["prompts"], seed)
    cells.check()
    swept = run_sweep(cells, workers, threads, rerun_changed=True)
    if swept["failed"]:
        raise ChildProcessError(
            f"{len(swept['failed'])} of {grid.number_of_cells()} runs failed ({next(iter(swept['failed'].values()))}); "
            f"{root / LOG} holds what they said. Run the same command again: finished parts are kept."
        )
    ((_, pictured),) = in_workers({"the map": (_before, root, test, seed)}, 1, threads, root / LOG)
    before, before_error = _accuracy(swept["before"][test], grid.num_samples)
    rows = []
    for row in swept["rows"]:
        accuracy, error = _accuracy(row["tasks"][test], grid.num_samples)
        rows.append(
            {
                **{name: row[name] for name in ("name", "rule", "retention", "seconds")},
                "accuracy_before": before,
                "standard_error_before": before_error,
                "accuracy": accuracy,
                "standard_error": error,
                "trained_tokens": int(row["trained_tokens"]),
            }
        )
    result = {
        "task": "four-digit addition with planted errors",
        "note": PLANTED,
        "settings": settings,
        **pictured,
        "rows": rows,
        "machine": {name: swept[name] for name in ("hardware", "versions", "commit", "measured", "workers")},
    }
    write_text(root / "results.json", json.dumps(result, indent=2) + "\n")
    write_text(root / "results.md", markdown_table(*table(result)) + "\n")
    return result


def demo_settings(cells: Cells, taught: Mapping[str, int]) -> dict[str, Any]:
    """What a demo's figures depend on, as results.json has it.

    Args:
        cells: of a grid of `demo_grid`.
        taught: optimiser steps of "teacher" and "student".
    """
    grid, settings = cells.grid, cells.settings(cells.every_cell()[0])
    return {
        "teacher_steps": taught["teacher"],
        "student_steps": taught["student"],
        "steps": settings["max_steps"],
        "prompts": settings["per_device_train_batch_size"],
        "learning_rate": settings["learning_rate"],
        "problems": len(cells.tasks[grid.test[0]].problems),
        "samples": grid.num_samples,
        "seed": grid.seeds[0],
        "cells": [{"name": row.name, "rule": row.rule, "retention": row.retention} for row in grid.rows],
    }


def in_workers(jobs: Mapping[str, tuple[Any, ...]], workers: int, threads: int, log: Path) -> Iterator[tuple[str, Any]]:
    """Call (function, *arguments) of each job in a process of its own; yield what it is called, and its result."""
    waiting = list(jobs.items())
    with Workers(min(workers, len(jobs)), threads, log) as pool:
        while waiting or pool.busy:
            while waiting and pool.idle:
                name, job = waiting.pop(0)
                pool.start(name, *job)
            for name, future in pool.finished(timeout=0.5):
                if isinstance(future.exception(), ChildProcessError):
                    raise ChildProcessError(
                        f"the process of {name} was killed (out of memory?); {log} holds what it said. Run the same "
                        "command again: finished parts are kept."
                    )
                yield name, future.result()


def _teach(name: str, steps: int, root: Path) -> bool:
    """Teach a model, and point models/<name> to it; whether it was not there yet."""
    training = replace(getattr(arithmetic.TASK, name), steps=steps)
    calls: list[int] = []
    point_to(arithmetic.taught(name, training, root / "models", lambda step, loss: calls.append(step)))
    return bool(calls)


def _before(root: Path, test: str, seed: int) -> dict[str, Any]:
    """The teacher's accuracy and the quadrants of the student's tokens before distillation; draws tip_map.png."""
    from transformers import AutoModelForCausalLM

    student, teacher = (
        AutoModelForCausalLM.from_pretrained(root / "models" / name).eval() for name in ("student", "teacher")
    )
    asked = [str(problem.text) for problem in load_task(test).problems]
    written = arithmetic.sample(teacher, asked, seed)
    prompts = [arithmetic.prompt_of(*problem) for problem in arithmetic.problems(_MAP_PROMPTS, seed)]
    scores, rollout = arithmetic.score(student, teacher, prompts, seed)
    tip_map(
        scores,
        root / "tip_map.png",
        selection=select(scores, "soft_or", 0.2, rollout=rollout),
        title="A student before distillation (addition, errors planted); kept by Soft-OR at 20 %",
    )
    quadrant = quadrants(scores)
    shares = quadrant_shares(quadrant), quadrant_shares(quadrant, scores.require("reverse_kl"))
    return {
        "teacher_accuracy": fmean(map(arithmetic.is_correct, asked, written)),
        "quadrants": {
            f"q{number}": {"token_share": shares[0][number], "divergence_share": shares[1][number]}
            for number in shares[0]
        },
    }


def _accuracy(figure: Mapping[str, Any], samples: int) -> tuple[float, float]:
    """mean@k of one seed, and its standard error over the problems, from a task's entry in sweep.json."""
    (counts,) = counts_of(figure).values()
    return mean_at_k([[True] * count + [False] * (samples - count) for count in counts])


def table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and lines of the demo's table, of what results.json holds.

    Example:
        >>> row = {"name": "all tokens", "retention": 1.0, "accuracy_before": 0.25, "standard_error_before": 0.02,
        ...        "accuracy": 0.75, "standard_error": 0.01, "trained_tokens": 4300, "seconds": 21.0}
        >>> print(markdown_table(*table({"rows": [row], "settings": {"samples": 4}})).splitlines()[-1])
        | all tokens | 100 % | 0.250 ± 0.020 | 0.750 ± 0.010 | 4,300 | 21 s |
    """
    after = f"accuracy after (mean@{result['settings']['samples']})"
    return ["rule", "retention", "accuracy before", after, "tokens trained on", "time"], [
        [
            row["name"],
            f"{100 * row['retention']:.0f} %",
            with_error(row["accuracy_before"], row["standard_error_before"]),
            with_error(row["accuracy"], row["standard_error"]),
            f"{row['trained_tokens']:,}",
            f"{row['seconds']:.0f} s",
        ]
        for row in result["rows"]
    ]
