"""A task: problems, how they are put to a model, and how a response is checked, or compared with a teacher."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..environments import Limits
from ..text import check_known

BOXED = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}."
PROMPTS = ("boxed", "own")
DIVERGENCES = ("reverse_kl", "forward_kl")


@dataclass(frozen=True)
class Problem:
    """What is asked and what is right.

    Attributes:
        text: the problem, a string or a list of messages.
        answer: the reference answer.
        row: what an environment begins from, see `Task.environment`.
    """

    text: Any
    answer: str
    row: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """Problems with a verifier, or prompts at which a student is compared with its teacher.

    Attributes:
        name: how files and tables call it.
        problems: at least one.
        prompt: "boxed" asks for the answer in a box, "own" puts the problem as it stands, anything else is a template
            with "{problem}" in it.
        chat: put the prompt as a user's message through the chat template; None: where the tokenizer has one.
        check: (response, answer) → bool; None: `tipdistill.evaluate.is_correct`.
        extract: response → the answer that it gives or None, for maj@k beside a `check`; None: the whole response.
        special_tokens: whether `check` sees special tokens, the end of the sequence among them.
        max_new_tokens: longest completion, in tokens; None: the caller's.
        environment: what the model acts on while it answers, and which judges what it did: a class in the protocol of
            TRL's GRPOTrainer, or its dotted path (docs/agents.md); None: it answers at once.
        max_tool_calling_iterations, max_tool_result_tokens, tool_timeout: how far an episode may go, as in `TIPConfig`.
        divergence: "reverse_kl" or "forward_kl": nothing is checked; what is measured is that divergence of student and
            teacher, in nats, the mean over the tokens that the student wrote. Less is better.

    Raises:
        ValueError: no problem, a template without "{problem}", an unknown divergence, or one beside an environment.

    Example:
        >>> task = Task("sums", (Problem("1 + 1 =", "2"),), prompt="own")
        >>> task.prompt_of(task.problems[0])
        '1 + 1 ='
    """

    name: str
    problems: tuple[Problem, ...]
    prompt: str = "boxed"
    chat: bool | None = None
    check: Callable[[str, str], bool] | None = None
    extract: Callable[[str], str | None] | None = None
    special_tokens: bool = False
    max_new_tokens: int | None = None
    divergence: str | None = None
    environment: Callable[[], Any] | str | None = None
    max_tool_calling_iterations: int = Limits.rounds
    max_tool_result_tokens: int = Limits.result_tokens
    tool_timeout: float = Limits.seconds

    def __post_init__(self) -> None:
        if not self.problems:
            raise ValueError(f"task {self.name!r} has no problem.")
        if self.prompt not in PROMPTS and "{problem}" not in self.prompt:
            raise ValueError(
                f"a prompt is one of {', '.join(PROMPTS)}, or a template with '{{problem}}' in it; got {self.prompt!r}."
            )
        if self.divergence is not None:
            check_known("divergence", self.divergence, DIVERGENCES)
        if self.environment is not None and (self.divergence is not None or self.check is not None):
            raise ValueError(
                f"the environment of task {self.name!r} judges what was done: leave out check and divergence."
            )

    def prompt_of(self, problem: Problem) -> Any:
        """The text, or the messages, that a model is given."""
        template = {"boxed": BOXED, "own": "{problem}"}.get(self.prompt, self.prompt)
        if isinstance(problem.text, str):
            return template.replace("{problem}", problem.text)  # not str.format: \boxed{} has braces of its own
        *before, last = problem.text
        return [*before, {**last, "content": template.replace("{problem}", last["content"])}]

    def fingerprint(self) -> str:
        """A hash of the problems and of how they are put, so that samples of another set are not taken for these."""
        content = [
            self.prompt,
            self.chat,
            self.max_new_tokens,
            [[problem.text, problem.answer] for problem in self.problems],
            *([self.divergence] if self.divergence else []),
            *([self._of_environment()] if self.environment is not None else []),
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def _of_environment(self) -> list[Any]:
        name = self.environment if isinstance(self.environment, str) else _path_of(self.environment)
        limits = self.max_tool_calling_iterations, self.max_tool_result_tokens
        return [name, *limits, [dict(problem.row) for problem in self.problems]]


def _path_of(factory: Any) -> str:
    return f"{getattr(factory, '__module__', '')}.{getattr(factory, '__qualname__', type(factory).__name__)}"
