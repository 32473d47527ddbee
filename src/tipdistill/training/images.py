"""Rows with images beside rows of text: what is refused before weights are loaded, and what TRL is handed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from datasets import Dataset
from transformers import ProcessorMixin

from ..arrow import read_stored
from ..chat import check_columns, is_begun
from ..data import check_prompt, check_prompts
from ..select import resolve_rule

COLUMNS = ("images", "image")
_BLOCKS = ("image", "image_url", "video")


def prepared(dataset: Any, name: str, args: Any, processing_class: Any) -> Any:
    """A dataset whose rows can be trained on; an image column without any image is no column.

    Args:
        dataset: a `Dataset`, several by name, a stream (whose rows are looked at as they come) or None.
        name: what errors call it.
        args: the `TIPConfig` of the run.
        processing_class: the student's tokenizer or processor.

    Raises:
        ValueError: the first row whose prompt, image or last turn this run cannot take.
    """
    sees = isinstance(processing_class, ProcessorMixin)
    if sees and args.rollout_ahead:
        raise ValueError("rollout_ahead = 1 is for students that read text alone: leave it out for one with images.")
    if isinstance(dataset, dict):
        return {part: prepared(rows, f"{name}[{part!r}]", args, processing_class) for part, rows in dataset.items()}
    if not isinstance(dataset, Dataset):
        return dataset
    check_prompts(dataset, name)
    plain = isinstance(dataset[0]["prompt"], str)
    with_image = set()
    for column in COLUMNS:
        if column in dataset.column_names:
            rows = [row for row, value in enumerate(_stored(dataset, column)) if _holds_image(value)]
            if not rows:
                dataset = dataset.remove_columns(column)
            with_image |= set(rows[:1])
    if not plain:
        for row, prompt in enumerate(_stored(dataset, "prompt")):
            messages = read_stored(prompt)
            if sees and is_begun(messages):
                raise ValueError(
                    f"{name}, row {row} (counting from 0): the prompt ends with a turn of the assistant, which a model "
                    "that sees images cannot go on with here: end it with the user's turn."
                )
            if not with_image and _shows(messages):
                with_image.add(row)
    if with_image:
        reason = _obstacle(args, sees, plain)
        if reason:
            raise ValueError(f"{name}, row {min(with_image)} (counting from 0) has an image, and {reason}")
    return dataset


def with_images(inputs: list[dict[str, Any]], args: Any, processing_class: Any) -> list[dict[str, Any]]:
    """Rows of a batch as TRL reads them: a list of images each, and none at all where no row has one.

    Args:
        inputs: rows of the dataset.
        args, processing_class: as in `prepared`.

    Raises:
        ValueError: a prompt, an image or a column that this run cannot take, as a stream may show.
    """
    of_rows = []
    for index, row in enumerate(inputs):
        if not isinstance(check_prompt(row["prompt"], index, "the batch"), str):
            check_columns([column for column, value in row.items() if value], "the dataset")
        images = row.get("images")
        if images is None:
            images = [row["image"]] if row.get("image") is not None else []
        of_rows.append(list(images))
    sees, plain = isinstance(processing_class, ProcessorMixin), isinstance(inputs[0]["prompt"], str)
    with_image = [
        row
        for row, (images, given) in enumerate(zip(of_rows, inputs, strict=True))
        if images or (not isinstance(given["prompt"], str) and _shows(given["prompt"]))
    ]
    if with_image:
        reason = _obstacle(args, sees, plain)
        if reason:
            raise ValueError(f"row {with_image[0]} of the batch (counting from 0) has an image, and {reason}")
    if not any(column in row for row in inputs for column in COLUMNS):
        return inputs
    rest = [{name: value for name, value in row.items() if name not in COLUMNS} for row in inputs]
    if not any(of_rows):
        return rest
    return [{**row, "images": images} for row, images in zip(rest, of_rows, strict=True)]


def _obstacle(args: Any, sees: bool, plain: bool) -> str | None:
    if not sees:
        return "the student reads text alone: remove the images, or train a model that sees."
    if plain:
        return "its prompt is plain: give conversational prompts (lists of messages)."
    keeps_all = resolve_rule(args.selection_rule).budget == "all" and not args.teacher_offload
    if args.teacher_url is not None or (args.normalization != "micro_batch" and not keeps_all):
        return (
            f'normalization="{args.normalization}" does not score multimodal inputs yet. Use '
            'normalization="micro_batch" with a local teacher, which scores inside the loss.'
        )
    return None


def _stored(dataset: Dataset, column: str, rows: int = 1000) -> Iterator[Any]:
    """The values of a column, images not decoded."""
    arrow = dataset.select_columns(column).with_format("arrow")
    for start in range(0, len(dataset), rows):
        yield from arrow[start : start + rows][column].to_pylist()


def _holds_image(value: Any) -> bool:
    """Whether what is stored is an image: a list of them, a struct of bytes and path, or a path."""
    if isinstance(value, list):
        return any(map(_holds_image, value))
    if isinstance(value, dict):
        return any(inside is not None for inside in value.values())
    return value is not None


def _shows(messages: Any) -> bool:
    return any(
        isinstance(block, dict) and block.get("type") in _BLOCKS
        for message in messages
        for block in (message.get("content") if isinstance(message.get("content"), list) else ())
    )
