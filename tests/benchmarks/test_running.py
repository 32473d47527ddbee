"""Does `running` train as well as `batch`: what docs/rules.md shows of the sweeps that tried it."""

from statistics import fmean

import pytest
from sweeps import result_and_grid

from benchmarks.replication.results import LANGUAGE_MODEL
from benchmarks.table import TABLES, TASKS


@pytest.mark.parametrize("task", [*TASKS, LANGUAGE_MODEL])
def test_the_result_is_that_of_the_grid(task):
    result, _ = result_and_grid("running", task)
    for row in result["rows"][1:]:
        assert row["overrides"]["normalization"] == row["name"].partition(", ")[2]


@pytest.mark.parametrize("task", [*TASKS, LANGUAGE_MODEL])
@pytest.mark.parametrize("rule", ["Soft-OR", "sampling"])
def test_a_difference_is_paired_by_seed(task, rule):
    result, grid = result_and_grid("running", task)
    by_name = {row["name"]: row["tasks"][grid["test"][0]]["by_seed"] for row in result["rows"]}
    batch, running = by_name[f"{rule}, batch"], by_name[f"{rule}, running"]
    assert batch.keys() == running.keys()
    mean = fmean(running[seed] - batch[seed] for seed in batch)
    lines = TABLES[f"running-{task}"](result).splitlines()
    (line,) = [line for line in lines if "`running`" in line and rule_of(rule) in line]
    assert f"| {mean:+.3f} ± ".replace("-", "−") in line
    error = float(line.rsplit("± ", 1)[1].rstrip(" |"))
    assert abs(mean) < 2 * error, "within noise, as the page says"


def rule_of(name):
    return {"Soft-OR": "`soft_or`", "sampling": "`gradient_norm_sampling`"}[name]
