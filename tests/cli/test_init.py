"""A recipe for two models, and what is refused before it is written."""

import json

import pytest
import yaml

from tipdistill.cli import main
from tipdistill.cli.init import _quoted


@pytest.fixture
def flags(tiny_model_dir, word_problems, tmp_path):
    student, teacher = (str(tiny_model_dir("qwen3", role)) for role in ("student", "teacher"))
    return [
        *("init", "--model", student, "--teacher", teacher, "--dataset", str(word_problems)),
        *("--output", str(tmp_path / "recipes" / "my.yaml"), "--max_completion_length", "16"),
    ]


def test_the_recipe_passes_a_dry_run(flags, tmp_path, capsys):
    assert main(flags) == 0
    assert "Check it: tipdistill train --config" in capsys.readouterr().out
    path = tmp_path / "recipes" / "my.yaml"
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# yaml-language-server: $schema=")
    settings = yaml.safe_load(text)
    assert settings["model_name_or_path"] == flags[2]
    assert (settings["selection_rule"], settings["retention"]) == ("soft_or", 0.5)
    assert settings["max_completion_length"] == 16
    assert main(["train", "--config", str(path), "--dry_run"]) == 0
    assert "# steps" in capsys.readouterr().out


def test_lengths_fit_models_of_few_positions_and_the_column_is_named(flags, tmp_path, capsys):
    rows = "".join(json.dumps({"question": f"{number} + 2 ="}) + "\n" for number in range(16))
    (tmp_path / "questions.jsonl").write_text(rows)
    given = [*flags[:-2]]  # the length is left open
    given[given.index("--dataset") + 1] = str(tmp_path / "questions.jsonl")
    assert main([*given]) == 2
    assert "Name the column with prompt_column" in capsys.readouterr().err
    assert main([*given, "--prompt_column", "question"]) == 0
    path = tmp_path / "recipes" / "my.yaml"
    settings = yaml.safe_load(path.read_text())
    assert settings["prompt_column"] == "question"
    assert (settings["max_completion_length"], settings["max_prompt_length"]) == (256, 256)  # of 512 positions
    assert main(["train", "--config", str(path), "--dry_run"]) == 0


def test_a_file_that_is_there_is_kept(flags, tmp_path, capsys):
    path = tmp_path / "recipes" / "my.yaml"
    path.parent.mkdir()
    path.write_text("mine")
    assert main(flags) == 2
    assert "is there already" in capsys.readouterr().err
    assert path.read_text() == "mine"


def test_models_that_do_not_match_leave_no_recipe(flags, tmp_path, capsys):
    assert main([*flags[:4], str(tmp_path / "none"), *flags[5:]]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err
    assert not (tmp_path / "recipes" / "my.yaml").exists()


@pytest.mark.parametrize("text", ["runs/a", "a: b", "- a", "1", "true", "", "a # b", "[a", "ä b", "\x1b"])
def test_names_are_read_back_as_they_were(text):
    assert yaml.safe_load(f"key: {_quoted(text)}")["key"] == text
