"""Flags that several commands share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from ..text import nearest

if TYPE_CHECKING:
    from ..pair import PairConfig


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are ValueErrors, with the nearest flags for an unknown one.

    Args:
        command: after `tipdistill`.
        description: what it does.
        defaults: tell each flag's default after its help.
    """

    def __init__(self, command: str, description: str | None, defaults: bool = True) -> None:
        super().__init__(
            prog=f"tipdistill {command}",
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter if defaults else argparse.HelpFormatter,
        )

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
    from ..pair import DTYPES

    parser = Parser(command, description)
    add = parser.add_argument_group("models and prompts").add_argument
    add("--model", required=True, help="student: a directory or a hub id")
    add("--teacher", help="teacher: a directory, a hub id, or self for the student")
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
    add("--chat_template_kwargs", type=mapping, help='for the chat template, such as {"enable_thinking": false}')
    add("--max_prompt_length", type=at_least(1), help="drop prompts with more tokens than this")
    add("--max_prompts", type=at_least(0), default=max_prompts, help="take the first so many prompts; 0: all")
    add("--output_dir", required=True, help="where the files go")
    add = parser.add_argument_group("rollouts").add_argument
    add("--num_generations", type=at_least(1), default=1, help="rollouts per prompt")
    add(
        "--max_completion_length",
        "--max_new_tokens",
        dest="max_new_tokens",
        type=at_least(1),
        default=max_new_tokens,
        help="tokens of a completion, at most",
    )
    add("--temperature", type=_positive, default=1.0, help="of the sampling; divides the logits of both models")
    add("--seed", type=at_least(0), default=0, help="of the sampling, and of rules that draw")
    add("--batch_size", type=at_least(1), default=32, help="rollouts sampled at a time")
    add("--tokens_per_forward", type=at_least(1), default=16384, help="tokens of a scoring forward, padding included")
    add("--use_vllm", action="store_true", help="sample with vLLM")
    add("--vllm_gpu_memory_utilization", type=_positive, default=0.3, help="share of the GPU's memory that vLLM takes")
    add = parser.add_argument_group("a student that calls tools (docs/agents.md)").add_argument
    add("--environment", help="dotted path of the environment, package.module.Class: one object per rollout")
    add("--max_tool_calling_iterations", type=at_least(1), default=50, help="turns of the student's that call tools")
    add(
        "--max_tool_result_tokens",
        type=at_least(1),
        default=1024,
        help="tokens of a tool's result; longer ones are cut",
    )
    add("--tool_timeout", type=_positive, default=60.0, help="seconds that a tool may take")
    add = parser.add_argument_group("several teachers, and prompts of their own (docs/teachers.md)").add_argument
    add("--teachers", type=_teachers, help="in the place of --teacher: JSON, name to directory, hub id, server or self")
    add("--teacher_column", default="teacher", help="column of the dataset that names a row's teacher")
    add("--teacher_prompt_column", default="teacher_prompt", help="column with the teacher's own prompts, if any")
    add = parser.add_argument_group("a teacher on a server, in the place of --teacher").add_argument
    add(
        "--teacher_url",
        help="vLLM server that holds the teacher, such as http://host:8000/v1; its tokenizer is compared with the "
        "student's before weights are loaded",
    )
    add(
        "--teacher_lm_head",
        help="the model that the server serves, where it gives hidden states (docs/vllm.md): its lm_head alone is "
        "loaded here, and all is exact",
    )
    add("--teacher_served_name", help="name that the server knows the teacher by; default: the only one it serves")
    add(
        "--teacher_top_k",
        type=at_least(0),
        help="likeliest tokens to ask the server for, which give lower bounds of divergences; 0: the whole vocabulary; "
        "default: that where it is allowed, else 20",
    )
    add(
        "--teacher_api_key_env",
        help="environment variable that holds the server's key; default: OPENAI_API_KEY, for OpenAI alone",
    )
    add("--teacher_timeout", type=_positive, default=600.0, help="seconds of one request")
    add("--teacher_time_limit", type=_positive, default=1800.0, help="seconds that the server may be out")
    add("--teacher_concurrency", type=at_least(1), default=16, help="requests in flight")
    return parser


def pair_of(options: argparse.Namespace) -> PairConfig:
    """Models, prompts and sampling, of the flags of `pair_parser`; ValueError for a teacher too few or too many."""
    from ..pair import PairConfig

    return PairConfig(**{field.name: getattr(options, field.name) for field in fields(PairConfig)})


def mapping(text: str) -> dict[str, Any]:
    """A flag's JSON object."""
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise argparse.ArgumentTypeError(f'expected a JSON object such as {{"enable_thinking": false}}, got {text!r}')
    return parsed


def at_least(least: int) -> Any:
    def integer(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        return value

    return integer


def _teachers(text: str) -> dict[str, Any]:
    from ..documents import parse_mapping
    from ..teachers.named import read_teachers

    try:
        given = parse_mapping(text, "its value") or {}
        read_teachers(given, "its value")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error  # argparse names the flag
    return given


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text}")
    return value
