"""A teacher on a server that gives hidden states, whose lm_head is here: exact, whatever is asked of it.

    POST <root>/pooling {"input": [token ids], "task": "token_embed", "use_activation": false,
                         "encoding_format": "bytes", "embed_dtype": "bfloat16", "endianness": "little"}

vLLM answers so for any causal model that it serves with `--runner pooling` (docs/vllm.md): the last hidden states after
the final norm, of every token, as bytes, with their shape in the header `metadata`. They are asked for in the dtype
that the server computes in, so that nothing is rounded on the way.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .. import replies
from ..score import token_scores
from . import TeacherCallback
from .client import Question, TeacherClient, TeacherRefusedError, ask_together, connected, key_of, traffic_metrics
from .lm_head import LmHead, read_lm_head
from .local import HeadComparison, HiddenStates

logger = logging.getLogger(__name__)

SERVE = 'vllm serve MODEL --runner pooling --pooler-config \'{"task": "token_embed"}\''
# Ordinary words: a model that was trained on any language finds them likelier where they stand than elsewhere.
_TEXT = (
    "The sun rises in the east and sets in the west. Two and two are four. Water freezes at zero degrees, and ice "
    "melts when it gets warm."
)
_MOST_TOKENS = 64  # of that text that are sent
_ANSWER = 2**20  # bytes of an answer beside its numbers
# The final norm leaves a mean square of 1. Half precision moves it by thousandths, the norm's epsilon lowers it.
NORM_TOLERANCE, _LOWEST, _HIGHEST = 0.05, 0.2, 1.1
LEAST_GAIN = 0.5  # nats by which a token of a text is likelier by its own state; a trained model gains several


class HiddenServer(TeacherClient):
    """Asks a server for the teacher's hidden states; retries until it answers or the time limit is over.

    Args:
        url: up to and with the version, such as http://localhost:8000/v1.
        lm_head: of the model that it serves.
        model, api_key, timeout, time_limit, concurrency, pause: as `TeacherClient` has them.

    Raises:
        ValueError: the URL is none, or a number out of range.
    """

    def __init__(self, url: str, lm_head: LmHead, **settings: Any) -> None:
        super().__init__(url, **settings)
        self.lm_head, self.vocabulary, self.dtype = lm_head, lm_head.rows, torch.float32

    @property
    def gives(self) -> str:
        """What its answers hold, in words (known after `connect`)."""
        named = str(self.dtype).removeprefix("torch.")
        return f"hidden states of width {self.lm_head.width:,} in {named}, for the lm_head of {self.lm_head.name}"

    def _tokens(self, question: Question) -> list[int]:
        """All before the last token that is asked about: its own hidden state predicts the next."""
        if not question.prompt_ids:
            raise ValueError("a prompt has no tokens, so no hidden state predicts the first token of its completion.")
        return super()._tokens(question)[:-1]

    def teacher(self, accelerator: Any) -> HiddenTeacher:
        return HiddenTeacher(self, accelerator)

    def _find_out(self, tokenizer: Any) -> None:
        self.dtype = torch.float32  # whatever the server computes in
        tokens = tokenizer(_TEXT, add_special_tokens=False)["input_ids"][:_MOST_TOKENS]
        readable = len(set(tokens)) > len(tokens) // 4
        if not readable:  # a tokenizer of digits alone, say: any of its tokens
            tokens = list(range(0, self.tokens, -(-self.tokens // _MOST_TOKENS)))
        try:
            states = self._states(tokens[:-1], "a text to try", threading.Event())
        except TeacherRefusedError as error:
            raise ValueError(
                f"teacher_lm_head needs a server that gives hidden states ({error}): start it with {SERVE}."
            ) from error
        self._check(states)
        if readable:
            self._check_text(states, torch.tensor(tokens[1:]))
        self.dtype = held_in(states)
        logger.warning(
            f"The teacher at {self.url} gives {self.gives}: scores and loss are exact. An answer takes "
            f"{self.lm_head.width * self.dtype.itemsize:,} bytes per token."
        )

    def _check(self, states: Tensor) -> None:
        """Refuse states that cannot be this lm_head's: normalised to length 1, or before the final norm."""
        if not states.isfinite().all():
            raise ValueError(f"{self.url} gives hidden states that are NaN or infinite: look at the server's log.")
        name, mean_square = self.lm_head.name, self.lm_head.mean_square(states)
        if mean_square is None or not abs(float(mean_square.median()) - 1) <= NORM_TOLERANCE:
            if float((states.norm(dim=1) - 1).abs().max()) < 1e-2:
                raise ValueError(
                    f"{self.url} gives hidden states of length 1: it normalises them, and what the lm_head needs is "
                    "lost. vLLM 0.32 leaves that out when it is asked to; take that version or a later one."
                )
            if mean_square is not None:
                raise ValueError(
                    f"the hidden states of {self.url} did not come out of the final norm of {name} (their mean square "
                    f"is {float(mean_square.median()):.3g} of what that leaves): teacher_lm_head must be the model "
                    "that the server serves, and the server must apply its final norm."
                )

    def _check_text(self, states: Tensor, following: Tensor) -> None:
        """Warn where the tokens that follow are no likelier by the states before them than by others."""
        own, others = (
            token_scores(self.lm_head.of(hidden), token_ids=following, fields=("student_logprob",))
            for hidden in (states, states.roll(len(states) // 2, 0))
        )
        gains = own.require("student_logprob") - others.require("student_logprob")
        gain, error = float(gains.mean()), float(gains.std() / len(gains) ** 0.5)
        if not gain >= max(LEAST_GAIN, 3 * error):
            logger.warning(
                f"An ordinary text is no likelier in its own order by the hidden states of {self.url} and the lm_head "
                f"of {self.lm_head.name} ({gain:+.2f} nats per token): the teacher was never trained on text, or "
                "teacher_lm_head is not the model that the server serves."
            )

    def _states(self, tokens: list[int], where: str, gone: threading.Event) -> Tensor:
        """Hidden states [L, H] of a sequence, in the server's dtype."""
        width, named = self.lm_head.width, str(self.dtype).removeprefix("torch.")
        body = {
            "model": self.model,
            "input": tokens,
            "task": "token_embed",
            "use_activation": False,
            "encoding_format": "bytes",
            "embed_dtype": named,
            "endianness": "little",
            "add_special_tokens": False,
        }
        size = len(tokens) * width * self.dtype.itemsize
        packed = self._read(
            f"{self.root}/pooling",
            body,
            lambda reply: replies.pooled(reply, (len(tokens), width), named, size, where),
            gone,
            largest=_ANSWER + 4 * size,
            as_bytes=True,
        )
        return torch.frombuffer(bytearray(packed), dtype=self.dtype).view(len(tokens), width)

    def _answer(self, question: Question, tokens: list[int], row: int, gone: threading.Event) -> HiddenStates:
        before = len(question.prompt_ids) - 1  # the state of a token predicts the next
        states = self._states(tokens, f"rollout {row}", gone)[[before + position for position in question.positions]]
        self._refuse(question, row, ~states.isfinite().all(1), "is NaN, or infinite")
        mean_square = self.lm_head.mean_square(states)
        if mean_square is not None:
            outside = ~((mean_square >= _LOWEST) & (mean_square <= _HIGHEST))
            self._refuse(question, row, outside, f"did not come out of the final norm of {self.lm_head.name}")
        return HiddenStates(states)

    def _refuse(self, question: Question, row: int, bad: Tensor, what: str) -> None:
        places = bad.nonzero()[:, 0].tolist()
        if places:
            where = f"{self.url}, rollout {row}, token {question.positions[places[0]]}"
            raise ValueError(
                f"{where}: the teacher's hidden state {what}. Look at the server's log, and start it anew."
            )


def held_in(states: Tensor) -> torch.dtype:
    """The shortest dtype that holds every number: what the server computes in, since it sends float32 for all.

    Args:
        states: float32.

    Example:
        >>> held_in(torch.tensor([0.5, 3.0])), held_in(torch.tensor([0.1, 3.0]))
        (torch.bfloat16, torch.float32)
    """
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(states.to(dtype).float(), states):
            return dtype
    return torch.float32


class HiddenTeacher:
    """A teacher whose backbone is behind a server; see `tipdistill.teachers.Teacher` for its members.

    Args:
        server: connected.
        accelerator: of the run, whose processes ask together.
    """

    answers_in_loss = False
    top_k: int | None = None
    model = None
    callbacks: Sequence[TeacherCallback] = ()
    names: Sequence[str] = ()

    def __init__(self, server: HiddenServer, accelerator: Any) -> None:
        self.server, self.accelerator = server, accelerator
        self.name, self.vocabulary = str(server.model), server.vocabulary
        self._lm_head = server.lm_head.to(accelerator.device, server.dtype)

    def answer(
        self, batch: dict[str, Any], asked: Tensor, pieces: Sequence[Tensor] | None = None
    ) -> list[HiddenStates]:
        nothing = HiddenStates(torch.empty(0, self._lm_head.width, dtype=self.server.dtype))
        return [answer or nothing for answer in ask_together(self.server, self.accelerator, batch, asked)]

    @contextmanager
    def compare(self, answers: Sequence[HiddenStates]) -> Iterator[HeadComparison]:
        nothing = torch.empty(0, self._lm_head.width, dtype=self.server.dtype)
        hidden = torch.cat([nothing, *(answer.hidden for answer in answers)])
        yield HeadComparison(self._lm_head.of(hidden.to(self.accelerator.device)))

    def metrics(self) -> dict[str, float]:
        """What asking took: tokens, and bytes as transferred."""
        return traffic_metrics(self.server, self.accelerator)


def open_server(config: Any, tokenizer: Any, time_limit: float | None = None) -> HiddenServer:
    """The server that a `TIPConfig` names, once its lm_head is read and its hidden states are that lm_head's.

    Args:
        config: with `teacher_url`, `teacher_lm_head` and the other teacher_ fields.
        tokenizer: the student's.
        time_limit: seconds to wait for it; None: the configuration's.

    Raises:
        TeacherUnavailableError, ValueError: as `read_lm_head` and `TeacherClient.connect`.
    """
    server = HiddenServer(
        config.teacher_url,
        read_lm_head(config.teacher_lm_head, config.teacher_model_revision, config.trust_remote_code),
        model=config.teacher_served_name,
        api_key=key_of(config),
        timeout=config.teacher_timeout,
        concurrency=config.teacher_concurrency,
    )
    connected(server, config, tokenizer, time_limit)
    return server
