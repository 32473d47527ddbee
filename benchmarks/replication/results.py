"""The results of `tipdistill sweep` that are kept: where they are, their rows, and differences of two rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tipdistill.files import write_text
from tipdistill.sweep.result import compared, counts_of, csv_text

from .. import measure

RESULTS = measure.RESULTS / "replication"
TEACHER = "teacher"  # folder of the grids that select by the teacher's entropy
RATES = "rates"  # folder of the grids that try the rows at a higher rate
LANGUAGE_MODEL = "smollm2"  # folder of the grids on a real language model, whose outcome is a divergence
PLANNING = "trip"  # folder of the grids of the planning task, whose outcome is the hard score of a plan
PATTERNS = ("*", f"{TEACHER}/*", f"{RATES}/*", f"{LANGUAGE_MODEL}/*", f"{PLANNING}/*")
# grids, in the order of the tables, and what the documents call their tasks
TASKS = {"planted": "addition", "modular": "modular", "machine": "machine"}

Results = Mapping[str, Mapping[str, Any]]
At = tuple[str, float]  # the name of a row, and its retention


def collect(source: Path, results: Path) -> list[Path]:
    """Keep every sweep's result, numbers to six digits; returns what was written.

    Args:
        source: a folder with a folder for each sweep; the screening's is looked for beside it.
        results: where they are kept.
    """
    paths = [path for pattern in PATTERNS for path in sorted(source.glob(f"{pattern}/sweep.json"))]
    sweeps = {results / path.parent.relative_to(source): path for path in paths}
    screened = source.parent / "screening" / "candidates" / "sweep.json"
    if screened.exists():
        sweeps[results / "screening" / "candidates"] = screened
    written = []
    for kept, path in sweeps.items():
        result = measure.rounded(json.loads(path.read_text(encoding="utf-8")), digits=6)
        written.append(measure.write(kept.with_suffix(".json"), result, digits=6))
        written.append(write_text(kept.with_suffix(".csv"), csv_text(result)))
    return written


def load(results: Path) -> dict[str, dict[str, Any]]:
    """Name of a grid, after its folder where it has one → its result, as far as there are any."""
    paths = [path for pattern in PATTERNS for path in sorted(results.glob(f"{pattern}.json"))]
    return {
        path.relative_to(results).with_suffix("").as_posix(): json.loads(path.read_text(encoding="utf-8"))
        for path in paths
    }


def row_of(result: Mapping[str, Any], at: At) -> Mapping[str, Any] | None:
    """The row of that name and retention, None where there is none or all its cells failed."""
    for row in result["rows"]:
        if (row["name"], row["retention"]) == at and row["tasks"]:
            return row
    return None


def figure_of(result: Mapping[str, Any], at: At) -> Mapping[str, Any] | None:
    """Its figures on the first test task."""
    row = row_of(result, at)
    return None if row is None else row["tasks"].get(result["test"][0])


def difference(result: Mapping[str, Any], first: At, second: At) -> dict[str, Any] | None:
    """The paired difference of two rows with its interval, None where one is missing."""
    figures = figure_of(result, first), figure_of(result, second)
    if figures[0] is None or figures[1] is None:
        return None
    counts = counts_of(figures[0]), counts_of(figures[1])
    return compared(*counts, result["num_samples"]) if set(counts[0]) & set(counts[1]) else None
