"""Arithmetic modulo 10: what is written, and what counts as right."""

import random
import re

import pytest

from tipdistill.tasks import load_task
from tipdistill.tasks.modular import STEPS, TASK, solve


@pytest.mark.parametrize("problem", TASK.problems(50, 0))
def test_every_step_follows_from_the_value_before(problem):
    prompt, text = TASK.prompt_of(problem), TASK.solve(problem, random.Random(0), None)
    steps = re.findall(r"([-+*])(\d)=(\d)", text)
    assert len(steps) == STEPS
    assert prompt == prompt[0] + "".join(sign + digit for sign, digit, _ in steps) + "="
    value = int(prompt[0])
    for sign, digit, written in steps:
        value = {"+": value + int(digit), "-": value - int(digit), "*": value * int(digit)}[sign] % 10
        assert int(written) == value
    assert text.endswith(f"={value}>{value}$")
    assert TASK.is_correct(prompt, text)


@pytest.mark.parametrize("completion", ["", ">7", "7$", ">8$", ">7$$", ">>7$", ">07$"])
def test_everything_else_is_wrong(completion):
    assert TASK.is_correct("7+5*3-8*2+9-4*6+1=", ">7$")
    assert not TASK.is_correct("7+5*3-8*2+9-4*6+1=", completion)


@pytest.mark.parametrize("prompt", ["", "7+5", "7+5*3-8*2+9-4*6+1", "7/5*3-8*2+9-4*6+1=", "7+5*3-8*2+9-4*6+1=\n"])
def test_a_prompt_of_another_task_is_refused(prompt):
    with pytest.raises(ValueError, match="a prompt of this task"):
        TASK.is_correct(prompt, ">7$")


def test_it_is_a_task_to_evaluate():
    task = load_task("modular")
    assert len(task.problems) == 256
    problem = task.problems[0]
    assert task.check(solve(*TASK.parse(problem.text)), problem.answer)
