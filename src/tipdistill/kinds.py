"""What each token of a student's turn is part of: a thought, a call, its arguments, the answer, or other text.

A tokenizer's `response_template` says how thoughts and calls begin and end. Transformers' parser reads them by it, and
does not tell where they stand; here they are found by the same rules, in turns that cannot be parsed too.
https://huggingface.co/docs/transformers/main/en/chat_response_parsing
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

KINDS = ("thought", "call", "argument", "answer", "text")
# fields of a template → the kind of what stands in them; what stands in others is told by the turn
_OF_FIELDS = {"reasoning_content": "thought", "thinking": "thought", "tool_calls": "call"}
# strings whole, so that no bracket in one counts; possessive, so that text that never closes one costs no more
_JSON = re.compile(r'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)|[{}\[\],]', re.DOTALL)
_COLON = re.compile(r"\s*:\s*")
_ARGUMENTS = ('"arguments"', '"parameters"')


def token_kinds(
    pieces: Sequence[bytes], template: Mapping[str, Any] | None, before: str = "", called: bool = False
) -> list[str]:
    r"""The kind of each token of a turn; a token across a border has that of its beginning.

    Args:
        pieces: the bytes of each token, see `token_bytes`.
        template: the tokenizer's `response_template`; None: neither thoughts nor calls are told.
        before: the text that the turn goes on from; chat templates may begin a thought there.
        called: whether the turn called tools, for calls that the template does not tell.

    Returns:
        Of each token one of `KINDS`.

    Example:
        >>> from trl.chat_template_utils import qwen3_template
        >>> token_kinds([b"So", b" <tool_call>", b'{"name": "f", "arguments": ', b"{}", b"}"], qwen3_template)
        ['text', 'text', 'call', 'argument', 'call']
    """
    # a byte that is no UTF-8 is one character, so that places can be counted in both
    text = b"".join(pieces).decode("utf-8", "surrogateescape")
    kinds = _kinds_of_characters(text, template or {}, before)
    rest = "text" if called or "call" in kinds else "answer"
    of_bytes = [
        kind or rest
        for kind, character in zip(kinds, text, strict=True)
        for _ in character.encode("utf-8", "surrogateescape")
    ] or [rest]
    starts = [0, *accumulate(map(len, pieces))][:-1]
    return [of_bytes[min(start, len(of_bytes) - 1)] for start in starts]


def _kinds_of_characters(text: str, template: Mapping[str, Any], before: str) -> list[str]:
    """The kind of each character, "" outside of thoughts and calls."""
    fields = [
        (_OF_FIELDS.get(name, ""), opening, _pattern(field, "close"), _holds_arguments_alone(field))
        for name, field in template.get("fields", {}).items()
        if (opening := _pattern(field, "open")) is not None
    ]
    anchor = _pattern(template, "start_anchor")
    anchors = [match.end() for match in anchor.finditer(before)] if anchor else []
    before = before[anchors[-1] :] if anchors else before
    whole, place = before + text, 0
    kinds = [""] * len(whole)
    while True:
        opened = [(match, field) for field in fields if (match := field[1].search(whole, place))]
        if not opened:
            break
        fields = [field for _, field in opened]  # what stands nowhere behind this place is not looked for again
        # the first, and of several that begin there the longest
        match, (kind, _, closing, alone) = min(opened, key=lambda pair: (pair[0].start(), -len(pair[0][0])))
        closed = closing.search(whole, match.end()) if closing else None
        inside = slice(match.end(), closed.start() if closed else len(whole))
        end = closed.end() if closed else len(whole)
        kinds[match.start() : end] = [kind] * (end - match.start())
        if kind == "call":
            for start, stop in [(0, inside.stop - inside.start)] if alone else _arguments(whole[inside]):
                kinds[inside.start + start : inside.start + stop] = ["argument"] * (stop - start)
        if end == place:
            break
        place = end
    return kinds[len(before) :]


def _pattern(field: Mapping[str, Any], name: str) -> re.Pattern | None:
    """A delimiter as templates give it: a text, several, or a pattern."""
    if f"{name}_pattern" in field:
        return re.compile(field[f"{name}_pattern"], re.DOTALL)
    literals = field.get(name) or []
    literals = [literals] if isinstance(literals, str) else sorted(literals, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, literals))) if literals else None


def _holds_arguments_alone(field: Mapping[str, Any]) -> bool:
    """Whether all between a call's delimiters is arguments, its name being part of the first one."""
    transform = field.get("transform")
    function = transform.get("function", transform) if isinstance(transform, dict) else None
    return isinstance(function, dict) and function.get("arguments") == "{content}"


def _arguments(body: str) -> list[tuple[int, int]]:
    """Where the arguments stand in the JSON of one call or several, which may be malformed or break off."""
    spans: list[tuple[int, int]] = []
    depth = 0
    begun: tuple[int, int] | None = None  # where, and in how many brackets
    for match in _JSON.finditer(body):
        mark = match[0]
        if mark in "{[":
            depth += 1
        elif mark in "}]":
            depth -= 1
        if begun is not None:
            start, outer = begun
            if depth < outer or (mark == "," and depth == outer):
                spans.append((start, match.start()))
                begun = None
        elif mark in _ARGUMENTS and (colon := _COLON.match(body, match.end())):
            begun = colon.end(), depth
    return spans if begun is None else [*spans, (begun[0], len(body))]
