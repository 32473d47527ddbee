"""A student that calls tools while it is trained: what it is trained on, what is recorded, what is refused."""

import json

import pytest
import torch
from acting import NAMES, Counter, Shop, speaks_of_tools, turn_after
from datasets import Dataset
from plain_loss import PLAIN
from transformers import AutoModelForCausalLM, AutoTokenizer

from tipdistill import TIPConfig, TIPTrainer
from tipdistill.training.kept import kept_states, read

SETTINGS = {**PLAIN, "max_completion_length": 400, "max_steps": 1, "gradient_accumulation_steps": 1}


@pytest.fixture
def models(tiny_model_dir):
    """Directories of a student and a teacher of one vocabulary."""
    return tiny_model_dir("qwen3", "student"), tiny_model_dir("llama", "teacher")


def rows(count=8):
    return [
        {"prompt": [{"role": "user", "content": f"Buy a {name}."}], "wanted": name, "money": 3 + row}
        for row, name in enumerate(NAMES[:count])
    ]


def trainer_of(models, tmp_path, factory=Shop, prompts=None, **settings):
    args = TIPConfig(str(tmp_path / "run"), **{**SETTINGS, **settings})
    tokenizer = speaks_of_tools(AutoTokenizer.from_pretrained(models[0]))
    dataset = Dataset.from_list(prompts or rows())
    options = {} if factory is None else {"environment_factory": factory}
    trainer = TIPTrainer(str(models[0]), str(models[1]), args, dataset, processing_class=tokenizer, **options)
    script(trainer)
    return trainer


def script(trainer):
    """In the place of the engine: every context goes on as `turn_after` has it."""
    trainer._generate_single_turn = lambda prompt_ids, *rest: [
        turn_after(trainer._tokenizer, ids) for ids in prompt_ids
    ]


def expected_loss(models, inputs, retention, backward):
    """The masked loss in plain PyTorch: divergence on full logits, the largest of each rollout's own tokens kept.

    With backward="kept" the logits of these are computed again, from the positions before them.
    """
    student, teacher = (AutoModelForCausalLM.from_pretrained(path) for path in models)
    total, count = torch.zeros(()), 0
    for row in range(len(inputs["prompt_ids"])):
        prompt = inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()]
        seen = inputs["completion_mask"][row].bool()
        completion, own = inputs["completion_ids"][row][seen], inputs["tool_mask"][row][seen].bool()
        ids = torch.cat([prompt, completion])[None]
        mine, theirs = (model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float() for model in (student, teacher))
        mine, theirs = mine.log_softmax(-1), theirs.detach().log_softmax(-1)
        values = (mine.exp() * (mine - theirs)).sum(-1)[own]
        kept = values.detach().topk(int(retention * len(values))).indices
        if backward == "kept":
            position = own.nonzero()[:, 0][kept].sort().values + len(prompt) - 1
            passes = torch.zeros_like(ids, dtype=torch.bool)
            passes[0, position] = True
            states = kept_states(student, read(student, ids, torch.ones_like(ids)), passes)
            mine, theirs = student.lm_head(states).log_softmax(-1), theirs[position - len(prompt) + 1]
            values = (mine.exp() * (mine - theirs)).sum(-1)
            total, count = total + values.sum(), count + len(values)
            continue
        total, count = total + values[kept].sum(), count + len(kept)
    loss = total / count
    loss.backward()
    return loss.detach(), {name: value.grad for name, value in student.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("backward", ["full", "kept"])
@pytest.mark.parametrize("normalization", ["batch", "micro_batch", "running"])
def test_loss_and_gradients_of_episodes_equal_plain_pytorch(models, tmp_path, normalization, backward):
    settings = {"normalization": normalization, "backward": backward}
    trainer = trainer_of(models, tmp_path, per_device_train_batch_size=8, **settings)
    trainer.model.train()
    inputs = trainer._prepare_inputs(rows())
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    expected, gradients = expected_loss(models, inputs, trainer.args.retention, backward)
    torch.testing.assert_close(loss.detach(), expected, rtol=2e-5, atol=0)
    largest = max(value.abs().max() for value in gradients.values())
    for name, parameter in trainer.model.named_parameters():
        assert (parameter.grad - gradients[name]).abs().max() < 2e-5 * largest, name
    lengths = (inputs["completion_mask"] * inputs["tool_mask"]).sum(1), inputs["completion_mask"].sum(1)
    assert bool((lengths[0] < lengths[1]).any()), "some of the rollouts hold results"


def test_the_mask_holds_what_the_student_wrote_and_nothing_else(models, tmp_path):
    trainer = trainer_of(models, tmp_path, gradient_accumulation_steps=2)
    trainer.model.train()
    batch = trainer._generate_and_score_completions(rows())
    tokenizer = trainer._tokenizer
    for row in range(8):
        seen = batch["completion_mask"][row].bool()
        ids, own = batch["completion_ids"][row][seen], batch["tool_mask"][row][seen].bool()
        text = tokenizer.decode(ids[own])
        assert "<|start|>" not in text
        assert text.endswith("thanks<|end|>")
        assert tokenizer.decode(ids[~own]).count("<|start|>tool\n") == text.count("<call>")
        assert not bool((batch["selection_weight"][row][seen] > 0)[~own].any())


def test_a_run_counts_what_was_done_and_records_it(models, tmp_path):
    trainer = trainer_of(models, tmp_path, per_device_train_batch_size=8, record_rollouts=4, max_steps=2)
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert logged["episodes/answered"] == 1
    assert logged["episodes/cut"] == 0
    assert 1 < logged["episodes/turns"] <= 4
    assert logged["tools/raised"] == 0
    assert logged["tools/failure_frequency"] == 0
    assert logged["episodes/correct"] == 0
    assert logged["episodes/count"] > 0
    assert logged["episodes/result_tokens"] > 0


def test_the_environment_speaks_at_the_end_of_each_prompt(models, tmp_path):
    trainer = trainer_of(models, tmp_path, per_device_train_batch_size=8)
    trainer.model.train()
    batch = trainer._generate_and_score_completions(rows())
    for row, given in enumerate(rows()):
        text = trainer._tokenizer.decode(batch["prompt_ids"][row][batch["prompt_mask"][row].bool()])
        assert f"Buy a {given['wanted']}. You have {given['money']} coins.<|end|>" in text
        assert text.startswith("<|start|>tools\nask buy")


def test_a_held_out_loss_plays_episodes_too(models, tmp_path):
    trainer = trainer_of(models, tmp_path, per_device_eval_batch_size=4)
    figures = trainer.evaluate(Dataset.from_list(rows()))
    assert figures["eval_loss"] > 0
    assert figures["eval_episodes/answered"] == 1


def test_a_task_with_an_environment_is_measured_while_training(models, tmp_path):
    file = tmp_path / "shop.jsonl"
    problems = [{"problem": row["prompt"], "wanted": "pear", "money": 5} for row in rows()]
    file.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    task = {"dataset": str(file), "split": "train", "environment": "acting.Shop", "prompt": "own"}
    (tmp_path / "tasks_of_shop.py").write_text(f"SHOP = {task}")
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(tmp_path)
        trainer = trainer_of(
            models,
            tmp_path,
            eval_tasks="tasks_of_shop.SHOP",
            eval_steps=1,
            eval_num_samples=2,
            per_device_eval_batch_size=4,
        )
        trainer.train()
    measured = [entry for entry in trainer.state.log_history if "eval_tasks_of_shop.SHOP/mean_at_2" in entry]
    assert len(measured) == 2
    (samples,) = (tmp_path / "run" / "eval" / "step-0" / "samples").glob("*.jsonl")
    samples = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(samples) == 16
    for sample in samples:
        bought = sum(range(1, sample["calls"] + 1))
        assert sample["figures"] == {"count": bought}
        assert sample["correct"] == (bought == 1)
        assert [turn["role"] for turn in sample["transcript"]] == ["student", "tool"] * sample["calls"] + ["student"]
    right = sum(sample["correct"] for sample in samples) / 16
    assert measured[0]["eval_tasks_of_shop.SHOP/mean_at_2"] == pytest.approx(right)


@pytest.mark.parametrize(
    ("factory", "prompts", "settings", "said"),
    [
        (Shop, [{"prompt": f"Buy {name}."} for name in NAMES], {}, "plain text, and tools are called in conversations"),
        (None, None, {"environment": "acting.Nothing"}, "there is no environment 'acting.Nothing'"),
        (object, None, {}, "has no method `reset"),
        (Shop, None, {"max_tool_result_tokens": 0}, "max_tool_result_tokens must be an integer ≥ 1"),
        (Shop, None, {"tool_timeout": 0.0}, "tool_timeout must be a positive number"),
        (Shop, None, {"remove_unused_columns": True}, "an environment is begun with all of its columns"),
    ],
)
def test_what_cannot_be_played_is_refused_before_weights_are_loaded(
    models, tmp_path, monkeypatch, factory, prompts, settings, said
):
    monkeypatch.setattr("tipdistill.training.resumable.DistillationTrainer.__init__", None)
    with pytest.raises(ValueError, match=said):
        trainer_of(models, tmp_path, factory, prompts, **settings)


def test_descriptions_of_tools_count_among_a_prompts_tokens(models, tmp_path, monkeypatch):
    monkeypatch.setattr("tipdistill.training.resumable.DistillationTrainer.__init__", None)
    tokenizer = speaks_of_tools(AutoTokenizer.from_pretrained(models[0]))
    alone = max(len(tokenizer.apply_chat_template(row["prompt"], return_dict=False)) for row in rows())
    with pytest.raises(ValueError, match="max_completion_length"):  # 512 positions
        trainer_of(models, tmp_path, max_completion_length=512 - alone - 10)


def test_what_the_environment_says_counts_too_before_further_turns_are_written(models, tmp_path):
    class Talks(Shop):
        def reset(self, **row):
            return " Listen." * 40

    trainer = trainer_of(models, tmp_path, Talks)
    with pytest.raises(ValueError, match="max_completion_length"):
        trainer.train()


def test_a_student_whose_template_renders_no_calls_is_refused(models, tmp_path):
    args = TIPConfig(str(tmp_path / "run"), **SETTINGS)
    with pytest.raises(ValueError, match="cannot render a conversation with tools"):
        TIPTrainer(str(models[0]), str(models[1]), args, Dataset.from_list(rows()), environment_factory=Counter)


def test_functions_as_tools_keep_working(models, tmp_path):
    def buy(item: str, count: int) -> str:
        """Buy.

        Args:
            item: what
            count: how many
        """
        bought.append((item, count))
        return "done"

    bought = []
    args = TIPConfig(str(tmp_path / "run"), **SETTINGS)
    tokenizer = speaks_of_tools(AutoTokenizer.from_pretrained(models[0]))
    dataset = Dataset.from_list([{"prompt": row["prompt"]} for row in rows()])
    trainer = TIPTrainer(str(models[0]), str(models[1]), args, dataset, processing_class=tokenizer, tools=[buy])
    script(trainer)
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert bought
    assert logged["tools/call_frequency"] == pytest.approx(len(bought) / 4)
    assert "episodes/correct" not in logged
