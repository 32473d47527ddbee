"""A teacher that ends with another token than its student, and is read as if it ended with the student's.

The two tokens change places in all that the teacher says: P_T'(a) = P_T(b) and P_T'(b) = P_T(a), a the student's end
and b the teacher's. The student is trained to end where the teacher does, with the token that it ends with already. It
need not learn another one, which reverse KL could not teach a student that never writes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..types import Head, TeacherLogprobs


class EndsAlike:
    """Another teacher with its end in the place of the student's; see `Teacher` for its members.

    Args:
        teacher: the other.
        student_end, teacher_end: token ids, both rows of both lm_heads.
    """

    def __init__(self, teacher: Any, student_end: int, teacher_end: int) -> None:
        self._teacher, self._pair = teacher, (student_end, teacher_end)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._teacher, name)

    def answer(self, batch: dict[str, Any], asked: Tensor, pieces: Sequence[Tensor] | None = None) -> list[Any]:
        read = {**batch, "completion_ids": exchanged(batch["completion_ids"], *self._pair)}
        return [
            renamed(answer, *self._pair) if isinstance(answer, TeacherLogprobs) else answer
            for answer in self._teacher.answer(read, asked, pieces)
        ]

    @contextmanager
    def compare(self, answers: Sequence[Any]) -> Iterator[Any]:
        with self._teacher.compare(answers) as comparison:
            if hasattr(comparison, "head"):
                with exchanged_rows(comparison.head, *self._pair):
                    yield comparison
            else:
                yield comparison


def exchanged(ids: Tensor, one: int, other: int) -> Tensor:
    """Token ids with two of them exchanged.

    Example:
        >>> exchanged(torch.tensor([1, 2, 3, 2]), 2, 3)
        tensor([1, 3, 2, 3])
    """
    return torch.where(ids == one, other, torch.where(ids == other, one, ids))


def renamed(answer: TeacherLogprobs, one: int, other: int) -> TeacherLogprobs:
    """Log-probabilities with two tokens exchanged.

    Example:
        >>> said = TeacherLogprobs(torch.tensor([[-1.0, -2.0]]), torch.tensor([[4, 2]]), torch.tensor([-1.0]))
        >>> renamed(said, 2, 3).token_ids
        tensor([[4, 3]])
    """
    if answer.token_ids is not None:
        return TeacherLogprobs(answer.logprob, exchanged(answer.token_ids, one, other), answer.sampled)
    logprob = answer.logprob.clone()
    logprob[:, [one, other]] = answer.logprob[:, [other, one]]
    return TeacherLogprobs(logprob, None, answer.sampled)


@contextmanager
def exchanged_rows(head: Head, one: int, other: int) -> Iterator[None]:
    """Two rows of an lm_head exchanged meanwhile, in place: a copy of all rows would cost as much as the lm_head.

    Nothing runs the model's own forward meanwhile, which may share the weight with its embedding.

    Args:
        head: whose gradient is not needed.
        one, other: rows.
    """
    parts = [part for part in (head.weight, head.bias) if part is not None]

    def exchange() -> None:
        with torch.no_grad():
            for part in parts:
                part[[one, other]] = part[[other, one]]

    exchange()
    try:
        yield
    finally:
        exchange()
