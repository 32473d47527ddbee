"""The tables of docs/scaling.md are what the plan gives now."""

from pathlib import Path

import pytest

from tipdistill.plan.document import BLOCKS, rendered

DOCUMENT = Path(__file__).parents[2] / "docs" / "scaling.md"


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS)
def test_a_table_is_up_to_date(name):
    text = DOCUMENT.read_text(encoding="utf-8")
    assert f"<!-- plan:{name} -->" in text
    assert rendered(text, only=name) == text, "run: tipdistill plan --markdown docs/scaling.md"


def test_an_unknown_table_is_refused():
    with pytest.raises(ValueError, match="there is no plan 'qwen3'"):
        rendered("<!-- plan:qwen3 -->\n<!-- /plan -->")
