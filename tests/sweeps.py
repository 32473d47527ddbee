"""Results of sweeps that documents show, each beside the grid that it is of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from benchmarks.replication.results import LANGUAGE_MODEL

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def result_and_grid(kind: str, task: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A sweep's result and its grid, which must belong together.

    Those of a small task are results/KIND-TASK.json and replication/KIND/TASK.yaml, those of the language model
    results/replication/smollm2/KIND.json and replication/smollm2/KIND.yaml.
    """
    name, of = f"{kind}-{task}", f"{kind}/{task}"
    if task == LANGUAGE_MODEL:
        name, of = f"replication/{task}/{kind}", f"{task}/{kind}"
    result = json.loads((BENCHMARKS / "results" / f"{name}.json").read_text(encoding="utf-8"))
    grid = yaml.safe_load((BENCHMARKS / "replication" / f"{of}.yaml").read_text(encoding="utf-8"))
    assert [row["name"] for row in result["rows"]] == list(grid["cells"])
    assert (result["seeds"], result["test"], result["failed"]) == (grid["seeds"], grid["test"], {})
    return result, grid
