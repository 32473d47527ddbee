"""A student, a teacher and prompts: checked against each other, then loaded, then sampled and scored.

What `tipdistill score` and `tipdistill probe` share; `tipdistill train` checks its models here too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoProcessor

from .chat import check_chat_template_kwargs
from .data import drop_long_prompts, load_prompts, prompt_lengths
from .extras import EXTRAS, require
from .http import server_url, variable_name
from .integrations import _trl
from .policy import different_ends, saved_end_tokens
from .positions import check_positions, position_limit
from .records import About, RecordsWriter
from .rollout import generate
from .teachers.rollouts import (
    AskedTeacher,
    LoadedTeacher,
    RolloutTeacher,
    ask_teacher,
    bounds_of,
    check_rules,
    score_with,
)
from .types import Rollout
from .vocabulary import check_same_tokenizer, shared_vocabulary

DTYPES = ("auto", "float32", "bfloat16", "float16")
# how a teacher on a server is asked
SERVED = (
    *("teacher_url", "teacher_served_name", "teacher_top_k", "teacher_api_key_env"),
    *("teacher_timeout", "teacher_time_limit", "teacher_concurrency"),
)


@dataclass(frozen=True)
class PairConfig:
    """Which models and prompts, and how the rollouts are sampled. Every field is a flag of `score` and `probe`.

    Args:
        model, teacher: student and teacher, a directory or a hub id each; no teacher where `teacher_url` names one.
        dataset: prompts: a JSONL, JSON or Parquet file, a directory, or a hub id.
        model_revision, teacher_revision: on the hub.
        trust_remote_code: run code that comes with a model.
        dtype: of the weights, one of `DTYPES`; "auto": as they were saved.
        device: cpu, cuda, cuda:1, ...; "auto": cuda where there is one.
        dataset_config, dataset_split: of a hub dataset.
        prompt_column: column that holds the prompts.
        prompt_template: text around plain prompts, with {prompt} where the prompt goes.
        apply_chat: turn each plain prompt into a user message for the chat template.
        chat_template_kwargs: passed to the chat template, as in a run; None: nothing.
        max_prompt_length: drop prompts with more tokens than this.
        max_prompts: take the first so many prompts; 0: all.
        num_generations: rollouts per prompt.
        max_new_tokens: tokens of a completion, at most.
        temperature: of the sampling; divides the logits of both models.
        seed: of the sampling, and of rules that draw.
        batch_size: rollouts sampled at a time.
        tokens_per_forward: tokens of a scoring forward, padding included.
        use_vllm: sample with vLLM.
        vllm_gpu_memory_utilization: share of the GPU's memory that vLLM takes.
        teacher_url: a vLLM server that holds the teacher, up to and with the version.
        teacher_served_name, teacher_top_k, teacher_api_key_env, teacher_timeout, teacher_time_limit,
            teacher_concurrency: how it is asked, as in `TIPConfig`.

    Raises:
        ValueError: no teacher, two of them, or settings of one that is not asked for.
    """

    model: str
    teacher: str | None
    dataset: str
    model_revision: str | None = None
    teacher_revision: str | None = None
    trust_remote_code: bool = False
    dtype: str = "auto"
    device: str = "auto"
    dataset_config: str | None = None
    dataset_split: str = "train"
    prompt_column: str = "prompt"
    prompt_template: str | None = None
    apply_chat: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    max_prompt_length: int | None = None
    max_prompts: int = 0
    num_generations: int = 1
    max_new_tokens: int = 1024
    temperature: float = 1.0
    seed: int = 0
    batch_size: int = 32
    tokens_per_forward: int = 16384
    use_vllm: bool = False
    vllm_gpu_memory_utilization: float = 0.3
    teacher_url: str | None = None
    teacher_served_name: str | None = None
    teacher_top_k: int | None = None
    teacher_api_key_env: str | None = None
    teacher_timeout: float = 600.0
    teacher_time_limit: float = 1800.0
    teacher_concurrency: int = 16

    def __post_init__(self) -> None:
        if self.teacher_url is not None:
            server_url("teacher_url", self.teacher_url)  # first: no other message may repeat a password in it
        if self.teacher_api_key_env is not None:
            variable_name("teacher_api_key_env", self.teacher_api_key_env)
        if self.teacher is None and self.teacher_url is None:
            raise ValueError(
                "a teacher is needed: --teacher, a directory or a hub id, or --teacher_url, a server that holds it."
            )
        if self.teacher is not None and self.teacher_url is not None:
            raise ValueError(
                f"--teacher {self.teacher} and --teacher_url {self.teacher_url} name two teachers: give one of them."
            )
        misplaced = ("teacher_revision",) if self.teacher_url else SERVED
        given = [name for name in misplaced if getattr(self, name) != getattr(PairConfig, name)]
        if given:
            own, other = ("loaded here", "on a server") if self.teacher_url else ("on a server", "loaded here")
            raise ValueError(f"--{given[0]} is of a teacher {own}, and this one is {other}: leave it out.")

    def of_server(self) -> dict[str, Any]:
        """What asking a server takes, by the names of `TIPConfig`."""
        return {name: getattr(self, name) for name in ("temperature", *SERVED)}


# what token records say of how they were made, beside models, rules and seed
_RECORDED = (
    "dataset",
    "dataset_config",
    "dataset_split",
    "prompt_column",
    "prompt_template",
    "apply_chat",
    "chat_template_kwargs",
    "max_prompt_length",
    "max_prompts",
    "num_generations",
    "max_new_tokens",
    "batch_size",
    "use_vllm",
    "dtype",
    "model_revision",
    "teacher_revision",
)


@dataclass(frozen=True)
class Pair:
    """What was found out before any weights were loaded.

    Attributes:
        tokenizer: the student's.
        vocabulary: rows that both lm_heads have.
        forbidden: rows of the student's lm_head that the teacher lacks, never to be sampled.
        prompts: plain or conversational.
        described: label → line, to show.
        teacher: one that is elsewhere, and answers; None: one that is still to be loaded.
    """

    tokenizer: Any
    vocabulary: int
    forbidden: list[int]
    prompts: list[Any]
    described: dict[str, str]
    teacher: AskedTeacher | None = None


def check_models(
    student: tuple[str, str, str | None], teacher: tuple[str, str, str | None], trust_remote_code: bool
) -> tuple[list[Any], list[Any], dict[str, str]]:
    """Configurations and tokenizers of a pair, once they agree, and a line on each. Loads no weights.

    Args:
        student, teacher: the flag that named the model, its name, its revision.
        trust_remote_code: run code that comes with them.

    Returns:
        Both configurations, both processing classes, label → line.

    Raises:
        ValueError: a model that cannot be read, or tokenizers or lm_heads that do not match.
    """
    configurations, processors, described = read_models(
        [("student", *student), ("teacher", *teacher)], trust_remote_code
    )
    check_same_tokenizer(*processors)
    size = len(getattr(processors[0], "tokenizer", processors[0]))
    rows, teacher_rows = (model.get_text_config().vocab_size for model in configurations)
    shared = shared_vocabulary(rows, teacher_rows, num_tokens=size)
    ends = [
        saved_end_tokens(name, revision, configuration, processor)
        for (_, name, revision), configuration, processor in zip(
            (student, teacher), configurations, processors, strict=True
        )
    ]
    difference = different_ends(ends[0], ends[1], getattr(processors[0], "tokenizer", processors[0]))
    if difference:
        described["warning"] = difference
    described["tokenizer"] = f"the same for both: {size:,} tokens; the divergence runs over {shared:,} rows"
    return configurations, processors, described


def read_models(
    models: Sequence[tuple[str, str, str, str | None]], trust_remote_code: bool
) -> tuple[list[Any], list[Any], dict[str, str]]:
    """Configurations and processing classes of models, and a line on each. Loads no weights.

    Args:
        models: who it is, the flag that named it, its name, its revision.
        trust_remote_code: run code that comes with them.

    Raises:
        ValueError: a model that cannot be read.
    """
    configurations, processors, described = [], [], {}
    for who, flag, name, revision in models:
        options = {"revision": revision, "trust_remote_code": trust_remote_code}
        try:
            configurations.append(AutoConfig.from_pretrained(name, **options))
            processors.append(
                AutoProcessor.from_pretrained(name, truncation_side="left", padding_side="left", **options)
            )
        except Exception as error:  # files that are damaged make transformers and tokenizers raise anything
            said = f"{type(error).__name__}: " if not isinstance(error, OSError | ValueError) else ""
            raise ValueError(f"the {who} could not be read ({flag} {name}): {said}{error}") from error
        rows = configurations[-1].get_text_config().vocab_size
        described[who] = f"{name} ({configurations[-1].model_type}, {rows:,} rows in its lm_head)"
    return configurations, processors, described


def check_chat_template(prompt: Any, tokenizer: Any, model: str, applied: bool) -> None:
    """Raise where a prompt is conversational and the tokenizer has no template for it."""
    if not isinstance(prompt, str) and not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"the prompts are conversational{' (apply_chat)' if applied else ''}, but the tokenizer of {model} has no "
            "chat template: use plain prompts or an instruction-tuned model."
        )


def read_pair(config: PairConfig, rules: Sequence[str] = ()) -> Pair:
    """Check models, prompts, device and packages, and a teacher's server last. Loads no weights.

    Args:
        config: which.
        rules: selection rules, which read no more than is known of the teacher.

    Raises:
        ValueError, FileNotFoundError, ImportError: what does not fit, with the remedy.
        TeacherUnavailableError: a server gave no answer within the time limit.
    """
    device = device_of(config.device)
    if config.use_vllm:
        require("vllm", "--use_vllm", EXTRAS["use_vllm"][1])
    student = "--model", config.model, config.model_revision
    configurations, processors, described = (
        read_models([("student", *student)], config.trust_remote_code)
        if config.teacher is None
        else check_models(student, ("--teacher", config.teacher, config.teacher_revision), config.trust_remote_code)
    )
    tokenizer = getattr(processors[0], "tokenizer", processors[0])
    dataset = load_prompts(
        config.dataset,
        config.dataset_split,
        config=config.dataset_config,
        column=config.prompt_column,
        template=config.prompt_template,
        as_chat=config.apply_chat,
    )
    assert isinstance(dataset, Dataset), "nothing is streamed here"
    check_chat_template(dataset[0]["prompt"], tokenizer, config.model, config.apply_chat)
    check_chat_template_kwargs(config.chat_template_kwargs, tokenizer)
    if config.max_prompt_length is not None:
        dataset, _ = drop_long_prompts(dataset, tokenizer, config.max_prompt_length, config.chat_template_kwargs)
    if config.max_prompts:
        dataset = dataset.select(range(min(config.max_prompts, len(dataset))))
    prompts = dataset["prompt"][:]
    longest = max(prompt_lengths(prompts, tokenizer, config.chat_template_kwargs))
    # how far the positions of a server's model reach it says when it is asked
    limits = dict(zip(("student", "teacher"), map(position_limit, configurations), strict=False))
    check_positions(limits, longest, config.max_new_tokens, "--max_new_tokens", " or set --max_prompt_length")
    described["prompts"] = (
        f"{len(prompts):,} × {config.num_generations} rollouts of up to {config.max_new_tokens:,} tokens"
    )
    rows = [model.get_text_config().vocab_size for model in configurations]
    size = len(tokenizer)
    if config.teacher_url is not None:
        teacher = ask_teacher(config.of_server(), tokenizer, device)
        check_rules(teacher, rules, config.teacher_url)
        # one that is known by its likeliest tokens does not tell how many rows of padding it has
        shared = shared_vocabulary(rows[0], teacher.vocabulary or rows[0], num_tokens=size)
        gives = "its whole vocabulary" if teacher.top_k is None else f"its {teacher.top_k} likeliest tokens"
        described["teacher"] = f"{teacher.name} at {config.teacher_url}, which gives {gives}"
        described["tokenizer"] = f"the same for both: {size:,} tokens; the divergence runs over {shared:,} rows"
        return Pair(tokenizer, shared, list(range(teacher.vocabulary or size, rows[0])), prompts, described, teacher)
    return Pair(tokenizer, min(rows), list(range(min(rows), rows[0])), prompts, described)


def device_of(name: str) -> torch.device:
    """The device that a flag names.

    Raises:
        ValueError: no such device on this machine.

    Example:
        >>> device_of("cpu")
        device(type='cpu')
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch has one for each way to be absent
        raise ValueError(f"--device {name}: there is no such device here ({str(error).splitlines()[0]}).") from error
    return device


def load_models(config: PairConfig, pair: Pair) -> tuple[Any, RolloutTeacher]:
    """The student on the device, in eval mode, without gradients, and a teacher beside it, or the one that is asked.

    Raises:
        ValueError: a model whose logits are not those of its hidden states and lm_head, see `check_model`.
    """
    student = _loaded(config, "student", config.model, config.model_revision)
    if pair.teacher is not None:
        return student, pair.teacher
    assert config.teacher is not None, "there is a teacher"
    return student, LoadedTeacher(_loaded(config, "teacher", config.teacher, config.teacher_revision))


def _loaded(config: PairConfig, who: str, name: str, revision: str | None) -> Any:
    from .score.agreement import check_model

    model = _trl.create_model_from_path(
        name,
        dtype=config.dtype if config.dtype == "auto" else getattr(torch, config.dtype),
        revision=revision,
        trust_remote_code=config.trust_remote_code,
        device_map=None,
    )
    model.to(device_of(config.device)).eval().requires_grad_(False)
    # vLLM does not pad, nor is a rollout on its own padded
    check_model(model, who, padded=config.batch_size > 1 and not config.use_vllm)
    return model


def load_engine(config: PairConfig, student: Any) -> Any:
    """What samples: the student itself, or vLLM with the student's weights."""
    if not config.use_vllm:
        return student
    from vllm import LLM

    return LLM(
        model=config.model,
        revision=config.model_revision,
        trust_remote_code=config.trust_remote_code,
        dtype=config.dtype,
        gpu_memory_utilization=config.vllm_gpu_memory_utilization,
        seed=config.seed,
    )


def about_of(
    config: PairConfig,
    rules: Sequence[str],
    pair: Pair | None,
    retention: float,
    scope: str | None,
    entropy_threshold: float,
    divergence_threshold: float,
) -> About:
    """What the token records of a pair say that they are of.

    Args:
        config: models, prompts and sampling.
        rules: selection rules, the main one first.
        pair: what was found out of it; None: nothing yet, to check the other settings.
        retention: share of the tokens that each rule keeps, in (0, 1].
        scope: "rollout" or "batch", where the budget is spent; None: each rule's own.
        entropy_threshold, divergence_threshold: borders of the quadrants.

    Raises:
        ValueError: an unknown rule (the nearest are given), or a number out of range.
    """
    asked = None if pair is None else pair.teacher
    return About(
        student=config.model,
        teacher=config.teacher or (asked.name if asked else ""),
        vocabulary=0 if pair is None else pair.vocabulary,
        rules=tuple(rules),
        retention=retention,
        scope=scope,
        seed=config.seed,
        temperature=config.temperature,
        entropy_threshold=entropy_threshold,
        divergence_threshold=divergence_threshold,
        settings={name: getattr(config, name) for name in _RECORDED} | (bounds_of(asked) if asked else {}),
    )


def sampled(config: PairConfig, pair: Pair, student: Any, first_batch: int = 0) -> Iterator[list[Rollout]]:
    """Rollouts of the student, batch by batch; a batch is the same whichever batches were sampled before it.

    Args:
        config: how they are sampled.
        pair: the prompts.
        student: as `load_models` returns it.
        first_batch: to go on from.
    """
    return generate(
        load_engine(config, student),
        pair.tokenizer,
        pair.prompts,
        samples=config.num_generations,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        seed=config.seed,
        batch_size=config.batch_size,
        first_batch=first_batch,
        forbidden=pair.forbidden,
        chat_template_kwargs=config.chat_template_kwargs,
    )


def write_scored(config: PairConfig, pair: Pair, writer: RecordsWriter, on_batch: Callable[[int], None]) -> None:
    """Load the models, sample and score batch by batch, from where the writer stands.

    Args:
        config: models and sampling.
        pair: the prompts.
        writer: of the token records; what it holds already is not sampled again.
        on_batch: called with the number of rollouts that are written.
    """
    student, teacher = load_models(config, pair)
    for rollouts in sampled(config, pair, student, first_batch=-(-writer.rollouts // config.batch_size)):
        first = writer.rollouts
        try:
            scored = score_with(
                student,
                teacher,
                rollouts,
                writer.about.fields(),
                temperature=config.temperature,
                tokens_per_forward=config.tokens_per_forward,
            )
        except ValueError as error:
            if first == 0:
                raise
            raise ValueError(f"{error} (Rollout 0 of these is number {first} of the records.)") from error
        writer.write(rollouts, scored)
        on_batch(writer.rollouts)
