"""Rollouts of a run: the stated policy and nothing of the model's own generation_config; every end token ends."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from on_cpu import ON_CPU
from peft import LoraConfig
from transformers import AutoModelForCausalLM, GenerationConfig

from tipdistill import TIPConfig, TIPTrainer
from tipdistill.records import open_records
from tipdistill.rollout import generate

OWN = {
    "do_sample": True,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.5,
    "min_p": 0.3,
    "typical_p": 0.2,
    "epsilon_cutoff": 0.01,
    "eta_cutoff": 0.01,
    "top_h": 0.5,
    "repetition_penalty": 1.5,
    "no_repeat_ngram_size": 2,
    "begin_suppress_tokens": [5, 6, 7],
    "suppress_tokens": [8],
    "forced_bos_token_id": 9,
    "forced_eos_token_id": 0,
    "bad_words_ids": [[10]],
    "sequence_bias": [[[11], -5.0]],
    "exponential_decay_length_penalty": (0, 2.0),
    "num_beams": 2,
    "min_new_tokens": 8,
    "min_length": 8,
    "guidance_scale": 1.5,
    "penalty_alpha": 0.6,
    "stop_strings": ["a"],
    "max_time": 0.01,
    "prompt_lookup_num_tokens": 3,
    "watermarking_config": {"bias": 2.5},
    "renormalize_logits": True,
    "use_cache": False,
    "cache_implementation": "static",
    "an_entry_of_its_own": 3,
}


@pytest.fixture
def pair(tiny_model_dir):
    return [AutoModelForCausalLM.from_pretrained(tiny_model_dir("qwen3", who)) for who in ("student", "teacher")]


@pytest.fixture
def make(pair, tiny_tokenizer, tmp_path):
    def build(dataset=None, extra=None, **settings):
        settings = {
            **ON_CPU,
            "per_device_train_batch_size": 8,
            "max_completion_length": 6,
            "max_steps": 1,
            "record_rollouts": 0,
            **settings,
        }
        return TIPTrainer(
            model=pair[0],
            teacher_model=pair[1],
            args=TIPConfig(str(tmp_path / "run"), **settings),
            train_dataset=dataset or Dataset.from_dict({"prompt": ["Ada has 12 apples"] * 8}),
            processing_class=tiny_tokenizer,
            teacher_processing_class=tiny_tokenizer,
            **(extra or {}),
        )

    return build


def generation_of(trainer):
    """What `generate` was run with in one step: the configuration after all defaults were filled in."""
    model, seen = trainer.plain_student(), []
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    original = model._prepare_generation_config
    model._prepare_generation_config = lambda *args, **kwargs: seen.append(original(*args, **kwargs)) or seen[-1]
    trainer.train()
    del model._prepare_generation_config
    return [{name: value for name, value in vars(config).items() if name[0] != "_"} for config, _ in seen]


@pytest.mark.parametrize("adapter", [None, LoraConfig(target_modules=["q_proj"])], ids=["whole", "lora"])
def test_a_students_own_generation_config_reaches_no_rollout_and_is_there_afterwards(
    make, pair, tiny_model_dir, caplog, adapter
):
    extra = {"peft_config": adapter} if adapter else None
    (plain,) = generation_of(make(extra=extra))
    assert "generation_config says" not in caplog.text
    pair[0] = AutoModelForCausalLM.from_pretrained(tiny_model_dir("qwen3", "student"))
    pair[0].generation_config = own = GenerationConfig(eos_token_id=pair[1].generation_config.eos_token_id, **OWN)
    with caplog.at_level(logging.WARNING, logger="tipdistill"):
        trainer = make(extra=extra)
    (said,) = [record.getMessage() for record in caplog.records if "generation_config says" in record.getMessage()]
    assert "min_p=0.3, " in said
    assert all(f"{name}=" in said for name in OWN if name not in ("do_sample", "use_cache"))
    assert "eos_token_id" not in said.replace("forced_eos_token_id", "")
    assert generation_of(trainer) == [plain]
    model = trainer.plain_student()
    for layer in [model, model.get_base_model()] if adapter else [model]:
        assert layer.generation_config is own


def test_the_saved_student_keeps_its_generation_config(make, pair, tmp_path):
    pair[0].generation_config = GenerationConfig(do_sample=True, top_k=20, min_p=0.1, eos_token_id=[1, 2])
    trainer = make()
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    saved = json.loads(Path(tmp_path / "saved" / "generation_config.json").read_text())
    assert (saved["top_k"], saved["min_p"], saved["eos_token_id"], saved["do_sample"]) == (20, 0.1, [1, 2], True)
    assert "suppress_tokens" not in saved


def test_what_the_user_asks_for_stays(make, pair):
    pair[0].generation_config = GenerationConfig(min_p=0.3, top_k=5)
    (used,) = generation_of(make(generation_kwargs={"min_p": 0.01, "min_new_tokens": 2}, top_k=7))
    assert (used["min_p"], used["min_new_tokens"], used["top_k"]) == (0.01, 2, 7)


def test_a_model_with_an_adapter_has_its_generation_config_after_it_was_sampled(make, pair, tiny_tokenizer):
    model = make(extra={"peft_config": LoraConfig(target_modules=["q_proj"])}).plain_student()
    own = model.get_base_model().generation_config
    list(generate(model, tiny_tokenizer, ["Ada"], max_new_tokens=1))
    assert model.generation_config is own
    assert model.get_base_model().generation_config is own


# Ends.


def test_a_completion_that_ends_with_any_end_token_is_finished(make, pair, tiny_tokenizer, tmp_path):
    """Two ends: the tokenizer's own, and one that the generation_config alone names."""
    other = tiny_tokenizer.convert_tokens_to_ids("a")
    pair[0].generation_config.eos_token_id = [tiny_tokenizer.eos_token_id, other]
    with torch.no_grad():  # the lm_head is tied: make the second end likely
        pair[0].get_input_embeddings().weight[other] *= 8
    trainer = make(record_rollouts=8, score_logging_steps=1, learning_rate=0.0, max_completion_length=20)
    trainer.train()
    records = open_records(tmp_path / "run" / "records" / "step-0")
    rows = records.read().to_pydict()
    last = dict(zip(rows["rollout"], rows["token_id"], strict=True))
    finished = records.rollouts["finished"].to_pylist()
    ends = [
        last[rollout] in (tiny_tokenizer.eos_token_id, other) for rollout in records.rollouts["rollout"].to_pylist()
    ]
    assert finished == ends
    assert other in last.values()
    scored = [
        rollout for batch in generate(pair[0], tiny_tokenizer, ["Ada"] * 8, max_new_tokens=20) for rollout in batch
    ]
    assert all(rollout.finished == (rollout.completion_ids[-1] in trainer.eos_token_ids) for rollout in scored)
    assert other in [rollout.completion_ids[-1] for rollout in scored]


def test_ends_that_the_user_sets_end_completions_too(make, tiny_tokenizer):
    """TRL cuts completions by its own list alone, and what is generated after such an end is padding."""
    end = tiny_tokenizer.convert_tokens_to_ids("a")
    trainer = make(generation_kwargs={"eos_token_id": end})
    assert set(trainer.eos_token_ids) == {end, tiny_tokenizer.eos_token_id}


def test_vllm_is_told_the_ends(make, tiny_tokenizer):
    from tipdistill.training.rollouts import state_policy

    trainer = make()
    trainer.use_vllm, trainer.vllm_generation = True, SimpleNamespace(generation_kwargs={"seed": 1})
    state_policy(trainer)
    assert trainer.vllm_generation.generation_kwargs == {"seed": 1, "stop_token_ids": [tiny_tokenizer.eos_token_id]}


def test_ends_that_differ_are_named_once(make, pair, caplog):
    pair[1].generation_config.eos_token_id = 0
    with caplog.at_level(logging.WARNING, logger="tipdistill"):
        make()
    (said,) = [record.getMessage() for record in caplog.records if "end tokens differ" in record.getMessage()]
    assert "the student ends with <|end|>, the teacher with <|endoftext|>, <|end|>" in said


def test_tasks_whose_samples_would_be_kept_in_one_file_are_refused_before_weights(make, tmp_path):
    for name in ("my sums", "my_sums"):
        (tmp_path / f"{name}.jsonl").write_text('{"problem": "1 + 1 =", "answer": 2}\n')
    tasks = f"{tmp_path}/my sums.jsonl,{tmp_path}/my_sums.jsonl"
    with pytest.raises(ValueError, match="'my sums' and 'my_sums' would be kept in one file"):
        make(eval_tasks=tasks, eval_steps=1)
