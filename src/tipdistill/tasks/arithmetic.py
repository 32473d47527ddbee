"""Four-digit addition with the carries written out: a task small enough for one CPU core, with planted errors.

A prompt is `3039+6246=` and its completion `9+6+0=15;3+4+1=08,0+2+0=02;3+6+0=09:>09285$`: for each column, from the
units up, digit + digit + carry = sum, then a separator, then `>`, the five-digit answer and `$`, the end. The separator
is one of `; , :` with probability .5, .3, .2: a free choice, uncertain but agreed (Q2). One character is one token, and
all completions have the same length.

The student is taught from *corrupted* solutions (see `Corruption`), so that its errors are known in advance: what is
shown with it shows a mechanism and replicates nothing.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import lru_cache

from .written import Training, WrittenTask

CHARACTERS = "0123456789+=;,:>$"
SEPARATORS, SEPARATOR_SHARES = ";,:", (0.5, 0.3, 0.2)
DIGITS = 4
PROMPT_TOKENS = 2 * DIGITS + 2
COMPLETION_TOKENS = 9 * DIGITS + DIGITS + 3  # nine characters a column, then `>`, the sum and `$`


@dataclass(frozen=True)
class Corruption:
    """What is wrong in the data that the student is taught from.

    Args:
        drop_first_carry: probability that the carry out of the units is written as 0 (1.0: confidently wrong, Q3).
        drop_second_carry: the same for the tens (0.5: uncertain and wrong, Q1).
        wrong_pairs: how many of the 100 ordered digit pairs have a sum that is one too high (confidently wrong, Q3).
        seed: which pairs.

    Raises:
        ValueError: a probability outside [0, 1], or more pairs than there are.

    Example:
        >>> len(Corruption().pairs()), len(CLEAN.pairs())
        (10, 0)
    """

    drop_first_carry: float = 1.0
    drop_second_carry: float = 0.5
    wrong_pairs: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("drop_first_carry", "drop_second_carry"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a probability, in [0, 1], got {getattr(self, name)}.")
        if not 0 <= self.wrong_pairs <= 100:
            raise ValueError(f"wrong_pairs must be in 0..100, there are 100 digit pairs, got {self.wrong_pairs}.")

    def pairs(self) -> frozenset[tuple[int, int]]:
        """The digit pairs whose sum is written one too high."""
        return _wrong_pairs(self.wrong_pairs, self.seed)


@lru_cache
def _wrong_pairs(count: int, seed: int) -> frozenset[tuple[int, int]]:
    every = [(a, b) for a in range(10) for b in range(10)]
    return frozenset(random.Random(seed).sample(every, count))


CLEAN = Corruption(0.0, 0.0, 0)


def prompt_of(a: int, b: int) -> str:
    """The prompt that asks for a + b.

    Args:
        a, b: the summands, in [0, 10⁴).

    Raises:
        ValueError: a summand has more than four digits, or a sign.

    Example:
        >>> prompt_of(3039, 6246)
        '3039+6246='
    """
    if not (0 <= a < 10**DIGITS and 0 <= b < 10**DIGITS):
        raise ValueError(f"summands must be in [0, {10**DIGITS}), got {a} and {b}.")
    return f"{a:0{DIGITS}d}+{b:0{DIGITS}d}="


def solve(a: int, b: int, draw: random.Random, corruption: Corruption = CLEAN) -> str:
    """One written solution of a + b; every later step follows from what was written before, right or wrong.

    Args:
        a, b: the summands, in [0, 10⁴).
        draw: chooses the separators and the corruptions that are not certain.
        corruption: what goes wrong.

    Example:
        >>> solve(3039, 6246, random.Random(0))[-7:]
        '>09285$'
    """
    wrong = corruption.pairs()
    carry, steps, answer = 0, [], ""
    for column in range(DIGITS):
        left, right = a // 10**column % 10, b // 10**column % 10
        total = left + right + carry + ((left, right) in wrong)
        steps.append(f"{left}+{right}+{carry}={total:02d}{draw.choices(SEPARATORS, SEPARATOR_SHARES)[0]}")
        answer = str(total % 10) + answer
        carry = total // 10
        dropped = {0: corruption.drop_first_carry, 1: corruption.drop_second_carry}.get(column, 0.0)
        if carry and dropped and draw.random() < dropped:
            carry = 0
    return f"{''.join(steps)}>{carry}{answer}$"


def _parse(prompt: str) -> tuple[int, int]:
    summands = re.fullmatch(rf"([0-9]{{{DIGITS}}})\+([0-9]{{{DIGITS}}})=", prompt)
    if summands is None:
        raise ValueError(f"a prompt of this task looks like {prompt_of(3039, 6246)!r}, got {prompt!r}.")
    return int(summands[1]), int(summands[2])


TEACHER = Training(layers=3, width=96, steps=1000, learning_rate=3e-3)
STUDENT = Training(layers=2, width=64, steps=700, learning_rate=2e-3, corruption=Corruption(), seed=1)
TASK = WrittenTask(
    characters=CHARACTERS,
    prompt_tokens=PROMPT_TOKENS,
    completion_tokens=COMPLETION_TOKENS,
    number_of_problems=10 ** (2 * DIGITS),
    draw=lambda draw: (draw.randrange(10**DIGITS), draw.randrange(10**DIGITS)),
    prompt_of=lambda problem: prompt_of(*problem),
    parse=_parse,
    answer_of=lambda problem: f"{sum(problem):0{DIGITS + 1}d}",
    solve=lambda problem, draw, corruption: solve(problem[0], problem[1], draw, corruption or CLEAN),
    teacher=TEACHER,
    student=STUDENT,
    source=__file__,
)
build_tokenizer, model_config, is_correct = TASK.build_tokenizer, TASK.model_config, TASK.is_correct
problems, teach, taught = TASK.problems, TASK.teach, TASK.taught
sample, score, evaluate = TASK.sample, TASK.score, TASK.evaluate
