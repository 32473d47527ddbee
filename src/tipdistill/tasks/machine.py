"""A register machine traced step by step: a long task in which an early mistake takes every later step elsewhere.

A prompt is `abcds:354=`: a program of five operations and three registers x, y, z. Its completion traces 40 steps,
each with the program's line, the operation there and the registers after it, `0a254` and so on, then `>`, the
registers at the end and `$`: 205 characters, one token each. Operations, all modulo 6:

    a  x ← x + y        b  y ← y + z        c  z ← z + x        d  x and y change places        s  z ← z + 1

After each the machine goes to the next line, and one further where x is odd; the fifth line is followed by the first.
So a wrong digit in x takes the run to another line, and what follows is right only for the registers as they were
written: teacher and student then agree on a trace that ends in the wrong place.

The student is taught from the same clean traces as the teacher; it is smaller, and is broken off in the middle of
learning, its learning rate still high.
"""

from __future__ import annotations

import random
import re
import string
from typing import Any

from .written import Training, WrittenTask

OPERATIONS = "abcds"
LINES = 5
STEPS = 40
MODULUS = 6


def execute(program: str, registers: tuple[int, int, int]) -> list[tuple[int, str, tuple[int, int, int]]]:
    """Line, operation and registers after each of the 40 steps.

    Args:
        program: five operations.
        registers: x, y and z, below 6.

    Example:
        >>> execute("abcds", (3, 5, 4))[:2]
        [(0, 'a', (2, 5, 4)), (1, 'b', (2, 3, 4))]
    """
    (x, y, z), line, trace = registers, 0, []
    for _ in range(STEPS):
        operation = program[line]
        match operation:
            case "a":
                x = (x + y) % MODULUS
            case "b":
                y = (y + z) % MODULUS
            case "c":
                z = (z + x) % MODULUS
            case "d":
                x, y = y, x
            case "s":
                z = (z + 1) % MODULUS
        trace.append((line, operation, (x, y, z)))
        line = (line + 1 + x % 2) % LINES
    return trace


def solve(program: str, registers: tuple[int, int, int]) -> str:
    """The written trace, see `execute`.

    Example:
        >>> text = solve("abcds", (3, 5, 4))
        >>> text[:10], text[-5:], len(text)
        ('0a2541b234', '>510$', 205)
    """
    trace = execute(program, registers)
    lines = "".join(f"{line}{operation}{x}{y}{z}" for line, operation, (x, y, z) in trace)
    return f"{lines}>{_answer(program, registers)}$"


def _answer(program: str, registers: tuple[int, int, int]) -> str:
    return "".join(map(str, execute(program, registers)[-1][2]))


def _draw(draw: random.Random) -> tuple[str, tuple[int, ...]]:
    return "".join(draw.choices(OPERATIONS, k=LINES)), tuple(draw.randrange(MODULUS) for _ in range(3))


def _parse(prompt: str) -> tuple[str, tuple[int, ...]]:
    if re.fullmatch(rf"[{OPERATIONS}]{{{LINES}}}:[0-{MODULUS - 1}]{{3}}=", prompt) is None:
        raise ValueError(f"a prompt of this task looks like 'abcds:354=', got {prompt!r}.")
    return prompt[:LINES], tuple(map(int, prompt[LINES + 1 : -1]))


def _solve(problem: tuple[str, tuple[int, int, int]], draw: random.Random, corruption: Any) -> str:
    return solve(*problem)


TASK = WrittenTask(
    characters=string.digits[:MODULUS] + OPERATIONS + ":=>$",
    prompt_tokens=LINES + 5,
    completion_tokens=5 * STEPS + 5,
    number_of_problems=len(OPERATIONS) ** LINES * MODULUS**3,
    draw=_draw,
    prompt_of=lambda problem: f"{problem[0]}:{''.join(map(str, problem[1]))}=",
    parse=_parse,
    answer_of=lambda problem: _answer(*problem),
    solve=_solve,
    teacher=Training(layers=2, width=96, steps=1000, learning_rate=3e-3, batch=8),
    student=Training(layers=2, width=64, steps=2700, learning_rate=3e-3, batch=8, seed=1, stop=600),
    source=__file__,
)
