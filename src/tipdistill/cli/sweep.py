"""tipdistill sweep: every cell of a grid is a run of `tipdistill train`; then one table of them all.

A directory D holds `cells/<cell>/`, each a run's output directory with `cell.json` once it is finished, and the result:
`sweep.json`, `sweep.md`, `sweep.csv`. `workers.log` has what the runs printed.
"""

from __future__ import annotations

import ast
import fcntl
import gc
import hashlib
import io
import json
import os
import shutil
import tempfile
import time
import traceback
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from ..sweep import Cell, Grid, Row, chosen_rate, csv_text, markdown, read_grid, summarise
from ..tasks import load_task
from .arguments import config_path, read_arguments
from .pair import Parser
from .workers import Workers, cores

RESULT = "sweep.json"
CELL = "cell.json"
_VERSIONS = ("torch", "transformers", "trl", "accelerate", "datasets")
# what a figure cannot depend on
_NOT_SOURCE = ("cli", "report", "bench", "sweep")
_HEAD = 1 << 20
NEVER = 10**9


def main(argv: list[str]) -> int:
    """Run the cells of a grid that are not finished, and write the table; returns the exit code, 1 where a cell failed.

    Args:
        argv: the grid's YAML file, and flags.

    Raises:
        ValueError, FileNotFoundError: a grid, a recipe, a model or a file that would not run, cells that were made with
            other settings, or another sweep in the same directory.
    """
    parser = Parser(
        prog="tipdistill sweep",
        description="Run rule × retention × learning rate × seed over a recipe, and compare with intervals.",
        allow_abbrev=False,
    )
    parser.add_argument("grid", type=Path, help="YAML: base, cells, learning_rates, seeds, test, ... (docs/sweep.md)")
    parser.add_argument(
        "--output_dir", type=Path, help="where everything goes (default: the grid's, or runs/<its name>)"
    )
    parser.add_argument("--workers", type=int, help="cells at a time (default: one per core; with a GPU one)")
    parser.add_argument("--threads", type=int, help="of each worker (default: the cores divided among the workers)")
    parser.add_argument("--dry_run", action="store_true", help="check everything, say what would run, run nothing")
    parser.add_argument(
        "--rerun_changed", action="store_true", help="run cells again that were made with other settings or versions"
    )
    options = parser.read(argv)
    for name in ("workers", "threads"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(options, name)}.")
    grid = read_grid(options.grid)
    directory = options.output_dir or grid.output_dir
    plan = Plan(grid, directory)
    plan.check()
    if options.dry_run:
        kept = sum(plan.known(cell) is not None for cell in plan.every_cell())
        print(f"{grid.number_of_cells()} cells in {len(grid.rows)} rows, {kept} finished; nothing was run.")
        return 0
    directory.mkdir(parents=True, exist_ok=True)
    with _alone(directory):
        plan.refuse_changed(options.rerun_changed)
        threads = options.threads or plan.kept_threads()
        workers = options.workers or _default_workers(threads)
        return _run(plan, workers, threads or max(1, cores() // workers))


def _default_workers(threads: int | None) -> int:
    import torch

    return 1 if torch.cuda.is_available() else max(1, cores() // (threads or 1))


# What would run, and what is finished.


class Plan:
    """The cells of a grid on the disk: their settings, where they lie, and what has been finished of them.

    Args:
        grid: what is asked for.
        directory: D, see above.
    """

    def __init__(self, grid: Grid, directory: Path) -> None:
        self.grid, self.directory = grid, directory
        path = config_path(grid.base)
        try:
            self.base = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not valid YAML: {error}") from error
        if not isinstance(self.base, dict):
            raise ValueError(f"{path} must hold a mapping of fields to values.")
        named = {name for row in grid.rows for name in row.overrides} | set(grid.overrides) | set(self.base)
        self.common = {
            # figures of every step are read, and a bar of each cell would fill the log
            "logging_steps": 1,
            "eval_steps": NEVER,
            "disable_tqdm": True,
            **({} if "report_to" in named else {"report_to": "none"}),
        }
        self.tasks = {name: load_task(name) for name in {*grid.test, *filter(None, [grid.validation_task])}}

    def every_cell(self) -> list[Cell]:
        """All cells that may run, those of unchosen rates left out beyond the validation seeds."""
        found = {}
        for row in self.grid.rows:
            for cell in self.grid.first_cells(row):
                found[cell.key] = cell
            for rate in self.grid.learning_rates:
                for cell in self.grid.last_cells(row, rate):
                    found.setdefault(cell.key, cell)
        return list(found.values())

    def path(self, cell: Cell) -> Path:
        return self.directory / "cells" / cell.key

    def settings(self, cell: Cell) -> dict[str, Any]:
        """The recipe of a cell, all but where it goes."""
        given = {**self.grid.overrides, **cell.row.overrides}
        base = {name: value for name, value in self.base.items() if name != "output_dir"}
        return {
            **base,
            **self.common,
            **{name: _of_seed(value, cell.seed) for name, value in given.items()},
            "selection_rule": cell.row.rule,
            "retention": cell.row.retention,
            "learning_rate": cell.learning_rate,
            "seed": cell.seed,
            "eval_tasks": ",".join(cell.tasks),
            "eval_num_samples": self.grid.num_samples,
            "eval_tasks_on_start": cell.on_start,
        }

    def made_with(self, cell: Cell) -> dict[str, Any]:
        """Everything that a cell's figures depend on, on one machine."""
        settings = self.settings(cell)
        return {
            **{f"settings.{name}": value for name, value in settings.items()},
            **{f"task.{name}": self.tasks[name].fingerprint() for name in cell.tasks},
            **{
                f"files.{name}": _fingerprint(settings[name])
                for name in ("model_name_or_path", "teacher_model_name_or_path", "dataset_name")
                if settings.get(name)
            },
            **{f"version.{package}": version(package) for package in _VERSIONS},
            "source": _source(),
        }

    def finished(self, cell: Cell) -> dict[str, Any] | None:
        """What cell.json holds, whatever it was made with."""
        try:
            held = json.loads((self.path(cell) / CELL).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return held if isinstance(held, dict) and {"made_with", "result"} <= held.keys() else None

    def known(self, cell: Cell) -> dict[str, Any] | None:
        """The figures of a finished cell that was made with what is asked for now."""
        held = self.finished(cell)
        return held["result"] if held is not None and held["made_with"] == self._as_stored(cell) else None

    def _as_stored(self, cell: Cell) -> Any:
        return json.loads(json.dumps(self.made_with(cell)))

    def kept_threads(self) -> int | None:
        """The threads that finished cells ran with: others would round differently."""
        held = (self.finished(cell) for cell in self.every_cell())
        return next((one["result"]["threads"] for one in held if one is not None), None)

    def refuse_changed(self, rerun: bool) -> None:
        """Refuse finished cells that were made with something else, or remove them.

        Raises:
            ValueError: there are some, and `rerun` is false.
        """
        changed: dict[str, list[str]] = {}
        for cell in self.every_cell():
            held = self.finished(cell)
            if held is not None and held["made_with"] != (now := self._as_stored(cell)):
                names = {*held["made_with"], *now}
                changed[cell.key] = sorted(name for name in names if held["made_with"].get(name) != now.get(name))
        if not changed:
            return
        if rerun:
            for key in changed:
                shutil.rmtree(self.directory / "cells" / key)
            print(f"{len(changed)} finished cells were made with other settings and run again.", flush=True)
            return
        first = next(iter(changed))
        raise ValueError(
            f"{len(changed)} finished cells in {self.directory} were made with something else, {first} with another "
            f"{', '.join(changed[first][:5])}: give --rerun_changed to run them again, or another --output_dir."
        )

    def check(self) -> None:
        """Refuse what would not run, before anything does: every row's fields, then models, tokenizers and prompts.

        Raises:
            ValueError, FileNotFoundError, ImportError: as `tipdistill train --dry_run`.
        """
        from . import train

        seen = set()
        free = ("selection_rule", "retention", "learning_rate", "seed", "eval_tasks", "eval_tasks_on_start")
        for row in self.grid.rows:
            for cell in {cell.seed: cell for cell in self.grid.first_cells(row)}.values():
                settings = self.settings(cell)
                frame = {name: value for name, value in settings.items() if name not in free}
                if (key := json.dumps(frame, sort_keys=True, default=str)) in seen:
                    continue
                seen.add(key)
                with tempfile.TemporaryDirectory() as folder:
                    path = _write(Path(folder) / "recipe.yaml", yaml.safe_dump(settings))
                    argv = ["--config", str(path), "--output_dir", folder]
                    try:
                        read_arguments(argv)
                        with redirect_stdout(io.StringIO()) as said:
                            code = train.main([*argv, "--dry_run"])
                    except (ValueError, OSError, ImportError) as error:
                        raise type(error)(str(error).replace(str(path), f"{row.name} in the grid")) from error
                    if code:
                        raise ValueError(f"{row.name} would not run: {said.getvalue().strip()[-300:]}")


def _of_seed(value: Any, seed: int) -> Any:
    return value.replace("{seed}", str(seed)) if isinstance(value, str) else value


@lru_cache
def _fingerprint(name: str) -> str:
    """A hash of a local file or directory (of large files the size, the beginning and the end); a hub id as it is."""
    path = Path(name).expanduser()
    if not path.exists():
        return name
    files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)} {size}\n".encode())
        with file.open("rb") as opened:
            digest.update(opened.read(_HEAD))
            opened.seek(max(0, size - _HEAD))
            digest.update(opened.read())
    return digest.hexdigest()[:16]


@lru_cache
def _source() -> str:
    """A hash of the code that a run goes through, comments aside."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        if path.relative_to(package).parts[0] not in _NOT_SOURCE:
            digest.update(ast.dump(ast.parse(path.read_bytes())).encode())
    return digest.hexdigest()[:16]


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Hold the directory against other sweeps, as long as this process lives."""
    with (directory / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another sweep is at work in {directory}: wait for it, or give another --output_dir."
            ) from error
        yield


# One cell, in a worker.


@dataclass(frozen=True)
class Job:
    """What a worker needs to know of a cell."""

    directory: Path
    settings: Mapping[str, Any]
    made_with: Mapping[str, Any]
    tasks: Mapping[str, str]  # as in the grid → as the evaluation calls it
    num_samples: int
    keep_model: bool
    threads: int
    run: Mapping[str, Any]  # of the sweep that runs it: commit, day, workers


def run_cell(job: Job) -> dict[str, Any]:
    """Train and measure one cell, from its checkpoint where it has one, and write its cell.json.

    Raises:
        RuntimeError: the run refused or failed.
    """
    import torch
    from accelerate.state import AcceleratorState, GradientState

    from ..trainer import last_complete_checkpoint
    from ..training.monitor import reset_peak_memory
    from . import train

    started = job.directory / "made_with.json"
    made_with = json.dumps(job.made_with, indent=1) + "\n"
    if job.directory.exists() and (not started.is_file() or started.read_text(encoding="utf-8") != made_with):
        shutil.rmtree(job.directory)  # begun with other settings
    job.directory.mkdir(parents=True, exist_ok=True)
    checkpoint = last_complete_checkpoint(job.directory)
    if checkpoint is None:
        shutil.rmtree(job.directory)  # a run that was killed starts afresh
        job.directory.mkdir(parents=True)
    _write(started, made_with)
    recipe = _write(job.directory / "recipe.yaml", yaml.safe_dump(dict(job.settings), sort_keys=False))
    # what a cell before this one left in the process
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    reset_peak_memory()
    argv = ["--config", str(recipe), "--output_dir", str(job.directory)]
    try:
        code = train.main(argv + (["--resume_from_checkpoint", checkpoint] if checkpoint else []))
    except Exception:
        traceback.print_exc()  # the log has it all, the table one line
        raise
    if code:
        raise RuntimeError(f"the run ended with exit code {code}")
    result = _figures(job)
    if not job.keep_model:
        for path in (*job.directory.glob("*.safetensors"), *job.directory.glob("checkpoint-*")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    _write(job.directory / CELL, json.dumps({"made_with": dict(job.made_with), "result": result}, indent=1) + "\n")
    return result


def _figures(job: Job) -> dict[str, Any]:
    """What a finished run logged and measured."""
    state = json.loads((job.directory / "trainer_state.json").read_text(encoding="utf-8"))
    steps = [entry for entry in state["log_history"] if "selection/trained_tokens" in entry]
    return {
        "tasks": _measured(job, state["global_step"]),
        **({"before": _measured(job, 0)} if job.settings["eval_tasks_on_start"] else {}),
        "trained_tokens": int(steps[-1]["selection/trained_tokens"]),
        "seconds": sum(value for entry in steps for name, value in entry.items() if name.startswith("time/")),
        "peak_memory_gib": max(entry["memory/peak_gib"] for entry in steps),
        "threads": job.threads,
        "run": dict(job.run),
    }


def _measured(job: Job, step: int) -> dict[str, Any]:
    from ..evaluate.run import read_samples, samples_path

    root = job.directory / "eval" / f"step-{step}"
    figures = json.loads((root / "metrics.json").read_text(encoding="utf-8"))["tasks"]
    found = {}
    for asked, name in job.tasks.items():
        problems = figures[name]["problems"]
        correct = [0] * problems
        for (problem, _), row in read_samples(samples_path(root, name), problems).items():
            correct[problem] += bool(row["correct"])
        found[asked] = {
            "correct": correct,
            "num_samples": job.num_samples,
            "mean_tokens": figures[name]["mean_tokens"],
            "truncated": figures[name]["truncated"],
        }
    return found


# All of them.


def _run(plan: Plan, workers: int, threads: int) -> int:
    import torch

    from ..provenance import environment

    grid = plan.grid
    here = environment("cuda" if torch.cuda.is_available() else "cpu", threads)
    run = {"commit": here["commit"], "measured": here["measured"], "workers": workers}
    results: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    waiting = {row.key: [cell.key for cell in grid.first_cells(row)] for row in grid.rows}
    # seed by seed, so that whole rows can be compared early
    queue = deque(cell for cells in zip(*(grid.first_cells(row) for row in grid.rows), strict=True) for cell in cells)
    board = _Board(plan, workers, threads)

    def settle(cell: Cell) -> None:
        """Once a row's first cells are done, its rate is known, and the others follow."""
        waiting[cell.row.key].remove(cell.key)
        if waiting[cell.row.key] or len(grid.learning_rates) == 1:
            return
        rate, means = chosen_rate(grid, cell.row, results)
        board.say_rate(cell.row, rate, means)
        if rate is not None:
            more = [one for one in grid.last_cells(cell.row, rate) if one.key not in results and one.key not in failed]
            queue.extend(more)

    first = {cell.key for row in grid.rows for cell in grid.first_cells(row)}

    def done(cell: Cell) -> None:
        if cell.key in first:
            settle(cell)

    with Workers(workers, threads, plan.directory / "workers.log") as pool, board:
        while queue or pool.busy:
            while queue and pool.idle:
                cell = queue.popleft()
                known = plan.known(cell)
                if known is not None:
                    results[cell.key] = known
                    board.kept(cell)
                    done(cell)
                    continue
                job = Job(
                    plan.path(cell),
                    plan.settings(cell),
                    plan.made_with(cell),
                    {name: plan.tasks[name].name for name in cell.tasks},
                    grid.num_samples,
                    grid.keep_models,
                    threads,
                    run,
                )
                board.started(cell)
                pool.start(cell, run_cell, job)
            for cell, future in pool.finished(timeout=0.5) if pool.busy else []:
                error = future.exception()
                if error is None:
                    results[cell.key] = future.result()
                    board.finished(cell, results[cell.key])
                else:
                    failed[cell.key] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                    board.failed(cell, failed[cell.key])
                done(cell)
            board.refresh()
    return _write_result(plan, results, failed, workers, here)


def _runs(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The sweeps that ran the cells, several where one was resumed; cells of an older version do not say which."""
    alike = Counter(json.dumps(result.get("run", {})) for result in results.values())
    return [{**json.loads(run), "cells": cells} for run, cells in alike.items()]


def _write_result(
    plan: Plan, results: Mapping[str, Any], failed: Mapping[str, str], workers: int, machine: Mapping[str, Any]
) -> int:
    found = summarise(plan.grid, results, failed)
    settings = {**plan.base, **plan.common, **plan.grid.overrides}
    found |= {"settings": settings, "workers": workers, "source": _source(), **machine, "runs": _runs(results)}
    _write(plan.directory / RESULT, json.dumps(found, indent=1) + "\n")
    text = _write(plan.directory / "sweep.md", markdown(found)).read_text(encoding="utf-8")
    _write(plan.directory / "sweep.csv", csv_text(found))
    print(text)
    print(f"{plan.directory / RESULT} · sweep.md · sweep.csv; `tipdistill report {plan.directory}` draws the page.")
    if failed:
        print(
            f"{len(failed)} cells failed; the same command tries them again, {plan.directory / 'workers.log'} has why:"
        )
        print("\n".join(f"  {key}: {why}" for key, why in failed.items()), flush=True)
    return 1 if failed else 0


class _Board:
    """A line per finished cell, and in a terminal a bar with the time left."""

    def __init__(self, plan: Plan, workers: int, threads: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self.total, self.ended, self.taken = plan.grid.number_of_cells(), 0, 0
        self.workers, self.began = workers, time.monotonic()
        self.since: dict[str, float] = {}
        self.seconds: list[float] = []
        self.test = plan.grid.test
        self.console = Console()
        self.progress = Progress(
            BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), console=self.console
        )
        self.bar = self.progress.add_task("", total=self.total)
        self._say(f"{self.total} cells in {len(plan.grid.rows)} rows; {workers} workers, {threads} threads each.")

    def __enter__(self) -> _Board:
        if self.console.is_terminal:
            self.progress.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.progress.stop()

    def _say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, markup=False, highlight=False)

    def started(self, cell: Cell) -> None:
        self.since[cell.key] = time.monotonic()

    def kept(self, cell: Cell) -> None:
        self.ended += 1

    def finished(self, cell: Cell, result: Mapping[str, Any]) -> None:
        figures = ", ".join(
            f"{name} {sum(found['correct']) / len(found['correct']) / found['num_samples']:.3f}"
            for name, found in result["tasks"].items()
        )
        self._ended(cell, figures)

    def failed(self, cell: Cell, why: str) -> None:
        self._ended(cell, f"FAILED, {why}")

    def say_rate(self, row: Row, rate: float | None, means: Mapping[float, float]) -> None:
        found = ", ".join(f"{one:g}: {mean:.3f}" for one, mean in means.items())
        self._say(f"{row.key}: " + ("no rate came through" if rate is None else f"rate {rate:g} chosen ({found})"))

    def _ended(self, cell: Cell, text: str) -> None:
        self.ended += 1
        seconds = time.monotonic() - self.since.pop(cell.key)
        self.seconds.append(seconds)
        elapsed = time.monotonic() - self.began
        left = f", {self._left()}" if self._left() else ""
        self._say(f"{elapsed:6.0f} s  {self.ended}/{self.total}  {cell.key}: {text} ({seconds:.0f} s){left}")

    def _left(self) -> str:
        if not self.seconds:
            return ""
        each = sum(self.seconds) / len(self.seconds)
        running = sum(min(each, time.monotonic() - since) for since in self.since.values())
        seconds = ((self.total - self.ended) * each - running) / self.workers
        return f"about {seconds:.0f} s left" if seconds < 120 else f"about {seconds / 60:.0f} min left"

    def refresh(self) -> None:
        self.progress.update(self.bar, completed=self.ended, description=f"{len(self.since)} running  {self._left()}")


def _write(path: Path, text: str) -> Path:
    """Write in full or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    return path
