"""What two models of one vocabulary are used to: how a completion ends, a text begins, a conversation is written.

The teacher scores the student's prompts and completions as they are. Where it learned from texts of another form, what
it says of them is of little worth; each such difference is one line, for the start of a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .text import printable
from .vocabulary import Names, described_differences

_REPLY = "2"
_CONVERSATIONS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "1 + 1?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": _REPLY},
        {"role": "user", "content": "2 + 2?"},
    ],
)
_SHOWN = 30  # characters of what differs
_MOST_NAMED = 5


def differences(
    tokenizers: tuple[Any, Any],
    ends: tuple[Sequence[int], Sequence[int]],
    differing: Mapping[int, Names],
    *,
    alike: bool = False,
    conversational: bool | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[str]:
    """A line on each thing that student and teacher are used to differently. Padding is masked, so that it is none.

    Args:
        tokenizers: the student's and the teacher's, or processors that hold them.
        ends: ids that end a completion of the student and of the teacher; empty where they are not known.
        differing: reserved tokens that differ, see `vocabulary.check_same_tokenizer`.
        alike: the teacher's end counts as the student's (`end_as_teacher`).
        conversational: whether the prompts are; None: not known.
        chat_template_kwargs: passed to the chat templates.

    Raises:
        ValueError: the student could never end, or cannot end as the teacher does; with the remedy.

    Example:
        >>> from tipdistill.tasks.arithmetic import build_tokenizer
        >>> differences((build_tokenizer(), build_tokenizer()), ([16], [16]), {})
        []
    """
    student, teacher = (getattr(tokenizer, "tokenizer", tokenizer) for tokenizer in tokenizers)
    pair = end_pair((student, teacher), ends) if alike else None
    check_can_end(student, ends[0], differing, pair)
    lines = [
        described_differences(differing) if differing else None,
        different_ends((student, teacher), ends, pair),
        None if conversational else different_beginnings(student, teacher),
        None if conversational is False else different_templates(student, teacher, chat_template_kwargs),
    ]
    return [line for line in lines if line]


# Ends.


def usual_end(tokenizer: Any, ends: Sequence[int]) -> int:
    """Of several end tokens the one that replies end with: what the chat template puts after one, else the tokenizer's.

    Args:
        tokenizer: the model's.
        ends: its end tokens, at least one.

    Example:
        >>> from tipdistill.tasks.arithmetic import build_tokenizer
        >>> usual_end(build_tokenizer(), [3, build_tokenizer().eos_token_id]) == build_tokenizer().eos_token_id
        True
    """
    text = rendered(tokenizer, [_CONVERSATIONS[0][0], {"role": "assistant", "content": _REPLY}], begins_reply=False)
    if text is not None:
        after = tokenizer(text[text.rfind(_REPLY) + len(_REPLY) :], add_special_tokens=False)["input_ids"]
        for index in after:
            if index in ends:
                return index
    return tokenizer.eos_token_id if tokenizer.eos_token_id in ends else ends[0]


def end_pair(tokenizers: tuple[Any, Any], ends: tuple[Sequence[int], Sequence[int]]) -> tuple[int, int] | None:
    """The end token of the student and that of the teacher which stands for it; None where they are one.

    Args:
        tokenizers, ends: of student and teacher.

    Raises:
        ValueError: the end tokens of one are not known.
    """
    for who, known in zip(("student", "teacher"), ends, strict=True):
        if not known:
            raise ValueError(
                f"end_as_teacher needs the end tokens of both models, and those of the {who} are not known: give it an "
                "eos_token_id (generation_config.json), or leave end_as_teacher out."
            )
    usual = (usual_end(tokenizers[0], ends[0]), usual_end(tokenizers[1], ends[1]))
    return None if usual[0] == usual[1] else usual


def check_can_end(
    tokenizer: Any, ends: Sequence[int], differing: Mapping[int, Names], pair: tuple[int, int] | None = None
) -> None:
    """Refuse a student all of whose end tokens mean something else to the teacher, so that it may not sample them.

    Args:
        tokenizer: the student's.
        ends: its end tokens.
        differing: reserved tokens that differ.
        pair: see `end_pair`.

    Raises:
        ValueError: which tokens, and what to do.
    """
    if ends and not set(ends) - differing.keys() and pair is None:
        names = _listed(tokenizer, ends)
        raise ValueError(
            f"the student ends with {names}, which its teacher's tokenizer lacks or reads as another token, so that it "
            "could never end. Set end_as_teacher, which puts the teacher's end in its place, or give the student an "
            "eos_token_id (generation_config.json) that both tokenizers have."
        )


def different_ends(
    tokenizers: tuple[Any, Any], ends: tuple[Sequence[int], Sequence[int]], pair: tuple[int, int] | None = None
) -> str | None:
    """A line on end tokens that only one of the models has; None where both end with the same, or it is not known.

    Args:
        tokenizers, ends: of student and teacher.
        pair: see `end_pair`; given where the teacher's end counts as the student's.
    """
    if set(ends[0]) == set(ends[1]) or not ends[0] or not ends[1]:
        return None
    of_student, of_teacher = (
        _listed(tokenizer, sorted(set(ids))) for tokenizer, ids in zip(tokenizers, ends, strict=True)
    )
    told = f"the end tokens differ: the student ends with {of_student}, the teacher with {of_teacher}. "
    if pair is not None:
        own, other = (
            printable(str(tokenizer.convert_ids_to_tokens(index)))
            for tokenizer, index in zip(tokenizers, pair, strict=True)
        )
        return (
            f"{told}The teacher's {other} counts as the student's {own} (end_as_teacher), with which it goes on to end."
        )
    told += "The teacher finds an end that is not its own unlikely, so completions grow longer as the student learns; "
    if end_pair(tokenizers, ends) is None:
        return f"{told}give both models one eos_token_id (generation_config.json) where they are meant to end alike."
    return (
        f"{told}set end_as_teacher, which trains it to end where the teacher does, or give both models one "
        "eos_token_id (generation_config.json)."
    )


def _listed(tokenizer: Any, ids: Sequence[int]) -> str:
    """The names of a few tokens, and how many more there are."""
    more = [f"{len(ids) - _MOST_NAMED} more"] if len(ids) > _MOST_NAMED else []
    return printable(", ".join([*map(str, tokenizer.convert_ids_to_tokens(list(ids[:_MOST_NAMED]))), *more]))


# Beginnings.


def different_beginnings(student: Any, teacher: Any) -> str | None:
    """A line on what the tokenizers put around a plain prompt (bos, eos); None where it is the same.

    Args:
        student, teacher: tokenizers.
    """
    of_student, of_teacher = (
        "".join(map(str, tokenizer.convert_ids_to_tokens(before)))
        + "…"
        + "".join(map(str, tokenizer.convert_ids_to_tokens(after)))
        for tokenizer in (student, teacher)
        for before, after in [_around(tokenizer)]
    )
    if of_student == of_teacher:
        return None
    return (
        f"plain prompts begin or end differently: the student's tokenizer makes {printable(of_student)} of a text, the "
        f"teacher's {printable(of_teacher)}. The teacher reads the student's; give both the same (add_bos_token and "
        "add_eos_token in tokenizer_config.json) where it learned from the other."
    )


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    text = "a"
    plain, dressed = tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer(text)["input_ids"]
    for start in range(len(dressed) - len(plain) + 1):
        if dressed[start : start + len(plain)] == plain:
            return dressed[:start], dressed[start + len(plain) :]
    return dressed, []


# Conversations.


def rendered(
    tokenizer: Any,
    conversation: Sequence[Mapping[str, str]],
    chat_template_kwargs: dict[str, Any] | None = None,
    begins_reply: bool = True,
) -> str | None:
    """A conversation as the tokenizer's chat template writes it; None where it has none, or the template refuses it.

    Args:
        tokenizer: whose template.
        conversation: messages.
        chat_template_kwargs: passed to it.
        begins_reply: with the header of the assistant's next turn.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        return tokenizer.apply_chat_template(
            list(conversation), tokenize=False, add_generation_prompt=begins_reply, **(chat_template_kwargs or {})
        )
    except Exception:  # a template is code of its author's, and fails as it likes
        return None


def different_templates(student: Any, teacher: Any, chat_template_kwargs: dict[str, Any] | None = None) -> str | None:
    """A line with the first difference between two small conversations as each model writes them; None without one.

    Args:
        student, teacher: tokenizers.
        chat_template_kwargs: passed to both templates.
    """
    if not getattr(student, "chat_template", None):
        return None  # and then no prompt is a conversation
    told = "the teacher reads conversations as the student's template writes them, and"
    if not getattr(teacher, "chat_template", None):
        return f"{told} it has no chat template of its own: it may know no conversations."
    for conversation in (*_CONVERSATIONS, _CONVERSATIONS[1][1:]):  # some templates take no message of the system
        mine, theirs = (rendered(tokenizer, conversation, chat_template_kwargs) for tokenizer in (student, teacher))
        if mine is None or theirs is None or mine == theirs:
            continue
        pairs = enumerate(zip(mine, theirs, strict=False))
        start = next((place for place, (left, right) in pairs if left != right), min(len(mine), len(theirs)))
        before = f"after {mine[max(0, start - _SHOWN) : start]!r}" if start else "at once"
        own, other = (repr(text[start : start + _SHOWN]) if text[start:] else "nothing" for text in (mine, theirs))
        return (
            f"{told} it learned from another form: {before} the student's has {own}, the teacher's {other}. Give "
            "the student's tokenizer the teacher's chat template, or set chat_template_kwargs, where they should agree."
        )
    return None
