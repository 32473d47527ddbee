"""Do student and teacher speak of the same tokens? Asked before any weights are loaded."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

# Digits, punctuation, several scripts and an emoji: merges and pre-tokenisers that differ show here.
_PROBE = "The 1st of 2,048 tokens: x² ≥ ½·√3 → naïve café, 你好 мир שלום 🙂\n\tdef f(x): return x  # 00123"


def check_same_tokenizer(student: Any, teacher: Any) -> None:
    """Raise unless the two tokenizers give every text the same token ids.

    Compares the vocabularies id by id, then the ids of one probe text (merges and pre-tokenisation). Padding rows of
    the lm_heads are no part of this: see `shared_vocabulary`.

    Args:
        student: the student's tokenizer (`PreTrainedTokenizerBase`, or a processor that holds one).
        teacher: the teacher's.

    Raises:
        ValueError: they differ; the message names the first differing token.

    Example:
        >>> from tipdistill.tasks.arithmetic import build_tokenizer
        >>> check_same_tokenizer(build_tokenizer(), build_tokenizer())
    """
    student, teacher = getattr(student, "tokenizer", student), getattr(teacher, "tokenizer", teacher)
    remedy = (
        "On-policy distillation compares next-token distributions token by token, so both models need one tokenizer: "
        "choose a teacher of the same family, or TRL's GOLD trainer for different tokenizers."
    )
    of_student = {index: token for token, index in student.get_vocab().items()}
    of_teacher = {index: token for token, index in teacher.get_vocab().items()}
    for index in sorted(of_student.keys() | of_teacher.keys()):
        mine, theirs = of_student.get(index), of_teacher.get(index)
        if mine != theirs:
            described = [
                f"{who} {'has no such token' if token is None else f'reads {token!r}'}"
                for who, token in (("the student", mine), ("the teacher", theirs))
            ]
            raise ValueError(
                f"the tokenizers differ, first at token id {index}: {' and '.join(described)} "
                f"({len(of_student)} tokens against {len(of_teacher)}). {remedy}"
            )
    ids_of_student = student(_PROBE, add_special_tokens=False)["input_ids"]
    ids_of_teacher = teacher(_PROBE, add_special_tokens=False)["input_ids"]
    for position, (mine, theirs) in enumerate(zip_longest(ids_of_student, ids_of_teacher)):
        if mine != theirs:
            raise ValueError(
                f"the tokenizers share a vocabulary but split text differently: in {_PROBE!r} token {position} is "
                f"{of_student.get(mine)!r} for the student and {of_teacher.get(theirs)!r} for the teacher. {remedy}"
            )


def shared_vocabulary(student_rows: int, teacher_rows: int, num_tokens: int | None = None) -> int:
    """Rows that both lm_heads have: min(V_S, V_T).

    Vocabularies are padded to sizes that suit the hardware (Qwen2.5-14B has 152,064 rows and 1.5B has 151,936 for the
    same tokenizer), so a difference is normal as long as no real token lies beyond the shorter head.

    Args:
        student_rows: rows of the student's lm_head.
        teacher_rows: rows of the teacher's lm_head.
        num_tokens: tokens of the tokenizer, where known.

    Raises:
        ValueError: a token of the tokenizer has no row in the shorter head.

    Example:
        >>> shared_vocabulary(151_936, 152_064, num_tokens=151_665)
        151936
    """
    shared = min(student_rows, teacher_rows)
    if num_tokens is not None and num_tokens > shared:
        which = "student" if student_rows < teacher_rows else "teacher"
        raise ValueError(
            f"the tokenizer has {num_tokens} tokens but the {which}'s lm_head has only {shared} rows (student "
            f"{student_rows}, teacher {teacher_rows}): these tokens cannot be compared. Resize that model's "
            "embeddings to the tokenizer, or choose a matching pair."
        )
    return shared
