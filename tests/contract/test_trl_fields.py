"""Every field of TRL's configuration, through TRL's trainer and through ours on all tokens: it does the same in both.

A field that TRL adds fails `test_every_field_of_trls_is_looked_at` until it has a case here.
"""

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import pytest
import torch
from datasets import Dataset
from on_cpu import ON_CPU
from transformers import AutoTokenizer, PreTrainedModel
from trl import DistillationConfig, DistillationTrainer
from trl.trainer import distillation_trainer

from tipdistill import TIPConfig, TIPTrainer

BASE = {
    **ON_CPU,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "max_completion_length": 6,
    "learning_rate": 1e-3,
}
KINDS = {
    "trl": (DistillationTrainer, DistillationConfig, {}),
    "ours": (TIPTrainer, TIPConfig, {"selection_rule": "all", "retention": 1.0}),
}


class Run:
    """Two steps of a trainer, and what was seen of them."""

    def __init__(self, kind, directory, pair, dataset, settings, tokenizer=None):
        trainer, config, own = KINDS[kind]
        self.batches, self.loaded, self.rows, said = [], [], [], io.StringIO()
        inner, load = trainer._generate_and_score_completions, PreTrainedModel.from_pretrained.__func__

        def generate(this, inputs):
            self.rows.append(inputs)
            self.batches.append(inner(this, inputs))
            return self.batches[-1]

        def loading(kind, name, *given, **options):
            self.loaded.append((options.get("revision"), options.get("trust_remote_code")))
            return load(kind, name, *given, **options)

        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
            patch.setattr(trainer, "_generate_and_score_completions", generate)
            patch.setattr(PreTrainedModel, "from_pretrained", classmethod(loading))
            arguments = config(str(directory / kind), **{**BASE, **own, **settings})
            self.trainer = trainer(*pair, arguments, dataset, processing_class=tokenizer)
            self.trainer.train()
        self.said, self.files = said.getvalue(), sorted(path.name for path in (directory / kind).glob("completions/*"))

    @property
    def losses(self):
        return [entry["loss"] for entry in self.trainer.state.log_history if "loss" in entry]

    @property
    def completions(self):
        return [batch["completion_ids"].tolist() for batch in self.batches]

    @property
    def prompts(self):
        return [batch["prompt_ids"].tolist() for batch in self.batches]

    @property
    def dtypes(self):
        return [next(model.parameters()).dtype for model in (self.trainer.model, self.trainer.teacher_model)]

    @property
    def dropout(self):
        return {module.p for module in self.trainer.model.modules() if isinstance(module, torch.nn.Dropout)}


@dataclass(frozen=True)
class Case:
    """A value of a field, and where it is seen: the same in both trainers, and not what the default gives."""

    value: Any
    seen: Callable[[Run], Any]
    given: dict = field(default_factory=dict)
    of: str = "qwen3"
    chat: bool = False


CASES = {
    "learning_rate": Case(0.1, lambda run: [e["learning_rate"] for e in run.trainer.state.log_history if "loss" in e]),
    "model_init_kwargs": Case({"dtype": "bfloat16"}, lambda run: run.dtypes),
    "trust_remote_code": Case(True, lambda run: run.loaded),
    "teacher_model_revision": Case("v2", lambda run: run.loaded),
    "teacher_model_init_kwargs": Case({"dtype": "bfloat16"}, lambda run: run.dtypes),
    "disable_dropout": Case(
        True, lambda run: run.dropout, {"model_init_kwargs": {"resid_pdrop": 0.5, "embd_pdrop": 0.5}}, of="phi"
    ),
    "remove_unused_columns": Case(True, lambda run: sorted(run.rows[0][0])),
    "max_completion_length": Case(9, lambda run: run.completions),
    "shuffle_dataset": Case(False, lambda run: run.prompts),
    "pad_to_multiple_of": Case(32, lambda run: [len(row) for batch in run.prompts for row in batch]),
    "temperature": Case(0.5, lambda run: run.completions),
    "top_p": Case(0.5, lambda run: run.completions),
    "top_k": Case(3, lambda run: run.completions),
    "min_p": Case(0.5, lambda run: run.completions),
    "generation_kwargs": Case({"suppress_tokens": list(range(50, 390))}, lambda run: run.completions),
    "chat_template_kwargs": Case({"enable_thinking": False}, lambda run: run.prompts, chat=True),
    "repetition_penalty": Case(5.0, lambda run: run.completions),
    "cache_implementation": Case("static", lambda run: run.trainer.generation_config.cache_implementation),
    "beta": Case(0.5, lambda run: run.losses[0] < 0.7),  # a Jensen-Shannon divergence is at most log 2
    "log_completions": Case(True, lambda run: run.files),
    "num_completions_to_print": Case(1, lambda run: run.said.count("│"), {"log_completions": True}),
}
# What is built from them is compared below, where there is no vLLM.
OF_VLLM = {
    "use_vllm": True,
    "vllm_mode": "server",
    "vllm_model_impl": "transformers",
    "vllm_enable_sleep_mode": True,
    "vllm_structured_outputs_regex": "[0-9]+",
    "vllm_server_base_url": "http://localhost:8123",
    "vllm_server_host": "127.0.0.2",
    "vllm_server_port": 8124,
    "vllm_server_timeout": 5.0,
    "vllm_group_port": 51999,
    "vllm_gpu_memory_utilization": 0.55,
    "vllm_max_model_length": 123,
    "vllm_tensor_parallel_size": 2,
}
ELSEWHERE = {
    "teacher_model_name_or_path",  # which TRL's trainer does not read: tests/training/test_checks.py
    "max_tool_calling_iterations",  # tests/cli/test_train_agents.py
    "ds3_gather_for_generation",  # of DeepSpeed ZeRO-3, which needs a GPU; TRL's `_generate_single_turn` reads it
    "log_unique_prompts",  # of trackers that send tables; TRL's `log` reads it
}


@pytest.fixture(scope="module")
def run(tiny_model_dir, tiny_tokenizer, word_problems, tmp_path_factory):
    """Factory: kind, settings → the finished Run; the same one for the same settings."""
    finished: dict[str, Run] = {}
    problems = Dataset.from_json(str(word_problems)).select(range(16))
    chats = problems.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})

    def train(kind, of="qwen3", chat=False, **settings):
        key = repr((kind, of, chat, settings))
        if key not in finished:
            pair = [str(tiny_model_dir(of, role)) for role in ("student", "teacher")]
            tokenizer = AutoTokenizer.from_pretrained(pair[0], padding_side="left")
            tokenizer.chat_template += "{% if enable_thinking is false %}{{ 'no thoughts' }}{% endif %}"
            dataset = (chats if chat else problems).add_column("other", list(range(16)))
            finished[key] = Run(kind, tmp_path_factory.mktemp("run"), pair, dataset, settings, tokenizer)
        return finished[key]

    return train


@pytest.mark.parametrize("name", CASES)
def test_a_field_does_what_it_does_in_trls_trainer(name, run):
    case = CASES[name]
    start = {"of": case.of, "chat": case.chat, **case.given}
    default, trls, ours = run("ours", **start), *(run(kind, **start, **{name: case.value}) for kind in KINDS)
    assert case.seen(ours) == case.seen(trls)
    assert case.seen(ours) != case.seen(default)
    assert ours.completions == trls.completions
    assert ours.losses == pytest.approx(trls.losses, rel=1e-3)


class Engine:
    """What the trainers build where vLLM writes; it keeps what it was built from."""

    def __init__(self, **given):
        self.given, self.generation_kwargs = given, given["generation_kwargs"] or {}


@pytest.mark.parametrize("name", OF_VLLM)
def test_vllm_is_built_as_trl_builds_it(name, tiny_model_dir, tmp_path, monkeypatch):
    pair = [str(tiny_model_dir("qwen3", role)) for role in ("student", "teacher")]
    monkeypatch.setattr(distillation_trainer, "VLLMGeneration", Engine)
    monkeypatch.setattr(distillation_trainer, "is_vllm_available", lambda: True)
    monkeypatch.setattr("tipdistill.training.checks.check_packages", lambda args: None)

    def built(kind, **settings):
        trainer, config, own = KINDS[kind]
        settings = {**BASE, **own, "use_vllm": True, **settings}
        made = trainer(*pair, config(str(tmp_path / kind), **settings), Dataset.from_dict({"prompt": ["a"] * 4}))
        given = getattr(made, "vllm_generation", Engine(generation_kwargs=None)).given
        return {key: value for key, value in given.items() if key not in ("model", "accelerator", "processing_class")}

    trls, ours = (built(kind, **{name: OF_VLLM[name]}) for kind in KINDS)
    assert ours == trls
    assert ours != built("ours", use_vllm=name != "use_vllm")


def test_every_field_of_trls_is_looked_at():
    own = {entry.name for entry in fields(DistillationConfig)} & DistillationConfig.__annotations__.keys()
    assert own == CASES.keys() | OF_VLLM.keys() | ELSEWHERE
