"""`tipdistill demo`: the whole method on a small task, on the CPU, in minutes.

A teacher and a student are taught addition from scratch (the student from corrupted solutions), then the student is
distilled on its own rollouts on all tokens, on a half, a fifth and a tenth of them, by `TIPTrainer`. Finished parts are
kept, so a killed demo goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..sweep.workers import cores, process_pool

PLANTED = (
    "The student's errors were planted in the data it was taught from (dropped carries, wrong digit sums), so this "
    "shows the mechanism and is no independent replication of the paper."
)


@dataclass(frozen=True)
class Cell:
    """One run: which rule keeps how much.

    Args:
        name: how the tables call it.
        rule: as `selection_rule` of `TIPConfig`.
        retention: likewise.
    """

    name: str
    rule: str
    retention: float

    @property
    def directory(self) -> str:
        return f"{self.rule.replace(':', '-')}-{round(100 * self.retention)}"


CELLS = (
    Cell("all tokens", "all", 1.0),
    Cell("Soft-OR", "soft_or", 0.5),
    Cell("Soft-OR", "soft_or", 0.2),
    Cell("Q3", "q3", 0.1),
    Cell("random", "random", 0.1),
    Cell("bottom half", "complement:soft_or", 0.5),
)


@dataclass(frozen=True)
class Settings:
    """What a demo runs; everything that changes its figures.

    Args:
        teacher_steps, student_steps: optimiser steps that each is taught before distillation.
        steps: optimiser steps of every run.
        prompts: prompts per step.
        learning_rate: of the distillation.
        problems: held-out problems that accuracy is measured on.
        samples: completions per problem, the k of mean@k.
        seed: of prompts, sampling and selection.
        cells: the runs.
    """

    teacher_steps: int = 1000
    student_steps: int = 700
    steps: int = 100
    prompts: int = 32
    learning_rate: float = 1e-3
    problems: int = 250
    samples: int = 4
    seed: int = 0
    cells: tuple[Cell, ...] = CELLS


FULL = Settings()
QUICK = Settings(
    teacher_steps=300,
    student_steps=500,
    steps=40,
    problems=100,
    samples=2,
    cells=tuple(cell for cell in CELLS if cell.rule != "complement:soft_or" and cell.retention != 0.5),
)


def main(argv: list[str]) -> int:
    """Run the demo; returns the exit code.

    Args:
        argv: the arguments after `tipdistill demo`.
    """
    parser = argparse.ArgumentParser(prog="tipdistill demo", description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="about a minute: shorter training, four of the six runs")
    parser.add_argument("--output_dir", type=Path, help="where everything goes (runs/demo, or runs/demo-quick)")
    parser.add_argument("--seed", type=int, default=0, help="of prompts, sampling and selection")
    parser.add_argument(
        "--workers", type=int, help="runs at a time (default: one per two cores, at most 6, at least 2)"
    )
    options = parser.parse_args(argv)
    if not 0 <= options.seed < 2**32:
        parser.error(f"--seed must be in [0, 2³²), got {options.seed}")
    available = cores()
    workers = options.workers if options.workers is not None else min(6, available, max(2, available // 2))
    if workers < 1:
        parser.error(f"--workers must be at least 1, got {workers}")
    settings = replace(QUICK if options.quick else FULL, seed=options.seed)
    output_dir = options.output_dir or Path("runs/demo-quick" if options.quick else "runs/demo")
    run(settings, output_dir, workers, threads=max(1, available // workers))
    return 0


def run(settings: Settings, output_dir: Path, workers: int, threads: int) -> list[dict[str, Any]]:
    """Teach, measure, distil every cell, and write results.json, results.md and tip_map.png under `output_dir`.

    Args:
        settings: sizes and cells.
        output_dir: existing parts with the same settings are kept.
        workers: processes at a time.
        threads: of each process.

    Returns:
        One row per cell, as in results.json.
    """
    started = time.monotonic()
    output_dir.mkdir(parents=True, exist_ok=True)
    board = _Board(output_dir, settings)
    with _pool(workers, threads, output_dir / "workers.log") as pool, board.live():
        board.follow([pool.submit(_teach, name, settings, output_dir) for name in ("teacher", "student")])
        before = pool.submit(_measure_before, settings, output_dir)
        cells = [pool.submit(_distil, cell, settings, output_dir) for cell in settings.cells]
        board.follow([before, *cells])
        start, rows = before.result(), [cell.result() for cell in cells]
    for row in rows:
        row |= {"accuracy_before": start["accuracy"], "standard_error_before": start["standard_error"]}
    result = {
        "task": "four-digit addition with planted errors",
        "note": PLANTED,
        "settings": asdict(settings),
        "teacher_accuracy": start["teacher_accuracy"],
        "quadrants": start["quadrants"],
        "rows": rows,
        "machine": _machine(workers, threads),
    }
    _write(output_dir / "results.json", json.dumps(result, indent=2) + "\n")
    _write(output_dir / "results.md", markdown(rows, settings.samples) + "\n")
    board.finish(result, time.monotonic() - started)
    return rows


def markdown(rows: list[dict[str, Any]], samples: int) -> str:
    """The result table of the demo in Markdown.

    Args:
        rows: as `run` returns them.
        samples: the k of mean@k.

    Example:
        >>> row = {"name": "all tokens", "retention": 1.0, "accuracy_before": 0.25, "standard_error_before": 0.02,
        ...        "accuracy": 0.75, "standard_error": 0.01, "trained_tokens": 4300, "seconds": 21.0}
        >>> print(markdown([row], samples=4).splitlines()[-1])
        | all tokens | 100 % | 0.250 ± 0.020 | 0.750 ± 0.010 | 4,300 | 21 s |
    """
    headings = _headings(samples)
    lines = [headings, ["---"] * len(headings), *map(_columns, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _headings(samples: int) -> list[str]:
    return ["rule", "retention", "accuracy before", f"accuracy after (mean@{samples})", "tokens trained on", "time"]


def _columns(row: dict[str, Any]) -> list[str]:
    return [
        row["name"],
        f"{100 * row['retention']:.0f} %",
        f"{row['accuracy_before']:.3f} ± {row['standard_error_before']:.3f}",
        f"{row['accuracy']:.3f} ± {row['standard_error']:.3f}",
        f"{row['trained_tokens']:,}",
        f"{row['seconds']:.0f} s",
    ]


# What runs in a worker process.


@contextmanager
def _pool(workers: int, threads: int, log: Path) -> Iterator[ProcessPoolExecutor]:
    """Processes that end with this one, and whose death is one clear error."""
    with process_pool(workers, threads, log) as pool:
        try:
            yield pool
        except BrokenProcessPool as error:
            raise ChildProcessError(
                f"a worker process was killed (out of memory?); {log} holds what the workers said. Run the same "
                "command again: finished parts are kept."
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _trainings(settings: Settings) -> dict[str, Any]:
    from ..tasks import arithmetic

    return {
        "teacher": replace(arithmetic.TEACHER, steps=settings.teacher_steps),
        "student": replace(arithmetic.STUDENT, steps=settings.student_steps),
    }


def _teach(name: str, settings: Settings, output_dir: Path) -> None:
    from ..tasks import arithmetic
    from ..tasks.written import point_to

    training = _trainings(settings)[name]
    taught_now = False

    def report(step: int, loss: float) -> None:
        nonlocal taught_now
        taught_now = True
        if step % 10 == 0 or step == training.steps:
            _progress(output_dir, name, step=step, steps=training.steps, loss=loss)

    directory = arithmetic.taught(name, training, output_dir / "models", report)
    _progress(output_dir, name, step=training.steps, steps=training.steps, done=True, kept_from_before=not taught_now)
    point_to(directory)
    if name == "student":
        arithmetic.TASK.write_prompts(output_dir / "prompts.jsonl", settings.steps * settings.prompts, settings.seed)


def _models(output_dir: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM

    student, teacher = (
        AutoModelForCausalLM.from_pretrained(output_dir / "models" / name).eval() for name in ("student", "teacher")
    )
    return student, teacher


def _made_with(settings: Settings, output_dir: Path) -> dict[str, Any]:
    """Everything that a finished part depends on; it is kept where nothing of this has changed."""
    import torch
    import transformers
    import trl

    from tipdistill import __version__

    source = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        source.update(path.read_bytes())
    return {
        **{name: value for name, value in asdict(settings).items() if name != "cells"},
        "student": (output_dir / "models" / "student").resolve().name,
        "teacher": (output_dir / "models" / "teacher").resolve().name,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
        "tipdistill": __version__,
        "source": source.hexdigest(),
    }


def _finished(path: Path, made_with: dict[str, Any]) -> dict[str, Any] | None:
    """What an earlier demo left in `path`, where it was made with the same."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return known if known["made_with"] == made_with else None


def _measure_before(settings: Settings, output_dir: Path) -> dict[str, Any]:
    """The student's and the teacher's accuracy before distillation, and the TIP map of the student's tokens."""
    made_with = _made_with(settings, output_dir)
    known = _finished(output_dir / "before.json", made_with)
    if known is not None and (output_dir / "tip_map.png").exists():
        return known

    from ..report.tip_map import tip_map
    from ..select import select
    from ..select.quadrants import quadrant_shares, quadrants
    from ..tasks import arithmetic

    student, teacher = _models(output_dir)
    pairs = arithmetic.problems(settings.problems, settings.seed, held_out=True)
    accuracy, standard_error = arithmetic.evaluate(student, pairs, settings.samples, settings.seed)
    prompts = [arithmetic.prompt_of(*pair) for pair in arithmetic.problems(256, settings.seed)]
    scores, rollout = arithmetic.score(student, teacher, prompts, settings.seed)
    quadrant, delta = quadrants(scores), scores.require("reverse_kl")
    tip_map(
        scores,
        output_dir / "tip_map.png",
        selection=select(scores, "soft_or", 0.2, rollout=rollout),
        title="A student before distillation (addition, errors planted); kept by Soft-OR at 20 %",
    )
    found = {
        "made_with": made_with,
        "accuracy": accuracy,
        "standard_error": standard_error,
        "teacher_accuracy": arithmetic.evaluate(teacher, pairs, 1, settings.seed)[0],
        "quadrants": {
            f"q{number}": {
                "token_share": share,
                "divergence_share": (delta[quadrant == number].sum() / delta.sum()).item(),
            }
            for number, share in quadrant_shares(quadrant).items()
        },
    }
    _write(output_dir / "before.json", json.dumps(found, indent=2) + "\n")
    return found


def _distil(cell: Cell, settings: Settings, output_dir: Path) -> dict[str, Any]:
    directory = output_dir / "cells" / cell.directory
    made_with = {**asdict(cell), **_made_with(settings, output_dir)}
    known = _finished(directory / "metrics.json", made_with)
    if known is not None:
        _progress(output_dir, cell.directory, **known["last"], done=True, kept_from_before=True)
        return known["row"]

    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback

    from ..config import TIPConfig
    from ..tasks import arithmetic
    from ..trainer import TIPTrainer

    directory.mkdir(parents=True, exist_ok=True)
    student, teacher = _models(output_dir)
    held_out = arithmetic.problems(settings.problems, settings.seed, held_out=True)
    last: dict[str, Any] = {"step": 0, "steps": settings.steps}

    class Report(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs and "loss" in logs:
                last.update(
                    step=state.global_step,
                    loss=float(logs["loss"]),
                    kept=float(logs["selection/kept_fraction"]),
                    trained_tokens=int(logs["selection/trained_tokens"]),
                )
                _progress(output_dir, cell.directory, **last)

        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step % max(1, settings.steps // 4) == 0 and state.global_step < settings.steps:
                began = time.monotonic()
                last["accuracy"], _ = arithmetic.evaluate(model, held_out[:100], 1, settings.seed)
                self.seconds += time.monotonic() - began

        seconds = 0.0

    report = Report()
    prompts = arithmetic.problems(settings.steps * settings.prompts, settings.seed)
    trainer = TIPTrainer(
        student,
        teacher,
        TIPConfig(
            str(directory),
            selection_rule=cell.rule,
            retention=cell.retention,
            max_steps=settings.steps,
            per_device_train_batch_size=settings.prompts,
            max_completion_length=arithmetic.COMPLETION_TOKENS,
            learning_rate=settings.learning_rate,
            warmup_steps=settings.steps // 10,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": 0.1},
            seed=settings.seed,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        Dataset.from_list([{"prompt": arithmetic.prompt_of(*pair)} for pair in prompts]),
        processing_class=arithmetic.build_tokenizer(),
        callbacks=[report],
    )
    trainer.remove_callback(PrinterCallback)
    began = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - began - report.seconds
    accuracy, standard_error = arithmetic.evaluate(trainer.model, held_out, settings.samples, settings.seed)
    last["accuracy"] = accuracy
    trainer.save_model(str(directory / "model"))
    row = {
        **asdict(cell),
        "accuracy": accuracy,
        "standard_error": standard_error,
        "trained_tokens": last["trained_tokens"],
        "seconds": seconds,
    }
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    text = json.dumps({"made_with": made_with, "row": row, "last": last, "history": history}, indent=2)
    _write(directory / "metrics.json", text + "\n")
    _progress(output_dir, cell.directory, **last, done=True)
    return row


# What the parent shows.


def _progress(output_dir: Path, name: str, **state: Any) -> None:
    (output_dir / "progress").mkdir(exist_ok=True)
    _write(output_dir / "progress" / f"{name}.json", json.dumps(state))


def _write(path: Path, text: str) -> None:
    """Write in full or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


class _Board:
    """A table of all parts that is redrawn while they run; plain lines where there is no terminal."""

    def __init__(self, output_dir: Path, settings: Settings) -> None:
        from rich.console import Console

        self.output_dir, self.settings = output_dir, settings
        self.console = Console()
        self.parts = {"teacher": "teach the teacher", "student": "teach the student (corrupted data)"}
        self.parts |= {cell.directory: f"{cell.name} {100 * cell.retention:.0f} %" for cell in settings.cells}
        self.said: set[tuple[str, int]] = set()
        self.began = time.monotonic()
        for stale in (output_dir / "progress").glob("*.json"):
            stale.unlink()

    @contextmanager
    def live(self) -> Iterator[None]:
        from rich.live import Live

        self.console.print("tipdistill demo: four-digit addition, one character per token. " + PLANTED, soft_wrap=True)
        if not self.console.is_terminal:
            self.display = None
            yield
            return
        with Live(self._table(), console=self.console, refresh_per_second=4) as self.display:
            yield

    def follow(self, futures: list[Future]) -> None:
        pending = set(futures)
        while pending:
            done, pending = wait(pending, timeout=0.5)
            for future in done:
                future.result()  # an error in a worker is an error here
            if self.display is not None:
                self.display.update(self._table())
            else:
                self._say()

    def _states(self) -> dict[str, dict[str, Any]]:
        states = {}
        for name in self.parts:
            try:
                states[name] = json.loads((self.output_dir / "progress" / f"{name}.json").read_text(encoding="utf-8"))
            except (OSError, ValueError):
                states[name] = {}
        return states

    def _table(self) -> Any:
        from rich.table import Table

        elapsed = time.monotonic() - self.began
        states = self._states()
        table = Table(title=f"{elapsed:.0f} s{self._left(states, elapsed)}", title_justify="left")
        table.add_column("part")
        for heading in ("step", "loss", "kept", "accuracy"):
            table.add_column(heading, justify="right")
        for name, title in self.parts.items():
            table.add_row(title, *_cells_of(states[name]))
        return table

    def _left(self, states: dict[str, dict[str, Any]], elapsed: float) -> str:
        """Time left; a step of teaching counts as half a step of distillation (about what it takes)."""
        done = whole = 0.0
        for name in self.parts:
            steps = {"teacher": self.settings.teacher_steps, "student": self.settings.student_steps}.get(name)
            if not states[name].get("kept_from_before"):
                cost = 1.0 if steps is None else 0.5
                done += cost * states[name].get("step", 0)
                whole += cost * (self.settings.steps if steps is None else steps)
        if done < 0.05 * whole or not whole:
            return ""
        return f", about {elapsed * (whole - done) / done:.0f} s left"

    def _say(self) -> None:
        """Where there is no terminal: one line per part and quarter."""
        for name, state in self._states().items():
            quarter = 4 if state.get("done") else min(3, 4 * state.get("step", 0) // state.get("steps", 1))
            if quarter and (name, quarter) not in self.said:
                self.said.add((name, quarter))
                known = zip(("step", "loss", "kept", "accuracy"), _cells_of(state), strict=True)
                figures = ", ".join(f"{what} {value}" for what, value in known if value)
                came = " (kept from before)" if state.get("kept_from_before") else ""
                elapsed = time.monotonic() - self.began
                self.console.print(f"{elapsed:5.0f} s  {self.parts[name]}: {figures}{came}", soft_wrap=True)

    def finish(self, result: dict[str, Any], seconds: float) -> None:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        samples = self.settings.samples
        table = Table(
            title=f"mean@{samples} at temperature 1 on {self.settings.problems} held-out problems, ± standard error",
            title_justify="left",
            box=SIMPLE_HEAD,
        )
        table.add_column("rule")
        for heading in _headings(samples)[1:]:
            # an accuracy and its error stay on one line, and the table within the 80 columns of a terminal
            table.add_column(heading, justify="right", min_width=13 if heading.startswith("accuracy") else None)
        for row in result["rows"]:
            table.add_row(*_columns(row))
        self.console.print(table)
        shares = ", ".join(
            f"{name.upper()} {quadrant['token_share']:.1%} of the tokens and {quadrant['divergence_share']:.1%} of the "
            "divergence"
            for name, quadrant in result["quadrants"].items()
        )
        self.console.print(
            f"Before distillation: {shares}. The teacher scores {result['teacher_accuracy']:.3f}.", soft_wrap=True
        )
        self.console.print(PLANTED, soft_wrap=True)
        short = self.settings
        if short.steps < FULL.steps:
            self.console.print(
                f"This was a short version: {short.steps} steps instead of {FULL.steps}, teacher and student taught "
                f"for {short.teacher_steps} and {short.student_steps} instead of {FULL.teacher_steps} and "
                f"{FULL.student_steps}, {len(short.cells)} of {len(CELLS)} runs, {short.problems} problems instead of "
                f"{FULL.problems}. `tipdistill demo` trains to the end.",
                soft_wrap=True,
            )
        self.console.print(
            f"{seconds:.0f} s in all. Picture: {self.output_dir / 'tip_map.png'} · table: "
            f"{self.output_dir / 'results.md'} · all figures: {self.output_dir / 'results.json'} · models and runs: "
            f"{self.output_dir / 'models'}, {self.output_dir / 'cells'} · warnings: {self.output_dir / 'workers.log'}",
            soft_wrap=True,
        )


def _cells_of(state: dict[str, Any]) -> list[str]:
    if not state:
        return ["", "", "", ""]
    return [
        f"{state['step']}/{state['steps']}",
        f"{state['loss']:.4f}" if "loss" in state else "",
        f"{state['kept']:.0%}" if "kept" in state else "",
        f"{state['accuracy']:.2f}" if "accuracy" in state else "",
    ]


def _machine(workers: int, threads: int) -> dict[str, Any]:
    """Hardware, versions, commit and date, so that a figure can be placed."""
    import torch
    import transformers
    import trl

    from tipdistill import __version__

    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass  # not Linux: platform's own word serves
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "workers": workers,
        "threads_per_worker": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
        "tipdistill": __version__,
        "commit": commit or None,
        "date": datetime.now(UTC).date().isoformat(),
    }
