"""`tipdistill train --teacher_url`: the command against a stand-in for a vLLM server that holds a real tiny teacher."""

import json
import re
from pathlib import Path

import forks
import pytest
import torch
import yaml
from safetensors.torch import load_file
from serving import serving
from transformers import AutoModelForCausalLM

from tipdistill.cli import main
from tipdistill.recipes.read import parse

TINY = ["--use_cpu", "--bf16", "false", "--report_to", "none", "--max_completion_length", "6", "--retention", "0.3"]
TINY += ["--logging_steps", "1", "--learning_rate", "1e-3", "--disable_tqdm", "true"]


@pytest.fixture(scope="module")
def teacher(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir("qwen3", "teacher"))


@pytest.fixture
def served(teacher, tiny_tokenizer):
    with serving(teacher, tiny_tokenizer) as server:
        yield server


@pytest.fixture
def arguments(tiny_model_dir, word_problems, tmp_path, served):
    student = ["--model_name_or_path", str(tiny_model_dir("qwen3", "student")), "--teacher_url", served.url]
    return [*student, "--dataset_name", str(word_problems), "--output_dir", str(tmp_path / "run"), *TINY]


def state(directory: Path) -> dict:
    return json.loads((directory / "trainer_state.json").read_text())


@pytest.mark.parametrize(
    ("rule", "flags"),
    [("soft_or", []), ("entropy", ["--score_logging_steps", "0", "--teacher_top_k", "5"])],
    ids=["reads-the-divergence", "reads-no-teacher"],
)
def test_trains_to_the_end(arguments, served, tmp_path, rule, flags, capsys):
    flags = [*flags, "--selection_rule", rule, "--max_steps", "2", "--save_strategy", "no"]
    assert main(["train", *arguments, *flags]) == 0
    run = tmp_path / "run"
    assert f"# teacher   {served.url}\n" in capsys.readouterr().out
    before, after = load_file(Path(arguments[1]) / "model.safetensors"), load_file(run / "model.safetensors")
    assert any(not torch.equal(after[name], before[name]) for name in after)
    history = [entry for entry in state(run)["log_history"] if "loss" in entry]
    assert len(history) == 2
    for entry in history:
        assert 0 < entry["selection/kept_fraction"] < 0.5
        # everything where the rule reads the teacher; else what is kept, and no more
        assert (entry["teacher/tokens_asked"] == 8 * 6 * entry["selection/kept_fraction"]) == (rule == "entropy")
    written = run / "config.yaml"
    assert yaml.safe_load(written.read_text())["teacher_url"] == served.url
    assert parse(["--config", str(written)]).values == parse([*arguments, *flags]).values


@pytest.mark.parametrize("where", ["recipe", "flag"])
def test_every_field_of_the_server_arrives(arguments, served, tmp_path, where, monkeypatch, capsys):
    given = {"teacher_served_name": "big", "teacher_top_k": 3, "teacher_api_key_env": "TEACHER_KEY"}
    given |= {"teacher_timeout": 7.0, "teacher_time_limit": 11.0, "teacher_concurrency": 2}

    class Recorded(Exception):
        """Ends the run with what the server was to be opened with."""

    def server(*values):
        raise Recorded(*values)

    monkeypatch.setattr("tipdistill.teachers.served.TeacherServer", server)
    monkeypatch.setenv("TEACHER_KEY", "secret")
    flags = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    if where == "recipe":
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(given))
        flags = ["--config", str(tmp_path / "recipe.yaml")]
    with pytest.raises(Recorded) as opened:
        main(["train", *arguments, *flags])
    assert opened.value.args == (served.url, "big", 3, "secret", 7.0, 11.0, 2)


def test_dry_run_asks_the_server_and_loads_nothing(arguments, served, tmp_path, capsys, monkeypatch):
    def weights(*args, **kwargs):
        raise AssertionError("a dry run loaded weights")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", weights)
    assert main(["train", *arguments, "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert f"# teacher   teacher at {served.url}, which gives its 20 likeliest tokens\n" in shown
    (tmp_path / "shown.yaml").write_text(shown)
    assert parse(["--config", str(tmp_path / "shown.yaml")]).values == parse(arguments).values
    served.max_logprobs = -1
    assert main(["train", *arguments, "--dry_run"]) == 0
    assert "which gives its whole vocabulary\n" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_hidden_states_arrive_in_a_dry_run_and_train(arguments, tiny_model_dir, served, tmp_path, capsys, monkeypatch):
    teacher = str(tiny_model_dir("qwen3", "teacher"))
    flags = ["--teacher_lm_head", teacher, "--temperature", "0.7", "--selection_rule", "signal_to_curvature"]
    with monkeypatch.context() as patched:
        patched.setattr("transformers.PreTrainedModel.from_pretrained", None)  # no weights but the lm_head's
        assert main(["train", *arguments, *flags, "--dry_run"]) == 0
    line = f"# teacher   teacher at {served.url}, which gives hidden states of width 48 in float32, for the lm_head of "
    assert f"{line}{teacher}\n" in capsys.readouterr().out
    student = ["--teacher_lm_head", str(tiny_model_dir("qwen3", "student"))]
    assert main(["train", *arguments, *student, "--dry_run"]) == 2
    assert re.search(r"shape \[\d+, 48\], and the lm_head needs \[\d+, 32\]", capsys.readouterr().err.splitlines()[-1])
    assert main(["train", *arguments, *flags, "--max_steps", "1", "--score_logging_steps", "1"]) == 0
    run = tmp_path / "run"
    assert yaml.safe_load((run / "config.yaml").read_text())["teacher_lm_head"] == teacher
    assert [path.name for path in (run / "records").glob("*/tokens.parquet")] == ["tokens.parquet"]
    assert {body["embed_dtype"] for body in served.bodies} == {"float32"}


def test_what_the_server_cannot_serve_is_refused_in_one_line(arguments, served, tmp_path, capsys, monkeypatch):
    def refused(*flags):
        assert main(["train", *arguments, *flags]) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        assert error.splitlines()[-1].startswith("tipdistill train: ")
        return error

    assert "reads signal_to_curvature, which cannot be had" in refused(
        "--selection_rule", "signal_to_curvature", "--dry_run"
    )
    assert "does not serve 'other'; it serves teacher" in refused("--teacher_served_name", "other", "--dry_run")
    assert "name two teachers" in refused("--teacher_model_name_or_path", arguments[1], "--dry_run")
    monkeypatch.setattr("tipdistill.recipes.run._DRY_RUN_PATIENCE", 0.2)
    nobody = ["--teacher_url", "http://127.0.0.1:9/v1"]
    assert "refused" in refused(*nobody, "--dry_run")
    # the run itself says the same, before it loads weights
    assert "which cannot be had" in refused("--selection_rule", "signal_to_curvature")
    assert "gave no answer" in refused(*nobody, "--teacher_time_limit", "0.2")
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.slow
def test_a_teacher_that_stays_away_stops_the_command_which_then_goes_on(arguments, served, tmp_path):
    run, calm = tmp_path / "run", tmp_path / "calm"

    log = tmp_path / "log"

    def train(*flags):
        log.unlink(missing_ok=True)
        code = forks.run(forks.command, ["train", *arguments, "--max_steps", "4", *flags], log=log)
        return code, log.read_text()

    served.max_logprobs = -1
    code, said = train("--output_dir", str(calm))
    assert code == 0, said
    served.dies_after = len(served.bodies) + 1 + 8 * 2 + 3  # the probe at the start, two steps, and in the third
    code, said = train("--teacher_time_limit", "1")
    assert code == 2
    assert "Traceback" not in said
    last = said.splitlines()[-1]
    assert last.startswith(f"tipdistill train: the teacher at {served.url}")
    assert f"Step 2 was saved to {run}/checkpoint-2: go on with" in last
    assert not (run / "model.safetensors").exists()
    code, said = train()
    assert code == 2
    assert "--resume_from_checkpoint true" in said
    # still away: nothing is lost by trying
    code, said = train("--teacher_time_limit", "1", "--resume_from_checkpoint", "true")
    assert code == 2
    assert "gave no answer" in said.splitlines()[-1]
    served.dies_after, served.dead = None, False
    code, said = train("--resume_from_checkpoint", "true")
    assert code == 0, said
    assert [entry["step"] for entry in state(run)["log_history"] if "loss" in entry] == [1, 2, 3, 4]
    weights, expected = (load_file(path / "model.safetensors") for path in (run, calm))
    for name, weight in expected.items():
        assert torch.equal(weights[name], weight), name
