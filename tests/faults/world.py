"""A tiny pair, prompts and a grid, and the commands that are killed with them."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

_NO_MATTER = re.compile(
    r"^(time/|memory/)|seconds|runtime|per_second|peak_memory|measured|commit|^run$|^runs$|^step_time"
)


def build(root: Path) -> Path:
    """Two tiny models, 32 prompts and a grid in `root`."""
    import torch
    import yaml
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from tipdistill.tasks.arithmetic import TASK, build_tokenizer

    root.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    for seed, (name, width) in enumerate({"student": 16, "teacher": 32}.items()):
        torch.manual_seed(seed)
        config = Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=128,
            initializer_range=0.3,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        Qwen3ForCausalLM(config).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    TASK.write_prompts(root / "prompts.jsonl", 32, seed=0)
    recipe = {
        **_MODELS(root),
        "dataset_name": str(root / "prompts.jsonl"),
        **{name: value for name, value in _TRAIN.items() if name not in ("eval_tasks", "eval_steps")},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    grid = {
        "base": str(root / "recipe.yaml"),
        "overrides": {"max_steps": 2, "save_steps": 1},
        "cells": {"all": 1.0, "soft_or": [0.5]},
        "learning_rates": 1.0e-3,
        "seeds": [0],
        "test": ["arithmetic[:8]"],
        "num_samples": 2,
    }
    (root / "grid.yaml").write_text(yaml.safe_dump(grid))
    return root


def _MODELS(root: Path) -> dict[str, str]:
    return {"model_name_or_path": str(root / "student"), "teacher_model_name_or_path": str(root / "teacher")}


_TRAIN: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 1,
    "learning_rate": 1.0e-3,
    "max_steps": 4,
    "save_steps": 1,
    "save_total_limit": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "per_device_eval_batch_size": 8,
    "max_completion_length": 6,
    "record_rollouts": 2,
    "score_logging_steps": 2,
    "retention": 0.5,
    "eval_tasks": "arithmetic[:4]",
    "eval_steps": 2,
}


def train(root: Path, output_dir: Path, **settings: Any) -> list[str]:
    """The arguments of a run that goes on where it was killed."""
    given = {**_MODELS(root), "dataset_name": root / "prompts.jsonl", **_TRAIN, **settings}
    argv = ["train", "--output_dir", str(output_dir)]
    for name, value in {"resume_from_checkpoint": "auto", **given}.items():
        argv += [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]
    return argv


def rank(number: int, port: int | None = None) -> dict[str, str]:
    """What a launcher of two processes tells one of them."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port or 20000 + os.getpid() % 20000)}
    return {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", **address}


def command(kind: str, root: Path, out: Path) -> list[str]:
    """The arguments of `tipdistill` of each kind of run; the same go on with a run that was killed."""
    if kind.startswith("train"):
        settings = {
            "train": {},
            "train-micro": {"normalization": "micro_batch", "selection_rule": "random"},
            "train-lora": {"use_peft": True, "lora_r": 2, "lora_target_modules": "all-linear"},
            "train-2": {"gradient_accumulation_steps": 1},
        }[kind]
        return train(root, out, **settings)
    if kind == "eval":
        argv = ["eval", "--model", str(root / "student"), "--tasks", "arithmetic[:9],modular[:5]", "--engine"]
        argv += ["transformers", "--num_samples", "2", "--batch_size", "4", "--max_new_tokens", "6"]
        return [*argv, "--output_dir", str(out), *(["--resume"] if (out / "eval.json").exists() else [])]
    if kind == "score":
        argv = ["score", "--model", str(root / "student"), "--teacher", str(root / "teacher"), "--batch_size", "4"]
        argv += ["--dataset", str(root / "prompts.jsonl"), "--max_prompts", "12", "--max_new_tokens", "6"]
        return [*argv, "--output_dir", str(out)]
    if kind == "sweep":
        return ["sweep", str(root / "grid.yaml"), "--output_dir", str(out), "--workers", "1", "--threads", "1"]
    assert kind == "demo", kind
    return ["demo", "--quick", "--output_dir", str(out), "--workers", "1"]


KINDS = ("train", "train-micro", "train-lora", "train-2", "eval", "score", "sweep", "demo")


def outcome(kind: str, out: Path) -> dict[str, str]:
    """What a finished run left, without times and memory, as hashes by name; every file of it is opened."""
    import pyarrow.parquet as pq

    told: dict[str, Any] = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if not path.is_file() or any(part.startswith(".") for part in name.split("/")) or "checkpoint-" in name:
            continue
        if path.suffix == ".safetensors":
            told[name] = path.read_bytes()
        elif path.suffix == ".parquet":
            told[name] = str(pq.read_table(path).to_pylist())
        elif path.name == "metrics.jsonl":
            told[name] = json.dumps(
                _plain([json.loads(line) for line in path.read_text().splitlines()]), sort_keys=True
            )
        elif path.suffix == ".jsonl":
            told[name] = "\n".join(sorted(path.read_text().splitlines()))
        elif path.suffix == ".json" and path.name not in ("tokenizer_config.json", "config.json", "eval.json"):
            told[name] = json.dumps(_plain(json.loads(path.read_text())), sort_keys=True)
        else:
            told[name] = ""
    return {
        re.sub(r"(teacher|student)-[0-9a-f]{12}", r"\1", name).replace(str(out), "OUT"): hashlib.sha256(
            value.replace(str(out), "OUT").encode() if isinstance(value, str) else value
        ).hexdigest()[:16]
        for name, value in told.items()
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(inside) for name, inside in value.items() if not _NO_MATTER.search(name)}
    if isinstance(value, list):
        # the sum at the end of a log is of the steps since the run was started last
        kept = [inside for inside in value if not (isinstance(inside, dict) and "train_runtime" in inside)]
        return [_plain(inside) for inside in kept]
    return value


def half_written(out: Path) -> list[str]:
    """Files under their final name that were not written to their end. Hidden ones are the product's own to clear."""
    import pyarrow.parquet as pq

    from tipdistill.training.checkpoints import _is_whole, incomplete

    bad = []
    for path in sorted(out.rglob("*")) if out.exists() else []:
        name = path.relative_to(out).as_posix()
        if any(part.startswith(".") for part in name.split("/")):
            continue
        if path.is_dir() and re.fullmatch(r"checkpoint-\d+", path.name):
            bad += [f"{name}: {why}"] if (why := incomplete(path)) else []
        elif path.is_file() and path.suffix == ".parquet":
            try:
                pq.ParquetFile(path)
            except Exception as error:
                bad.append(f"{name}: {error}")
        elif path.is_file() and not (_is_whole(path) and (path.stat().st_size or path.suffix in (".jsonl", ".log"))):
            bad.append(name)
    return bad
