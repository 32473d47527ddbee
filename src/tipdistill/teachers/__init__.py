"""Teachers: what a teacher says of the tokens that the student wrote, wherever it lives.

A training step asks its teacher two things, and neither needs to know what kind of teacher it is:

    answers = teacher.answer(batch, asked)        one Answer per rollout, of the tokens that were asked about
    with teacher.compare(answers) as comparison:  the same N tokens, ready to be held against the student's lm_head
        comparison.scores(student, ...)           → TokenScores
        comparison.loss(student, weight, ...)     → the loss, and its gradient

An Answer is small and portable (hidden states, or log-probabilities): it is kept with its rollout until the loss needs
it, and is cut with the batch into micro-batches. A Comparison lives for one forward; it holds whatever must be at hand
meanwhile, such as a sharded lm_head that was gathered.

`local.py` is a model in this process, `served.py` one behind a vLLM server that gives log-probabilities, `hidden.py`
one that gives hidden states, whose lm_head is here (both ask through `client.py`). A teacher of another kind is one
more class with the members of `Teacher`, and one more line in `choose_teacher`: several teachers are one that gives
each rollout to its own, by a column of the dataset's row, and compares piece by piece; one that sees another prompt
answers from that of the row instead of the student's; a copy of the student is a local one whose `callbacks` renew its
weights. tests/teachers/test_teachers.py has two of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor
from transformers import TrainerCallback

from ..types import Head, TokenScores

__all__ = [
    "Answer",
    "Comparison",
    "Surroundings",
    "Teacher",
    "TeacherUnavailableError",
    "choose_teacher",
    "open_server",
]


class TeacherUnavailableError(OSError):
    """A teacher that is elsewhere gave no usable answer within its time limit."""


class Answer(Protocol):
    """What a teacher says of n tokens of one rollout, in their order."""

    def __len__(self) -> int: ...

    def map(self, function: Callable[[Tensor], Tensor]) -> Any:
        """The same with `function` applied to every tensor, whose first axis is the tokens (index, copy, move)."""
        ...


class Comparison(Protocol):
    """A teacher's side of N tokens. That of a teacher which gives hidden states has a `head`, a `Head` of N rows."""

    def take(self, kept: Tensor) -> Comparison:
        """The tokens where `kept`, bool [N], is true."""
        ...

    def scores(self, student: Head, fields: Sequence[str], temperature: float, token_ids: Tensor | None) -> TokenScores:
        """Statistics of the N tokens, detached; `fields` empty: those of `token_scores` by default."""
        ...

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
        """Σ w D / denominator, see `tipdistill.fused_divergence_loss`, and the statistics `fields` of the same pass."""
        ...


class Teacher(Protocol):
    """A teacher as a training step sees it.

    Attributes:
        name: for records and messages.
        vocabulary: rows of its lm_head; None: it does not tell.
        answers_in_loss: its forward runs beside the student's in the loss, unless a rule asks before; otherwise it is
            asked once per generation batch, about what is trained on.
        gives_hidden_states: its comparisons have a `head`, from which token records read likeliest tokens.
        model: the module that the trainer calls its teacher model, None where there is none here.
        callbacks: of the training, such as one that renews its weights.
    """

    name: str
    vocabulary: int | None
    answers_in_loss: bool
    gives_hidden_states: bool
    model: Any
    callbacks: Sequence[TrainerCallback]

    def answer(self, batch: dict[str, Any], asked: Tensor, pieces: Sequence[Tensor] | None = None) -> list[Any]:
        """What it says of the tokens in `asked`, bool [B, T]: an Answer per rollout, or None where none was asked.

        Every process calls it at the same moment. Answers have no gradient.

        Args:
            batch: prompt_ids, prompt_mask, completion_ids, completion_mask, [B, ...] each; multimodal inputs; examples,
                the B rows of the dataset that the prompts are from.
            asked: tokens of the completions.
            pieces: rows of each forward, where a teacher runs one; None: all rows at once.
        """
        ...

    def compare(self, answers: Sequence[Any]) -> AbstractContextManager[Any]:
        """A Comparison of all tokens of these answers, one rollout after the other."""
        ...

    def metrics(self) -> dict[str, float]:
        """Figures to log of the time since the last call, over all processes; every process calls it."""
        ...


class Surroundings(Protocol):
    """What a teacher needs of the trainer that it teaches in."""

    accelerator: Any

    def hidden_rows(self, model: Any, batch: dict[str, Any], mask: Tensor) -> Tensor:
        """Hidden states [N, H] of a model that predict the completion tokens in `mask`."""
        ...

    def redirected(self, wrapped: Any, model: Any, method: Callable[..., Any], *arguments: Any) -> Any:
        """`method(*arguments)` run as the forward of `wrapped`, which makes the sharded weights of `model` whole."""
        ...


def choose_teacher(
    teacher_model: Any, args: Any, processing_class: Any, teacher_processing_class: Any
) -> Callable[[Surroundings], Teacher]:
    """The teacher that a run names, once what can be checked before weights are loaded is checked.

    Args:
        teacher_model: a model, a directory or a hub id; None where `args` names a server.
        args: the `TIPConfig`.
        processing_class, teacher_processing_class: both tokenizers, None where there is none to compare.

    Returns:
        What makes the teacher, given the trainer.

    Raises:
        ValueError: tokenizers that differ, a server that does not serve it.
        TeacherUnavailableError: a server that does not answer.
    """
    if args.teacher_url is not None:
        server = open_server(args, processing_class)
        return lambda trainer: server.teacher(trainer.accelerator)
    from . import local

    local.check(teacher_model, args, processing_class, teacher_processing_class)
    return lambda trainer: local.LocalTeacher(local.load(teacher_model, args), trainer, args.teacher_offload)


def open_server(args: Any, tokenizer: Any, time_limit: float | None = None) -> Any:
    """The server of `teacher_url`, connected, as what asks it for log-probabilities or for hidden states.

    Args:
        args: the `TIPConfig`.
        tokenizer: the student's.
        time_limit: seconds to wait for it; None: the configuration's.

    Returns:
        A `client.TeacherClient`, whose `teacher(accelerator)` is the `Teacher`.

    Raises:
        ValueError, TeacherUnavailableError: as `choose_teacher`.
    """
    from . import hidden, served

    opened = served.open_teacher if args.teacher_lm_head is None else hidden.open_server
    return opened(args, tokenizer, time_limit)
