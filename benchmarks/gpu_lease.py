"""All that needs a GPU, in one command and nine minutes at most: is it right, is it fast, and do its lines hold?

    python -m benchmarks.gpu_lease            # or: make gpu
    python -m benchmarks.gpu_lease --dry_run  # every stage on the CPU, in tiny sizes

Each stage (benchmarks/gpu_stages.py) is a process with a time limit, and is killed with all that it started where it
reaches it. After each, benchmarks/results/gpu-CARD.json is written as a whole, with what a killed stage had by then.
The command goes on after the stages that are there, of the same code on the same card with the same versions.

It needs torch, triton and transformers; what else is missing is left out by name. `tipdistill` need not be installed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# This file imports no torch: what it starts uses the GPU, and is what loads it.
ROOT = Path(__file__).parents[1]
if find_spec("tipdistill") is None:
    sys.path.insert(0, str(ROOT / "src"))

# Seconds. Together they are more than the budget: most stages end before their limit.
LIMITS = {
    "versions": 40,
    "tests": 120,
    "micro": 50,
    "head": 90,
    "errors": 45,
    "memory": 40,
    "profile": 35,
    "step": 180,
    "switches": 120,
}
BUDGET = 540.0
SHORTEST = 5.0  # with less left a stage is not begun
RESULTS = ROOT / "benchmarks" / "results"


def lease(
    output: Path | None,
    limits: dict[str, float],
    budget: float,
    command: Callable[[str, Path], Sequence[str]],
    environ: dict[str, str] | None = None,
    shortest: float = SHORTEST,
    only: Sequence[str] = (),
    say: Callable[[str], None] = print,
    **about: Any,
) -> tuple[Path | None, dict[str, Any]]:
    """Run the stages one after the other, writing the result after each; its file and the result.

    Args:
        output: the file; None: benchmarks/results/gpu-CARD.json, once "versions" has said which card this is.
        limits: stage → its time limit (s), in their order; the first is always run, and says where this is.
        budget: of all together (s).
        command: stage and the file that it writes → its arguments.
        environ: of the stages; None: this process's.
        shortest: a stage is skipped where less time is left (s).
        only: measure these again, and no others that are not there.
        say: takes one line of progress.
        about: what else the result says.
    """
    began = time.monotonic()
    first, *others = limits
    with tempfile.TemporaryDirectory() as folder:

        def run(stage: str) -> dict[str, Any]:
            limit = min(limits[stage], budget - (time.monotonic() - began))
            if limit < min(shortest, limits[stage]):
                return {"state": "skipped", "reason": f"the budget of {budget:g} s was used up"}
            shortened = "" if limit == limits[stage] else f", shortened from {limits[stage]:g} s by the budget"
            say(f"== {stage}: at most {limit:.0f} s{shortened}")
            entry = run_stage(
                command(stage, Path(folder) / f"{stage}.json"), Path(folder) / f"{stage}.json", limit, environ
            )
            say(f"== {stage}: {entry['state']} after {entry['seconds']:.1f} s" + _because(entry))
            return entry | ({"shortened_from": limits[stage]} if shortened else {})

        origin = run(first)
        where = origin.get("result", {})
        if origin["state"] != "done":
            return None, {"stages": {first: origin}}
        output = output or RESULTS / f"gpu-{where['card']}.json"
        result = {"benchmark": "gpu", **where, **about, "budget": budget, "stages": {first: origin}}
        result["stages"] |= kept_stages(output, result, [stage for stage in others if stage not in only])
        for stage in others:
            if only and stage not in only:
                continue
            if stage in result["stages"]:
                say(f"== {stage}: there already")
                continue
            result["stages"][stage] = run(stage)
            result["stages"] = {name: result["stages"][name] for name in limits if name in result["stages"]}
            result["seconds"] = round(time.monotonic() - began, 1)
            result["lines"] = lines_of(result)
            write_whole(output, result)
        result["lines"] = lines_of(result)
        write_whole(output, result)
    return output, result


def run_stage(
    arguments: Sequence[str], into: Path, limit: float, environ: dict[str, str] | None = None
) -> dict[str, Any]:
    """Run one stage and whatever it starts, none of which outlives this call.

    Returns:
        state ("done", "failed" or "killed"), seconds, limit, the reason where it is not done, and "result": all of it,
        or what the stage had said when it ended.
    """
    began = time.monotonic()
    process = subprocess.Popen(arguments, cwd=ROOT, env=environ, start_new_session=True)
    state, reason = "done", None
    try:
        code = process.wait(timeout=limit)
        if code:
            state, reason = "failed", f"exit code {code}"
    except subprocess.TimeoutExpired:
        state, reason = "killed", f"its limit of {limit:.0f} s"
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    entry: dict[str, Any] = {"state": state, "seconds": round(time.monotonic() - began, 1), "limit": round(limit, 1)}
    written = _read(into)
    if "error" in written:
        reason = written["error"]
    if reason is not None:
        entry["reason"] = reason
    if state == "done" and not written.get("complete"):
        entry |= {"state": "failed", "reason": "it ended without a result"}
    if "result" in written:
        entry["result"] = written["result"]
    return entry


def kept_stages(output: Path, result: dict[str, Any], stages: Sequence[str]) -> dict[str, Any]:
    """The stages of an earlier run that are done, where it was of the same code, card, versions and sizes."""
    before = _read(output)
    if any(before.get(key) != result.get(key) for key in ("sources", "card", "versions", "dry_run")):
        return {}
    earlier = before.get("stages", {})
    return {stage: earlier[stage] for stage in stages if earlier.get(stage, {}).get("state") == "done"}


def sources() -> str:
    """A short hash of the code that is measured and of what measures it: a lease may have no git.

    Example:
        >>> len(sources())
        12
    """
    sum_ = hashlib.sha256()
    for path in sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]):
        sum_.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return sum_.hexdigest()[:12]


def lines_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines that must hold, see `benchmarks.targets.lines`."""
    from .targets import lines

    return lines({name: entry.get("result", {}) for name, entry in result["stages"].items()})


def report(result: dict[str, Any]) -> str:
    """The lines in words.

    Example:
        >>> line = {"line": "time / TRL, all tokens", "at_most": 0.65, "measured": 0.6, "holds": True}
        >>> print(report({"lines": [line, line | {"measured": None, "holds": None}]}))
        holds         time / TRL, all tokens: 0.6 (at most 0.65)
        not measured  time / TRL, all tokens (at most 0.65)
    """
    words = {True: "holds", False: "DOES NOT", None: "not measured"}
    return "\n".join(
        f"{words[line['holds']]:13} {line['line']}"
        + ("" if line["measured"] is None else f": {line['measured']:.3g}")
        + f" (at most {line['at_most']:g})"
        for line in result["lines"]
    )


def write_whole(path: Path, result: dict[str, Any]) -> None:
    """Write JSON in full or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(_rounded(result), indent=1) + "\n", encoding="utf-8")
    with partial.open("rb") as written:
        os.fsync(written.fileno())
    partial.replace(path)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(entry) for entry in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _because(entry: dict[str, Any]) -> str:
    return f" ({entry['reason']})" if "reason" in entry else ""


def stage_main(stage: str, into: Path, dry_run: bool) -> int:
    """What a stage's process does: run it, and write what it has whenever it says so."""
    from tipdistill.signals import end_with_parent

    end_with_parent()
    if dry_run:
        from .interpreter import round_to_bfloat16

        round_to_bfloat16()
    from .gpu_stages import STAGES, sizes_of

    def write(result: dict[str, Any]) -> None:
        write_whole(into, {"complete": False, "result": result})

    try:
        result = STAGES[stage](sizes_of(dry_run), write)
    except Exception as error:  # whatever a stage fails of, the file has to say it: the other stages go on
        import traceback

        traceback.print_exc()
        so_far = _read(into)
        write_whole(into, so_far | {"complete": False, "error": f"{type(error).__name__}: {error}"[:500]})
        return 1
    write_whole(into, {"complete": True, "result": result})
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages and print the lines; 0 whether or not they hold, 2 where there is no GPU."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_lease", description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False
    )
    parser.add_argument("--dry_run", action="store_true", help="every stage on the CPU, in tiny sizes")
    parser.add_argument("--output", type=Path, help="the JSON file (default benchmarks/results/gpu-CARD.json)")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds of all stages together (default 540)")
    parser.add_argument("--only", nargs="+", metavar="STAGE", default=[], help=f"some of {', '.join(LIMITS)}")
    parser.add_argument("--commit", help="of the code, where there is no git to ask")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    unknown = [stage for stage in options.only if stage not in LIMITS]
    if unknown:
        parser.error(f"--only takes {', '.join(LIMITS)}, got {', '.join(unknown)}")
    if options.stage:
        return stage_main(options.stage, options.into, options.dry_run)
    environ = dict(os.environ)
    paths = [str(ROOT / "src")] if find_spec("tipdistill") is None or str(ROOT / "src") in sys.path else []
    environ["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [environ.get("PYTHONPATH")])])
    environ.pop("TRITON_INTERPRET", None)
    output, about = options.output, {"sources": sources(), "dry_run": options.dry_run}
    if options.commit:
        about["commit"] = options.commit
    if options.dry_run:
        environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        output = output or Path(tempfile.mkdtemp()) / "gpu-cpu.json"

    def command(stage: str, into: Path) -> list[str]:
        rest = ["--dry_run"] if options.dry_run else []
        return [sys.executable, "-m", "benchmarks.gpu_lease", "--stage", stage, "--into", str(into), *rest]

    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))  # the stage's processes end too
    path, result = lease(output, dict(LIMITS), options.budget, command, environ, only=options.only, **about)
    if path is None:
        print(f"gpu_lease: {result['stages']['versions'].get('reason')}", file=sys.stderr)
        return 2
    for stage, entry in result["stages"].items():
        if entry["state"] != "done":
            print(f"{stage}: {entry['state']}" + _because(entry))
    for name, reason in result.get("left_out", {}).items():
        print(f"{name}: left out, {reason}")
    print(report(result))
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
