"""`tipdistill demo`: the whole method on a small task, or on a small language model, on the CPU, in minutes."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from ..sweep.workers import cores
from .flags import Parser


def main(argv: list[str]) -> int:
    """Run the demo and print its table; returns the exit code.

    Args:
        argv: the arguments after `tipdistill demo`.
    """
    options = parser().read(argv)
    if not 0 <= options.seed < 2**32:
        raise ValueError(f"--seed must be in [0, 2³²), got {options.seed}.")
    available = cores()
    if options.task == "smollm2":
        if options.workers is not None:
            raise ValueError("--workers: of smollm2 one run is at work at a time, to keep to 6 GiB.")
        return _language_model(options, available)
    workers = options.workers if options.workers is not None else min(6, available, max(2, available // 2))
    if workers < 1:
        raise ValueError(f"--workers must be at least 1, got {workers}.")

    from .. import demo  # after --help and the flags' own errors: it loads torch

    started = time.monotonic()
    print(f"tipdistill demo: four-digit addition, one character per token. {demo.PLANTED}", flush=True)
    name = "demo-quick" if options.quick else "demo"
    grid = demo.demo_grid(name, options.output_dir, options.seed)
    result = demo.run(grid, demo.TAUGHT[name], workers, threads=max(1, available // workers))
    show(result, grid.output_dir, time.monotonic() - started)
    if options.quick:
        print("This was a short version: shorter training, fewer runs. `tipdistill demo` trains to the end.")
    return 0


def parser() -> Parser:
    """The flags of `tipdistill demo`."""
    parser = Parser("demo", __doc__, defaults=False)
    parser.add_argument(
        "task",
        nargs="?",
        choices=("addition", "smollm2"),
        default="addition",
        help="addition (default): two models taught here; smollm2: a real language model, pruned "
        "and healed, which takes longer",
    )
    parser.add_argument("--quick", action="store_true", help="a short version: shorter training, fewer runs")
    parser.add_argument(
        "--output_dir", type=Path, help="where everything goes (runs/demo, or runs/demo-lm; with --quick, ...-quick)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of prompts, sampling and selection")
    parser.add_argument(
        "--workers", type=int, help="runs at a time (default: one per two cores, at most 6, at least 2)"
    )
    return parser


def _language_model(options: argparse.Namespace, threads: int) -> int:
    from .. import demo_lm

    started = time.monotonic()
    grid = demo_lm.demo_grid("demo-lm-quick" if options.quick else "demo-lm", options.output_dir, options.seed)
    result = demo_lm.run(grid, threads)
    show_language_model(result, grid.output_dir, time.monotonic() - started)
    if options.quick:
        print("This was a short version: fewer steps, fewer runs. `tipdistill demo smollm2` has all of them.")
    return 0


def show_language_model(result: dict[str, Any], directory: Path, seconds: float) -> None:
    """The table of the language model's demo, three answers, and where everything lies.

    Args:
        result: as `tipdistill.demo_lm.run` returns it.
        directory: where it was written.
        seconds: that the demo took.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from ..demo_lm import answers, note
    from ..demo_lm import table as table_of
    from ..terminal import PlainConsole

    console = PlainConsole()
    headings, lines = table_of(result)
    table = Table(title=f"{result['teacher']}, pruned and healed; held out, in brackets: 95 %", box=SIMPLE_HEAD)
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "rule" else "right", no_wrap=heading == "rule")
    for line in lines:
        table.add_row(*line)
    console.print(table)
    if told := note(result):
        console.print(f"{told}\n", soft_wrap=True)
    names, rows = answers(result)
    for row in rows:
        console.print("\n".join(f"{name}: {text}" for name, text in zip(names, row, strict=True)), soft_wrap=True)
        console.print("")
    shares = ", ".join(f"{name.upper()} {share['token_share']:.1%}" for name, share in result["quadrants"].items())
    console.print(f"Tokens of the student before healing: {shares}.", soft_wrap=True)
    console.print(
        f"{seconds:.0f} s in all. Its tokens, one by one: {directory / 'report.html'} · picture: "
        f"{directory / 'tip_map.png'} · all figures: {directory / 'results.json'} · models and runs: "
        f"{directory / 'models'}, {directory / 'cells'} · warnings: {directory / 'workers.log'}",
        soft_wrap=True,
    )


def show(result: dict[str, Any], directory: Path, seconds: float) -> None:
    """The table of a demo, its quadrants, and where everything lies.

    Args:
        result: as `tipdistill.demo.run` returns it.
        directory: where it was written.
        seconds: that the demo took.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from ..demo import table as table_of
    from ..terminal import PlainConsole

    console, settings = PlainConsole(), result["settings"]
    table = Table(
        title=f"mean@{settings['samples']} at temperature 1 on {settings['problems']} held-out problems, "
        "± standard error",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    table.add_column("rule")
    headings, lines = table_of(result)
    for heading in headings[1:]:
        # an accuracy and its error stay on one line, and the table within the 80 columns of a terminal
        table.add_column(heading, justify="right", min_width=13 if heading.startswith("accuracy") else None)
    for line in lines:
        table.add_row(*line)
    console.print(table)
    shares = ", ".join(
        f"{name.upper()} {quadrant['token_share']:.1%} of the tokens and {quadrant['divergence_share']:.1%} of the "
        "divergence"
        for name, quadrant in result["quadrants"].items()
    )
    for text in (
        f"Before distillation: {shares}. The teacher scores {result['teacher_accuracy']:.3f}.",
        result["note"],
        f"{seconds:.0f} s in all. Picture: {directory / 'tip_map.png'} · table: {directory / 'results.md'} · all "
        f"figures: {directory / 'results.json'} · models and runs: {directory / 'models'}, {directory / 'cells'} · "
        f"warnings: {directory / 'workers.log'}",
    ):
        console.print(text, soft_wrap=True)
