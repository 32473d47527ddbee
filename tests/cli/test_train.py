"""`tipdistill train` from end to end on tiny models."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import forks
import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tipdistill import TIPTrainer
from tipdistill.cli import main
from tipdistill.recipes.read import parse

TINY = ["--use_cpu", "--bf16", "false", "--report_to", "none", "--max_steps", "2", "--max_completion_length", "6"]
TINY += ["--logging_steps", "1", "--learning_rate", "1e-3", "--disable_tqdm", "true"]


@pytest.fixture
def models(tiny_model_dir):
    student, teacher = tiny_model_dir("qwen3", "student"), tiny_model_dir("qwen3", "teacher")
    return ["--model_name_or_path", str(student), "--teacher_model_name_or_path", str(teacher)]


@pytest.fixture
def arguments(models, word_problems, tmp_path):
    return [*models, "--dataset_name", str(word_problems), "--output_dir", str(tmp_path / "run"), *TINY]


def state(directory: Path) -> dict:
    return json.loads((directory / "trainer_state.json").read_text())


@pytest.mark.slow
def test_trains_on_word_problems_with_models_from_a_directory(arguments, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tipdistill.cli", "train", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    assert f"The distilled student is in {run}." in done.stdout
    before, after = load_file(Path(arguments[1]) / "model.safetensors"), load_file(run / "model.safetensors")
    assert any(not torch.equal(after[name], before[name]) for name in after)
    AutoModelForCausalLM.from_pretrained(run)
    AutoTokenizer.from_pretrained(run)
    for directory in (run / "checkpoint-2", run):
        losses = [entry["loss"] for entry in state(directory)["log_history"] if "loss" in entry]
        assert len(losses) == 2


def test_dry_run_checks_everything_and_touches_nothing(arguments, tmp_path, capsys, monkeypatch):
    def weights(*args, **kwargs):
        raise AssertionError("a dry run loaded weights")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", weights)
    monkeypatch.chdir(tmp_path)
    flags = ["--max_steps", "-1", "--num_train_epochs", "2", "--num_generations", "4", "--retention", "0.25"]
    assert main(["train", *arguments, *flags, "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert "96, plain, the longest has" in shown
    # 8 rollouts a step are 2 prompts × 4, so 96 prompts are 48 steps an epoch
    assert "2 prompts × 4 rollouts × up to 6 tokens = 48 completion tokens" in shown
    assert "# steps     96\n" in shown
    assert "the same for both: 396 tokens; the divergence runs over 400 rows" in shown
    # what it prints is a configuration, comments and all
    (tmp_path / "shown.yaml").write_text(shown)
    assert parse(["--config", str(tmp_path / "shown.yaml")]).values == parse([*arguments, *flags]).values


def test_dry_run_counts_the_processes_that_would_start(arguments, capsys):
    assert main(["train", *arguments, "--dry_run", "--num_processes", "4"]) == 0
    assert "32 prompts × 1 rollouts" in capsys.readouterr().out
    assert main(["train", *arguments, "--dry_run", "--accelerate_config", "multi_gpu"]) == 0
    assert "64 prompts × 1 rollouts" in capsys.readouterr().out  # TRL's preset starts 8


def test_heads_of_different_sizes_and_dropped_prompts_are_told(tiny_model_dir, word_problems, tmp_path, capsys):
    student, teacher = tiny_model_dir("qwen2", "student", vocab_rows=416), tiny_model_dir("qwen2", "teacher")
    problems = [json.loads(line)["prompt"] for line in word_problems.read_text().splitlines()]
    lengths = sorted(len(ids) for ids in AutoTokenizer.from_pretrained(student)(problems)["input_ids"])
    limit = lengths[48]
    kept = sum(length <= limit for length in lengths)
    assert 0 < kept < 96
    flags = ["--model_name_or_path", str(student), "--teacher_model_name_or_path", str(teacher)]
    flags += ["--dataset_name", str(word_problems), "--max_prompt_length", str(limit), *TINY]
    assert main(["train", *flags, "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert "416 rows" in shown
    assert "the divergence runs over 400 rows" in shown
    assert f"{kept}, plain, the longest has {limit} tokens ({96 - kept} longer than {limit} dropped)" in shown


def test_a_dry_run_says_what_works_in_turn(arguments, capsys):
    assert main(["train", *arguments, "--dry_run", "--rollout_ahead", "1"]) == 0
    assert "# rollouts  rollout_ahead = 1: the engine that writes the rollouts works in turn" in capsys.readouterr().out
    assert main(["train", *arguments, "--dry_run"]) == 0
    assert "in turn" not in capsys.readouterr().out


def test_the_length_has_the_name_of_the_other_commands(arguments, capsys):
    assert main(["train", *arguments, "--dry_run", "--max_new_tokens", "7"]) == 0
    assert "up to 7 tokens" in capsys.readouterr().out


def test_a_dry_run_names_end_tokens_that_differ(arguments, tmp_path, capsys):
    assert main(["train", *arguments, "--dry_run"]) == 0
    assert "end tokens" not in capsys.readouterr().out
    student = tmp_path / "student"
    shutil.copytree(arguments[1], student)
    (student / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    assert main(["train", "--model_name_or_path", str(student), *arguments[2:], "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert "# warning   the end tokens differ: the student ends with <|endoftext|>, <|end|>, the teacher" in shown


def test_dry_run_refuses_prompts_that_leave_too_few_positions(arguments, tmp_path, capsys):
    assert main(["train", *arguments, "--dry_run", "--max_completion_length", "600"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "--max_completion_length 600 takes all of the 512 positions of the student" in error
    scaled = json.dumps({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}})
    both = ["--model_init_kwargs", scaled, "--teacher_model_init_kwargs", scaled]
    assert main(["train", *arguments, *both, "--dry_run", "--max_completion_length", "600"]) == 0


def test_dry_run_refuses_an_evaluation_that_leaves_too_few_positions(arguments, models, tmp_path, capsys):
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"problem": "1 " * 600, "answer": "1"}))
    assert main(["train", *arguments, "--dry_run", "--eval_tasks", str(long), "--eval_steps", "1"]) == 2
    assert "the longest prompt of the task 'long' has" in capsys.readouterr().err.splitlines()[-1]
    parts = {"train": Dataset.from_dict({"prompt": ["a"] * 8}), "test": Dataset.from_dict({"prompt": ["1 " * 600]})}
    DatasetDict(parts).save_to_disk(tmp_path / "d")
    given = [*models, "--dataset_name", str(tmp_path / "d"), "--output_dir", str(tmp_path / "run"), *TINY]
    assert main(["train", *given, "--dry_run", "--eval_strategy", "steps", "--eval_steps", "1"]) == 2
    assert "the longest prompt of the evaluation set has" in capsys.readouterr().err.splitlines()[-1]


def test_what_cannot_be_read_is_refused_before_weights(arguments, tiny_model_dir, tmp_path, capsys):
    def refused(*flags):
        assert main(["train", *arguments, *flags, "--dry_run"]) == 2
        error = capsys.readouterr().err
        assert error.splitlines()[-1].startswith("tipdistill train: ")
        return error

    assert "the teacher could not be read (--teacher_model_name_or_path" in refused(
        "--teacher_model_name_or_path", str(tmp_path / "none")
    )
    assert "there is no dataset at" in refused("--dataset_name", str(tmp_path / "none.jsonl"))
    assert "no column 'promt'" in refused("--prompt_column", "promt")
    assert "96 prompts do not fill one step of 128" in refused("--per_device_train_batch_size", "128")

    tokenizer = AutoTokenizer.from_pretrained(arguments[1])
    other = tmp_path / "other"
    AutoModelForCausalLM.from_pretrained(arguments[3]).save_pretrained(other)
    tokenizer.save_pretrained(other)
    saved = json.loads((other / "tokenizer.json").read_text())
    saved["model"]["vocab"] |= {"!": saved["model"]["vocab"]['"'], '"': saved["model"]["vocab"]["!"]}
    (other / "tokenizer.json").write_text(json.dumps(saved))
    said = refused("--teacher_model_name_or_path", str(other))
    assert "first at token id 3: the student reads '!' and the teacher reads '\"'" in said

    plain = tmp_path / "plain"
    AutoModelForCausalLM.from_pretrained(arguments[1]).save_pretrained(plain)
    tokenizer = AutoTokenizer.from_pretrained(arguments[1])
    tokenizer.chat_template = None
    tokenizer.save_pretrained(plain)
    assert "has no chat template" in refused("--apply_chat", "--model_name_or_path", str(plain))


def test_the_resolved_configuration_is_written_and_reloads(arguments, tmp_path):
    assert main(["train", *arguments, "--save_strategy", "no"]) == 0
    written = tmp_path / "run" / "config.yaml"
    assert written.read_text().startswith("# tipdistill ")
    assert "trl 1." in written.read_text().splitlines()[0]
    settings = yaml.safe_load(written.read_text())
    assert settings["max_completion_length"] == 6
    assert settings["retention"] == 0.5  # defaults too
    assert parse(["--config", str(written)]).values == parse([*arguments, "--save_strategy", "no"]).values
    assert [path.name for path in (tmp_path / "run").iterdir() if path.name.endswith(".partial")] == []


def test_a_run_is_never_started_over_unasked(arguments, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", *arguments]) == 0
    before = (run / "model.safetensors").read_bytes()
    for flags in ([], ["--save_strategy", "no"]):
        assert main(["train", *arguments, *flags]) == 2
        error = capsys.readouterr().err
        assert "--resume_from_checkpoint true" in error
        assert "--overwrite_output_dir true" in error
    assert (run / "model.safetensors").read_bytes() == before

    assert main(["train", *arguments, "--max_steps", "3", "--resume_from_checkpoint", "true"]) == 0
    history = state(run / "checkpoint-3")["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3]
    assert state(run / "checkpoint-2")["log_history"] == history[:2]

    both = ["--resume_from_checkpoint", "true", "--overwrite_output_dir", "true"]
    assert main(["train", *arguments, *both]) == 2
    assert "contradict each other" in capsys.readouterr().err

    assert main(["train", *arguments, "--max_steps", "1", "--overwrite_output_dir", "true"]) == 0
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-1"]
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert "overwrite_output_dir" not in settings  # a reload must not delete checkpoints


def test_what_cannot_be_gone_on_with_is_not_offered(arguments, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "model.safetensors").write_bytes(b"of something else")
    assert main(["train", *arguments]) == 2
    error = capsys.readouterr().err
    assert "already holds a run (model.safetensors): start over with --overwrite_output_dir true" in error
    assert "--resume_from_checkpoint" not in error
    # what is wrong with the flags is told first
    assert main(["train", *arguments, "--retention", "2"]) == 2
    assert "retention must be in (0, 1], got 2.0" in capsys.readouterr().err


def test_resuming_from_a_path_and_from_nothing(arguments, tmp_path, capsys):
    assert main(["train", *arguments, "--resume_from_checkpoint", "true"]) == 2
    assert "no complete checkpoint" in capsys.readouterr().err
    assert main(["train", *arguments, "--save_steps", "1"]) == 0
    assert main(["train", *arguments, "--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-7")]) == 2
    assert "Did you mean 'checkpoint-" in capsys.readouterr().err
    elsewhere = [
        "--output_dir",
        str(tmp_path / "other"),
        "--resume_from_checkpoint",
        str(tmp_path / "run/checkpoint-1"),
    ]
    assert main(["train", *arguments, *elsewhere]) == 0
    assert [entry["step"] for entry in state(tmp_path / "other/checkpoint-2")["log_history"] if "loss" in entry] == [
        1,
        2,
    ]


def test_what_fails_while_training_keeps_its_traceback(arguments, capsys, monkeypatch):
    def fail(self, *args, **kwargs):
        raise ValueError("step 1 went wrong")

    monkeypatch.setattr("tipdistill.trainer.TIPTrainer.training_step", fail)
    assert main(["train", *arguments]) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.endswith("tipdistill train: step 1 went wrong\n")


def test_conversational_prompts_evaluation_split_and_saved_dataset(models, word_problems, tmp_path, monkeypatch):
    evaluated = []
    evaluate = TIPTrainer.evaluate

    def watched(self, *args, **kwargs):
        evaluated.append(self.eval_dataset["prompt"][:])
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(TIPTrainer, "evaluate", watched)
    rows = [json.loads(line)["prompt"] for line in word_problems.read_text().splitlines()]
    chats = [[{"role": "user", "content": row}] for row in rows]
    saved = tmp_path / "data"
    DatasetDict(
        {"train": Dataset.from_dict({"problem": chats[:80]}), "held_out": Dataset.from_dict({"problem": chats[80:]})}
    ).save_to_disk(saved)
    flags = ["--dataset_name", str(saved), "--prompt_column", "problem", "--dataset_test_split", "held_out"]
    flags += ["--eval_strategy", "steps", "--eval_steps", "2", "--output_dir", str(tmp_path / "run"), *TINY]
    assert main(["train", *models, *flags]) == 0
    history = state(tmp_path / "run/checkpoint-2")["log_history"]
    assert any("eval_loss" in entry for entry in history)
    assert evaluated == [chats[80:]]


def test_a_mixture_of_datasets(models, word_problems, tmp_path):
    recipe = tmp_path / "r.yaml"
    entry = {"path": "json", "data_files": str(word_problems)}
    recipe.write_text(yaml.safe_dump({"datasets": [entry, entry], "output_dir": str(tmp_path / "run")}))
    assert main(["train", "--config", str(recipe), *models, *TINY]) == 0
    written = parse(["--config", str(tmp_path / "run/config.yaml")])
    assert [part.data_files for part in written.mixture.datasets] == [str(word_problems)] * 2


@pytest.mark.slow
def test_two_processes_started_through_accelerate(arguments, tmp_path):
    flags = ["--accelerate_config", "multi_gpu", "--num_processes", "2", "--per_device_train_batch_size", "4"]
    log = tmp_path / "log"
    assert forks.run(forks.command, ["train", *arguments, *flags], log=log) == 0, log.read_text()
    assert log.read_text().count("8 prompts × 1 rollouts") == 1  # 4 on each of two processes, told once
    assert state(tmp_path / "run/checkpoint-2")["global_step"] == 2
