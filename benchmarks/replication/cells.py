"""Finished cells of a long sweep, kept in the tree as they come, so that it can go on on another day and machine.

A cell's figures depend on the code that it ran through, so a sweep goes on at the commit that it began with: check that
out beside this one, `python -m benchmarks.replication.cells --restore`, and run the same command again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tipdistill.files import write_text

from .. import measure
from .results import LANGUAGE_MODEL, RESULTS

KEPT = RESULTS / LANGUAGE_MODEL / "cells"
RUNS = measure.ROOT / "runs" / "replication" / LANGUAGE_MODEL


def save(runs: Path, kept: Path) -> list[Path]:
    """Copy the figures of every finished cell into the tree; returns the files that are new.

    Args:
        runs: a folder with the output directory of each sweep.
        kept: gets a folder for each sweep with a file for each cell.
    """
    new = []
    for path in sorted(runs.glob("*/cells/*/cell.json")):
        copy = kept / path.parents[2].name / f"{path.parent.name}.json"
        if not copy.exists() or copy.read_bytes() != path.read_bytes():
            copy.parent.mkdir(parents=True, exist_ok=True)
            new.append(write_text(copy, path.read_text(encoding="utf-8")))
    return new


def restore(kept: Path, runs: Path) -> list[Path]:
    """The other way round: cells that are not in the output directories become finished there.

    Args:
        kept, runs: see `save`.
    """
    new = []
    for copy in sorted(kept.glob("*/*.json")):
        path = runs / copy.parent.name / "cells" / copy.stem / "cell.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            new.append(write_text(path, copy.read_text(encoding="utf-8")))
    return new


def main(argv: Sequence[str] | None = None) -> int:
    """Save finished cells, or restore them."""
    parser = measure.parser("replication.cells", __doc__)
    parser.add_argument("--restore", action="store_true", help="make the kept cells finished ones of a new directory")
    parser.add_argument("--runs", type=Path, default=RUNS, help="where the sweeps write")
    options = parser.parse_args(argv)
    new = restore(KEPT, options.runs) if options.restore else save(options.runs, KEPT)
    commits = {
        json.loads(path.read_text(encoding="utf-8"))["result"]["run"]["commit"] for path in KEPT.glob("*/*.json")
    }
    print(f"{len(new)} cells {'restored' if options.restore else 'saved'}; in all they are of {', '.join(commits)}.")
    return 0


if __name__ == "__main__":
    measure.end(main)
