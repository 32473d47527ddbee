"""Does `running` train as well as `batch`: what docs/rules.md shows of the sweep that tried it."""

import json
from pathlib import Path
from statistics import fmean

import pytest
import yaml

from benchmarks.table import TABLES

ROOT = Path(__file__).parents[2]
RESULT = json.loads((ROOT / "benchmarks" / "results" / "running-modular.json").read_text(encoding="utf-8"))
GRID = yaml.safe_load((ROOT / "benchmarks" / "replication" / "running" / "modular.yaml").read_text(encoding="utf-8"))


def test_the_result_is_that_of_the_grid():
    assert [row["name"] for row in RESULT["rows"]] == list(GRID["cells"])
    assert RESULT["seeds"] == GRID["seeds"]
    assert RESULT["test"] == GRID["test"]
    for row in RESULT["rows"][1:]:
        assert row["overrides"]["normalization"] == row["name"].partition(", ")[2]


@pytest.mark.parametrize("rule", ["Soft-OR", "sampling"])
def test_a_difference_is_paired_by_seed(rule):
    by_name = {row["name"]: row["tasks"]["modular[64:]"]["by_seed"] for row in RESULT["rows"]}
    batch, running = by_name[f"{rule}, batch"], by_name[f"{rule}, running"]
    assert batch.keys() == running.keys()
    mean = fmean(running[seed] - batch[seed] for seed in batch)
    (line,) = [
        line for line in TABLES["running-modular"](RESULT).splitlines() if "`running`" in line and rule_of(rule) in line
    ]
    assert f"| {mean:+.3f} ± ".replace("-", "−") in line
    error = float(line.rsplit("± ", 1)[1].rstrip(" |"))
    assert abs(mean) < 2 * error, "within noise, as the page says"


def rule_of(name):
    return {"Soft-OR": "`soft_or`", "sampling": "`gradient_norm_sampling`"}[name]
