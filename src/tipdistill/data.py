"""Prompts: from the hub or a local file to rows a trainer can read, checked before any model is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk

from .arrow import LOST, as_written, dataset_of, is_stored, read_stored, renamed, streamed, values_of
from .chat import check_columns, encode_prompts, filled_columns, is_begun
from .documents import check_values, read_text
from .text import nearest

IMAGE_COLUMNS = ("images", "image")
_FILE_SUFFIXES = (".jsonl", ".json", ".parquet")
_BLOCKS = ("image", "image_url", "video")  # of a message


def load_prompts(
    source: str | Path,
    split: str = "train",
    config: str | None = None,
    streaming: bool = False,
    column: str = "prompt",
    template: str | None = None,
    as_chat: bool = False,
) -> Dataset | IterableDataset:
    """Rows with a checked `prompt` column, from a hub id, a file, or a directory.

    Args:
        source: hub id; JSONL, JSON or Parquet file; or a directory, saved by `save_to_disk` or holding data files.
        split: split to take; a file has only "train".
        config: configuration of a hub dataset.
        streaming: read the hub dataset as a stream.
        column, template, as_chat: see `prepare_prompts`.

    Raises:
        FileNotFoundError: `source` looks like a path and is not there.
        ValueError: a malformed file (with the line), an unknown split, or anything `prepare_prompts` refuses.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "prompts.jsonl")
        ...     _ = path.write_text('{"problem": "1 + 1 ="}\\n{"problem": "1 + 2 ="}\\n')
        ...     load_prompts(path, column="problem")["prompt"][:]
        ['1 + 1 =', '1 + 2 =']
    """
    return prepare_prompts(load_rows(source, split, config, streaming), column, template, as_chat, name=str(source))


def load_rows(
    source: str | Path, split: str = "train", config: str | None = None, streaming: bool = False
) -> Dataset | IterableDataset:
    """The rows of a hub dataset, a file or a directory, as they are; the arguments are those of `load_prompts`."""
    splits = _load_splits(source, config, streaming)
    if split not in splits:
        raise ValueError(
            f"{source} has no split {split!r}, its splits are {', '.join(splits)}.{nearest(split, splits)}"
        )
    return splits[split]


def prepare_prompts(
    dataset: Dataset | IterableDataset,
    column: str = "prompt",
    template: str | None = None,
    as_chat: bool = False,
    name: str = "the dataset",
) -> Dataset | IterableDataset:
    """The dataset with a `prompt` column that is plain (a string) or conversational (a list of messages) throughout.

    Args:
        dataset: rows to train on. A stream is checked as it is read.
        column: column that holds the prompts; renamed to `prompt`, in whose place it comes.
        template: text put around plain prompts, with "{prompt}" where the prompt goes.
        as_chat: turn each plain prompt into one user message, so that the tokenizer's chat template applies to it.
        name: what errors call the dataset.

    Raises:
        ValueError: an empty dataset, no such column, an empty or malformed prompt (with its row), plain and
            conversational prompts mixed, a template without "{prompt}" or around conversational prompts.

    Example:
        >>> rows = Dataset.from_dict({"problem": ["1 + 1 ="]})
        >>> prepare_prompts(rows, "problem", template="{prompt} Answer briefly.", as_chat=True)["prompt"][0]
        [{'role': 'user', 'content': '1 + 1 = Answer briefly.'}]
    """
    if template is not None and "{prompt}" not in template:
        raise ValueError(f"prompt_template must contain '{{prompt}}', where the prompt goes; got {template!r}.")
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError(f"{name} has no rows: at least one prompt is needed.")
    columns = dataset.column_names
    if columns is not None and column not in columns:
        raise ValueError(
            f"{name} has no column {column!r}, its columns are {', '.join(columns)}."
            f"{nearest(column, columns)} Name the column with prompt_column."
        )
    if column != "prompt":
        if columns is not None and "prompt" in columns:
            dataset = dataset.remove_columns("prompt")
        dataset = renamed(dataset, column, "prompt")
    dataset = as_written(dataset)
    if isinstance(dataset, IterableDataset):

        def read(row: dict[str, Any], index: int) -> dict[str, Any]:
            prompt = _dress(check_prompt(read_stored(row["prompt"]), index, name), template, as_chat, name)
            if _is_chat(prompt):
                check_columns([column for column, value in row.items() if value], name)
            return {"prompt": prompt}

        return dataset.map(read, with_indices=True)
    prompts = dataset["prompt"][:]
    for row, prompt in enumerate(prompts):
        check_prompt(prompt, row, name)
    if as_chat or _is_chat(prompts[0]):
        check_columns(filled_columns(dataset), name)
    if template is None and (not as_chat or _is_chat(prompts[0])):
        return dataset
    return dataset.map(
        lambda row: {"prompt": _dress(row["prompt"], template, as_chat, name)},
        keep_in_memory=True,
        load_from_cache_file=False,
    )


def as_conversations(dataset: Any, column: str) -> Any:
    """The dataset with each text of a column as a user's message; messages and rows without stay as they are.

    Args:
        dataset: a `Dataset` or a stream, which need not have the column.
        column: such as that of a teacher's own prompts.

    Example:
        >>> rows = Dataset.from_dict({"teacher_prompt": ["1 + 1 = 2", None]})
        >>> as_conversations(rows, "teacher_prompt")["teacher_prompt"][:]
        [[{'role': 'user', 'content': '1 + 1 = 2'}], None]
    """

    def dress(row: dict[str, Any]) -> dict[str, Any]:
        value = read_stored(row.get(column))
        return {column: [{"role": "user", "content": value}] if isinstance(value, str) else value}

    if isinstance(dataset, IterableDataset):
        return dataset.map(dress)
    if column not in dataset.column_names:
        return dataset
    return dataset.map(dress, keep_in_memory=True, load_from_cache_file=False)


def check_prompts(dataset: Dataset, name: str, rows: int = 10_000) -> None:
    """Refuse the first row whose prompt no model can be fed with; later rows are looked at in their batch.

    Args:
        dataset: with a `prompt` column.
        name: what errors call it.
        rows: look at so many.

    Raises:
        ValueError: as `check_prompt`.
    """
    first = dataset if len(dataset) <= rows else dataset.select(range(rows))
    for row, prompt in enumerate(values_of(first, "prompt")):
        check_prompt(prompt, row, name)


def check_prompt(prompt: Any, row: int, name: str) -> Any:
    """The prompt, if a model can be fed with it.

    Args:
        prompt: plain or conversational.
        row: where it stands, counting from 0.
        name: what errors call the dataset.

    Raises:
        ValueError: the row, what is wrong with it, and what to do.

    Example:
        >>> check_prompt("1 + 1 =", 0, "the dataset")
        '1 + 1 ='
        >>> check_prompt("", 3, "the dataset")
        Traceback (most recent call last):
        ValueError: the dataset, row 3 (counting from 0): the prompt is empty. Remove the row or fill it in.
    """
    where = f"{name}, row {row} (counting from 0)"
    if is_stored(prompt):
        raise ValueError(f"{where}: the prompt {LOST}")
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError(f"{where}: the prompt is empty. Remove the row or fill it in.")
    elif isinstance(prompt, list):
        if not prompt:
            raise ValueError(f"{where}: the prompt has no messages. Remove the row or fill it in.")
        for message in prompt:
            _check_message(message, where)
        if not any(_says_something(message) for message in prompt):
            raise ValueError(f"{where}: every message of the prompt is empty. Remove the row or fill it in.")
        if is_begun(prompt) and not _has_text(prompt[-1].get("content")):
            raise ValueError(
                f"{where}: the prompt ends with a turn of the assistant, which the student is to go on with, and it "
                "has no text, or blanks alone. Remove the turn or begin it."
            )
    else:
        raise ValueError(
            f"{where}: a prompt is a string or a list of messages, got {prompt!r:.60}. Remove the row or fill it in."
        )
    return prompt


def drop_long_prompts(
    dataset: Dataset, tokenizer: Any, max_prompt_length: int, chat_template_kwargs: dict[str, Any] | None = None
) -> tuple[Dataset, int]:
    """The rows whose prompt has at most `max_prompt_length` tokens, and how many were dropped.

    Args:
        dataset: rows with a `prompt` column, from `prepare_prompts`.
        tokenizer: the student's.
        max_prompt_length: tokens, chat template and generation prompt included.
        chat_template_kwargs: passed to the chat template, as at training time.

    Raises:
        ValueError: every prompt is longer.
    """
    lengths = prompt_lengths(dataset["prompt"][:], tokenizer, chat_template_kwargs)
    kept = [row for row, length in enumerate(lengths) if length <= max_prompt_length]
    if not kept:
        raise ValueError(
            f"every prompt is longer than max_prompt_length = {max_prompt_length} tokens (the shortest has "
            f"{min(lengths)}): raise it."
        )
    return (dataset if len(kept) == len(lengths) else dataset.select(kept)), len(lengths) - len(kept)


def prompt_lengths(
    prompts: Sequence[Any],
    tokenizer: Any,
    chat_template_kwargs: dict[str, Any] | None = None,
    numbers: Sequence[int] | None = None,
) -> list[int]:
    """Tokens of each prompt as the trainer will feed it, chat template and generation prompt included.

    Args:
        prompts: all plain or all conversational.
        tokenizer: the student's.
        chat_template_kwargs: passed to the chat template.
        numbers: see `encode_prompts`.
    """
    return [len(ids) for ids in encode_prompts(prompts, tokenizer, chat_template_kwargs, numbers=numbers)]


def _load_splits(source: str | Path, config: str | None, streaming: bool) -> dict[str, Any]:
    path = Path(source).expanduser()
    if path.is_file():
        dataset = _read_file(path)
        return {"train": streamed(dataset) if streaming else dataset}
    if path.is_dir():
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            loaded = load_from_disk(str(path))
            return dict(loaded) if isinstance(loaded, DatasetDict) else {"train": loaded}
        return dict(load_dataset(str(path), name=config, streaming=streaming))
    if path.suffix in _FILE_SUFFIXES or path.is_absolute() or str(source).startswith((".", "~")):
        siblings = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
        raise FileNotFoundError(f"there is no dataset at {source}.{nearest(path.name, siblings)}")
    try:
        return dict(load_dataset(str(source), name=config, streaming=streaming))
    except (OSError, RuntimeError) as error:  # offline, absent and gated datasets all surface as one of these
        raise ValueError(
            f"{source} is neither a local file nor a dataset that the hub gave: {_first_line(error)} "
            f"Local files end in {', '.join(_FILE_SUFFIXES)}."
        ) from error


def _read_file(path: Path) -> Dataset:
    if path.suffix == ".parquet":
        try:
            return Dataset.from_parquet(str(path))
        # pyarrow and datasets raise what they like of a file that is damaged
        except Exception as error:
            raise ValueError(f"{path} is no Parquet file that can be read: {_first_line(error)}") from error
    if path.suffix not in _FILE_SUFFIXES:
        raise ValueError(f"{path}: prompts are read from {', '.join(_FILE_SUFFIXES)} files, not {path.suffix!r}.")
    text = read_text(path)
    rows = _read_array(path, text) if text.lstrip().startswith("[") else _read_lines(path, text)
    # Column by column: `datasets` would take the columns from the first row alone, and names no row when types differ.
    names = dict.fromkeys(key for row in rows for key in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    for name, values in columns.items():
        _check_one_kind(path, name, values)
    try:
        return dataset_of(columns)
    except (pa.ArrowException, OverflowError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: rows of one column hold values of different types: {_first_line(error)}") from error


def _read_lines(path: Path, text: str) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number}: not valid JSON ({error.msg} at character {error.pos + 1}). A JSONL file "
                "has one object per line."
            ) from error
        except (RecursionError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: no JSON that can be read: {_deep(error)}") from error
        rows.append(_check_object(row, f"{path}, line {number}"))
    return rows


def _read_array(path: Path, text: str) -> list[dict[str, Any]]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}).") from error
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path}: no JSON that can be read: {_deep(error)}") from error
    return [_check_object(row, f"{path}, row {index}") for index, row in enumerate(rows)]


def _deep(error: Exception) -> str:
    return "it is nested too deeply." if isinstance(error, RecursionError) else _first_line(error)


def _check_object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f'{where}: expected an object such as {{"prompt": "..."}}, got {row!r:.60}.')
    try:
        check_values(row)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return row


def _check_one_kind(path: Path, column: str, values: Sequence[Any]) -> None:
    first: dict[str, int] = {}
    for row, value in enumerate(values):
        if isinstance(value, (str, list)):
            first.setdefault("a string" if isinstance(value, str) else "a list", row)
    if len(first) > 1:
        seen = " and ".join(f"{kind} in row {row}" for kind, row in first.items())
        raise ValueError(
            f"{path}: column {column!r} holds {seen} (counting from 0). Prompts are plain (strings) or conversational "
            "(lists of messages), the same in every row."
        )


def _check_message(message: Any, where: str) -> None:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not message["role"]:
        raise ValueError(f"{where}: a message needs a 'role' and a 'content', got {message!r:.80}.")
    content = message.get("content")
    if content is None and not message.get("tool_calls"):
        raise ValueError(f"{where}: a message needs a 'role' and a 'content' (or 'tool_calls'), got {message!r:.80}.")
    blocks = isinstance(content, list) and all(isinstance(block, dict) for block in content)
    if content is not None and not isinstance(content, str) and not blocks:
        raise ValueError(f"{where}: the content of a message is text or a list of blocks, got {content!r:.60}.")


def _says_something(message: dict[str, Any]) -> bool:
    content = message.get("content")
    return bool(message.get("tool_calls")) or (bool(content.strip()) if isinstance(content, str) else bool(content))


def _has_text(content: Any) -> bool:
    if isinstance(content, list):
        return any(_has_text(block.get("text")) for block in content)
    return isinstance(content, str) and bool(content.strip())


def _is_chat(prompt: Any) -> bool:
    return not isinstance(prompt, str)


def _dress(prompt: Any, template: str | None, as_chat: bool, name: str) -> Any:
    if _is_chat(prompt):
        if template is not None:
            raise ValueError(f"prompt_template goes around plain prompts, and those of {name} are conversational.")
        return prompt
    if template is not None:
        # not str.format: templates hold braces of their own, as in \boxed{}
        prompt = template.replace("{prompt}", prompt)
    return [{"role": "user", "content": prompt}] if as_chat else prompt


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def rows_with_images(dataset: Dataset, column: str) -> set[int]:
    """The rows of a column that hold an image, which is not decoded.

    Args:
        dataset: its rows.
        column: one of `IMAGE_COLUMNS`, or the prompts, in whose messages an image may stand.

    Example:
        >>> rows = Dataset.from_dict({"prompt": ["a", "b"], "images": [None, ["picture.png"]]})
        >>> rows_with_images(rows, "images"), rows_with_images(rows, "prompt")
        ({1}, set())
    """
    if column not in IMAGE_COLUMNS:
        prompts = enumerate(map(read_stored, stored_values(dataset, column)))
        return {row for row, prompt in prompts if shows_image(prompt)}
    return {row for row, value in enumerate(stored_values(dataset, column)) if holds_image(value)}


def check_text_alone(dataset: Dataset, name: str, prompts: str = "prompt") -> None:
    """Refuse rows with images where nothing reads them: a model would be asked without what it is asked about.

    Args:
        dataset: its rows.
        name: what errors call it.
        prompts: the column that they are in.

    Raises:
        ValueError: the first such row.
    """
    for column in (prompts, *IMAGE_COLUMNS):
        rows = rows_with_images(dataset, column) if column in dataset.column_names else None
        if rows:
            raise ValueError(
                f"{name}, row {min(rows)} (counting from 0) has an image, and text alone is read here: remove the "
                "images. `tipdistill train` takes them (docs/prompts.md)."
            )


def stored_values(dataset: Dataset, column: str, rows: int = 1000) -> Iterator[Any]:
    """The values of a column, images not decoded."""
    arrow = dataset.select_columns(column).with_format("arrow")
    for start in range(0, len(dataset), rows):
        yield from arrow[start : start + rows][column].to_pylist()


def holds_image(value: Any) -> bool:
    """Whether a value is an image, stored or read: one, a list of them, a struct of bytes and path, or a path."""
    if isinstance(value, list):
        return any(map(holds_image, value))
    if isinstance(value, dict):
        return any(inside is not None for inside in value.values())
    return bool(value) if isinstance(value, str) else value is not None


def shows_image(messages: Any) -> bool:
    """Whether a message of a conversation has a block that is an image or a video; what is no conversation has none."""
    turns = messages if isinstance(messages, list) else []
    contents = [message.get("content") for message in turns if isinstance(message, dict)]
    blocks = [block for content in contents if isinstance(content, list) for block in content]
    return any(isinstance(block, dict) and block.get("type") in _BLOCKS for block in blocks)
