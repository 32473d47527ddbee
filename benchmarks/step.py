"""A whole training step of real architectures with random weights, or of a real pair: plain PyTorch, TRL's, ours.

Every training runs in a process of its own, one at a time; rounds go through the variants in turn. Completions are
random tokens of a fixed length, the same for every variant: what writes them is the same for all, and takes minutes.

Memory is compared above the weights of both models, the gradients and the optimiser's states, which every way of
training holds; and as what the forward of a micro-batch stores for its backward, counted tensor by tensor.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, TrainerCallback
from trl import DistillationConfig, DistillationTrainer

from tipdistill.config import TIPConfig
from tipdistill.provenance import environment
from tipdistill.tasks.arithmetic import build_tokenizer
from tipdistill.text import check_known
from tipdistill.trainer import TIPTrainer

from . import measure
from .measure import Worker, spread

# hidden size, layers, heads, intermediate size, tied embeddings: those of the models' config.json
ARCHITECTURES: dict[str, tuple[int, int, int, int, bool]] = {
    "tiny-student": (64, 2, 4, 128, True),
    "tiny-teacher": (128, 2, 4, 256, True),
    "qwen3-0.6b": (1024, 28, 16, 3072, True),
    "qwen3-1.7b": (2048, 28, 16, 6144, True),
    "qwen3-4b": (2560, 36, 32, 9728, True),
    "qwen3-8b": (4096, 36, 32, 12288, False),
}
# Losses of the first step against TRL's: the same rollout, float32 or bf16 hidden states.
TOLERANCES = {"float32": 1e-3, "bfloat16": 5e-2}


@dataclass(frozen=True)
class StepSettings:
    """A pair and a batch: `rollouts` completions of `completion` tokens, all in one micro-batch unless accumulated.

    `student` and `teacher` are keys of ARCHITECTURES, or directories of models.
    """

    student: str
    teacher: str
    vocabulary: int = 151_936
    rollouts: int = 16
    accumulation: int = 1
    completion: int = 1024
    dtype: str = "bfloat16"
    device: str = "cuda"
    threads: int = 1


PRESETS = {
    "tiny": StepSettings("tiny-student", "tiny-teacher", 16_384, 8, 1, 64, "float32", "cpu"),
    # after python -m tipdistill.tasks smollm2
    "smollm2": StepSettings(
        "runs/smollm2/models/student", "runs/smollm2/models/teacher", 49_152, 8, 2, 128, "float32", "cpu", 2
    ),
    "qwen3-1.7b-0.6b": StepSettings("qwen3-0.6b", "qwen3-1.7b", rollouts=32, accumulation=4),
    "qwen3-8b-4b": StepSettings("qwen3-4b", "qwen3-8b", rollouts=16, accumulation=4, completion=2048),
}


def settings_for(memory: int) -> StepSettings:
    """The largest pair whose plain training step a GPU of so many bytes holds, at half a step's usual rollouts.

    Example:
        >>> [settings_for(gib * 2**30).accumulation for gib in (139, 79)], settings_for(40 * 2**30).student
        ([2, 4], 'qwen3-0.6b')
    """
    if memory < 70 * 2**30:
        return replace(PRESETS["qwen3-1.7b-0.6b"], rollouts=8, accumulation=4)
    # 8B → 4B: 49 GB are weights, gradients and Adam's states; plain takes 34 GB more for 8,192 tokens
    return replace(PRESETS["qwen3-8b-4b"], rollouts=8, accumulation=2 if memory > 110 * 2**30 else 4)


@dataclass(frozen=True)
class StepVariant:
    """A trainer, and for ours the rule, its retention, whether the teacher leaves the device, how it normalises, and
    through which positions it differentiates."""

    trainer: str
    retention: float = 1.0
    teacher_offload: bool = False
    rule: str = "soft_or"
    normalization: str = "batch"
    backward: Literal["full", "kept"] = "full"

    @property
    def name(self) -> str:
        if self.trainer != "tip":
            return self.trainer
        rule = "all" if self.retention == 1 else f"{self.rule} {self.retention:g}"
        how = "" if self.normalization == "batch" else f", {self.normalization}"
        how += "" if self.backward == "full" else f", {self.backward}"
        return f"tip {rule}" + (", teacher_offload" if self.teacher_offload else "") + how


def variants_of(preset: str = "tiny") -> list[StepVariant]:
    """The peers, and ours at four retentions with and without teacher_offload; of SmolLM2 with what is chosen in it.

    Example:
        >>> [variant.name for variant in variants_of()][:4]
        ['plain', 'trl', 'tip all', 'tip soft_or 0.5']
    """
    if preset == "smollm2":
        chosen = [("soft_or", 0.5, "batch"), ("soft_or", 0.5, "running"), ("soft_or", 0.1, "running")]
        chosen += [("gradient_norm_sampling", 0.1, "running")]
        ours = [StepVariant("tip", retention, False, rule, how) for rule, retention, how in chosen]
        sparse = [("soft_or", 0.5), ("soft_or", 0.2), ("gradient_norm_sampling", 0.1)]
        ours += [StepVariant("tip", retention, False, rule, "running", "kept") for rule, retention in sparse]
        return [StepVariant("plain"), StepVariant("trl"), StepVariant("tip"), *ours]
    ours = [StepVariant("tip", retention, offload) for offload in (False, True) for retention in (1.0, 0.5, 0.2, 0.1)]
    return [StepVariant("plain"), StepVariant("trl"), *ours]


class _RandomRollout:
    """In the place of a trainer's generation: random completions of the full length, timed; of each step its own.

    In the first step, which is not timed, it counts what a micro-batch stores for its backward.
    """

    rollout_seconds = 0.0
    stored_bytes = 0
    args: Any
    state: Any
    _tokenizer: Any

    def _generate_single_turn(self, prompt_ids: list[list[int]], *rest: Any, **named: Any) -> list[list[int]]:
        began = _now()
        special = set(self._tokenizer.all_special_ids)
        plain = torch.tensor([token for token in range(len(self._tokenizer)) if token not in special])
        generator = torch.Generator().manual_seed(self.state.global_step)
        shape = (len(prompt_ids), self.args.max_completion_length)
        completions = plain[torch.randint(len(plain), shape, generator=generator)].tolist()
        self.rollout_seconds += _now() - began
        return completions

    def compute_loss(self, model: Any, *rest: Any, **named: Any) -> Any:
        # a part that stands before a trainer in the bases of a class: the trainer's own method is behind it
        compute: Callable[..., Any] = super().compute_loss  # type: ignore[misc]
        if self.state.global_step:
            return compute(model, *rest, **named)
        with measure.stored_bytes(model) as count:
            loss = compute(model, *rest, **named)
        self.stored_bytes = max(self.stored_bytes, count())
        return loss


class _PlainTrainer(DistillationTrainer):
    """TRL's trainer with the loss most people write first: full logits of both models."""

    def _compute_loss(
        self, unwrapped_student: Any, inputs: dict[str, Any], num_items_in_batch: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        keep = inputs["completion_ids"].shape[1] + 1

        def log_probabilities(model: Any) -> Tensor:
            logits = model(input_ids=ids, attention_mask=attention, use_cache=False, logits_to_keep=keep).logits
            return torch.log_softmax(logits[:, :-1].float(), -1)

        with self.accelerator.autocast():
            log_s = log_probabilities(unwrapped_student)
            with torch.no_grad():
                log_t = log_probabilities(self.accelerator.unwrap_model(self.teacher_model))
        mask = inputs["completion_mask"]
        divergence = (log_s.exp() * (log_s - log_t)).sum(-1) * mask
        return divergence.sum() / num_items_in_batch, torch.zeros((), device=ids.device), mask.sum()


class _StepClock(TrainerCallback):
    """Wall-clock time of each step, and of its optimizer."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.trainer: Any = None
        self.began = self.optimizer = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began, self.trainer.rollout_seconds = _now(), 0.0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.optimizer = _now()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.optimizer = _now() - self.optimizer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seconds = _now() - self.began
        self.steps.append({"step": seconds, "rollout": self.trainer.rollout_seconds, "optimizer": self.optimizer})
        if len(self.steps) == 1 and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class StepWork:
    """One training of one variant, in the variant's own process."""

    def __init__(self, settings: StepSettings, variant: StepVariant, steps: int) -> None:
        torch.set_num_threads(settings.threads)
        self.settings, self.variant, self.steps = settings, variant, steps

    def round(self) -> dict[str, Any]:
        """Seconds of each part (medians over the steps after the first), peak memory, and the first step's loss."""
        with tempfile.TemporaryDirectory() as folder:
            clock = _StepClock()
            trainer = self._trainer(folder, clock)
            before = _resident_bytes()
            trainer.train()
            history = [entry for entry in trainer.state.log_history if "loss" in entry]
        steps = clock.steps[1:]
        figures: dict[str, Any] = {part: median(step[part] for step in steps) for part in steps[0]}
        figures["training"] = median(step["step"] - step["rollout"] for step in steps)
        for part in ("score", "select", "loss"):
            if f"time/{part}" in history[-1]:
                figures[part] = median(entry[f"time/{part}"] for entry in history[1:])
        if "loss" not in figures:
            figures["loss"] = median(step["step"] - step["rollout"] - step["optimizer"] for step in steps)
        weights, trained = _held(trainer, self.variant.teacher_offload)
        if self.settings.device == "cuda":
            figures["peak_bytes"] = torch.cuda.max_memory_allocated()
            figures["above_bytes"] = figures["peak_bytes"] - weights - trained
        else:
            figures["peak_bytes"] = _peak_resident_bytes() - before  # the weights were there before
            figures["above_bytes"] = figures["peak_bytes"] - trained
        figures["stored_bytes"] = trainer.stored_bytes
        figures["first_loss"] = history[0]["loss"]
        return figures

    def _trainer(self, folder: str, clock: _StepClock) -> Any:
        settings, variant = self.settings, self.variant
        options: dict[str, Any] = {
            "output_dir": folder,
            "max_steps": 1 + self.steps,
            "per_device_train_batch_size": settings.rollouts // settings.accumulation,
            "gradient_accumulation_steps": settings.accumulation,
            "max_completion_length": settings.completion,
            "beta": 1.0,
            "bf16": settings.dtype == "bfloat16",
            "use_cpu": settings.device == "cpu",
            "gradient_checkpointing": settings.device == "cuda",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "seed": 0,
        }
        if variant.trainer == "tip":
            rule = "all" if variant.retention == 1 else variant.rule
            config: DistillationConfig = TIPConfig(
                **options,
                selection_rule=rule,
                retention=variant.retention,
                normalization=variant.normalization,
                backward=variant.backward,
                teacher_offload=variant.teacher_offload,
                drift_factor=0,
            )
        else:
            config = DistillationConfig(**options)
        base = {"tip": TIPTrainer, "plain": _PlainTrainer, "trl": DistillationTrainer}[variant.trainer]
        trainer = type(base.__name__, (_RandomRollout, base), {})(
            model=_model(settings.student, settings, seed=0),
            teacher_model=_model(settings.teacher, settings, seed=1),
            args=config,
            train_dataset=Dataset.from_dict({"prompt": ["12+34="] * settings.rollouts * (1 + self.steps)}),
            processing_class=_tokenizer(settings.student),
            callbacks=[clock],
        )
        clock.trainer = trainer
        return trainer


def _tokenizer(name: str) -> Any:
    return build_tokenizer() if name in ARCHITECTURES else AutoTokenizer.from_pretrained(name, padding_side="left")


def _model(name: str, settings: StepSettings, seed: int) -> Any:
    """The model of a directory, or one of ARCHITECTURES with random weights."""
    if name not in ARCHITECTURES:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, settings.dtype))
        return model.to(settings.device)
    width, layers, heads, intermediate, tied = ARCHITECTURES[name]
    config = Qwen3Config(
        vocab_size=settings.vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=min(8, heads // 2),
        head_dim=128 if width > 512 else width // heads,
        intermediate_size=intermediate,
        tie_word_embeddings=tied,
        max_position_embeddings=32_768,
    )
    torch.manual_seed(seed)
    with torch.device(settings.device):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, settings.dtype))


def _held(trainer: Any, offloaded: bool) -> tuple[int, int]:
    """Bytes of both models' weights (of a teacher that leaves the device none), and of gradients and optimiser."""
    student = list(trainer.accelerator.unwrap_model(trainer.model).parameters())
    teacher = [] if offloaded else list(trainer.teacher_model.parameters())
    states = [value for state in trainer.optimizer.state.values() for value in state.values()]
    gradients = sum(parameter.nbytes for parameter in student if parameter.requires_grad)
    optimizer = sum(value.nbytes for value in states if isinstance(value, Tensor))
    return sum(parameter.nbytes for parameter in (*student, *teacher)), gradients + optimizer


def _peak_resident_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _resident_bytes() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return _peak_resident_bytes()


def run_step(
    preset: str = "tiny",
    rounds: int = 3,
    steps: int = 4,
    say: Callable[[str], None] = print,
    variants: list[StepVariant] | None = None,
) -> dict[str, Any]:
    """Measure a training step of every variant; the result as it is written to benchmarks/results.

    Args:
        preset: a key of PRESETS.
        rounds: trainings of each variant, taking turns.
        steps: timed steps of a training, after one that is not.
        say: takes one line of progress.
        variants: None: all.

    Raises:
        ValueError: an unknown preset (the nearest is given), or no GPU where one is needed.

    Example:
        >>> run_step("tiny", rounds=1, steps=1, variants=[StepVariant("trl")])  # doctest: +SKIP
    """
    check_known("preset", preset, PRESETS)
    settings = PRESETS[preset]
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"the preset {preset!r} needs a GPU, and torch sees none here. On the CPU: --preset tiny.")
    for name in (settings.student, settings.teacher):
        if name not in ARCHITECTURES and not Path(name).is_dir():
            raise ValueError(f"there is no {name}: run `python -m tipdistill.tasks smollm2` first.")
    return {
        "benchmark": "step",
        "preset": preset,
        **environment(settings.device, settings.threads),
        "settings": asdict(settings),
        "variants": measure_steps(settings, variants_of(preset) if variants is None else variants, rounds, steps, say),
    }


def measure_steps(
    settings: StepSettings,
    variants: list[StepVariant],
    rounds: int,
    steps: int,
    say: Callable[[str], None],
    flush: Callable[[dict[str, Any]], None] = lambda entries: None,
    worker: type[Worker] | type[measure.Here] = Worker,
) -> dict[str, dict[str, Any]]:
    """Times, memory and ratios of each variant, by name.

    Args:
        settings, variants: what is measured.
        rounds, steps, say: as in `run_step`.
        flush: takes the entries as they stand after each training.
        worker: a process for each training, or this one for all.
    """
    entries: dict[str, dict[str, Any]] = {variant.name: asdict(variant) for variant in variants}
    taken: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for number in range(rounds):
        for variant in variants:
            if "refused" in entries[variant.name]:
                continue
            work = worker(StepWork, settings, variant, steps)
            try:
                run = work.ask("round")
            except RuntimeError as error:
                entries[variant.name]["refused"] = str(error).strip().splitlines()[-1]
                say(f"{variant.name}: {entries[variant.name]['refused']}")
                continue
            finally:
                work.close()
            taken[variant.name].append(run)
            say(f"round {number + 1} of {rounds}: {variant.name} {run['step']:.3g} s, training {run['training']:.3g} s")
            for each in variants:
                _summarise(each, entries[each.name], taken, TOLERANCES[settings.dtype])
            flush(entries)
    return entries


def _summarise(
    variant: StepVariant, entry: dict[str, Any], taken: dict[str, list[dict[str, Any]]], tolerance: float
) -> None:
    runs, peer = taken[variant.name], taken["trl"]
    if "refused" in entry or not runs:
        return
    entry["first_loss"] = runs[0]["first_loss"]
    if variant.retention == 1 and peer:
        truth = peer[0]["first_loss"]
        if not abs(entry["first_loss"] - truth) <= tolerance * abs(truth):
            entry["refused"] = f"its first loss, {entry['first_loss']:.5g}, is not TRL's, {truth:.5g}"
            return
    entry["step_seconds"] = spread([run["step"] for run in runs])
    entry["training_seconds"] = spread([run["training"] for run in runs])
    parts = ("rollout", "score", "select", "loss", "optimizer")
    entry["split"] = {part: median(run[part] for run in runs) for part in parts if part in runs[0]}
    for key in ("peak_bytes", "above_bytes", "stored_bytes"):
        entry[key] = max(run[key] for run in runs)
    for name in ("plain", "trl"):
        if name != variant.name and len(taken[name]) == len(runs):
            pairs = list(zip(runs, taken[name], strict=True))
            entry.setdefault("ratio", {})[name] = spread([own["training"] / its["training"] for own, its in pairs])
            for ratio, key in (("memory_ratio", "peak_bytes"), ("above_ratio", "above_bytes")):
                entry.setdefault(ratio, {})[name] = entry[key] / max(run[key] for run in taken[name])


def main(argv: list[str] | None = None) -> int:
    """Measure one preset and write its JSON; 1 where a variant was refused.

    Raises:
        ValueError: an unknown preset; the nearest is given.
    """
    parser = measure.parser("step", __doc__)
    parser.add_argument("--preset", help=f"{', '.join(PRESETS)} (default tiny)")
    parser.add_argument("--rounds", type=int, help="trainings of each variant, taking turns")
    parser.add_argument("--steps", type=int, help="timed steps of one training")
    return measure.run("step", run_step, parser, argv)


if __name__ == "__main__":
    measure.end(main)
