"""TIPConfig: TRL's DistillationConfig plus what token selection needs."""

from __future__ import annotations

import copy
import math
import os
from dataclasses import dataclass, field
from typing import Any, Literal

from trl import DistillationConfig

from .documents import parse_mapping
from .environments import Limits, read_environment
from .http import server_url, variable_name
from .redact import without_secrets
from .select import SCOPES, resolve_rule, rule_name
from .teachers.named import ENTRY, SELF, named_teachers, read_teachers, read_update
from .text import check_known

NORMALIZATIONS = ("batch", "running", "micro_batch")
BACKWARDS = ("full", "kept")


@dataclass
class TIPConfig(DistillationConfig):
    """Configuration of `TIPTrainer`; every field of `trl.DistillationConfig` keeps its name and meaning.

    Args:
        selection_rule: name in `tipdistill.RULES`, "complement:<name>", a function or a `Rule` of it, or the
            dotted path of one.
        retention: share of the completion tokens that is trained on, in (0, 1].
        selection_scope: "rollout" spends the budget inside each rollout (paper Eq. 8), "batch" over the whole batch;
            None: the rule's own, "rollout" for all but teachability.
        normalization: "batch" scores the whole generation batch once, so that normalisers, budgets and the loss
            denominator are the same whatever the micro-batch size and the number of processes; "running" takes
            percentiles, minima, maxima and thresholds over from the step before, and so saves one student forward;
            "micro_batch" has them of each micro-batch alone, and saves it too. None: see `usual_normalization`.
        backward: "full" differentiates through all positions, so that the gradient of the kept tokens' loss is exact;
            "kept" through those of the kept tokens alone, with the keys and values of all others as constants: cheaper
            in time and memory, and an approximation (docs/scaling.md).
        rollout_ahead: 0: a step's rollouts are written when it begins. 1: they were written while the step before was
            trained, with the student as it was then (docs/scaling.md).
        num_generations: rollouts per prompt.
        teacher_offload: move the teacher's backbone to the CPU between scoring passes ("batch" only).
        score_logging_steps: every this many steps compute all statistics even where the rule reads fewer (entropy
            rules never project the teacher's dropped rows otherwise); 0 never does.
        record_rollouts: rollouts of the main process whose token records are written on these steps, to
            `<output_dir>/records/step-<n>/` (docs/records.md); 0 writes none.
        scoring_tokens: tokens (prompt, completion and padding) per forward of the scoring pass; 0 takes
            `per_device_train_batch_size` rollouts at a time.
        drift_factor: warn when the mean divergence of the dropped tokens exceeds this multiple of where it began, or
            the completions are so many times longer or shorter than there, or so many times fewer of them end; 0 turns
            the guards off.
        drift_retention: retention from the first such warning on, where it is higher than `retention`; None leaves it.
        end_as_teacher: train the student to end where the teacher does though their end tokens differ: the teacher's
            counts as the student's own, which it goes on to end with.
        mask_truncated_completions: train on no token of a completion that was cut at max_completion_length.
        environment: dotted path of the environment that the student acts on, package.module.Class (docs/agents.md);
            None: there is none.
        max_tool_calling_iterations: turns of the student's that may call tools; the next one is told to answer.
        max_tool_result_tokens: of a tool's result; what is longer is cut, with a mark.
        tool_timeout: that a tool may take, in seconds.
        eval_tasks: comma-separated tasks that are measured before the first step, every `eval_steps` steps and after
            the last, see `tipdistill.tasks`; None: none.
        eval_num_samples: completions per problem of these tasks.
        eval_tasks_on_start: measure them before the first step too.
        vllm_sync_tolerance: largest mean difference between vLLM's and the student's log-probabilities after the first
            weight syncs, in nats; None: by dtype (float32 1e-3, float16 0.05, bfloat16 0.1), 0: no check.
        teachers: several teachers, name → a directory, a hub id, "self", a server's address, or a mapping of `model`,
            `revision`, `url`, `served_name`, `top_k`, `api_key_env`; "default" is for rows that name none
            (docs/teachers.md).
        teacher_column: column of the dataset that names the teacher of a row.
        teacher_prompt_column: column of the dataset that holds the teacher's own prompt, plain or conversational; where
            a dataset has none, the teacher reads the student's.
        teacher_update: how the teacher "self" follows the student: "frozen", "ema:<decay>", "every:<steps>", or "base",
            the model under the student's adapter.
        teacher_url: a vLLM server that holds the teacher, up to and with the version, in the place of a local teacher:
            http://host:8000/v1 (docs/vllm.md).
        teacher_lm_head: the model that the server serves, a directory or a hub id, of which the lm_head alone is loaded
            here: the server gives hidden states, and everything is exact; None: it gives log-probabilities.
        teacher_served_name: the name that the server knows the teacher by; None: the only one it serves.
        teacher_top_k: how many of the teacher's likeliest tokens to ask for; 0: the whole vocabulary; None: that where
            the server allows it, else 20.
        teacher_api_key_env: environment variable that holds the server's key; None: OPENAI_API_KEY, for
            https://api.openai.com alone.
        teacher_timeout: of one request, in seconds.
        teacher_time_limit: how long the server may be out before the run stops with a checkpoint, in seconds.
        teacher_concurrency: requests in flight, of each process.

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
    normalization: str | None = field(
        default=None,
        metadata={
            "help": "Scale and budget over the generation 'batch', as the step before did ('running'), or over "
            "each 'micro_batch'; the latter two save a forward. null: 'running', or 'batch' where tokens must be "
            "scored before the loss."
        },
    )
    backward: Literal["full", "kept"] = field(
        default="full",
        metadata={
            "help": "Differentiate through all positions ('full'), or through those of the kept tokens alone ('kept'): "
            "cheaper, and an approximation."
        },
    )
    rollout_ahead: int = field(
        default=0,
        metadata={
            "help": "1: write the next step's rollouts while this one is trained, with the student one step before; "
            "saves time beside a vLLM server."
        },
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
        metadata={
            "help": "Warn when the dropped tokens' divergence, or the completions' length, exceeds this multiple of "
            "its start; 0: never."
        },
    )
    drift_retention: float | None = field(
        default=None,
        metadata={"help": "Retention from the first drift warning on, where higher than `retention`; null: unchanged."},
    )
    end_as_teacher: bool = field(
        default=False,
        metadata={"help": "Where end tokens differ, let the teacher's count as the student's, to end where it does."},
    )
    mask_truncated_completions: bool = field(
        default=False, metadata={"help": "Train on no token of a completion that was cut at max_completion_length."}
    )
    environment: str | None = field(
        default=None,
        metadata={"help": "Dotted path of the environment that the student acts on, one object per rollout."},
    )
    max_tool_calling_iterations: int | None = field(
        default=Limits.rounds,
        metadata={"help": "Turns of the student's that may call tools; then it is told to answer."},
    )
    max_tool_result_tokens: int = field(
        default=Limits.result_tokens,
        metadata={"help": "Tokens of a tool's result; what is longer is cut, with a mark."},
    )
    tool_timeout: float = field(default=Limits.seconds, metadata={"help": "Seconds that a tool may take."})
    eval_tasks: str | None = field(
        default=None,
        metadata={"help": "Comma-separated tasks to measure every eval_steps steps, such as math500,aime24."},
    )
    eval_num_samples: int = field(default=1, metadata={"help": "Completions per problem of eval_tasks."})
    teachers: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Several teachers, name: model, server or mapping; a dataset's column says which reads a row."
        },
    )
    teacher_column: str = field(
        default="teacher", metadata={"help": "Column of the dataset that names the teacher of a row (`teachers`)."}
    )
    teacher_prompt_column: str = field(
        default="teacher_prompt",
        metadata={"help": "Column with the teacher's own prompt, where the dataset has one."},
    )
    teacher_update: str = field(
        default="frozen",
        metadata={"help": "How the teacher 'self' follows the student: frozen, base, ema:<decay> or every:<steps>."},
    )
    teacher_url: str | None = field(
        default=None, metadata={"help": "vLLM server that holds the teacher, such as http://host:8000/v1."}
    )
    teacher_lm_head: str | None = field(
        default=None,
        metadata={"help": "Model that the server serves: it gives hidden states, its lm_head alone is loaded here."},
    )
    teacher_served_name: str | None = field(
        default=None, metadata={"help": "Name that the server knows the teacher by; null: the only one it serves."}
    )
    teacher_top_k: int | None = field(
        default=None,
        metadata={"help": "Likeliest tokens to ask the server for; 0: all; null: all where it allows that, else 20."},
    )
    teacher_api_key_env: str | None = field(
        default=None,
        metadata={"help": "Environment variable that holds the server's key; null: OPENAI_API_KEY, for OpenAI alone."},
    )
    teacher_timeout: float = field(default=600.0, metadata={"help": "Seconds of one request to the teacher."})
    teacher_time_limit: float = field(
        default=1800.0, metadata={"help": "Seconds that the teacher may be out before the run stops with a checkpoint."}
    )
    teacher_concurrency: int = field(default=16, metadata={"help": "Requests to the teacher in flight."})
    vllm_sync_tolerance: float | None = field(
        default=None,
        metadata={"help": "Most that vLLM may differ from the student after a weight sync, nats; null: by dtype."},
    )
    eval_tasks_on_start: bool = field(default=True, metadata={"help": "Measure eval_tasks before the first step too."})

    # what `normalization` became where none was named; a trainer may be told of other teachers later
    _usual_normalization = ""

    def __post_init__(self) -> None:
        for name in ("teacher_url", "vllm_server_base_url"):
            if getattr(self, name) is not None:
                server_url(name, getattr(self, name))  # first: no other message may repeat a password in it
        if self.teacher_api_key_env is not None:
            variable_name("teacher_api_key_env", self.teacher_api_key_env)
        self.teachers = parse_mapping(self.teachers, "teachers") if isinstance(self.teachers, str) else self.teachers
        read_teachers(self.teachers)
        read_update(self.teacher_update)
        self._check_patience()
        if self.environment is not None:
            read_environment(self.environment)
        if self.enable_jit_checkpoint:
            raise ValueError(
                "enable_jit_checkpoint is not needed: SIGTERM, SIGUSR1 and Ctrl-C save a checkpoint in any case. "
                "Leave it out."
            )
        super().__post_init__()
        rule = resolve_rule(self.selection_rule)
        if self.selection_scope is None:
            self.selection_scope = rule.scope
        if self.normalization is None:
            self.normalization = usual_normalization(self, self.teacher_model_name_or_path)
            self._usual_normalization = self.normalization
        check_values(self)
        if self.normalization == "running" and (rule.scaled is None or rule.fields is None):
            raise ValueError(
                f'normalization="running" wants to know of {rule_name(self.selection_rule)} which statistics it reads '
                "and whether it scales by the tokens given: give the function the attributes `fields` and `scaled` "
                '(docs/rules.md), or take normalization="batch".'
            )
        if self.backward == "kept" and rule.budget == "all":
            raise ValueError(
                f'backward="kept" leaves out what is not kept, and {rule_name(self.selection_rule)} keeps every token: '
                'choose another selection_rule, or take backward="full".'
            )
        if self.rollout_ahead and self.environment is not None:
            raise ValueError(
                f"rollout_ahead = 1 writes rollouts of one turn, and {self.environment} answers between turns: leave "
                "out one of the two."
            )
        if self.task_names() and not self.eval_steps:
            raise ValueError(f"eval_tasks = {self.eval_tasks} are measured every eval_steps steps: set eval_steps.")
        if self.teacher_offload and self.normalization != "batch":
            raise ValueError(
                'teacher_offload needs normalization="batch": with the others the teacher scores inside the loss, so '
                "it cannot leave the device before it."
            )
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started > 1 and self.world_size == 1:
            raise ValueError(
                f"a launcher started {started} processes (WORLD_SIZE) and accelerate sees one, so each would train "
                "alone: set use_cpu to train together over gloo, or launch where there are GPUs."
            )
        self._check_named_apart()
        self.check_teachers(self.teacher_model_name_or_path)
        generation_batch = self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size
        if generation_batch % self.num_generations:
            raise ValueError(
                f"num_generations ({self.num_generations}) must divide the generation batch: "
                f"{self.per_device_train_batch_size} rollouts per device × {self.gradient_accumulation_steps} "
                f"accumulation steps × {self.world_size} processes = {generation_batch}."
            )

    def _check_patience(self) -> None:
        for name in ("teacher_timeout", "teacher_time_limit", "tool_timeout"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a positive number of seconds, got {getattr(self, name)}.")

    def check_teachers(self, teacher_model: Any) -> None:
        """Refuse teachers that this configuration cannot have, before any is loaded; the usual normalization is theirs.

        Args:
            teacher_model: what the trainer is given, see `TIPTrainer`.

        Raises:
            ValueError: which teacher, and what to change.
        """
        if self.normalization == self._usual_normalization:  # and was not set since
            self.normalization = usual_normalization(self, teacher_model)
        for one in named_teachers(teacher_model, self):
            one.args._check_teacher_server()
            if one.args.teacher_url is not None:
                # while one process waits for the server the others wait for it, and must not take it for dead
                longest = math.ceil(self.teacher_time_limit + self.teacher_timeout)
                self.ddp_timeout: int = max(self.ddp_timeout, longest + 600)

    def _check_named_apart(self) -> None:
        if self.teachers is None:
            return
        for name in ENTRY.values():
            if name != "teacher_top_k" and getattr(self, name) is not None:
                key = next(key for key, field in ENTRY.items() if field == name)
                raise ValueError(
                    f"{name} is of one teacher, and `teachers` names several: say it of the one it is meant for, "
                    f"as {{{key}: ...}} in its entry."
                )

    def _check_teacher_server(self) -> None:
        k = self.teacher_top_k
        if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 0):
            raise ValueError(f"teacher_top_k must be an integer ≥ 0 (0: the whole vocabulary) or null, got {k!r}.")
        self._check_teacher_lm_head()
        if self.teacher_url is None:
            return
        if self.teacher_model_name_or_path:
            raise ValueError(
                f"teacher_url = {self.teacher_url} and teacher_model_name_or_path = {self.teacher_model_name_or_path} "
                "name two teachers: give one of them."
            )
        if self.normalization != "batch" or self.teacher_offload:
            raise ValueError(
                'a teacher on a server needs normalization="batch", which asks it once per generation batch, and '
                "teacher_offload off: there is nothing to move."
            )
        if k and self.temperature != 1:
            raise ValueError(
                f"temperature = {self.temperature:g} needs the teacher's whole vocabulary (teacher_top_k = 0): a "
                "server gives log-probabilities at temperature 1, and of its likeliest tokens alone the rest cannot "
                "be brought to another."
            )

    def _check_teacher_lm_head(self) -> None:
        if self.teacher_lm_head is None:
            return
        if not isinstance(self.teacher_lm_head, str) or not self.teacher_lm_head:
            raise ValueError(
                f"teacher_lm_head must be a directory or a hub id, or null, got {self.teacher_lm_head!r:.80}."
            )
        if self.teacher_url is None:
            raise ValueError(
                f"teacher_lm_head = {self.teacher_lm_head} is the lm_head for hidden states of a server, and there is "
                "none: set teacher_url, or give the model as teacher_model_name_or_path, which loads all of it."
            )
        if self.teacher_top_k is not None:
            raise ValueError(
                f"teacher_top_k = {self.teacher_top_k} asks the server for log-probabilities and teacher_lm_head for "
                "hidden states: leave one of them out."
            )

    # Keys stay in this process, as does a function that is the rule. Trainer pickles its arguments into each checkpoint
    # (training_args.bin), and sends `to_dict` to trackers.

    def __getstate__(self) -> dict[str, Any]:
        # a function need not be one that can be pickled
        return without_secrets({**self.__dict__, "selection_rule": rule_name(self.selection_rule)})

    def __copy__(self) -> TIPConfig:
        return self._with(dict(self.__dict__))

    def __deepcopy__(self, memo: dict[int, Any]) -> TIPConfig:
        return self._with(copy.deepcopy(self.__dict__, memo))

    def _with(self, state: dict[str, Any]) -> TIPConfig:
        copied = object.__new__(type(self))
        copied.__dict__.update(state)
        return copied

    def to_dict(self) -> dict[str, Any]:
        """TRL's, without keys in its nested dictionaries either; a rule by its name."""
        shown = super().to_dict()
        shown["selection_rule"] = rule_name(self.selection_rule)
        return {name: without_secrets(value) if isinstance(value, dict) else value for name, value in shown.items()}

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        shown = sorted(self.to_dict().items())
        return "\n".join([f"{type(self).__name__}(", *(f"{name}={value!r}," for name, value in shown), ")"])

    @property
    def teacher_tells_everything(self) -> bool:
        """Whether the teacher's whole distribution is at hand: a local one, or hidden states with their lm_head."""
        return self.teacher_url is None or self.teacher_lm_head is not None

    def task_names(self) -> list[str]:
        """The names in `eval_tasks`."""
        return [name.strip() for name in (self.eval_tasks or "").split(",") if name.strip()]


def usual_normalization(values: Any, teacher_model: Any) -> str:
    """The normalization of a run that names none.

    "running", which costs no scoring pass; "batch" where tokens have to be scored before the loss: the teacher is
    offloaded, on a server, or the student itself, or the rule does not say what it reads and scales.

    Args:
        values: a `TIPConfig`, or what has its fields.
        teacher_model: what the trainer is given, see `TIPTrainer`.

    Example:
        >>> from types import SimpleNamespace
        >>> run = SimpleNamespace(selection_rule="soft_or", teacher_offload=False, teachers=None, teacher_url=None)
        >>> usual_normalization(run, "Qwen/Qwen3-8B"), usual_normalization(run, "self")
        ('running', 'batch')
    """
    rule = resolve_rule(values.selection_rule)
    teachers = named_teachers(teacher_model, values)
    ahead = values.teacher_offload or any(one.model == SELF or one.args.teacher_url is not None for one in teachers)
    return "batch" if ahead or rule.scaled is None or rule.fields is None else "running"


def check_values(values: Any) -> None:
    """Refuse a value of ours that is out of range, before anything is built from it.

    Args:
        values: a `TIPConfig`, or what has its fields.

    Raises:
        ValueError: which field, and what is allowed.
    """
    for name, value in (("retention", values.retention), ("drift_retention", values.drift_retention)):
        # `bool` is an `int`, and `retention: true` in a YAML file would otherwise pass as 1.0.
        share = isinstance(value, (int, float)) and not isinstance(value, bool) and 0.0 < value <= 1.0
        if not share and (name == "retention" or value is not None):
            raise ValueError(f"{name} must be in (0, 1], got {value!r}.")
    if not 0.0 < values.temperature < math.inf:
        raise ValueError(f"temperature must be positive, got {values.temperature}: rollouts are sampled, not greedy.")
    if values.drift_retention is not None and values.drift_factor == 0:
        raise ValueError("drift_retention acts on the drift guard's warning, and drift_factor = 0 turns that off.")
    if values.selection_scope is not None:
        check_known("selection_scope", values.selection_scope, SCOPES)
    if values.normalization is not None:
        check_known("normalization", values.normalization, NORMALIZATIONS)
    check_known("backward", values.backward, BACKWARDS)
    if isinstance(values.rollout_ahead, bool) or values.rollout_ahead not in (0, 1):
        raise ValueError(f"rollout_ahead must be 0 or 1 steps, got {values.rollout_ahead!r}.")
    for name, least in (
        ("num_generations", 1),
        ("max_completion_length", 1),
        ("score_logging_steps", 0),
        ("record_rollouts", 0),
        ("scoring_tokens", 0),
        ("eval_num_samples", 1),
        ("teacher_concurrency", 1),
        ("max_tool_calling_iterations", 1),
        ("max_tool_result_tokens", 1),
    ):
        value = getattr(values, name)
        if value is None and name == "max_tool_calling_iterations":  # TRL's default
            values.max_tool_calling_iterations = value = Limits.rounds
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer ≥ {least}, got {value!r}.")
    if not (math.isfinite(values.drift_factor) and (values.drift_factor == 0 or values.drift_factor > 1)):
        raise ValueError(f"drift_factor must be 0 (off) or > 1, got {values.drift_factor}.")
    if values.vllm_sync_tolerance is not None and not 0 <= values.vllm_sync_tolerance < math.inf:
        raise ValueError(f"vllm_sync_tolerance must be ≥ 0 nats, got {values.vllm_sync_tolerance}.")
