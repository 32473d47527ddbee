"""TIPConfig: TRL's DistillationConfig plus what token selection needs."""

from __future__ import annotations

import difflib
import math
import os
from dataclasses import dataclass, field

from trl import DistillationConfig

from .select import resolve_rule

NORMALIZATIONS = ("batch", "micro_batch")
SCOPES = ("rollout", "batch")


@dataclass
class TIPConfig(DistillationConfig):
    """Configuration of `TIPTrainer`; every field of `trl.DistillationConfig` keeps its name and meaning.

    Args:
        selection_rule: name in `tipdistill.RULES`, "complement:<name>", or the dotted path of a callable.
        retention: share of the completion tokens that is trained on, in (0, 1].
        selection_scope: "rollout" spends the budget inside each rollout (paper Eq. 8), "batch" over the whole batch;
            None: the rule's own, "rollout" for all but teachability.
        normalization: "batch" scores the whole generation batch once, so that normalisers, budgets and the loss
            denominator are the same whatever the micro-batch size and the number of processes; "micro_batch"
            scores inside the loss and saves one student forward.
        num_generations: rollouts per prompt.
        teacher_offload: move the teacher's backbone to the CPU between scoring passes ("batch" only).
        score_logging_steps: every this many steps compute all statistics even where the rule reads fewer (entropy
            rules never project the teacher's dropped rows otherwise); 0 never does.
        record_rollouts: rollouts of the main process whose token records are written on these steps, to
            `<output_dir>/records/step-<n>/` (docs/records.md); 0 writes none.
        scoring_tokens: tokens (prompt, completion and padding) per forward of the scoring pass; 0 takes
            `per_device_train_batch_size` rollouts at a time.
        drift_factor: warn when the mean divergence of the dropped tokens exceeds this multiple of where it began; 0
            turns the guard off.
        drift_retention: retention from the first such warning on, where it is higher than `retention`; None leaves it.
        eval_tasks: comma-separated tasks that are measured before the first step, every `eval_steps` steps and after
            the last, see `tipdistill.tasks`; None: none.
        eval_num_samples: completions per problem of these tasks.
        eval_tasks_on_start: measure them before the first step too.

    Raises:
        ValueError: a field is out of range, or a name is unknown (the nearest names are given).
    """

    selection_rule: str = field(
        default="soft_or",
        metadata={"help": "Selection rule: a name in tipdistill.RULES, 'complement:<name>', or a dotted path."},
    )
    retention: float = field(
        default=0.5, metadata={"help": "Share of the completion tokens that is trained on, in (0, 1]."}
    )
    selection_scope: str | None = field(
        default=None,
        metadata={"help": "Spend the budget per 'rollout' (paper Eq. 8) or over the 'batch'; null: as the rule does."},
    )
    normalization: str = field(
        default="batch",
        metadata={"help": "Score the whole generation 'batch' at once, or inside each 'micro_batch'."},
    )
    num_generations: int = field(default=1, metadata={"help": "Rollouts per prompt."})
    teacher_offload: bool = field(
        default=False, metadata={"help": "Move the teacher's backbone to the CPU between scoring passes."}
    )
    score_logging_steps: int = field(
        default=10,
        metadata={"help": "Every this many steps compute all statistics, even those the rule does not read."},
    )
    record_rollouts: int = field(
        default=8,
        metadata={"help": "Rollouts to write token records of, every score_logging_steps; 0: none."},
    )
    scoring_tokens: int = field(
        default=0,
        metadata={"help": "Tokens per forward of the scoring pass; 0: per_device_train_batch_size rollouts."},
    )
    drift_factor: float = field(
        default=3.0,
        metadata={"help": "Warn when the dropped tokens' divergence exceeds this multiple of its start; 0: never."},
    )

    drift_retention: float | None = field(
        default=None,
        metadata={"help": "Retention from the first drift warning on, where higher than `retention`; null: unchanged."},
    )
    eval_tasks: str | None = field(
        default=None,
        metadata={"help": "Comma-separated tasks to measure every eval_steps steps, such as math500,aime24."},
    )
    eval_num_samples: int = field(default=1, metadata={"help": "Completions per problem of eval_tasks."})
    vllm_sync_tolerance: float | None = field(
        default=None,
        metadata={"help": "Most that vLLM may differ from the student after a weight sync, nats; null: by dtype."},
    )
    eval_tasks_on_start: bool = field(default=True, metadata={"help": "Measure eval_tasks before the first step too."})

    def __post_init__(self) -> None:
        super().__post_init__()
        rule = resolve_rule(self.selection_rule)
        if self.selection_scope is None:
            self.selection_scope = rule.scope
        for name, value in (("retention", self.retention), ("drift_retention", self.drift_retention)):
            # `bool` is an `int`, and `retention: true` in a YAML file would otherwise pass as 1.0.
            share = isinstance(value, (int, float)) and not isinstance(value, bool) and 0.0 < value <= 1.0
            if not share and (name == "retention" or value is not None):
                raise ValueError(f"{name} must be in (0, 1], got {value!r}.")
        if not 0.0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive, got {self.temperature}: rollouts are sampled, not greedy.")
        if self.drift_retention is not None and self.drift_factor == 0:
            raise ValueError("drift_retention acts on the drift guard's warning, and drift_factor = 0 turns that off.")
        _one_of("selection_scope", self.selection_scope, SCOPES)
        _one_of("normalization", self.normalization, NORMALIZATIONS)
        for name, least in (
            ("num_generations", 1),
            ("score_logging_steps", 0),
            ("record_rollouts", 0),
            ("scoring_tokens", 0),
            ("eval_num_samples", 1),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer ≥ {least}, got {value!r}.")
        if not (math.isfinite(self.drift_factor) and (self.drift_factor == 0 or self.drift_factor > 1)):
            raise ValueError(f"drift_factor must be 0 (off) or > 1, got {self.drift_factor}.")
        if self.vllm_sync_tolerance is not None and not 0 <= self.vllm_sync_tolerance < math.inf:
            raise ValueError(f"vllm_sync_tolerance must be ≥ 0 nats, got {self.vllm_sync_tolerance}.")
        if self.task_names() and not self.eval_steps:
            raise ValueError(f"eval_tasks = {self.eval_tasks} are measured every eval_steps steps: set eval_steps.")
        if self.teacher_offload and self.normalization != "batch":
            raise ValueError(
                'teacher_offload needs normalization="batch": with "micro_batch" the teacher scores inside the loss, '
                "so it cannot leave the device before it."
            )
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started > 1 and self.world_size == 1:
            raise ValueError(
                f"a launcher started {started} processes (WORLD_SIZE) and accelerate sees one, so each would train "
                "alone: set use_cpu to train together over gloo, or launch where there are GPUs."
            )
        generation_batch = self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size
        if generation_batch % self.num_generations:
            raise ValueError(
                f"num_generations ({self.num_generations}) must divide the generation batch: "
                f"{self.per_device_train_batch_size} rollouts per device × {self.gradient_accumulation_steps} "
                f"accumulation steps × {self.world_size} processes = {generation_batch}."
            )

    def task_names(self) -> list[str]:
        """The names in `eval_tasks`."""
        return [name.strip() for name in (self.eval_tasks or "").split(",") if name.strip()]


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}.{hint}")
