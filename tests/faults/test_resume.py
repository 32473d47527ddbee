"""A finished run that is resumed, and two runs in one directory."""

import os
import signal
import time

import pytest
import torch
from datasets import load_dataset
from faults import victims
from faults import world as worlds
from safetensors.torch import load_file

from tipdistill import TIPConfig, TIPTrainer

QUICK = {"record_rollouts": 0, "eval_tasks": "arithmetic[:2]", "eval_steps": 50, "max_steps": 2}


def run(world, out, log, **settings):
    return victims.run(victims.Victim(worlds.train(world, out, **{**QUICK, **settings}), log))


def files(out):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(out.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("strategy", ["steps", "no"])
def test_resuming_a_finished_run_changes_no_file_and_says_how_to_go_on(world, tmp_path, strategy):
    out, log = tmp_path / "run", tmp_path / "log"
    assert run(world, out, log, save_strategy=strategy) == [0], log.read_text()
    before = files(out)
    for asked in ("true", "auto"):
        assert run(world, out, log, save_strategy=strategy, resume_from_checkpoint=asked) == [0], log.read_text()
        assert files(out) == before
        said = log.read_text().splitlines()[-1]
        assert said.startswith(f"{out} is finished (step 2 of 2): no step was taken")
        assert "raise max_steps or num_train_epochs; to train again, choose another output_dir" in said
    if strategy == "no":
        assert run(world, out, log, save_strategy=strategy, max_steps=3) == [2]  # and it never starts over
        assert files(out) == before
        return
    assert run(world, out, log, max_steps=3) == [0], log.read_text()
    assert (out / "checkpoint-3").is_dir()
    assert load_file(out / "model.safetensors").keys()
    assert files(out)[out / "model.safetensors"] != before[out / "model.safetensors"]


@pytest.mark.parametrize("strategy", ["steps", "no"])
def test_from_python_a_finished_run_is_loaded_and_takes_no_step(world, tmp_path, strategy, caplog):
    dataset = load_dataset("json", data_files=str(world / "prompts.jsonl"), split="train")

    def trainer(**settings):
        args = TIPConfig(
            str(tmp_path / "run"),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy=strategy,
            save_steps=2,
            record_rollouts=0,
            max_completion_length=4,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=1,
            **{"max_steps": 2, **settings},
        )
        return TIPTrainer(str(world / "student"), str(world / "teacher"), args, dataset)

    first = trainer()
    first.train()
    first.save_model()
    first.save_state()
    before = files(tmp_path / "run")
    again = trainer()
    assert again.train(resume_from_checkpoint=True).global_step == 2
    assert files(tmp_path / "run") == before
    assert "is finished (step 2 of 2)" in caplog.text
    for name, weight in first.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name]), name


def test_the_second_run_in_a_directory_is_refused_with_the_firsts_process(world, tmp_path):
    out, log, second = tmp_path / "run", tmp_path / "log", tmp_path / "second"
    first = victims.Victim(worlds.train(world, out, **{**QUICK, "max_steps": 500}), log).start()
    while not (out / ".lock").exists() or not (out / ".lock").read_text():
        assert first.exitcode is None
        time.sleep(0.01)
    try:
        assert run(world, out, second) == [2]
        (said,) = [line for line in second.read_text().splitlines() if line.startswith("tipdistill train: ")]
        assert f"another training run is at work in {out} (process {first.pid} on " in said
        assert first.exitcode is None
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.join()
    assert run(world, out, log) == [0], log.read_text()  # a dead one holds nothing


def test_jit_checkpoints_are_refused(tmp_path):
    with pytest.raises(ValueError, match="enable_jit_checkpoint is not needed: SIGTERM"):
        TIPConfig(str(tmp_path), use_cpu=True, bf16=False, enable_jit_checkpoint=True)
