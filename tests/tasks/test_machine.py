"""The register machine: what a trace says, what counts as right, and that a mistake takes the rest elsewhere."""

import random

import pytest

from tipdistill.tasks import load_task
from tipdistill.tasks.machine import LINES, MODULUS, OPERATIONS, STEPS, TASK, execute, solve


def reference(program, registers):
    """The machine once more, as a table of what each operation does to (x, y, z)."""
    does = {
        "a": lambda x, y, z: (x + y, y, z),
        "b": lambda x, y, z: (x, y + z, z),
        "c": lambda x, y, z: (x, y, z + x),
        "d": lambda x, y, z: (y, x, z),
        "s": lambda x, y, z: (x, y, z + 1),
    }
    assert set(does) == set(OPERATIONS)
    line, trace = 0, []
    for _ in range(STEPS):
        registers = tuple(value % MODULUS for value in does[program[line]](*registers))
        trace.append((line, program[line], registers))
        line = (line + (2 if registers[0] % 2 else 1)) % LINES
    return trace


@pytest.mark.parametrize("problem", [*TASK.problems(50, 0), ("aaaaa", (1, 0, 0)), ("sssss", (5, 5, 5))])
def test_the_machine_does_what_its_operations_say(problem):
    assert execute(*problem) == reference(*problem)


def test_a_trace_is_long_and_its_answer_is_its_last_registers():
    for problem in TASK.problems(50, 1):
        text = TASK.solve(problem, random.Random(0), None)
        assert text == solve(*problem)
        assert len(text) == TASK.completion_tokens >= 200
        assert text.endswith(f"{text[5 * STEPS - 3 : 5 * STEPS]}>{text[5 * STEPS - 3 : 5 * STEPS]}$")
        assert TASK.is_correct(TASK.prompt_of(problem), text)


def test_an_early_mistake_takes_the_run_to_another_end():
    """From a wrong x after the first step the machine ends elsewhere more often than not."""
    elsewhere = 0
    for program, (x, y, z) in TASK.problems(200, 2):
        elsewhere += execute(program, (x, y, z))[-1][2] != execute(program, ((x + 1) % MODULUS, y, z))[-1][2]
    assert elsewhere > 100


@pytest.mark.parametrize("prompt", ["", "abcd:123=", "abcds:126=", "abcde:123=", "abcds:12=", "abcds:123=\n"])
def test_a_prompt_of_another_task_is_refused(prompt):
    with pytest.raises(ValueError, match="a prompt of this task"):
        TASK.is_correct(prompt, ">000$")


def test_it_is_a_task_to_evaluate():
    task = load_task("machine")
    assert len(task.problems) == 256
    assert task.max_new_tokens == TASK.completion_tokens
    problem = task.problems[0]
    text = solve(*TASK.parse(problem.text))
    assert task.check(text, problem.answer)
    assert not task.check(text[:-1], problem.answer)
