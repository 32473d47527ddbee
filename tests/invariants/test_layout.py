"""Files of a size that is read in one go, small things written once, and old names that still lead somewhere."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tipdistill

SOURCE = Path(__file__).parents[2] / "src" / "tipdistill"
MOST_LINES = 600
ONCE = {
    # what → the files that may hold it
    r"difflib\.": {"text.py"},
    r"import httpx2": {"http.py"},
    r"os\.fsync": {"files.py", "evaluate/run.py"},  # run.py appends samples to a file that it keeps open
    r"\"---\"": {"text.py"},
    r"LOCK_EX": {"files.py"},
}


def files():
    return {path.relative_to(SOURCE).as_posix(): path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py")}


def test_no_file_is_too_long_to_be_read():
    long = {name for name, text in files().items() if len(text.splitlines()) > MOST_LINES}
    assert long == {"score/triton.py"}


@pytest.mark.parametrize("what", ONCE)
def test_small_things_are_written_once(what):
    where = {name for name, text in files().items() if re.search(what, text)}
    assert where
    assert where <= ONCE[what]


@pytest.mark.parametrize("name", tipdistill.__all__)
def test_public_names_are_there(name):
    assert getattr(tipdistill, name) is not None


@pytest.mark.parametrize("first", ["tipdistill.select", "tipdistill.select.choose", "tipdistill.loss", "tipdistill"])
def test_select_is_the_function_whatever_is_imported_first(first):
    code = f"import {first}, tipdistill; print(tipdistill.select.__name__, callable(tipdistill.select))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["select", "True"]


def test_the_old_name_of_score_still_imports_and_says_so():
    for name in [name for name in sys.modules if name.startswith("tipdistill.divergence")]:
        del sys.modules[name]
    with pytest.warns(DeprecationWarning, match=r"tipdistill\.score"):
        old = importlib.import_module("tipdistill.divergence")
    assert old.token_scores is tipdistill.token_scores
    reference = importlib.import_module("tipdistill.divergence.reference")
    assert reference is importlib.import_module("tipdistill.score.reference")
