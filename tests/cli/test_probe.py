"""`tipdistill probe`: a table, advice, and files that the report reads; what is wrong is refused before weights."""

import importlib.util
import json

import pytest

from tipdistill.cli import main
from tipdistill.records import open_records


@pytest.fixture
def flags(tiny_model_dir, word_problems, tmp_path):
    return [
        "probe",
        *("--model", str(tiny_model_dir("qwen3", "student"))),
        *("--teacher", str(tiny_model_dir("qwen3", "teacher", vocab_rows=432))),
        *("--dataset", str(word_problems)),
        *("--output_dir", str(tmp_path / "probe")),
        *("--max_prompts", "6", "--max_new_tokens", "8", "--device", "cpu"),
        *("--rules", "soft_or,q3", "--retentions", "0.5,0.25", "--random_seeds", "2", "--bootstrap", "20"),
    ]


def test_a_probe_of_a_pair(flags, tmp_path, capsys):
    assert main(flags) == 0
    result = json.loads((tmp_path / "probe" / "probe.json").read_text())
    assert [(row["rule"], row["retention"]) for row in result["rows"]] == [
        ("all", 1.0),
        *((rule, retention) for retention in (0.5, 0.25) for rule in ("soft_or", "q3", "random")),
    ]
    assert result["parameters"]["kind"] == "all"
    assert len(open_records(tmp_path / "probe").rollouts) == 6
    shown = capsys.readouterr().out
    best = result["recommendation"]
    assert f"Take {best['rule']} at a retention of {best['retention']:g}: {best['reason'][:30]}" in shown
    assert all(warning in shown for warning in result["warnings"])
    assert "6 prompts are few" in shown
    assert main(flags) == 2
    assert "already holds a probe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--rules", "soft_or,softor"], "unknown rule 'softor'"),
        (["--rules", "all"], "keeps everything"),
        (["--retentions", "0.5,half"], "--retentions takes numbers separated by commas"),
        (["--retentions", "0.5,1"], "retentions must lie in (0, 1)"),
        (["--scope", "token"], "scope must be one of rollout, batch"),
        (["--max_prompts", "3"], "at least 4 prompts"),
        (["--gradient_gib", "0"], "--gradient_gib must be positive"),
        (["--parameters", "some"], "invalid choice: 'some'"),
    ],
    ids=str,
)
def test_what_is_wrong_is_refused_in_one_line(flags, extra, message, capsys, monkeypatch):
    def load(*arguments):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("tipdistill.cli.probe.load_models", load)
    assert main([*flags, *extra]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_lora_needs_peft(flags, capsys, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "peft" else find_spec(name, *rest)
    )
    assert main([*flags, "--parameters", "lora"]) == 2
    assert 'which is not installed: pip install "tipdistill[peft]"' in capsys.readouterr().err
