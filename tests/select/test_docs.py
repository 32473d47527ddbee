"""docs/rules.md has one entry per rule, says what the code and the results say, and its examples run."""

import csv
import json
import re
from pathlib import Path

import pytest

from tipdistill import RULES
from tipdistill.select import CONTRIB

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "rules.md"
TEXT = PAGE.read_text(encoding="utf-8")
SWEEPS = ROOT / "benchmarks" / "results" / "replication"
TASKS = ("planted", "modular", "machine")


def section(heading):
    return TEXT.split(f"\n{heading}\n")[1].split(f"\n{heading.split()[0]} ")[0]


def entries(heading):
    parts = re.split(r"^### ", section(heading), flags=re.M)[1:]
    return {re.match(r"`(\w+)`\n", part).group(1): part for part in parts}


MEASURED, UNMEASURED = entries("## The measured rules, one by one"), entries("## Not measured by us")
ENTRIES = MEASURED | UNMEASURED


def test_every_rule_has_an_entry_and_every_entry_a_rule():
    assert list(MEASURED) == [name for name in RULES if name not in CONTRIB]
    assert list(UNMEASURED) == list(CONTRIB)


def test_entries_of_rules_that_nobody_trained_with_say_so():
    silent = {name for name in RULES if "not measured by us" not in ENTRIES[name]}
    assert silent == {*MEASURED, "signal_to_curvature"}


def test_figures_are_those_of_the_sweeps():
    """The tables of accuracies hold every row of the three sweeps but the guarded one, as the results say it."""
    figures = {}
    for task in TASKS:
        with (SWEEPS / f"{task}.csv").open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                figures.setdefault((row["name"], f"{100 * float(row['retention']):g} %"), {})[task] = row["mean"]
    told = {}
    in_rollouts, over_batch = section("### What we measured").split("over the whole batch")
    for text, suffix in ((in_rollouts, ""), (over_batch, " batch")):
        for rule, share, *cells in re.findall(r"^\| `([\w:]+)` \| (\d+ %) \|(.*)\|(.*)\|(.*)\|$", text, re.M):
            told[rule + suffix, share] = {
                task: cell.strip() for task, cell in zip(TASKS, cells, strict=True) if cell.strip()
            }
    expected = {
        key: {task: f"{float(accuracy):.3f}" for task, accuracy in of_tasks.items()}
        for key, of_tasks in figures.items()
        if not key[0].endswith("guarded")
    }
    assert told == expected
    before = [next(iter(json.loads((SWEEPS / f"{task}.json").read_text())["before"].values())) for task in TASKS]
    printed = re.search(r"right in (\.\d+) \(addition\), (\.\d+) \(modular\) and (\.\d+)", " ".join(TEXT.split()))
    assert [f"0{figure}" for figure in printed.groups()] == [f"{task['mean']:.3f}" for task in before]


def test_every_rule_is_in_the_table_and_its_link_leads_to_the_entry():
    assert re.findall(r"^\| \[`(\w+)`\]\(#(\w+)\)", TEXT, re.M) == [(name, name) for name in RULES]


@pytest.mark.parametrize("name", RULES)
def test_an_entry_names_its_source_its_cost_and_what_the_rule_reads(name):
    entry = " ".join(ENTRIES.get(name, "").split())
    for part in ("**Score**", "**Reads**", "**Cost**", "**Source**", "**Helps", "ails**"):
        assert part in entry, part
    read = re.search(r"\*\*Reads\*\* (.*?)\.\s", entry).group(1)
    assert tuple(re.findall(r"`(\w+)`", read)) == RULES[name].fields


@pytest.mark.parametrize("name", RULES)
def test_an_entry_shows_the_rules_picture(name):
    assert f"](rules/{name}.png)" in ENTRIES[name]
    assert (PAGE.parent / "rules" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", TEXT, re.S), ids=["select", "custom"])
def test_examples_run(code):
    exec(compile(code, str(PAGE), "exec"), {})


def test_rules_that_are_not_what_their_source_says_are_marked():
    marked = re.findall(r"^\| \[`(\w+)`\].*experimental", TEXT, re.M)
    assert marked == [name for name in RULES if "*Experimental.*" in ENTRIES[name]]
    assert marked == ["selectkd", "prefix_compatibility", "confidence_ratio"]
