"""The cells of a grid on the disk: their settings, what has been finished of them, and how one is run.

A directory D holds `cells/<cell>/`, each the output directory of a run, with `cell.json` once it is finished: its
figures, and everything that they depend on.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import io
import json
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from ..documents import read_json
from ..dotted import imports
from ..files import write_text
from ..recipes.read import config_path, read_arguments, read_recipe
from ..recipes.run import run_recipe
from ..recipes.trust import FLAG
from ..redact import is_secret_variable, secret_names
from ..signals import Stopped
from ..tasks import is_code, load_task
from ..text import printable
from .grid import Cell, Grid

CELL = "cell.json"
_VERSIONS = ("torch", "transformers", "trl", "accelerate", "datasets")
# parts of the package that no figure of a cell can depend on
_NOT_SOURCE = ("cli", "demo.py", "demo_lm.py", "plan", "probe.py", "report", "sweep")
_HEAD = 1 << 20
_OF_RESULT = {"tasks", "trained_tokens", "seconds", "peak_memory_gib", "threads", "run"}
NEVER = 10**9


class Cells:
    """The cells of a grid: their settings, where they lie, and which of them are finished.

    Args:
        grid: what is asked for.
        directory: D, see above.

    Raises:
        ValueError, FileNotFoundError: the grid's recipe, or one of its tasks, cannot be read.
    """

    def __init__(self, grid: Grid, directory: Path) -> None:
        self.grid, self.directory = grid, directory
        self.base = read_recipe(config_path(grid.base))
        for settings in (self.base, grid.overrides, *(row.overrides for row in grid.rows)):
            _refuse_secrets(settings)
        named = {name for row in grid.rows for name in row.overrides} | set(grid.overrides) | set(self.base)
        self.common = {
            # figures of every step are read, and a bar of each cell would fill the log
            "logging_steps": 1,
            "eval_steps": NEVER,
            "disable_tqdm": True,
            **({} if "report_to" in named else {"report_to": "none"}),
        }
        self.tasks = {name: load_task(name) for name in {*grid.test, *filter(None, [grid.validation_task])}}
        self.unread = {name for name in self.tasks if is_code(name) and not imports()}
        """Tasks that a dry run does not import, and so cannot compare."""
        self._fingerprint = cache(fingerprint)  # of files that stay as they are while the cells run

    def every_cell(self) -> list[Cell]:
        """All cells that may run, those of unchosen rates left out beyond the validation seeds."""
        cells = {}
        for row in self.grid.rows:
            for cell in self.grid.first_cells(row):
                cells[cell.key] = cell
            for rate in self.grid.learning_rates:
                for cell in self.grid.last_cells(row, rate):
                    cells.setdefault(cell.key, cell)
        return list(cells.values())

    def path(self, cell: Cell) -> Path:
        """Where a cell's run writes."""
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
        """Everything that a cell's figures depend on, on one machine, as JSON gives it back."""
        settings = self.settings(cell)
        depends = {
            **{f"settings.{name}": value for name, value in settings.items()},
            **{f"task.{name}": self.tasks[name].fingerprint() for name in cell.tasks if name not in self.unread},
            **{
                f"files.{name}": self._fingerprint(settings[name])
                for name in ("model_name_or_path", "teacher_model_name_or_path", "dataset_name")
                if settings.get(name)
            },
            **{f"version.{package}": version(package) for package in _VERSIONS},
            "source": source(),
        }
        return json.loads(json.dumps(depends))

    def finished(self, cell: Cell) -> dict[str, Any] | None:
        """What cell.json holds, whatever it was made with; None where the cell is not finished."""
        try:
            stored = read_json(self.path(cell) / CELL)
        except (OSError, ValueError):
            return None
        if not (isinstance(stored, dict) and isinstance(stored.get("made_with"), dict)):
            return None
        result = stored.get("result")
        return stored if isinstance(result, dict) and result.keys() >= _OF_RESULT else None

    def known(self, cell: Cell) -> dict[str, Any] | None:
        """The figures of a finished cell that was made with what is asked for now."""
        stored = self.finished(cell)
        if stored is None:
            return None
        unread = {f"task.{name}" for name in self.unread}
        before = {name: value for name, value in stored["made_with"].items() if name not in unread}
        return stored["result"] if before == self.made_with(cell) else None

    def kept_threads(self) -> int | None:
        """The threads that finished cells ran with: others would round differently."""
        results = (stored["result"] for cell in self.every_cell() if (stored := self.finished(cell)) is not None)
        return next((result["threads"] for result in results), None)

    def refuse_changed(self, rerun: bool) -> int:
        """Refuse finished cells that were made with something else, or remove them.

        Args:
            rerun: remove them.

        Returns:
            How many were removed.

        Raises:
            ValueError: there are some, and `rerun` is false.
        """
        changed: dict[str, list[str]] = {}
        for cell in self.every_cell():
            stored = self.finished(cell)
            if stored is not None and stored["made_with"] != (now := self.made_with(cell)):
                before = stored["made_with"]
                changed[cell.key] = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
        if changed and not rerun:
            first = next(iter(changed))
            raise ValueError(
                f"{len(changed)} finished cells in {self.directory} were made with something else, {first} with "
                f"another {', '.join(changed[first][:5])}: give --rerun_changed to run them again, or another "
                "--output_dir."
            )
        for key in changed:
            shutil.rmtree(self.directory / "cells" / key)
        return len(changed)

    def check(self, trusted: bool = True) -> None:
        """Refuse what would not run, before anything does: every row's fields, then models, tokenizers and prompts.

        Args:
            trusted: whether somebody vouched for the code that the grid names; else a model's own code does not run.

        Raises:
            ValueError, FileNotFoundError, ImportError: as `tipdistill train --dry_run`.
        """
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
                    path = write_text(Path(folder) / "recipe.yaml", yaml.safe_dump(settings), durable=False)
                    argv = ["--config", str(path), "--output_dir", folder, FLAG if trusted else "--dry_run"]
                    try:
                        read_arguments(argv)
                        with redirect_stdout(io.StringIO()) as printed, warnings.catch_warnings():
                            warnings.simplefilter("ignore", FutureWarning)  # the cells' own stand in workers.log
                            code = run_recipe([*argv, "--dry_run"])
                    except (ValueError, OSError, ImportError) as error:
                        raise type(error)(str(error).replace(str(path), f"{row.name} in the grid")) from error
                    if code:
                        raise ValueError(f"{row.name} would not run: {printed.getvalue().strip()[-300:]}")

    def job(self, cell: Cell, threads: int, run: Mapping[str, Any]) -> Job:
        """What a worker needs to run a cell.

        Args:
            cell: of the grid.
            threads: of the worker.
            run: commit, day and workers of the sweep that runs it.
        """
        return Job(
            self.path(cell),
            self.settings(cell),
            self.made_with(cell),
            {name: self.tasks[name].name for name in cell.tasks},
            self.grid.num_samples,
            self.grid.keep_models,
            threads,
            run,
        )


def _refuse_secrets(settings: Mapping[str, Any]) -> None:
    """Every cell's settings are written down."""
    variables = [f"env.{name}" for name in settings.get("env") or {} if is_secret_variable(str(name))]
    secrets = [*secret_names(settings), *variables]
    if secrets:
        raise ValueError(
            f"{', '.join(secrets)}: a sweep writes the settings of its cells down, so no key may stand in them: export "
            "it in your shell (HF_TOKEN for the hub)."
        )


def _of_seed(value: Any, seed: int) -> Any:
    return value.replace("{seed}", str(seed)) if isinstance(value, str) else value


def fingerprint(name: str) -> str:
    """A hash of a local file or directory (of large files the size, the beginning and the end); a hub id as it is.

    What a pruned model says of its layers is left out: these figures differ in their last digits by processor, where
    the model does not.

    Example:
        >>> fingerprint("Qwen/Qwen3-8B")
        'Qwen/Qwen3-8B'
    """
    path = Path(name).expanduser()
    if not path.exists():
        return name
    files = [path] if path.is_file() else sorted(inside for inside in path.rglob("*") if _counts(inside))
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)} {size}\n".encode())
        with file.open("rb") as opened:
            digest.update(opened.read(_HEAD))
            opened.seek(max(0, size - _HEAD))
            digest.update(opened.read())
    return digest.hexdigest()[:16]


def _counts(path: Path) -> bool:
    return path.is_file() and path.name != "prune.json"


@cache
def source() -> str:
    """A hash of the code that a run goes through, comments aside."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        if path.relative_to(package).parts[0] not in _NOT_SOURCE:
            digest.update(ast.dump(ast.parse(path.read_bytes())).encode())
    return digest.hexdigest()[:16]


# One cell, in a worker.


@dataclass(frozen=True)
class Job:
    """What a worker needs to know of a cell.

    Attributes:
        directory: where the cell's run writes.
        settings: its recipe.
        made_with: see `Cells.made_with`.
        tasks: what it is measured on, as in the grid → as the evaluation calls it.
        num_samples: completions per problem.
        keep_model: leave the trained student on the disk.
        threads: of the worker.
        run: commit, day and workers of the sweep that runs it.
    """

    directory: Path
    settings: Mapping[str, Any]
    made_with: Mapping[str, Any]
    tasks: Mapping[str, str]
    num_samples: int
    keep_model: bool
    threads: int
    run: Mapping[str, Any]


def run_cell(job: Job) -> dict[str, Any]:
    """Train and measure one cell, from its checkpoint where it has one, and write its cell.json.

    Raises:
        RuntimeError: the run refused or failed.
    """
    import torch
    from accelerate.state import AcceleratorState, GradientState

    from ..trainer import last_complete_checkpoint
    from ..training.monitor import reset_peak_memory

    started = job.directory / "made_with.json"
    made_with = json.dumps(job.made_with, indent=1) + "\n"
    if job.directory.exists() and (not started.is_file() or started.read_text(encoding="utf-8") != made_with):
        shutil.rmtree(job.directory)  # begun with other settings
    job.directory.mkdir(parents=True, exist_ok=True)
    checkpoint = last_complete_checkpoint(job.directory)
    if checkpoint is None:
        shutil.rmtree(job.directory)  # a run that was killed starts afresh
        job.directory.mkdir(parents=True)
    write_text(started, made_with)
    recipe = write_text(job.directory / "recipe.yaml", yaml.safe_dump(dict(job.settings), sort_keys=False))
    # what a cell before this one left in the process
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    reset_peak_memory()
    # whoever started the sweep was asked
    argv = ["--config", str(recipe), "--output_dir", str(job.directory), FLAG]
    try:
        code = run_recipe(argv + (["--resume_from_checkpoint", checkpoint] if checkpoint else []))
    except Exception:
        print(printable(traceback.format_exc()), file=sys.stderr)  # the log has it all, the table one line
        raise
    if code > 128:
        raise Stopped(code)  # a process of the run was told to stop
    if code:
        raise RuntimeError(f"the run ended with exit code {code}")
    result = _figures(job)
    if not job.keep_model:
        for path in (*job.directory.glob("*.safetensors"), *job.directory.glob("checkpoint-*")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    stored = {"made_with": dict(job.made_with), "result": result}
    write_text(job.directory / CELL, json.dumps(stored, indent=1) + "\n")
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
    """Task → how many samples of each problem were right at a step of the run, or the divergence of its samples."""
    from ..evaluate.run import divergence_of, read_samples, samples_path

    root = job.directory / "eval" / f"step-{step}"
    figures = json.loads((root / "metrics.json").read_text(encoding="utf-8"))["tasks"]
    measured = {}
    for asked, name in job.tasks.items():
        problems = figures[name]["problems"]
        samples: list[list[dict[str, Any]]] = [[] for _ in range(problems)]
        for (problem, _), row in read_samples(samples_path(root, name), problems).items():
            samples[problem].append(row)
        compared = "divergence" in samples[0][0]
        measured[asked] = {
            **(
                {"divergence": [divergence_of(rows) for rows in samples]}
                if compared
                else {"correct": [sum(bool(row["correct"]) for row in rows) for rows in samples]}
            ),
            "num_samples": job.num_samples,
            "mean_tokens": figures[name]["mean_tokens"],
            "truncated": figures[name]["truncated"],
        }
    return measured
