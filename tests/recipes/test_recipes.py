"""Every recipe on the disk parses, and trains for two steps with tiny models in the place of its own."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import travel
import yaml
from acting import speaks_of_tools
from transformers import AutoTokenizer

from tipdistill import loss, score
from tipdistill.cli import main
from tipdistill.recipes import recipe_head, recipe_names
from tipdistill.recipes.read import parse

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path for folder in ("src/tipdistill/recipes", "examples") for path in (ROOT / folder).rglob("*.yaml"))
# stand-ins of the same architecture; Qwen2.5's lm_heads differ in size
STAND_INS = {"llama-70b-8b": ("llama", 400), "qwen2.5-14b-1.5b": ("qwen2", 416)}
AGENTS = ("qwen3-14b-1.7b-deepplanning", "qwen3-32b-1.7b-deepplanning")
# No GPU here: what needs one is switched off, and nothing else of how a recipe trains is touched.
NO_GPU = {"use_cpu": "true", "use_vllm": "false", "accelerate_config": "none", "num_processes": "none"}


def flags(settings):
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def by_name(recipe):
    return str(recipe.relative_to(ROOT))


def test_the_packaged_recipes_are_among_them():
    maths = {"llama-70b-8b", "qwen2.5-14b-1.5b", "qwen3-8b-4b"}
    assert {"laptop", "machine", "modular", "smollm2", "trip", *maths, *AGENTS} == set(recipe_names())
    assert set(recipe_names()) <= {recipe.stem for recipe in RECIPES}


@pytest.mark.parametrize("recipe", RECIPES, ids=by_name)
def test_the_head_says_how_on_what_and_what_to_expect(recipe):
    summary, notes = recipe_head(recipe)
    assert summary.endswith(".")
    packaged = recipe.stem in recipe_names()
    assert notes["Command"].endswith(f"--config {recipe.stem if packaged else by_name(recipe)}")
    assert notes["Hardware"]
    assert notes["Expected"]


@pytest.mark.parametrize("recipe", RECIPES, ids=by_name)
def test_every_value_arrives_as_written(recipe):
    written = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    resolved = parse(["--config", str(recipe), *flags(NO_GPU)]).values
    for name, value in written.items():
        if name not in NO_GPU:
            assert resolved[name] == value, name


@pytest.mark.parametrize("name", ["qwen3-8b-4b", "llama-70b-8b", "qwen2.5-14b-1.5b"])
def test_the_papers_hyper_parameters(name):
    recipe = yaml.safe_load((ROOT / f"src/tipdistill/recipes/{name}.yaml").read_text(encoding="utf-8"))
    table_9 = {
        "learning_rate": 3e-7 if name.startswith("llama") else 1e-6,
        "lr_scheduler_type": "cosine",
        "optim": "adamw_torch",
        "max_prompt_length": 2048,
        "max_completion_length": 8192,
        "temperature": 1.0,
        "top_p": 1.0,
        "num_generations": 16,
        "num_processes": 4 if name.startswith("qwen2.5") else 8,
    }
    assert table_9.items() <= recipe.items()
    rollouts = recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"] * recipe["num_processes"]
    assert rollouts == 8 * 16
    assert (recipe["selection_rule"], recipe["retention"], recipe["beta"]) == ("soft_or", 0.5, 1.0)


@pytest.mark.parametrize("name", AGENTS)
def test_the_papers_settings_of_agents(name):
    recipe = yaml.safe_load((ROOT / f"src/tipdistill/recipes/{name}.yaml").read_text(encoding="utf-8"))
    settings = {
        "learning_rate": 1e-6,
        "lr_scheduler_type": "cosine",
        "max_prompt_length": 4096,
        "max_completion_length": 24576,
        "num_generations": 16,
        "selection_rule": "q3",
        "retention": 0.2,
    }
    assert settings.items() <= recipe.items()
    rollouts = recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"] * recipe["num_processes"]
    assert rollouts == 8 * 16
    # 50 turns of the assistant, the last of which answers
    assert recipe["max_tool_calling_iterations"] + 1 == 50
    assert recipe["vllm_max_model_length"] == recipe["max_prompt_length"] + recipe["max_completion_length"]


def acting_on(environment, folder, student):
    """What stands in for the prompts of an environment: trips and short prompts, and a template for tools."""
    if "deepplanning" in environment:
        root = travel.write_benchmark(folder / "benchmark")
        rows = [{"directory": str(root), "language": language, "id": "0"} for language in ("en", "zh")]
    else:
        rows = [{"seed": seed} for seed in range(16)]
    prompts = folder / "train.jsonl"
    prompts.write_text(
        "".join(json.dumps({"prompt": [{"role": "user", "content": "Plan."}], **row}) + "\n" for row in rows)
    )
    student = Path(shutil.copytree(student, folder / "student"))
    speaks_of_tools(AutoTokenizer.from_pretrained(student)).save_pretrained(student)
    return {"model_name_or_path": student, "dataset_name": prompts}


# those of examples/ have teachers that tests/test_examples.py stands in for
@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe.stem in recipe_names()], ids=by_name)
def test_two_steps_with_tiny_models(recipe, tiny_model_dir, word_problems, tmp_path, monkeypatch):
    multiplied = []

    def watched(name):
        multiply = getattr(score, name)

        def multiplying(student, teacher, *arguments):
            multiplied.extend((student.hidden.dtype, teacher.hidden.dtype))
            return multiply(student, teacher, *arguments)

        monkeypatch.setattr(loss, name, multiplying)

    watched("fused_rows")
    watched("selected_rows")
    written = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    architecture, teacher_rows = STAND_INS.get(recipe.stem, ("qwen3", None))
    small = {
        "model_name_or_path": tiny_model_dir(architecture, "student"),
        "teacher_model_name_or_path": tiny_model_dir(architecture, "teacher", vocab_rows=teacher_rows),
        "dataset_name": word_problems,
        "output_dir": tmp_path,
        "max_steps": 2,
        "max_completion_length": 8,
        "warmup_steps": 0,
        "save_strategy": "steps",
    }
    if written.get("environment"):
        small |= acting_on(written["environment"], tmp_path, small["model_name_or_path"])
    if written.get("chat_template_kwargs"):  # a template that reads none of them is refused
        student = Path(shutil.copytree(small["model_name_or_path"], tmp_path / "student"))
        template = student / "chat_template.jinja"
        template.write_text("{% if enable_thinking %}{% endif %}" + template.read_text())
        small["model_name_or_path"] = student
    assert main(["train", "--config", str(recipe), *flags(small | NO_GPU)]) == 0

    resolved = yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))
    for name in written.keys() - small.keys() - NO_GPU.keys():  # all else as in the recipe
        assert resolved[name] == written[name], name
    # what the lm_heads are multiplied with, on a GPU in this dtype: where float32 is many times slower
    assert set(multiplied) == {torch.bfloat16 if written.get("bf16", True) else torch.float32}
    history = json.loads((tmp_path / "checkpoint-2/trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in history if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2]
    for entry in steps:
        assert entry["selection/kept_fraction"] == pytest.approx(written["retention"], abs=0.1)
        assert entry["grad_norm"] > 0
