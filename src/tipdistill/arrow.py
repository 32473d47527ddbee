"""Rows out of Arrow as they were written.

Arrow gives all values of a column one type. Where one message has a key that another lacks, such as the arguments of
two tool calls, it gives both the key and fills the gap with null; a chat template then prints a null that nobody
wrote. Columns of a file that hold objects are therefore kept as JSON text and read when a row is. (`datasets` has a
type for this, `Json`, which rounds numbers to ten digits.) In a dataset that is in Arrow already nobody can tell a
null that was written from one that fills a gap: there keys with null are taken as absent.

What is stored as JSON text begins with a mark, so that it is never taken for a prompt: `datasets` drops the transform
that reads it when datasets are joined, written to a file or given another format. `as_written` puts it back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, IterableDataset, LargeList, List

Rows = dict[str, list[Any]]
_MARK = "\x01tipdistill-json:"  # U+0001 begins no text that was written to be read
LOST = (
    "is the text that load_prompts stores of a conversation, and what reads it was lost: give the dataset of "
    "load_prompts as it is, or call prepare_prompts on what you made of it."
)


class AsWritten:
    """A transform of a `Dataset`: columns of JSON text are read, and null keys of Arrow's structs are left out.

    Args:
        texts: names of the columns that hold JSON.
        structs: column → its feature, for columns whose structs may have gained nulls.
        before: a transform that the dataset had.
    """

    def __init__(
        self,
        texts: Sequence[str] = (),
        structs: dict[str, Any] | None = None,
        before: Callable[..., Rows] | None = None,
    ) -> None:
        self.texts, self.structs, self.before = tuple(texts), structs or {}, before

    def __call__(self, batch: Rows) -> Rows:
        if self.before is not None:
            batch = self.before(batch)
        read = {name: list(map(read_stored, batch[name])) for name in self.texts if name in batch}
        exact = {
            name: [without_gained_nulls(value, feature) for value in batch[name]]
            for name, feature in self.structs.items()
            if name in batch
        }
        return {**batch, **read, **exact}

    def renamed(self, old: str, new: str) -> AsWritten:
        """The same of a dataset whose column has another name."""
        return AsWritten([new if name == old else name for name in self.texts], self.structs, self.before)


def is_stored(value: Any) -> bool:
    """Whether a value is JSON text as it is stored, of a dataset that lost what reads it.

    Example:
        >>> rows = dataset_of({"call": [{"a": 1}]})
        >>> is_stored(rows[0]["call"]), is_stored(rows.with_format(None)[0]["call"])
        (False, True)
    """
    return isinstance(value, str) and value.startswith(_MARK)


def read_stored(value: Any) -> Any:
    """The value that is stored as JSON text, or the value itself where it is stored as it is."""
    return json.loads(value.removeprefix(_MARK)) if is_stored(value) else value


def dataset_of(columns: dict[str, list[Any]]) -> Dataset:
    """A dataset whose rows are the values given, keys that are absent in one row and not in another included.

    Args:
        columns: name → a value for each row, as JSON has them.

    Raises:
        pyarrow.ArrowInvalid, pyarrow.ArrowTypeError: a column without objects holds values of different types.

    Example:
        >>> dataset_of({"call": [{"a": 1}, {"city": "X", "at": None}]})["call"][:]
        [{'a': 1}, {'city': 'X', 'at': None}]
    """
    texts = [name for name, values in columns.items() if any(map(_holds_object, values))]
    stored = {
        name: [_MARK + json.dumps(value) for value in values] if name in texts else values
        for name, values in columns.items()
    }
    dataset = Dataset.from_dict(stored)
    return dataset.with_transform(AsWritten(texts)) if texts else dataset


def renamed(dataset: Any, old: str, new: str) -> Any:
    """The dataset with another name for a column."""
    transform = _transform(dataset)
    dataset = dataset.rename_column(old, new)
    return dataset.with_transform(transform.renamed(old, new)) if isinstance(transform, AsWritten) else dataset


def streamed(dataset: Dataset) -> IterableDataset:
    """The dataset as a stream of the same rows."""
    transform = _transform(dataset)
    if transform is None:
        return dataset.to_iterable_dataset()
    plain = dataset.with_format(None).to_iterable_dataset()

    def read(row: dict[str, Any]) -> dict[str, Any]:
        return {name: value[0] for name, value in transform({name: [value] for name, value in row.items()}).items()}

    return plain.map(read)


def as_written(dataset: Any, column: str = "prompt") -> Any:
    """A dataset, or several by name, without the nulls that Arrow put into the structs of a column; stored JSON read.

    Args:
        dataset: a `Dataset`, a stream, a dictionary of them, or None.
        column: which.

    Example:
        >>> calls = Dataset.from_dict({"prompt": [[{"a": 1}], [{"city": "X"}]]})
        >>> calls[0], as_written(calls)[0]
        ({'prompt': [{'a': 1, 'city': None}]}, {'prompt': [{'a': 1}]})
    """
    if isinstance(dataset, dict):
        return {name: as_written(part, column) for name, part in dataset.items()}
    features = getattr(dataset, "features", None)
    if isinstance(dataset, Dataset) and column in dataset.features and _holds_stored(dataset, column):
        before = _transform(dataset)
        if isinstance(before, AsWritten) and column in before.texts:
            return dataset
        return dataset.with_transform(AsWritten([column], before=before))
    if not features or column not in features or not _holds_struct(features[column]):
        return dataset
    structs = {column: features[column]}
    if isinstance(dataset, IterableDataset):
        return dataset.map(lambda row: {column: without_gained_nulls(row[column], structs[column])})
    before = _transform(dataset)
    if isinstance(before, AsWritten) and column in (*before.structs, *before.texts):
        return dataset
    return dataset.with_transform(AsWritten((), structs, before))


def without_gained_nulls(value: Any, feature: Any) -> Any:
    """A value without the null keys of those of its objects that are Arrow's structs.

    Args:
        value: of a row.
        feature: its type; inside of `Json` every null was written.

    Example:
        >>> from datasets import Value
        >>> without_gained_nulls({"a": 1, "city": None}, {"a": Value("int64"), "city": Value("string")})
        {'a': 1}
    """
    if isinstance(feature, dict) and isinstance(value, dict):
        return {
            name: without_gained_nulls(inside, feature.get(name))
            for name, inside in value.items()
            if inside is not None
        }
    inner = _of_elements(feature)
    if inner is not None and isinstance(value, list):
        return [without_gained_nulls(inside, inner) for inside in value]
    return value


def _holds_stored(dataset: Dataset, column: str) -> bool:
    if getattr(dataset.features[column], "dtype", None) not in ("string", "large_string"):
        return False
    return bool(pc.any(pc.starts_with(dataset.data.column(column), _MARK)).as_py())


def values_of(dataset: Dataset, column: str) -> list[Any]:
    """The values of a column; no image beside it is decoded, unless for a transform of the user's.

    Example:
        >>> values_of(dataset_of({"prompt": [[{"role": "user"}]], "n": [1]}), "prompt")
        [[{'role': 'user'}]]
    """
    transform = _transform(dataset)
    if transform is None or (isinstance(transform, AsWritten) and transform.before is None):
        dataset = dataset.select_columns(column)
    return dataset[column][:]


def _of_elements(feature: Any) -> Any:
    if isinstance(feature, (List, LargeList)):
        return feature.feature
    return feature[0] if isinstance(feature, list) else None


def _holds_struct(feature: Any) -> bool:
    if isinstance(feature, dict):
        return True
    inner = _of_elements(feature)
    return inner is not None and _holds_struct(inner)


def _holds_object(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and any(map(_holds_object, value)))


def _transform(dataset: Any) -> Callable[..., Rows] | None:
    described = getattr(dataset, "format", None) or {}
    return described.get("format_kwargs", {}).get("transform") if described.get("type") == "custom" else None
