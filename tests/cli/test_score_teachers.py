"""`tipdistill score` and `probe` with several teachers, a teacher's own prompts, and the student as its own teacher."""

import json

import pytest
import torch
from plain_loss import log_probabilities
from transformers import AutoModelForCausalLM, AutoTokenizer

from tipdistill.cli import main
from tipdistill.records import open_records

HINT = "The answer is 42. "


@pytest.fixture
def rows(word_problems, tmp_path):
    prompts = [json.loads(line)["prompt"] for line in word_problems.read_text(encoding="utf-8").splitlines()][:6]
    rows = [
        {"prompt": prompt, "teacher": "code" if row % 2 else None, "teacher_prompt": HINT + prompt if row % 3 else None}
        for row, prompt in enumerate(prompts)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path, rows


@pytest.fixture
def models(tiny_model_dir):
    named = {"student": ("qwen3", "student"), "default": ("qwen3", "teacher"), "code": ("llama", "teacher")}
    return {name: str(tiny_model_dir(*which)) for name, which in named.items()}


def arguments(command, models, path, directory, *more):
    return [
        *(command, "--model", models["student"], "--dataset", str(path), "--output_dir", str(directory)),
        *("--device", "cpu", "--max_new_tokens", "8", "--batch_size", "4", *more),
    ]


@pytest.mark.parametrize("kind", ["several", "one", "self"])
def test_every_recorded_divergence_is_that_of_plain_pytorch(rows, models, tmp_path, kind):
    path, given = rows
    named = {
        "several": ["--teachers", json.dumps({name: models[name] for name in ("default", "code")})],
        "one": ["--teacher", models["default"]],
        "self": ["--teacher", "self"],
    }[kind]
    assert main(arguments("score", models, path, tmp_path / "records", *named)) == 0
    records = open_records(tmp_path / "records")
    loaded = {name: AutoModelForCausalLM.from_pretrained(model).eval() for name, model in models.items()}
    tokenizer = AutoTokenizer.from_pretrained(models["student"])
    found, expected = records.scores().reverse_kl, []
    table = records.read(["rollout", "token_id"]).to_pandas()
    for number, row in enumerate(given):
        completion = table[table["rollout"] == number]["token_id"].tolist()
        name = {"several": row["teacher"] or "default", "one": "default", "self": "student"}[kind]
        own = tokenizer(row["teacher_prompt"] or row["prompt"])["input_ids"]
        with torch.no_grad():
            mine = log_probabilities(loaded["student"], tokenizer(row["prompt"])["input_ids"], completion)
            theirs = log_probabilities(loaded[name], own, completion)
        expected.append((mine.exp() * (mine - theirs)).sum(-1))
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-5)
    assert records.sidecar["settings"]["teacher_prompt_column"] == "teacher_prompt"
    if kind == "several":
        assert records.sidecar["teacher"] == f"default: {models['default']}, code: {models['code']}"
    if kind == "self":
        assert found[: len(expected[0])].abs().max() < 1e-5  # the first row has no hint


def test_a_probe_asks_each_rows_teacher(rows, models, tmp_path, capsys):
    named = ["--teachers", json.dumps({name: models[name] for name in ("default", "code")})]
    assert main(arguments("probe", models, rows[0], tmp_path / "probe", *named, "--rules", "soft_or,random")) == 0
    probed = json.loads((tmp_path / "probe" / "probe.json").read_text())
    assert probed["teacher"].startswith("default: ")
    assert "teacher code" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("named", "said"),
    [
        (["--teachers", '{"code": "x"}', "--teacher", "y"], "each name the teacher: give one of them"),
        (["--teachers", '{"code": "no/such"}'], "names no teacher"),
        (["--teachers", '{"default": "no/such/model"}'], "could not be read (--teachers default"),
        (["--teachers", "{"], "its value"),
    ],
    ids=["two ways", "a row without", "no model", "no JSON"],
)
def test_what_is_wrong_is_said_in_one_line(rows, models, tmp_path, named, said, capsys, tiny_model_dir):
    if "names no" in said:
        named = ["--teachers", json.dumps({"code": models["code"]})]
    assert main(arguments("score", models, rows[0], tmp_path / "records", *named)) == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]
