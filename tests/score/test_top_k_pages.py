"""docs/vllm.md and docs/verl.md say the same of a teacher's k likeliest tokens, and it is what the code does.

`PYTHONPATH=src python tests/score/test_top_k_pages.py` writes their tables anew.
"""

import dataclasses
import re
from pathlib import Path

import pytest

from tipdistill.integrations.partial_teacher import available_rules
from tipdistill.score.top_k_outcomes import EXACT, EXACT_ON_OUTCOMES, LOWER_BOUND, REFUSED
from tipdistill.score.top_k_teacher import OF_TOP_K, unavailable
from tipdistill.select import RULES
from tipdistill.text import markdown_table, replace_blocks
from tipdistill.types import TokenScores

PAGES = [Path(__file__).parents[2] / "docs" / name for name in ("vllm.md", "verl.md")]
SECTION = re.compile(r"^## What the k likeliest tokens tell\n.*?(?=^## )", re.M | re.S)
# The weakest statistic that a rule reads decides what the rule is.
WORSE_AND_WORSE = [EXACT, EXACT_ON_OUTCOMES, LOWER_BOUND, REFUSED]
OF_STUDENT = {"entropy", "entropy_norm", "student_logprob"}


def described(gives, least, server_only):
    """The cells of a row: what it is, from which k, from whom."""
    if gives == REFUSED:
        return gives, "–", "–"
    return gives, str(least), "a server" if server_only else "a server, verl"


def grouped(cells_of):
    """A row for up to three names that have the same cells; with more of them lines grow too long."""
    names = {}
    for name, cells in cells_of.items():
        names.setdefault(cells, []).append(f"`{name}`")
    return [
        [", ".join(of_cells[start : start + 3]), *cells]
        for cells, of_cells in names.items()
        for start in range(0, len(of_cells), 3)
    ]


def statistics_table():
    cells = {name: described(told.gives, told.least, told.server_only) for name, told in OF_TOP_K.items()}
    return markdown_table(["statistic", "what it is", "smallest k", "who tells it"], grouped(cells))


def of_rule(rule):
    told = [OF_TOP_K[name] for name in rule.fields]
    return (
        max((entry.gives for entry in told), key=WORSE_AND_WORSE.index, default=EXACT),
        max((entry.least for entry in told), default=1),
        any(entry.server_only for entry in told),
    )


def rules_table():
    def place(name):
        gives, least, server_only = of_rule(RULES[name])
        return WORSE_AND_WORSE.index(gives), least, server_only, name

    cells = {}
    for name in sorted(RULES, key=place):
        gives, *others = described(*of_rule(RULES[name]))
        if OF_STUDENT.issuperset(RULES[name].fields):
            gives = "needs no teacher to select"
        elif gives == LOWER_BOUND:
            gives = "reads a lower bound"
        cells[name] = (gives, *others)
    return markdown_table(["rule", "what it goes by", "smallest k", "with"], grouped(cells))


TABLES = {"statistics": statistics_table, "rules": rules_table}


def written_anew(page):
    return replace_blocks(page, "top_k", lambda name: TABLES[name]())


def test_every_statistic_has_a_row():
    assert set(OF_TOP_K) == {field.name for field in dataclasses.fields(TokenScores)}


def test_both_pages_say_the_same():
    vllm, verl = (SECTION.search(page.read_text(encoding="utf-8"))[0] for page in PAGES)
    assert vllm == verl


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_tables_are_those_of_the_code(page):
    text = page.read_text(encoding="utf-8")
    assert text.count("<!-- top_k:") == len(TABLES)
    assert text == written_anew(text), f"run python {Path(__file__).name}"


@pytest.mark.parametrize("k", [1, 4, 5, 15, 16, 64])
@pytest.mark.parametrize("server", [True, False], ids=["server", "verl"])
def test_the_rules_that_work_are_those_of_the_table(server, k):
    works = set()
    for row in rules_table().splitlines()[2:]:
        names, _, least, told_by = (cell.strip() for cell in row.strip("|").split("|"))
        if least != "–" and int(least) <= k and ("server" if server else "verl") in told_by:
            works |= set(re.findall("`(.+?)`", names))
    assert works == {name for name, rule in RULES.items() if not unavailable(rule.fields, k, server)}
    if not server:
        assert works == set(available_rules("top_k", k))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_lines_of_the_tables_are_short(page):
    section = SECTION.search(page.read_text(encoding="utf-8"))[0]
    assert [line for line in section.splitlines() if len(line) > 100] == []


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(written_anew(path.read_text(encoding="utf-8")), encoding="utf-8")
