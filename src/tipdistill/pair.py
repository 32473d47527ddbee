"""A student, a teacher and prompts: checked against each other, then loaded, then sampled and scored.

What `tipdistill score` and `tipdistill probe` share; `tipdistill train` checks its models here too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset

from .chat import check_chat_template_kwargs, encode_prompts, is_conversational
from .data import as_conversations, check_prompt, check_text_alone, drop_long_prompts, load_prompts
from .environments import Acting, Limits, Worlds, read_environment
from .environments.play import check_conversational, read_dialect
from .extras import EXTRAS, require
from .http import server_url, variable_name
from .integrations import _trl
from .model_files import check_chat_template, check_models, compare_models, of_one, read_models
from .positions import check_positions, position_limit
from .records import About, RecordsWriter
from .rollout import generate
from .teachers.named import SELF, NamedTeacher, check_teacher_names, named_teachers, number_of, read_teachers
from .teachers.rollouts import (
    AskedTeacher,
    LoadedTeacher,
    PromptedRollouts,
    RolloutTeacher,
    RoutedRollouts,
    ask_teacher,
    check_rules,
    score_with,
)
from .types import Rollout
from .vocabulary import (
    Names,
    check_ids_shared,
    check_same_tokenizer,
    forbidden_ids,
    known_tokens,
    shared_vocabulary,
)

_POSITIONS = "--max_new_tokens", " or set --max_prompt_length"
DTYPES = ("auto", "float32", "bfloat16", "float16")
# how a teacher on a server is asked
SERVED = (
    *("teacher_url", "teacher_lm_head", "teacher_served_name", "teacher_top_k", "teacher_api_key_env"),
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
        environment: dotted path of an environment, whose tools the student calls; None: there is none.
        max_tool_calling_iterations, max_tool_result_tokens, tool_timeout: how far an episode may go, as in `TIPConfig`.
        teachers: several teachers by name, in the place of `teacher`, as in `TIPConfig`.
        teacher_column: column of the dataset that names the teacher of a row.
        teacher_prompt_column: column of the dataset with the teacher's own prompts, where there is one.
        teacher_url: a vLLM server that holds the teacher, up to and with the version.
        teacher_lm_head: the model that the server serves, where it gives hidden states; its lm_head is loaded here.
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
    environment: str | None = None
    max_tool_calling_iterations: int = Limits.rounds
    max_tool_result_tokens: int = Limits.result_tokens
    tool_timeout: float = Limits.seconds
    teachers: dict[str, Any] | None = None
    teacher_column: str = "teacher"
    teacher_prompt_column: str = "teacher_prompt"
    teacher_url: str | None = None
    teacher_lm_head: str | None = None
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
        named = [name for name in ("teacher", "teachers", "teacher_url") if getattr(self, name) is not None]
        if not named:
            raise ValueError(
                "a teacher is needed: --teacher, a directory or a hub id, --teacher_url, a server that holds it, or "
                "--teachers, several by name."
            )
        if len(named) > 1:
            raise ValueError(
                f"{' and '.join(f'--{name} {getattr(self, name)}' for name in named)} each name the teacher: give one "
                "of them."
            )
        if self.teachers is not None:
            read_teachers(self.teachers)
            shared = ("teacher_top_k", "teacher_timeout", "teacher_time_limit", "teacher_concurrency")
            misplaced = tuple(name for name in ("teacher_revision", *SERVED) if name not in shared)
        else:
            own_revision = () if self.teacher_lm_head else ("teacher_revision",)  # which is the lm_head's too
            misplaced = own_revision if self.teacher_url else SERVED
        given = [name for name in misplaced if getattr(self, name) != getattr(PairConfig, name)]
        if given:
            if self.teachers is not None:
                raise ValueError(f"--{given[0]} is of one teacher: say it in the entry of the one it is meant for.")
            own, other = ("loaded here", "on a server") if self.teacher_url else ("on a server", "loaded here")
            raise ValueError(f"--{given[0]} is of a teacher {own}, and this one is {other}: leave it out.")

    def named_teachers(self) -> list[NamedTeacher]:
        """The teachers, in the order in which they are named; one, with no name, where there is one."""
        settings = {name: getattr(self, name) for name in ("temperature", "teachers", *SERVED)}
        own = {"teacher_model_name_or_path": None, "teacher_model_revision": self.teacher_revision}
        extra = {
            "teacher_model_init_kwargs": None,
            "teacher_offload": False,
            "trust_remote_code": self.trust_remote_code,
        }
        return named_teachers(self.teacher, SimpleNamespace(**settings, **own, **extra))


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
    "environment",
    "max_tool_calling_iterations",
    "max_tool_result_tokens",
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
        teachers: of each that is elsewhere its name → itself, which answers; the others are still to be loaded.
        named: the teachers.
        numbers: of each prompt, which of them reads it; empty where there is one.
        teacher_prompts: of each teacher, prompt number → token ids of the prompt that it reads, where that is its own.
        top_k: how many of its likeliest tokens some teacher tells; None: all of them tell all.
        acting: the student's tools; None: there are none.
    """

    tokenizer: Any
    vocabulary: int
    forbidden: list[int]
    prompts: list[Any]
    described: dict[str, str]
    teachers: dict[str, AskedTeacher] = field(default_factory=dict)
    named: list[NamedTeacher] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    teacher_prompts: list[dict[int, list[int]]] = field(default_factory=list)
    top_k: int | None = None
    acting: Acting | None = None


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
    named = config.named_teachers()
    student = "--model", config.model, config.model_revision
    (of_student,), (processor,), described = read_models([("student", *student)], config.trust_remote_code)
    tokenizer = getattr(processor, "tokenizer", processor)
    differing: dict[int, Names] = {}
    local: dict[str, tuple[Any, Any]] = {}  # of each teacher that is loaded here: configuration and processing class
    comparisons = []
    for one in named:
        if one.args.teacher_url is not None or one.model == SELF:
            continue
        flag = f"--teachers {one.name}" if one.name else "--teacher"
        pair = student, (flag, one.model, one.args.teacher_model_revision)
        configurations, processors, lines = check_models(*pair, config.trust_remote_code)
        described |= of_one(one.name, lines)
        differing |= check_same_tokenizer(*processors)
        local[one.name] = configurations[1], processors[1]
        comparisons.append((one.name, partial(compare_models, *pair, configurations, processors)))
    dataset = _read_prompts(config, tokenizer)
    acting = _acting(config, dataset, tokenizer)
    settings, conversational = config.chat_template_kwargs, is_conversational(dataset)
    for name, compare in comparisons:
        described |= of_one(name, compare(conversational, settings))
    prompts = dataset["prompt"][:]
    dressed: dict[str, Any] = {}  # with descriptions of the tools
    if acting is not None:
        dressed["tools"] = acting.worlds.schemas()
        dressed["chat_template"] = read_dialect(tokenizer, settings).chat_template
        described["tools"] = f"{', '.join(tool.__name__ for tool in dressed['tools'])}, of {config.environment}"
    prompt_ids = encode_prompts(prompts, tokenizer, settings, **dressed)
    check_ids_shared(prompt_ids, differing, config.dataset)
    numbers = _numbers(config, named, dataset)
    of_teachers = [local.get(one.name, (None, tokenizer))[1] for one in named]
    teacher_prompts = _teacher_prompts(config, dataset, of_teachers, dressed)
    if acting is not None and any(teacher_prompts):
        raise ValueError(
            f"column {config.teacher_prompt_column!r} gives the teacher prompts of its own, without what the "
            "environment says at a rollout's beginning: leave one of them out (--teacher_prompt_column)."
        )
    check_positions({"student": position_limit(of_student)}, *_longest(prompt_ids), config.max_new_tokens, *_POSITIONS)
    for number, one in enumerate(named):
        # how far the positions of a server's model reach it says when it is asked
        limit = position_limit(local[one.name][0] if one.name in local else of_student)
        if one.args.teacher_url is None:
            read = [
                teacher_prompts[number].get(row, ids)
                for row, ids in enumerate(prompt_ids)
                if not numbers or numbers[row] == number
            ]
            check_positions({one.called: limit}, *_longest(read), config.max_new_tokens, *_POSITIONS)
    described["prompts"] = (
        f"{len(prompts):,} × {config.num_generations} rollouts of up to {config.max_new_tokens:,} tokens"
    )
    asked: dict[str, AskedTeacher] = {}
    for one in named:
        if one.args.teacher_url is not None:
            teacher = asked[one.name] = ask_teacher(_of_server(one.args), tokenizer, device)
            check_rules(teacher, rules, one.args.teacher_url)
            check_ids_shared(prompt_ids, teacher.differing, config.dataset)
            differing |= teacher.differing
            gives = "its whole vocabulary" if teacher.top_k is None else f"its {teacher.top_k} likeliest tokens"
            described[one.called] = f"{teacher.name} at {one.args.teacher_url}, which gives {gives}"
        elif one.model == SELF:
            described[one.called] = "the student itself"
    # one that is known by its likeliest tokens does not tell how many rows of padding it has
    rows, tokens = of_student.get_text_config().vocab_size, known_tokens(tokenizer, differing)
    widths = [configuration.get_text_config().vocab_size for configuration, _ in local.values()]
    widths += [teacher.vocabulary or max(tokens, len(tokenizer)) for teacher in asked.values()]
    widths += [rows for one in named if one.model == SELF]
    known = [configuration.get_text_config().vocab_size for configuration, _ in local.values()]
    known += [teacher.vocabulary or rows for teacher in asked.values()]
    shared = shared_vocabulary(rows, min(known, default=rows), num_tokens=tokens)
    if asked and not local:
        described["tokenizer"] = (
            f"the same for both: {len(tokenizer):,} tokens; the divergence runs over {shared:,} rows"
        )
    return Pair(
        tokenizer,
        shared,
        forbidden_ids(rows, min(widths), differing),
        prompts,
        described,
        asked,
        named,
        numbers,
        teacher_prompts,
        min((teacher.top_k for teacher in asked.values() if teacher.top_k is not None), default=None),
        acting,
    )


def _acting(config: PairConfig, dataset: Dataset, tokenizer: Any) -> Acting | None:
    if config.environment is None:
        return None
    limits = config.max_tool_calling_iterations, config.max_tool_result_tokens, config.tool_timeout
    Limits(config.max_new_tokens, *limits)
    factory = read_environment(config.environment)
    check_conversational(dataset["prompt"][:1])
    read_dialect(tokenizer, config.chat_template_kwargs)
    return Acting(Worlds(factory=factory, seconds=config.tool_timeout), dataset, *limits)


def _read_prompts(config: PairConfig, tokenizer: Any) -> Dataset:
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
    check_text_alone(dataset, config.dataset)
    return as_conversations(dataset, config.teacher_prompt_column) if config.apply_chat else dataset


def _numbers(config: PairConfig, named: Sequence[NamedTeacher], dataset: Dataset) -> list[int]:
    """Of each prompt, which of several teachers reads it; empty where there is one."""
    if not named[0].name:
        return []
    check_teacher_names(dataset, config.dataset, [one.name for one in named], config.teacher_column)
    column = config.teacher_column
    values = dataset[column][:] if column in dataset.column_names else [None] * len(dataset)
    names = [one.name for one in named]
    return [number_of({column: value}, names, column, f"row {row}") for row, value in enumerate(values)]


def _teacher_prompts(
    config: PairConfig, dataset: Dataset, tokenizers: Sequence[Any], dressed: dict[str, Any]
) -> list[dict[int, list[int]]]:
    """Of each teacher, by row the tokens of the prompt that it reads instead of the student's."""
    column = config.teacher_prompt_column
    if column not in dataset.column_names:
        return [{} for _ in tokenizers]
    own = {row: prompt for row, prompt in enumerate(dataset[column][:]) if prompt is not None}
    for row, prompt in own.items():
        check_prompt(prompt, row, f"column {column!r} of {config.dataset}")
    prompts, settings = list(own.values()), config.chat_template_kwargs
    encoded = [
        encode_prompts(prompts, getattr(tokenizer, "tokenizer", tokenizer), settings, numbers=list(own), **dressed)
        for tokenizer in tokenizers
    ]
    return [dict(zip(own, ids, strict=True)) for ids in encoded]


def _longest(prompts: Sequence[Sequence[int]]) -> tuple[int]:
    return (max(map(len, prompts), default=1),)


def _of_server(args: Any) -> dict[str, Any]:
    """What asking a server takes, by the names of `TIPConfig`."""
    names = ("temperature", "teacher_model_revision", "trust_remote_code", *SERVED)
    return {name: getattr(args, name) for name in names}


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
    """The student on the device, in eval mode, without gradients, and what answers for its teacher or teachers.

    Raises:
        ValueError: a model whose logits are not those of its hidden states and lm_head, see `check_model`.
    """
    student = _loaded(config, "student", config.model, config.model_revision)
    loaded: dict[Any, Any] = {}
    teachers: list[RolloutTeacher] = []
    for one, own in zip(pair.named, pair.teacher_prompts, strict=True):
        teacher: RolloutTeacher
        if one.name in pair.teachers:
            teacher = pair.teachers[one.name]
        elif one.model == SELF:
            teacher = LoadedTeacher(student)
        else:
            key = one.model, one.args.teacher_model_revision
            loaded[key] = loaded.get(key) or _loaded(config, one.called, *key)
            teacher = LoadedTeacher(loaded[key])
        teachers.append(PromptedRollouts(teacher, own) if own else teacher)
    return student, RoutedRollouts(teachers, pair.numbers) if pair.numbers else teachers[0]


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
    teacher, settings = config.teacher or "", {name: getattr(config, name) for name in _RECORDED}
    if pair is not None:
        said = {
            one.name: pair.teachers[one.name].name if one.name in pair.teachers else one.model for one in pair.named
        }
        teacher = ", ".join(f"{name}: {model}" if name else model for name, model in said.items())
        if pair.top_k is not None:
            settings["teacher_top_k"] = pair.top_k
        if pair.numbers:
            settings["teacher_column"] = config.teacher_column
        if any(pair.teacher_prompts):
            settings["teacher_prompt_column"] = config.teacher_prompt_column
    return About(
        student=config.model,
        teacher=teacher,
        vocabulary=0 if pair is None else pair.vocabulary,
        rules=tuple(rules),
        retention=retention,
        scope=scope,
        seed=config.seed,
        temperature=config.temperature,
        entropy_threshold=entropy_threshold,
        divergence_threshold=divergence_threshold,
        settings=settings,
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
        acting=pair.acting,
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
