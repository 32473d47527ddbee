"""The examples run as a stranger would run them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from serving import serving
from transformers import AutoModelForCausalLM

from tipdistill.cli import main

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
def test_plain_pytorch_lowers_the_divergence_on_half_of_the_tokens():
    done = subprocess.run(
        [sys.executable, EXAMPLES / "plain_pytorch.py"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"divergence (\d+\.\d+) nats per token, trained on (\d+) of (\d+)", done.stdout)
    divergences = [float(divergence) for divergence, _, _ in lines]
    assert len(divergences) == 9
    assert min(divergences[-3:]) < 0.8 * divergences[0]
    assert {int(kept) / int(tokens) for _, kept, tokens in lines} == {0.5}


def test_plain_pytorch_uses_public_names_only_and_stays_short():
    source = (EXAMPLES / "plain_pytorch.py").read_text(encoding="utf-8")
    import tipdistill

    used = set(re.findall(r"\btip\.(\w+)", source))
    assert {"Head", "token_scores", "select", "selected_loss"} <= used <= set(tipdistill.__all__)
    assert "Trainer" not in source
    assert len(source.splitlines()) <= 70


def test_slurm_starts_every_host_with_its_rank(tmp_path):
    """With Slurm's and accelerate's commands replaced by ones that tell what they were asked."""
    commands = {
        "scontrol": "echo host-a; echo host-b",
        "srun": 'while [[ "$1" == --* ]]; do shift; done; for id in 0 1; do SLURM_NODEID=$id "$@"; done',
        "accelerate": 'printf "%s " "$@"; echo',
        "python": f'exec "{sys.executable}" "$@"',
    }
    for name, body in commands.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_NODELIST": "host-[a-b]"}
    environment = {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PRESET": "zero3"}
    command = ["bash", str(EXAMPLES / "slurm.sh"), "--config", "a recipe.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=environment)
    for rank, line in enumerate(done.stdout.splitlines()):
        assert "accelerate_configs/zero3.yaml --num_machines 2 --num_processes 8" in line
        assert f"--machine_rank {rank} --main_process_ip host-a" in line
        assert line.endswith("-m tipdistill.cli train --config a recipe.yaml ")
    assert len(done.stdout.splitlines()) == 2


def test_slurm_saves_queues_itself_again_and_resumes(tmp_path):
    """`srun` stands for a run that is told of SIGUSR1, saves, and ends with 128 + its number."""
    commands = {
        "scontrol": f'if [ "$1" = requeue ]; then echo "$2" > "{tmp_path}/queued"; else echo host-a; fi',
        "srun": f"""trap 'kill "$waiting"; exit 138' USR1; echo "$@" > "{tmp_path}/asked"
            touch "{tmp_path}/started"; sleep 60 & waiting=$!; wait""",
        "python": "echo preset.yaml",
    }
    for name, body in commands.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "host-a", "SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": "1"}
    environment = {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    job = subprocess.Popen(["bash", str(EXAMPLES / "slurm.sh"), "--config", "laptop"], env=environment)
    while not (tmp_path / "started").exists():
        assert job.poll() is None
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(30) == 138
    assert (tmp_path / "queued").read_text() == "17\n"
    assert (tmp_path / "asked").read_text().endswith("train --resume_from_checkpoint auto --config laptop\n")
    assert "#SBATCH --signal=B:USR1@" in (EXAMPLES / "slurm.sh").read_text()


SHORT = {"max_steps": 2, "max_completion_length": 8, "per_device_train_batch_size": 4, "use_cpu": True}


@pytest.mark.slow
def test_a_script_of_trls_is_the_same_run_on_all_tokens(tiny_model_dir, word_problems, tmp_path):
    models = [str(tiny_model_dir("qwen3", role)) for role in ("student", "teacher")]
    command = [sys.executable, EXAMPLES / "from_trl.py", "--model", models[0], "--teacher", models[1]]
    command += ["--dataset", word_problems, "--output_dir", tmp_path, "--use_cpu"]
    command += [part for name, value in SHORT.items() if name != "use_cpu" for part in (f"--{name}", str(value))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    said = dict(re.findall(r"^(.+): first loss (\d+\.\d+)", done.stdout, re.MULTILINE))
    assert list(said) == ["trl", "all tokens", "half of them"]
    assert float(said["all tokens"]) == pytest.approx(float(said["trl"]), rel=1e-3)
    kept = re.findall(r"tokens trained on (\d+)%", done.stdout)
    assert kept[:2] == ["100", "100"]
    assert 30 <= int(kept[2]) <= 50


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tiny_model_dir, word_problems, tmp_path):
    """Its own cells in order, with tiny models and a few steps in the place of the settings."""
    cells = json.loads((EXAMPLES / "from_trl.ipynb").read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert all(not cell.get("outputs") for cell in cells)
    space = {}
    exec(sources[0], space)
    space.update(
        zip(("STUDENT", "TEACHER"), (str(tiny_model_dir("qwen3", r)) for r in ("student", "teacher")), strict=True)
    )
    space.update(PROMPTS=str(word_problems), OUTPUT=str(tmp_path))
    space["SETTINGS"] |= {**SHORT, "bf16": False, "gradient_checkpointing": False}
    for source in sources[1:]:
        exec(source, space)
    before, after = space["losses"]
    assert after == pytest.approx(before, rel=1e-3)
    assert (tmp_path / "half" / "report.html").is_file()


@pytest.mark.parametrize("name", ["itself", "several", "served"])
def test_the_recipes_with_other_teachers_train(
    name, tiny_model_dir, tiny_tokenizer, word_problems, tmp_path, monkeypatch
):
    """As they stand, on tiny models in the place of those that their head comment makes."""
    monkeypatch.chdir(EXAMPLES.parent)
    models = {"student": str(tiny_model_dir("qwen3", "student")), "teacher": str(tiny_model_dir("llama", "teacher"))}
    recipe = yaml.safe_load((EXAMPLES / "teachers" / f"{name}.yaml").read_text(encoding="utf-8"))
    text = json.dumps(recipe | {"output_dir": str(tmp_path / "run"), "max_steps": 2})
    for role, path in models.items():
        text = text.replace(f"runs/smollm2/models/{role}", path)
    text = text.replace("runs/smollm2/prompts.jsonl", str(word_problems))
    with serving(AutoModelForCausalLM.from_pretrained(models["teacher"]), tiny_tokenizer) as server:
        (tmp_path / "recipe.yaml").write_text(text.replace("http://localhost:8001/v1", server.url))
        assert main(["train", "--config", str(tmp_path / "recipe.yaml")]) == 0
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [step for step in steps if "loss" in step]
    assert len(steps) == 2
    assert steps[0]["reverse_kl"] > 0
    if name == "several":
        assert sum(steps[0][f"teacher/{one}/tokens"] for one in ("knows", "default")) > 0
