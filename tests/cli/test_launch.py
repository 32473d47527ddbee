"""Launches that would silently run as less than what was asked for are refused in one line, before any loading."""

import importlib.util
import json
from pathlib import Path

import forks
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM
from trl.cli.accelerate_config import resolve_accelerate_config_argument

from tipdistill import TIPConfig
from tipdistill.cli import main
from tipdistill.recipes import launch

PAIR = ["--model_name_or_path", "s", "--teacher_model_name_or_path", "t", "--dataset_name", "d"]
CPU = ["--use_cpu", "true", "--bf16", "false"]
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
DISTRIBUTED = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_MIXED_PRECISION", "TIPDISTILL_LAUNCHED")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in [*DISTRIBUTED, "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_CPU"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("tipdistill.recipes.run.build", lambda *_: pytest.fail("a run was begun"))
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: name == "deepspeed" or find_spec(name, *rest))


@pytest.fixture
def launched(monkeypatch):
    """The commands that would have been run."""
    commands = []

    def run(command, environment):
        commands.append(command)
        return 0

    monkeypatch.setattr("tipdistill.recipes.run.supervise", run)
    return commands


def refused(capsys, *flags):
    assert main(["train", *PAIR, *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("gpus", "flags", "message"),
    [
        (0, ["--num_processes", "2"], "there is no GPU, so each would train alone"),
        (0, ["--accelerate_config", "multi_gpu"], "asks for 8 processes and there is no GPU"),
        (4, ["--accelerate_config", "multi_gpu"], "on 1 machine(s) with 4 GPU(s) each: give --num_processes 4"),
        (4, ["--num_processes", "8"], "give --num_processes 4"),
        (0, ["--accelerate_config", "fsdp2", "--num_processes", "2"], "accelerate would run plain DDP"),
        (8, ["--accelerate_config", "fsdp2", *CPU], "use_cpu is set: accelerate would run plain DDP"),
        (0, ["--accelerate_config", "zero2", "--num_processes", "2"], "each process would train alone"),
        (0, ["--accelerate_config", "zero3", *CPU], "asks for DeepSpeed, which needs GPUs"),
        (8, ["--accelerate_config", "single_gpu", "--num_processes", "4"], "starts one process (distributed_type: NO"),
        (8, ["--accelerate_config", "fsdp1"], "is FSDP version 1"),
        (8, ["--accelerate_config", "zero33"], "Did you mean 'zero3'"),
    ],
    ids=str,
)
def test_a_launch_that_would_run_as_less_is_refused(monkeypatch, launched, capsys, gpus, flags, message):
    monkeypatch.setattr(launch, "devices", lambda: gpus)
    assert message in refused(capsys, *flags)
    assert launched == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distributed_type": "MULTI_CPU", "num_processes": 2}, "starts one process (distributed_type: MULTI_CPU"),
        ({"distributed_type": "MULTI_GPU", "num_processes": 2, "use_cpu": True}, "use_cpu: True"),
        ({"distributed_type": "FSDP", "num_processes": 2, "fsdp_config": {}}, "is FSDP version 1"),
        ({"distributed_type": "MULTI_GPU", "num_processes": 32, "num_machines": 2}, "give --num_processes 16"),
        ("fsdp2", "must hold a mapping"),
    ],
)
def test_a_file_that_would_run_as_less_is_refused(monkeypatch, launched, capsys, tmp_path, settings, message):
    monkeypatch.setattr(launch, "devices", lambda: 8)
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(settings))
    assert message in refused(capsys, "--accelerate_config", str(tmp_path / "a.yaml"))
    assert launched == []


@pytest.mark.parametrize("preset", ["single_gpu", "multi_gpu", "fsdp2", "zero2", "zero3"])
def test_each_preset_is_launched_where_there_are_gpus(monkeypatch, launched, preset):
    monkeypatch.setattr(launch, "devices", lambda: 8)
    assert main(["train", *PAIR, "--accelerate_config", preset]) == 0
    (command,) = launched
    assert command[1:4] == ["-m", "accelerate.commands.launch", "--config_file"]
    assert command[4].endswith(f"{preset}.yaml")
    assert command[5:8] == ["-m", "tipdistill.cli", "train"]


@pytest.mark.parametrize(
    ("environment", "flags", "message"),
    [
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "0"}, [], "2 processes were started (WORLD_SIZE) and there is no GPU"),
        # what `accelerate launch --cpu --num_processes 2` leaves its one process
        (
            {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"},
            CPU,
            "asked for several processes and started one",
        ),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "0", "ACCELERATE_USE_FSDP": "true"}, CPU, "run plain DDP"),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "0", "ACCELERATE_USE_DEEPSPEED": "true"}, CPU, "run plain DDP"),
    ],
)
def test_a_process_that_was_given_less_than_asked_for_stops(monkeypatch, capsys, environment, flags, message):
    monkeypatch.setattr(launch, "devices", lambda: 0)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert message in refused(capsys, *flags)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "flags", "message"),
    [
        (["accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m"], CPU, "started one"),
        (["torch.distributed.run", "--nproc_per_node", "2", "-m"], CPU[2:], "each would train alone"),
    ],
)
def test_real_launchers_leave_what_the_checks_look_for(launcher, flags, message, tmp_path):
    name, *options = launcher
    argv = [*options, "tipdistill.cli", "train", *PAIR, *flags]
    assert forks.run(forks.module, name, argv, log=tmp_path / "log") != 0
    assert message in (tmp_path / "log").read_text()


def test_a_configuration_outside_the_command_line_refuses_processes_that_would_train_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="accelerate sees one"):
        TIPConfig(str(tmp_path), bf16=False)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
def test_a_preset_trains_saves_and_loads(tiny_model_dir, word_problems, tmp_path, preset):
    """From TRL's preset through accelerate's launcher to a checkpoint and a model, as far as a CPU goes."""
    student, teacher = tiny_model_dir("qwen3", "student"), tiny_model_dir("llama", "teacher")
    _, config = resolve_accelerate_config_argument(["--accelerate_config", preset])
    if preset == "zero3":  # its bf16 and --bf16 would have to agree, and a CPU has no bf16 in transformers' eyes
        settings = {**yaml.safe_load(Path(config).read_text()), "mixed_precision": "no"}
        config = tmp_path / "zero3.yaml"
        config.write_text(yaml.safe_dump(settings))
    command = ["--config_file", str(config), "--num_processes", "2", str(Path(__file__).parents[1] / "train_on_cpu.py")]
    command += ["--dataset_name", str(word_problems)]
    command += ["--model_name_or_path", str(student), "--teacher_model_name_or_path", str(teacher), "--max_steps", "2"]
    command += ["--output_dir", str(tmp_path / "run"), "--report_to", "none", "--per_device_train_batch_size", "4"]
    command += ["--max_completion_length", "6", "--logging_steps", "1", "--disable_tqdm", "true", "--bf16", "false"]
    log, environment = tmp_path / "log", {"DS_ACCELERATOR": "cpu"}
    code = forks.run(forks.module, "accelerate.commands.launch", command, log=log, environment=environment)
    assert code == 0, log.read_text()[-4000:]
    assert "8 prompts × 1 rollouts" in log.read_text()
    for directory in (tmp_path / "run/checkpoint-2", tmp_path / "run"):
        model = AutoModelForCausalLM.from_pretrained(directory)
        assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    history = json.loads((tmp_path / "run/trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in history if "grad_norm" in entry]
    assert len(steps) == 2
    for name in ("loss", "reverse_kl"):  # bf16 weights are no reason to round these
        assert all(torch.tensor(step[name]).bfloat16().item() != step[name] > 0 for step in steps), name
