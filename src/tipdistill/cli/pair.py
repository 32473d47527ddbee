"""A student, a teacher and prompts: checked against each other, and only then loaded. What score and probe share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoProcessor

from ..data import drop_long_prompts, load_prompts, prompt_lengths
from ..integrations import _trl
from ..text import nearest
from ..vocabulary import check_same_tokenizer, shared_vocabulary
from .arguments import EXTRAS, require

DTYPES = ("auto", "float32", "bfloat16", "float16")


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are ValueErrors, with the nearest flags for an unknown one."""

    def error(self, message: str) -> Any:
        raise ValueError(message)

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """The parsed arguments; ValueError for anything that is none."""
        known = [flag for action in self._actions for flag in action.option_strings]
        for argument in argv:
            flag = argument.partition("=")[0]
            if flag.startswith("--") and flag not in known:
                raise ValueError(f"there is no flag {flag}.{nearest(flag, known)}")
        return self.parse_args(argv)


def pair_parser(command: str, description: str, max_prompts: int, max_new_tokens: int) -> Parser:
    """A parser with the arguments of a student, a teacher, prompts and rollouts."""
    parser = Parser(
        prog=f"tipdistill {command}",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument_group("models and prompts").add_argument
    add("--model", required=True, help="student: a directory or a hub id")
    add("--teacher", required=True, help="teacher: a directory or a hub id")
    add("--model_revision", help="revision of the student on the hub")
    add("--teacher_revision", help="revision of the teacher on the hub")
    add("--trust_remote_code", action="store_true", help="run code that comes with a model")
    add("--dtype", choices=DTYPES, default="auto", help="of the weights; auto: as they were saved")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto: cuda where there is one")
    add("--dataset", required=True, help="prompts: a JSONL, JSON or Parquet file, a directory, or a hub id")
    add("--dataset_config", help="configuration of a hub dataset")
    add("--dataset_split", default="train", help="split of the dataset")
    add("--prompt_column", default="prompt", help="column that holds the prompts")
    add("--prompt_template", help="text around plain prompts, with {prompt} where the prompt goes")
    add("--apply_chat", action="store_true", help="turn each plain prompt into a user message for the chat template")
    add("--max_prompt_length", type=_at_least(1), help="drop prompts with more tokens than this")
    add("--max_prompts", type=_at_least(0), default=max_prompts, help="take the first so many prompts; 0: all")
    add("--output_dir", required=True, help="where the files go")
    add = parser.add_argument_group("rollouts").add_argument
    add("--num_generations", type=_at_least(1), default=1, help="rollouts per prompt")
    add("--max_new_tokens", type=_at_least(1), default=max_new_tokens, help="tokens of a completion, at most")
    add("--temperature", type=_positive, default=1.0, help="of the sampling; divides the logits of both models")
    add("--seed", type=_at_least(0), default=0, help="of the sampling, and of rules that draw")
    add("--batch_size", type=_at_least(1), default=32, help="rollouts sampled at a time")
    add("--tokens_per_forward", type=_at_least(1), default=16384, help="tokens of a scoring forward, padding included")
    add("--use_vllm", action="store_true", help="sample with vLLM")
    add("--vllm_gpu_memory_utilization", type=_positive, default=0.3, help="share of the GPU's memory that vLLM takes")
    return parser


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


def read_pair(options: argparse.Namespace) -> Pair:
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


def load_models(options: argparse.Namespace) -> tuple[Any, Any]:
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


def load_engine(options: argparse.Namespace, student: Any) -> Any:
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


def _at_least(least: int) -> Any:
    def integer(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        return value

    return integer


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text}")
    return value
