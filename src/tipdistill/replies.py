"""What OpenAI-compatible servers answer, checked before anything uses it: of a teacher, and of an evaluation.

A part that is missing is a KeyError, IndexError or TypeError, after which `http.ask` asks again. A part that is there
and cannot be right is a WrongAnswerError, which is final.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from .http import WrongAnswerError

_LONGEST_ID = 20  # digits of a token id, before it is read as a number
_MOST_TOKENS = 2**31


class Written(NamedTuple):
    """One completion: its text, its tokens, and whether it ended by itself."""

    text: str
    tokens: int
    finished: bool


def model_names(reply: Any) -> list[str]:
    """The names in an answer of /models.

    Example:
        >>> model_names({"data": [{"id": "Qwen/Qwen3-8B"}]})
        ['Qwen/Qwen3-8B']
    """
    names = []
    for entry in _list("data", reply["data"]):
        name = entry.get("id") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not name:
            raise WrongAnswerError(f"a model of /models has no id: {entry!r:.80}.")
        names.append(name)
    if not names:
        raise WrongAnswerError("/models names no model.")
    return names


def token_ids(reply: Any, size: int) -> list[int]:
    """The tokens in an answer of /tokenize.

    Args:
        reply: JSON.
        size: no id is as large.

    Example:
        >>> token_ids({"tokens": [3, 1]}, size=10)
        [3, 1]
    """
    tokens = _list("tokens", reply["tokens"])
    for token in tokens:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < size:
            raise WrongAnswerError(f"/tokenize gives {token!r:.40} for a token, and ids are integers in [0, {size:,}).")
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
    entries = _list("prompt_logprobs", reply["choices"][0]["prompt_logprobs"])
    if len(entries) != length:
        raise WrongAnswerError(f"{len(entries)} entries in prompt_logprobs for {length} tokens.")
    return [_logprobs(entries[place], place, size) for place in wanted]


def _logprobs(entry: Any, place: int, size: int) -> dict[int, float]:
    where = f"prompt_logprobs, token {place}"
    if not isinstance(entry, dict) or not entry:
        raise WrongAnswerError(f"{where} of the prompt has no entry: {entry!r:.40}.")
    values = {}
    for name, value in entry.items():
        digits = name.isascii() and name.isdigit() and len(name) <= _LONGEST_ID
        if not digits or str(int(name)) != name or int(name) >= size:
            raise WrongAnswerError(f"{where}: {name!r:.40} is no token id, an integer in [0, {size:,}).")
        logprob = value["logprob"] if isinstance(value, dict) else value
        if logprob is None:
            logprob = math.nan
        if isinstance(logprob, bool) or not isinstance(logprob, int | float):
            raise WrongAnswerError(f"{where}: the log-probability of {name} is {logprob!r:.40}, and not a number.")
        try:
            values[int(name)] = float(logprob)
        except OverflowError:
            raise WrongAnswerError(f"{where}: the log-probability of {name} is no number that a float holds.") from None
    return values


def written(reply: Any, as_chat: bool) -> Written:
    """What an answer of /completions or /chat/completions holds.

    Args:
        reply: JSON.
        as_chat: of /chat/completions.

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
        raise WrongAnswerError(f"no choices, finish_reason or usage.completion_tokens: {reply!r:.200}") from None
    if not (text is None or isinstance(text, str)):
        raise WrongAnswerError(f"the text of a completion is {text!r:.40}.")
    if not (reason is None or isinstance(reason, str)):
        raise WrongAnswerError(f"finish_reason is {reason!r:.40}.")
    if len(choices) != 1:
        raise WrongAnswerError(f"{len(choices)} choices, and one was asked for.")
    if isinstance(usage, float) and usage.is_integer():
        usage = int(usage)
    if isinstance(usage, bool) or not isinstance(usage, int) or not 0 <= usage < _MOST_TOKENS:
        raise WrongAnswerError(f"usage.completion_tokens is {usage!r:.40}, which is no count of tokens.")
    return Written(text or "", usage, reason != "length")


def _list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{name} is no list but {value!r:.40}")
    return value
