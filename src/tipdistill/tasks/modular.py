"""Sums, differences and products of nine digits modulo 10, step by step: a short task with no planted error.

A prompt is `7+5*3-8*2+9-4*6+1=` and its completion works from the left, without precedence, each operation with its
digit and the value then: `+5=2*3=6-8=8*2=6+9=5-4=1*6=6+1=7>7$`. One character is one token, nothing is a free choice,
and all solutions have the same length. A wrong value is carried on: what follows is right for what was written.

The student is taught from the same clean solutions as the teacher; it is smaller, and is broken off in the middle of
learning, its learning rate still high.
"""

from __future__ import annotations

import random
import re
from typing import Any

from .written import Training, WrittenTask

OPERATIONS = "+-*"
STEPS = 8
MODULUS = 10


def values(digits: str, operations: str) -> list[int]:
    """The value after each operation, from the left, modulo 10.

    Args:
        digits: nine.
        operations: eight of + - *.

    Example:
        >>> values("753829461", "+*-*+-*+")
        [2, 6, 8, 6, 5, 1, 6, 7]
    """
    value, after_each = int(digits[0]), []
    for operation, digit in zip(operations, map(int, digits[1:]), strict=True):
        match operation:
            case "+":
                value += digit
            case "-":
                value -= digit
            case "*":
                value *= digit
        value %= MODULUS
        after_each.append(value)
    return after_each


def solve(digits: str, operations: str) -> str:
    """The written solution.

    Example:
        >>> solve("753829461", "+*-*+-*+")
        '+5=2*3=6-8=8*2=6+9=5-4=1*6=6+1=7>7$'
    """
    after_each = values(digits, operations)
    steps = "".join(
        f"{sign}{digit}={value}" for sign, digit, value in zip(operations, digits[1:], after_each, strict=True)
    )
    return f"{steps}>{after_each[-1]}$"


def _draw(draw: random.Random) -> tuple[str, str]:
    return "".join(draw.choices("0123456789", k=STEPS + 1)), "".join(draw.choices(OPERATIONS, k=STEPS))


def _prompt_of(problem: tuple[str, str]) -> str:
    digits, operations = problem
    return digits[0] + "".join(map("".join, zip(operations, digits[1:], strict=True))) + "="


def _parse(prompt: str) -> tuple[str, str]:
    if re.fullmatch(rf"[0-9]([-+*][0-9]){{{STEPS}}}=", prompt) is None:
        raise ValueError(f"a prompt of this task looks like '7+5*3-8*2+9-4*6+1=', got {prompt!r}.")
    return prompt[:-1:2], prompt[1:-1:2]


def _solve(problem: tuple[str, str], draw: random.Random, corruption: Any) -> str:
    return solve(*problem)


TASK = WrittenTask(
    characters="0123456789" + OPERATIONS + "=>$",
    prompt_tokens=2 * STEPS + 2,
    completion_tokens=4 * STEPS + 3,
    number_of_problems=10 ** (STEPS + 1) * len(OPERATIONS) ** STEPS,
    draw=_draw,
    prompt_of=_prompt_of,
    parse=_parse,
    answer_of=lambda problem: str(values(*problem)[-1]),
    solve=_solve,
    teacher=Training(layers=2, width=96, steps=1000, learning_rate=3e-3),
    student=Training(layers=2, width=48, steps=1800, learning_rate=2e-3, seed=1, stop=300),
    source=__file__,
)
