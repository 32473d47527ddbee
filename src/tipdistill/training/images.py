"""Rows with images beside rows of text: what is refused before weights are loaded, and what TRL is handed."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from transformers import ProcessorMixin

from ..arrow import read_stored
from ..chat import check_columns, is_begun
from ..data import IMAGE_COLUMNS, check_prompt, check_prompts, holds_image, rows_with_images, shows_image, stored_values
from ..integrations._accelerate import shards_weights
from ..teachers.named import SELF, named_teachers
from .lengths import configuration_of


def text_alone(teacher_model: Any, args: Any, processing_class: Any) -> str | None:
    """Which model of a run reads text alone, and the remedy, as an error goes on; None: all of them see images.

    Args:
        teacher_model: a model, a directory, a hub id or "self"; several by name; or None where `args` names others.
        args: the `TIPConfig` of the run.
        processing_class: the student's tokenizer or processor.
    """
    if not isinstance(processing_class, ProcessorMixin):
        return "the student reads text alone: remove the images, or train a model that sees."
    for one in named_teachers(teacher_model, args):
        if one.args.teacher_url is not None:
            return f"the {one.called} is behind a server, which is sent text alone: remove the images, or load it here."
        if isinstance(one.model, str) and one.model == SELF:
            continue
        given = {"revision": one.args.teacher_model_revision, **dict(one.args.teacher_model_init_kwargs or {})}
        config = configuration_of(one.model, given, args.trust_remote_code)
        if config is not None and getattr(config, "vision_config", None) is None:
            return f"the {one.called} reads text alone: remove the images, or take one that sees."
    return None


def prepared(dataset: Any, name: str, args: Any, processing_class: Any, blind: str | None) -> Any:
    """A dataset whose rows can be trained on; an image column without any image is no column.

    Args:
        dataset: a `Dataset`, several by name, a stream (whose rows are looked at as they come) or None.
        name: what errors call it.
        args: the `TIPConfig` of the run.
        processing_class: the student's tokenizer or processor.
        blind: see `text_alone`.

    Raises:
        ValueError: the first row whose prompt, image or last turn this run cannot take.
    """
    sees = isinstance(processing_class, ProcessorMixin)
    if sees and args.rollout_ahead:
        raise ValueError("rollout_ahead = 1 is for students that read text alone: leave it out for one with images.")
    if isinstance(dataset, dict):
        return {
            part: prepared(rows, f"{name}[{part!r}]", args, processing_class, blind) for part, rows in dataset.items()
        }
    if not isinstance(dataset, Dataset):
        return dataset
    check_prompts(dataset, name)
    plain = isinstance(dataset.select_columns("prompt")[0]["prompt"], str)
    with_image: set[int] = set()
    for column in IMAGE_COLUMNS:
        if column in dataset.column_names:
            rows = rows_with_images(dataset, column)
            if not rows:
                dataset = dataset.remove_columns(column)
            with_image |= rows
    if sees and not plain:
        for row, prompt in enumerate(stored_values(dataset, "prompt")):
            if is_begun(read_stored(prompt)):
                raise ValueError(
                    f"{name}, row {row} (counting from 0): the prompt ends with a turn of the assistant, which a model "
                    "that sees images cannot go on with here: end it with the user's turn."
                )
    if not plain:
        with_image |= rows_with_images(dataset, "prompt")
    if with_image:
        _check_seen(f"{name}, row {min(with_image)}", plain, blind)
        without = next((row for row in range(len(dataset)) if row not in with_image), None)
        if without is not None and shards_weights():
            raise ValueError(
                f"{name}, row {min(with_image)} (counting from 0) has an image and row {without} has none: where FSDP "
                "or ZeRO-3 shards the part that sees, all processes run it together, so give every row an image."
            )
    return dataset


def with_images(inputs: list[dict[str, Any]], blind: str | None) -> list[dict[str, Any]]:
    """Rows of a batch as TRL reads them: a list of images each, and none at all where no row has one.

    Args:
        inputs: rows of the dataset.
        blind: see `text_alone`.

    Raises:
        ValueError: a prompt, an image or a column that this run cannot take, as a stream may show.
    """
    of_rows = []
    for index, row in enumerate(inputs):
        if not isinstance(check_prompt(row["prompt"], index, "the batch"), str):
            check_columns([column for column, value in row.items() if value], "the dataset")
        images = row.get("images")
        if images is None:
            images = [row["image"]] if "image" in row else []
        of_rows.append(list(filter(holds_image, images)))
    with_image = [
        row
        for row, (images, given) in enumerate(zip(of_rows, inputs, strict=True))
        if images or shows_image(given["prompt"])
    ]
    if with_image:
        _check_seen(f"row {with_image[0]} of the batch", isinstance(inputs[0]["prompt"], str), blind)
    if not any(column in row for row in inputs for column in IMAGE_COLUMNS):
        return inputs
    rest = [{name: value for name, value in row.items() if name not in IMAGE_COLUMNS} for row in inputs]
    if not any(of_rows):
        return rest
    return [{**row, "images": images} for row, images in zip(rest, of_rows, strict=True)]


def _check_seen(row: str, plain: bool, blind: str | None) -> None:
    reason = blind
    if reason is None and plain:
        reason = "its prompt is plain: give conversational prompts (lists of messages)."
    if reason is not None:
        raise ValueError(f"{row} (counting from 0) has an image, and {reason}")
