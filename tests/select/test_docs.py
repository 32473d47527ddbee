"""docs/rules.md has one entry per rule, says what the code says, and its examples run."""

import re
from pathlib import Path

import pytest

from tipdistill import RULES

PAGE = Path(__file__).parents[2] / "docs" / "rules.md"
TEXT = PAGE.read_text(encoding="utf-8")
RULE_PART = TEXT.split("\n## Rules\n")[1].split("\n## ")[0]
ENTRIES = {
    re.match(r"`(\w+)`\n", part).group(1): part for part in re.split(r"^### ", RULE_PART, flags=re.M) if part.strip()
}


def test_every_rule_has_an_entry_and_every_entry_a_rule():
    assert list(ENTRIES) == list(RULES)


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


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        path, _, anchor = target.partition("#")
        page = PAGE.parent / path if path else PAGE
        assert page.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
            assert anchor in {heading.strip("`").lower().replace(" ", "-") for heading in headings}, target


def test_rules_that_are_not_what_their_source_says_are_marked():
    marked = re.findall(r"^\| \[`(\w+)`\].*experimental", TEXT, re.M)
    assert marked == [name for name in RULES if "*Experimental.*" in ENTRIES[name]]
    assert marked == ["selectkd", "prefix_compatibility", "confidence_ratio"]
