"""The plan's tables in docs/scaling.md and benchmarks/results/plan.md are what the plan gives now."""

import re
from pathlib import Path

import pytest

from benchmarks.plan_tables import BLOCKS, DOCUMENTS, PAIRS, rendered

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS)
def test_a_table_is_up_to_date(name):
    texts = [(ROOT / document).read_text(encoding="utf-8") for document in DOCUMENTS]
    blocks = [text for text in texts if f"<!-- plan:{name} -->" in text]
    assert blocks
    for text in blocks:
        assert f"<!-- plan:{name} -->\n{BLOCKS[name]()}\n<!-- /plan -->" in text, (
            "run: python -m benchmarks.plan_tables"
        )


def test_every_mark_of_the_documents_names_a_table():
    for document in DOCUMENTS:
        names = re.findall(r"<!-- plan:(.+) -->", (ROOT / document).read_text(encoding="utf-8"))
        assert names
        assert set(names) <= set(BLOCKS)


def rows(name):
    """Cells of a table of benchmarks/results/plan.md, one list for each number of GPUs."""
    text = (ROOT / "benchmarks" / "results" / "plan.md").read_text(encoding="utf-8")
    block = re.search(rf"<!-- plan:{re.escape(name)} -->\n(.*?)<!-- /plan -->", text, re.S)[1]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines()[2:]]


@pytest.mark.parametrize("name", PAIRS)
def test_what_the_page_says_of_the_bottleneck(name):
    """docs/scaling.md: the rollout's share rises, and a teacher of 671B parameters fits nowhere."""
    fits, most = [row[3] for row in rows(name)], [row[5] for row in rows(name)]
    assert len(fits) == 4
    if name.startswith("moe-671b"):
        assert all(text.startswith("no: ") for text in fits)
        return
    assert fits[1:] == ["yes"] * 3
    shares = [int(re.search(r"rollout (\d+)%", text)[1]) for text in most]
    assert shares == sorted(shares)
    assert most[-1].startswith("rollout")


def test_an_unknown_table_is_refused():
    with pytest.raises(ValueError, match=r"plan must be one of .*, got 'qwen3-8b'. Did you mean 'qwen3-8b-4b'"):
        rendered("<!-- plan:qwen3-8b -->\n<!-- /plan -->")
