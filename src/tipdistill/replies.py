"""What OpenAI-compatible servers answer, checked before anything uses it: of a teacher, and of an evaluation.

A part that is missing or that cannot be right is a WrongAnswerError, which is final: the same question would be
answered in the same way.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from .http import Bytes, WrongAnswerError

_LONGEST_ID = 20  # digits of a token id, before it is read as a number
_MOST_TOKENS = 2**31


class Written(NamedTuple):
    """One completion: its text, its tokens, and whether it ended by itself."""

    text: str
    tokens: int
    finished: bool


def model_names(reply: Any) -> list[str]:
    """The names in an answer of /models.

    Raises:
        WrongAnswerError: it has no list of named models; as for all answers here.

    Example:
        >>> model_names({"data": [{"id": "Qwen/Qwen3-8B"}]})
        ['Qwen/Qwen3-8B']
    """
    names = []
    for entry in _list("data", _part(reply, "data"), reply):
        name = entry.get("id") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not name:
            raise WrongAnswerError(f"a model of /models has no id: {_shown(entry, 80)}.")
        names.append(name)
    if not names:
        raise WrongAnswerError("/models names no model.")
    return names


def token_ids(reply: Any, size: int) -> list[int]:
    """The tokens in an answer of /tokenize, or in another list of them.

    Args:
        reply: JSON.
        size: no id is as large.

    Example:
        >>> token_ids({"tokens": [3, 1]}, size=10)
        [3, 1]
    """
    tokens = _list("tokens", _part(reply, "tokens"), reply)
    for token in tokens:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < size:
            raise WrongAnswerError(
                f"the server gives {_shown(token, 40)} for a token, and ids are integers in [0, {size:,})."
            )
    return tokens


def prompt_logprobs(reply: Any, length: int, wanted: Sequence[int], size: int) -> list[dict[int, float]]:
    """The log-probabilities at some tokens of a prompt: token → log P, NaN where it is null.

    Args:
        reply: JSON.
        length: tokens of the prompt.
        wanted: which of them, from 0.
        size: no token id is as large.

    Example:
        >>> prompt_logprobs({"choices": [{"prompt_logprobs": [None, {"7": {"logprob": -0.5}}]}]}, 2, [1], size=10)
        [{7: -0.5}]
    """
    choices = _list("choices", _part(reply, "choices"), reply)
    entries = _list("prompt_logprobs", _part(choices[0] if choices else None, "prompt_logprobs"), reply)
    if len(entries) != length:
        raise WrongAnswerError(f"{len(entries)} entries in prompt_logprobs for {length} tokens.")
    return [_logprobs(entries[place], place, size) for place in wanted]


def _logprobs(entry: Any, place: int, size: int) -> dict[int, float]:
    where = f"prompt_logprobs, token {place}"
    if not isinstance(entry, dict) or not entry:
        raise WrongAnswerError(f"{where} of the prompt has no entry: {_shown(entry, 40)}.")
    values = {}
    for name, value in entry.items():
        digits = name.isascii() and name.isdigit() and len(name) <= _LONGEST_ID
        if not digits or str(int(name)) != name or int(name) >= size:
            raise WrongAnswerError(f"{where}: {_shown(name, 40)} is no token id, an integer in [0, {size:,}).")
        if isinstance(value, dict) and "logprob" not in value:
            raise WrongAnswerError(f"{where}: {name} has no logprob: {_shown(value, 80)}.")
        logprob = value["logprob"] if isinstance(value, dict) else value
        if logprob is None:
            logprob = math.nan
        if isinstance(logprob, bool) or not isinstance(logprob, int | float):
            raise WrongAnswerError(
                f"{where}: the log-probability of {name} is {_shown(logprob, 40)}, and not a number."
            )
        try:
            values[int(name)] = float(logprob)
        except OverflowError:
            raise WrongAnswerError(f"{where}: the log-probability of {name} is no number that a float holds.") from None
    return values


def pooled(reply: Bytes, shape: tuple[int, int], dtype: str, size: int, where: str) -> bytes:
    """The numbers in an answer of /pooling that came as bytes; their shape stands in its header `metadata`.

    Args:
        reply: as it came.
        shape: (tokens, width) that it has to have.
        dtype: that was asked for.
        size: bytes of so many numbers.
        where: which question it answers, for errors.

    Raises:
        ValueError: it is cut off, so that another may be whole; all else is a WrongAnswerError.

    Example:
        >>> data = '{"data": [{"shape": [1, 2], "embed_dtype": "float32", "endianness": "little"}]}'
        >>> pooled(Bytes(bytes(8), {"metadata": data}), (1, 2), "float32", 8, "rollout 0")
        b'\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00'
    """
    text = reply.headers.get("metadata")
    if text is None:
        begins = reply.body[:80].decode("utf-8", "replace")
        raise WrongAnswerError(f"{where}: no hidden states as bytes but {begins!r}.")
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError):
        raise WrongAnswerError(f"{where}: the header metadata is no JSON: {_shown(text, 80)}.") from None
    entries = _list("data", _part(metadata, "data"), metadata)
    if len(entries) != 1 or not isinstance(entries[0], dict):
        raise WrongAnswerError(f"{where}: one answer was asked for, and metadata has {_shown(entries, 80)}.")
    given = entries[0]
    if given.get("shape") != list(shape) or any(isinstance(number, bool) for number in given["shape"]):
        raise WrongAnswerError(
            f"{where}: numbers of the shape {_shown(given.get('shape'), 40)}, and the lm_head needs {list(shape)} "
            "(tokens, width)."
        )
    if given.get("embed_dtype") != dtype or given.get("endianness") != "little":
        raise WrongAnswerError(
            f"{where}: {_shown(given.get('embed_dtype'), 40)}, {_shown(given.get('endianness'), 40)}, and {dtype}, "
            "little were asked for."
        )
    if len(reply.body) < size:
        raise ValueError(f"the answer is cut off: {len(reply.body):,} of {size:,} bytes")
    if len(reply.body) > size:
        raise WrongAnswerError(f"{where}: {len(reply.body):,} bytes of numbers, and {size:,} were asked for.")
    return reply.body


def written(reply: Any, as_chat: bool, most: int = _MOST_TOKENS) -> Written:
    """What an answer of /completions or /chat/completions holds.

    Args:
        reply: JSON.
        as_chat: of /chat/completions.
        most: tokens that were asked for (max_tokens).

    Example:
        >>> reply = {"choices": [{"text": "4", "finish_reason": "stop"}], "usage": {"completion_tokens": 1}}
        >>> written(reply, as_chat=False)
        Written(text='4', tokens=1, finished=True)
    """
    try:
        choices, usage = reply["choices"], reply["usage"]["completion_tokens"]
        choice = choices[0]
        text = choice["message"].get("content") if as_chat else choice["text"]
        reason = choice["finish_reason"]
    except (KeyError, IndexError, TypeError, AttributeError):
        raise WrongAnswerError(f"no choices, finish_reason or usage.completion_tokens: {_shown(reply, 200)}") from None
    if not (text is None or isinstance(text, str)):
        raise WrongAnswerError(f"the text of a completion is {_shown(text, 40)}.")
    if not (reason is None or isinstance(reason, str)):
        raise WrongAnswerError(f"finish_reason is {_shown(reason, 40)}.")
    if len(choices) != 1:
        raise WrongAnswerError(f"{len(choices)} choices, and one was asked for.")
    if isinstance(usage, float) and usage.is_integer():
        usage = int(usage)
    if isinstance(usage, bool) or not isinstance(usage, int) or not 0 <= usage < _MOST_TOKENS:
        raise WrongAnswerError(f"usage.completion_tokens is {_shown(usage, 40)}, which is no count of tokens.")
    if usage > most:
        raise WrongAnswerError(
            f"usage.completion_tokens is {usage:,}, and at most {most:,} were asked for (max_tokens)."
        )
    # half of a surrogate pair is no character, and no file holds it
    return Written((text or "").encode("utf-8", "replace").decode("utf-8"), usage, reason != "length")


def written_ids(reply: Any, most: int, size: int) -> tuple[list[int], bool]:
    """The tokens that an answer of /completions holds, and whether they ended by themselves.

    Args:
        reply: JSON, of a request with return_token_ids.
        most: tokens that were asked for (max_tokens).
        size: no id is as large.

    Example:
        >>> reply = {"choices": [{"text": "4", "token_ids": [19, 2], "finish_reason": "stop"}]}
        >>> written_ids(reply | {"usage": {"completion_tokens": 2}}, most=8, size=32)
        ([19, 2], True)
    """
    finished = written(reply, False, most).finished
    ids = _part(reply["choices"][0], "token_ids")
    if ids is None:
        raise WrongAnswerError(
            "the answer has no token_ids: a conversation with tools is played on tokens, which vLLM gives from 0.10.2 "
            "on (return_token_ids)."
        )
    ids = token_ids({"tokens": ids}, size)
    if not 0 < len(ids) <= most:
        raise WrongAnswerError(f"{len(ids):,} token_ids, where 1 to {most:,} were asked for (max_tokens).")
    return ids, finished


def _part(reply: Any, name: str) -> Any:
    return reply.get(name) if isinstance(reply, dict) else None


def _list(name: str, value: Any, reply: Any) -> list[Any]:
    if not isinstance(value, list):
        raise WrongAnswerError(f"the answer has no list of {name}: {_shown(reply, 200)}")
    return value


def _shown(value: Any, most: int) -> str:
    """The beginning of a value, of which a server may have sent megabytes."""
    return reprlib.repr(value)[:most]
