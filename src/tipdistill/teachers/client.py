"""What asks a server for a teacher's word, whatever that word is: retries, time limits, traffic, ranks that agree.

`TeacherClient` asks; `served.py` makes it one of log-probabilities, `hidden.py` one of hidden states. A teacher of a
run asks through `ask_together`, so that no process stops alone.
"""

from __future__ import annotations

import logging
import math
import random
import re
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import http, replies
from ..text import printable
from ..vocabulary import Names, check_served_tokenizer
from . import TeacherUnavailableError

logger = logging.getLogger(__name__)

LONGEST_PAUSE = 60.0  # seconds
# a teacher's lm_head may have more rows than the tokenizer has tokens; no id is beyond twice as many and these
_PADDING, _MOST_IDS = 4096, 2**31
_MOST_NAMES, _LONGEST_NAME = 5, 60  # that an error shows
# what a step logs → where `Traffic` has it
TRAFFIC = {
    "teacher/bytes_sent": "sent",
    "teacher/bytes_received": "received",
    "teacher/bytes_saved": "saved",
    "teacher/tokens_asked": "asked",
}


class TeacherRefusedError(ValueError):
    """The teacher's server answered, and asking again would not change the answer."""


@dataclass(frozen=True)
class Question:
    """One rollout, and the completion tokens that are asked about.

    Attributes:
        prompt_ids, completion_ids: tokens.
        positions: places in the completion, ascending.
    """

    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]
    positions: Sequence[int]


@dataclass
class Traffic:
    """What went over the wire since it was last reset, in bytes and tokens.

    Attributes:
        sent, received: bytes of the bodies, as transferred.
        answered: tokens that the answers speak of, prompts included: there is no asking for some.
        asked: tokens that were asked about.
        left_out: tokens of which nothing was asked and so nothing came.
    """

    sent: int = 0
    received: int = 0
    answered: int = 0
    asked: int = 0
    left_out: int = 0

    @property
    def saved(self) -> int:
        """Bytes that did not come, at the mean size of what did."""
        return round(self.left_out * self.received / self.answered) if self.answered else 0


class TeacherClient(ABC):
    """Asks a server about rollouts; retries until it answers or the time limit is over.

    A class of it says what it asks (`_answer`), what it finds out at the start (`_find_out`), and what a run makes of
    it (`teacher`).

    Args:
        url: up to and with the version, such as http://localhost:8000/v1.
        model: the name that the server knows; None: the only one it serves.
        api_key: sent as a bearer token where there is one.
        timeout: of one request, in seconds.
        time_limit: how long the server may be out before `TeacherUnavailableError`, in seconds.
        concurrency: requests in flight.
        pause: before the second attempt, in seconds; twice as long before each later one, a minute at most, jittered.

    Raises:
        ValueError: the URL is none, or a number out of range.
    """

    vocabulary: int | None = None

    def __init__(
        self,
        url: str,
        model: str | None = None,
        api_key: str | None = None,
        timeout: float = 600.0,
        time_limit: float = 1800.0,
        concurrency: int = 16,
        pause: float = 1.0,
    ) -> None:
        self.url, self.model = http.server_url("teacher_url", url), model
        self.timeout, self.time_limit, self.concurrency, self.pause = timeout, time_limit, concurrency, pause
        self.differing: dict[int, Names] = {}  # reserved tokens that it reads as others
        self.tokens, self.largest_id = 0, _MOST_IDS
        self.traffic = Traffic()
        self._api_key = api_key
        self._jitter = random.Random()  # its own: the run's random numbers stay where they are
        self._lock = threading.Lock()
        self._answered_at = -math.inf
        self._out = False

    @property
    @abstractmethod
    def gives(self) -> str:
        """What its answers hold, in words (known after `connect`)."""

    @property
    def root(self) -> str:
        """The address without its version, where vLLM has what OpenAI has not."""
        return re.sub(r"/v\d+$", "", self.url)

    def connect(self, tokenizer: Any) -> None:
        """Find out what the server serves, and refuse what cannot be right.

        Args:
            tokenizer: the student's.

        Raises:
            TeacherUnavailableError: nobody answers within the time limit.
            ValueError: the server does not serve the model, its tokenizer is another, or it gives no such answers.
        """
        served = self._read(f"{self.url}/models", None, replies.model_names)
        more = [f"{len(served) - _MOST_NAMES} more"] * (len(served) > _MOST_NAMES)
        names = printable(", ".join([*(name[:_LONGEST_NAME] for name in served[:_MOST_NAMES]), *more]))
        if self.model is None and len(served) != 1:
            raise ValueError(f"{self.url} serves {names}: say which with teacher_served_name.")
        if self.model is not None and self.model not in served:
            raise ValueError(f"{self.url} does not serve {self.model!r}; it serves {names}.")
        self.model = self.model or served[0]
        self.tokens = len(getattr(tokenizer, "tokenizer", tokenizer))
        self.largest_id = 2 * self.tokens + _PADDING
        self._check_tokenizer(tokenizer)
        self._find_out(tokenizer)

    def _check_tokenizer(self, tokenizer: Any) -> None:
        def tokenize(text: str) -> list[int]:
            body = {"model": self.model, "prompt": text, "add_special_tokens": False}
            return self._read(f"{self.root}/tokenize", body, lambda reply: replies.token_ids(reply, self.largest_id))

        try:
            self.differing = check_served_tokenizer(tokenizer, tokenize)
        except TeacherRefusedError as error:
            raise ValueError(
                f"the teacher's tokenizer cannot be compared with the student's, since {self.url} has no /tokenize as "
                f"vLLM has ({error}). Distillation compares next-token distributions token by token: serve the teacher "
                "with vLLM."
            ) from error

    @abstractmethod
    def teacher(self, accelerator: Any) -> Any:
        """The `tipdistill.teachers.Teacher` of a run that asks this server."""

    @abstractmethod
    def _find_out(self, tokenizer: Any) -> None:
        """Ask once, so that what the server will not give is refused now, and not in the first step."""

    def _tokens(self, question: Question) -> list[int]:
        """What is sent of a rollout: nothing after the last token that is asked about."""
        return [*question.prompt_ids, *question.completion_ids[: question.positions[-1] + 1]]

    @abstractmethod
    def _answer(self, question: Question, tokens: list[int], row: int, gone: threading.Event) -> Any:
        """The Answer to a question with positions, of which `tokens` are sent; errors call its rollout `row`."""

    def ask(self, questions: Sequence[Question]) -> list[Any]:
        """What the teacher says of the tokens asked about.

        Args:
            questions: one per rollout; one without positions is not sent.

        Returns:
            An Answer of the positions of each rollout, on the CPU; None where nothing was asked.

        Raises:
            TeacherUnavailableError: the server was out for longer than the time limit.
            ValueError: it refused, or what it answers cannot be; which rollout and token.
        """
        gone = threading.Event()
        with ThreadPoolExecutor(self.concurrency) as pool:
            futures = [pool.submit(self._ask, question, gone, row) for row, question in enumerate(questions)]
            try:
                return [future.result() for future in futures]
            except BaseException:
                gone.set()  # those that wait for their next attempt give up at once
                pool.shutdown(cancel_futures=True)
                raise

    def _ask(self, question: Question, gone: threading.Event | None = None, row: int = 0) -> Any:
        everything = len(question.prompt_ids) + len(question.completion_ids)
        if not len(question.positions):
            with self._lock:
                self.traffic.left_out += everything
            return None
        tokens = self._tokens(question)
        answer = self._answer(question, tokens, row, gone or threading.Event())
        with self._lock:
            self.traffic.answered += len(tokens)
            self.traffic.asked += len(question.positions)
            self.traffic.left_out += everything - len(tokens)
        return answer

    def _read(
        self,
        url: str,
        body: dict[str, Any] | None,
        take: Callable[[Any], Any],
        gone: threading.Event | None = None,
        largest: int = http.LARGEST,
        as_bytes: bool = False,
    ) -> Any:
        """What `take` makes of the answer; asks again while there is none, until the time limit is over."""
        gone = gone or threading.Event()
        started = time.monotonic()

        def again(failed: int, said: str) -> bool:
            now = time.monotonic()
            with self._lock:
                out_for = now - max(started, self._answered_at)
                if not self._out:
                    self._out = True
                    logger.warning(
                        f"The teacher at {self.url} gives no answer ({said:.200}). The run waits and asks again, for "
                        f"{self.time_limit:g} seconds at most."
                    )
            pause = min(LONGEST_PAUSE, self.pause * 2 ** (failed - 1)) * self._jitter.uniform(0.5, 1.0)
            if out_for + pause > self.time_limit or gone.wait(pause):
                raise TeacherUnavailableError(
                    f"the teacher at {url} gave no answer for {out_for:.0f} seconds (teacher_time_limit is "
                    f"{self.time_limit:g}): {said:.300}"
                )
            return True

        options: dict[str, Any] = {"api_key": self._api_key, "timeout": self.timeout, "largest": largest}
        try:
            answer = http.ask(url, body, again=again, read=take, as_bytes=as_bytes, **options)
        except http.RefusedError as error:
            raise TeacherRefusedError(str(error)) from error
        self._note(answer.sent, answer.received)
        return answer.value

    def _note(self, sent: int, received: int) -> None:
        with self._lock:
            self._answered_at = time.monotonic()
            self.traffic.sent += sent
            self.traffic.received += received
            if self._out:
                self._out = False
                logger.warning(f"The teacher at {self.url} answers again.")


def connected(client: TeacherClient, config: Any, tokenizer: Any, time_limit: float | None) -> None:
    """Connect a client within a time limit of its own; afterwards that of the configuration holds.

    Args:
        client: of the server that `config` names.
        config: a `TIPConfig`.
        tokenizer: the student's.
        time_limit: seconds to wait for it; None: the configuration's.
    """
    client.time_limit = config.teacher_time_limit if time_limit is None else time_limit
    client.connect(tokenizer)
    client.time_limit = config.teacher_time_limit
    client.traffic = Traffic()


def key_of(config: Any) -> str | None:
    """The key that a `TIPConfig` has for its teacher's server."""
    url = http.server_url("teacher_url", config.teacher_url)
    return http.key_of("teacher_api_key_env", config.teacher_api_key_env, url)


def ask_together(client: TeacherClient, accelerator: Any, batch: dict[str, Any], asked: Tensor) -> list[Any]:
    """Every process asks about its own rollouts; all of them fail where one does.

    Args:
        client: connected.
        accelerator: of the run.
        batch, asked: as `tipdistill.teachers.Teacher.answer` has them.

    Returns:
        An Answer per rollout, None where nothing was asked.

    Raises:
        ValueError: a server refused, this process's or another's.
        TeacherUnavailableError: a server did not answer.
    """
    columns = (batch["prompt_ids"], batch["prompt_mask"], batch["completion_ids"], batch["completion_mask"], asked)
    questions = [
        Question(prompt[prompt_mask.bool()].tolist(), completion[mask.bool()].tolist(), row.nonzero()[:, 0].tolist())
        for prompt, prompt_mask, completion, mask, row in zip(*(value.cpu() for value in columns), strict=True)
    ]
    answers: list[Any] = []
    error: TeacherUnavailableError | ValueError | None = None
    try:
        answers = client.ask(questions)
    except (TeacherUnavailableError, ValueError) as caught:
        error = caught
    # together: a process that stopped alone would leave the others waiting, and saving a checkpoint takes all
    flags = torch.tensor([[error is not None, isinstance(error, ValueError)]], device=asked.device).long()
    failed, refused = accelerator.gather(flags).any(0).tolist()
    if refused:
        raise error if isinstance(error, ValueError) else ValueError("another process was refused by the teacher.")
    if failed:
        raise error or TeacherUnavailableError("another process had no answer from the teacher")
    return answers


def traffic_metrics(client: TeacherClient, accelerator: Any) -> dict[str, float]:
    """What asking took since the last call, over all processes: tokens, and bytes as transferred."""
    traffic, client.traffic = client.traffic, Traffic()
    counts = torch.tensor([[float(getattr(traffic, name)) for name in TRAFFIC.values()]], device=accelerator.device)
    return dict(zip(TRAFFIC, accelerator.gather(counts).sum(0).tolist(), strict=True))
