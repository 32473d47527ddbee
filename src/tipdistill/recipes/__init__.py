"""Recipes: a run of `tipdistill train` as a YAML file. This module finds the packaged ones.

read.py makes a configuration of a recipe and flags, run.py trains it, launch.py says how its processes start.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from ..text import nearest


def recipe_names() -> list[str]:
    """Names of the packaged recipes.

    Example:
        >>> "laptop" in recipe_names()
        True
    """
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def recipe_path(name: str) -> Path:
    """Path of the packaged recipe `name`, given with or without ".yaml".

    Raises:
        ValueError: there is none of that name; the nearest are given.

    Example:
        >>> recipe_path("laptop").name
        'laptop.yaml'
    """
    path = _folder() / f"{name.removesuffix('.yaml')}.yaml"
    if path.name not in {known.name for known in _folder().glob("*.yaml")}:
        near = nearest(path.stem, recipe_names()) or f" There are {', '.join(recipe_names())}."
        raise ValueError(f"there is no recipe {name!r}.{near}")
    return path


def recipe_head(path: Path) -> tuple[str, dict[str, str]]:
    """The head comment of a recipe: its first line, and its labelled notes (`# Command: ...`, continued by indent).

    Example:
        >>> recipe_head(recipe_path("laptop"))[1]["Command"]
        'tipdistill train --config laptop'
    """
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" "))
    notes: dict[str, str] = {}
    label = ""
    for line in lines[1:]:
        name, colon, text = line.partition(":")
        if colon and name.istitle() and " " not in name:
            label, notes[name] = name, text.strip()
        elif label and line.startswith(" "):
            notes[label] = f"{notes[label]} {line.strip()}"
        else:
            label = ""
    return lines[0], notes


def _folder() -> Path:
    return Path(str(files("tipdistill"))) / "recipes"
