"""A teacher that ends with another token: by itself the student unlearns to end, with end_as_teacher it learns."""

import json
import logging
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from on_cpu import ON_CPU
from serving import serving
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM, AutoTokenizer

from tipdistill import TIPConfig, TIPTrainer
from tipdistill.cli import main
from tipdistill.rollout import generate
from tipdistill.teachers.ends import EndsAlike, renamed
from tipdistill.teachers.served import ServedTeacher, TeacherServer
from tipdistill.types import TeacherLogprobs

END, OTHER, LETTER = 2, 0, 40  # <|end|> is the student's, <|endoftext|> the teacher's
SETTINGS = {
    **ON_CPU,
    "record_rollouts": 0,
    "per_device_train_batch_size": 16,
    "max_completion_length": 32,
}


def writes(directory, end, probability):
    """A model that writes one letter over and over, and after each ends with this probability."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight.zero_()
        head.bias.fill_(-12.0)
        head.bias[[end, LETTER]] = torch.tensor([probability, 1 - probability]).log()
    model.generation_config.eos_token_id = end
    model.requires_grad_(False)
    head.bias.requires_grad_(True)
    return model


@pytest.fixture
def train(tiny_model_dir, tmp_path):
    directory = tiny_model_dir("phi", "student")

    def run(probability, **settings):
        tokenizers = [AutoTokenizer.from_pretrained(directory) for _ in range(2)]
        tokenizers[1].eos_token, tokenizers[1].chat_template = "<|endoftext|>", None
        trainer = TIPTrainer(
            model=writes(directory, END, 0.3),
            teacher_model=writes(directory, OTHER, probability),
            args=TIPConfig(str(tmp_path / "run"), **{**SETTINGS, **settings}),
            train_dataset=Dataset.from_dict({"prompt": ["Ada"] * 16}),
            processing_class=tokenizers[0],
            teacher_processing_class=tokenizers[1],
        )
        trainer.train()
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        return trainer, [entry["completions/mean_length"] for entry in logged], logged

    return run


def test_completions_grow_without_it_and_are_warned_of(train, caplog):
    with caplog.at_level(logging.WARNING, logger="tipdistill"):
        settings = {"max_steps": 14, "learning_rate": 0.2, "lr_scheduler_type": "constant"}
        _, lengths, _ = train(0.3, selection_rule="all", retention=1.0, **settings)
    assert lengths[0] < 5
    assert min(lengths[-3:]) > 4 * lengths[0]
    said = caplog.text
    assert "the student ends with <|end|>, the teacher with <|endoftext|>" in said
    assert "set end_as_teacher" in said
    assert said.count("the completions have left the range of their lengths") == 1


@pytest.mark.parametrize("settings", [{}, {"normalization": "micro_batch"}, {"teacher_offload": True}], ids=str)
def test_with_it_the_student_ends_where_the_teacher_does(train, settings, caplog, tmp_path):
    with caplog.at_level(logging.WARNING, logger="tipdistill"):
        trainer, _, logged = train(
            0.5, end_as_teacher=True, max_steps=9, learning_rate=0.1, lr_scheduler_type="constant", **settings
        )
    assert "The teacher's <|endoftext|> counts as the student's <|end|>" in caplog.text
    assert "left the range" not in caplog.text
    assert logged[-1]["reverse_kl"] < 0.02 < logged[0]["reverse_kl"]
    trainer.save_model(str(tmp_path / "saved"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    logits = saved(torch.tensor([[LETTER]])).logits[0, -1].softmax(-1)
    assert 0.4 < logits[END] < 0.6  # the teacher's 0.5, from 0.3
    assert logits[OTHER] < 0.01
    (rollouts,) = generate(saved, trainer.processing_class, ["Ada"] * 16, max_new_tokens=32)
    assert all(rollout.finished for rollout in rollouts)


def test_the_loss_is_that_of_the_exchanged_distribution_and_the_teacher_stays_as_it_was(train):
    trainer, _, (entry,) = train(
        0.5, end_as_teacher=True, max_steps=1, learning_rate=0.0, selection_rule="all", retention=1.0
    )
    of_student = torch.full((400,), -12.0, dtype=torch.float64)
    of_student[[END, LETTER]] = torch.tensor([0.3, 0.7], dtype=torch.float64).log()
    of_teacher = torch.full((400,), -12.0, dtype=torch.float64)
    of_teacher[[END, LETTER]] = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    expected = kl_div(of_teacher.log_softmax(0), of_student.log_softmax(0), reduction="sum", log_target=True)
    assert entry["loss"] == pytest.approx(float(expected), rel=1e-5)
    bias = trainer.teacher_model.get_output_embeddings().bias
    assert bias[OTHER] == torch.tensor(0.5).log()
    assert bias[END] == -12


@pytest.mark.parametrize("top_k", [0, 4], ids=["whole", "likeliest"])
def test_a_served_teacher_is_read_the_same_way(tiny_model_dir, tiny_tokenizer, top_k):
    """It is asked about a completion with its own end, and its answer names the student's."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir("qwen3", "teacher"))

    class Alone:
        def gather(self, value):
            return value

    batch = {"prompt_ids": torch.tensor([[5, 6]]), "completion_ids": torch.tensor([[7, 9, END]])}
    batch |= {f"{part}_mask": torch.ones_like(batch[f"{part}_ids"]) for part in ("prompt", "completion")}
    with serving(model, tiny_tokenizer, max_logprobs=-1) as served:
        server = TeacherServer(served.url, top_k=top_k, time_limit=5.0, pause=0.01)
        server.connect(tiny_tokenizer)
        (answer,) = EndsAlike(ServedTeacher(server, Alone()), END, OTHER).answer(batch, torch.ones(1, 3).bool())
        assert served.bodies[-1]["prompt"] == [5, 6, 7, 9, OTHER]
    with torch.no_grad():
        log_p = model(torch.tensor([[5, 6, 7, 9, OTHER]])).logits[0, 1:-1].log_softmax(-1)
    log_p[:, [END, OTHER]] = log_p[:, [OTHER, END]]
    torch.testing.assert_close(answer.sampled, log_p[range(3), [7, 9, END]], rtol=1e-5, atol=1e-5)
    if top_k == 0:
        torch.testing.assert_close(answer.logprob, log_p, rtol=1e-5, atol=1e-5)
    else:
        values, ids = log_p.topk(4)
        assert answer.token_ids[:, :4].tolist() == ids.tolist()
        assert answer.token_ids[-1].tolist().count(END) == 1
        torch.testing.assert_close(answer.logprob[:, :4], values, rtol=1e-5, atol=1e-5)


def test_all_of_an_answer_is_renamed():
    said = TeacherLogprobs(torch.tensor([[-1.0, -2.0, -3.0]]), None, torch.tensor([-2.0]))
    assert renamed(said, 0, 2).logprob.tolist() == [[-3.0, -2.0, -1.0]]
    assert said.logprob.tolist() == [[-1.0, -2.0, -3.0]]


def test_what_a_server_does_not_tell_is_refused(tiny_model_dir, tmp_path):
    args = TIPConfig(str(tmp_path), end_as_teacher=True, teacher_url="http://127.0.0.1:9/v1", **SETTINGS)
    with pytest.raises(ValueError, match="end_as_teacher needs the teacher's end tokens, which its server does not"):
        TIPTrainer(str(tiny_model_dir("qwen3", "student")), None, args, Dataset.from_dict({"prompt": ["a"] * 16}))


def test_the_option_reaches_a_run_from_a_flag_and_a_dry_run_shows_it(tiny_model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for who, end, probability in (("student", END, 0.3), ("teacher", OTHER, 0.5)):
        directory = tiny_model_dir("phi", "student")
        tokenizer = AutoTokenizer.from_pretrained(directory)
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
        tokenizer.chat_template = None
        writes(directory, end, probability).save_pretrained(who)
        tokenizer.save_pretrained(who)
    Path("prompts.jsonl").write_text('{"prompt": "Ada"}\n' * 16)
    flags = ["--model", "student", "--teacher", "teacher", "--dataset", "prompts.jsonl", "--max_steps", "1"]
    for name, value in SETTINGS.items():
        flags += [f"--{name}", str(value)]

    def divergence(run, *more):
        assert main(["train", *flags, "--output_dir", run, *more]) == 0
        return json.loads(Path(run, "trainer_state.json").read_text())["log_history"][0]["reverse_kl"]

    assert divergence("plain") > 2
    assert divergence("alike", "--end_as_teacher", "true") < 0.2
    assert main(["train", *flags, "--output_dir", "dry", "--end_as_teacher", "true", "--dry_run", "true"]) == 0
    shown = capsys.readouterr().out
    assert "# warning   the end tokens differ: the student ends with <|end|>, the teacher with <|endoftext|>" in shown
    assert "counts as the student's <|end|> (end_as_teacher)" in shown
    url = [*flags[:2], *flags[4:], "--teacher_url", "http://127.0.0.1:9/v1", "--end_as_teacher", "true"]
    assert main(["train", *url, "--output_dir", "served", "--dry_run", "true"]) == 2
    assert "which its server does not tell" in capsys.readouterr().err
