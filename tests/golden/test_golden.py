"""Tiny runs whose losses, gradient norms, kept tokens and final weights were written down, and must come out again.

A change that moves code changes none of them. On the kind of processor, and the versions, that golden.json names they
are the same bit for bit; elsewhere, where a sum may round differently, losses and norms are close.

    TIPDISTILL_GOLDEN=write pytest tests/golden        # write them down anew, and say in the commit why they changed
"""

import hashlib
import json
import socket
from pathlib import Path

import forks
import pytest
import sharded_run
import torch
import yaml
from datasets import Dataset
from golden_file import digest, hold, weights
from heads import FIELDS, incoming_of, leaves, make_pair, tokens_of
from on_cpu import ON_CPU
from safetensors.torch import load_file
from serving import serving
from transformers import AutoModelForCausalLM

import tipdistill as tip
from tipdistill import TIPConfig, TIPTrainer
from tipdistill.cli import main
from tipdistill.records import open_records
from tipdistill.score.top_k_teacher import tail_reverse_kl, top_k_scores
from tipdistill.sweep import workers

HERE = Path(__file__).parent
# figures of the clock and of the machine, and not of the run
OF_THE_MACHINE = ("time/", "memory/", "tokens_per_second", "teacher/bytes", "completions/", "num_tokens", "step_time")
PLAIN = {
    **ON_CPU,
    "max_completion_length": 12,
    "learning_rate": 1e-3,
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_generations": 2,
    "score_logging_steps": 2,
    "record_rollouts": 8,
    "normalization": "batch",
}
TRAINED = {
    "all": {"selection_rule": "all", "retention": 1.0},
    "all-micro_batch": {"selection_rule": "all", "retention": 1.0, "normalization": "micro_batch"},
    "all-offload": {"selection_rule": "all", "retention": 1.0, "teacher_offload": True},
    "soft_or": {"retention": 0.3},
    "soft_or-micro_batch": {"retention": 0.3, "normalization": "micro_batch"},
    "soft_or-offload": {"retention": 0.3, "teacher_offload": True, "scoring_tokens": 64},
    "soft_or-jsd": {"retention": 0.3, "beta": 0.5, "temperature": 0.8},
    "soft_or-forward_kl": {"retention": 0.3, "beta": 0.0, "selection_scope": "batch"},
    "entropy": {"selection_rule": "entropy", "retention": 0.2},
    "random-micro_batch": {"selection_rule": "random", "retention": 0.25, "normalization": "micro_batch"},
    "gradient_norm_sampling": {
        "selection_rule": "gradient_norm_sampling",
        "retention": 0.1,
        "selection_scope": "batch",
    },
    "position-micro_batch": {"selection_rule": "position", "normalization": "micro_batch"},
    "cumulative_advantage": {"selection_rule": "cumulative_advantage"},
}
SERVED = {
    "whole": ({"retention": 0.3}, -1),
    "whole-all": ({"selection_rule": "all", "retention": 1.0}, -1),
    "top": ({"retention": 0.3}, 20),
    "top-entropy": ({"selection_rule": "entropy", "retention": 0.2, "score_logging_steps": 0}, 20),
    "top-micro_batch": ({"selection_rule": "all", "retention": 1.0, "beta": 0.5}, 20),
}


@pytest.fixture
def holds(request):
    """Compare what a run gave with what was written down under the test's name."""
    return lambda found: hold(request.node.name.removeprefix("test_"), found)


def table_digest(directory):
    """A hash of token records: every statistic, who is kept, with which score."""
    text = json.dumps(open_records(directory).read().to_pylist(), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def figures(history):
    return [
        {name: value for name, value in entry.items() if not name.startswith(OF_THE_MACHINE) and name != "epoch"}
        for entry in history
        if "loss" in entry
    ]


def trained(trainer, directory):
    trainer.train()
    records = Path(directory) / "records"
    return {
        "steps": figures(trainer.state.log_history),
        "weights": weights(trainer.accelerator.unwrap_model(trainer.model)),
        "records": {path.name: table_digest(path) for path in sorted(records.glob("step-*"))},
    }


@pytest.fixture
def pair(tiny_model_dir):
    return str(tiny_model_dir("qwen3", "student")), str(tiny_model_dir("qwen3", "teacher", vocab_rows=432))


@pytest.fixture
def prompts(word_problems):
    return Dataset.from_json(str(word_problems))


@pytest.mark.parametrize("name", TRAINED)
def test_trained(name, pair, prompts, tmp_path, holds):
    args = TIPConfig(str(tmp_path), **{**PLAIN, **TRAINED[name]})
    holds(trained(TIPTrainer(*pair, args, prompts, eval_dataset=prompts.select(range(8))), tmp_path))


def test_evaluated(pair, prompts, tmp_path, holds):
    """The loss of an evaluation is over all tokens, whatever the rule."""
    args = TIPConfig(str(tmp_path), **{**PLAIN, "retention": 0.3, "eval_strategy": "steps", "eval_steps": 1})
    trainer = TIPTrainer(*pair, args, prompts, eval_dataset=prompts.select(range(8)))
    trainer.train()
    holds([entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry])


def test_lora(pair, prompts, tmp_path, holds):
    peft = pytest.importorskip("peft")
    args = TIPConfig(str(tmp_path), **{**PLAIN, "retention": 0.3, "learning_rate": 1e-2})
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    holds(trained(TIPTrainer(*pair, args, prompts, peft_config=lora), tmp_path))


@pytest.mark.parametrize("name", SERVED)
def test_served(name, pair, prompts, tiny_tokenizer, tmp_path, holds):
    settings, max_logprobs = SERVED[name]
    teacher = AutoModelForCausalLM.from_pretrained(pair[1])
    with serving(teacher, tiny_tokenizer, max_logprobs=max_logprobs) as server:
        args = TIPConfig(str(tmp_path), **{**PLAIN, **settings, "teacher_url": server.url, "record_rollouts": 0})
        holds(trained(TIPTrainer(pair[0], None, args, prompts), tmp_path))


@pytest.mark.slow
def test_two_processes(pair, word_problems, tmp_path, holds):
    """DDP and FSDP2 over gloo."""
    settings = {**PLAIN, "retention": 0.3, "per_device_train_batch_size": 2}
    del settings["use_cpu"]
    same = {"student": pair[0], "teacher": pair[1], "data": str(word_problems), "settings": settings, "processes": 2}
    engines, jobs = ("ddp", "fsdp2"), []
    for engine in engines:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        jobs.append({**same, "engine": engine, "out": str(tmp_path / engine), "port": port})
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    log = tmp_path / "log"
    assert forks.run(sharded_run.main, tmp_path / "jobs.json", log=log) == 0, log.read_text()[-4000:]
    results = {}
    for engine in engines:
        state = json.loads((tmp_path / engine / "figures.json").read_text())
        names = ("loss", "grad_norm", "selection/kept_fraction", "reverse_kl")
        saved = load_file(tmp_path / engine / "model.safetensors")
        results[engine] = {
            **{name: state[name] for name in names},
            "weights": digest(*(saved[name] for name in sorted(saved))),
            "records": {
                path.name: table_digest(path) for path in sorted((tmp_path / engine / "records").glob("step-*"))
            },
        }
    holds(results)


def test_score(pair, word_problems, tmp_path, holds):
    flags = ["--model", pair[0], "--teacher", pair[1], "--dataset", str(word_problems), "--device", "cpu"]
    flags += ["--max_prompts", "6", "--max_new_tokens", "8", "--rules", "soft_or,q3,gradient_norm", "--seed", "3"]
    assert main(["score", *flags, "--output_dir", str(tmp_path / "records")]) == 0
    sidecar = open_records(tmp_path / "records").sidecar
    holds({"records": table_digest(tmp_path / "records"), "quadrants": sidecar["quadrants"]})


def test_probe(pair, word_problems, tmp_path, holds):
    flags = ["--model", pair[0], "--teacher", pair[1], "--dataset", str(word_problems), "--device", "cpu"]
    flags += ["--max_prompts", "6", "--max_new_tokens", "8", "--rules", "soft_or,q3,gradient_norm_sampling"]
    flags += ["--retentions", "0.5,0.25", "--random_seeds", "2", "--bootstrap", "20"]
    assert main(["probe", *flags, "--output_dir", str(tmp_path / "probe")]) == 0
    result = json.loads((tmp_path / "probe" / "probe.json").read_text())
    costs = ("step_seconds", "peak_memory_gib")
    holds([{name: value for name, value in row.items() if name not in costs} for row in result["rows"]])


@pytest.mark.slow
def test_sweep(pair, word_problems, tmp_path, holds, monkeypatch):
    """Two cells, in workers of their own."""
    (tmp_path / "golden_task.py").write_text(
        "from tipdistill.tasks import arithmetic\n"
        "problems = [(arithmetic.prompt_of(*pair), '1') for pair in arithmetic.problems(12, 0, held_out=True)]\n"
        "task = {'problems': problems, 'prompt': 'own', 'check': lambda response, answer: 'e' in response}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(workers, "START_METHOD", forks.context().get_start_method())
    recipe = {
        **{name: value for name, value in PLAIN.items() if name not in ("report_to", "disable_tqdm", "logging_steps")},
        "model_name_or_path": pair[0],
        "teacher_model_name_or_path": pair[1],
        "dataset_name": str(word_problems),
        "record_rollouts": 0,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    grid = {
        "base": str(tmp_path / "recipe.yaml"),
        "cells": {"soft_or": 0.3, "random": 0.3},
        "learning_rates": [1e-3],
        "seeds": [0],
        "test": "golden_task.task",
        "num_samples": 2,
    }
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    out = tmp_path / "sweep"
    flags = ["--workers", "1", "--threads", "1", "--trust_recipe"]
    assert main(["sweep", str(tmp_path / "grid.yaml"), "--output_dir", str(out), *flags]) == 0
    found = {}
    for path in sorted(out.rglob("cell.json")):
        result = json.loads(path.read_text())["result"]
        state = json.loads((path.parent / "trainer_state.json").read_text())
        found[path.parent.relative_to(out).as_posix()] = {
            "steps": figures(state["log_history"]),
            "tasks": result["tasks"],
            "trained_tokens": result["trained_tokens"],
        }
    assert len(found) == 2
    holds(found)


IMPLEMENTATIONS = ("reference", "chunked", "triton")


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_token_scores(impl, holds):
    """Every statistic and the gradient of the divergence; then the fused loss."""
    torch.manual_seed(0)
    found = {}
    for options in ({}, {"bias": True, "softcap": 3.0, "logit_scale": 1.3}):
        student, teacher = make_pair(37, 301, torch.float32, teacher_vocabulary=320, **options)
        tokens = tokens_of(student, teacher)
        for divergence in ("reverse_kl", "forward_kl", "jsd"):
            of_student, head = leaves(student)
            arguments = {"divergence": divergence, "temperature": 0.9, "token_ids": tokens, "impl": impl}
            scores = tip.token_scores(head, teacher, fields=FIELDS, **arguments)
            (scores.require("divergence") * incoming_of(37, torch.float32)).sum().backward()
            gradients = [None if tensor is None else tensor.grad for tensor in of_student]
            of_student, head = leaves(student)
            loss = tip.fused_divergence_loss(head, teacher, incoming_of(37, torch.float32).abs(), divergence, impl=impl)
            loss.backward()
            fused = [None if tensor is None else tensor.grad for tensor in of_student]
            found[f"{divergence} {sorted(options)}"] = {
                "scores": {name: digest(value) for name, value in scores.present()},
                "mean": {name: value.mean().item() for name, value in scores.present()},
                "gradients": digest(*gradients),
                "loss": loss.item(),
                "fused": digest(*fused),
            }
    holds(found)


@pytest.mark.parametrize("rule", list(tip.RULES))
def test_selected(rule, holds):
    """Which tokens each rule keeps, with what weight."""
    student, teacher = make_pair(120, 97, torch.float32)
    scores = tip.token_scores(student, teacher, fields=FIELDS, token_ids=tokens_of(student, teacher)).detach()
    rollout = torch.arange(120) // 17
    found = {}
    for scope in ("rollout", "batch"):
        for retention in (0.5, 0.07):
            generator = torch.Generator().manual_seed(5)
            picked = tip.select(scores, rule, retention, rollout, scope, generator)
            kept = "".join("x" if keep else "." for keep in picked.mask.tolist())
            found[f"{scope} {retention}"] = {
                "kept": hashlib.sha256(kept.encode()).hexdigest()[:16],
                "weight": digest(picked.weight),
                "total": picked.total.item(),
            }
    found["quadrants"] = digest(tip.quadrants(scores))
    holds(found)


def test_top_k_teacher(holds):
    """The front from logits: statistics, and the loss that verl's actor trains on."""
    draw = torch.Generator().manual_seed(4)
    logits = (2 * torch.randn(40, 97, generator=draw)).requires_grad_()
    logprobs, ids = (2 * torch.randn(40, 97, generator=draw)).log_softmax(1).topk(20)
    fields = ["entropy", "entropy_norm", "teacher_entropy", "reverse_kl", "forward_kl", "jsd", "hellinger"]
    fields += ["gradient_norm", "top16_overlap", "argmax_in_top5"]
    scores = top_k_scores(logits, ids, logprobs, fields)
    divergence, mass = tail_reverse_kl(logits, ids, logprobs)
    (divergence * incoming_of(40, torch.float32)).sum().backward()
    holds(
        {
            "scores": {name: digest(value) for name, value in scores.present()},
            "mean": {name: value.mean().item() for name, value in scores.present()},
            "divergence": digest(divergence, mass),
            "gradient": digest(logits.grad),
        }
    )
