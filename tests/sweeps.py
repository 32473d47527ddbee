"""Results of sweeps that documents show, each beside the grid that it is of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def result_and_grid(kind: str, task: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """benchmarks/results/KIND-TASK.json and benchmarks/replication/KIND/TASK.yaml, which must belong together."""
    result = json.loads((BENCHMARKS / "results" / f"{kind}-{task}.json").read_text(encoding="utf-8"))
    grid = yaml.safe_load((BENCHMARKS / "replication" / kind / f"{task}.yaml").read_text(encoding="utf-8"))
    assert [row["name"] for row in result["rows"]] == list(grid["cells"])
    assert (result["seeds"], result["test"], result["failed"]) == (grid["seeds"], grid["test"], {})
    return result, grid
