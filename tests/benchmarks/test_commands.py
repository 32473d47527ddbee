"""python -m benchmarks.NAME: results are written where they are asked for, and bad names cost nothing."""

import doctest
import json
import pkgutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import benchmarks
from benchmarks import head, measure, select, step, table

ROOT = Path(__file__).parents[2]
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(benchmarks.__path__, "benchmarks.")
    if not module.name.endswith("__main__")
)

SIZES = ["--tokens", "6", "--vocabulary", "9", "--student_width", "2", "--teacher_width", "3", "--rounds", "1"]


@pytest.fixture
def inline(monkeypatch):
    """Only the plain variant, in this process."""

    class Inline:
        def __init__(self, build, *arguments):
            self.work = build(*arguments)

        def ask(self, command):
            return getattr(self.work, command)()

        def close(self):
            pass

    monkeypatch.setattr(head, "Worker", Inline)
    monkeypatch.setattr(head, "variants_of", lambda device: [head.Variant("plain")])


def test_a_result_is_written_with_its_settings(tmp_path, capsys, inline):
    path = tmp_path / "r.json"
    assert head.main([*SIZES, "--output", str(path)]) == 0
    result = json.loads(path.read_text())
    assert result["settings"]["vocabulary"] == 9
    assert result["variants"]["plain"]["seconds"]["runs"] == 1
    assert f"written: {path}" in capsys.readouterr().out


def test_a_refusal_is_the_exit_code(tmp_path, capsys, inline, monkeypatch):
    monkeypatch.setitem(head.TOLERANCES, "float32", 0.0)
    assert head.main([*SIZES, "--output", str(tmp_path / "r.json")]) == 1
    assert "refused: plain" in capsys.readouterr().out


def test_tables_of_a_document_are_rewritten(tmp_path, capsys):
    document = tmp_path / "d.md"
    document.write_text("<!-- bench:head-cpu -->\n<!-- /bench -->\n")
    arguments = [str(document), "--results", str(tmp_path)]
    assert table.main(arguments) == 0
    assert "not measured" in document.read_text()
    assert table.main(arguments) == 0
    assert "rewritten" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (head, ["--preset", "cpuu"], "got 'cpuu'. Did you mean 'cpu'?"),
        (step, ["--preset", "tinyy"], "Did you mean 'tiny'?"),
        (select, ["--rules", "entropi"], "Did you mean 'entropy'"),
        (table, ["no/such.md"], "no/such.md"),
    ],
)
def test_what_is_not_there_is_refused_with_the_nearest(command, arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        measure.end(lambda: command.main(arguments))
    refusal = capsys.readouterr().err
    assert message in refusal
    assert len(refusal.splitlines()) == 1


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    result = doctest.testmod(import_module(name), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


@pytest.mark.slow
def test_a_module_is_a_command():
    command = [sys.executable, "-m", "benchmarks.head", "--preset", "cpuu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "Did you mean 'cpu'?" in done.stderr


@pytest.mark.slow
def test_a_result_is_made_in_processes_of_their_own(tmp_path, monkeypatch):
    """Two of its variants; that each agrees is seen in tests/benchmarks/test_head.py."""
    two = [head.Variant("plain"), head.Variant("chunked")]
    monkeypatch.setattr(head, "variants_of", lambda device: two)
    started, start = [], measure.Worker.__init__

    def counted(self, *arguments):
        start(self, *arguments)
        started.append(self._process.pid)

    monkeypatch.setattr(measure.Worker, "__init__", counted)
    assert head.main([*SIZES, "--output", str(tmp_path / "r.json")]) == 0
    entries = json.loads((tmp_path / "r.json").read_text())["variants"]
    assert list(entries) == ["plain", "chunked"]
    assert not [entry["refused"] for entry in entries.values() if "refused" in entry]
    assert len(set(started)) == 2
