"""Where the signals sit in episodes: quadrants, divergence and what each rule keeps, by kind of token and by turn.

Beside them stands how often each model's episodes are right, as `tipdistill eval` counted it.
The commands that record and evaluate are in docs/trip.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch

from tipdistill.kinds import KINDS
from tipdistill.provenance import environment
from tipdistill.records import open_records

from . import measure


def run_signals(records: Path, name: str, evaluated: Sequence[Path] = ()) -> dict[str, Any]:
    """What records of episodes say, group by group, and what evaluations say of whole episodes.

    Args:
        records: a directory that `tipdistill score` or a training run wrote.
        name: of the result, and of the task in the evaluations.
        evaluated: directories that `tipdistill eval` wrote, each named as its model is to be called.

    Raises:
        ValueError: no records there, or none of episodes (they have no column `kind`).
        ValueError: no evaluation there, or one of other tasks.
    """
    evaluations = {directory.name: _hard_score(directory, name) for directory in evaluated}
    opened = open_records(records)
    sidecar = opened.sidecar
    kept = {rule: f"kept_{rule}" if place else "kept" for place, rule in enumerate(sidecar["rules"])}
    table = opened.read(["kind", "turn", "quadrant", "entropy", "reverse_kl", *kept.values()])
    table = table.filter(pc.is_valid(table["turn"]))  # a run may have answered some prompts without tools
    of = {column: table[column].to_numpy(zero_copy_only=False) for column in table.column_names}
    judged = [correct for correct in opened.rollouts["correct"].to_pylist() if correct is not None]
    groups = {kind: of["kind"] == kind for kind in KINDS}
    groups |= {f"turn {number}": of["turn"] == number for number in np.unique(of["turn"])}
    groups["all"] = np.ones(len(of["kind"]), bool)
    entries = {
        group: {
            "tokens": int(inside.sum()),
            "share": float(inside.mean()),
            "entropy": float(of["entropy"][inside].mean()),
            "reverse_kl": float(of["reverse_kl"][inside].mean()),
            "quadrants": (np.bincount(of["quadrant"][inside], minlength=5)[1:] / inside.sum()).tolist(),
            "kept": {rule: float(of[column][inside].mean()) for rule, column in kept.items()},
        }
        for group, inside in groups.items()
        if inside.any()
    }
    return {
        "benchmark": "signals",
        "preset": name,
        **environment("cpu", torch.get_num_threads()),
        "settings": {"retention": sidecar["retention"], "rollouts": sidecar["rollouts"], "tokens": sidecar["tokens"]},
        "correct": float(np.mean(judged)) if judged else None,
        "evaluated": evaluations,
        "groups": entries,
    }


def _hard_score(directory: Path, task: str) -> dict[str, Any]:
    tasks = measure.evaluated_tasks(directory)
    if task not in tasks:
        raise ValueError(f"{directory} is an evaluation of {', '.join(tasks)}, not of {task}.")
    return {figure: tasks[task][figure] for figure in ("problems", "num_samples", "mean_at_k", "standard_error")}


def main(argv: list[str] | None = None) -> int:
    """Read records and write benchmarks/results/signals-NAME.json.

    Raises:
        ValueError: no records of episodes there.
    """
    parser = measure.parser("signals", __doc__)
    parser.add_argument("--records", type=Path, required=True, help="directory of records")
    parser.add_argument("--name", required=True, help="of the result, and of the task")
    parser.add_argument("--evaluated", type=Path, nargs="*", default=[], help="directories of tipdistill eval")
    return measure.run("signals", run_signals, parser, argv)


if __name__ == "__main__":
    measure.end(main)
