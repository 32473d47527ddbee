"""`tipdistill score`: records of a pair, the same after an interruption; what is wrong is refused before weights."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from tipdistill.cli import main
from tipdistill.records import open_records


@pytest.fixture
def flags(tiny_model_dir, word_problems, tmp_path):
    return [
        "score",
        *("--model", str(tiny_model_dir("qwen3", "student"))),
        *("--teacher", str(tiny_model_dir("qwen3", "teacher", vocab_rows=432))),
        *("--dataset", str(word_problems)),
        *("--output_dir", str(tmp_path / "records")),
        *("--max_prompts", "6", "--max_new_tokens", "8", "--batch_size", "4", "--device", "cpu"),
    ]


def test_records_of_a_pair(flags, tmp_path, capsys):
    assert (
        main([*flags, "--rules", "soft_or,q3,complement:soft_or", "--retention", "0.25", "--num_generations", "2"]) == 0
    )
    records = open_records(tmp_path / "records")
    assert len(records.rollouts) == 12
    assert records.rollouts["prompt_id"].to_pylist() == [number // 2 for number in range(12)]
    assert records.read().schema.names[-2:] == ["kept_complement:soft_or", "score_complement:soft_or"]
    assert records.sidecar["vocabulary"] == 400
    assert records.sidecar["settings"]["max_new_tokens"] == 8
    shown = capsys.readouterr().out
    assert "confident and wrong" in shown
    assert "complement:soft_or" in shown


def test_an_interrupted_run_goes_on_and_ends_with_the_same_records(flags, tmp_path, capsys, monkeypatch):
    assert main(flags) == 0
    whole = open_records(tmp_path / "records").read()
    assert main(flags) == 2
    assert "already holds token records" in capsys.readouterr().err

    from tipdistill import pair

    score, calls = pair.score_with, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score(*arguments, **options)

    monkeypatch.setattr(pair, "score_with", interrupted)
    assert main([*flags, "--overwrite_output_dir"]) == 130
    assert len(list((tmp_path / "records" / "parts").glob("tokens-*"))) == 1
    assert open_records(tmp_path / "records").read().equals(whole)  # the earlier records are still there
    assert main([*flags, "--overwrite_output_dir"]) == 0
    assert len(calls) == 3  # the first batch was not scored again
    assert open_records(tmp_path / "records").read().equals(whole)


def test_other_settings_do_not_go_on_from_unfinished_records(flags, capsys, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("tipdistill.pair.score_with", interrupted)
    assert main(flags) == 130
    assert main([*flags, "--seed", "3"]) == 2
    assert "unfinished records with other settings (seed differ)" in capsys.readouterr().err


@pytest.fixture
def loads_nothing(monkeypatch):
    def load(*arguments, **options):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("tipdistill.pair.load_models", load)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--retension", "0.5"], "there is no flag --retension. Did you mean '--retention'"),
        (["--retention", "1.5"], "retention is the share of the tokens that is kept, a number in (0, 1], got 1.5"),
        (["--rules", "soft_or,softor"], "unknown rule 'softor'"),
        (["--rules", "q3,q3"], "each once"),
        (["--scope", "token"], "scope must be one of rollout, batch"),
        (["--temperature", "0"], "must be a positive number, got 0"),
        (["--max_new_tokens", "0"], "must be at least 1, got 0"),
        (["--max_new_tokens", "600"], "takes all of the 512 positions of the student"),
        (["--entropy_threshold", "2"], "entropy_threshold must be in [0, 1]"),
        (["--dataset", "no.jsonl"], "there is no dataset at no.jsonl"),
        (["--prompt_column", "prom"], "no column 'prom', its columns are prompt. Did you mean 'prompt'"),
        (["--model", "no/such/model"], "the student could not be read (--model no/such/model)"),
        (["--device", "cuda:7"], "--device cuda:7: there is no such device here"),
        (["--device", "gpu"], "--device gpu: there is no such device here"),
        (["--dtype", "float8"], "invalid choice: 'float8'"),
        (["--max_prompt_length", "1"], "every prompt is longer than max_prompt_length"),
        (["--use_vllm"], 'needs the package vllm, which is not installed: pip install "tipdistill[vllm]"'),
    ],
    ids=str,
)
def test_what_is_wrong_is_refused_in_one_line(flags, extra, message, capsys, loads_nothing):
    if "cuda:7" in extra and torch.cuda.device_count() > 7:
        pytest.skip("there is such a device")
    assert main([*flags, *extra]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_images_that_nothing_would_read_are_refused(flags, tmp_path, capsys, loads_nothing):
    rows = tmp_path / "shown.jsonl"
    rows.write_text('{"prompt": "What is it?", "images": null}\n{"prompt": "And this?", "images": ["a.png"]}\n')
    assert main([*flags, "--dataset", str(rows)]) == 2
    assert "row 1 (counting from 0) has an image, and text alone is read here" in capsys.readouterr().err


def test_different_tokenizers_are_refused(flags, tmp_path, tiny_model_dir, capsys, loads_nothing):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir("qwen3", "student"))
    tokenizer.save_pretrained(tmp_path / "teacher")
    saved = json.loads((tmp_path / "teacher" / "tokenizer.json").read_text())
    words = saved["model"]["vocab"]
    words["!"], words["#"] = words["#"], words["!"]
    (tmp_path / "teacher" / "tokenizer.json").write_text(json.dumps(saved))
    Qwen2Config(vocab_size=400).save_pretrained(tmp_path / "teacher")
    assert main([*flags, "--teacher", str(tmp_path / "teacher")]) == 2
    assert (
        "the tokenizers differ, first at token id 3: the student reads '!' and the teacher" in capsys.readouterr().err
    )


def test_conversations_need_a_chat_template(flags, tmp_path, tiny_model_dir, capsys, loads_nothing):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir("qwen3", "student"))
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "student")
    AutoModelForCausalLM.from_pretrained(tiny_model_dir("qwen3", "student")).config.save_pretrained(
        tmp_path / "student"
    )
    assert main([*flags, "--model", str(tmp_path / "student"), "--apply_chat"]) == 2
    assert "has no chat template" in capsys.readouterr().err


def test_every_setting_that_shapes_the_records_is_in_the_sidecar(flags, tmp_path):
    assert main([*flags, "--max_prompts", "2", "--temperature", "0.5"]) == 0
    sidecar = json.loads((tmp_path / "records" / "records.json").read_text())
    assert sidecar["temperature"] == 0.5
    assert sidecar["settings"]["max_prompts"] == 2
    assert sidecar["student"].endswith("qwen3-student-400")
