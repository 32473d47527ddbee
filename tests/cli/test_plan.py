"""tipdistill plan: what it prints, writes and refuses."""

import json

import pytest

from tipdistill.cli import main
from tipdistill.plan import MACHINES
from tipdistill.plan.models import PUBLISHED
from tipdistill.plan.recipe import setup_of_recipe, sharding_of
from tipdistill.recipes.read import read_values

SMALL = ["plan", "--config", "laptop", "--model_name_or_path", "Qwen/Qwen3-0.6B", "--max_completion_length", "64"]
SMALL += ["--teacher_model_name_or_path", "Qwen/Qwen3-0.6B", "--per_device_train_batch_size", "2"]


@pytest.fixture(scope="module")
def shallow(tmp_path_factory):
    """`SMALL` for two models as wide as Qwen3-0.6B and of two layers: fewer are counted in less time."""
    directory = tmp_path_factory.mktemp("shallow")
    (directory / "config.json").write_text(json.dumps(PUBLISHED["Qwen/Qwen3-0.6B"] | {"num_hidden_layers": 2}))
    flags = ["--model_name_or_path", "--teacher_model_name_or_path"]
    return [*SMALL, *(part for flag in flags for part in (flag, str(directory)))]


def test_a_recipe_is_planned_and_written(capsys, tmp_path, shallow):
    path = tmp_path / "plan.json"
    assert main([*shallow, "--gpus", "2", "--memory", "40", "--json", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "| **together**" in shown
    assert "The bottleneck is: " in shown
    assert "Fits: " in shown
    found = json.loads(path.read_text())
    assert found["peak"]["fits"]
    assert found["gpus"] == 2
    assert [row["retention"] for row in found["retentions"]] == [1.0, 0.5, 0.2, 0.1]


def test_a_machine_file_changes_the_rates(capsys, tmp_path, shallow):
    path = tmp_path / "slow.yaml"
    path.write_text("base: h100\nflops: 1e12\nmemory_gib: 40\n")
    seconds = []
    for machine in ("h100", str(path)):
        assert main([*shallow, "--machine", machine, "--json", str(tmp_path / "plan.json")]) == 0
        seconds.append(json.loads((tmp_path / "plan.json").read_text())["seconds"]["lm_heads"])
    assert seconds[1] == pytest.approx(989 * seconds[0])
    shown = capsys.readouterr().out
    assert "on 1 × H100" in shown
    assert f"on 1 × {path}" in shown


@pytest.mark.parametrize(
    ("place", "normalization"), [([], "running"), (["offload"], "batch"), (["server"], "batch"), (["student"], "batch")]
)
def test_tokens_are_scored_ahead_where_the_teacher_s_place_wants_it(tmp_path, shallow, place, normalization):
    recipe = tmp_path / "plain.yaml"
    recipe.write_text("output_dir: runs/plain\nbf16: false\n")
    values = read_values([flag if flag != "laptop" else str(recipe) for flag in shallow[1:]])
    assert setup_of_recipe(values, MACHINES["h100"], 1, None, *place).normalization == normalization
    values.normalization = "micro_batch"
    assert setup_of_recipe(values, MACHINES["h100"], 1, None, *place).normalization == "micro_batch"


def test_a_gpu_that_is_too_small_is_told_apart(capsys, shallow):
    assert main([*shallow, "--memory", "1"]) == 0
    shown = capsys.readouterr().out
    assert "Does not fit" in shown
    assert "Change first: " in shown


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--memory", "-1"], "--memory must be a positive number"),
        (["--gpus", "0"], "--gpus must be a positive number"),
        (["--machine", "h10"], "there are h100, h200, a100, and FILE.yaml. Did you mean 'h100'"),
        (["--machine", "absent.yaml"], "there is no machine file absent.yaml"),
        (["--gpu", "h100"], "there is no flag --gpu"),
        (["--sharding", "zero4"], "--sharding must be one of"),
        (["--retenton", "0.5"], "there is no flag --retenton"),
        (["--retention", "1.5"], "retention must be in (0, 1]"),
        (["--selection_rule", "soft_xor"], "soft_or"),
        (["--num_generations", "3"], "must divide the generation batch"),
        (["--optim", "lion_32bit"], "optim = lion_32bit is not planned"),
        (["--model_name_or_path", "Qwen/Qwen3-9B"], "Qwen/Qwen3-8B"),
        (["--teacher_place", "offload", "--sharding", "zero3", "--gpus", "8"], "leave one of the two off"),
        (["--max_completion_length", "0"], "max_completion_length must be at least 1"),
        (["--teacher_model_name_or_path", "", "--teacher_url", "http://h/v1"], "give the model that it serves as"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(capsys, flags, said, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main([*SMALL, *flags]) == 2
    refused = capsys.readouterr().err
    assert said in refused
    assert refused.count("\n") == 1


def test_sharding_is_read_from_accelerate_s_presets():
    presets = {"zero2": "zero2", "zero3": "zero3", "fsdp2": "fsdp2", "multi_gpu": "none", None: "none"}
    assert {preset: sharding_of(preset) for preset in presets} == presets
    with pytest.raises(ValueError, match="fsdp1 is not planned"):
        sharding_of("fsdp1")


def test_help_names_the_flags(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["plan", "--help"])
    shown = capsys.readouterr().out
    for flag in ("--gpus", "--memory", "--json", "--teacher_place", "--machine"):
        assert flag in shown
