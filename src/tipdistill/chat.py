"""Prompts as token ids: what a model is fed, the same while training, scoring, probing and evaluating."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from textwrap import shorten
from typing import Any

from datasets import Dataset

from .arrow import LOST, is_stored
from .text import nearest

# what `encode_prompts` says itself, or transformers does
_SET_HERE = ("messages", "conversation", "tools", "chat_template", "add_generation_prompt", "continue_final_message")
_SET_BY_TRANSFORMERS = ("raise_exception", "strftime_now")


def encode_prompts(
    prompts: Sequence[Any],
    tokenizer: Any,
    chat_template_kwargs: dict[str, Any] | None = None,
    tools: Sequence[Callable[..., Any]] | None = None,
    chat_template: str | None = None,
    numbers: Sequence[int] | None = None,
) -> list[list[int]]:
    """Token ids of each prompt as it is fed, chat template and generation prompt included.

    A conversation that ends with a turn of the assistant is continued there; any other gets the header of a new turn.

    Args:
        prompts: plain or conversational.
        tokenizer: the student's.
        chat_template_kwargs: passed to the chat template.
        tools: that the prompts speak of.
        chat_template: in the place of the tokenizer's own.
        numbers: rows of the dataset that the prompts come from, for errors; None: 0, 1, 2, ...

    Raises:
        ValueError: the chat template refuses a prompt or drops the turn to go on with; text that Arrow stores of a
            conversation.

    Example:
        >>> from tipdistill.tasks.arithmetic import build_tokenizer
        >>> encode_prompts(["1+2="], build_tokenizer())
        [[1, 10, 2, 11]]
    """
    settings: dict[str, Any] = dict(chat_template_kwargs or {})
    if tools:
        settings["tools"] = list(tools)
    if chat_template is not None:
        settings["chat_template"] = chat_template
    ids: list[list[int]] = [[] for _ in prompts]
    kinds: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        if is_stored(prompt):
            raise ValueError(f"prompt {row} (counting from 0) {LOST}")
        kinds.setdefault(
            "plain" if isinstance(prompt, str) else "continued" if is_begun(prompt) else "asked", []
        ).append(row)
    for kind, rows in kinds.items():
        some = [prompts[row] for row in rows]
        if kind == "plain":
            encoded = tokenizer(text=some)
        else:
            turn: dict[str, Any] = {"add_generation_prompt": kind == "asked"}
            if kind == "continued":
                turn["continue_final_message"] = True
            turn |= {"tokenize": True, "return_dict": True, **settings}
            try:
                encoded = tokenizer.apply_chat_template(conversation=some, **turn)
            except Exception as error:  # a template is code of its author's, and fails as it likes
                raise _refusal(error, prompts, rows, numbers or range(len(prompts)), tokenizer, turn) from error
        for row, tokens in zip(rows, encoded["input_ids"], strict=True):
            ids[row] = list(tokens)
    return ids


def _refusal(
    error: Exception,
    prompts: Sequence[Any],
    rows: Sequence[int],
    numbers: Sequence[int],
    tokenizer: Any,
    turn: dict[str, Any],
) -> ValueError:
    """What a chat template said, with the first row that it said it of."""
    where = "a prompt"
    for row in rows:
        try:
            tokenizer.apply_chat_template(conversation=[prompts[row]], **turn)
        except Exception as of_row:
            error, where = of_row, f"the prompt of row {numbers[row]} (counting from 0)"
            break
    said = shorten(str(error), 300, placeholder=" ...") or type(error).__name__
    return ValueError(f"{where} does not pass the chat template: mend or remove it. What was said: {said}")


def is_begun(prompt: Any) -> bool:
    """Whether a prompt is a conversation in which the assistant has the word already.

    Example:
        >>> is_begun([{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "That is"}])
        True
    """
    return not isinstance(prompt, str) and prompt[-1].get("role") == "assistant"


def is_conversational(dataset: Any) -> bool | None:
    """Whether the prompts of a dataset are conversations; None where it is a stream, or there is none.

    Example:
        >>> is_conversational(Dataset.from_dict({"prompt": ["1 + 1 ="]}))
        False
    """
    return not isinstance(dataset[0]["prompt"], str) if isinstance(dataset, Dataset) else None


# columns by which TRL's other trainers dress each row in its own way; one run dresses all rows alike
_OF_ROWS = {
    "chat_template_kwargs": "set chat_template_kwargs for the run, which holds for all rows, and remove the column",
    "tools": "write what the student is to know of them into a system message, and remove the column",
}


def check_columns(columns: Iterable[str], name: str) -> None:
    """Refuse columns that would put each conversation in a way of its own, which nothing here reads.

    Args:
        columns: that hold something.
        name: of the dataset, for errors.

    Raises:
        ValueError: which column, and what to do.
    """
    for column in columns:
        if column in _OF_ROWS:
            raise ValueError(
                f"{name} has a column {column!r}, and no row is put in a way of its own: {_OF_ROWS[column]}."
            )


def filled_columns(dataset: Any) -> list[str]:
    """Those of the columns in question that hold something; of a stream, those that are there."""
    columns = [column for column in dataset.column_names or () if column in _OF_ROWS]
    return [column for column in columns if not isinstance(dataset, Dataset) or any(dataset[column])]


def check_chat_template_kwargs(settings: dict[str, Any] | None, tokenizer: Any) -> None:
    """Refuse settings that the tokenizer's chat template does not read.

    Args:
        settings: `chat_template_kwargs`.
        tokenizer: whose template it is, or a processor.

    Raises:
        ValueError: which setting, and what the template reads.

    Example:
        >>> from types import SimpleNamespace
        >>> tokenizer = SimpleNamespace(chat_template="{% if enable_thinking %}...{% endif %}")
        >>> check_chat_template_kwargs({"enable_thinkin": False}, tokenizer)
        Traceback (most recent call last):
        ValueError: the chat template reads no 'enable_thinkin' (chat_template_kwargs), but enable_thinking. ...
    """
    if not settings:
        return
    given = getattr(tokenizer, "chat_template", None)
    templates = list(given.values()) if isinstance(given, dict) else [given] if given else []
    if not templates:
        raise ValueError(
            f"chat_template_kwargs = {settings} is for a chat template, and the tokenizer has none: leave it out."
        )
    from transformers.utils.chat_template_utils import _get_template_variables  # not for `tipdistill demo --help`

    read = {name for template in templates for name in _get_template_variables(template)}
    offered = sorted(read - {*_SET_HERE, *_SET_BY_TRANSFORMERS, *getattr(tokenizer, "special_tokens_map", {})})
    for name in settings:
        if name in _SET_HERE:
            raise ValueError(f"{name!r} is no setting of a chat template but of how it is called: leave it out.")
        if name not in read:
            raise ValueError(
                f"the chat template reads no {name!r} (chat_template_kwargs), but {', '.join(offered) or 'no setting'}."
                f"{nearest(name, offered)}"
            )
