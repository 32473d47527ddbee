"""Prompts with tools: what begins each episode, and the whole of a batch from prompts to episodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..chat import encode_prompts
from .play import Dialect, Episode, InStep, Limits, Writer, check_conversational, play
from .world import Worlds, observed


@dataclass(frozen=True)
class Acting:
    """Tools for rollouts, and what begins each.

    Args:
        worlds: tools, or an environment.
        rows: of the dataset, one for each prompt, which an environment begins from.
        rounds, result_tokens, seconds: see `Limits`.
    """

    worlds: Worlds
    rows: Sequence[Mapping[str, Any]]
    rounds: int = Limits.rounds
    result_tokens: int = Limits.result_tokens
    seconds: float = Limits.seconds

    def limits(self, tokens: int) -> Limits:
        """How far an episode of so many tokens may go.

        Args:
            tokens: of its completion, at most.
        """
        return Limits(tokens, self.rounds, self.result_tokens, self.seconds)


def play_prompts(
    write: Writer,
    dialect: Dialect,
    prompts: Sequence[Any],
    numbers: Sequence[int],
    acting: Acting,
    tokens: int,
    in_step: InStep | None = None,
) -> tuple[list[list[int]], list[Episode]]:
    """Begin an episode for each prompt, and play all of them.

    Args:
        write: the engine, see `play`.
        dialect: how the model calls tools.
        prompts: conversations.
        numbers: of each, its row in `acting.rows`.
        acting: the tools.
        tokens: of a completion, at most.
        in_step: see `play`.

    Returns:
        Token ids of each prompt as it was fed, with what the environment said at its end, and the episodes.
    """
    check_conversational(prompts)
    worlds, said = acting.worlds.begin([acting.rows[number] for number in numbers])
    seen = [observed(prompt, text) for prompt, text in zip(prompts, said, strict=True)]
    tools = acting.worlds.schemas()
    ids = encode_prompts(
        seen, dialect.tokenizer, dialect.settings, tools=tools, chat_template=dialect.chat_template, numbers=numbers
    )
    return ids, play(write, dialect, ids, worlds, acting.limits(tokens), tools, in_step=in_step)
