"""The plan's memory against what the tensors of real `TIPTrainer` steps held at once, beside the weights."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM

from tipdistill.config import TIPConfig
from tipdistill.plan import Setup, memory, peak, setup_of
from tipdistill.provenance import environment
from tipdistill.tasks.arithmetic import build_tokenizer
from tipdistill.text import check_known
from tipdistill.trainer import TIPTrainer

from . import measure as measuring
from .measure import peak_bytes

# What the plan is held to.
TOLERANCE = 0.15


@dataclass(frozen=True)
class Case:
    """A pair of Qwen3, Llama or Qwen2 shape with random weights, and how it is trained."""

    width: int = 256
    layers: int = 4
    vocabulary: int = 8192
    teacher_width: int = 512
    teacher_layers: int = 2
    architecture: str = "qwen3"
    tied: bool = True
    micro_batch: int = 8
    accumulation: int = 1
    prompt: int = 32
    completion: int = 128
    uneven_prompts: bool = False
    rule: str = "soft_or"
    retention: float = 0.5
    normalization: str = "batch"
    teacher_offload: bool = False
    scoring_tokens: int = 0
    checkpointing: bool = False
    dtype: str = "float32"
    bf16: bool = False
    optim: str = "adamw_torch"
    lora: int = 0

    def config(self, teacher: bool = False) -> Any:
        width = self.teacher_width if teacher else self.width
        heads = width // 32
        return AutoConfig.for_model(
            self.architecture,
            vocab_size=self.vocabulary,
            hidden_size=width,
            num_hidden_layers=self.teacher_layers if teacher else self.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            head_dim=32,
            intermediate_size=3 * width,
            tie_word_embeddings=self.tied,
            max_position_embeddings=4096,
        )

    def setup(self) -> Setup:
        """The same as the plan takes it."""
        dtype = getattr(torch, self.dtype)
        return setup_of(
            self.config(),
            self.config(teacher=True),
            student_dtype=dtype,
            teacher_dtype=dtype,
            bf16=self.bf16,
            lora=(self.lora, None) if self.lora else None,
            device="cpu",
            teacher_place="offload" if self.teacher_offload else "resident",
            micro_batch=self.micro_batch,
            accumulation=self.accumulation,
            prompt=self.prompt,
            completion=self.completion,
            rule=self.rule,
            retention=self.retention,
            normalization=self.normalization,
            scoring_tokens=self.scoring_tokens,
            checkpointing=self.checkpointing,
            optimizer=self.optim,
            padded=self.uneven_prompts,
        )


CASES = {
    "Soft-OR 0.5": Case(),
    "Soft-OR 0.1": Case(retention=0.1),
    "all tokens": Case(rule="all"),
    "entropy 0.2": Case(rule="entropy", retention=0.2),
    "teacher_offload": Case(teacher_offload=True, retention=0.2),
    "normalization micro_batch": Case(normalization="micro_batch", micro_batch=4, accumulation=2),
    "accumulation 4": Case(micro_batch=2, accumulation=4, retention=0.2),
    "accumulation 4, long": Case(micro_batch=2, accumulation=4, completion=512, width=128, vocabulary=4096),
    "scoring_tokens": Case(micro_batch=2, accumulation=4, scoring_tokens=1280, checkpointing=True),
    "gradient checkpointing": Case(checkpointing=True, layers=8, micro_batch=16),
    "V = 65,536": Case(vocabulary=65_536, width=128, teacher_width=128, micro_batch=4),
    "untied lm_head": Case(tied=False, vocabulary=32_768, width=128),
    "H = 768, 2 layers": Case(width=768, layers=2, vocabulary=4096, micro_batch=4),
    "12 layers": Case(layers=12, width=128, micro_batch=4),
    "bf16 autocast": Case(bf16=True),
    "bfloat16 weights": Case(dtype="bfloat16", bf16=True, retention=0.2),
    "uneven prompts": Case(uneven_prompts=True, completion=256, micro_batch=4),
    "Llama": Case(architecture="llama", tied=False),
    "Qwen2, fused AdamW": Case(architecture="qwen2", optim="adamw_torch_fused"),
    "LoRA": Case(lora=8, layers=6),
}


def measure(case: Case, steps: int = 2) -> int:
    """Train a case for a few steps on the CPU; bytes that its tensors held at once beside the weights.

    Args:
        case: the models and the batch.
        steps: at least 2, since AdamW's state is made in the first.
    """
    gc.collect()  # what another case left would be seen as going
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(case, folder, steps)
        return peak_bytes(trainer.train, "cpu")


def _trainer(case: Case, folder: str, steps: int) -> TIPTrainer:
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    models = [AutoModelForCausalLM.from_config(case.config(teacher), dtype=dtype) for teacher in (False, True)]
    rollouts = case.micro_batch * case.accumulation
    digits = "0123456789" * (case.prompt // 10 + 1)
    lengths = [case.prompt - (number % 2 if case.uneven_prompts else 0) for number in range(rollouts * steps)]
    peft_config = None
    if case.lora:
        from peft import LoraConfig

        peft_config = LoraConfig(r=case.lora, task_type="CAUSAL_LM")
    return TIPTrainer(
        model=models[0],
        teacher_model=models[1],
        args=TIPConfig(
            folder,
            max_steps=steps,
            per_device_train_batch_size=case.micro_batch,
            gradient_accumulation_steps=case.accumulation,
            max_completion_length=case.completion,
            generation_kwargs={"min_new_tokens": case.completion},
            selection_rule=case.rule,
            retention=case.retention,
            normalization=case.normalization,
            teacher_offload=case.teacher_offload,
            scoring_tokens=case.scoring_tokens,
            beta=1.0,
            use_cpu=True,
            bf16=case.bf16,
            gradient_checkpointing=case.checkpointing,
            optim=case.optim,
            drift_factor=0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=0,
        ),
        train_dataset=Dataset.from_dict({"prompt": [digits[:length] for length in lengths]}),
        processing_class=build_tokenizer(),
        peft_config=peft_config,
    )


def expected(case: Case) -> tuple[str, int]:
    """The phase that the plan expects to take the most beside the weights, and its bytes."""
    phases = memory(case.setup())
    for parts in phases.values():
        parts["student weights"] = parts["teacher weights"] = 0
    return peak(phases)


def run_plan(cases: list[str] | None = None, steps: int = 2, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Hold the plan against measured steps; the result as it is written to benchmarks/results.

    Args:
        cases: names in CASES; None: all.
        steps: of each training, at least 2.
        say: takes one line of progress.

    Raises:
        ValueError: an unknown case (the nearest is given), or fewer than two steps.

    Example:
        >>> run_plan(["Llama"])  # doctest: +SKIP
    """
    if steps < 2:
        raise ValueError(f"steps must be at least 2, got {steps}: the optimizer's state is made in the first.")
    torch.set_num_threads(1)
    names = list(CASES if cases is None else cases)
    for name in names:
        check_known("case", name, CASES)
    entries: dict[str, Any] = {}
    for name in names:
        case = CASES[name]
        measured = measure(case, steps)
        phase, predicted = expected(case)
        ratio = predicted / measured
        entries[name] = {**asdict(case), "phase": phase, "predicted": predicted, "measured": measured, "ratio": ratio}
        say(f"{name}: {predicted / 2**20:.1f} MiB expected ({phase}), {measured / 2**20:.1f} measured, {ratio:.3f}")
    return {"benchmark": "plan", "preset": "cpu", **environment("cpu", 1), "steps": steps, "cases": entries}


def main(argv: list[str] | None = None) -> int:
    """Hold the plan against measured steps, and write the JSON.

    Raises:
        ValueError: an unknown case (the nearest is given), or fewer than two steps.
    """
    parser = measuring.parser("plan", __doc__)
    parser.add_argument("--cases", nargs="+", help=f"{', '.join(CASES)} (default all)")
    parser.add_argument("--steps", type=int, help="of each training, at least 2")
    return measuring.run("plan", run_plan, parser, argv)


if __name__ == "__main__":
    measuring.end(main)
