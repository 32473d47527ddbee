"""An environment from a recipe and from flags: `train`, `score`, `probe` and `eval` play the same episodes."""

import json

import pytest
import yaml
from acting import NAMES, Shop, speaks_of_tools, turn_after
from on_cpu import ON_CPU
from transformers import AutoModelForCausalLM, AutoTokenizer

from tipdistill import TIPTrainer, rollout
from tipdistill.cli import main
from tipdistill.records import open_records

BASE = {
    **ON_CPU,
    "max_steps": 1,
    "max_completion_length": 400,
    "record_rollouts": 4,
}


@pytest.fixture
def models(tiny_model_dir, tmp_path):
    """Directories of a student and a teacher whose chat template knows tools, and prompts."""
    for role in ("student", "teacher"):
        source = tiny_model_dir("qwen3", role)
        AutoModelForCausalLM.from_pretrained(source).save_pretrained(tmp_path / role)
        speaks_of_tools(AutoTokenizer.from_pretrained(source)).save_pretrained(tmp_path / role)
    rows = [
        {"prompt": [{"role": "user", "content": f"Buy a {name}."}], "wanted": "pear", "money": 3 + row}
        for row, name in enumerate(NAMES)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "student"), str(tmp_path / "teacher"), str(tmp_path / "rows.jsonl")


@pytest.fixture(autouse=True)
def script(monkeypatch):
    """What models write is scripted, as `turn_after` has it."""

    def sample(model, tokenizer, prompts, most, seed, **options):
        return [(turn_after(tokenizer, ids), True) for ids in prompts]

    def write(trainer, prompt_ids, *rest):
        return [turn_after(trainer._tokenizer, ids) for ids in prompt_ids]

    monkeypatch.setattr(rollout, "_sample", sample)
    monkeypatch.setattr(TIPTrainer, "_generate_single_turn", write)


def train(models, tmp_path, settings, *flags):
    student, teacher, rows = models
    recipe = {
        **BASE,
        "model_name_or_path": student,
        "teacher_model_name_or_path": teacher,
        "dataset_name": rows,
        "output_dir": str(tmp_path / "run"),
        **settings,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return main(["train", "--config", str(tmp_path / "recipe.yaml"), *flags])


def logged(tmp_path):
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    return next(entry for entry in map(json.loads, lines) if "loss" in entry)


@pytest.mark.parametrize("given", ["recipe", "flags"])
def test_an_environment_arrives_from_a_recipe_and_from_flags(models, tmp_path, given):
    settings = {"environment": "acting.Shop", "max_tool_calling_iterations": 2, "max_tool_result_tokens": 5}
    if given == "recipe":
        assert train(models, tmp_path, settings, "--trust_recipe") == 0
    else:
        flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
        assert train(models, tmp_path, {}, *flags) == 0
    figures = logged(tmp_path)
    assert figures["episodes/turns"] > 1
    assert figures["episodes/correct"] > 0
    assert figures["tools/too_many_calls"] > 0, "two rounds are allowed, and some ask for three"
    records = open_records(tmp_path / "run" / "records" / "step-0")
    turns = [turn for turns in records.rollouts["turns"].to_pylist() for turn in turns or ()]
    assert any("[cut: " in result["text"] for turn in turns for result in turn["results"])


def test_a_tool_that_hangs_longer_than_it_may_costs_its_rollout(models, tmp_path, monkeypatch):
    monkeypatch.setattr(Shop, "buy", Shop.wait)
    monkeypatch.setattr("acting.turn_after", None)
    settings = {"environment": "acting.Shop", "tool_timeout": 0.2}

    def write(trainer, prompt_ids, *rest):
        texts = ['<call>{"name": "wait", "arguments": {"seconds": 30}}</call><|end|>', "no<|end|>"]
        seen = [trainer._tokenizer.decode(ids).count("<|start|>tool\n") for ids in prompt_ids]
        return [trainer._tokenizer(texts[min(count, 1)], add_special_tokens=False)["input_ids"] for count in seen]

    monkeypatch.setattr(TIPTrainer, "_generate_single_turn", write)
    assert train(models, tmp_path, settings, "--trust_recipe") == 0
    assert logged(tmp_path)["tools/timed_out"] == 1


def test_a_recipe_that_names_an_environment_wants_trust(models, tmp_path, capsys):
    assert train(models, tmp_path, {"environment": "acting.Shop"}) == 2
    assert "environment: acting.Shop" in capsys.readouterr().err


def test_a_dry_run_says_what_is_wrong_with_an_environment_and_imports_none(models, tmp_path, capsys):
    assert train(models, tmp_path, {"environment": "no_such_module.World"}, "--dry_run") == 2
    assert "there is no module no_such_module" in capsys.readouterr().err
    assert train(models, tmp_path, {"environment": "acting.Shop"}, "--dry_run") == 0
    (tmp_path / "plain.jsonl").write_text('{"prompt": "Buy an apple."}\n' * 8)
    plain = {"environment": "acting.Shop", "dataset_name": str(tmp_path / "plain.jsonl")}
    assert train(models, tmp_path, plain, "--dry_run") == 2
    assert "plain text, and tools are called in conversations" in capsys.readouterr().err
    (tmp_path / "student" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert train(models, tmp_path, {"environment": "acting.Shop"}, "--dry_run") == 2
    assert "cannot render a conversation with tools" in capsys.readouterr().err


def test_score_probe_and_eval_play_the_episodes_of_an_environment(models, tmp_path, capsys):
    student, teacher, rows = models
    pair = ["--model", student, "--teacher", teacher, "--dataset", rows, "--environment", "acting.Shop"]
    flags = ["--max_new_tokens", "400", "--device", "cpu"]
    assert main(["score", *pair, *flags, "--output_dir", str(tmp_path / "records")]) == 0
    assert "# tools     ask, buy, leave, price, read, wait" in capsys.readouterr().out
    records = open_records(tmp_path / "records")
    rollouts = records.rollouts.to_pylist()
    assert len(rollouts) == 8
    tokenizer = AutoTokenizer.from_pretrained(student)
    for row in rollouts:
        own = [turn for turn in row["turns"] if turn["role"] == "student"]
        assert row["tokens"] == sum(turn["tokens"] for turn in own)
        assert row["correct"] == (len(own) == 2)
    tokens = records.read(["token_id", "rollout"]).to_pydict()
    first = [index for index, number in zip(tokens["token_id"], tokens["rollout"], strict=True) if number == 0]
    texts = [turn["text"] for turn in rollouts[0]["turns"] if turn["role"] == "student"]
    assert tokenizer.decode(first) == "".join(texts)

    assert main(["probe", *pair, *flags, "--output_dir", str(tmp_path / "probe")]) == 0
    probed = json.loads((tmp_path / "probe" / "probe.json").read_text())
    assert probed["sample"]["tokens"] == sum(row["tokens"] for row in rollouts)

    asked = ["--tasks", rows, "--environment", "acting.Shop", "--prompt", "own", "--max_new_tokens", "400"]
    assert main(["eval", "--model", student, *asked, "--output_dir", str(tmp_path / "eval")]) == 0
    numbers = json.loads((tmp_path / "eval" / "metrics.json").read_text())["tasks"]["rows"]
    assert numbers["mean_at_k"] == sum(row["correct"] for row in rollouts) / 8
    assert numbers["turns"] == sum(len(row["turns"]) // 2 + 1 for row in rollouts) / 8
