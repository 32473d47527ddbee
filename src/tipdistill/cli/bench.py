"""tipdistill bench: what the engine costs beside its peers, and the tables made of it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..bench import measure, table
from ..bench.head import PRESETS as HEADS
from ..bench.head import TOLERANCES, run_head, run_scaling
from ..bench.plan import CASES, run_plan
from ..bench.records import run_records
from ..bench.select import run_select
from ..bench.step import PRESETS as STEPS
from ..bench.step import run_step

DOCUMENTS = ("README.md", "docs/engine.md", "docs/probe.md", "docs/report.md", "docs/scaling.md")


def main(argv: list[str]) -> int:
    """Run one benchmark and write its JSON, or rewrite the tables. 1 where a variant was refused.

    Raises:
        ValueError: an unknown benchmark, preset, rule or table (the nearest is given), or sizes that make no sense.
    """
    arguments = vars(_parser().parse_args(argv))
    what, output = arguments.pop("what"), arguments.pop("output", None)
    if what == "table":
        for document in arguments["documents"]:
            changed = table.update(Path(document), arguments["results"])
            print(f"{document}: {'rewritten' if changed else 'as the results have it'}")
        return 0
    given = {name: value for name, value in arguments.items() if value is not None}
    runs: dict[str, Callable[..., dict[str, Any]]] = {
        "head": _head,
        "step": run_step,
        "select": run_select,
        "records": run_records,
        "plan": run_plan,
    }
    result = runs[what](**given)
    suffix = result["preset"]
    path = output or measure.RESULTS / f"{what}-{suffix}.json"
    measure.write(path, result)
    refused = [name for name, entry in result.get("variants", {}).items() if "refused" in entry]
    print(f"written: {path}" + (f"; refused: {', '.join(refused)}" if refused else ""))
    return 1 if refused else 0


def _head(preset: str = "cpu", **given: Any) -> dict[str, Any]:
    if preset == "scaling":
        return run_scaling(**given)
    return run_head(preset, **given)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tipdistill bench", description=measure.__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(
        dest="what", required=True, metavar="head | step | select | records | plan | table"
    )

    head = commands.add_parser("head", help="score + select + loss of two lm_heads", allow_abbrev=False)
    head.add_argument("--preset", help=f"{', '.join(HEADS)} (default cpu)")
    head.add_argument("--rounds", type=int, help="timed runs of each variant, taking turns")
    for name in ("tokens", "vocabulary", "student_width", "teacher_width", "rollout_length", "threads"):
        head.add_argument(f"--{name}", type=int)
    head.add_argument("--dtype", help=" or ".join(TOLERANCES))
    head.add_argument("--device", help="cpu or cuda")

    step = commands.add_parser("step", help="a whole training step", allow_abbrev=False)
    step.add_argument("--preset", help=f"{', '.join(STEPS)} (default tiny)")
    step.add_argument("--rounds", type=int, help="trainings of each variant, taking turns")
    step.add_argument("--steps", type=int, help="timed steps of one training")

    select = commands.add_parser("select", help="the rules alone", allow_abbrev=False)
    select.add_argument("--rounds", type=int, help="timed runs of each rule and size")
    select.add_argument("--sizes", type=int, nargs="+", help="numbers of tokens")
    select.add_argument("--rules", nargs="+", help="names of rules")
    select.add_argument("--device", help="cpu or cuda")
    select.add_argument("--threads", type=int)

    records = commands.add_parser("records", help="writing token records", allow_abbrev=False)
    records.add_argument("--sizes", type=int, nargs="+", help="numbers of tokens")
    records.add_argument("--vocabulary", type=int)
    records.add_argument("--threads", type=int)

    plan = commands.add_parser("plan", help="the plan's memory beside measured steps", allow_abbrev=False)
    plan.add_argument("--cases", nargs="+", help=f"{', '.join(CASES)} (default all)")
    plan.add_argument("--steps", type=int, help="of each training, at least 2")

    for command in (head, step, select, records, plan):
        command.add_argument("--output", type=Path, help=f"the JSON file (default {measure.RESULTS}/NAME.json)")

    tables = commands.add_parser("table", help="rewrite the tables of the documents", allow_abbrev=False)
    tables.add_argument("documents", nargs="*", default=DOCUMENTS)
    tables.add_argument("--results", type=Path, default=measure.RESULTS)
    return parser
