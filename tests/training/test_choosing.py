"""Tokens that are chosen in the loss: in one pass over the lm_heads, and in two, the same training."""

import math

import pytest
import torch
from datasets import Dataset
from on_cpu import ON_CPU

import tipdistill.loss
from tipdistill import TIPConfig, TIPTrainer
from tipdistill.score import NonFiniteLogitsError, chunked
from tipdistill.training import selection

SETTINGS = {
    **ON_CPU,
    "max_completion_length": 12,
    "learning_rate": 1e-3,
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "record_rollouts": 0,
    "retention": 0.3,
    "normalization": "running",
}
FIGURES = ("loss", "grad_norm", "selection/kept_fraction", "selection/trained_tokens", "entropy", "reverse_kl")


@pytest.fixture
def make(tiny_model_dir, word_problems, tmp_path):
    models = [str(tiny_model_dir(*pair)) for pair in (("qwen3", "student"), ("llama", "teacher"))]
    prompts = Dataset.from_json(str(word_problems)).select(range(32))

    def build(**settings):
        return TIPTrainer(*models, TIPConfig(str(tmp_path / "run"), **{**SETTINGS, **settings}), prompts)

    return build


@pytest.fixture
def passes(monkeypatch):
    """Of each forward of a loss how often its tokens were scored before: never, in one pass."""
    counted = []
    choose, score = tipdistill.loss.fused_selected_loss, tipdistill.loss.token_scores

    def choosing(*arguments, **options):
        counted.append(0)
        return choose(*arguments, **options)

    def scoring(*arguments, **options):
        counted[-1] += 1
        return score(*arguments, **options)

    monkeypatch.setattr("tipdistill.training.choosing.fused_selected_loss", choosing)
    monkeypatch.setattr("tipdistill.loss.token_scores", scoring)
    return counted


def history(trainer):
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 3
    return [[entry[name] for name in FIGURES] for entry in entries]


@pytest.mark.parametrize(
    "settings",
    [
        {"selection_rule": "soft_or"},
        {"selection_rule": "gradient_norm_sampling", "selection_scope": "batch"},
        {"selection_rule": "divergence", "beta": 0.0, "temperature": 0.7, "score_logging_steps": 1},
        {"selection_rule": "entropy_jsd_sampling", "beta": 0.5},
        {"selection_rule": "cumulative_advantage"},
        {"selection_rule": "teachability_soft_or", "selection_scope": "batch"},
        {"selection_rule": "confidence_ratio", "normalization": "micro_batch"},
        {"selection_rule": "soft_or", "normalization": "batch", "gradient_accumulation_steps": 1},
    ],
    ids=lambda settings: f"{settings['selection_rule']}, {settings.get('normalization', 'running')}",
)
def test_one_pass_trains_as_two_do(make, monkeypatch, passes, settings):
    one = history(make(**settings))
    in_one, passes[:] = list(passes), []
    assert in_one
    assert set(in_one) == {0}
    monkeypatch.setattr(chunked, "CPU_CHOICE", 0)
    two = history(make(**settings))
    assert passes == [1] * len(in_one)
    for entry, expected in zip(one, two, strict=True):
        assert entry == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("normalization", ["running", "micro_batch"])
def test_rollouts_are_chosen_from_as_many_at_a_time_as_fit(make, monkeypatch, passes, normalization):
    """With scales of the step before what is chosen of a rollout does not depend on those beside it; without, all are
    one group, however little fits."""
    together = history(make(normalization=normalization))
    row = 2 * 400 * 4  # bytes of a token's logits of both models
    # one rollout at a time, none of them in the memory of the lm_head's gradient
    monkeypatch.setattr(chunked, "CPU_WORKSPACE", 12 * row)
    monkeypatch.setattr(chunked, "CPU_TILE", (1, 64))
    apart = history(make(normalization=normalization))
    assert set(passes) == {0}
    for entry, expected in zip(apart, together, strict=True):
        assert entry == pytest.approx(expected, rel=1e-4)


def test_what_a_step_tells_the_next_is_told_by_rollout(make, monkeypatch):
    told, tell = [], selection.running_of

    def telling(scores, rule, retention, rollout, scope):
        told.append(rollout)
        return tell(scores, rule, retention, rollout, scope)

    monkeypatch.setattr(selection, "running_of", telling)
    history(make())
    assert len(told) == 3
    for rollout in told:
        assert rollout.unique_consecutive().tolist() == list(range(8))


def test_one_divergence_has_one_beta(make, passes):
    """A rule reads the symmetric Jensen-Shannon divergence, whatever is trained on, so those are two passes."""
    history(make(selection_rule="entropy_jsd_sampling", beta=0.3))
    assert set(passes) == {1}


@pytest.mark.parametrize("normalization", ["running", "micro_batch"])
def test_a_logit_that_is_no_number_is_named_by_its_rollout_and_token(make, normalization):
    trainer = make(normalization=normalization)
    trainer.train()
    trainer.model.train()
    head = trainer.student_head

    def broken(model, hidden):
        rows = hidden.clone()
        rows[17, 0] = math.nan
        return head(model, rows)

    inputs = trainer._prepare_inputs([trainer.train_dataset[row] for row in range(8)])
    mask = inputs["completion_mask"].bool()
    row, token = mask.nonzero()[17].tolist()
    trainer.student_head = broken
    with pytest.raises(NonFiniteLogitsError, match=f"rollout {row} of the batch, token {token}"), torch.enable_grad():
        trainer.compute_loss(trainer.model, inputs)
