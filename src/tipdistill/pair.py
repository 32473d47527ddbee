"""A student, a teacher and prompts: checked against each other, and only then loaded. What score and probe share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoProcessor

from .data import drop_long_prompts, load_prompts, prompt_lengths
from .extras import EXTRAS, require
from .integrations import _trl
from .vocabulary import check_same_tokenizer, shared_vocabulary


@dataclass(frozen=True)
class Pair:
    """What was found out before any weights were loaded.

    Attributes:
        tokenizer: the student's.
        vocabulary: rows that both lm_heads have.
        forbidden: rows of the student's lm_head that the teacher lacks, never to be sampled.
        prompts: plain or conversational.
        described: label → line, to show.
    """

    tokenizer: Any
    vocabulary: int
    forbidden: list[int]
    prompts: list[Any]
    described: dict[str, str]


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
    rows, teacher_rows = (one.get_text_config().vocab_size for one in configurations)
    shared = shared_vocabulary(rows, teacher_rows, num_tokens=size)
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
        except (OSError, ValueError) as error:
            raise ValueError(f"the {who} could not be read ({flag} {name}): {error}") from error
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


def read_pair(options: Any) -> Pair:
    """Check models, prompts, device and packages, as the flags of `pair_parser` name them. Loads no weights.

    Raises:
        ValueError, FileNotFoundError, ImportError: what does not fit, with the remedy.
    """
    device_of(options.device)
    if options.use_vllm:
        require("vllm", "--use_vllm", EXTRAS["use_vllm"][1])
    configurations, processors, described = check_models(
        ("--model", options.model, options.model_revision),
        ("--teacher", options.teacher, options.teacher_revision),
        options.trust_remote_code,
    )
    tokenizer = getattr(processors[0], "tokenizer", processors[0])
    dataset = load_prompts(
        options.dataset,
        options.dataset_split,
        config=options.dataset_config,
        column=options.prompt_column,
        template=options.prompt_template,
        as_chat=options.apply_chat,
    )
    assert isinstance(dataset, Dataset), "nothing is streamed here"
    check_chat_template(dataset[0]["prompt"], tokenizer, options.model, options.apply_chat)
    if options.max_prompt_length is not None:
        dataset, _ = drop_long_prompts(dataset, tokenizer, options.max_prompt_length)
    if options.max_prompts:
        dataset = dataset.select(range(min(options.max_prompts, len(dataset))))
    prompts = dataset["prompt"][:]
    longest = max(prompt_lengths(prompts, tokenizer))
    for who, configuration in zip(("student", "teacher"), configurations, strict=True):
        room = getattr(configuration.get_text_config(), "max_position_embeddings", None)
        if room is not None and longest + options.max_new_tokens > room:
            raise ValueError(
                f"the longest prompt has {longest} tokens, and with --max_new_tokens {options.max_new_tokens} that is "
                f"more than the {room} positions of the {who}: lower --max_new_tokens or set --max_prompt_length."
            )
    described["prompts"] = (
        f"{len(prompts):,} × {options.num_generations} rollouts of up to {options.max_new_tokens:,} tokens"
    )
    rows, teacher_rows = (one.get_text_config().vocab_size for one in configurations)
    shared = min(rows, teacher_rows)
    return Pair(tokenizer, shared, list(range(shared, rows)), prompts, described)


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


def load_models(options: Any) -> tuple[Any, Any]:
    """Student and teacher on the device, in eval mode, without gradients."""
    device = device_of(options.device)
    models = []
    for name, revision in ((options.model, options.model_revision), (options.teacher, options.teacher_revision)):
        model = _trl.create_model_from_path(
            name,
            dtype=options.dtype if options.dtype == "auto" else getattr(torch, options.dtype),
            revision=revision,
            trust_remote_code=options.trust_remote_code,
            device_map=None,
        )
        models.append(model.to(device).eval().requires_grad_(False))
    return models[0], models[1]


def load_engine(options: Any, student: Any) -> Any:
    """What samples: the student itself, or vLLM with the student's weights."""
    if not options.use_vllm:
        return student
    from vllm import LLM

    return LLM(
        model=options.model,
        revision=options.model_revision,
        trust_remote_code=options.trust_remote_code,
        dtype=options.dtype,
        gpu_memory_utilization=options.vllm_gpu_memory_utilization,
        seed=options.seed,
    )
