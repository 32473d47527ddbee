"""Rollouts that are written one step ahead (`rollout_ahead: 1`): a step takes the longer of two times, not their sum.

    engine    │ writes batch 1 with θ0 │ writes batch 2 with θ1 │ ...
    training  │ trains on batch 0      │ trains on batch 1      │ ...
              ▲ sends θ0               ▲ sends θ1

So a step trains on what the student wrote as it was one optimizer step before. Scores and loss are of the student as it
is now; the mean of log P_now / P_writer over the tokens is logged, and watched. The first rollouts of a run and of each
epoch are written when they are needed, since what follows is not known before.

A vLLM server writes beside the training. Any other engine works in turn with it: the same rollouts, and nothing saved,
which is how to try out what the staleness costs.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..documents import read_json
from ..files import write_text
from ..teachers.rollouts import batch_of
from ..types import Rollout
from .images import with_images
from .lengths import check_completions
from .rollouts import sync_engine

logger = get_logger(__name__)

Ids = list[list[int]]
IN_TURN = (
    "rollout_ahead = 1: the engine that writes the rollouts works in turn with the training here, so they are a step "
    "old and no time is saved. A vLLM server writes beside it: use_vllm, vllm_mode: server."
)


class RolloutsUnavailableError(OSError):
    """The engine that writes the rollouts gave none."""


@dataclass(frozen=True)
class Written:
    """Rollouts of one process.

    Attributes:
        prompt_ids, completion_ids: tokens of each.
        logprobs: log P of each completion's tokens by the student that wrote them, nats; None: not known.
    """

    prompt_ids: Ids
    completion_ids: Ids
    logprobs: list[list[float]] | None


class RolloutsAhead:
    """What the next step trains on, and what this one does.

    Args:
        trainer: a `TIPTrainer`; where `rollout_ahead` is 0, every method does nothing.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._is_on = trainer.args.rollout_ahead == 1
        self._fetched: tuple[Any, Any] | None = None  # an epoch's iterator, and what it gave for the next step
        self._rows: list[dict[str, Any]] | None = None  # of the next step
        self._request: Request | None = None
        self._written: Written | None = None
        self._failure: RolloutsUnavailableError | None = None
        self._taken: Written | None = None
        self._is_due = False
        self._sums = torch.zeros(2, dtype=torch.float64)

    @property
    def has_server(self) -> bool:
        """Whether the engine writes beside the training, and not in turn with it."""
        return self._trainer.use_vllm and self._trainer.vllm_generation.mode == "server"

    @property
    def is_compared(self) -> bool:
        """Whether log P of this step's tokens is known of the student that wrote them."""
        return self._taken is not None and self._taken.logprobs is not None

    # The rows of the next step are fetched one step early.

    def batches(self, fetch: Callable[..., Any], iterator: Iterator[Any], *rest: Any) -> Any:
        """What `Trainer.get_batch_samples` gives for a step, fetched when the step before it was.

        Args:
            fetch: that method.
            iterator: of the epoch.
            rest: its other arguments.
        """
        if not self._is_on:
            return fetch(iterator, *rest)
        of_epoch, batches = self._fetched or (None, None)
        batches = batches if of_epoch is iterator else fetch(iterator, *rest)
        following = fetch(iterator, *rest)
        self._fetched, self._rows = (iterator, following), (following[0][0] if following[0] else None)
        return batches

    # Begin: once this step's rollouts are there, and before it trains on them.

    def begin(self) -> None:
        """Let the engine write the next step's rollouts with the student as it is now; every process calls it."""
        trainer, rows, self._rows = self._trainer, self._rows, None
        if not self._is_on or rows is None or trainer.state.global_step + 1 >= trainer.state.max_steps:
            return
        rows = with_images(rows, trainer.text_alone)  # which looks at the rows of a stream
        prompt_ids, _, _ = trainer._tokenize_prompts(copy.deepcopy([row["prompt"] for row in rows]))
        if self.has_server:
            sync_engine(trainer, prompt_ids)
            self._request = Request(trainer, prompt_ids)
        else:
            logger.warning_once(IN_TURN)
            completion_ids = trainer.write(prompt_ids)
            self._written = Written(prompt_ids, completion_ids, self._logprobs(prompt_ids, completion_ids))

    @torch.no_grad()
    def _logprobs(self, prompt_ids: Ids, completion_ids: Ids) -> list[list[float]]:
        trainer = self._trainer
        rollouts = [
            Rollout(row, "", tuple(prompt), tuple(completion), True)
            for row, (prompt, completion) in enumerate(zip(prompt_ids, completion_ids, strict=True))
        ]
        batch, mask = batch_of(rollouts)
        device = trainer.accelerator.device
        batch, mask = {name: value.to(device) for name, value in batch.items()}, mask.to(device)
        table = trainer._score(batch, mask, trainer.scoring_pieces(batch), ("student_logprob",), None)
        return [row[: len(ids)] for row, ids in zip(table["student_logprob"].tolist(), completion_ids, strict=True)]

    # Take: what was written ahead, when its step comes.

    @contextmanager
    def due(self) -> Iterator[None]:
        """The next prompts that are written are those of a training step."""
        self._is_due = True
        try:
            yield
        finally:
            self._is_due = False

    def take(self, prompt_ids: Ids) -> Ids | None:
        """The completions of these prompts, where they were written ahead; every process calls it.

        Args:
            prompt_ids: of this process. They differ from what was asked for where a run is resumed with other data.

        Raises:
            RolloutsUnavailableError: the engine failed meanwhile, of any process.
        """
        if not self._is_on:
            return None
        self.settle()  # an engine that is about to get new weights must not be writing
        if not self._is_due:
            return None
        self._taken = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        written, self._written = self._written, None
        matches = written is not None and written.prompt_ids == prompt_ids
        accelerator = self._trainer.accelerator
        everywhere = bool(accelerator.gather(torch.tensor([matches], device=accelerator.device).long()).all())
        if not everywhere or written is None:
            if written is not None:
                logger.warning("The rollouts that were written ahead are of other prompts, and are written anew.")
            return None
        self._taken = written
        return written.completion_ids

    def settle(self) -> None:
        """Wait until the engine is done; every process calls it."""
        request, self._request = self._request, None
        if request is None:
            return
        try:
            self._written = request.answer()
        except RolloutsUnavailableError as failure:
            self._failure = failure

    # How far the student has moved since.

    def mark(self, batch: dict[str, Any]) -> None:
        """Put the writer's log P of each token into the batch that was taken, `writer_logprob` [B, T].

        Args:
            batch: of this process, before it is split.
        """
        if self._taken is None or self._taken.logprobs is None:
            return
        ids = batch["completion_ids"]
        rows = pad_sequence([torch.tensor(values) for values in self._taken.logprobs], batch_first=True)
        batch["writer_logprob"] = ids.new_zeros(ids.shape, dtype=torch.float32)
        batch["writer_logprob"][:, : rows.shape[1]] = rows.to(ids.device)

    def compare(self, now: Tensor | None, writer: Tensor) -> None:
        """Add tokens to the mean log-ratio of this step.

        Args:
            now: log P of the sampled tokens by the student as it is, [N] in nats.
            writer: the same by the one that wrote them.
        """
        assert now is not None, "the statistic is among the fields of a step whose rollouts were written ahead"
        ratio = (now.detach().double() - writer.double()).cpu()
        self._sums += torch.stack([ratio.sum(), torch.tensor(float(len(ratio)), dtype=torch.float64)])

    def figures(self) -> dict[str, float]:
        """The logged figure of the step that ends, over all processes; every process calls it."""
        if not self._is_on:
            return {}
        accelerator = self._trainer.accelerator
        total, tokens = accelerator.gather(self._sums[None].to(accelerator.device)).sum(0).tolist()
        self._sums, self._taken = torch.zeros(2, dtype=torch.float64), None
        return {"rollout/log_ratio": total / tokens} if tokens else {}

    # Saved with the optimizer: what a resumed run trains on next was written by weights that are gone by then.

    def _file(self, directory: Path) -> Path:
        return directory / f"rollout-ahead-{self._trainer.accelerator.process_index}.json"

    def save(self, directory: Path) -> None:
        """Write the rollouts of the next step into a checkpoint, once they are there; every process calls it."""
        self.settle()
        # in the middle of a step, which a resumed run begins again, those of that step
        written = self._taken or self._written
        if written is not None:
            directory.mkdir(parents=True, exist_ok=True)
            write_text(self._file(directory), json.dumps(asdict(written)))

    def load(self, directory: Path) -> None:
        """Take them up again, where a checkpoint has them.

        Raises:
            ValueError: the file is none of ours.
        """
        path = self._file(directory)
        if self._is_on and path.exists():
            self._written = _read(path)


class Request:
    """A batch that a vLLM server writes meanwhile: asked for by the main process, for all.

    TRL gathers the prompts, asks the server, and gives each process its share, in one call. Here its call is made
    twice: once with a client that remembers what it is asked, and once, when the server has answered, with one that
    gives the answer.

    Args:
        trainer: a `TIPTrainer` whose vLLM is a server that holds the student's weights.
        prompt_ids: of this process.
    """

    def __init__(self, trainer: Any, prompt_ids: Ids) -> None:
        self._generation, self._accelerator = trainer.vllm_generation, trainer.accelerator
        self._prompt_ids = prompt_ids
        self._is_compared = trainer.temperature == 1  # at which the server gives log P
        asked: dict[str, Any] = {}

        def remember(**arguments: Any) -> dict[str, Any]:
            asked.update(arguments)
            nothing: Ids = [[] for _ in arguments["prompts"]]
            return {"prompt_ids": nothing, "completion_ids": nothing, "logprobs": None}

        self._generate(remember)
        self._answer: Future[Any] = Future()
        if self._accelerator.is_main_process:
            # a daemon: a server that never answers must not keep a process that ends
            Thread(target=self._ask, args=(self._generation.vllm_client, asked), daemon=True).start()
        else:
            self._answer.set_result(None)

    def _ask(self, client: Any, asked: dict[str, Any]) -> None:
        try:
            self._answer.set_result(client.generate(**asked))
        except BaseException as error:  # whatever it is, the step that needs the answer raises it
            self._answer.set_exception(error)

    def _generate(self, generate: Callable[..., Any]) -> tuple[Any, ...]:
        generation, name = self._generation, "vllm_client"
        client = getattr(generation, name, None)  # the main process has one
        try:
            setattr(generation, name, _Client(generate))
            return generation.generate(prompts=self._prompt_ids, images=None, num_generations=1)
        finally:
            if client is None:
                delattr(generation, name)
            else:
                setattr(generation, name, client)

    def answer(self) -> Written:
        """Wait for the completions; every process calls it.

        Raises:
            RolloutsUnavailableError: the server failed, on every process.
            ValueError: a completion has no token.
        """
        failure = self._answer.exception()
        accelerator = self._accelerator
        failed = accelerator.gather(torch.tensor([failure is not None], device=accelerator.device).long())
        if bool(failed.any()):
            said = "the main process has its error" if failure is None else f"{type(failure).__name__}: {failure}"
            raise RolloutsUnavailableError(
                f"the vLLM server that writes the rollouts gave none ({said}); start it again, then go on"
            ) from failure
        _, completion_ids, logprobs, _ = self._generate(lambda **_: self._answer.result())
        check_completions(self._prompt_ids, completion_ids)
        # of each token the sampled one comes first; a server may be set to give none
        own = [[token[0] for token in row] for row in logprobs or [[[None]]]]
        known = torch.tensor([all(None not in row for row in own)], device=accelerator.device).long()
        is_compared = self._is_compared and bool(accelerator.gather(known).all())
        return Written(self._prompt_ids, completion_ids, own if is_compared else None)


@dataclass(frozen=True)
class _Client:
    """In the place of TRL's client for the length of a call."""

    generate: Callable[..., Any]


def _read(path: Path) -> Written:
    """Rollouts as `RolloutsAhead.save` wrote them."""
    stored = read_json(path)

    def are_rows(rows: Any, kind: type) -> bool:
        return isinstance(rows, list) and all(
            isinstance(row, list) and all(type(value) is kind for value in row) for row in rows
        )

    def lengths(rows: Sequence[Sequence[Any]]) -> list[int]:
        return [len(row) for row in rows]

    if isinstance(stored, dict) and stored.keys() == Written.__dataclass_fields__.keys():
        prompts, completions, logprobs = (stored[name] for name in Written.__dataclass_fields__)
        if are_rows(prompts, int) and are_rows(completions, int) and len(prompts) == len(completions):
            known = are_rows(logprobs, float) and lengths(logprobs) == lengths(completions)
            if all(completions) and (logprobs is None or known):
                return Written(prompts, completions, logprobs)
    raise ValueError(
        f"{path} holds no rollouts that a checkpoint saved: delete it to write them anew, or resume from another."
    )
