"""The plan's tables in docs/scaling.md and benchmarks/results/plan.md are what the plan gives now."""

import re
from pathlib import Path

import pytest

from benchmarks.plan_tables import BLOCKS, DOCUMENTS, rendered

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


def test_an_unknown_table_is_refused():
    with pytest.raises(ValueError, match=r"plan must be one of .*, got 'qwen3-8b'. Did you mean 'qwen3-8b-4b'"):
        rendered("<!-- plan:qwen3-8b -->\n<!-- /plan -->")
