"""The completion scripts: a real bash completes commands, flags and choices with them."""

import subprocess

import pytest

from tipdistill.cli import COMMANDS, main
from tipdistill.cli.completion import SHELLS
from tipdistill.recipes import recipe_names
from tipdistill.recipes.fields import read_fields


def script(shell: str, capsys) -> str:
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


def completed(text: str, line: list[str], directory) -> set[str]:
    """What bash offers for the last word of a command line."""
    words = " ".join(f'"{word}"' for word in line)
    asked = (
        f"COMP_WORDS=({words}); COMP_CWORD={len(line) - 1}; COMPREPLY=()\n"
        'eval "$(complete -p tipdistill | sed -E "s/.* -F ([^ ]+) .*/\\1/")" tipdistill\n'
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    answer = subprocess.run(
        ["bash", "--norc", "-c", f"{text}\n{asked}"], capture_output=True, text=True, cwd=directory, timeout=60
    )
    assert answer.returncode == 0, answer.stderr
    return set(answer.stdout.split())


def test_bash_completes_commands_flags_choices_and_files(capsys, tmp_path):
    text = script("bash", capsys)
    (tmp_path / "models").mkdir()
    (tmp_path / "my.yaml").write_text("retention: 0.5\n", encoding="utf-8")
    assert completed(text, ["tipdistill", ""], tmp_path) >= set(COMMANDS)
    assert completed(text, ["tipdistill", "pr"], tmp_path) == {"probe", "prune"}
    assert {"--retention", "--retention_of"} & completed(text, ["tipdistill", "train", "--ret"], tmp_path) == {
        "--retention"
    }
    assert completed(text, ["tipdistill", "score", "--dtype", "b"], tmp_path) == {"bfloat16"}
    assert completed(text, ["tipdistill", "train", "--model", "mo"], tmp_path) == {"models"}
    assert completed(text, ["tipdistill", "train", "--config", "m"], tmp_path) == {"models", "my.yaml"}
    assert completed(text, ["tipdistill", "recipes", "show", "lap"], tmp_path) == {"laptop"}


@pytest.mark.parametrize("shell", SHELLS)
def test_every_command_and_every_field_is_in_each_script(shell, capsys):
    text = script(shell, capsys)
    missing = [name for name in (*COMMANDS, *recipe_names()) if name not in text]
    missing += [name for name in read_fields() if name != "env" and f"--{name}" not in text]
    assert missing == []


def test_another_shell_is_refused(capsys):
    assert main(["completion", "fish"]) == 2
    assert "bash" in capsys.readouterr().err
