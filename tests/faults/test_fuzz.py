"""Some thousands of odd inputs at every door, and what the harness itself must notice."""

import random

import pytest
from faults import fuzz

INPUTS = 1500


@pytest.mark.parametrize("name", fuzz.DOORS)
def test_only_value_errors_come_out_and_no_nan_without_a_word(name):
    share = dict(fuzz.doors(None))[name]
    counts, failed = fuzz.run(name, first=0, inputs=max(10, round(INPUTS * share)))
    assert failed == {}
    assert counts["refused"]
    assert counts["accepted"]


@pytest.mark.parametrize("error", [RuntimeError("x"), fuzz.Silence("nan"), KeyError("a"), RecursionError(), OSError(5)])
def test_whatever_else_comes_out_fails_and_says_which_input_it_was(monkeypatch, capsys, error):
    def door(dice, folder):
        if dice.random() < 0.5:
            raise error

    monkeypatch.setitem(fuzz.DOORS, "rules", (door, 1.0))
    assert fuzz.main(["--only", "rules", "--inputs", "20"]) == 1
    shown = capsys.readouterr().out
    number = int(shown.partition("--first ")[2].split()[0])
    assert fuzz.main(["--only", "rules", "--first", str(number), "--inputs", "1"]) == 1  # the same input again
    assert type(error).__name__ in shown


def test_an_input_is_a_function_of_its_number():
    raw = b"seed: 1\nretention: 0.5\n"
    assert [fuzz.damaged(raw, random.Random(3)) for _ in range(2)] == [fuzz.damaged(raw, random.Random(3))] * 2
