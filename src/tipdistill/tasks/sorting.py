"""Merge sort of eight letters, written out: a short task whose errors are nobody's plan.

A prompt is `avsroutu=` and its completion `av,rs,ou,tu;arsv,otuu>aorstuuv$`: the pairs in order, the fours, `>`, the whole
and `$`, the end. One character is one token. Nothing is a free choice, and all solutions have the same length.

The student is taught from the same clean solutions as the teacher; it is smaller and is stopped early.
"""

from __future__ import annotations

import random
import re
import string
from typing import Any

from .written import Training, WrittenTask

LETTERS = string.ascii_lowercase
ITEMS = 8


def solve(letters: str) -> str:
    """The written solution.

    Args:
        letters: eight lower-case ones.

    Example:
        >>> solve("avsroutu")
        'av,rs,ou,tu;arsv,otuu>aorstuuv$'
    """
    pairs, fours, (whole,) = (
        ["".join(sorted(letters[first : first + size])) for first in range(0, ITEMS, size)] for size in (2, 4, ITEMS)
    )
    return f"{','.join(pairs)};{','.join(fours)}>{whole}$"


def _draw(draw: random.Random) -> tuple[str]:
    return ("".join(draw.choices(LETTERS, k=ITEMS)),)


def _parse(prompt: str) -> tuple[str]:
    if re.fullmatch(rf"[a-z]{{{ITEMS}}}=", prompt) is None:
        raise ValueError(f"a prompt of this task looks like 'avsroutu=', got {prompt!r}.")
    return (prompt[:-1],)


def _solve(problem: tuple[str], draw: random.Random, corruption: Any) -> str:
    return solve(*problem)


TASK = WrittenTask(
    characters=LETTERS + "=,;>$",
    prompt_tokens=ITEMS + 1,
    completion_tokens=len(solve("a" * ITEMS)),
    number_of_problems=len(LETTERS) ** ITEMS,
    draw=_draw,
    prompt_of=lambda problem: f"{problem[0]}=",
    parse=_parse,
    answer_of=lambda problem: "".join(sorted(problem[0])),
    solve=_solve,
    teacher=Training(layers=2, width=96, steps=600, learning_rate=3e-3),
    student=Training(layers=2, width=48, steps=450, learning_rate=2e-3, seed=1),
    source=__file__,
)
