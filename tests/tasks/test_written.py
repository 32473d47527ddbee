"""What every small task keeps to, and that its recipe finds what the command prepares."""

import json
import random
from dataclasses import replace
from importlib import import_module

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from tipdistill.recipes import recipe_path
from tipdistill.tasks import WRITTEN_TASKS, __main__
from tipdistill.tasks.written import Training, is_held_out

TASKS = {name: import_module(f"tipdistill.tasks.{name}").TASK for name in WRITTEN_TASKS}
RECIPES = {"arithmetic": "laptop", "modular": "modular", "machine": "machine"}


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_prompts_solutions_and_vocabulary_fit_together(task):
    tokenizer, draw = task.build_tokenizer(), random.Random(0)
    for problem in task.problems(30, 0) + task.problems(30, 0, held_out=True):
        prompt, solution = task.prompt_of(problem), task.solve(problem, draw, None)
        assert task.parse(prompt) == problem
        assert (len(prompt), len(solution)) == (task.prompt_tokens, task.completion_tokens)
        assert len(tokenizer(prompt + solution)["input_ids"]) == len(prompt + solution)
        assert task.is_correct(prompt, solution)
        assert not task.is_correct(prompt, solution[:-1])


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_no_problem_of_the_evaluation_is_trained_on(task):
    asked = set(task.problems(256, 0, held_out=True))
    assert len(asked) == 256
    assert all(map(is_held_out, asked))
    assert not any(map(is_held_out, task.problems(2000, 0)))
    rows = task._solutions(200, random.Random(0))
    texts = task.build_tokenizer().batch_decode(rows[:, : task.prompt_tokens])
    assert not any(is_held_out(task.parse(text)) for text in texts)


@pytest.mark.parametrize("name", TASKS)
def test_the_recipe_finds_what_the_command_prepares(name, tmp_path, monkeypatch, capsys):
    tiny = Training(layers=1, width=16, steps=2, learning_rate=1e-3, batch=2)
    task = replace(TASKS[name], teacher=tiny, student=replace(tiny, seed=1))
    monkeypatch.setattr(import_module(f"tipdistill.tasks.{name}"), "TASK", task)
    assert __main__.main([name, "--output_dir", str(tmp_path), "--prompts", "40"]) == 0
    assert str(tmp_path) in capsys.readouterr().out
    recipe = yaml.safe_load(recipe_path(RECIPES[name]).read_text(encoding="utf-8"))
    assert recipe["max_completion_length"] == task.completion_tokens
    for field in ("model_name_or_path", "teacher_model_name_or_path"):
        folder = tmp_path / "models" / recipe[field].rpartition("/")[2]
        assert AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == len(task.characters) + 1
        assert len(AutoTokenizer.from_pretrained(folder)) == len(task.characters) + 1
    lines = (tmp_path / recipe["dataset_name"].rpartition("/")[2]).read_text(encoding="utf-8").splitlines()
    assert len({json.loads(line)["prompt"] for line in lines}) == 40


@pytest.mark.parametrize("name", [*TASKS, "trip"])
def test_a_number_of_prompts_that_cannot_be_is_refused_before_a_model_is_taught(name, tmp_path, capsys):
    assert __main__.main([name, "--output_dir", str(tmp_path / "task"), "--prompts", "0"]) == 2
    assert " must be in 1.." in capsys.readouterr().err
    assert not (tmp_path / "task").exists()


def test_a_training_that_is_broken_off_is_the_start_of_the_whole_one():
    whole, part = [], []
    training = Training(layers=1, width=16, steps=20, learning_rate=1e-3, batch=2)
    TASKS["modular"].teach(training, lambda step, loss: whole.append(loss))
    TASKS["modular"].teach(replace(training, stop=7), lambda step, loss: part.append(loss))
    assert part == whole[:7]
