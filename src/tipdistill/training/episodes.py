"""Rollouts of a run in which the student calls tools: begun, played with the engine that writes, and counted."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import ProcessorMixin

from ..environments import Episode, Limits, Worlds, play
from ..environments.play import Dialect, Written, check_conversational, read_dialect
from ..environments.world import check_tools, observed
from ..types import ENDINGS, OUTCOMES


class RunTools:
    """What the student of a run acts on.

    Args:
        args: the `TIPConfig`.
        dialect: how the student calls tools.
        tools: functions that all rollouts share.
        factory: makes the environment of a rollout; None: there is none.
    """

    def __init__(
        self, args: Any, dialect: Dialect, tools: Sequence[Callable[..., Any]], factory: Callable[[], Any] | None
    ) -> None:
        self.dialect = dialect
        self.limits = Limits(
            args.max_completion_length,
            args.max_tool_calling_iterations,
            args.max_tool_result_tokens,
            args.tool_timeout,
        )
        self.prompt_columns = ("prompt", args.teacher_prompt_column)
        self.worlds = Worlds(tools, factory, args.tool_timeout)
        self.schemas = self.worlds.schemas()
        self.episodes: list[Episode] = []
        """Of the last batch, in the order of its rows."""
        self._begun: list[Any] = []

    def telling(self, args: Any) -> Any:
        """The configuration with the tools among what the chat template is passed: prompts are longer by them.

        Args:
            args: the `TIPConfig`, which stays as it is.
        """
        told = copy.copy(args)
        told.chat_template_kwargs = {**(args.chat_template_kwargs or {}), "tools": self.schemas}
        return told

    def begin(self, inputs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Begin a rollout for each row; its prompts end with what the environment says.

        Args:
            inputs: rows of the dataset.
        """
        check_conversational([row["prompt"] for row in inputs])
        self._begun, said = self.worlds.begin(inputs)
        return [
            {
                name: observed(value, text) if name in self.prompt_columns and value is not None else value
                for name, value in row.items()
            }
            for row, text in zip(inputs, said, strict=True)
        ]

    def play(self, trainer: Any, prompt_ids: Sequence[Sequence[int]], first: Sequence[Sequence[int]]) -> list[Episode]:
        """Play on from the first turns; counts what was done.

        Args:
            trainer: a `TIPTrainer`, which writes the turns.
            prompt_ids: of the batch that was begun.
            first: tokens of the first turn of each rollout.
        """
        turns = [finished(trainer, ids) for ids in first]
        self.episodes = play(
            lambda contexts, most: write_turns(trainer, contexts, most),
            self.dialect,
            prompt_ids,
            self._begun,
            self.limits,
            self.schemas,
            turns,
            lambda rows: in_step(trainer, rows),
        )
        logged = trainer._metrics["train" if trainer.model.training else "eval"]
        for name, value in counted(gather_object(list(map(described, self.episodes)))).items():
            logged[name].append(value)
        return self.episodes


def read_tools(
    args: Any,
    processing_class: Any,
    tools: Sequence[Callable[..., Any]] | None,
    factory: Callable[[], Any] | None,
    *datasets: Any,
) -> RunTools | None:
    """The tools of a run, checked before weights are loaded; None where there are none, or where TRL plays (images).

    Args:
        args: the `TIPConfig`.
        processing_class: the student's.
        tools: functions that all rollouts share.
        factory: makes the environment of a rollout.
        datasets: whose prompts must be conversations.

    Raises:
        ValueError: what does not fit, and what to change.
    """
    if not tools and factory is None:
        return None
    if args.rollout_ahead:
        raise ValueError(
            "rollout_ahead = 1 writes rollouts of one turn, and tools answer between turns: leave out one of the two."
        )
    if isinstance(processing_class, ProcessorMixin):
        if factory is None:
            return None
        raise ValueError(
            "the student sees images, and environments are played with text alone: give TRL's `tools`, or a student "
            "that reads text."
        )
    if factory is not None and args.remove_unused_columns:
        raise ValueError(
            "remove_unused_columns = true leaves of a row what both models read, and an environment is begun with all "
            "of its columns: leave it out."
        )
    check_tools(tools or (), "tools")
    for dataset in datasets:
        for rows in dataset.values() if isinstance(dataset, dict) else [dataset]:
            if isinstance(rows, Dataset) and len(rows):
                check_conversational(rows[:1]["prompt"])
    return RunTools(args, read_dialect(processing_class, args.chat_template_kwargs), tools or (), factory)


# Turns, by the engine of the run; several processes write together.


def finished(trainer: Any, ids: Sequence[int]) -> Written:
    """A turn, and whether it ended by itself."""
    return ids, bool(ids) and ids[-1] in trainer.eos_token_ids


def write_turns(trainer: Any, contexts: list[list[int]], most: list[int]) -> list[Written]:
    """One turn for each context.

    Args:
        trainer: a `TIPTrainer`.
        contexts: tokens before the turn.
        most: tokens that each may take; the engine knows one number, the largest of all processes.
    """
    longest = torch.tensor([max(most)], device=trainer.accelerator.device)
    with no_longer_than(trainer, int(trainer.accelerator.gather(longest).max())):
        return [finished(trainer, ids) for ids in trainer._generate_single_turn(contexts, None, {})]


def in_step(trainer: Any, rows: int) -> int:
    """Rows that this process writes at a turn, so that all write as often, and none waits for another for ever.

    A sharded student is gathered by all processes together. A vLLM server, or one split over GPUs, takes the prompts of
    all its processes and gives back as many to each.

    Args:
        trainer: a `TIPTrainer`.
        rows: that are still being written here.
    """
    accelerator = trainer.accelerator
    if accelerator.num_processes == 1:
        return rows
    most = int(accelerator.gather(torch.tensor([rows], device=accelerator.device)).max())
    return most if trainer.use_vllm or not most else max(rows, 1)


@contextmanager
def no_longer_than(trainer: Any, tokens: int | None) -> Iterator[None]:
    """Completions of at most so many tokens meanwhile; None, or more than the run's own: as in the run."""
    place, name = trainer.generation_config, "max_new_tokens"
    if trainer.use_vllm:
        place, name = trainer.vllm_generation, "max_completion_length"
    own = getattr(place, name)
    try:
        setattr(place, name, min(own, tokens or own))
        yield
    finally:
        setattr(place, name, own)


# What was done: as TRL takes it, and in figures.


def as_played(episodes: Sequence[Episode]) -> tuple[list[list[int]], list[Any], int, int]:
    """Of each rollout which tokens are the student's (1) and its tokens; how many calls there were, how many failed.

    Args:
        episodes: of this process.
    """
    results = [result for episode in episodes for result in episode.results]
    unanswered = sum(episode.unanswered for episode in episodes)
    failures = sum(result.outcome != "ok" for result in results) + unanswered
    masks = [[int(by_student) for by_student in episode.written] for episode in episodes]
    return masks, [episode.completion_ids for episode in episodes], len(results) + unanswered, failures


def described(episode: Episode) -> dict[str, Any]:
    """What is counted of an episode."""
    verdict = episode.verdict
    return {
        "turns": sum(turn.role == "student" for turn in episode.turns),
        "result_tokens": len(episode.written) - sum(episode.written),
        "ending": episode.ending,
        "outcomes": Counter(result.outcome for result in episode.results) + Counter(unanswered=episode.unanswered),
        "figures": {} if verdict is None else {"correct": float(verdict.correct), **verdict.figures},
    }


def counted(episodes: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over episodes, by the names that are logged; docs/metrics.md says what each is.

    Args:
        episodes: of all processes, see `described`.

    Example:
        >>> counted([{"turns": 3, "result_tokens": 8, "ending": "cut", "outcomes": {"raised": 1}, "figures": {}}])[
        ...     "episodes/turns"
        ... ]
        3.0
    """
    count = max(1, len(episodes))
    figures = {
        "episodes/turns": sum(episode["turns"] for episode in episodes) / count,
        "episodes/result_tokens": sum(episode["result_tokens"] for episode in episodes) / count,
    }
    for ending in ENDINGS:
        share = sum(episode["ending"] == ending for episode in episodes) / count
        figures[f"episodes/{ending.replace(' ', '_')}"] = share
    for outcome in (*OUTCOMES[1:], "unanswered"):
        mean = sum(episode["outcomes"].get(outcome, 0) for episode in episodes) / count
        figures[f"tools/{outcome.replace(' ', '_')}"] = mean
    for name in dict.fromkeys(name for episode in episodes for name in episode["figures"]):
        values = [episode["figures"][name] for episode in episodes if name in episode["figures"]]
        figures[f"episodes/{name}"] = sum(values) / len(values)
    return figures
