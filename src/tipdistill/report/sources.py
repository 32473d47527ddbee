"""What lies in the directories that a report is asked for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..records import TOKENS_FILE
from .history import Run, read_runs

MOST_STEPS = 6
PROBES = ("probe.json", "records/probe.json")
SWEEP = "sweep.json"


@dataclass(frozen=True)
class Sources:
    """What a report shows.

    Attributes:
        names: of the directories given.
        records: name → directory of token records, in the order to offer them.
        runs: training histories.
        probes: name → probe.json.
        sweeps: name → sweep.json.
        left_out: record directories of a run that are not shown, since it has too many.
    """

    names: list[str]
    records: dict[str, Path] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    probes: dict[str, Path] = field(default_factory=dict)
    sweeps: dict[str, Path] = field(default_factory=dict)
    left_out: int = 0


def find_sources(paths: Sequence[str | Path]) -> Sources:
    """Token records, training histories, probes and sweeps under the paths given.

    Of a run with more than six sets of records, the first, the last and those evenly between are taken.

    Args:
        paths: each a records directory (or its tokens.parquet), a run's output directory, a demo's, or one of its
            cells, or a sweep's.

    Raises:
        ValueError: no path, the same twice, or nothing to report in one of them.
        FileNotFoundError: a path is not there.
    """
    if not paths:
        raise ValueError("a report needs a directory: of token records, of a run, or several of them.")
    directories = [path.parent if (path := Path(given)).name == TOKENS_FILE else path for given in paths]
    sources = Sources(_names(directories))
    left_out = 0
    for directory, name in zip(directories, sources.names, strict=True):
        if not directory.exists():
            raise FileNotFoundError(f"there is no {directory}.")
        if not directory.is_dir():
            raise ValueError(f"{directory} is a file; give the directory of a run or of token records.")
        steps = _steps(directory)
        taken = _spread(steps)
        left_out += len(steps) - len(taken)
        sets = {name if path == directory else f"{name} · {path.name}": path for path in taken}
        runs = read_runs(directory)
        probes = [directory / place for place in PROBES if (directory / place).is_file()][:1]
        sweeps = [directory / SWEEP] if (directory / SWEEP).is_file() else []
        if not (sets or runs or probes or sweeps):
            raise ValueError(
                f"{directory} holds neither token records (tokens.parquet, or records/step-*/ of a run) nor a training "
                "history (trainer_state.json, checkpoint-*/ or metrics.jsonl) nor a probe.json or sweep.json. "
                "`tipdistill score` writes token records; TIPTrainer does with score_logging_steps."
            )
        sources.records.update(sets)
        # several checkpoints of one name, told apart as their directories are
        alike = len(runs) == 1 and runs[0].name == directory.resolve().name
        sources.runs.extend(Run(name, run.series) if alike else run for run in runs)
        sources.probes.update((name, path) for path in probes)
        sources.sweeps.update((name, path) for path in sweeps)
    return replace(sources, left_out=left_out)


def _names(directories: Sequence[Path]) -> list[str]:
    """The last part of each path, and as many of those before it as tell them apart."""
    parts = [directory.resolve().parts for directory in directories]
    if len(set(parts)) < len(parts):
        twice = next(directory for directory, path in zip(directories, parts, strict=True) if parts.count(path) > 1)
        raise ValueError(f"{twice} was given twice.")
    depth = 1
    while len({path[-depth:] for path in parts}) < len(parts):
        depth += 1
    return ["/".join(path[-depth:]).lstrip("/") or "/" for path in parts]


def _steps(directory: Path) -> list[Path]:
    """Directories of records in `directory`: itself, its records/, or its records/step-*/ in order."""
    for own in (directory, directory / "records"):
        if _is_records(own):
            return [own]
    steps = [*directory.glob("records/step-*"), *directory.glob("step-*")]
    recorded = [path for path in steps if re.fullmatch(r"step-\d+", path.name) and _is_records(path)]
    return sorted(recorded, key=lambda path: int(path.name.removeprefix("step-")))


def _is_records(directory: Path) -> bool:
    """Whether there are records, or parts of an interrupted run that `open_records` puts together."""
    return (directory / TOKENS_FILE).is_file() or any(directory.glob("parts/rollouts-*.parquet"))


def _spread(steps: list[Path]) -> list[Path]:
    if len(steps) <= MOST_STEPS:
        return steps
    last = len(steps) - 1
    return [steps[round(place * last / (MOST_STEPS - 1))] for place in range(MOST_STEPS)]
