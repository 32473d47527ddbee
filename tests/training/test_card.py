"""The model card says what was trained on, by whom, and cites the method."""

from types import SimpleNamespace

import pytest
from trl.trainer.utils import generate_model_card

from tipdistill.training.card import PAPER, TAGS, complete_card

ARGS = SimpleNamespace(
    selection_rule="q3",
    retention=0.1,
    selection_scope="batch",
    normalization="batch",
    backward="kept",
    temperature=1.0,
)
HISTORY = [
    {"eval_reverse_kl_heldout/mean": 1.5, "eval_reverse_kl_heldout/truncated": 0.5, "step": 0},
    {"loss": 0.9, "reverse_kl": 1.25, "selection/kept_fraction": 0.1, "selection/trained_tokens": 10, "step": 1},
    {"loss": 0.4, "reverse_kl": 0.5, "selection/kept_fraction": 0.1, "selection/trained_tokens": 1234, "step": 2},
    {"eval_reverse_kl_heldout/mean": 0.75, "eval_sums/mean_at_4": 0.25, "step": 2},
]


@pytest.fixture
def card(tmp_path):
    path = tmp_path / "README.md"
    generate_model_card(
        base_model=None,
        model_name="healed",
        hub_model_id=None,
        dataset_name=None,
        tags=TAGS,
        wandb_url=None,
        trackio_url=None,
        trainer_name="TIP",
        trainer_citation=PAPER["citation"],
        paper_title=PAPER["title"],
        paper_id=PAPER["id"],
    ).save(path)
    return path


def test_a_card_has_settings_figures_versions_and_the_paper(card):
    before = card.read_text(encoding="utf-8")
    complete_card(card, "runs/student", "org/teacher", ARGS, HISTORY, "runs/healed")
    text = card.read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert "| teacher | `org/teacher` |" in rows
    assert "| selection rule | `q3` |" in rows
    assert "| retention | 0.1 of the completion tokens |" in rows
    assert "| backward | `kept` |" in rows
    assert "| `reverse_kl` | 1.25 | 0.5 |" in rows
    assert "| `eval_reverse_kl_heldout/mean` | 1.5 | 0.75 |" in rows
    assert "| `eval_sums/mean_at_4` | 0.25 | 0.25 |" in rows
    assert "| tokens trained on |  | 1,234 |" in rows
    assert not any("truncated" in row or "`loss`" in row for row in rows)
    assert "### Framework versions\n\n- tipdistill: " in text
    assert "Yuanda Xu and Hejian Sang" in text
    assert "papers/2604.14084" in text
    assert "None" in before
    assert "None" not in text
    assert "a fine-tuned version of `runs/student`." in text
    assert 'pipeline("text-generation", model="runs/healed"' in text
    told = [line for line in before.splitlines() if line.strip() and "None" not in line and "licence" not in line]
    assert told == [line for line in text.splitlines() if line.strip() and line in before], "nothing of TRL's is lost"


def test_a_run_that_logged_nothing_has_a_card(card):
    complete_card(card, "org/student", "http://host:8000/v1", ARGS, [], "org/healed")
    text = card.read_text(encoding="utf-8")
    assert "| teacher | `http://host:8000/v1` |" in text
    assert "| figure |" not in text
