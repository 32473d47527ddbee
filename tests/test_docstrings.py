"""Public names have a docstring whose example runs."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import tipdistill

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(tipdistill.__path__, "tipdistill.")
    if not module.name.endswith((".triton", ".verl", "__main__"))
)
PUBLIC = [name for name in tipdistill.__all__ if callable(getattr(tipdistill, name))]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_documented_with_an_example(name):
    text = inspect.getdoc(getattr(tipdistill, name)) or ""
    assert len(text.splitlines()[0]) > 20
    if inspect.isfunction(getattr(tipdistill, name)):
        assert ">>>" in text, f"{name} has no example"
        assert "Args:" in text
