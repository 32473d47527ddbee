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

from .chat import check_chat_template_kwargs, encode_prompts, is_conversational
from .conventions import check_can_end, differences, end_pair
from .data import drop_long_prompts, load_prompts
from .extras import EXTRAS, require
from .integrations import _trl
from .policy import saved_end_tokens
from .positions import check_positions, position_limit
from .records import About, RecordsWriter
from .rollout import generate
from .types import Rollout
from .vocabulary import check_ids_shared, check_same_tokenizer, forbidden_ids, known_tokens, shared_vocabulary

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class PairConfig:
    """Which models and prompts, and how the rollouts are sampled. Every field is a flag of `score` and `probe`.

    Args:
        model, teacher: student and teacher, a directory or a hub id each.
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
    """

    model: str
    teacher: str
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
        forbidden: rows of the student's lm_head that the teacher lacks or reads as others, never to be sampled.
        prompts: plain or conversational.
        described: label → line, to show.
    """

    tokenizer: Any
    vocabulary: int
    forbidden: list[int]
    prompts: list[Any]
    described: dict[str, str]


def check_models(
    student: tuple[str, str, str | None],
    teacher: tuple[str, str, str | None],
    trust_remote_code: bool,
    end_as_teacher: bool = False,
) -> tuple[list[Any], list[Any], dict[str, str]]:
    """Configurations and tokenizers of a pair, once they agree, and a line on each. Loads no weights.

    Args:
        student, teacher: the flag that named the model, its name, its revision.
        trust_remote_code: run code that comes with them.
        end_as_teacher: the teacher's end counts as the student's.

    Returns:
        Both configurations, both processing classes, label → line.

    Raises:
        ValueError: a model that cannot be read, or tokenizers or lm_heads that do not match.
    """
    configurations, processors, described = read_models(
        [("student", *student), ("teacher", *teacher)], trust_remote_code
    )
    differing = check_same_tokenizer(*processors)
    tokenizers = [getattr(processor, "tokenizer", processor) for processor in processors]
    rows, teacher_rows = (model.get_text_config().vocab_size for model in configurations)
    shared = shared_vocabulary(rows, teacher_rows, num_tokens=known_tokens(tokenizers[0], differing))
    ends = _ends([student, teacher], configurations, processors)
    pair = end_pair((tokenizers[0], tokenizers[1]), ends) if end_as_teacher else None
    check_can_end(tokenizers[0], ends[0], differing, pair)
    same = f"the same for both{f' but for {len(differing)}' if differing else ''}: {len(tokenizers[0]):,} tokens"
    described["tokenizer"] = f"{same}; the divergence runs over {shared:,} rows"
    return configurations, processors, described


def compare_models(
    student: tuple[str, str, str | None],
    teacher: tuple[str, str, str | None],
    configurations: Sequence[Any],
    processors: Sequence[Any],
    conversational: bool | None,
    chat_template_kwargs: dict[str, Any] | None = None,
    end_as_teacher: bool = False,
) -> dict[str, str]:
    """What the models of a pair are used to differently, see `conventions.differences`: label → line.

    Args:
        student, teacher: as in `check_models`.
        configurations, processors: as it returns them.
        conversational: whether the prompts are; None: not known.
        chat_template_kwargs: passed to the chat templates.
        end_as_teacher: the teacher's end counts as the student's.
    """
    lines = differences(
        (processors[0], processors[1]),
        _ends([student, teacher], configurations, processors),
        check_same_tokenizer(*processors),
        alike=end_as_teacher,
        conversational=conversational,
        chat_template_kwargs=chat_template_kwargs,
    )
    return {"warning" if number == 1 else f"warning {number}": line for number, line in enumerate(lines, start=1)}


def _ends(
    models: Sequence[tuple[str, str, str | None]], configurations: Sequence[Any], processors: Sequence[Any]
) -> tuple[list[int], list[int]]:
    own, other = (
        saved_end_tokens(name, revision, configuration, processor)
        for (_, name, revision), configuration, processor in zip(models, configurations, processors, strict=True)
    )
    return own, other


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


def read_pair(config: PairConfig) -> Pair:
    """Check models, prompts, device and packages. Loads no weights.

    Raises:
        ValueError, FileNotFoundError, ImportError: what does not fit, with the remedy.
    """
    device_of(config.device)
    if config.use_vllm:
        require("vllm", "--use_vllm", EXTRAS["use_vllm"][1])
    named = (
        ("--model", config.model, config.model_revision),
        ("--teacher", config.teacher, config.teacher_revision),
    )
    configurations, processors, described = check_models(*named, config.trust_remote_code)
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
    described |= compare_models(
        *named, configurations, processors, is_conversational(dataset), config.chat_template_kwargs
    )
    prompts = dataset["prompt"][:]
    differing = check_same_tokenizer(*processors)
    prompt_ids = encode_prompts(prompts, tokenizer, config.chat_template_kwargs)
    check_ids_shared(prompt_ids, differing, config.dataset)
    longest = max(map(len, prompt_ids))
    limits = dict(zip(("student", "teacher"), map(position_limit, configurations), strict=True))
    check_positions(limits, longest, config.max_new_tokens, "--max_new_tokens", " or set --max_prompt_length")
    described["prompts"] = (
        f"{len(prompts):,} × {config.num_generations} rollouts of up to {config.max_new_tokens:,} tokens"
    )
    rows, teacher_rows = (model.get_text_config().vocab_size for model in configurations)
    shared = min(rows, teacher_rows)
    return Pair(tokenizer, shared, forbidden_ids(rows, teacher_rows, differing), prompts, described)


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


def load_models(config: PairConfig) -> tuple[Any, Any]:
    """Student and teacher on the device, in eval mode, without gradients; refused where their logits are not as read.

    Raises:
        ValueError: a model whose logits are not those of its hidden states and lm_head, see `check_model`.
    """
    from .score.agreement import check_model

    device = device_of(config.device)
    models = []
    for name, revision in ((config.model, config.model_revision), (config.teacher, config.teacher_revision)):
        model = _trl.create_model_from_path(
            name,
            dtype=config.dtype if config.dtype == "auto" else getattr(torch, config.dtype),
            revision=revision,
            trust_remote_code=config.trust_remote_code,
            device_map=None,
        )
        models.append(model.to(device).eval().requires_grad_(False))
        # vLLM does not pad, nor is a rollout on its own padded
        padded = config.batch_size > 1 and not config.use_vllm
        check_model(models[-1], "student" if len(models) == 1 else "teacher", padded=padded)
    return models[0], models[1]


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
    vocabulary: int,
    retention: float,
    scope: str | None,
    entropy_threshold: float,
    divergence_threshold: float,
) -> About:
    """What the token records of a pair say that they are of.

    Args:
        config: models, prompts and sampling.
        rules: selection rules, the main one first.
        vocabulary: rows that both lm_heads have.
        retention: share of the tokens that each rule keeps, in (0, 1].
        scope: "rollout" or "batch", where the budget is spent; None: each rule's own.
        entropy_threshold, divergence_threshold: borders of the quadrants.

    Raises:
        ValueError: an unknown rule (the nearest are given), or a number out of range.
    """
    return About(
        student=config.model,
        teacher=config.teacher,
        vocabulary=vocabulary,
        rules=tuple(rules),
        retention=retention,
        scope=scope,
        seed=config.seed,
        temperature=config.temperature,
        entropy_threshold=entropy_threshold,
        divergence_threshold=divergence_threshold,
        settings={name: getattr(config, name) for name in _RECORDED},
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
    from .score.models import score_rollouts

    student, teacher = load_models(config)
    for rollouts in sampled(config, pair, student, first_batch=-(-writer.rollouts // config.batch_size)):
        scored = score_rollouts(
            student,
            teacher,
            rollouts,
            writer.about.fields(),
            temperature=config.temperature,
            tokens_per_forward=config.tokens_per_forward,
        )
        writer.write(rollouts, scored)
        on_batch(writer.rollouts)
