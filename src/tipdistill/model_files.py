"""What the files of models say: configurations and tokenizers, read and compared. No weights are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, AutoProcessor

from .conventions import check_can_end, differences, end_pair
from .policy import saved_end_tokens
from .vocabulary import check_same_tokenizer, known_tokens, shared_vocabulary


def check_models(
    student: tuple[str, str, str | None],
    teacher: tuple[str, str, str | None],
    trust_remote_code: bool,
    end_as_teacher: bool = False,
) -> tuple[list[Any], list[Any], dict[str, str]]:
    """Configurations and tokenizers of a pair, once they agree, and a line on each. Loads no weights.

    Args:
        student, teacher: the flag that named the model, its name, its revision.
        trust_remote_code: run code that comes with them.
        end_as_teacher: the teacher's end counts as the student's.

    Returns:
        Both configurations, both processing classes, label → line.

    Raises:
        ValueError: a model that cannot be read, or tokenizers or lm_heads that do not match.
    """
    configurations, processors, described = read_models(
        [("student", *student), ("teacher", *teacher)], trust_remote_code
    )
    differing = check_same_tokenizer(*processors)
    tokenizers = [getattr(processor, "tokenizer", processor) for processor in processors]
    rows, teacher_rows = (model.get_text_config().vocab_size for model in configurations)
    shared = shared_vocabulary(rows, teacher_rows, num_tokens=known_tokens(tokenizers[0], differing))
    ends = _ends([student, teacher], configurations, processors)
    pair = end_pair((tokenizers[0], tokenizers[1]), ends) if end_as_teacher else None
    check_can_end(tokenizers[0], ends[0], differing, pair)
    same = f"the same for both{f' but for {len(differing)}' if differing else ''}: {len(tokenizers[0]):,} tokens"
    described["tokenizer"] = f"{same}; the divergence runs over {shared:,} rows"
    return configurations, processors, described


def compare_models(
    student: tuple[str, str, str | None],
    teacher: tuple[str, str, str | None],
    configurations: Sequence[Any],
    processors: Sequence[Any],
    conversational: bool | None,
    chat_template_kwargs: dict[str, Any] | None = None,
    end_as_teacher: bool = False,
) -> dict[str, str]:
    """What the models of a pair are used to differently, see `conventions.differences`: label → line.

    Args:
        student, teacher: as in `check_models`.
        configurations, processors: as it returns them.
        conversational: whether the prompts are; None: not known.
        chat_template_kwargs: passed to the chat templates.
        end_as_teacher: the teacher's end counts as the student's.
    """
    lines = differences(
        (processors[0], processors[1]),
        _ends([student, teacher], configurations, processors),
        check_same_tokenizer(*processors),
        alike=end_as_teacher,
        conversational=conversational,
        chat_template_kwargs=chat_template_kwargs,
    )
    return {"warning" if number == 1 else f"warning {number}": line for number, line in enumerate(lines, start=1)}


def _ends(
    models: Sequence[tuple[str, str, str | None]], configurations: Sequence[Any], processors: Sequence[Any]
) -> tuple[list[int], list[int]]:
    own, other = (
        saved_end_tokens(name, revision, configuration, processor)
        for (_, name, revision), configuration, processor in zip(models, configurations, processors, strict=True)
    )
    return own, other


def read_models(
    models: Sequence[tuple[str, str, str, str | None]], trust_remote_code: bool
) -> tuple[list[Any], list[Any], dict[str, str]]:
    """Configurations and processing classes of models, and a line on each. Loads no weights.

    Args:
        models: who it is, the flag that named it, its name, its revision.
        trust_remote_code: run code that comes with them.

    Raises:
        ValueError: a model that cannot be read.
    """
    configurations, processors, described = [], [], {}
    for who, flag, name, revision in models:
        options = {"revision": revision, "trust_remote_code": trust_remote_code}
        try:
            configurations.append(AutoConfig.from_pretrained(name, **options))
            processors.append(
                AutoProcessor.from_pretrained(name, truncation_side="left", padding_side="left", **options)
            )
        except Exception as error:  # files that are damaged make transformers and tokenizers raise anything
            said = f"{type(error).__name__}: " if not isinstance(error, OSError | ValueError) else ""
            raise ValueError(f"the {who} could not be read ({flag} {name}): {said}{error}") from error
        rows = configurations[-1].get_text_config().vocab_size
        described[who] = f"{name} ({configurations[-1].model_type}, {rows:,} rows in its lm_head)"
    return configurations, processors, described


def check_chat_template(prompt: Any, tokenizer: Any, model: str, applied: bool) -> None:
    """Raise where a prompt is conversational and the tokenizer has no template for it."""
    if not isinstance(prompt, str) and not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"the prompts are conversational{' (apply_chat)' if applied else ''}, but the tokenizer of {model} has no "
            "chat template: use plain prompts or an instruction-tuned model."
        )


def of_one(name: str, lines: dict[str, str]) -> dict[str, str]:
    """Lines on one of several teachers, whose labels say which; what is said of the student is of no teacher.

    Example:
        >>> of_one("maths", {"student": "S", "teacher": "T"})
        {'student': 'S', 'teacher maths': 'T'}
    """
    return {label if label == "student" else f"{label} {name}".strip(): line for label, line in lines.items()}
