"""`tipdistill demo`: its flags arrive, and what cannot be is refused before anything starts."""

import subprocess
import sys
from pathlib import Path

import pytest

from tipdistill import demo as module
from tipdistill.cli import demo, main

RESULT = {
    "settings": {"samples": 4, "problems": 250},
    "rows": [
        {
            "name": "all tokens",
            "rule": "all",
            "retention": 1.0,
            "trained_tokens": 4300,
            "seconds": 21.0,
            "accuracy_before": 0.25,
            "standard_error_before": 0.02,
            "accuracy": 0.75,
            "standard_error": 0.01,
        }
    ],
    "quadrants": {"q1": {"token_share": 0.125, "divergence_share": 0.5}},
    "teacher_accuracy": 0.99,
    "note": module.PLANTED,
}


@pytest.mark.parametrize("arguments", [["--workers", "0"], ["--seed", "-1"], ["--seed", str(2**32)], ["--quik"]])
def test_arguments_that_cannot_be_are_refused_before_anything_starts(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", *arguments]) == 2
    assert arguments[0] in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_arguments_arrive_and_the_table_is_shown(tmp_path, monkeypatch, capsys):
    called = []

    def run(grid, taught, workers, threads):
        called.append((grid.output_dir, grid.seeds, len(grid.rows), taught["teacher"], workers, threads))
        return RESULT

    monkeypatch.setattr(module, "run", run)
    monkeypatch.setattr("tipdistill.cli.demo.cores", lambda: 8)
    demo.main(["--seed", "7", "--workers", "3", "--output_dir", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "mean@4 at temperature 1 on 250 held-out problems" in shown
    assert "0.750 ± 0.010" in shown
    assert "Q1 12.5% of the tokens and 50.0% of the divergence. The teacher scores 0.990." in shown
    assert str(tmp_path / "results.md") in shown
    assert "short version" not in shown
    demo.main(["--quick"])
    assert "This was a short version" in capsys.readouterr().out
    assert called == [(tmp_path, (7,), 6, 1000, 3, 2), (Path("runs/demo-quick"), (0,), 4, 300, 4, 2)]


def test_the_command_is_described_without_loading_what_trains():
    code = "import sys, tipdistill.cli.demo; print({'transformers', 'trl', 'matplotlib'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
