"""Several teachers: each rollout is scored by the one that its row of the dataset names.

A step's tokens are still chosen together: a budget over the batch, a percentile and the loss's denominator do not know
who said what. Teachers of any kind mix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..integrations._trl import take_rollouts
from ..types import Head, TokenScores, TopTokens
from . import Answer, Comparison, Surroundings, Teacher, TeacherCallback
from .named import number_of


@dataclass(frozen=True)
class FromOne:
    """An answer, and the number of the teacher that gave it."""

    teacher: int
    answer: Answer

    def __len__(self) -> int:
        return len(self.answer)

    def map(self, function: Callable[[Tensor], Tensor]) -> FromOne:
        return FromOne(self.teacher, self.answer.map(function))


@dataclass(frozen=True)
class RoutedComparison:
    """Comparisons with several teachers, each of its own tokens.

    Attributes:
        places: int64, of each teacher: which of the N tokens are its own, ascending.
        parts: of each teacher.
    """

    places: Sequence[Tensor]
    parts: Sequence[Comparison]

    def take(self, kept: Tensor) -> RoutedComparison:
        number = kept.cumsum(0) - 1  # of each kept token among the kept ones
        return RoutedComparison(
            [number[place[kept[place]]] for place in self.places],
            [part.take(kept[place]) for place, part in zip(self.places, self.parts, strict=True)],
        )

    def scores(self, student: Head, fields: Sequence[str], temperature: float, token_ids: Tensor | None) -> TokenScores:
        given = [
            part.scores(_rows(student, place), fields, temperature, None if token_ids is None else token_ids[place])
            for place, part in zip(self.places, self.parts, strict=True)
        ]
        return self._merged(given, len(student.hidden))

    def likeliest(self, student: Head, k: int, temperature: float) -> tuple[TopTokens, TopTokens]:
        given = [
            part.likeliest(_rows(student, place), k, temperature)
            for place, part in zip(self.places, self.parts, strict=True)
        ]
        order = torch.cat(list(self.places)).argsort()
        of_student, of_teacher = (
            TopTokens(
                torch.cat([top.token_ids for top in tops])[order], torch.cat([top.probability for top in tops])[order]
            )
            for tops in zip(*given, strict=True)
        )
        return of_student, of_teacher

    def loss(
        self,
        student: Head,
        weight: Tensor | None,
        *,
        divergence: str,
        beta: float,
        temperature: float,
        denominator: Tensor | float | None,
        fields: Sequence[str] = (),
    ) -> tuple[Tensor, TokenScores]:
        if weight is None:
            weight = torch.ones(len(student.hidden), device=student.hidden.device)
        if denominator is None:  # of all tokens, not of each teacher's own
            denominator = weight.sum().clamp(min=1)
        losses, given = zip(
            *(
                part.loss(
                    _rows(student, place),
                    weight[place],
                    divergence=divergence,
                    beta=beta,
                    temperature=temperature,
                    denominator=denominator,
                    fields=fields,
                )
                for place, part in zip(self.places, self.parts, strict=True)
            ),
            strict=True,
        )
        return torch.stack(losses).sum(), self._merged(given, len(student.hidden))

    def _merged(self, given: Sequence[TokenScores], count: int) -> TokenScores:
        """The statistics that all teachers' answers give, of the N tokens in their order."""
        names = set.intersection(*({name for name, _ in scores.present()} for scores in given))
        merged: dict[str, Tensor] = {}
        for place, scores in zip(self.places, given, strict=True):
            for name, value in scores.present():
                if name in names:
                    merged.setdefault(name, value.new_zeros(count))[place] = value
        return TokenScores(**merged)


def _rows(student: Head, place: Tensor) -> Head:
    return replace(student, hidden=student.hidden[place])


class RoutedTeacher:
    """Several teachers as one; see `Teacher` for its members.

    Args:
        teachers: by name.
        column: of the dataset's rows, that names one of them.
        trainer: what they teach in.
    """

    model = None

    def __init__(self, teachers: dict[str, Teacher], column: str, trainer: Surroundings) -> None:
        self.names: Sequence[str] = list(teachers)
        self.teachers = list(teachers.values())
        self.name = ", ".join(f"{name}: {teacher.name}" for name, teacher in teachers.items())
        rows = [teacher.vocabulary for teacher in self.teachers if teacher.vocabulary is not None]
        self.vocabulary = min(rows, default=None)
        known = [teacher.top_k for teacher in self.teachers if teacher.top_k is not None]
        self.top_k = min(known, default=None)
        self.answers_in_loss = all(teacher.answers_in_loss for teacher in self.teachers)
        self.callbacks: Sequence[TeacherCallback] = [callback for one in self.teachers for callback in one.callbacks]
        self._column, self._trainer = column, trainer

    def replace(self, name: str, teacher: Any) -> None:
        """Let another answer for the teacher of a name, such as one around it."""
        self.teachers[self.names.index(name)] = teacher

    def numbers(self, examples: Sequence[dict[str, Any]]) -> list[int]:
        """Which teacher each row is for.

        Raises:
            ValueError: a row that names none; see `number_of`.
        """
        return [
            number_of(row, list(self.names), self._column, f"row {index} of the batch (counting from 0)")
            for index, row in enumerate(examples)
        ]

    def answer(
        self, batch: dict[str, Any], asked: Tensor, pieces: Sequence[Tensor] | None = None
    ) -> list[FromOne | None]:
        numbers = self.numbers(batch["examples"])
        answers: list[FromOne | None] = [None] * len(asked)
        for number, teacher in enumerate(self.teachers):
            rows = [row for row, own in enumerate(numbers) if own == number]
            for row, answer in zip(rows, self._ask(teacher, rows, batch, asked, pieces), strict=True):
                answers[row] = None if answer is None else FromOne(number, answer)
        return answers

    def _ask(
        self,
        teacher: Teacher,
        rows: list[int],
        batch: dict[str, Any],
        asked: Tensor,
        pieces: Sequence[Tensor] | None,
    ) -> list[Any]:
        """What one teacher says of its own rows.

        Every process asks every teacher equally often, since sharded teachers answer together: one that has no row for
        a teacher asks it about nothing, with a rollout that stands in.
        """
        accelerator, device = self._trainer.accelerator, asked.device
        alone = accelerator.num_processes == 1
        if not rows and alone:
            return []
        taken = torch.tensor(rows or [0], device=device)
        part = take_rollouts(batch, taken)
        asked_here = asked[taken] if rows else torch.zeros_like(asked[taken])
        own_pieces = None if pieces is None else self._trainer.scoring_pieces(part)
        return list(teacher.answer(part, asked_here, own_pieces))[: len(rows)]

    @contextmanager
    def compare(self, answers: Sequence[FromOne | None]) -> Iterator[RoutedComparison]:
        given = [answer for answer in answers if answer is not None]
        device = self._trainer.accelerator.device
        of_token = torch.tensor(
            [answer.teacher for answer in given for _ in range(len(answer))], dtype=torch.int64, device=device
        )
        with ExitStack() as stack:
            # every process enters all of them, in one order: lm_heads are gathered together
            parts = [
                stack.enter_context(teacher.compare([answer.answer for answer in given if answer.teacher == number]))
                for number, teacher in enumerate(self.teachers)
            ]
            yield RoutedComparison([(of_token == number).nonzero()[:, 0] for number in range(len(parts))], parts)

    def metrics(self) -> dict[str, float]:
        figures: dict[str, float] = {}
        for name, teacher in zip(self.names, self.teachers, strict=True):
            for figure, value in teacher.metrics().items():
                figures[f"teacher/{name}/{figure.removeprefix('teacher/')}"] = value
        return figures
