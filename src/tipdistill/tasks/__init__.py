"""Tasks: problems with a way to tell whether a response is right, to distil on and to measure.

A task of your own is an entry of `TASKS`, or a mapping in a file of yours, my_tasks.py:

    SUMS = {
        "problems": [("1 + 1 =", "2"), ("2 + 3 =", "5")],  # or "dataset": a hub id, with "split", "problem", "answer"
        "prompt": "own",  # the problem as it stands; "boxed" asks for the answer in a box
        "check": lambda response, answer: response.strip() == answer,  # left out: math-verify compares them
    }

    tipdistill eval --tasks my_tasks.SUMS --model ... --output_dir ...  # my_tasks.py's folder is on PYTHONPATH

The mapping's keys are the fields of `Task` and where the problems come from. `load_task` reads files and slices too:
`mine.jsonl`, `math500=copy.jsonl` (a local copy of a known task), `math500[:100]`, `deepplanning=DIR` (a task whose
problems are in a directory). `reverse_kl=heldout.jsonl` has no
answers: it measures how far a student that trains is from its teacher on what it writes to these prompts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from .. import dotted
from ..arrow import as_written
from ..data import check_text_alone, load_rows
from ..environments.deepplanning import prompts as deepplanning
from ..environments.deepplanning.converter import named as named_converter
from ..evaluate.task import DIVERGENCES, Problem, Task
from ..text import nearest
from . import instructions

__all__ = ["TASKS", "load_task"]

PROBLEM_COLUMNS = ("problem", "question", "prompt")
# modules beside this one with a `TASK`, which has its own models and prompts, see `tipdistill.tasks.written`
WRITTEN_TASKS = ("arithmetic", "modular", "machine")
_SUFFIXES = (".jsonl", ".json", ".parquet")
_OF_TASK = {field.name for field in fields(Task)} - {"name", "problems"}
_SLICE = re.compile(r"(.+)\[(\d*):(\d*)\]")
_OF_SOURCE = {"dataset", "config", "split", "problem", "answer", "reference", "problems", "directory"}


def _written(name: str) -> Callable[[], dict[str, Any]]:
    """An entry of `TASKS` for a `WrittenTask`, imported (with torch and transformers) when it is asked for."""
    return lambda: import_module(f".{name}", __name__).TASK.evaluation()


def _trip() -> Task:
    """The planning task, imported (with torch and transformers) when it is asked for."""
    return import_module(".trip", __name__).evaluation()


def _deepplanning(language: str, split: str) -> dict[str, Any]:
    """An entry of `TASKS` whose problems are in a directory of the user's: deepplanning=DIR."""

    def read(directory: str) -> tuple[Problem, ...]:
        rows = deepplanning.rows(directory, language, split)
        # who reads the plans is told beside each problem, so that no samples of another are taken for these
        converter = {"converter": list(named_converter() or [])}
        return tuple(Problem(row["prompt"], row["id"], row | converter) for row in rows)

    return {"directory": read, "prompt": "own", "environment": deepplanning.ENVIRONMENT}


def _after_hashes(row: Mapping[str, Any]) -> str:
    return row["answer"].rpartition("####")[2].strip()


# name: a mapping of `Task`'s fields, with "problems" or a hub dataset, or a function that returns one.
TASKS: dict[str, Mapping[str, Any] | Callable[[], Any] | Task] = {
    "math500": {"dataset": "HuggingFaceH4/MATH-500", "split": "test"},
    "aime24": {"dataset": "HuggingFaceH4/aime_2024", "split": "train"},
    "aime25": {"dataset": "math-ai/aime25", "split": "test"},
    "gsm8k": {
        "dataset": "openai/gsm8k",
        "config": "main",
        "split": "test",
        "problem": "question",
        "reference": _after_hashes,
    },
    # with prompts of your own: reverse_kl=heldout.jsonl
    **{name: {"divergence": name, "prompt": "own"} for name in DIVERGENCES},
    **{name: _written(name) for name in WRITTEN_TASKS},
    "trip": _trip,
    "use_word": instructions.use_word,
    "capitals": instructions.capitals,
    "deepplanning": _deepplanning("en", "test"),
    "deepplanning_zh": _deepplanning("zh", "test"),
    "deepplanning_train": _deepplanning("en", "train"),
    "deepplanning_zh_train": _deepplanning("zh", "train"),
}


def load_task(name: str, limit: int | None = None, **changes: Any) -> Task:
    """A task by name, file or dotted path.

    Args:
        name: a key of `TASKS`; a JSONL, JSON or Parquet file with a column "problem" (or "question", "prompt") and a
            column "answer"; "key=file", the task `key` with the problems of a file; or the dotted path of a task.
            "reverse_kl=file" and "forward_kl=file" need no answers. With a slice, "name[first:end]", these of its
            problems, counted from 0.
        limit: take the first so many problems; None: all.
        changes: fields of `Task` that replace the task's own; None leaves them.

    Raises:
        ValueError: an unknown name (the nearest are given), a mapping or a row that makes no task (with its number).
        FileNotFoundError: no such file.

    Example:
        >>> task = load_task("arithmetic", limit=2)
        >>> task.check("...>12345$", "12345"), len(task.problems)
        (True, 2)
    """
    if not dotted.imports() and is_code(name):
        _imported(_path(name))
        return _changed(
            Task(name, (Problem(name, "-"),), prompt="own"), None, changes
        )  # how long its own are is unknown
    sliced = _SLICE.fullmatch(name)
    if sliced:
        first, end = (int(number) if number else None for number in sliced.groups()[1:])
        task = load_task(sliced[1])
        kept = task.problems[first:end]
        if not kept:
            raise ValueError(f"{name} takes none of the {len(task.problems)} problems of {sliced[1]!r}.")
        return _changed(replace(task, name=name, problems=kept), limit, changes)
    key, equals, path = name.partition("=")
    acts = {"environment": changes["environment"]} if changes.get("environment") else {}
    if equals and not path:
        raise ValueError(f"{name} names no file: {key}=FILE.jsonl is the task {key!r} with the problems of a file.")
    if equals:
        source = {**_mapping(key, TASKS.get(key, {})), "dataset": path, "split": "train", **acts}
        task = _from_mapping(key, source, local=True)
        if task.divergence is not None:  # held-out prompts and those for validation are measured side by side
            task = replace(task, name=f"{key}_{Path(path).stem}")
    elif key in TASKS:
        task = _from_object(key, TASKS[key])
    elif Path(key).suffix in _SUFFIXES:
        task = _from_mapping(Path(key).stem, {"dataset": key, "split": "train", **acts}, local=True)
    else:
        task = _from_object(key, _imported(key))
    return _changed(task, limit, changes)


def is_code(name: str) -> bool:
    """Whether a task is named by a dotted path outside of tipdistill, whose module runs when it is imported.

    Example:
        >>> [is_code(name) for name in ("math500[:9]", "mine.jsonl", "math500=mine.jsonl", "mine.TASK[:9]")]
        [False, False, False, True]
    """
    path = _path(name)
    known = "=" in path or path in TASKS or Path(path).suffix in _SUFFIXES or path.startswith("tipdistill.")
    return not known and dotted.is_dotted(path)


def _path(name: str) -> str:
    while sliced := _SLICE.fullmatch(name):
        name = sliced[1]
    return name


def _changed(task: Task, limit: int | None, changes: dict[str, Any]) -> Task:
    if limit is not None:
        if limit < 1:
            raise ValueError(f"limit is a number of problems, at least 1, got {limit}.")
        task = replace(task, problems=task.problems[:limit])
    return replace(task, **{field: value for field, value in changes.items() if value is not None})


def _from_object(name: str, source: Any) -> Task:
    source = source if isinstance(source, (Task, Mapping)) or not callable(source) else source()
    if isinstance(source, Task):
        return source
    return _from_mapping(name, _mapping(name, source))


def _mapping(name: str, mapping: Any) -> Mapping[str, Any]:
    mapping = mapping if isinstance(mapping, Mapping) or not callable(mapping) else mapping()
    if not isinstance(mapping, Mapping):
        raise ValueError(f"the task {name!r} is a {type(mapping).__name__}, not a Task or a mapping of its fields.")
    known = sorted(_OF_TASK | _OF_SOURCE)
    for key in mapping:
        if key not in known:
            raise ValueError(f"the task {name!r} has an unknown field {key!r}.{nearest(key, known)}")
    return mapping


def _from_mapping(name: str, mapping: Mapping[str, Any], local: bool = False) -> Task:
    if "directory" in mapping:
        if not local:
            raise ValueError(f"the task {name!r} needs a directory: {name}=DIR takes its problems from there.")
        problems = mapping["directory"](mapping["dataset"])
    elif "dataset" in mapping:
        rows = load_rows(mapping["dataset"], mapping.get("split", "test"), None if local else mapping.get("config"))
        problems = _of_rows(str(mapping["dataset"]), rows, mapping)
    elif "problems" in mapping:
        problems = tuple(_problem(name, index, *pair) for index, pair in enumerate(mapping["problems"]))
    elif mapping.get("divergence"):
        raise ValueError(f"the task {name!r} needs prompts: {name}=FILE.jsonl takes those of a file.")
    else:
        raise ValueError(f"the task {name!r} needs 'problems', pairs of problem and answer, or a 'dataset'.")
    return Task(name, problems, **{key: value for key, value in mapping.items() if key in _OF_TASK})


def _of_rows(source: str, rows: Any, mapping: Mapping[str, Any]) -> tuple[Problem, ...]:
    columns = rows.column_names
    problem = _column(source, columns, (mapping.get("problem"), *PROBLEM_COLUMNS))
    rows = as_written(rows, problem)
    check_text_alone(rows, source, problem)
    if mapping.get("divergence"):
        return tuple(_problem(source, index, row[problem], "-") for index, row in enumerate(rows))
    if mapping.get("environment"):
        return tuple(
            replace(_problem(source, index, row[problem], "-"), row=dict(row)) for index, row in enumerate(rows)
        )
    answer = _column(source, columns, (mapping.get("answer"), "answer"))
    reference = mapping.get("reference")
    problems = []
    for index, row in enumerate(rows):
        value = row[answer]
        if reference is not None and isinstance(value, str) and "####" in value:
            value = reference(row)
        problems.append(_problem(source, index, row[problem], value))
    return tuple(problems)


def _column(source: str, columns: Sequence[str], wanted: Sequence[str | None]) -> str:
    names = [name for name in dict.fromkeys(wanted) if name is not None]
    for name in names:
        if name in columns:
            return name
    raise ValueError(
        f"{source} has no column {' or '.join(map(repr, names))}, its columns are {', '.join(columns)}."
        f"{nearest(names[0], columns)}"
    )


def _problem(source: str, index: int, text: Any, answer: Any) -> Problem:
    where = f"{source}, row {index} (counting from 0)"
    if isinstance(text, str):
        plain = text
    elif isinstance(text, list) and text and all(isinstance(message, Mapping) for message in text):
        plain = text[-1].get("content")
    else:
        plain = None
    if not isinstance(plain, str) or not plain.strip():
        raise ValueError(f"{where}: a problem is a text, or a list of messages, that is not empty; got {text!r:.60}.")
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)) or not str(answer).strip():
        raise ValueError(f"{where}: an answer is a text or a number that is not empty, got {answer!r:.60}.")
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    return Problem(text, str(answer))


def _imported(path: str) -> Any:
    unknown = (
        f"there is no task {path!r}; there are {', '.join(TASKS)}, files ({', '.join(_SUFFIXES)}) with problem and "
        f"answer, and the dotted path of a task.{nearest(path, TASKS)}"
    )
    return dotted.load(path, unknown)
