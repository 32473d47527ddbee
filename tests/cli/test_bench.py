"""tipdistill bench: results are written where they are asked for, and bad names cost nothing."""

import json

import pytest

from tipdistill.bench import head
from tipdistill.cli import main

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
    assert main(["bench", "head", *SIZES, "--output", str(path)]) == 0
    result = json.loads(path.read_text())
    assert result["settings"]["vocabulary"] == 9
    assert result["variants"]["plain"]["seconds"]["runs"] == 1
    assert f"written: {path}" in capsys.readouterr().out


def test_a_refusal_is_the_exit_code(tmp_path, capsys, inline, monkeypatch):
    monkeypatch.setitem(head.TOLERANCES, "float32", 0.0)
    assert main(["bench", "head", *SIZES, "--output", str(tmp_path / "r.json")]) == 1
    assert "refused: plain" in capsys.readouterr().out


def test_tables_of_a_document_are_rewritten(tmp_path, capsys):
    document = tmp_path / "d.md"
    document.write_text("<!-- bench:head-cpu -->\n<!-- /bench -->\n")
    arguments = ["bench", "table", str(document), "--results", str(tmp_path)]
    assert main(arguments) == 0
    assert "not measured" in document.read_text()
    assert main(arguments) == 0
    assert "rewritten" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["head", "--preset", "cpuu"], "there is no preset 'cpuu'; there are"),
        (["step", "--preset", "tinyy"], "Did you mean 'tiny'"),
        (["select", "--rules", "entropi"], "Did you mean 'entropy'"),
        (["table", "no/such.md"], "no/such.md"),
    ],
)
def test_what_is_not_there_is_refused_with_the_nearest(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err
