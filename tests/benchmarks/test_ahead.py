"""What a step of staleness costs: what docs/scaling.md shows of the sweep that tried it."""

import json
from pathlib import Path
from statistics import fmean

import pytest
import yaml

from benchmarks.table import TABLES

ROOT = Path(__file__).parents[2]
RESULT = json.loads((ROOT / "benchmarks" / "results" / "ahead-modular.json").read_text(encoding="utf-8"))
GRID = yaml.safe_load((ROOT / "benchmarks" / "replication" / "ahead" / "modular.yaml").read_text(encoding="utf-8"))
TASK = "modular[64:]"


def test_the_result_is_that_of_the_grid():
    assert [row["name"] for row in RESULT["rows"]] == list(GRID["cells"])
    assert RESULT["seeds"] == GRID["seeds"]
    assert RESULT["test"] == GRID["test"] == [TASK]
    assert [row["overrides"]["rollout_ahead"] for row in RESULT["rows"]] == [0, 1, 0, 1]


@pytest.mark.parametrize(("rule", "shown"), [("all", "`all`"), ("sampling", "`gradient_norm_sampling`")])
def test_a_difference_is_paired_by_seed(rule, shown):
    by_name = {row["name"]: row["tasks"][TASK]["by_seed"] for row in RESULT["rows"]}
    now, ahead = by_name[f"{rule}, now"], by_name[f"{rule}, ahead"]
    assert now.keys() == ahead.keys()
    mean = fmean(ahead[seed] - now[seed] for seed in now)
    lines = [line for line in TABLES["ahead-modular"](RESULT).splitlines() if line.startswith(f"| {shown} |")]
    assert [line.split("|")[3].strip() for line in lines] == ["0", "1"]
    assert lines[0].endswith("|  |")
    assert f"| {mean:+.3f} ± ".replace("-", "−") in lines[1]
