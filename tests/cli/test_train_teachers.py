"""`tipdistill train` with several teachers, a teacher's own prompts, and the student as its own teacher."""

import json

import pytest
import yaml
from on_cpu import ON_CPU

from tipdistill import TIPTrainer
from tipdistill.cli import main

BASE = {
    **ON_CPU,
    "max_steps": 1,
    "max_completion_length": 8,
    "record_rollouts": 0,
}


@pytest.fixture
def start(tiny_model_dir, word_problems, tmp_path, monkeypatch):
    """Run `tipdistill train` on a recipe; returns the exit code and the trainer, None where none was made."""
    prompts = [json.loads(line)["prompt"] for line in word_problems.read_text(encoding="utf-8").splitlines()]
    rows = [
        {"prompt": prompt, "for": "maths" if row % 2 else "code", "hint": f"It is 42. {prompt}"}
        for row, prompt in enumerate(prompts)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trainers, init = [], TIPTrainer.__init__

    def watched(self, *args, **kwargs):
        init(self, *args, **kwargs)
        trainers.append(self)

    monkeypatch.setattr(TIPTrainer, "__init__", watched)

    def run(settings, *flags):
        recipe = {
            **BASE,
            "model_name_or_path": str(tiny_model_dir("qwen3", "student")),
            "dataset_name": str(tmp_path / "rows.jsonl"),
            "output_dir": str(tmp_path / "run"),
            **settings,
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        code = main(["train", "--config", str(tmp_path / "recipe.yaml"), *flags])
        return code, trainers.pop() if trainers else None

    return run


@pytest.fixture
def teachers(tiny_model_dir):
    return {
        "maths": str(tiny_model_dir("qwen3", "teacher")),
        "code": {"model": str(tiny_model_dir("llama", "teacher"))},
    }


def logged(trainer):
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    return entry


@pytest.mark.parametrize("given", ["recipe", "flags"])
def test_several_teachers_from_a_recipe_and_from_flags(start, teachers, tmp_path, given):
    settings = {"teachers": teachers, "teacher_column": "for"}
    if given == "recipe":
        code, trainer = start(settings)
    else:
        code, trainer = start({}, "--teachers", json.dumps(teachers), "--teacher_column", "for")
    assert code == 0
    entry = logged(trainer)
    assert min(entry["teacher/maths/tokens"], entry["teacher/code/tokens"]) > 0
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert written["teachers"]["maths"] == teachers["maths"]


def test_a_dry_run_says_who_teaches(start, teachers, capsys):
    code, trainer = start({"teachers": {**teachers, "default": "self"}, "teacher_column": "for", "dry_run": True})
    assert (code, trainer) == (0, None)
    lines = capsys.readouterr().out.splitlines()
    for name, said in (("maths", "qwen3"), ("code", "llama"), ("default", "the student itself (frozen)")):
        (line,) = [line for line in lines if line.startswith(f"# teacher {name} ")]
        assert said in line


@pytest.mark.parametrize("as_chat", [False, True], ids=["plain", "apply_chat"])
def test_the_student_teaches_itself_from_a_column_of_hints(start, as_chat):
    settings = {"teacher_model_name_or_path": "self", "teacher_update": "ema:0.5", "apply_chat": as_chat}
    code, trainer = start({**settings, "teacher_prompt_column": "hint"})
    assert code == 0
    assert trainer.teacher.name == "self (ema:0.5)"
    assert logged(trainer)["reverse_kl"] > 0
    (first,) = trainer.train_dataset.select([0])["hint"][:]
    text = "It is 42. " + (trainer.train_dataset[0]["prompt"][0]["content"] if as_chat else "")
    assert first == [{"role": "user", "content": text}] if as_chat else first.startswith(text)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"teachers": {"maths": "x"}, "teacher_model_name_or_path": "y"},
            "teacher_model_name_or_path is of one teacher",
        ),
        ({"teachers": {"maths": "no/such/model"}, "teacher_column": "for"}, "could not be read (--teachers maths"),
        ({"teacher_model_name_or_path": "self"}, "there is nothing to learn"),
        ({"teachers": ["x"]}, "must map names to teachers"),
        ({}, "no teacher given"),
    ],
    ids=["two ways", "no model", "no hint", "a list", "none"],
)
def test_what_is_wrong_is_said_in_one_line(start, settings, said, capsys):
    code, trainer = start(settings)
    assert (code, trainer) == (2, None)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in error


def test_a_recipe_that_sends_a_key_is_not_trusted(start):
    teachers = {"maths": {"url": "http://localhost:1/v1", "api_key_env": "MY_KEY"}}
    code, trainer = start({"teachers": teachers, "teacher_column": "for"})
    assert (code, trainer) == (2, None)
