"""Tokenizers that differ in reserved tokens: such a token is never sampled, fed or trained on by accident."""

import copy
import logging

import pytest
import torch
from datasets import Dataset
from on_cpu import ON_CPU
from tokenizers import AddedToken
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM

from tipdistill import TIPConfig, TIPTrainer
from tipdistill.cli import main
from tipdistill.records import open_records

ROWS = 400  # of the heads, 396 of them tokens of the tiny tokenizer
PROMPTS = ["Ada has 12 apples", "Kurt", "A box holds", "Emmy"] * 2


def reserving(tokenizer, *tokens):
    other = copy.deepcopy(tokenizer)
    other.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    return other


@pytest.fixture
def models(tiny_model_dir):
    """Student and teacher; of the student's rows those after 395 are likely."""
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(tiny_model_dir("phi", role)) for role in ("student", "teacher")
    )
    with torch.no_grad():
        student.get_output_embeddings().bias[396:] = 6.0
    return [student, teacher]


@pytest.fixture
def make(models, tiny_tokenizer, tmp_path):
    def build(tokenizers, dataset=None, **settings):
        settings = {
            **ON_CPU,
            "record_rollouts": 0,
            "per_device_train_batch_size": 8,
            "max_completion_length": 12,
            "max_steps": 1,
            "selection_rule": "all",
            "retention": 1.0,
            **settings,
        }
        return TIPTrainer(
            model=models[0],
            teacher_model=models[1],
            args=TIPConfig(str(tmp_path / "run"), **settings),
            train_dataset=Dataset.from_dict({"prompt": PROMPTS}) if dataset is None else dataset,
            processing_class=tokenizers[0],
            teacher_processing_class=tokenizers[1],
        )

    return build


def step(trainer):
    """The batch of one step, and what it logged."""
    batches, generate = [], trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: batches.append(generate(inputs)) or batches[-1]
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    return batches[0], entry


def plain_loss(models, batch, rows):
    values = []
    for row in range(len(batch["prompt_ids"])):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        ids = torch.cat([prompt, batch["completion_ids"][row][batch["completion_mask"][row].bool()]])[None]
        with torch.no_grad():
            own, other = (model(ids).logits[0, len(prompt) - 1 : -1, :rows].log_softmax(-1) for model in models)
        values.append(kl_div(other, own, reduction="none", log_target=True).sum(-1))
    return float(torch.cat(values).mean())


def test_what_differs_is_said_and_never_sampled_and_the_loss_is_over_all_rows(make, models, tiny_tokenizer, caplog):
    """As Qwen2.5 and Qwen3: renamed, and added by the teacher alone."""
    tokenizers = reserving(tiny_tokenizer, "<a>", "<b>"), reserving(tiny_tokenizer, "<a>", "<think>", "</think>")
    with caplog.at_level(logging.WARNING, logger="tipdistill"):
        trainer = make(tokenizers, learning_rate=0.0)
    (said,) = [record.getMessage() for record in caplog.records if "tokenizers differ" in record.getMessage()]
    assert (
        "397 (the student's '<b>', the teacher's '<think>'), 398 (the student's none, the teacher's '</think>')" in said
    )
    batch, entry = step(trainer)
    written = set(batch["completion_ids"][batch["completion_mask"].bool()].tolist())
    assert written & {396, 399}  # likely, and the same to both
    assert not written & {397, 398}
    assert entry["loss"] == pytest.approx(plain_loss(models, batch, ROWS), rel=1e-4)


def test_the_same_tokenizers_are_no_matter(make, tiny_tokenizer, caplog):
    tokenizers = [reserving(tiny_tokenizer, "<a>") for _ in range(2)]
    with caplog.at_level(logging.WARNING, logger="tipdistill"):
        trainer = make(tokenizers)
    assert "differ" not in caplog.text
    assert trainer.generation_config.suppress_tokens is None


def test_padding_that_the_teacher_has_no_row_of(make, models, tiny_tokenizer, tiny_model_dir):
    """As of a Llama with a token added to pad with: its batches would reach beyond the teacher's embedding."""
    models[1] = AutoModelForCausalLM.from_pretrained(tiny_model_dir("phi", "teacher", vocab_rows=396))
    student = reserving(tiny_tokenizer, "<pad>")
    student.pad_token = "<pad>"
    batch, entry = step(make((student, tiny_tokenizer), learning_rate=0.0))
    assert 396 in batch["prompt_ids"]
    assert batch["completion_ids"][batch["completion_mask"].bool()].max() < 396
    assert entry["loss"] == pytest.approx(plain_loss(models, batch, 396), rel=1e-4)


def test_a_prompt_with_such_a_token_is_refused_by_its_row_before_weights(
    make, models, tiny_tokenizer, tiny_model_dir, monkeypatch
):
    tokenizers = reserving(tiny_tokenizer, "<a>"), tiny_tokenizer
    rows = Dataset.from_dict({"prompt": [*PROMPTS, "one <a> two"]})
    loaded = []
    monkeypatch.setattr("tipdistill.trainer.ResumableTrainer.__init__", lambda *_, **__: loaded.append(True))
    with pytest.raises(
        ValueError, match=r"row 8 \(counting from 0\) of train_dataset holds token 396, and the student re"
    ):
        make(tokenizers, rows)
    assert not loaded
    monkeypatch.undo()
    trainer = make(tokenizers, rows.select([8] * 8).to_iterable_dataset())
    with pytest.raises(ValueError, match="prompt 0 of the batch holds token 396"):
        trainer.train()


def test_a_conversation_holds_what_its_template_writes(make, tiny_tokenizer):
    student, teacher = reserving(tiny_tokenizer, "<think>"), tiny_tokenizer
    student.chat_template = student.chat_template.replace("assistant\n", "assistant\n<think>")
    rows = Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in PROMPTS]})
    with pytest.raises(ValueError, match=r"row 0 .* of train_dataset holds token 396, and the student reads '<think>'"):
        make((student, teacher), rows)


def test_a_student_whose_only_end_is_such_a_token_is_refused(make, models, tiny_tokenizer):
    student = reserving(tiny_tokenizer, "<stop>")
    student.eos_token = "<stop>"
    models[0].generation_config.eos_token_id = 396
    with pytest.raises(ValueError, match="the student ends with <stop>, which its teacher's tokenizer lacks"):
        make((student, tiny_tokenizer))
    trainer = make((student, tiny_tokenizer), end_as_teacher=True)
    batch, _ = step(trainer)
    assert 396 in batch["completion_ids"]
    assert trainer.generation_config.suppress_tokens is None


def test_an_end_without_a_row_in_the_teacher_cannot_be_exchanged(make, models, tiny_tokenizer, tiny_model_dir):
    models[1] = AutoModelForCausalLM.from_pretrained(tiny_model_dir("phi", "teacher", vocab_rows=396))
    student = reserving(tiny_tokenizer, "<stop>")
    student.eos_token = "<stop>"
    models[0].generation_config.eos_token_id = 396
    with pytest.raises(ValueError, match="end_as_teacher exchanges the tokens 396 and 2, and both lm_heads have only"):
        make((student, tiny_tokenizer), end_as_teacher=True)


def test_score_and_the_dry_run_do_as_a_run_does(models, tiny_tokenizer, tiny_model_dir, tmp_path, capsys):
    for who, model, tokens in zip(("student", "teacher"), models, [("<a>",), ("<b>", "<c>")], strict=True):
        model.save_pretrained(tmp_path / who)
        reserving(tiny_tokenizer, *tokens).save_pretrained(tmp_path / who)
    (tmp_path / "p.jsonl").write_text('{"prompt": "Ada"}\n' * 8)
    (tmp_path / "q.jsonl").write_text('{"prompt": "Ada"}\n' * 7 + '{"prompt": "<a>"}\n')
    pair = ["--model", str(tmp_path / "student"), "--teacher", str(tmp_path / "teacher"), "--dataset"]
    score = [
        "score",
        *pair,
        str(tmp_path / "p.jsonl"),
        "--output_dir",
        str(tmp_path / "records"),
        "--max_new_tokens",
        "12",
    ]
    assert main(score) == 0
    warned = (
        "# warning   the tokenizers differ in 2 reserved tokens: 396 (the student's '<a>', the teacher's '<b>'), 397"
    )
    shown = capsys.readouterr().out
    assert warned in shown
    assert "the same for both but for 2: 397 tokens; the divergence runs over 400 rows" in shown
    written = set(open_records(tmp_path / "records").read().to_pydict()["token_id"])
    assert written & {398, 399}
    assert not written & {396, 397}
    score[6] = str(tmp_path / "q.jsonl")
    assert main([*score, "--overwrite_output_dir"]) == 2
    refused = "the prompt of row 7 (counting from 0) of"
    assert refused in capsys.readouterr().err
    dry = ["train", *pair, str(tmp_path / "p.jsonl"), "--output_dir", str(tmp_path / "run"), "--use_cpu", "true"]
    dry += ["--bf16", "false", "--dry_run", "true", "--max_completion_length", "12"]
    dry += ["--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "1"]
    assert main(dry) == 0
    assert warned in capsys.readouterr().out
    dry[6] = str(tmp_path / "q.jsonl")
    assert main(dry) == 2
    assert refused in capsys.readouterr().err
