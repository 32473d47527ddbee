"""Do prompts and completions fit into both models? Asked before weights are loaded, and of every batch of prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset
from transformers import AutoConfig, PreTrainedTokenizerBase

from ..config import TIPConfig
from ..data import prompt_lengths
from ..evaluate.engines import as_fed
from ..evaluate.task import Task
from ..positions import check_positions, position_limit
from ..teachers.named import SELF, named_teachers, number_of

_ENCODED = 2000  # of the longest prompts, before weights are loaded; each batch is looked at again
REMEDY = " or drop longer prompts (--max_prompt_length of `tipdistill train`)"
_OVERRIDES = ("max_position_embeddings", "rope_parameters", "rope_scaling")


def position_limits(model: Any, teacher_model: Any, args: TIPConfig) -> dict[str, int | None]:
    """How far the positions of student and teacher reach, from their configurations.

    Args:
        model: a model, a directory or a hub id.
        teacher_model: the same, several by name, or None where `args` names others.
        args: the keywords that they are loaded with.
    """
    given: dict[str, tuple[Any, Any, str | None]] = {"student": (model, args.model_init_kwargs, None)}
    for one in named_teachers(teacher_model, args):
        own = (one.model, one.args.teacher_model_init_kwargs, one.args.teacher_model_revision)
        given[one.called] = given["student"] if one.model == SELF else own
    # one that a server holds has a limit of its own, which it says itself
    several: dict[str, int | None] = dict.fromkeys(given) if len(given) > 2 else {}
    return several | {
        who: _limit(named, {"revision": revision, **(dict(kwargs or {}))}, args.trust_remote_code)
        for who, (named, kwargs, revision) in given.items()
        if named is not None
    }


def _limit(model: Any, kwargs: dict[str, Any], trust_remote_code: bool) -> int | None:
    config = configuration_of(model, kwargs, trust_remote_code)
    return None if config is None else position_limit(config)


def configuration_of(model: Any, kwargs: dict[str, Any], trust_remote_code: bool) -> Any:
    """The configuration of a model that may not be loaded yet; None where it cannot be read, and loading says why.

    Args:
        model: a model, a directory or a hub id.
        kwargs: the keywords that it is loaded with.
        trust_remote_code: run code that comes with it.
    """
    config = kwargs.get("config", getattr(model, "config", None))
    if isinstance(model, str) and config is None:
        overrides = {name: kwargs[name] for name in _OVERRIDES if name in kwargs}
        try:
            config = AutoConfig.from_pretrained(
                model,
                revision=kwargs.get("revision"),
                trust_remote_code=kwargs.get("trust_remote_code", trust_remote_code),
                **overrides,
            )
        except (OSError, ValueError):
            return None
    return config


def check_prompts_fit(
    limits: Mapping[str, int | None], dataset: Any, processing_class: Any, args: TIPConfig, name: str = ""
) -> None:
    """Refuse a dataset whose longest prompt leaves a completion too few positions.

    Only prompts that could be too long are encoded: a token is a byte of text at least.

    Args:
        limits: see `position_limits`.
        dataset: of prompts, or several by name; streams and prompts with images are left to `check_batch`.
        processing_class: the student's tokenizer.
        args: of the run.
        name: what errors call the dataset; "" where it is the one to train on.

    Raises:
        ValueError: whose positions do not suffice, and what to lower.
    """
    if isinstance(dataset, dict):
        for part, rows in dataset.items():
            check_prompts_fit(limits, rows, processing_class, args, f"{name}[{part!r}]")
        return
    completion, option = args.max_completion_length, "max_completion_length"
    check_positions(limits, 1, completion, option, REMEDY)
    if not isinstance(dataset, Dataset) or not isinstance(processing_class, PreTrainedTokenizerBase):
        return
    prompts, column = dataset["prompt"][:], args.teacher_prompt_column
    teachers = {who: limit for who, limit in limits.items() if who != "student"}
    names = [who.removeprefix("teacher").strip() for who in teachers]
    if column not in dataset.column_names and names in ([], [""]):
        _check_longest(limits, prompts, processing_class, args, name)
        return
    # each model by the prompts that it reads: those of another are no business of its own
    _check_longest({"student": limits["student"]}, prompts, processing_class, args, name)
    read, remedy = prompts, REMEDY
    if column in dataset.column_names:
        remedy = f" or shorten the longest {column}"
        read = [prompt if own is None else own for prompt, own in zip(prompts, dataset[column][:], strict=True)]
    numbers = [0] * len(read)
    if len(names) > 1:
        given = args.teacher_column
        of_rows = dataset[given][:] if given in dataset.column_names else [None] * len(read)
        numbers = [number_of({given: value}, names, given, f"row {row}") for row, value in enumerate(of_rows)]
    for number, (who, limit) in enumerate(teachers.items()):
        own_prompts = [prompt for prompt, teacher in zip(read, numbers, strict=True) if teacher == number]
        if own_prompts:
            _check_longest({who: limit}, own_prompts, processing_class, args, name, remedy)


def check_problems_fit(
    limits: Mapping[str, int | None], tasks: Sequence[Task], processing_class: Any, args: TIPConfig
) -> None:
    """Refuse tasks whose longest problem, as the student is asked it, leaves a completion too few positions.

    Args:
        limits, processing_class, args: as in `check_prompts_fit`.
        tasks: that are measured while the student trains.

    Raises:
        ValueError: which task, and what to lower.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if all(limit is None for limit in limits.values()):
        return
    for task in tasks:
        asked = [as_fed(tokenizer, task.prompt_of(problem), task.chat) for problem in task.problems]
        _check_longest(limits, asked, tokenizer, args, f"the task {task.name!r}", "")


def _check_longest(
    limits: Mapping[str, int | None],
    prompts: Sequence[Any],
    tokenizer: Any,
    args: TIPConfig,
    name: str,
    remedy: str = REMEDY,
) -> None:
    completion = args.max_completion_length
    room = min((limit for limit in limits.values() if limit is not None), default=None)
    dressed = [prompt for prompt in prompts if not isinstance(prompt, str)][:1]
    if room is None or (dressed and not tokenizer.chat_template):
        return
    options = args.chat_template_kwargs or {}
    # at most what a template puts around a prompt
    (template,) = prompt_lengths(dressed or prompts[:1], tokenizer, options)
    sizes = {row: len(str(prompt).encode("utf-8", "replace")) for row, prompt in enumerate(prompts)}
    doubtful = [row for row, size in sizes.items() if size + template + completion > room]
    doubtful = sorted(doubtful, key=lambda row: -sizes[row])[:_ENCODED]
    if doubtful:
        longest = max(prompt_lengths([prompts[row] for row in doubtful], tokenizer, options, doubtful))
        check_positions(limits, longest, completion, "max_completion_length", remedy, name)


def check_batch(
    limits: Mapping[str, int | None], prompt_ids: Sequence[Sequence[int]], completion: int, in_turns: bool
) -> None:
    """Refuse prompts of a batch that leave a completion too few positions, before it is sampled.

    Args:
        limits: see `position_limits`.
        prompt_ids: tokens of each prompt.
        completion: tokens of a completion, at most.
        in_turns: tools answer meanwhile, so that a prompt holds a part of the completion.

    Raises:
        ValueError: whose positions do not suffice, and what to lower.
    """
    longest = max(map(len, prompt_ids))
    check_positions(limits, longest, 1 if in_turns else completion, "max_completion_length", REMEDY)


def check_completions(prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]) -> None:
    """Refuse completions of which nothing can be learned.

    Args:
        prompt_ids, completion_ids: tokens of each rollout.

    Raises:
        ValueError: the rollout that has no token.
    """
    for row, ids in enumerate(completion_ids):
        if len(ids) == 0:
            raise ValueError(
                f"rollout {row} of the batch has a completion of length 0 (its prompt has {len(prompt_ids[row])} "
                "tokens): there is no token to distil. Check the engine's length limits and stop tokens."
            )
