"""What is printed: no escape of a terminal, no markup, and no ± without a figure."""

import math

import pytest
from rich.progress import Progress, TextColumn
from rich.table import Table

from tipdistill import cli
from tipdistill.cli import eval as of_eval
from tipdistill.integrations import _trl
from tipdistill.terminal import PlainConsole, say
from tipdistill.text import printable, with_error

NASTY = "a[red]b[/] [/nothing] :smile: \x1b[31mc\x1b]0;owned\x07 \x9b1m \u202ed \r\x00 [link=http://x]e"


def test_every_character_that_a_terminal_obeys_is_escaped():
    every = "".join(map(chr, range(0x3000))) + "\ud800\udfff\U000e0001"
    shown = printable(every)
    left = [character for character in shown if not character.isprintable() and not character.isspace()]
    assert not {"\x1b", "\x07", "\x9b", "\r", "\x00", "\x7f", "\u202e", "\u2066", "\ud800"} & set(shown)
    assert all(ord(character) > 0x9F for character in left)
    assert printable("Grüße, 東京 🙂\n\tx") == "Grüße, 東京 🙂\n\tx"


def test_tables_lines_and_bars_show_names_as_they_are(capsys):
    console = PlainConsole(width=200)
    console.print(NASTY, soft_wrap=True)
    table = Table(NASTY, title=NASTY)
    table.add_row(NASTY)
    console.print(table)
    with Progress(TextColumn("{task.description}", markup=False), console=console) as progress:
        progress.add_task(printable(NASTY), total=1)
    say(NASTY)
    shown = capsys.readouterr().out
    assert shown.count("a[red]b[/] [/nothing] :smile: \\x1b[31mc\\x1b]0;owned\\x07") >= 5
    assert not {"\x1b", "\x07", "\x9b", "\u202e", "\x00"} & set(shown)


@pytest.mark.parametrize(
    "argv",
    [
        ["report", f"no/{NASTY[:20]}\x1b[31m"],
        ["train", "--config", "\x1b[31m.yaml"],
        ["recipes", "show", "\u202eabc"],
        ["\x1b]0;x\x07"],
        ["sweep", "[/]\x1b.yaml"],
        ["eval", "--model", "m", "--tasks", "\x1b[31m.jsonl", "--output_dir", "d"],
    ],
    ids=["report", "train", "recipes", "command", "sweep", "eval"],
)
def test_an_error_that_names_a_file_is_one_printable_line(argv, capsys):
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.rstrip("\n").isprintable()


def test_completions_that_trl_prints_are_escaped(capsys):
    chat = [{"role": "user", "content": "q\x1b[31m"}]
    _trl.distillation_trainer.print_prompt_completions_sample([chat], ["c\x1b]0;owned\x07"], {}, None, 1, None)
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "\\x1b]0;owned" in shown


def test_one_sample_of_one_problem_has_no_deviation(capsys):
    numbers = {"problems": 1, "mean_at_k": 1.0, "standard_error": math.nan, "deviation_over_samples": math.nan}
    numbers |= {"pass_at_k": {"1": 1.0}, "maj_at_k": 1.0, "mean_tokens": 7, "truncated": 0.0, "undecided": 0}
    shown = of_eval.table({"num_samples": 1, "tasks": {"a\nc": numbers}})
    assert "nan" not in shown
    assert shown.splitlines()[-1] == "| a c | 1 | 1.000 | – | 1.000 | 1.000 | 7 | 0.0 % |"
    for error in (math.nan, math.inf, None):
        assert with_error(0.25, error) == "0.250"
