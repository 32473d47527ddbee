"""`deepplanning=DIR`: the held-out problems as a task, and the training prompts as a file that a recipe reads."""

import json

import pytest
import travel
from acting import speaks_of_tools
from transformers import AutoModelForCausalLM, AutoTokenizer

from tipdistill import rollout
from tipdistill.data import load_prompts
from tipdistill.environments.deepplanning import DeepPlanning
from tipdistill.environments.deepplanning.prompts import ENVIRONMENT, messages
from tipdistill.evaluate.engines import Local, Sampling
from tipdistill.evaluate.run import run
from tipdistill.tasks import load_task
from tipdistill.tasks.__main__ import main


@pytest.fixture
def root(tmp_path):
    return travel.write_benchmark(tmp_path / "DIR")


@pytest.mark.parametrize(
    ("name", "id", "language"),
    [
        ("deepplanning", "4", "en"),
        ("deepplanning_zh", "4", "zh"),
        ("deepplanning_train", "0", "en"),
        ("deepplanning_zh_train", "0", "zh"),
    ],
)
def test_a_task_by_language_and_split(root, name, id, language):
    task = load_task(f"{name}={root}")
    assert (task.name, task.environment, len(task.problems)) == (name, ENVIRONMENT, 1)
    (problem,) = task.problems
    assert task.prompt_of(problem) == problem.text
    assert problem.text[1]["content"] == travel.in_language(travel.QUERIES[id == "4"]["query"], language)
    played = DeepPlanning()
    played.reset(**problem.row)
    assert played._verdict(travel.plan(id, language)).correct


def test_a_converter_is_part_of_the_task_and_not_of_the_training_prompts(root, tmp_path, monkeypatch):
    monkeypatch.delenv("DEEPPLANNING_CONVERTER_URL", raising=False)
    plain = load_task(f"deepplanning={root}")
    monkeypatch.setenv("DEEPPLANNING_CONVERTER_URL", "http://localhost:8000/v1")
    converted = load_task(f"deepplanning={root}")
    read_by = [task.problems[0].row["converter"] for task in (plain, converted)]
    assert read_by == [[], ["http://localhost:8000/v1", None]]
    assert converted.fingerprint() != plain.fingerprint()
    assert main(["deepplanning", str(root), "--output_dir", str(tmp_path)]) == 0
    assert "localhost" not in (tmp_path / "train.jsonl").read_text(encoding="utf-8")


def test_a_slice_a_limit_and_prompts_of_their_own_kind(root):
    assert load_task(f"deepplanning={root}[:1]").problems == load_task(f"deepplanning={root}", limit=1).problems
    with pytest.raises(ValueError, match=r"'deepplanning' needs a directory: deepplanning=DIR takes its problems"):
        load_task("deepplanning")
    with pytest.raises(ValueError, match=r"there is no directory .*none: give the folder benchmark/deepplanning"):
        load_task(f"deepplanning={root}/none")


def test_damage_in_any_of_the_tasks_databases_is_named_before_anything_runs(root):
    path = root / "database/database_en/id_4/hotels/hotels.csv"
    path.write_text("name,price\n")
    with pytest.raises(ValueError, match=rf"{path}: it has no column 'address'"):
        load_task(f"deepplanning={root}")
    load_task(f"deepplanning_train={root}")


@pytest.mark.parametrize(("language", "languages"), [("en", ["en"]), ("zh", ["zh"]), ("both", ["en", "zh"])])
def test_the_training_prompts_are_written_and_read_as_a_recipe_reads_them(root, tmp_path, capsys, language, languages):
    written = tmp_path / "runs"
    arguments = ["deepplanning", str(root), "--output_dir", str(written), "--language", language]
    assert main(arguments) == 0
    assert f"{written / 'train.jsonl'} holds {len(languages)} prompts" in capsys.readouterr().out
    dataset = load_prompts(written / "train.jsonl")
    assert [row["language"] for row in dataset] == languages
    for row in dataset:
        played = DeepPlanning()
        played.reset(**row)
        assert row["prompt"] == messages(played._query, row["language"])
        assert played._verdict(travel.plan("0", row["language"])).correct


def test_the_file_is_where_the_recipes_look_for_it(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["deepplanning", str(root)]) == 0
    (line,) = (tmp_path / "runs/deepplanning/train.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["directory"] == str(root)


def test_what_is_wrong_is_told_in_one_line(root, tmp_path, capsys):
    assert main(["deepplanning", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    for arguments in (["deepplanning"], ["modular", str(root)]):
        with pytest.raises(SystemExit):
            main(arguments)
        assert "takes the directory of the benchmark: deepplanning DIR" in capsys.readouterr().err


def test_an_evaluation_counts_dimensions_and_says_whose_parser_it_was(root, tmp_path, tiny_model_dir, monkeypatch):
    tokenizer = speaks_of_tools(AutoTokenizer.from_pretrained(tiny_model_dir("qwen3", "student")))
    engine = Local(AutoModelForCausalLM.from_pretrained(tiny_model_dir("qwen3", "student")), tokenizer)
    engine.model.config.max_position_embeddings = 40_960
    answers = [travel.plan("4"), travel.plan("4", changes=[("stay: -", "stay: Sea Hotel | 400")]), "I cannot."]

    def sample(model, tokenizer, prompts, most, seed, **options):
        texts = [answers[place % 3] + "<|end|>" for place in range(len(prompts))]
        return [(tokenizer(text, add_special_tokens=False)["input_ids"], True) for text in texts]

    monkeypatch.setattr(rollout, "_sample", sample)
    task = load_task(f"deepplanning={root}")
    metrics = run([task], lambda: engine, tmp_path / "eval", num_samples=3, sampling=Sampling(max_new_tokens=4000))
    numbers = metrics["tasks"]["deepplanning"]
    assert numbers["mean_at_k"] == pytest.approx(1 / 3)
    figures = numbers["figures"]
    for name, mean in {"hard": 2 / 3, "delivered": 2 / 3, "own_parser": 1.0, "itinerary_structure": 1 / 3}.items():
        assert figures[name] == pytest.approx(mean), name
