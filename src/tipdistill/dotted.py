"""Objects that are named by a dotted path, such as a rule or a task of your own: importing one runs its module.

A dry run looks at the names alone: inside `names_only()` nothing is imported.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from typing import Any

_imports = ContextVar("_imports", default=True)


class NotImported:
    """What `load` gives inside `names_only()`, in the place of the object."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self, *_: Any) -> Any:
        raise AssertionError(f"{self.path} was named in a dry run, and not imported")


@contextmanager
def names_only() -> Iterator[None]:
    """Import nothing that a name stands for, as long as the block lasts.

    Example:
        >>> with names_only():
        ...     type(load("this.s", "there is no such text.")).__name__
        'NotImported'
    """
    token = _imports.set(False)
    try:
        yield
    finally:
        _imports.reset(token)


def imports() -> bool:
    """Whether names are imported here, which they are not inside `names_only()`."""
    return _imports.get()


def is_dotted(path: str) -> bool:
    """Whether a text has the form of a dotted path, "package.module.name" or "package.module:name".

    Example:
        >>> [is_dotted(text) for text in ("my.rule", "my:rule", "rule", "../rule.py")]
        [True, True, False, False]
    """
    parts = path.replace(":", ".").split(".")
    return len(parts) > 1 and all(part.isidentifier() for part in parts)


def load(path: str, unknown: str) -> Any:
    """The object behind a dotted path; inside `names_only()` a `NotImported`, once its module is there.

    Args:
        path: "package.module.name" or "package.module:name".
        unknown: how the error begins where there is none.

    Raises:
        ValueError: it has another form, its module is not there or fails, or has no such name.

    Example:
        >>> load("math.pi", "there is no such number.")
        3.141592653589793
    """
    if not is_dotted(path):
        raise ValueError(unknown)
    module, _, name = path.replace(":", ".").rpartition(".")
    if not _imports.get():
        if not _is_there(module):
            raise ValueError(f"{unknown} As a path: there is no module {module}; its folder must be on PYTHONPATH.")
        return NotImported(path)
    try:
        return getattr(import_module(module), name)
    except Exception as error:  # the module is the user's own code, and may fail in any way
        said = f"{type(error).__name__}: {error}" if not isinstance(error, ImportError | AttributeError) else error
        raise ValueError(f"{unknown} As a path: {said}; its folder must be on PYTHONPATH.") from error


def _is_there(module: str) -> bool:
    """Whether a module could be imported; `find_spec` of a dotted name would import its parents."""
    first, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(first)
        name = first
        for part in rest:
            name = f"{name}.{part}"
            if spec is None or spec.submodule_search_locations is None:
                return False
            spec = importlib.machinery.PathFinder.find_spec(name, list(spec.submodule_search_locations))
    except (ImportError, ValueError, KeyError):  # a namespace package inside another, or a module made by hand
        return True
    return spec is not None
