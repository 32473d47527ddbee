"""What a step of staleness costs: what docs/scaling.md shows of the sweeps that tried it."""

from statistics import fmean

import pytest
from sweeps import BENCHMARKS, result_and_grid

from benchmarks.replication.results import LANGUAGE_MODEL
from benchmarks.table import TABLES, TASKS


@pytest.mark.parametrize("task", [*TASKS, LANGUAGE_MODEL])
def test_the_result_is_that_of_the_grid(task):
    result, _ = result_and_grid("ahead", task)
    assert [row["overrides"]["rollout_ahead"] for row in result["rows"]] == [0, 1, 0, 1]


@pytest.mark.parametrize("task", [*TASKS, LANGUAGE_MODEL])
@pytest.mark.parametrize(("rule", "shown"), [("all", "`all`"), ("sampling", "`gradient_norm_sampling`")])
def test_a_difference_is_paired_by_seed(task, rule, shown):
    result, grid = result_and_grid("ahead", task)
    by_name = {row["name"]: row["tasks"][grid["test"][0]]["by_seed"] for row in result["rows"]}
    now, ahead = by_name[f"{rule}, now"], by_name[f"{rule}, ahead"]
    assert now.keys() == ahead.keys()
    mean = fmean(ahead[seed] - now[seed] for seed in now)
    lines = [line for line in TABLES[f"ahead-{task}"](result).splitlines() if line.startswith(f"| {shown} |")]
    assert [line.split("|")[3].strip() for line in lines] == ["0", "1"]
    assert lines[0].endswith("|  |")
    assert f"| {mean:+.3f} ± ".replace("-", "−") in lines[1]


def test_what_is_lost_on_the_language_model_is_what_the_page_says():
    result, grid = result_and_grid("ahead", LANGUAGE_MODEL)
    (task,) = grid["test"]
    before, mean = result["before"][task]["mean"], {row["name"]: row["tasks"][task]["mean"] for row in result["rows"]}
    lost = [
        (mean[f"{rule}, ahead"] - mean[f"{rule}, now"]) / (before - mean[f"{rule}, now"])
        for rule in ("all", "sampling")
    ]
    page = " ".join((BENCHMARKS.parent / "docs" / "scaling.md").read_text(encoding="utf-8").split())
    assert f"{lost[0]:.0%} of what all tokens gain, and of sampling's gain {lost[1]:.0%}".replace("%", " %") in page
