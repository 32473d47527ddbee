"""What the tokens of the replication's tasks are like before distillation, from the records of `tipdistill score`.

    tipdistill score --model runs/modular/models/student --teacher runs/modular/models/teacher \\
        --dataset runs/modular/prompts.jsonl --max_prompts 256 --max_new_tokens 35 --output_dir runs/tokens/modular
    tipdistill eval --model runs/modular/models/teacher --tasks "modular[64:]" --num_samples 4 \\
        --output_dir runs/teachers/modular
    python -m benchmarks.replication.tokens_before runs/tokens runs/teachers

Each folder has one of each task, named as in results.py; what is written goes to
benchmarks/results/replication/tokens/before.json. `make replicate` runs all of it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from tipdistill.provenance import environment
from tipdistill.records import open_records

from .. import measure
from .tables import BEFORE

DRAWS, LEVEL = 10_000, 0.95


def mean_over_rollouts(value: np.ndarray, rollout: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """The mean over tokens with a bootstrap interval over rollouts, whose tokens are not independent.

    Args:
        value: float [N].
        rollout: int [N], which of the rollouts 0..M−1 a token is of.
        seed: of the draws.
    """
    tokens, sums = np.bincount(rollout), np.bincount(rollout, weights=value)
    times = np.random.default_rng(seed).multinomial(len(tokens), np.full(len(tokens), 1 / len(tokens)), DRAWS)
    draws = (times @ sums) / (times @ tokens)
    interval = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"mean": float(value.mean()), "interval": [float(end) for end in interval]}


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's, ties sharing their mean rank."""
    return float(pd.Series(first).rank().corr(pd.Series(second).rank()))


def measured(directory: Path, teacher: Path) -> dict[str, Any]:
    """Quadrants, mean divergence, and what the entropies of student and teacher are, of one task's records.

    Args:
        directory: of `tipdistill score`.
        teacher: of `tipdistill eval`, which measured the teacher.
    """
    records = open_records(directory)
    table = records.read(["rollout", "entropy", "teacher_entropy", "reverse_kl"])
    entropy, teacher_entropy, divergence = (
        table[name].to_numpy().astype(float) for name in ("entropy", "teacher_entropy", "reverse_kl")
    )
    _, rollout = np.unique(table["rollout"].to_numpy(), return_inverse=True)
    most = math.log(records.sidecar["vocabulary"])
    (task,) = measure.evaluated_tasks(teacher).items()
    return {
        "teacher_accuracy": {
            "task": task[0],
            **{key: task[1][key] for key in ("mean_at_k", "standard_error", "num_samples")},
        },
        "rollouts": int(rollout.max()) + 1,
        "tokens": len(rollout),
        "quadrants": records.sidecar["quadrants"],
        "reverse_kl": mean_over_rollouts(divergence, rollout),
        "student_entropy_norm": mean_over_rollouts(entropy / most, rollout),
        "teacher_entropy_norm": mean_over_rollouts(teacher_entropy / most, rollout),
        "rank_correlation_with_reverse_kl": {
            "student_entropy": rank_correlation(entropy, divergence),
            "teacher_entropy": rank_correlation(teacher_entropy, divergence),
        },
    }


def main() -> None:
    parser = measure.parser("replication.tokens_before", __doc__)
    parser.add_argument("records", type=Path, help="a folder with the records of each task")
    parser.add_argument("teachers", type=Path, help="a folder with the evaluation of each task's teacher")
    options = parser.parse_args()
    by_task = {
        path.name: measured(path, options.teachers / path.name)
        for path in sorted(options.records.iterdir())
        if path.is_dir()
    }
    if not by_task:
        raise ValueError(f"{options.records} holds no folder of records: run tipdistill score as above.")
    measure.write(BEFORE, {"tasks": by_task, **environment("cpu", torch.get_num_threads())})
    print(f"written: {BEFORE}")


if __name__ == "__main__":
    measure.end(main)
