"""Teachers: what a teacher says of the tokens that the student wrote, wherever it lives.

A training step asks its teacher two things, and neither needs to know what kind of teacher it is:

    answers = teacher.answer(batch, asked)        one Answer per rollout, of the tokens that were asked about
    with teacher.compare(answers) as comparison:  the same N tokens, ready to be held against the student's lm_head
        comparison.scores(student, ...)           → TokenScores
        comparison.likeliest(student, ...)        → both models' likeliest tokens, for token records
        comparison.loss(student, weight, ...)     → the loss, and its gradient

An Answer is small and portable (hidden states, or log-probabilities): it is kept with its rollout until the loss needs
it, and is cut with the batch into micro-batches. A Comparison lives for one forward; it holds whatever must be at hand
meanwhile, such as a sharded lm_head that was gathered.

`local.py` is a model in this process, `itself.py` the student as its own, `served.py` one behind a vLLM server that
gives log-probabilities, `hidden.py` one that gives hidden states, whose lm_head is here (both ask through `client.py`).
Around any of them, `prompted.py` lets it read another prompt than the student did, `ends.py` lets it end with the
student's end token, and `routed.py` makes one of several, each for the rollouts whose row names it. A teacher of
another kind is one more class with the members of `Teacher`, and one more line in `choose_teacher`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from transformers import TrainerCallback

from ..types import Head, TokenScores, TopTokens
from ..vocabulary import Names
from .named import SELF, NamedTeacher, named_teachers

__all__ = [
    "Answer",
    "ChosenTeacher",
    "Comparison",
    "Surroundings",
    "Teacher",
    "TeacherCallback",
    "TeacherUnavailableError",
    "choose_teacher",
    "open_server",
]


class TeacherUnavailableError(OSError):
    """A teacher that is elsewhere gave no usable answer within its time limit."""


class TeacherCallback(TrainerCallback):
    """A callback of a teacher that changes while the student trains; what it needs to go on is part of a checkpoint."""

    def save(self, directory: Path) -> None:
        """Write its state into a checkpoint that is being saved; every process calls it."""

    def load(self, directory: Path) -> None:
        """Take its state from a checkpoint.

        Raises:
            ValueError: the checkpoint has none, or that of another run.
        """


class Answer(Protocol):
    """What a teacher says of n tokens of one rollout, in their order."""

    def __len__(self) -> int: ...

    def map(self, function: Callable[[Tensor], Tensor]) -> Any:
        """The same with `function` applied to every tensor, whose first axis is the tokens (index, copy, move)."""
        ...


class Comparison(Protocol):
    """A teacher's side of N tokens."""

    def take(self, kept: Tensor) -> Comparison:
        """The tokens where `kept`, bool [N], is true."""
        ...

    def scores(self, student: Head, fields: Sequence[str], temperature: float, token_ids: Tensor | None) -> TokenScores:
        """Statistics of the N tokens, detached; `fields` empty: those of `token_scores` by default."""
        ...

    def likeliest(self, student: Head, k: int, temperature: float) -> tuple[TopTokens, TopTokens]:
        """The student's and the teacher's k likeliest tokens, of those that both have, [N, k] each.

        They have as many columns as there are tokens where these are fewer; a token_id of −1 says that none is known.
        """
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
        top_k: how many of its likeliest tokens its answers hold, so that divergences are lower bounds; None: its
            answers tell all of its distribution.
        model: the module that the trainer calls its teacher model, None where there is none here.
        callbacks: of the training, such as one that renews its weights.
        names: of the teachers that it is made of, by which figures are logged; empty where it is one.
    """

    name: str
    names: Sequence[str]
    vocabulary: int | None
    answers_in_loss: bool
    top_k: int | None
    model: Any
    callbacks: Sequence[TeacherCallback]

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
    model: Any
    model_wrapped: Any
    chat_template_kwargs: Any
    tools: Any
    pad_to_multiple_of: int | None

    def plain_student(self) -> Any:
        """The student without the wrappers of an engine."""
        ...

    def scoring_pieces(self, batch: dict[str, Any]) -> list[Tensor]:
        """Rows of each forward over a batch, as many forwards on every process."""
        ...

    def hidden_rows(self, model: Any, batch: dict[str, Any], mask: Tensor) -> Tensor:
        """Hidden states [N, H] of a model that predict the completion tokens in `mask`."""
        ...

    def redirected(self, wrapped: Any, model: Any, method: Callable[..., Any], *arguments: Any) -> Any:
        """`method(*arguments)` run as the forward of `wrapped`, which makes the sharded weights of `model` whole."""
        ...


@dataclass(frozen=True)
class ChosenTeacher:
    """Makes a teacher, given the trainer; and what is known of it before.

    Attributes:
        make: the same.
        tokenizer: its own, or a processor that holds one; None where there is none at hand.
        differing: reserved tokens that it reads as others, see `vocabulary.check_same_tokenizer`; of several teachers,
            those that any of them does.
        parts: of several teachers each by its name; empty where there is one.
        is_student: it is the student itself, which it therefore differs from in nothing.
    """

    make: Callable[[Surroundings], Teacher]
    tokenizer: Any = None
    differing: dict[int, Names] = field(default_factory=dict)
    parts: dict[str, ChosenTeacher] = field(default_factory=dict)
    is_student: bool = False

    def __call__(self, trainer: Surroundings) -> Teacher:
        return self.make(trainer)


def choose_teacher(
    teacher_model: Any,
    args: Any,
    processing_class: Any,
    teacher_processing_class: Any,
    prompt_column: str | None = None,
) -> ChosenTeacher:
    """The teacher that a run names, once what can be checked before weights are loaded is checked.

    Args:
        teacher_model: a model, a directory, a hub id or "self"; a mapping of names to these; None where `args` names
            others.
        args: the `TIPConfig`.
        processing_class, teacher_processing_class: both tokenizers, None where there is none to compare.
        prompt_column: of the dataset, with the prompts that the teacher reads; None: it reads the student's.

    Returns:
        What makes the teacher, given the trainer.

    Raises:
        ValueError: tokenizers that differ, a server that does not serve it.
        TeacherUnavailableError: a server that does not answer.
    """
    named = named_teachers(teacher_model, args)
    chosen = [_choose(one, processing_class, teacher_processing_class, prompt_column) for one in named]
    if not named[0].name:
        return chosen[0]
    from .routed import RoutedTeacher

    parts = dict(zip((one.name for one in named), chosen, strict=True))
    return ChosenTeacher(
        lambda trainer: RoutedTeacher(
            {name: part(trainer) for name, part in parts.items()}, args.teacher_column, trainer
        ),
        differing={index: names for part in chosen for index, names in part.differing.items()},
        parts=parts,
    )


def _choose(
    named: NamedTeacher, processing_class: Any, teacher_processing_class: Any, prompt_column: str | None
) -> ChosenTeacher:
    """What makes one teacher."""
    args = named.args
    is_student = isinstance(named.model, str) and named.model == SELF
    tokenizer: Any = None
    differing: dict[int, Names] = {}
    if args.teacher_url is not None:
        from .served import check_ends

        check_ends(args, teacher_processing_class)
        server = open_server(args, processing_class)
        tokenizer, differing = teacher_processing_class, server.differing

        def make(trainer: Surroundings) -> Teacher:
            return server.teacher(trainer.accelerator)

    elif is_student:
        from .itself import teacher_of

        def make(trainer: Surroundings) -> Teacher:
            return teacher_of(trainer, args)

    else:
        from . import local

        tokenizer, differing = local.check(named.model, args, processing_class, teacher_processing_class)

        def make(trainer: Surroundings) -> Teacher:
            return local.LocalTeacher(local.load(named.model, args), trainer, args.teacher_offload)

    if prompt_column is None:
        return ChosenTeacher(make, tokenizer, differing, is_student=is_student)
    from .prompted import PromptedTeacher

    def make_prompted(trainer: Surroundings) -> Teacher:
        return PromptedTeacher(make(trainer), prompt_column, tokenizer or processing_class, trainer)

    return ChosenTeacher(make_prompted, tokenizer, differing, is_student=is_student)


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
