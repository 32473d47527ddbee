"""docs/metrics.md names every figure that a training logs, and no figure of ours that none logs."""

import re
from pathlib import Path

import pytest
from acting import NAMES, Shop, speaks_of_tools
from datasets import Dataset
from on_cpu import ON_CPU
from serving import serving
from transformers import AutoModelForCausalLM, AutoTokenizer

from tipdistill import TIPConfig, TIPTrainer
from tipdistill.tasks import TASKS

PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
TINY = {
    **ON_CPU,
    "max_completion_length": 8,
    "max_steps": 1,
    "per_device_train_batch_size": 4,
    "record_rollouts": 2,
}
SAMPLES = 2


def section(title: str) -> str:
    return PAGE.partition(f"## {title}\n")[2].partition("\n## ")[0]


def in_table(title: str) -> set[str]:
    names = re.findall(r"^\| `([^`]+)` \|", section(title), re.M)
    assert len(names) == len(set(names)), f"a name stands twice under {title}"
    return {name.replace("TASK", "sums").replace("_K", f"_{SAMPLES}").replace("_FILE", "_held_out") for name in names}


OURS = in_table("Ours, at every logged step")
AHEAD = in_table("With `rollout_ahead`")
SERVED = in_table("With a teacher on a server")
SEVERAL = in_table("With several teachers")
TASK = in_table("With `eval_tasks`")
TOOLS = in_table("With tools")
TRL = in_table("TRL's")


def logged(trainer) -> set[str]:
    trainer.train()
    return {name for entry in trainer.state.log_history for name in entry}


@pytest.fixture
def pair(tiny_model_dir):
    return str(tiny_model_dir("qwen3", "student")), str(tiny_model_dir("qwen3", "teacher"))


@pytest.fixture
def prompts(word_problems):
    return Dataset.from_json(str(word_problems))


def test_the_page_names_what_a_training_logs(pair, prompts, tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "sums", {"problems": [("2 + 3 =", "5"), ("1 + 1 =", "2")]})
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text('{"prompt": "2 + 3 ="}\n', encoding="utf-8")
    measured = {"eval_strategy": "steps", "eval_steps": 1, "eval_num_samples": SAMPLES}
    args = TIPConfig(str(tmp_path / "run"), **TINY, **measured, eval_tasks=f"sums,reverse_kl={held_out}")
    every = logged(TIPTrainer(*pair, args, prompts, eval_dataset=prompts.select(range(4))))
    # what a divergence shares with other tasks has its line under theirs
    shared = {f"eval_reverse_kl_held_out/{name}" for name in ("standard_error", "mean_tokens", "truncated")}
    assert shared <= every
    names = every - shared
    of_the_loss = {name for name in names if name.startswith("eval_") and name not in TASK}
    assert names - of_the_loss - OURS - TASK - TRL == set()
    assert (OURS | TASK) - names == set()
    # without tools there are none of theirs
    assert {name for name in TRL - names if not name.startswith("tools/")} == set()
    shown = re.findall(r"`(eval_[\w/…]+)`", section("TRL's"))
    unknown = [name for name in of_the_loss if not any(name.startswith(known.rstrip("…")) for known in shown)]
    assert unknown == []


def test_the_page_names_what_rollouts_written_ahead_add(pair, prompts, tmp_path):
    args = TIPConfig(str(tmp_path), **{**TINY, "max_steps": 2, "rollout_ahead": 1, "record_rollouts": 0})
    names = logged(TIPTrainer(*pair, args, prompts))
    assert names - OURS - TRL == AHEAD


def test_the_page_names_what_a_served_teacher_adds(pair, prompts, tiny_tokenizer, tmp_path):
    with serving(AutoModelForCausalLM.from_pretrained(pair[1]), tiny_tokenizer) as server:
        args = TIPConfig(str(tmp_path), **{**TINY, "teacher_url": server.url, "record_rollouts": 0})
        names = logged(TIPTrainer(pair[0], None, args, prompts))
    assert names - OURS - TRL == SERVED


def test_the_page_names_what_several_teachers_add(pair, prompts, tmp_path):
    args = TIPConfig(
        str(tmp_path), **{**TINY, "teachers": {"maths": pair[1], "default": pair[1]}, "record_rollouts": 0}
    )
    dataset = prompts.add_column("teacher", ["maths" if row % 2 else None for row in range(len(prompts))])
    names = logged(TIPTrainer(pair[0], None, args, dataset))
    assert names - OURS - TRL == {name.replace("NAME", one) for name in SEVERAL for one in ("maths", "default")}


def test_the_page_names_what_tools_add(pair, tmp_path):
    tokenizer = speaks_of_tools(AutoTokenizer.from_pretrained(pair[0]))
    rows = [{"prompt": [{"role": "user", "content": f"Buy a {name}."}]} for name in NAMES]
    args = TIPConfig(str(tmp_path), **{**TINY, "max_completion_length": 200, "record_rollouts": 0})
    options = {"processing_class": tokenizer, "environment_factory": Shop}
    names = logged(TIPTrainer(*pair, args, Dataset.from_list(rows), **options))
    assert names - OURS - (TRL - {"tools/call_frequency", "tools/failure_frequency"}) == {
        *(name.replace("FIGURE", "count") for name in TOOLS),
        "tools/call_frequency",
        "tools/failure_frequency",
    }
