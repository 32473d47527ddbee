"""Do student and teacher speak of the same tokens (asked before weights are loaded), and what does each stand for?"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from .text import printable

# Digits, punctuation, several scripts and an emoji: merges and pre-tokenisers that differ show here.
_PROBE = "The 1st of 2,048 tokens: x² ≥ ½·√3 → naïve café, 你好 мир שלום 🙂\n\tdef f(x): return x  # 00123"
_SAMPLE = 512  # tokens of the vocabulary that a server is asked about
_MOST_SHOWN = 5  # differing tokens that a warning names
_MARKER = re.compile(r"<\S+>|\[\S+\]")
_BYTE_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")

# the student's name of a token and the teacher's, None where there is none
Names = tuple[str | None, str | None]


def check_same_tokenizer(student: Any, teacher: Any) -> dict[int, Names]:
    """The ids of reserved tokens that the two tokenizers read differently; raise where anything else differs.

    Compares the vocabularies id by id, then the ids of one probe text (merges and pre-tokenisation). A reserved token
    is one that ordinary text does not give: an added one, or one written like a marker that its own text does not give.
    Padding rows of the lm_heads are no part of this: see `shared_vocabulary`.

    Args:
        student: the student's tokenizer (`PreTrainedTokenizerBase`, or a processor that holds one).
        teacher: the teacher's.

    Returns:
        Token id → the student's name of it and the teacher's, None where one has no such token.

    Raises:
        ValueError: they differ in more than reserved tokens; the message names the first such token.

    Example:
        >>> from tipdistill.tasks.arithmetic import build_tokenizer
        >>> longer = build_tokenizer()
        >>> _ = longer.add_tokens(["<think>"])
        >>> check_same_tokenizer(build_tokenizer(), longer)
        {18: (None, '<think>')}
    """
    student, teacher = _plain(student), _plain(teacher)
    remedy = (
        "On-policy distillation compares next-token distributions token by token, so both models need one tokenizer: "
        "choose a teacher of the same family, or TRL's GOLD trainer for different tokenizers."
    )
    of_student = {index: token for token, index in student.get_vocab().items()}
    of_teacher = {index: token for token, index in teacher.get_vocab().items()}
    differing: dict[int, Names] = {}
    for index in sorted(of_student.keys() | of_teacher.keys()):
        mine, theirs = of_student.get(index), of_teacher.get(index)
        if mine == theirs:
            continue
        if _is_reserved(student, mine, index) and _is_reserved(teacher, theirs, index):
            differing[index] = (mine, theirs)
            continue
        raise ValueError(
            f"the tokenizers differ, first at token id {index}: {_named(mine, theirs)} "
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
    return differing


def _plain(tokenizer: Any) -> Any:
    return getattr(tokenizer, "tokenizer", tokenizer)


def _named(mine: str | None, theirs: str | None) -> str:
    return " and ".join(
        f"{who} {'has no such token' if token is None else f'reads {token!r}'}"
        for who, token in (("the student", mine), ("the teacher", theirs))
    )


def _is_reserved(tokenizer: Any, token: str | None, index: int) -> bool:
    """Whether no ordinary text gives the id: there is no such token, or it is reserved."""
    if token is None or index in tokenizer.added_tokens_decoder:
        return True
    if not _MARKER.fullmatch(token) or _BYTE_FALLBACK.fullmatch(token):
        return False
    return index not in tokenizer(token, add_special_tokens=False)["input_ids"]


def described_differences(differing: Mapping[int, Names]) -> str:
    """One line on reserved tokens that two tokenizers read differently.

    Args:
        differing: as `check_same_tokenizer` returns it, at least one.

    Example:
        >>> described_differences({7: ("<a>", "<b>"), 8: ("<c>", None)})[:97]
        "the tokenizers differ in 2 reserved tokens: 7 (the student's '<a>', the teacher's '<b>'), 8 (the "
    """
    shown = [
        f"{index} ("
        + ", ".join(
            f"{who} {'none' if token is None else printable(repr(token))}"
            for who, token in (("the student's", names[0]), ("the teacher's", names[1]))
        )
        + ")"
        for index, names in list(differing.items())[:_MOST_SHOWN]
    ]
    more = f" and {len(differing) - _MOST_SHOWN} more" if len(differing) > _MOST_SHOWN else ""
    tokens = "1 reserved token" if len(differing) == 1 else f"{len(differing)} reserved tokens"
    return (
        f"the tokenizers differ in {tokens}: {', '.join(shown)}{more}. The student never samples them, and a prompt "
        "that holds one is refused."
    )


def check_ids_shared(
    prompt_ids: Iterable[Sequence[int]], differing: Mapping[int, Names], name: str = "", first: int = 0
) -> None:
    """Refuse prompts that hold a token which means something else to the teacher.

    Args:
        prompt_ids: tokens of each prompt.
        differing: as `check_same_tokenizer` returns it.
        name: of what the prompts are rows, for errors; "" where it is the batch that is about to be sampled.
        first: row of the first one.

    Raises:
        ValueError: which row and token, and what to do.

    Example:
        >>> check_ids_shared([[1, 2], [3]], {3: ("<a>", None)}, "the training set")
        Traceback (most recent call last):
            ...
        ValueError: the prompt of row 1 (counting from 0) of the training set holds token 3, and the student reads ...
    """
    if not differing:
        return
    for row, ids in enumerate(prompt_ids, start=first):
        index = next((index for index in ids if index in differing), None)
        if index is not None:
            where = f"the prompt of row {row} (counting from 0) of {name}" if name else f"prompt {row} of the batch"
            raise ValueError(
                f"{where} holds token {index}, and {_named(*differing[index])}: what the teacher would say after it "
                "is of another prompt. Remove it (it may come from the chat template: see chat_template_kwargs), or "
                "choose a teacher that has it."
            )


def check_served_tokenizer(student: Any, tokenize: Callable[[str], list[int]]) -> dict[int, Names]:
    """Raise unless a server's tokenizer gives the probe text and tokens from all over the vocabulary the student's ids.

    Added tokens may differ, as in `check_same_tokenizer`.

    Args:
        student: the student's tokenizer.
        tokenize: text → token ids, without special tokens, as the server does it.

    Returns:
        Ids of the student's added tokens that the server reads as something else → the student's name, None.

    Raises:
        ValueError: they differ; the message names the first differing token.

    Example:
        >>> from tipdistill.tasks.arithmetic import build_tokenizer
        >>> tokenizer = build_tokenizer()
        >>> check_served_tokenizer(tokenizer, lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])
        {}
    """
    student = _plain(student)

    def own(text: str) -> list[int]:
        return student(text, add_special_tokens=False)["input_ids"]

    size = max(student.get_vocab().values()) + 1
    added = {index: token.content for index, token in student.added_tokens_decoder.items()}
    # one text, so that a token of another vocabulary shows wherever it lies
    spread = " ".join(
        "" if index in added else student.decode([index]) for index in range(0, size, max(1, size // _SAMPLE))
    )
    for text in (_PROBE, spread):
        for position, (mine, theirs) in enumerate(zip_longest(own(text), tokenize(text))):
            if mine != theirs:
                raise ValueError(
                    f"the teacher's server reads text as other tokens: in {text[:80]!r} token {position} is {mine} for "
                    f"the student and {theirs} for the teacher. Both models need one tokenizer: serve a teacher of the "
                    "student's family."
                )

    def differing(ids: list[int]) -> list[int]:
        text = " ".join(added[index] for index in ids)
        if not ids or own(text) == tokenize(text):
            return []
        half = len(ids) // 2
        return ids if len(ids) == 1 else differing(ids[:half]) + differing(ids[half:])

    return {index: (added[index], None) for index in differing(sorted(added))}


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


def known_tokens(tokenizer: Any, differing: Mapping[int, Names]) -> int:
    """Tokens that need a row in both lm_heads: all up to the last that both models read alike."""
    if not differing:
        return len(tokenizer)
    return max(index for index in tokenizer.get_vocab().values() if index not in differing) + 1


def forbidden_ids(
    student_rows: int, teacher_rows: int, differing: Mapping[int, Names], pairs: Iterable[tuple[int, int]] = ()
) -> list[int]:
    """Ids that a student may not sample.

    Args:
        student_rows, teacher_rows: of the lm_heads.
        differing: reserved tokens that differ.
        pairs: of each teacher that ends otherwise: the student's end, which is sampled all the same where the teacher's
            counts as it; and the teacher's.

    Example:
        >>> forbidden_ids(10, 8, {3: ("<a>", "<b>"), 4: ("<end>", None)}, [(4, 5)])
        [3, 8, 9]
    """
    ends = {pair[0] for pair in pairs}
    return sorted({*range(teacher_rows, student_rows), *(index for index in differing if index < student_rows)} - ends)


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
    tokenizer = _plain(tokenizer)
    vocabulary, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    read = _token_reader(tokenizer)
    pieces = [b""] * (max(vocabulary.values()) + 1)
    if read is None:
        _read_behind_another(tokenizer, pieces)
        return pieces
    for token, index in vocabulary.items():
        pieces[index] = added[index].content.encode() if index in added else read(token, index)
    return pieces


def _read_behind_another(tokenizer: Any, pieces: list[bytes]) -> None:
    """Fill in the bytes of tokens that are joined by rules of their own (WordPiece; words with blanks between them).

    A token is read behind another, so that the blank that parts the two is its own.
    """
    vocabulary, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    decode = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    first = next((index for index in vocabulary.values() if index not in added and decode([index]).strip()), None)
    before = "" if first is None else decode([first])
    for index in vocabulary.values():
        both = before if first is None else decode([first, index])
        whole = added[index].content if index in added else decode([index])
        pieces[index] = (both[len(before) :] if both.startswith(before) and both != before else whole).encode()


def _token_reader(tokenizer: Any) -> Callable[[str, int], bytes] | None:
    """(token as the vocabulary writes it, id) → bytes, by what the tokenizer's decoder does; None: no such function."""
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
    return None
