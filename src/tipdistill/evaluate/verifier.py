"""What a response answers, and whether two answers are the same; also the process that does so under a time limit.

This file imports nothing of the package, so that a verifying process starts without torch.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys

_BOX = re.compile(r"\\(?:boxed|fbox)\s*")
_BRACE = re.compile(r"(?<!\\)[{}]")
_BARE = re.compile(r"[0-9]+")
_FINAL = re.compile(r"^\s*####\s*(.+?)\s*$", re.M)
_INTEGER = re.compile(r"([+-]?)([0-9]+)\.?")
_THOUSANDS = re.compile(r"[+-]?[0-9]{1,3}(?:,[0-9]{3})+\.?")
_IN_BASE = re.compile(r"([0-9A-Za-z]+)_(?:\{\s*([0-9]+)\s*\}|([0-9]))")
_WRAPPER = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_SPACING = re.compile(r"\\[,!;:]|\{,\}(?=[0-9]{3})|\\(?:left|right)(?![a-zA-Z])|~")
TAIL = 4096  # characters that are searched for an answer without a box
MEMORY = 4 << 30  # bytes of address space of a verifying process


def last_boxed(response: str) -> str | None:
    r"""What the last complete, non-empty \boxed{...} or \fbox{...} holds; None where there is none.

    Args:
        response: what a model wrote.

    Example:
        >>> last_boxed(r"\boxed{1}, no: \boxed{\frac{1}{2}} \boxed{")
        '\\frac{1}{2}'
    """
    content: str | None = None
    content_end = -1
    opened: list[int | None] = []  # of each open brace, where a box's content begins, or None
    boxes = {match.end(): match for match in _BOX.finditer(response)}
    for position in sorted({*boxes, *(match.start() for match in _BRACE.finditer(response))}):
        character = response[position : position + 1]
        if character == "{":
            opened.append(position + 1 if position in boxes else None)
        elif character == "}" and position not in boxes:
            start = opened.pop() if opened else None
            # an outer box closes after the boxes in it, and holds the later answer
            if start is not None and response[start:position].strip():
                content, content_end = response[start:position].strip(), position
        elif position in boxes:
            bare = _BARE.match(response, position)  # TeX allows \boxed 5
            if bare and position > content_end:
                content, content_end = bare[0], position
    return content


def extract_answer(response: str) -> str | None:
    r"""The answer that a response gives: the last box, else what follows the last "####", else what math-verify finds.

    math-verify looks for "answer is ...", then for the last formula or number, in the last 4,096 characters.

    Args:
        response: what a model wrote.

    Returns:
        The answer as LaTeX or text; None where there is none.

    Example:
        >>> extract_answer(r"So it is $\boxed{7}$."), extract_answer("The answer is 18 apples."), extract_answer("Hm.")
        ('7', '18', None)
    """
    boxed = last_boxed(response)
    if boxed is not None:
        return boxed
    final = _FINAL.findall(response)
    if final:
        return final[-1]
    # the parsed expression comes first, its text last
    answers = [part for part in _parse(response[-TAIL:]) if isinstance(part, str) and part.strip()]
    return answers[-1] if answers else None


def is_equivalent(answer: str, reference: str) -> bool:
    r"""Whether two answers are the same: as integers where both are, as text, or as math-verify sees it.

    Args:
        answer: LaTeX or text.
        reference: the same; math-verify lets the reference decide the form (an equation, a set, a number).

    Example:
        >>> is_equivalent("025", "25"), is_equivalent(r"\frac{1}{2}", "0.5"), is_equivalent("[1, 2]", "(1, 2)")
        (True, True, False)
    """
    words = _WRAPPER.fullmatch(reference.strip())
    answer, reference = _plain(answer), _plain(reference)
    if answer == reference:
        return bool(answer)
    integers = _integer(answer), _integer(reference)
    if None not in integers:
        return integers[0] == integers[1]
    if words and not re.search(r"[0-9]", reference):  # math-verify reads words as products of letters
        return _letters(answer) == _letters(reference)
    in_base = _IN_BASE.fullmatch(answer), _IN_BASE.fullmatch(reference)
    if in_base[0] and in_base[1]:  # math-verify drops the base
        return _digits_and_base(in_base[0]) == _digits_and_base(in_base[1])
    return _verified(_parse(f"\\boxed{{{reference}}}"), _parse(f"\\boxed{{{answer}}}"))


def _verified(reference: list, answer: list) -> bool:
    from math_verify import verify

    return bool(verify(reference, answer, timeout_seconds=None))


def _parse(text: str) -> list:
    from math_verify import parse

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # the time limit it misses is the caller's
    return parse(text, parsing_timeout=None)


def _plain(text: str) -> str:
    text = _SPACING.sub("", text.strip()).replace("−", "-")
    text = _WRAPPER.sub(r"\1", text)
    boxed = last_boxed(text)
    text = " ".join((text if boxed is None else boxed).split())
    while len(text) > 2 and text[0] == text[-1] == "$":
        text = text[1:-1].strip()
    return text


def _integer(text: str) -> tuple[bool, str] | None:
    """Sign and digits, compared as text: a hostile integer has more digits than Python converts."""
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    integer = _INTEGER.fullmatch(text)
    if integer is None:
        return None
    digits = integer[2].lstrip("0") or "0"
    return integer[1] == "-" and digits != "0", digits


def _letters(text: str) -> str:
    return "".join(character for character in text.casefold() if character.isalnum())


def _digits_and_base(match: re.Match) -> tuple[str, str]:
    return match[1].lstrip("0").upper(), match[2] or match[3]


def serve(seconds: int) -> None:
    """Answer requests, one JSON object a line, until the input ends.

    The process ends itself when one takes longer than `seconds`: whoever asked may have been killed meanwhile.

    {"response": r, "reference": a} → {"answer": extracted, "correct": bool};
    {"answer": a, "reference": b} → {"correct": bool}. An expression that raises is wrong.
    """
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)  # whatever libraries print is no reply
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ImportError, ValueError, OSError):  # not POSIX, or a lower limit is set already
        pass
    import math_verify  # noqa: F401 - before "ready", so that no answer's time is spent on it

    print(json.dumps("ready"), file=replies, flush=True)
    for line in sys.stdin:
        if hasattr(signal, "alarm"):
            signal.alarm(
                seconds
            )  # without a handler, so that the kernel ends a computation that never returns to Python
        request = json.loads(line)
        reply: dict = {"correct": False}
        try:
            if "response" in request:
                reply["answer"] = extract_answer(request["response"])
            answer = reply.get("answer", request.get("answer"))
            reply["correct"] = answer is not None and is_equivalent(answer, request["reference"])
        except Exception as error:  # a hostile expression raises anything, and costs its own answer alone
            reply["error"] = type(error).__name__
        if hasattr(signal, "alarm"):
            signal.alarm(0)
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
