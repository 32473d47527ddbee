"""A teacher of rollouts, where there is no trainer: in `tipdistill score` and `tipdistill probe`.

    answers = teacher.answer(rollouts)                of all their tokens, one Answer per rollout
    score_with(student, teacher, rollouts, fields)    → Scored, for token records

It is a model in this process, or any `Teacher` that is elsewhere. The records of a training step score with
`score_comparison` too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..score.models import TOP_TOKENS, head_of, hidden_states, score_in_forwards
from ..score.top_k_teacher import unavailable
from ..select import rule_fields
from ..types import Head, Rollout, Scored
from ..vocabulary import Names
from . import Comparison, Teacher, choose_teacher
from .local import HeadComparison
from .routed import RoutedComparison


class RolloutTeacher(Protocol):
    """A teacher of rollouts, where no trainer is."""

    def answer(self, rollouts: Sequence[Rollout]) -> Sequence[Any]:
        """What it says of all tokens of these rollouts, an Answer each."""
        ...

    def compare(self, answers: Sequence[Any]) -> AbstractContextManager[Comparison]:
        """A Comparison of all tokens of these answers, one rollout after the other."""
        ...


class LoadedTeacher:
    """A model in this process, whose hidden states are computed whenever they are needed: they are not kept.

    Args:
        model: a transformers model, on the student's device.
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    def answer(self, rollouts: Sequence[Rollout]) -> Sequence[Rollout]:
        return rollouts

    @contextmanager
    def compare(self, answers: Sequence[Rollout]) -> Iterator[HeadComparison]:
        with torch.no_grad():
            head = head_of(self._model, hidden_states(self._model, answers))
        yield HeadComparison(head)


class AskedTeacher:
    """A teacher that is elsewhere, asked about whole rollouts.

    Args:
        teacher: whose `name`, `vocabulary` and `top_k` it has.
        differing: reserved tokens that it reads as others, see `vocabulary.check_same_tokenizer`.
    """

    def __init__(self, teacher: Teacher, differing: dict[int, Names] | None = None) -> None:
        self.differing = differing or {}  # reserved tokens that it reads as others
        self.name, self.vocabulary, self.top_k = teacher.name, teacher.vocabulary, teacher.top_k
        self._teacher = teacher

    def answer(self, rollouts: Sequence[Rollout]) -> Sequence[Any]:
        batch, asked = batch_of(rollouts)
        return self._teacher.answer(batch, asked)

    def compare(self, answers: Sequence[Any]) -> AbstractContextManager[Comparison]:
        return self._teacher.compare(answers)


class PromptedRollouts:
    """A teacher that reads prompts of its own; see `prompted.PromptedTeacher`.

    Args:
        teacher: who answers.
        prompt_ids: by `Rollout.prompt_id`, the tokens of a prompt of its own; others are read after the student's.
    """

    def __init__(self, teacher: RolloutTeacher, prompt_ids: Mapping[int, Sequence[int]]) -> None:
        self.compare = teacher.compare
        self._teacher, self._prompt_ids = teacher, prompt_ids

    def answer(self, rollouts: Sequence[Rollout]) -> Sequence[Any]:
        own = self._prompt_ids
        return self._teacher.answer(
            [
                replace(rollout, prompt_ids=tuple(own[rollout.prompt_id])) if rollout.prompt_id in own else rollout
                for rollout in rollouts
            ]
        )


class RoutedRollouts:
    """Several teachers, each for the rollouts of its prompts; see `routed.RoutedTeacher`.

    Args:
        teachers: of them.
        numbers: by `Rollout.prompt_id`, which of them reads it.
    """

    def __init__(self, teachers: Sequence[RolloutTeacher], numbers: Sequence[int]) -> None:
        self._teachers, self._numbers = teachers, numbers

    def answer(self, rollouts: Sequence[Rollout]) -> Sequence[tuple[int, int, Any]]:
        """The number of each rollout's teacher, the rollout's tokens, and what that teacher says of them."""
        numbers = [self._numbers[rollout.prompt_id] for rollout in rollouts]
        answers: dict[int, Any] = {}
        for number, teacher in enumerate(self._teachers):
            rows = [row for row, own in enumerate(numbers) if own == number]
            if rows:
                answers |= dict(zip(rows, teacher.answer([rollouts[row] for row in rows]), strict=True))
        return [
            (number, len(rollout.student_ids), answers[row])
            for row, (number, rollout) in enumerate(zip(numbers, rollouts, strict=True))
        ]

    @contextmanager
    def compare(self, answers: Sequence[tuple[int, int, Any]]) -> Iterator[RoutedComparison]:
        of_token = torch.tensor([number for number, count, _ in answers for _ in range(count)], dtype=torch.int64)
        here = sorted({number for number, _, _ in answers})
        with ExitStack() as stack:
            parts = [
                stack.enter_context(self._teachers[own].compare([said for number, _, said in answers if number == own]))
                for own in here
            ]
            yield RoutedComparison([(of_token == number).nonzero()[:, 0] for number in here], parts)


class RememberedTeacher:
    """A teacher whose answers about some rollouts are kept, so that it is asked once.

    Args:
        teacher: which is asked.
        rollouts: all that are asked about.
    """

    def __init__(self, teacher: RolloutTeacher, rollouts: Sequence[Rollout]) -> None:
        self.compare = teacher.compare
        self._answers = dict(zip(rollouts, teacher.answer(rollouts), strict=True))

    def answer(self, rollouts: Sequence[Rollout]) -> Sequence[Any]:
        return [self._answers[rollout] for rollout in rollouts]


@dataclass(frozen=True)
class OneProcess:
    """What a teacher needs of an accelerator, where there is one process."""

    device: torch.device

    def gather(self, value: Tensor) -> Tensor:
        return value


def of_rollouts(teacher: Any) -> RolloutTeacher:
    """A transformers model as a teacher of rollouts; one that is such a teacher already as it is."""
    if isinstance(teacher, nn.Module):
        return LoadedTeacher(teacher)
    of_rollouts: RolloutTeacher = teacher
    return of_rollouts


def ask_teacher(settings: dict[str, Any], tokenizer: Any, device: torch.device) -> AskedTeacher:
    """The teacher that settings name by their `teacher_url`, once it answers and its tokenizer is the student's.

    Args:
        settings: `teacher_url` and the other fields of `TIPConfig` that are of a teacher elsewhere, and `temperature`.
        tokenizer: the student's.
        device: where it is compared with the student.

    Raises:
        TeacherUnavailableError, ValueError: see `choose_teacher`.
    """
    # which rules it suffices for is asked about by `check_rules`: there may be several
    args = SimpleNamespace(**settings, teachers=None, end_as_teacher=False, selection_rule="random")
    chosen = choose_teacher(None, args, tokenizer, None)
    return AskedTeacher(chosen(SimpleNamespace(accelerator=OneProcess(device))), chosen.differing)


def check_rules(teacher: AskedTeacher, rules: Sequence[Any], where: str) -> None:
    """Refuse rules that read what is not known of a teacher.

    Args:
        teacher: which answers.
        rules: as `select` takes them.
        where: of the server, for the message.

    Raises:
        ValueError: the rule, what it reads, and what to do.
    """
    if teacher.top_k is None:
        return
    for rule in rules:
        missing = unavailable(rule_fields(rule) or (), teacher.top_k)
        if missing:
            raise ValueError(
                f"the rule {rule} reads {', '.join(missing)}, which cannot be had, nor bounded, from the "
                f"{teacher.top_k} likeliest tokens that {where} gives: start the server with --max-logprobs -1, ask "
                "for more of them (teacher_top_k), or leave the rule out (docs/vllm.md lists them)."
            )


def bounds_of(teacher: Any) -> dict[str, int]:
    """What the settings of records say of a teacher whose divergences are lower bounds; nothing of another."""
    return {} if teacher.top_k is None else {"teacher_top_k": teacher.top_k}


def said_of_bounds(settings: dict[str, Any]) -> str:
    """A sentence on records whose divergences are lower bounds; empty where they are exact.

    Example:
        >>> said_of_bounds({"teacher_top_k": 20})
        'Divergences are lower bounds: of the teacher the 20 likeliest tokens are known (docs/vllm.md).'
    """
    k = settings.get("teacher_top_k")
    return (
        f"Divergences are lower bounds: of the teacher the {k} likeliest tokens are known (docs/vllm.md)." if k else ""
    )


def batch_of(rollouts: Sequence[Rollout]) -> tuple[dict[str, Tensor], Tensor]:
    """Rollouts as a training step has them: prompts padded on the left, completions on the right.

    Returns:
        prompt_ids, prompt_mask, completion_ids and completion_mask, int64 [B, ...] each; the tokens that the student
        wrote, bool [B, T].

    Example:
        >>> batch, tokens = batch_of([Rollout(0, "", (3,), (4, 5), True), Rollout(1, "", (6, 7), (8,), True)])
        >>> batch["prompt_ids"].tolist(), tokens.tolist()
        ([[0, 3], [6, 7]], [[True, True], [True, False]])
    """
    batch: dict[str, Tensor] = {}
    for part, side in (("prompt", "left"), ("completion", "right")):
        rows = [torch.tensor(getattr(rollout, f"{part}_ids"), dtype=torch.int64) for rollout in rollouts]
        for name, values in (("ids", rows), ("mask", list(map(torch.ones_like, rows)))):
            batch[f"{part}_{name}"] = nn.utils.rnn.pad_sequence(values, batch_first=True, padding_side=side)
    written = [torch.tensor(rollout.written, dtype=torch.bool) for rollout in rollouts]
    return batch, nn.utils.rnn.pad_sequence(written, batch_first=True)


@torch.no_grad()
def score_with(
    student: Any,
    teacher: RolloutTeacher,
    rollouts: Sequence[Rollout],
    fields: Sequence[str],
    *,
    temperature: float = 1.0,
    tokens_per_forward: int = 16384,
) -> Scored:
    """Statistics of every completion token and both models' likeliest tokens: `score_rollouts` for any teacher.

    Args:
        student: a transformers model.
        teacher: asked about all rollouts at once.
        rollouts: R of them, N completion tokens together.
        fields: names of statistics, see `TokenScores`.
        temperature, tokens_per_forward: as in `score_rollouts`.

    Returns:
        Scored, on the CPU.

    Raises:
        NonFiniteLogitsError: a ValueError that names the rollout and the token.
        TeacherUnavailableError, ValueError: there is no answer, or a wrong one.
    """
    answers = teacher.answer(rollouts)

    def score(places: Sequence[int], of_student: Head, sampled: Tensor) -> Scored:
        with teacher.compare([answers[place] for place in places]) as comparison:
            return score_comparison(of_student, comparison, sampled, fields, temperature)

    return score_in_forwards(student, rollouts, score, tokens_per_forward)


@torch.no_grad()
def score_comparison(
    student: Head, teacher: Comparison, sampled: Tensor, fields: Sequence[str], temperature: float
) -> Scored:
    """Statistics of N tokens and both models' likeliest tokens, on the CPU: `score_heads` for any teacher.

    Args:
        student: its head of the N tokens.
        teacher: its side of them.
        sampled: int64 [N], the tokens themselves.
        fields: names of statistics.
        temperature: divides both models' logits.
    """
    scores = teacher.scores(student, fields, temperature, sampled.to(student.hidden.device))
    return Scored(scores, *teacher.likeliest(student, TOP_TOKENS, temperature)).map(Tensor.cpu)
