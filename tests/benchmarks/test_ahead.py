"""What a step of staleness costs: what docs/scaling.md shows of the sweeps that tried it."""

import json
from pathlib import Path
from statistics import fmean

import pytest
import yaml

from benchmarks.table import SMALL, TABLES

ROOT = Path(__file__).parents[2]


def result_and_grid(task):
    result = json.loads((ROOT / "benchmarks" / "results" / f"ahead-{task}.json").read_text(encoding="utf-8"))
    grid = ROOT / "benchmarks" / "replication" / "ahead" / f"{task}.yaml"
    return result, yaml.safe_load(grid.read_text(encoding="utf-8"))


@pytest.mark.parametrize("task", SMALL)
def test_the_result_is_that_of_the_grid(task):
    result, grid = result_and_grid(task)
    assert [row["name"] for row in result["rows"]] == list(grid["cells"])
    assert result["seeds"] == grid["seeds"]
    assert result["test"] == grid["test"]
    assert not result["failed"]
    assert [row["overrides"]["rollout_ahead"] for row in result["rows"]] == [0, 1, 0, 1]


@pytest.mark.parametrize("task", SMALL)
@pytest.mark.parametrize(("rule", "shown"), [("all", "`all`"), ("sampling", "`gradient_norm_sampling`")])
def test_a_difference_is_paired_by_seed(task, rule, shown):
    result, grid = result_and_grid(task)
    by_name = {row["name"]: row["tasks"][grid["test"][0]]["by_seed"] for row in result["rows"]}
    now, ahead = by_name[f"{rule}, now"], by_name[f"{rule}, ahead"]
    assert now.keys() == ahead.keys()
    mean = fmean(ahead[seed] - now[seed] for seed in now)
    lines = [line for line in TABLES[f"ahead-{task}"](result).splitlines() if line.startswith(f"| {shown} |")]
    assert [line.split("|")[3].strip() for line in lines] == ["0", "1"]
    assert lines[0].endswith("|  |")
    assert f"| {mean:+.3f} ± ".replace("-", "−") in lines[1]
