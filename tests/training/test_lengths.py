"""Prompts that leave a completion too few positions are refused as early as they can be known."""

import json
from pathlib import Path

import pytest
from causal_models import tiny
from datasets import Dataset

from tipdistill import TIPConfig, TIPTrainer
from tipdistill.evaluate.task import Problem, Task
from tipdistill.tasks.arithmetic import build_tokenizer
from tipdistill.training.lengths import (
    check_batch,
    check_completions,
    check_problems_fit,
    check_prompts_fit,
    position_limits,
)


@pytest.fixture
def config(tmp_path):
    return lambda **settings: TIPConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", **settings)


def test_limits_come_from_a_model_or_its_configuration_and_keywords(tmp_path, config):
    tiny("gpt2").save_pretrained(tmp_path / "student")
    args = config(teacher_model_init_kwargs={"max_position_embeddings": 96})
    tiny("llama").save_pretrained(tmp_path / "teacher")
    limits = position_limits(str(tmp_path / "student"), str(tmp_path / "teacher"), args)
    assert limits == {"student": 64, "teacher": 96}
    assert position_limits(tiny("mamba2"), tiny("llama"), config()) == {"student": None, "teacher": 64}
    assert position_limits(tiny("llama"), None, config()) == {"student": 64}
    assert position_limits(str(tmp_path / "nothing"), None, config()) == {"student": None}


def test_the_longest_prompt_is_found_and_refused(config):
    dataset = Dataset.from_dict({"prompt": ["1", "1+1=", "12345678=", "7"]})
    fits, fails = {"student": 64, "teacher": 9 + 8}, {"student": 64, "teacher": 9 + 7}
    args = config(max_completion_length=8)
    check_prompts_fit(fits, dataset, build_tokenizer(), args)
    with pytest.raises(
        ValueError,
        match=r"longest prompt has 9 tokens, and with max_completion_length 8 that is more than the 16 positions of "
        "the teacher: lower max_completion_length or drop longer prompts",
    ):
        check_prompts_fit(fails, dataset, build_tokenizer(), args)


def test_prompts_of_evaluations_and_problems_of_tasks_are_looked_at_too(config):
    limits, args = {"student": 16, "teacher": 17}, config(max_completion_length=8)
    fits, fails = (Dataset.from_dict({"prompt": ["1", prompt]}) for prompt in ("1234567=", "12345678="))
    check_prompts_fit(limits, {"a": fits, "b": fits}, build_tokenizer(), args, "eval_dataset")
    check_prompts_fit(limits, None, build_tokenizer(), args, "eval_dataset")
    with pytest.raises(ValueError, match=r"longest prompt of eval_dataset\['b'\] has 9 tokens, .* of the student"):
        check_prompts_fit(limits, {"a": fits, "b": fails}, build_tokenizer(), args, "eval_dataset")
    task = Task("sums", (Problem("1", "1"), Problem("12345678", "1")), prompt="0{problem}=")
    with pytest.raises(ValueError, match=r"longest prompt of the task 'sums' has 10 tokens, .* of the student"):
        check_problems_fit(limits, [task], build_tokenizer(), args)
    check_problems_fit({"student": 18, "teacher": None}, [task], build_tokenizer(), args)


def test_a_trainer_refuses_them_before_weights_are_loaded(tiny_model_dir, config):
    pair = [str(tiny_model_dir("qwen3", who)) for who in ("student", "teacher")]
    short, long = (Dataset.from_dict({"prompt": [prompt] * 8}) for prompt in ("a", "1 " * 600))
    with pytest.raises(ValueError, match=r"the longest prompt of eval_dataset has \d+ tokens"):
        TIPTrainer(*pair, config(max_completion_length=8), short, long)
    problems = Path(config().output_dir, "long.jsonl")
    problems.write_text(json.dumps({"problem": "1 " * 600, "answer": "1"}))
    with pytest.raises(ValueError, match=r"the longest prompt of the task 'long' has \d+ tokens"):
        TIPTrainer(*pair, config(max_completion_length=8, eval_tasks=str(problems), eval_steps=1), short)


def test_a_completion_that_fits_no_prompt_is_refused_without_a_look(config):
    with pytest.raises(ValueError, match="takes all of the 64 positions of the student"):
        check_prompts_fit({"student": 64}, None, None, config(max_completion_length=64))


def test_only_prompts_that_may_be_too_long_are_encoded(config, monkeypatch):
    encoded = []
    monkeypatch.setattr(
        "tipdistill.training.lengths.prompt_lengths",
        lambda prompts, *rest: encoded.extend(prompts) or [len(prompt) for prompt in prompts],
    )
    dataset = Dataset.from_dict({"prompt": ["1", "1+1=", "12345678=", "7"]})
    check_prompts_fit({"student": 19}, dataset, build_tokenizer(), config(max_completion_length=10))
    assert encoded == ["1", "12345678="]  # the first, for what a template adds


def test_a_batch_is_refused_before_it_is_sampled():
    check_batch({"student": 8, "teacher": None}, [[1, 2], [1, 2, 3]], 5, in_turns=False)
    with pytest.raises(ValueError, match=r"longest prompt has 4 tokens.* more than the 8 positions of the student"):
        check_batch({"student": 8, "teacher": None}, [[1, 2, 3, 4]], 5, in_turns=False)
    check_batch({"student": 8}, [[1] * 7], 5, in_turns=True)
    with pytest.raises(ValueError, match="the longest prompt has 8 tokens"):
        check_batch({"student": 8}, [[1] * 8], 5, in_turns=True)


def test_a_completion_without_a_token_is_refused():
    check_completions([[1]], [[2]])
    with pytest.raises(ValueError, match="rollout 1 of the batch has a completion of length 0"):
        check_completions([[1], [1]], [[2], []])
