"""Which tokens student and teacher share: the rest is never sampled, and no prompt holds it; and how both end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..chat import encode_prompts
from ..config import TIPConfig
from ..conventions import differences, end_pair
from ..evaluate.engines import as_fed
from ..evaluate.task import Task
from ..policy import end_tokens
from ..teachers import ChosenTeacher
from ..teachers.ends import EndsAlike
from ..vocabulary import Names, check_ids_shared, forbidden_ids, known_tokens, shared_vocabulary
from .rollouts import never_sample

logger = get_logger(__name__)
_ENCODED = 1000  # prompts at a time


def check_prompts_shared(
    differing: Mapping[int, Names], dataset: Any, processing_class: Any, args: TIPConfig, name: str
) -> None:
    """Refuse a dataset with a prompt that holds a token which means something else to the teacher.

    Args:
        differing: see `vocabulary.check_same_tokenizer`.
        dataset: of prompts, or several by name; streams and prompts with images are looked at batch by batch.
        processing_class: the student's tokenizer.
        args: of the run.
        name: what errors call the dataset.

    Raises:
        ValueError: which row and token.
    """
    if isinstance(dataset, dict):
        for part, rows in dataset.items():
            check_prompts_shared(differing, rows, processing_class, args, f"{name}[{part!r}]")
    elif differing and isinstance(dataset, Dataset) and isinstance(processing_class, PreTrainedTokenizerBase):
        _check(differing, dataset["prompt"][:], processing_class, args, name)


def check_problems_shared(
    differing: Mapping[int, Names], tasks: Sequence[Task], processing_class: Any, args: TIPConfig
) -> None:
    """The same of the problems of tasks that are measured while the student trains."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    for task in tasks if differing else ():
        asked = [as_fed(tokenizer, task.prompt_of(problem), task.chat) for problem in task.problems]
        _check(differing, asked, tokenizer, args, f"the task {task.name!r}")


def _check(differing: Mapping[int, Names], prompts: Sequence[Any], tokenizer: Any, args: TIPConfig, name: str) -> None:
    if not isinstance(prompts[0], str) and not tokenizer.chat_template:
        return  # sampling says so
    for first in range(0, len(prompts), _ENCODED):
        some = prompts[first : first + _ENCODED]
        ids = encode_prompts(some, tokenizer, args.chat_template_kwargs, numbers=range(first, first + len(some)))
        check_ids_shared(ids, differing, name, first)


def share_tokens(trainer: Any, chosen: ChosenTeacher, conversational: bool | None) -> int:
    """Rows that both lm_heads have; ids that the teacher lacks, or reads as others, are never sampled.

    What else differs between the models is said. With `end_as_teacher` the trainer's teacher becomes one that ends with
    the student's end token.

    Args:
        trainer: a `TIPTrainer` with both its models, whose end tokens are known.
        chosen: of its teacher.
        conversational: whether the prompts are; None: not known.

    Raises:
        ValueError: a token without a row in one of the lm_heads; a student that could never end.
    """
    student, tokenizer, teacher = trainer.plain_student(), trainer._tokenizer, trainer.teacher
    differing = chosen.differing
    # ZeRO-3 holds partitions; the configuration still knows
    own = student.get_output_embeddings().weight.shape[0] or student.config.get_text_config().vocab_size
    of_teacher = teacher.vocabulary
    tokens = known_tokens(tokenizer, differing)
    vocabulary = shared_vocabulary(own, of_teacher or own, num_tokens=tokens)
    if of_teacher is not None and own != of_teacher:
        logger.info(
            f"The lm_heads are padded to different sizes (student {own}, teacher {of_teacher} rows); the "
            f"divergence runs over the {vocabulary} rows they share."
        )
    pairs = []
    for name, part, one in _each(chosen, teacher):
        if part.is_student:
            continue
        other = getattr(part.tokenizer, "tokenizer", part.tokenizer)
        ends = trainer.eos_token_ids, end_tokens(getattr(one.model, "generation_config", None), other)
        tokenizers = tokenizer, other or tokenizer
        for line in differences(
            tokenizers,
            ends,
            part.differing,
            alike=trainer.args.end_as_teacher,
            conversational=conversational,
            chat_template_kwargs=trainer.chat_template_kwargs,
        ):
            logger.warning(f"Teacher {name}: {line}" if name else line[0].upper() + line[1:])
        pair = end_pair(tokenizers, ends) if trainer.args.end_as_teacher else None
        if pair is None:
            continue
        if max(pair) >= vocabulary:
            raise ValueError(
                f"end_as_teacher exchanges the tokens {pair[0]} and {pair[1]}, and both lm_heads have only the first "
                f"{vocabulary} rows: give the student another eos_token_id (generation_config.json)."
            )
        pairs.append(pair)
        if name:
            teacher.replace(name, EndsAlike(one, *pair))
        else:
            trainer.teacher = EndsAlike(one, *pair)
    never_sample(trainer, forbidden_ids(own, of_teacher or max(tokens, len(tokenizer)), differing, pairs))
    return vocabulary


def _each(chosen: ChosenTeacher, teacher: Any) -> Iterator[tuple[str, ChosenTeacher, Any]]:
    """Each teacher with its name, which is "" where there is one."""
    if not chosen.parts:
        yield "", chosen, teacher
        return
    for (name, part), one in zip(chosen.parts.items(), list(teacher.teachers), strict=True):
        yield name, part, one
