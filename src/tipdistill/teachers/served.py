"""A teacher on a server: log-probabilities of what the student wrote, over an OpenAI-compatible API as vLLM speaks it.

    POST <teacher_url>/completions {"prompt": [token ids], "prompt_logprobs": k, "max_tokens": 1, "temperature": 1.0}

The answer holds, for every token of the prompt, the k likeliest tokens and the token itself (`prompt_logprobs`, an
extension of vLLM's). A server started with --max-logprobs -1 gives the whole vocabulary, and everything is exact; else
its k likeliest tokens, and divergences are lower bounds (docs/vllm.md).
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import replies
from ..score.top import top_of_served
from ..score.top_k_teacher import DEFAULT_FIELDS, served_divergence_loss, served_scores, unavailable
from ..select import rule_fields
from ..types import Head, TeacherLogprobs, TokenScores, TopTokens
from . import TeacherCallback, TeacherUnavailableError
from .client import Question, TeacherClient, TeacherRefusedError, ask_together, connected, key_of, traffic_metrics

__all__ = ["Question", "ServedTeacher", "TeacherServer", "TeacherUnavailableError", "open_teacher"]

logger = logging.getLogger(__name__)

DEFAULT_TOP_K = 20  # what a vLLM server allows that was not told otherwise
# P sums to 1; a server that rounds to a few decimals, or runs in half precision, is this far off at most
SUM_TOLERANCE = 0.02
_LARGE_ANSWER = 2**20  # bytes for one token
# what an answer may take: itself, and each log-probability in it (some 60 bytes, more where the token's text is long)
_ANSWER, _BYTES_OF_ENTRY = 2**20, 512


class TeacherServer(TeacherClient):
    """Asks a server for the teacher's log-probabilities; retries until it answers or the time limit is over.

    Args:
        url: up to and with the version, such as http://localhost:8000/v1.
        model: the name that the server knows; None: the only one it serves.
        top_k: how many of the likeliest tokens; 0: the whole vocabulary; None: that where it is allowed, else 20.
        api_key: sent as a bearer token where there is one.
        timeout: of one request, in seconds.
        time_limit: how long the server may be out before `TeacherUnavailableError`, in seconds.
        concurrency: requests in flight.
        pause: as `TeacherClient` has it.

    Raises:
        ValueError: the URL is none, or a number out of range.

    Example:
        >>> TeacherServer("localhost:8000")
        Traceback (most recent call last):
            ...
        ValueError: teacher_url must begin with http:// or https://, such as http://localhost:8000/v1.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        top_k: int | None = None,
        api_key: str | None = None,
        timeout: float = 600.0,
        time_limit: float = 1800.0,
        concurrency: int = 16,
        pause: float = 1.0,
    ) -> None:
        super().__init__(url, model, api_key, timeout, time_limit, concurrency, pause)
        self.top_k = top_k

    @property
    def gives_all(self) -> bool:
        """Whether answers hold the whole vocabulary (known after `connect`)."""
        return self.top_k == 0

    @property
    def gives(self) -> str:
        """What its answers hold, in words (known after `connect`)."""
        return "its whole vocabulary" if self.gives_all else f"its {self.top_k} likeliest tokens"

    def teacher(self, accelerator: Any) -> ServedTeacher:
        return ServedTeacher(self, accelerator)

    def _find_out(self, tokenizer: Any) -> None:
        tokens = tokenizer("1 + 1 =", add_special_tokens=False)["input_ids"]
        tokens = (tokens * 2)[:8]
        question = Question(tokens[:1], tokens[1:], range(len(tokens) - 1))
        asked = self.top_k
        if asked in (None, 0):
            self.top_k = 0
            try:
                before = self.traffic.received
                self.vocabulary = self._ask(question).logprob.shape[1]
                per_token = (self.traffic.received - before) // len(tokens)
                logger.warning(
                    f"The teacher at {self.url} gives its whole vocabulary of {self.vocabulary:,} tokens: scores and "
                    f"loss are exact. An answer takes {per_token:,} bytes per token"
                    + (", which is much: teacher_top_k = 20 takes a fraction." if per_token > _LARGE_ANSWER else ".")
                )
                return
            except TeacherRefusedError as error:
                if asked == 0:
                    raise ValueError(
                        f"teacher_top_k = 0 asks for the whole vocabulary, which the server does not give ({error}): "
                        "start it with --max-logprobs -1, or set teacher_top_k to what it allows."
                    ) from error
        self.top_k = asked or DEFAULT_TOP_K
        self._ask(question)  # refused now, and not in the first step
        logger.warning(
            f"The teacher at {self.url} gives its {self.top_k} likeliest tokens: reverse KL, forward KL, "
            "Jensen-Shannon divergence, Hellinger distance and teacher entropy are lower bounds (all other tokens "
            "count as one), in scores and loss alike; the student's entropy is exact. docs/vllm.md says what each rule "
            "makes of it."
        )

    def _answer(self, question: Question, tokens: list[int], row: int, gone: threading.Event) -> TeacherLogprobs:
        assert self.top_k is not None, "connect comes first"
        k = self.top_k or -1
        body = {
            "model": self.model,
            "prompt": tokens,
            "max_tokens": 1,
            "temperature": 1.0,
            "prompt_logprobs": k,
            "add_special_tokens": False,
        }
        wanted = [len(question.prompt_ids) + position for position in question.positions]
        entries = self._read(
            f"{self.url}/completions",
            body,
            lambda reply: replies.prompt_logprobs(reply, len(tokens), wanted, self.largest_id),
            gone,
            largest=_ANSWER + len(tokens) * _BYTES_OF_ENTRY * (self.largest_id if k < 0 else k + 2),
        )
        sampled = [question.completion_ids[position] for position in question.positions]
        where = [f"{self.url}, rollout {row}, token {position}" for position in question.positions]
        if k < 0:
            return _whole(entries, sampled, where, self.vocabulary)
        return _likeliest(entries, sampled, k, where, min(k, self.tokens))


@dataclass(frozen=True)
class LogprobComparison:
    """A teacher's log-probabilities of N tokens: exact of a whole vocabulary, bounds of its likeliest tokens."""

    logprobs: TeacherLogprobs

    def take(self, kept: Tensor) -> LogprobComparison:
        return LogprobComparison(self.logprobs.map(lambda value: value[kept]))

    def scores(self, student: Head, fields: Sequence[str], temperature: float, token_ids: Tensor | None) -> TokenScores:
        return served_scores(
            student, self.logprobs, fields or DEFAULT_FIELDS, temperature=temperature, token_ids=token_ids
        )

    def likeliest(self, student: Head, k: int, temperature: float) -> tuple[TopTokens, TopTokens]:
        return top_of_served(student, self.logprobs, k, temperature)

    def loss(
        self,
        student: Head,
        weight: Tensor | None,
        *,
        divergence: str,
        beta: float,
        temperature: float,
        denominator: Tensor | float | None,
        fields: Sequence[str] = (),
    ) -> tuple[Tensor, TokenScores]:
        if weight is None:
            weight = torch.ones(len(self.logprobs), device=student.hidden.device)
        return served_divergence_loss(
            student,
            self.logprobs,
            weight,
            divergence,
            beta=beta,
            temperature=temperature,
            denominator=weight.sum().clamp(min=1) if denominator is None else denominator,
            fields=fields,
        )


class ServedTeacher:
    """A teacher behind a server; see `tipdistill.teachers.Teacher` for its members.

    Args:
        server: connected.
        accelerator: of the run, whose processes ask together.
    """

    answers_in_loss = False
    model = None
    callbacks: Sequence[TeacherCallback] = ()
    names: Sequence[str] = ()

    def __init__(self, server: TeacherServer, accelerator: Any) -> None:
        self.server, self.accelerator = server, accelerator
        self.name, self.top_k = str(server.model), server.top_k or None
        # a server that gives its likeliest tokens does not tell how many rows of padding its teacher has
        self.vocabulary = server.vocabulary

    def answer(
        self, batch: dict[str, Any], asked: Tensor, pieces: Sequence[Tensor] | None = None
    ) -> list[TeacherLogprobs | None]:
        return ask_together(self.server, self.accelerator, batch, asked)

    @contextmanager
    def compare(self, answers: Sequence[TeacherLogprobs | None]) -> Iterator[LogprobComparison]:
        yield LogprobComparison(_joined(answers).map(lambda value: value.to(self.accelerator.device)))

    def metrics(self) -> dict[str, float]:
        return traffic_metrics(self.server, self.accelerator)


def _joined(answers: Sequence[TeacherLogprobs | None]) -> TeacherLogprobs:
    """Of several rollouts, one after the other."""
    some = [answer for answer in answers if answer is not None]
    if not some:
        return TeacherLogprobs(torch.zeros(0, 1), torch.zeros(0, 1, dtype=torch.int64), torch.zeros(0))
    ids = None if some[0].token_ids is None else torch.cat([answer.token_ids for answer in some])  # type: ignore[misc]
    return TeacherLogprobs(
        torch.cat([answer.logprob for answer in some]), ids, torch.cat([answer.sampled for answer in some])
    )


def check_ends(config: Any, tokenizer: Any) -> None:
    """Refuse `end_as_teacher` with a teacher whose end tokens no server tells, unless its tokenizer is given.

    Args:
        config: a `TIPConfig`.
        tokenizer: the teacher's, None where there is none.

    Raises:
        ValueError: what to do instead.
    """
    if config.end_as_teacher and tokenizer is None:
        raise ValueError(
            "end_as_teacher needs the teacher's end tokens, which its server does not tell: give its tokenizer to "
            "TIPTrainer (teacher_processing_class), or leave end_as_teacher out."
        )


def open_teacher(config: Any, tokenizer: Any, time_limit: float | None = None) -> TeacherServer:
    """The server that a `TIPConfig` names, once it answers and its tokenizer is the student's.

    Args:
        config: with `teacher_url` and the other teacher_ fields.
        tokenizer: the student's.
        time_limit: seconds to wait for it; None: the configuration's.

    Raises:
        TeacherUnavailableError, ValueError: as `TeacherServer.connect`; or a rule or a temperature that needs more than
            the server gives.
    """
    server = TeacherServer(
        config.teacher_url,
        config.teacher_served_name,
        config.teacher_top_k,
        key_of(config),
        config.teacher_timeout,
        config.teacher_time_limit,
        config.teacher_concurrency,
    )
    connected(server, config, tokenizer, time_limit)
    if server.gives_all:
        return server
    assert server.top_k is not None
    if config.temperature != 1:
        raise ValueError(
            f"temperature = {config.temperature:g} needs the teacher's whole vocabulary, and {server.url} gives its "
            f"{server.top_k} likeliest tokens: start it with --max-logprobs -1, or set temperature = 1."
        )
    missing = unavailable(rule_fields(config.selection_rule) or (), server.top_k)
    if missing:
        raise ValueError(
            f"selection_rule = {config.selection_rule} reads {', '.join(missing)}, which cannot be had, nor bounded, "
            f"from the teacher's {server.top_k} likeliest tokens: start the server with --max-logprobs -1, ask for "
            "more of them (teacher_top_k), or choose another rule (docs/vllm.md lists them)."
        )
    return server


def _whole(
    entries: Sequence[dict[int, float]], sampled: Sequence[int], where: Sequence[str], vocabulary: int | None
) -> TeacherLogprobs:
    size = vocabulary or max(entries[0]) + 1
    table = np.full((len(entries), size), np.nan, dtype=np.float64)
    for row, entry in enumerate(entries):
        ids = np.fromiter(entry, np.int64, len(entry))
        if len(ids) != size or ids.max() >= size or sampled[row] >= size:
            raise ValueError(f"{where[row]}: the teacher gave {len(ids)} log-probabilities of {size} tokens.")
        table[row, ids] = list(entry.values())
    with np.errstate(over="ignore"):
        totals = np.exp(table).sum(1)
    bad = np.flatnonzero(~(np.abs(totals - 1) <= SUM_TOLERANCE))
    if len(bad):
        raise _no_distribution(where[bad[0]], totals[bad[0]])
    for row, token in enumerate(sampled):
        if table[row, token] == -math.inf:
            raise _impossible(where[row], token)
    logprob = torch.from_numpy(table).float()
    return TeacherLogprobs(logprob, None, logprob.gather(1, torch.tensor(sampled)[:, None])[:, 0])


def _likeliest(
    entries: Sequence[dict[int, float]], sampled: Sequence[int], k: int, where: Sequence[str], least: int
) -> TeacherLogprobs:
    """k columns of the likeliest tokens, and one of the sampled token where it is not among them."""
    ids = np.full((len(entries), k + 1), -1, dtype=np.int64)
    logprob = np.full((len(entries), k + 1), -np.inf)
    of_sampled = np.empty(len(entries))
    for row, values in enumerate(entries):
        if sampled[row] not in values:
            raise ValueError(f"{where[row]}: the teacher gave no log-probability of the token itself.")
        if not least <= len(values) <= k + 1:
            raise ValueError(f"{where[row]}: the teacher gave {len(values)} log-probabilities, and {k} were asked for.")
        of_sampled[row] = values[sampled[row]]
        ranked = sorted(values, key=lambda token: (-values[token], token != sampled[row]))
        top = ranked[:k]
        ids[row, : len(top)], logprob[row, : len(top)] = top, [values[token] for token in top]
        if sampled[row] not in top:
            ids[row, k], logprob[row, k] = sampled[row], values[sampled[row]]
        with np.errstate(over="ignore"):
            total = np.exp(logprob[row]).sum()
        if not (0 < total <= 1 + SUM_TOLERANCE and logprob[row].max() <= SUM_TOLERANCE):
            raise _no_distribution(where[row], total)
        for token, value in values.items():
            if value == -math.inf:
                raise _impossible(where[row], token)
    return TeacherLogprobs(
        torch.from_numpy(logprob).float(), torch.from_numpy(ids), torch.from_numpy(of_sampled).float()
    )


def _impossible(where: str, token: int) -> ValueError:
    return ValueError(
        f"{where}: the teacher gives token {token} probability 0 (a log-probability of -Infinity), which makes the "
        "divergence infinite. A server that keeps to some tokens does so (top_k, top_p, a grammar): start it with "
        "--logprobs-mode raw_logprobs."
    )


def _no_distribution(where: str, total: float) -> ValueError:
    return ValueError(
        f"{where}: the teacher's answers are no log-probabilities (their exponentials sum to {total:.4g}). NaN means "
        "broken weights or an overflow in half precision; anything else a server that gives logits: start it with "
        "--logprobs-mode raw_logprobs."
    )
