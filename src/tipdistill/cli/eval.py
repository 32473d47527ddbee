"""`tipdistill eval`: sample the problems of tasks, check the answers, and say how many are right."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..documents import read_text
from ..terminal import say
from ..text import markdown_table, printable, with_error
from .flags import Parser, mapping

# fields of a task that flags change
_OF_TASK = ("max_new_tokens", "environment", "max_tool_calling_iterations", "max_tool_result_tokens", "tool_timeout")


def main(argv: list[str]) -> int:
    """Evaluate a model on tasks and write D/metrics.json.

    Args:
        argv: the flags; `--help` lists them.

    Raises:
        ValueError: a flag that does not fit, an unknown task, a directory in use.
        OSError: a server that died; what was sampled is kept, and `--resume` goes on.
    """
    flags = parser().read(argv)
    # after --help and the flags' own errors: these load torch
    from ..evaluate.answers import Verifiers
    from ..evaluate.engines import Sampling, open_engine
    from ..evaluate.run import run
    from ..tasks import load_task

    prompt = _template(flags.prompt)
    tasks = [
        load_task(
            name.strip(),
            flags.limit,
            prompt=prompt,
            chat=flags.apply_chat,
            **{field: getattr(flags, field) for field in _OF_TASK},
        )
        for name in flags.tasks.split(",")
        if name.strip()
    ]
    for task in tasks:
        if task.divergence is not None:
            raise ValueError(
                f"{task.name} compares a student with its teacher, and eval has one model: `tipdistill score --model "
                "... --teacher ... --dataset FILE` measures the divergence of every token, and a run measures it as it "
                "trains (eval_tasks)."
            )
    progress = _Progress()
    with Verifiers(flags.verifiers, flags.verify_seconds) as verifiers:
        metrics = run(
            tasks,
            lambda: open_engine(
                flags.model,
                flags.engine,
                flags.base_url,
                flags.batch_size,
                flags.dtype,
                flags.concurrency,
                flags.trust_remote_code,
                flags.chat_template_kwargs,
                flags.api_key_env,
                flags.tokenizer,
            ),
            flags.output_dir,
            flags.num_samples,
            Sampling(flags.temperature, flags.top_p, top_k=flags.top_k),
            flags.seed,
            flags.pass_k,
            {"model": flags.model, "chat_template_kwargs": flags.chat_template_kwargs},
            flags.resume,
            flags.regrade,
            verifiers,
            progress,
        )
    progress.end()
    say(table(metrics))
    say(f"\n{Path(flags.output_dir) / 'metrics.json'}")
    return 0


def table(metrics: dict[str, Any]) -> str:
    """The numbers of an evaluation as a Markdown table; ± is the standard error over problems.

    Args:
        metrics: what `tipdistill.evaluate.run.run` returns.

    Example:
        >>> numbers = {"problems": 2, "mean_at_k": 0.5, "standard_error": 0.1, "deviation_over_samples": 0.2,
        ...            "pass_at_k": {"2": 1.0}, "maj_at_k": 0.5, "mean_tokens": 7, "truncated": 0.0, "undecided": 0}
        >>> print(table({"num_samples": 2, "tasks": {"sums": numbers}}))
        | task | problems | mean@2 | over samples | maj@2 | pass@2 | tokens | truncated |
        | --- | --- | --- | --- | --- | --- | --- | --- |
        | sums | 2 | 0.500 ± 0.100 | ± 0.200 | 0.500 | 1.000 | 7 | 0.0 % |
    """
    k = metrics["num_samples"]
    passes = list(next(iter(metrics["tasks"].values()))["pass_at_k"])
    head = ["task", "problems", f"mean@{k}", "over samples", f"maj@{k}"]
    head += [f"pass@{other}" for other in passes]
    head += ["tokens", "truncated"]
    rows = []
    for name, numbers in metrics["tasks"].items():
        rows.append(
            [name, f"{numbers['problems']:,}", with_error(numbers["mean_at_k"], numbers["standard_error"])]
            + [with_error(None, numbers["deviation_over_samples"]), _number(numbers["maj_at_k"])]
            + [f"{numbers['pass_at_k'][other]:.3f}" for other in passes]
            + [f"{numbers['mean_tokens']:,.0f}", f"{100 * numbers['truncated']:.1f} %"]
        )
    lines = [markdown_table(head, rows), *_of_episodes(metrics["tasks"])]
    for name, numbers in metrics["tasks"].items():
        if numbers["undecided"]:
            lines.append(f"\n{name}: {numbers['undecided']} answers took too long to check and count as wrong.")
    return "\n".join(lines)


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"


def _of_episodes(tasks: dict[str, Any]) -> list[str]:
    """A table of what environments judged, and how far the conversations went; none where there are none."""
    played = {name: numbers for name, numbers in tasks.items() if "turns" in numbers}
    if not played:
        return []
    rows = []
    for name, numbers in played.items():
        failed = ", ".join(f"{kind} {mean:.2f}" for kind, mean in numbers["failures"].items()) or "none"
        ended = ", ".join(f"{kind} {share:.0%}" for kind, share in numbers["endings"].items() if share)
        rows.append([name, f"{numbers['turns']:.1f}", f"{numbers['calls']:.1f}", failed, ended])
    lines = ["", markdown_table(["task", "turns", "calls", "failed calls", "endings"], rows)]
    for name, numbers in played.items():
        shares = {**numbers["figures"], **numbers["parts"]}
        if shares:
            lines += ["", markdown_table([name, "mean"], [[part, f"{value:.3f}"] for part, value in shares.items()])]
    return lines


def parser() -> Parser:
    """The flags of `tipdistill eval`."""
    parser = Parser(
        "eval",
        "mean@k, pass@k and maj@k of a model on tasks; every sample is kept in OUTPUT_DIR/samples.",
        defaults=False,
    )
    add = parser.add_argument
    add("--model", required=True, help="directory or hub id; with --base_url, the name that the server knows")
    add(
        "--tasks",
        required=True,
        help="comma-separated: math500, aime24, aime25, gsm8k, arithmetic, modular, machine; FILE.jsonl with problem "
        "and answer; NAME=FILE.jsonl for a local copy of one of these; the dotted path of your own",
    )
    add("--num_samples", type=int, default=1, help="k, completions per problem (default 1)")
    add("--output_dir", required=True, help="where samples and metrics.json go")
    add("--engine", default="auto", help="transformers, vllm, or auto: vLLM where it is installed and there is a GPU")
    add("--base_url", help="an OpenAI-compatible server, such as http://localhost:8000/v1")
    add(
        "--api_key_env",
        help="environment variable that holds the server's key (default: OPENAI_API_KEY, for https://api.openai.com)",
    )
    add("--tokenizer", help="of the server's model, where tools are called: a directory or a hub id (default: --model)")
    add("--concurrency", type=int, default=32, help="requests in flight to the server (default 32)")
    add("--batch_size", type=int, default=16, help="prompts per forward with transformers (default 16)")
    add("--dtype", default="auto", help="of the weights, such as bfloat16 (default: the checkpoint's)")
    add("--temperature", type=float, default=1.0, help="of the sampling; 0 is greedy (default 1)")
    add("--top_p", type=float, default=1.0, help="nucleus (default 1)")
    add("--top_k", type=int, default=0, help="sample from so many of the likeliest tokens (default 0: all)")
    add(
        "--max_completion_length",
        "--max_new_tokens",
        dest="max_new_tokens",
        type=int,
        help="longest completion (default: the task's, else 8192)",
    )
    add("--seed", type=int, default=0, help="of the sampling (default 0)")
    add(
        "--environment",
        help="dotted path of an environment that the model acts on (docs/agents.md; default: the task's)",
    )
    add("--max_tool_calling_iterations", type=int, help="turns that may call tools (default: the task's, else 50)")
    add("--max_tool_result_tokens", type=int, help="tokens of a tool's result (default 1024)")
    add("--tool_timeout", type=float, help="seconds that a tool may take (default 60)")
    add(
        "--prompt",
        help="boxed (default) asks for a boxed answer, own puts the problem as it stands; or a template with "
        "{problem}, or a file that holds one",
    )
    add(
        "--apply_chat",
        action=argparse.BooleanOptionalAction,
        help="put prompts through the chat template (default: where the tokenizer has one; a server's chat endpoint)",
    )
    add("--chat_template_kwargs", type=mapping, help='for the chat template, such as {"enable_thinking": false}')
    add("--limit", type=int, help="take the first so many problems of each task")
    add("--pass_k", type=_numbers, help="which pass@k to report, such as 1,4,16 (default: powers of two up to k)")
    add("--verifiers", type=int, help="processes that check answers (default: one per core, at most 4)")
    add("--verify_seconds", type=float, default=10.0, help="time limit of checking one answer (default 10)")
    add("--trust_remote_code", action="store_true", help="run the model's own code")
    add("--resume", action="store_true", help="go on with the evaluation that OUTPUT_DIR holds")
    add("--regrade", action="store_true", help="check the kept samples again (implies --resume)")
    return parser


def _numbers(text: str) -> Sequence[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected numbers such as 1,4,16, got {text!r}") from error


def _template(given: str | None) -> str | None:
    """The text of `--prompt`: as it was given, or of the file that it names."""
    try:
        is_file = given is not None and "{problem}" not in given and Path(given).is_file()
    except OSError:  # longer than a file's name can be
        is_file = False
    return read_text(given) if is_file and given is not None else given


class _Progress:
    """One line that is rewritten on a terminal, and one line per tenth elsewhere."""

    def __init__(self) -> None:
        self.terminal = sys.stderr.isatty()
        self.last = ("", -1)

    def __call__(self, what: str, done: int, total: int) -> None:
        tenth, what = 10 * done // total, printable(what)
        if self.terminal:
            print(f"\r\033[K{what}: {done:,} of {total:,}", end="", file=sys.stderr, flush=True)
        elif (what, tenth) != self.last:
            print(f"{what}: {done:,} of {total:,}", file=sys.stderr, flush=True)
        self.last = (what, tenth)

    def end(self) -> None:
        if self.terminal:
            print("\r\033[K", end="", file=sys.stderr)
