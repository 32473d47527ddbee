"""README.md is short, and what it shows is what the files say."""

import ast
import json
import re
from pathlib import Path

import pytest

import tipdistill

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def in_one_line(text: str) -> str:
    return " ".join(text.split())


def test_it_is_read_in_two_minutes():
    assert len(README.splitlines()) <= 120


def test_it_explains_the_quadrants_and_soft_or_before_it_uses_them():
    first = {name: README.index(name) for name in ("**Entropy**", "**Divergence**", "| Q2:", "**Soft-OR**", "Q3")}
    assert first["**Entropy**"] < first["**Divergence**"] < first["| Q2:"] < first["Q3"] < first["**Soft-OR**"]
    assert README.index("Soft-OR") == first["**Soft-OR**"] + 2


def test_the_result_table_is_the_one_the_demo_wrote():
    written = (ROOT / "docs" / "demo" / "lm" / "results.md").read_text(encoding="utf-8").partition("\n\n")[0]
    assert len(written.splitlines()) > 6
    assert written in README, "copy the table of docs/demo/lm/results.md into README.md"


def test_what_it_says_of_the_table_is_so():
    result = json.loads((ROOT / "docs" / "demo" / "lm" / "results.json").read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in result["rows"]}
    assert len(result["dropped"]) / 30 == pytest.approx(1 / 3)
    assert rows["all tokens"]["reverse_kl"]["mean"] < result["before"]["reverse_kl"]["mean"] / 2
    assert rows["Soft-OR"]["gain_share"]["mean"] > 0.95  # "nearly what all do"
    assert rows["gradient_norm_sampling"]["gain_share"]["mean"] > 0.9  # "most of it"
    low, high = rows["gradient_norm_sampling"]["to_random"]["interval"]
    assert low < 0 < high  # "a random one too"
    addition = json.loads((ROOT / "docs" / "demo" / "results.json").read_text(encoding="utf-8"))
    accuracy = {row["name"]: row["accuracy"] for row in addition["rows"]}
    said = f"trains to an accuracy of {accuracy['Q3']:.3f}, and a random tenth to {accuracy['random']:.3f}"
    assert said in in_one_line(README)
    # "a quarter of an hour", the pair and the answers included
    assert 8 * 60 < sum(row["seconds"] for row in result["rows"]) < 15 * 60


def test_the_figures_of_the_head_stage_are_the_measured_ones():
    result = json.loads((ROOT / "benchmarks" / "results" / "head-cpu.json").read_text(encoding="utf-8"))
    tenth, everything = result["variants"]["chunked soft_or 0.1"], result["variants"]["chunked"]
    time, memory = tenth["ratio"]["plain"]["median"], tenth["memory_ratio"]["plain"]
    said = f"take {time:.2f} of the time and {memory:.2f} of the extra memory of plain PyTorch"
    assert said in in_one_line(README)
    of_all = f"Without selection this engine takes {everything['ratio']['plain']['median']:.2f} of the time"
    assert of_all in in_one_line(README)
    # "saves nearly as much memory"
    assert 1 - everything["memory_ratio"]["plain"] > 0.9 * (1 - memory)


def test_what_is_said_of_a_whole_step_was_measured():
    result = json.loads((ROOT / "benchmarks" / "results" / "step-smollm2.json").read_text(encoding="utf-8"))
    half, everything = (result["variants"][f"tip {name}"] for name in ("soft_or 0.5, running", "all"))
    share = half["training_seconds"]["median"] / everything["training_seconds"]["median"]
    assert "A whole step costs a little less with half of the tokens" in in_one_line(README)
    assert 0.9 < share < 1


def test_its_requirements_are_those_of_the_package():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    said = in_one_line(README)
    for package, version in (("torch", "torch {} or newer"), ("transformers", "transformers {}"), ("trl", "TRL {}")):
        least = re.search(rf'"{package}>=([\d.]+)', project)
        assert least, package
        assert version.format(least[1].removesuffix(".0")) in said, package
    python = re.search(r'requires-python = ">=([\d.]+)"', project)
    assert python
    assert f"Python {python[1]} or newer" in said


def test_its_code_is_python_and_names_what_is_public():
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) == 2
    for block in blocks:
        ast.parse(block)
    assert set(re.findall(r"\btip\.(\w+)", "".join(blocks))) <= set(tipdistill.__all__)


def test_the_code_without_a_trainer_runs():
    import torch

    block = re.findall(r"```python\n(.*?)```", README, re.S)[1]
    names = {
        "hidden": torch.randn(12, 8, requires_grad=True),
        "lm_head": torch.randn(30, 8, requires_grad=True),
        "teacher_hidden": torch.randn(12, 16),
        "teacher_lm_head": torch.randn(30, 16),
        "rollout_ids": torch.arange(3).repeat_interleave(4),
    }
    exec(block, names)
    assert names["picked"].mask.sum() == 6
    assert (names["hidden"].grad.abs().sum(1) > 0).tolist() == names["picked"].mask.tolist()


def test_every_command_has_its_line():
    from tipdistill.cli import COMMANDS

    assert set(COMMANDS) - {"demo"} == set(re.findall(r"^    tipdistill (\w+)", README, re.M))
