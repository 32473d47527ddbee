"""tipdistill score: rollouts of a student, scored beside a teacher, as token records. Trains nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ..files import alone
from ..pair import Pair, about_of, read_pair, write_scored
from ..records import SIDECAR_FILE, TOKENS_FILE, About, Records, RecordsWriter, open_records
from ..select.quadrants import DIVERGENCE_THRESHOLD, ENTROPY_THRESHOLD, NAMES
from ..teachers import TeacherUnavailableError
from ..teachers.rollouts import said_of_bounds
from ..terminal import PlainConsole, say
from .flags import Parser, pair_of, pair_parser


def main(argv: list[str]) -> int:
    """Score as the flags say; returns the exit code.

    Raises:
        ValueError, FileNotFoundError, ImportError: anything that can be refused before weights are loaded.
    """
    options = parser().read(argv)
    directory = Path(options.output_dir)
    with alone(directory, "scoring"):
        return _score(options, directory)


def _score(options: Any, directory: Path) -> int:
    if (directory / TOKENS_FILE).exists() and not options.overwrite_output_dir:
        raise ValueError(
            f"{directory} already holds token records: choose another --output_dir, or replace them with "
            "--overwrite_output_dir."
        )
    config = pair_of(options)

    rules = options.rules.split(",")

    def about(pair: Pair | None) -> About:
        borders = options.entropy_threshold, options.divergence_threshold
        return about_of(config, rules, pair, options.retention, options.scope, *borders)

    about(None)  # names and numbers, before any file is read
    pair = read_pair(config, rules)
    started = time.perf_counter()
    with RecordsWriter(directory, pair.tokenizer, about(pair)) as writer, _kept(writer):
        say("\n".join(f"# {label:<10}{text}" for label, text in pair.described.items()))
        with _progress() as progress:
            total = len(pair.prompts) * config.num_generations
            task = progress.add_task("rollouts scored", total=total, completed=writer.rollouts)
            write_scored(config, pair, writer, lambda written: progress.update(task, completed=written))
    show(open_records(directory), time.perf_counter() - started)
    return 0


@contextmanager
def _kept(writer: RecordsWriter) -> Iterator[None]:
    """A teacher that stays away ends the scoring with what was scored, and says how to go on."""
    try:
        yield
    except TeacherUnavailableError as error:
        kept = f" The {writer.rollouts:,} rollouts that are scored are kept: the same command goes on from there."
        raise TeacherUnavailableError(f"{error}.{kept * bool(writer.rollouts)}") from error


def parser() -> Parser:
    """The flags of `tipdistill score`."""
    parser = pair_parser("score", __doc__, max_prompts=100, max_new_tokens=1024)
    add = parser.add_argument_group("records").add_argument
    add("--rules", default="soft_or", help="selection rules, the main one first, separated by commas")
    add("--retention", type=float, default=0.5, help="share of the tokens that each rule keeps, in (0, 1]")
    add("--scope", help="where the budget is spent: rollout, or batch (all tokens); default: as the rule has it")
    add("--entropy_threshold", type=float, default=ENTROPY_THRESHOLD, help="border of the quadrants, in ĥ")
    add("--divergence_threshold", type=float, default=DIVERGENCE_THRESHOLD, help="border of the quadrants, nats")
    add("--overwrite_output_dir", action="store_true", help="replace the records that are there")
    return parser


def _progress() -> Progress:
    columns = (TextColumn("{task.description} {task.completed}/{task.total}"), BarColumn())
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=PlainConsole(stderr=True))


def show(records: Records, seconds: float) -> None:
    """Quadrants and what each rule keeps, as tables."""
    sidecar, console = records.sidecar, PlainConsole()
    console.print(
        f"{sidecar['tokens']:,} tokens of {sidecar['rollouts']:,} rollouts in {seconds:.0f} s: {records.directory}"
    )
    table = Table("quadrant", "tokens", "divergence")
    for number, name in NAMES.items():
        shares = sidecar["quadrants"][f"q{number}"]
        table.add_row(f"Q{number} {name}", f"{shares['token_share']:.1%}", f"{shares['divergence_share']:.1%}")
    console.print(table)
    table = Table("rule", "tokens kept", "divergence kept", title=f"at retention {sidecar['retention']:g}")
    for place, rule in enumerate(sidecar["rules"]):
        column = f"kept_{rule}" if place else "kept"
        columns = records.read([column, "reverse_kl"])
        kept, divergence = columns[column].to_numpy(), columns["reverse_kl"].to_numpy()
        total = float(divergence.sum(dtype=float))
        share = float(divergence[kept].sum(dtype=float)) / total if total else 0.0
        table.add_row(rule, f"{kept.mean():.1%}", f"{share:.1%}")
    console.print(table)
    bounds = said_of_bounds(sidecar["settings"])
    if bounds:
        console.print(bounds, soft_wrap=True)
    console.print(f"Look at them: tipdistill report {records.directory} · settings: {SIDECAR_FILE}", soft_wrap=True)
