"""Which teachers a run names: one, or several by name, each with what is said of it alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from ..arrow import values_of
from ..documents import parse_mapping
from ..http import server_url, variable_name
from ..text import near_names, nearest

SELF = "self"  # as a teacher's name: the student
DEFAULT = "default"
# what an entry of `teachers` may say → the field that says it of a teacher that is the only one
ENTRY = {
    "model": "teacher_model_name_or_path",
    "revision": "teacher_model_revision",
    "url": "teacher_url",
    "served_name": "teacher_served_name",
    "top_k": "teacher_top_k",
    "api_key_env": "teacher_api_key_env",
    "lm_head": "teacher_lm_head",
}
_OF_SERVERS = ("served_name", "top_k", "api_key_env", "lm_head")


@dataclass(frozen=True)
class NamedTeacher:
    """A teacher that a run names, before it is loaded.

    Attributes:
        name: the key in `teachers`; "" where there is one teacher.
        model: a model, a directory, a hub id or "self"; None where a server holds it.
        args: the `TIPConfig`, as if this teacher were the only one.
    """

    name: str
    model: Any
    args: Any

    @property
    def called(self) -> str:
        """As errors and records call it: "teacher", or "teacher maths"."""
        return f"teacher {self.name}".strip()


def read_teachers(value: Any, where: str = "teachers") -> dict[str, dict[str, Any]] | None:
    """The entries of `teachers`, each as a mapping of what `ENTRY` has; None stays.

    Args:
        value: name → a directory, a hub id, "self", a server's address, a model, or a mapping of these; or JSON text.
        where: what errors call it.

    Raises:
        ValueError: no mapping, an empty one, a key that no entry has (the nearest is given), or an entry that names no
            teacher, or two.

    Example:
        >>> read_teachers({"maths": "Qwen/Qwen3-8B", "code": "http://localhost:8001/v1"})
        {'maths': {'model': 'Qwen/Qwen3-8B'}, 'code': {'url': 'http://localhost:8001/v1'}}
    """
    if isinstance(value, str):
        value = parse_mapping(value, where)
    if value is None:
        return None
    if not isinstance(value, Mapping) or not all(isinstance(name, str) and name.strip() for name in value):
        raise ValueError(f"{where} must map names to teachers, such as {{maths: Qwen/Qwen3-8B}}, got {value!r:.60}.")
    if not value:
        raise ValueError(f"{where} names no teacher: give at least one, or leave it out.")
    return {name: _read_entry(entry, f"{where}: {name}") for name, entry in value.items()}


def _read_entry(entry: Any, where: str) -> dict[str, Any]:
    if isinstance(entry, str):
        entry = {"url" if entry.startswith(("http://", "https://")) else "model": entry}
    elif not isinstance(entry, Mapping):
        if not hasattr(entry, "get_output_embeddings"):
            raise ValueError(f"{where} must be a directory, a hub id or a server's address, got {entry!r:.60}.")
        entry = {"model": entry}
    for key in entry:
        if key not in ENTRY:
            raise ValueError(f"{where} has no {key!r}, but {', '.join(ENTRY)}.{nearest(str(key), ENTRY)}")
    given = {key: value for key, value in entry.items() if value is not None}
    if ("model" in given) == ("url" in given):
        raise ValueError(f"{where} must name a model or a url, and not both.")
    for key in ("model", "revision", "url", "served_name", "api_key_env", "lm_head"):
        named = given.get(key, "-")
        if not (isinstance(named, str) and named.strip()) and (key != "model" or isinstance(named, str | int | float)):
            raise ValueError(f"{where}: {key} must be a text, got {named!r:.60}.")
    for key in _OF_SERVERS if "model" in given else () if "lm_head" in given else ("revision",):
        if key in given:
            raise ValueError(f"{where}: {key} is for a {'server' if 'model' in given else 'model'}: leave it out.")
    if "url" in given:
        given["url"] = server_url(f"{where}: url", given["url"])
    if "api_key_env" in given:
        variable_name(f"{where}: api_key_env", given["api_key_env"])
    return given


def named_teachers(teacher_model: Any, args: Any) -> list[NamedTeacher]:
    """The teachers of a run, in the order in which they are named; one, with no name, where there is one.

    Args:
        teacher_model: a model, a directory, a hub id or "self"; a mapping of names to these; or None.
        args: the `TIPConfig`, whose `teachers` or `teacher_url` name others.

    Raises:
        ValueError: as `read_teachers`.
    """
    several, where = (
        (teacher_model, "teacher_model") if isinstance(teacher_model, Mapping) else (args.teachers, "teachers")
    )
    entries = read_teachers(several, where)
    if entries is None:
        return [NamedTeacher("", teacher_model, args)]
    return [_named(name, entry, args) for name, entry in entries.items()]


def _named(name: str, entry: dict[str, Any], args: Any) -> NamedTeacher:
    own = copy.copy(args)
    own.teachers = None
    for key, field in ENTRY.items():
        if key != "top_k" or key in entry:  # which all servers may share
            setattr(own, field, entry.get(key))
    model = entry.get("model")
    if not isinstance(model, str):
        own.teacher_model_name_or_path = own.teacher_model_init_kwargs = None
    elif "revision" in entry:
        own.teacher_model_init_kwargs = {**dict(args.teacher_model_init_kwargs or {}), "revision": entry["revision"]}
    if model is None:
        own.teacher_offload = False
    return NamedTeacher(name, model, own)


def number_of(row: Mapping[str, Any], names: list[str], column: str, where: str) -> int:
    """Which of several teachers a row of the dataset is for.

    Args:
        row: of the dataset.
        names: of the teachers.
        column: that names the teacher; a row without goes to the one called "default".
        where: what errors call the row.

    Raises:
        ValueError: the row names no teacher, or one that there is not (the nearest is given).

    Example:
        >>> number_of({"teacher": "code"}, ["maths", "code"], "teacher", "row 0")
        1
    """
    name = row.get(column)
    if name is None or name == "":
        if DEFAULT in names:
            return names.index(DEFAULT)
        raise ValueError(
            f"{where} names no teacher in its column {column!r}: name one of {', '.join(names)}, or give `teachers` "
            f"one that is called {DEFAULT}."
        )
    if name not in names:
        near = near_names(str(name), names)
        raise ValueError(
            f"{where} names the teacher {str(name)[:60]!r} in its column {column!r}, and there are "
            f"{', '.join(names)}.{f' Did you mean {near[0]}?' if near else ''}"
        )
    return names.index(name)


def check_teacher_names(dataset: Any, name: str, names: list[str], column: str) -> None:
    """Refuse a dataset with a row that names none of several teachers; of a stream, one without the column.

    Args:
        dataset: a `Dataset` or a stream.
        name: what errors call it.
        names, column: see `number_of`.

    Raises:
        ValueError: the first such row, or the missing column, with the nearest.
    """
    columns = dataset.column_names
    if columns is not None and column not in columns and DEFAULT not in names:
        raise ValueError(
            f"{name} has no column {column!r} that says which of the teachers ({', '.join(names)}) a row is for; its "
            f"columns are {', '.join(columns)}. Add it, name another (teacher_column), or call one teacher {DEFAULT}."
            f"{nearest(column, columns)}"
        )
    if isinstance(dataset, Dataset) and column in dataset.column_names:
        for row, value in enumerate(values_of(dataset, column)):
            number_of({column: value}, names, column, f"{name}, row {row} (counting from 0)")


@dataclass(frozen=True)
class Update:
    """How a teacher that is the student follows it.

    Attributes:
        kind: "frozen", "base", "ema" or "every".
        value: the decay of "ema", the steps of "every", else 0.
    """

    kind: str
    value: float = 0.0


def read_update(text: Any) -> Update:
    """What `teacher_update` says.

    Args:
        text: "frozen", "base", "ema:<decay>" or "every:<steps>".

    Raises:
        ValueError: anything else.

    Example:
        >>> read_update("ema:0.999"), read_update("every:100")
        (Update(kind='ema', value=0.999), Update(kind='every', value=100.0))
    """
    kind, colon, value = str(text).partition(":")
    if not colon and kind in ("frozen", "base"):
        return Update(kind)
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if kind == "ema" and 0 < number < 1:
        return Update(kind, number)
    if kind == "every" and number >= 1 and number == int(number):
        return Update(kind, number)
    raise ValueError(
        f"teacher_update must be frozen, base, ema:<decay between 0 and 1> or every:<steps>, such as ema:0.999 or "
        f"every:100, got {text!r:.60}."
    )
