"""Kill runs at random operations on their files, go on, and compare with runs that were not killed.

    python -m faults.crash --kills 100           # from tests/, or `make crash`

Kill number n is the same on every machine that does the same operations: its kind, action and place are drawn from
(seed, n). Results are appended to LINES, one line a kill, and those that are there are not made again.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from faults import victims
from faults import world as worlds

from tipdistill.files import write_text
from tipdistill.provenance import environment

ATTEMPTS = 3
ACTIONS = ("kill", "half", "full")


def run(kind: str, root: Path, out: Path, log: Path, fault: victims.Fault | None = None) -> list[int]:
    """One command of a kind, from where `out` stands; returns the exit codes of its processes."""
    argv, small = worlds.command(kind, root, out), kind in ("sweep", "demo")
    if kind != "train-2":
        return victims.run(victims.Victim(argv, log, fault, small))
    port = random.SystemRandom().randrange(20000, 40000)
    return victims.run(
        *(victims.Victim(argv, log, fault, small, worlds.rank(number, port)) for number in range(2)),
    )


def reference(kind: str, root: Path) -> tuple[dict[str, str], int]:
    """What a run that is not killed leaves, and how many operations its first process takes."""
    out, log = root / f"straight-{kind}", root / f"straight-{kind}.log"
    codes = run(kind, root, out, log, victims.Fault(out, "count"))
    assert not any(codes), f"{kind} does not run at all: {log.read_text()[-2000:]}"
    counted = [int(line.split()[1]) for line in log.read_text().splitlines() if line.startswith("operations ")]
    return worlds.outcome(kind, out), max(counted)


# of a sweep's and the demo's operations most are their workers', which count on from the parent's
WORKERS_TOO = {"sweep": 600, "demo": 900}


def kill(kind: str, action: str, number: int, root: Path, straight: dict[str, str]) -> dict[str, Any]:
    """Kill one run, go on with it, and say what was wrong."""
    out, log = root / "killed", root / "killed.log"
    shutil.rmtree(out, ignore_errors=True)
    log.unlink(missing_ok=True)
    started = time.monotonic()
    codes = run(kind, root, out, log, victims.Fault(out, action, number))
    wrong = [f"half-written: {name}" for name in worlds.half_written(out)]
    struck = any(codes)
    attempts = 0
    while any(codes) and attempts < ATTEMPTS:
        codes = run(kind, root, out, log)
        attempts += 1
    if any(codes):
        wrong.append(f"it does not go on: {' '.join(log.read_text()[-300:].split())}")
    else:
        ended = worlds.outcome(kind, out)
        differing = sorted(name for name in {*ended, *straight} if ended.get(name) != straight.get(name))
        wrong += [f"differs: {name}" for name in differing]
    return {
        "kind": kind,
        "action": action,
        "operation": number,
        "struck": struck,
        "resumed": attempts,
        "wrong": wrong,
        "seconds": round(time.monotonic() - started, 1),
    }


def drawn(seed: int, number: int, kinds: tuple[str, ...], counts: dict[str, int]) -> tuple[str, str, int]:
    """Kind, action and operation of a kill; kinds take turns."""
    draw = random.Random(f"{seed} {number}")
    kind = kinds[number % len(kinds)]
    return kind, ACTIONS[number // len(kinds) % len(ACTIONS)], draw.randint(1, counts[kind])


def table(results: list[dict[str, Any]]) -> str:
    """The kills by kind, as Markdown."""
    lines = ["| run | kills | that struck | wrong |", "|---|---|---|---|"]
    for kind in worlds.KINDS:
        of = [result for result in results if result["kind"] == kind]
        bad = sum(bool(result["wrong"]) for result in of)
        if of:
            lines.append(f"| {kind} | {len(of)} | {sum(result['struck'] for result in of)} | {bad} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(worlds.KINDS))
    parser.add_argument("--minutes", type=float, default=600, help="stop after so many; the same command goes on")
    parser.add_argument("--lines", type=Path, default=Path("runs/crash/kills.jsonl"))
    parser.add_argument("--output", type=Path, help="where the summary goes, as JSON")
    options = parser.parse_args(argv)
    kinds, until = tuple(options.kinds.split(",")), time.monotonic() + 60 * options.minutes
    options.lines.parent.mkdir(parents=True, exist_ok=True)
    results = [json.loads(line) for line in options.lines.read_text().splitlines()] if options.lines.exists() else []
    known = {(result["seed"], result["number"]) for result in results}
    with tempfile.TemporaryDirectory(prefix="crash-") as folder:
        root = worlds.build(Path(folder))
        straight: dict[str, tuple[dict[str, str], int]] = {}
        for number in range(options.kills):
            if (options.seed, number) in known or time.monotonic() > until:
                continue
            kind = kinds[number % len(kinds)]
            if kind not in straight:
                straight[kind] = reference(kind, root)
            counts = {name: count + WORKERS_TOO.get(name, 0) for name, (_, count) in straight.items()}
            kind, action, operation = drawn(options.seed, number, kinds, counts)
            result = {"seed": options.seed, "number": number, **kill(kind, action, operation, root, straight[kind][0])}
            results.append(result)
            with options.lines.open("a") as file:
                file.write(json.dumps(result) + "\n")
            print(
                f"{number:4} {kind:12} {action:5} {operation:5} {result['seconds']:6.1f} s",
                *result["wrong"],
                flush=True,
            )
    print(table(results))
    wrong = [result for result in results if result["wrong"]]
    if options.output is not None:
        summary = {
            "command": f"python -m faults.crash --kills {options.kills} --seed {options.seed}",
            "kills": len(results),
            "struck": sum(result["struck"] for result in results),
            "wrong": wrong,
            "by_kind": dict(Counter(result["kind"] for result in results)),
            "by_action": dict(Counter(result["action"] for result in results)),
            "seconds": round(sum(result["seconds"] for result in results)),
            **environment("cpu", 1),
            "results": results,
        }
        write_text(options.output, json.dumps(summary, indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
