"""Do student and teacher speak of the same tokens (asked before weights are loaded), and what does each stand for?"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import zip_longest
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

# Digits, punctuation, several scripts and an emoji: merges and pre-tokenisers that differ show here.
_PROBE = "The 1st of 2,048 tokens: x² ≥ ½·√3 → naïve café, 你好 мир שלום 🙂\n\tdef f(x): return x  # 00123"
_SAMPLE = 512  # tokens of the vocabulary that a server is asked about
_BYTE_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


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


def check_served_tokenizer(student: Any, tokenize: Callable[[str], list[int]]) -> None:
    """Raise unless a server's tokenizer gives the probe text and tokens from all over the vocabulary the student's ids.

    Args:
        student: the student's tokenizer.
        tokenize: text → token ids, without special tokens, as the server does it.

    Raises:
        ValueError: they differ; the message names the first differing token.

    Example:
        >>> from tipdistill.tasks.arithmetic import build_tokenizer
        >>> tokenizer = build_tokenizer()
        >>> check_served_tokenizer(tokenizer, lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])
    """
    student = getattr(student, "tokenizer", student)
    size = max(student.get_vocab().values()) + 1
    ids = range(0, size, max(1, size // _SAMPLE))
    # one text, so that a token of another vocabulary shows wherever it lies
    spread = " ".join(student.decode([index], skip_special_tokens=True) for index in ids)
    for text in (_PROBE, spread):
        mine, theirs = student(text, add_special_tokens=False)["input_ids"], tokenize(text)
        for position, (own, other) in enumerate(zip_longest(mine, theirs)):
            if own != other:
                raise ValueError(
                    f"the teacher's server reads text as other tokens: in {text[:80]!r} token {position} is {own} for "
                    f"the student and {other} for the teacher. Both models need one tokenizer: serve a teacher of the "
                    "student's family."
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


def token_bytes(tokenizer: Any) -> list[bytes]:
    """The bytes that every token id stands for, so that texts can be put together from any sequence of tokens.

    A token of byte-level BPE may hold part of a character, which `decode` shows as U+FFFD; its bytes are exact. Special
    tokens stand for their own name. A space that a tokenizer strips at the very start of a text is kept, since a
    completion is never one.

    Args:
        tokenizer: `PreTrainedTokenizerBase`, or a processor that holds one.

    Returns:
        Token id → bytes, as a list; an id that no token has is b"".

    Example:
        >>> from tipdistill.tasks.arithmetic import build_tokenizer
        >>> token_bytes(build_tokenizer())[:3]
        [b'0', b'1', b'2']
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    vocabulary, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    read = _token_reader(tokenizer)
    pieces = [b""] * (max(vocabulary.values()) + 1)
    for token, index in vocabulary.items():
        pieces[index] = added[index].content.encode() if index in added else read(token, index)
    return pieces


def _token_reader(tokenizer: Any) -> Callable[[str, int], bytes]:
    """(token as the vocabulary writes it, id) → bytes, by what the tokenizer's decoder does."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a Python tokenizer: of these only SentencePiece writes ▁
        steps: list[dict[str, Any]] = (
            [{"type": "Metaspace"}, {"type": "ByteFallback"}] if hasattr(tokenizer, "sp_model") else [{"type": "?"}]
        )
    elif backend.decoder is None:
        steps = [{"type": "?"}]
    else:
        decoder = json.loads(backend.decoder.__getstate__())
        steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds: dict[str, dict[str, Any]] = {step["type"]: step for step in steps}
    if "ByteLevel" in kinds:
        of_character = {character: byte for byte, character in bytes_to_unicode().items()}
        return lambda token, _: b"".join(
            bytes([of_character[character]]) if character in of_character else character.encode() for character in token
        )
    if kinds.keys() <= {"Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}:
        replaced = {kinds["Metaspace"].get("replacement", "▁"): " "} if "Metaspace" in kinds else {}
        for step in steps:
            if step["type"] == "Replace" and "String" in step["pattern"]:
                replaced[step["pattern"]["String"]] = step["content"]

        def read(token: str, _: int) -> bytes:
            byte = _BYTE_FALLBACK.fullmatch(token) if "ByteFallback" in kinds else None
            if byte:
                return bytes([int(byte[1], 16)])
            for written, meant in replaced.items():
                token = token.replace(written, meant)
            return token.encode()

        return read
    # WordPiece and others that join words by rules of their own
    return lambda _, index: tokenizer.decode([index], clean_up_tokenization_spaces=False).encode()
