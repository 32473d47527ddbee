"""mask_truncated_completions: a rollout that did not end has no token trained on, however a step is split."""

import itertools
import json
import math
from pathlib import Path

import forks
import pytest
import torch
from datasets import Dataset
from on_cpu import ON_CPU
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM

from tipdistill import TIPConfig, TIPTrainer
from tipdistill.records import open_records
from tipdistill.select import kept_counts
from tipdistill.training.scoring import finished_alone, loss_mask

END = 2
DISTRIBUTED = Path(__file__).parents[1] / "distributed_run.py"


class Alone:
    def gather(self, value):
        return value


def test_rollouts_that_did_not_end_are_left_out_and_the_rest_is_counted():
    batch = {
        "completion_ids": torch.tensor([[5, END, 0, 0], [5, 6, 7, END], [5, 6, 7, 8], [5, END, 7, 0], [END, 0, 0, 0]]),
        "completion_mask": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]]),
    }
    masked = finished_alone(batch, [END, 9], Alone())
    # cut: the third, and the fourth, which holds an end and goes on (a tool's turn) without another
    assert loss_mask(masked).sum(1).tolist() == [2, 4, 0, 0, 1]
    assert masked["num_items_in_batch"] == 7
    assert masked["completion_mask"] is batch["completion_mask"]  # both models still see all of it
    tools = {**batch, "tool_mask": torch.tensor([[1, 1, 1, 1], [1, 0, 0, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]])}
    masked = finished_alone(tools, [END], Alone())
    assert loss_mask(masked).sum(1).tolist() == [2, 2, 0, 0, 1]
    assert masked["num_items_in_batch"] == 5
    assert finished_alone(batch, [], Alone())["num_items_in_batch"] == 0


@pytest.fixture
def train(tiny_model_dir, tiny_tokenizer, tmp_path):
    """Train a student that ends about every sixth token; returns the log, the batches and both models as they were."""
    numbers = itertools.count()

    def run(ends=True, **settings):
        student, teacher = (AutoModelForCausalLM.from_pretrained(tiny_model_dir("phi", role)) for role in ROLES)
        with torch.no_grad():
            student.get_output_embeddings().bias[END] = 6.5 if ends else -50.0
        before = student.state_dict()
        before = {name: value.clone() for name, value in before.items()}
        settings = {
            **ON_CPU,
            "record_rollouts": 0,
            "max_completion_length": 5,
            "max_steps": 1,
            "per_device_train_batch_size": 8,
            "optim": "sgd",
            "learning_rate": 0.1,
            "lr_scheduler_type": "constant",
            "mask_truncated_completions": True,
            **settings,
        }
        directory = tmp_path / str(next(numbers))
        trainer = TIPTrainer(
            model=student,
            teacher_model=teacher,
            args=TIPConfig(str(directory), **settings),
            train_dataset=Dataset.from_dict({"prompt": ["Ada has 12 apples", "Kurt", "A box", "Emmy has"] * 4}),
            processing_class=tiny_tokenizer,
            teacher_processing_class=tiny_tokenizer,
        )
        batches, generate = [], trainer._generate_and_score_completions
        trainer._generate_and_score_completions = lambda inputs: batches.append(generate(inputs)) or batches[-1]
        trainer.train()
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        after = trainer.model.state_dict()
        student.load_state_dict({name: value.clone() for name, value in before.items()})
        moved = max(float((after[name] - before[name]).abs().max()) for name in before)
        trainer.directory, trainer.moved = directory, moved
        return trainer, logged, batches, (student, teacher)

    return run


ROLES = ("student", "teacher")
EVERY = {
    "batch": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    "inside": {},
    "micro_batch": {"normalization": "micro_batch"},
    "micro_batches": {
        "normalization": "micro_batch",
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 4,
    },
    "running": {"normalization": "running", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    "offload": {"teacher_offload": True},
}


def finished(batch):
    lengths = batch["completion_mask"].sum(1)
    return batch["completion_ids"].gather(1, lengths[:, None] - 1)[:, 0] == END


def plain_divergences(models, batch):
    """Reverse KL of every token of the rollouts that ended, rollout by rollout."""
    values = []
    for row in finished(batch).nonzero()[:, 0].tolist():
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        completion = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
        ids = torch.cat([prompt, completion])[None]
        with torch.no_grad():
            own, other = (model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for model in models)
        values.append(kl_div(other, own, reduction="none", log_target=True).sum(-1))
    return values


@pytest.mark.parametrize("name", EVERY)
def test_the_loss_is_the_mean_over_the_rollouts_that_ended(train, name):
    _, (entry,), (batch,), models = train(selection_rule="all", retention=1.0, **EVERY[name])
    assert 1 <= finished(batch).sum() <= 7
    values = torch.cat(plain_divergences(models, batch))
    assert entry["loss"] == pytest.approx(float(values.mean()), rel=1e-4)
    assert entry["reverse_kl"] == pytest.approx(float(values.mean()), rel=1e-4)
    assert entry["selection/trained_tokens"] == len(values)
    # what TRL logs of completions is of all of them
    assert entry["completions/clipped_ratio"] == 1 - finished(batch).float().mean()


@pytest.mark.parametrize("name", ["batch", "inside", "micro_batch", "offload"])
def test_budgets_are_of_the_rollouts_that_ended(train, name):
    """The tokens of the highest divergence in each of them, and their number as the denominator."""
    settings = {"selection_rule": "divergence", "retention": 0.5, **EVERY[name]}
    _, (entry,), (batch,), models = train(**settings)
    rollouts = plain_divergences(models, batch)
    counts = kept_counts(torch.tensor([len(values) for values in rollouts]), 0.5, "divergence", "rollout").tolist()
    kept = torch.cat([values.sort(descending=True)[0][:count] for values, count in zip(rollouts, counts, strict=True)])
    assert entry["loss"] == pytest.approx(float(kept.mean()), rel=1e-4)
    assert entry["selection/trained_tokens"] == sum(counts)


CUT = [*((name, "soft_or") for name in EVERY), ("batch", "all"), ("micro_batch", "gradient_norm_sampling")]


@pytest.mark.parametrize(("name", "rule"), CUT)
def test_a_step_whose_rollouts_were_all_cut_changes_nothing(train, name, rule):
    retention = 1.0 if rule == "all" else 0.5
    trainer, logged, batches, _ = train(
        ends=False, selection_rule=rule, retention=retention, max_steps=2, **EVERY[name]
    )
    assert not any(finished(batch).any() for batch in batches)
    assert [entry["loss"] for entry in logged] == [0, 0]
    assert trainer.moved == 0
    figures = [value for entry in logged for value in entry.values() if isinstance(value, float)]
    assert all(math.isfinite(value) for value in figures)
    assert logged[-1]["selection/trained_tokens"] == 0


def test_without_it_all_rollouts_are_trained_on(train):
    settings = {"selection_rule": "all", "retention": 1.0, "mask_truncated_completions": False}
    _, (entry,), (batch,), _ = train(**settings)
    assert entry["selection/trained_tokens"] == batch["completion_mask"].sum()


def test_records_hold_no_token_of_a_rollout_that_was_cut(train):
    assert not list(train(ends=False, record_rollouts=8)[0].directory.glob("records/*"))
    trainer, _, (batch,), _ = train(record_rollouts=8)
    records = open_records(trainer.directory / "records" / "step-0")
    assert records.rollouts["finished"].to_pylist() == finished(batch).tolist()
    tokens = records.read().to_pydict()["rollout"]
    expected = torch.where(finished(batch), batch["completion_mask"].sum(1), 0).tolist()
    assert [tokens.count(number) for number in records.rollouts["rollout"].to_pylist()] == expected


def test_the_loss_of_an_evaluation_is_of_all_rollouts(train):
    trainer, *_ = train(ends=False, eval_strategy="no")
    trainer.eval_dataset = trainer.train_dataset.select(range(8))
    assert trainer.evaluate()["eval_loss"] > 0.1


@pytest.mark.slow
def test_two_processes_leave_out_what_one_does(tiny_model_dir, word_problems, tmp_path):
    """Rollouts end at every sixth token of the vocabulary, or are cut at a length of their prompt's own."""
    pair = [str(tiny_model_dir("qwen3", role)) for role in ROLES]
    settings = {
        **ON_CPU,
        "max_completion_length": 12,
        "max_steps": 3,
        "shuffle_dataset": False,
        "score_logging_steps": 1,
        "record_rollouts": 0,
        "mask_truncated_completions": True,
        "generation_kwargs": {"do_sample": False, "eos_token_id": list(range(0, 396, 6))},
    }
    figures = {}
    for processes in (1, 2):
        out = tmp_path / f"{processes}.json"
        split = {"per_device_train_batch_size": 4 // processes, "gradient_accumulation_steps": 2}
        argv = [*pair, str(word_problems), str(out), json.dumps({**settings, **split})]
        logs = [tmp_path / f"{processes}-{rank}" for rank in range(processes)]
        assert forks.ranks(forks.script, DISTRIBUTED.read_text(), argv, logs=logs) == [0] * processes, logs[
            0
        ].read_text()
        figures[processes] = json.loads(out.read_text())
    assert [figures[processes]["processes"] for processes in (1, 2)] == [1, 2]
    assert 0 < figures[1]["completions/clipped_ratio"][0] < 1
    for name in ("loss", "grad_norm", "reverse_kl", "selection/trained_tokens", "completions/clipped_ratio"):
        assert figures[2][name] == pytest.approx(figures[1][name], rel=1e-4)
