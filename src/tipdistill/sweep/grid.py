"""What a grid's YAML file asks for, checked before anything runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..documents import read_yaml
from ..recipes.trust import code_named
from ..select import resolve_rule
from ..tasks import load_task
from ..text import nearest

# fields of a run that the grid itself sets, and where it does
SET_BY_GRID = {
    "selection_rule": "`cells`",
    "retention": "`cells`",
    "learning_rate": "`learning_rates`",
    "seed": "`seeds`",
    "eval_tasks": "`test` and `validation`",
    "eval_num_samples": "`num_samples`",
    "eval_tasks_on_start": "the sweep itself",
    "output_dir": "`output_dir` of the grid",
    "logging_steps": "the sweep itself, which reads every step",
    "resume_from_checkpoint": "the sweep itself",
    "overwrite_output_dir": "the sweep itself",
    "dry_run": "`tipdistill sweep --dry_run`",
}
_KEYS = (
    *("base", "overrides", "cells", "learning_rates", "seeds", "validation", "test"),
    *("num_samples", "keep_models", "output_dir"),
)


@dataclass(frozen=True)
class Row:
    """A line of the result: a rule at a retention.

    Attributes:
        name: how tables call the rule; its own name unless the grid gives another.
        rule: as `selection_rule` of `TIPConfig`.
        retention: likewise.
        overrides: fields of the run that only this row changes.
    """

    name: str
    rule: str
    retention: float
    overrides: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def key(self) -> str:
        return f"{_file_name(self.name)}-{100 * self.retention:g}"


@dataclass(frozen=True)
class Cell:
    """One run of a row.

    Attributes:
        row: what is kept.
        learning_rate: of the run.
        seed: of its prompts' order, its rollouts and its selection.
        tasks: what it is measured on when it is trained.
        on_start: measure them before the first step too.
    """

    row: Row
    learning_rate: float
    seed: int
    tasks: tuple[str, ...]
    on_start: bool = False

    @property
    def key(self) -> str:
        return f"{self.row.key}-rate{self.learning_rate:g}-seed{self.seed}"


@dataclass(frozen=True)
class Grid:
    """A grid; see docs/sweep.md for the file that it is read from.

    Attributes:
        base: a recipe of `tipdistill train`, a packaged one's name or a file.
        overrides: fields that all cells change; "{seed}" in a text stands for the cell's seed.
        rows: rules and retentions.
        learning_rates: candidates; one: nothing is chosen.
        seeds: whose test figures make the result.
        test: tasks.
        num_samples: completions per problem.
        validation_task, validation_seeds: what the rate is chosen on; None and none with one rate.
        keep_models: leave every cell's trained student on the disk.
        output_dir: where the cells and the results go.
    """

    base: str
    overrides: Mapping[str, Any]
    rows: tuple[Row, ...]
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    test: tuple[str, ...]
    num_samples: int
    validation_task: str | None
    validation_seeds: tuple[int, ...]
    keep_models: bool
    output_dir: Path

    def first_cells(self, row: Row) -> list[Cell]:
        """The cells of a row that run before its rate is known."""
        if len(self.learning_rates) == 1:
            return [self._cell(row, self.learning_rates[0], seed) for seed in self.seeds]
        return [self._cell(row, rate, seed) for seed in self.validation_seeds for rate in self.learning_rates]

    def last_cells(self, row: Row, rate: float) -> list[Cell]:
        """The cells whose test figures make the row, at the rate that was chosen; some have run before."""
        return [self._cell(row, rate, seed) for seed in self.seeds]

    def number_of_cells(self) -> int:
        """How many cells run in all."""
        if len(self.learning_rates) == 1:
            return len(self.rows) * len(self.seeds)
        new = set(self.seeds) - set(self.validation_seeds)
        return len(self.rows) * (len(self.learning_rates) * len(self.validation_seeds) + len(new))

    def reference(self) -> Row:
        """The row whose runs also measure the student before distillation: all tokens, or else the first."""
        return next((row for row in self.rows if row.rule == "all"), self.rows[0])

    def _cell(self, row: Row, rate: float, seed: int) -> Cell:
        validates = len(self.learning_rates) > 1 and seed in self.validation_seeds
        tests = seed in self.seeds
        tasks = (
            *((self.validation_task,) if validates and self.validation_task else ()),
            *(self.test if tests else ()),
        )
        return Cell(row, rate, seed, tasks, on_start=tests and row == self.reference())


def read_grid(path: str | Path) -> Grid:
    """The grid that a YAML file describes.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: anything that could not run: an unknown key, rule or task (the nearest are given), an empty list, a
            retention outside (0, 1], several rates and nothing to choose between them on, problems that are both
            validation and test.
    """
    path = Path(path)
    asked = _read(path)
    try:
        return _grid(asked, path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def code_in_grid(path: str | Path) -> list[str]:
    """What a grid and its recipe name of code, as `recipes.trust.code_named` has it; nothing of it is imported.

    Args:
        path: the grid's file.

    Raises:
        FileNotFoundError, ValueError: it, or its recipe, cannot be read.
    """
    from ..recipes.read import config_path, is_packaged, read_recipe  # loads TRL

    asked = _read(Path(path))
    named = []
    if isinstance(asked.get("base"), str) and not is_packaged(base := config_path(asked["base"])):
        named += code_named(read_recipe(base), f"{base}: ")
    cells = asked.get("cells")
    entries = [asked, *(cells.values() if isinstance(cells, dict) else [])]
    for place in entries:
        if isinstance(place, dict) and isinstance(place.get("overrides"), dict):
            named += code_named(place["overrides"], f"{path}: overrides: ")
    for name, entry in cells.items() if isinstance(cells, dict) else []:
        named += code_named({"selection_rule": str(entry.get("rule", name) if isinstance(entry, dict) else name)})
    validation, tests = asked.get("validation"), asked.get("test")
    tasks = [*(tests if isinstance(tests, list) else [tests])]
    tasks += [validation.get("task")] if isinstance(validation, dict) else []
    for task in tasks:
        named += code_named({"eval_tasks": task})
    return list(dict.fromkeys(named))


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        siblings = [sibling.name for sibling in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise FileNotFoundError(f"there is no grid {path}.{nearest(path.name, siblings)}")
    asked = read_yaml(path)
    if not isinstance(asked, dict):
        raise ValueError(f"{path} must hold a mapping, with {', '.join(_KEYS)}; got {type(asked).__name__}.")
    return asked


def _grid(asked: dict[str, Any], path: Path) -> Grid:
    for key in asked:
        if key not in _KEYS:
            raise ValueError(f"there is no key {key!r} in a grid.{nearest(str(key), _KEYS)}")
    for key in ("base", "cells", "seeds", "test"):
        if key not in asked:
            raise ValueError(f"`{key}` is missing.")
    if not isinstance(asked["base"], str):
        raise ValueError(
            f"base is a recipe's name or file, as `tipdistill train --config` takes it; got {asked['base']!r}."
        )
    rates = tuple(float(rate) for rate in _numbers("learning_rates", asked.get("learning_rates")))
    if any(not (math.isfinite(rate) and rate > 0) for rate in rates):
        raise ValueError(f"learning_rates are positive, got {list(rates)}.")
    seeds = _seeds("seeds", asked["seeds"])
    test = tuple(asked["test"] if isinstance(asked["test"], list) else [asked["test"]])
    if not test:
        raise ValueError("test is empty: it needs a task at least.")
    validation = asked.get("validation")
    task, validation_seeds = _validation(validation) if validation is not None else (None, ())
    if len(rates) > 1 and task is None:
        raise ValueError(
            f"{len(rates)} learning rates, and nothing to choose between them on: give `validation: {{task: ..., "
            "seeds: [...]}`, with problems that are not the test's."
        )
    _check_apart(task, test)
    samples = asked.get("num_samples", 1)
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"num_samples is an integer ≥ 1, got {samples!r}.")
    keep = asked.get("keep_models", True)
    if not isinstance(keep, bool):
        raise ValueError(f"keep_models is true or false, got {keep!r}.")
    return Grid(
        asked["base"],
        _overrides("overrides", asked.get("overrides")),
        _rows(asked["cells"]),
        rates,
        seeds,
        test,
        samples,
        task,
        validation_seeds,
        keep,
        Path(asked.get("output_dir") or Path("runs") / path.stem),
    )


def _rows(asked: Any) -> tuple[Row, ...]:
    if not isinstance(asked, dict) or not asked:
        raise ValueError(f"cells maps rules to lists of retentions, `soft_or: [0.5, 0.2]`; got {asked!r}.")
    rows = []
    for name, entry in asked.items():
        where = f"cells: {name}"
        entry = entry if isinstance(entry, dict) else {"retentions": entry}
        known = ("rule", "retentions", "overrides")
        for key in entry:
            if key not in known:
                raise ValueError(f"{where} has no key {key!r}.{nearest(str(key), known)}")
        rule = str(entry.get("rule", name))
        try:
            resolve_rule(rule)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: {error}") from error
        retentions = _numbers(f"{where}: retentions", entry.get("retentions"))
        for retention in retentions:
            if not 0 < retention <= 1:
                raise ValueError(f"{where}: a retention is in (0, 1], got {retention!r}.")
        overrides = _overrides(f"{where}: overrides", entry.get("overrides"))
        rows += [Row(str(name), rule, float(retention), overrides) for retention in retentions]
    keys = [row.key for row in rows]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(f"cells: {', '.join(twice)} would be run twice.")
    return tuple(rows)


def _overrides(where: str, asked: Any) -> dict[str, Any]:
    if asked is None:
        return {}
    if not isinstance(asked, dict):
        raise ValueError(f"{where} maps fields of `tipdistill train` to values, got {asked!r}.")
    for name in asked:
        if name in SET_BY_GRID:
            raise ValueError(f"{where}: {name} is set by {SET_BY_GRID[name]}.")
    return asked


def _numbers(where: str, asked: Any) -> list[Any]:
    values = asked if isinstance(asked, list) else [asked]
    if asked is None or not values:
        raise ValueError(f"{where} is empty: it needs a number at least.")
    for value in values:
        number = _number(value)
        if number is None:
            raise ValueError(f"{where} holds numbers, got {value!r}.")
    numbers = [_number(value) for value in values]
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{where} holds a number twice: {values}.")
    return numbers


def _number(value: Any) -> float | int | None:
    if isinstance(value, str):  # YAML reads 1e-3 as a text
        try:
            return float(value)
        except ValueError:
            return None
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _seeds(where: str, asked: Any) -> tuple[int, ...]:
    seeds = _numbers(where, asked)
    if any(not isinstance(seed, int) or not 0 <= seed < 2**32 for seed in seeds):
        raise ValueError(f"{where} are integers in [0, 2³²), got {seeds}.")
    return tuple(seeds)


def _validation(asked: Any) -> tuple[str, tuple[int, ...]]:
    known = ("task", "seeds")
    if not isinstance(asked, dict):
        raise ValueError(f"validation holds a task and seeds, got {asked!r}.")
    for key in asked:
        if key not in known:
            raise ValueError(f"validation has no key {key!r}.{nearest(str(key), known)}")
    if not isinstance(asked.get("task"), str):
        raise ValueError(f"validation: task is a task's name, such as arithmetic[:64]; got {asked.get('task')!r}.")
    return asked["task"], _seeds("validation: seeds", asked.get("seeds"))


def _check_apart(validation: str | None, test: tuple[Any, ...]) -> None:
    """Load the tasks, which refuses unknown ones, and compare their problems."""
    seen: dict[str, str] = {}
    for name in (*((validation,) if validation else ()), *test):
        if not isinstance(name, str):
            raise ValueError(f"test holds names of tasks, got {name!r}.")
        if "," in name:
            raise ValueError(f"a task's name holds no comma, got {name!r}: `test` is a list.")
        if validation is not None and name == validation and name in test:
            raise ValueError(f"{name} is both validation and test: slice it, {name}[:64] and {name}[64:].")
        for problem in load_task(name).problems:
            other = seen.setdefault(str(problem.text), name)
            if other != name:
                raise ValueError(
                    f"{other} and {name} share the problem {str(problem.text)!r:.60}: a rate must not be chosen, nor a "
                    "figure counted twice, on the problems of the test. Slices keep them apart, such as "
                    "arithmetic[:64] and arithmetic[64:]."
                )


def _file_name(name: str) -> str:
    return "".join(character if character.isalnum() or character in "-_." else "-" for character in name)
