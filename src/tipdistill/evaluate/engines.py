"""Who writes the completions: transformers, vLLM, or an OpenAI-compatible server."""

from __future__ import annotations

import importlib.util
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .. import http
from ..data import encode_prompts
from ..positions import position_limit
from ..rollout import generate

ENGINES = ("auto", "transformers", "vllm")
_VLLM_REQUESTS = 512


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Attributes:
        temperature: divides the logits; 0 takes the most probable token.
        top_p: nucleus, in (0, 1].
        max_new_tokens: longest completion, in tokens.

    Raises:
        ValueError: a number out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 8192

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be ≥ 0, got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}.")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}.")


@dataclass(frozen=True)
class Completion:
    """What was written for one prompt.

    Attributes:
        index: of the prompt, in the list that was given.
        text: without special tokens, unless they were asked for.
        tokens: with the end of the sequence.
        finished: ended by itself, not by the limit.
    """

    index: int
    text: str
    tokens: int
    finished: bool


class Engine(Protocol):
    """Writes one completion per prompt."""

    def generate(
        self,
        prompts: Sequence[Any],
        seeds: Sequence[int],
        sampling: Sampling,
        chat: bool | None = None,
        special_tokens: bool = False,
    ) -> Iterator[list[Completion]]:
        """Yield completions as they are done, some at a time, in any order.

        Args:
            prompts: texts, or lists of messages.
            seeds: one for each prompt.
            sampling: how to draw.
            chat: put texts through the chat template as a user's message; None: where there is a template.
            special_tokens: keep them in the text, up to the end of the sequence.
        """
        ...


def open_engine(
    model: str,
    engine: str = "auto",
    base_url: str | None = None,
    batch_size: int = 16,
    dtype: str = "auto",
    concurrency: int = 32,
    trust_remote_code: bool = False,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> Engine:
    """The engine that was asked for.

    Args:
        model: directory or hub id; for a server, the name that it serves the model by.
        engine: "transformers", "vllm" or "auto": vLLM where it is installed and there is a GPU.
        base_url: of an OpenAI-compatible server, such as http://localhost:8000/v1; it is then the engine.
        batch_size: prompts per forward (transformers).
        dtype: of the weights, "auto" for the checkpoint's own.
        concurrency: requests in flight (server).
        trust_remote_code: run the model's own code.
        chat_template_kwargs: passed to the chat template, such as {"enable_thinking": False}.

    Raises:
        ValueError: an unknown engine, or a number out of range.
        ImportError: vLLM is asked for and not installed.
    """
    if batch_size < 1 or concurrency < 1:
        raise ValueError(f"batch_size and concurrency must be at least 1, got {batch_size} and {concurrency}.")
    if base_url is not None:
        return Server(base_url, model, concurrency, chat_template_kwargs=chat_template_kwargs)
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}.")
    installed = importlib.util.find_spec("vllm") is not None
    if engine == "vllm" and not installed:
        raise ImportError('engine "vllm" needs the package vllm: pip install "tipdistill[vllm]"')
    if engine == "vllm" or (engine == "auto" and installed and torch.cuda.is_available()):
        from vllm import LLM

        llm = LLM(model, dtype=dtype, trust_remote_code=trust_remote_code)
        return Local(llm, llm.get_tokenizer(), max(batch_size, _VLLM_REQUESTS), chat_template_kwargs)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    loaded = AutoModelForCausalLM.from_pretrained(
        model, dtype=dtype if dtype == "auto" else getattr(torch, dtype), trust_remote_code=trust_remote_code
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Local(loaded.to(device).eval(), tokenizer, batch_size, chat_template_kwargs)


class Local:
    """A model in this process, sampled as rollouts are (`tipdistill.rollout.generate`).

    Args:
        model: a transformers model, or a `vllm.LLM`.
        tokenizer: the model's.
        batch_size: prompts per call; vLLM schedules within it, so give it many.
        chat_template_kwargs: see `open_engine`.
    """

    def __init__(
        self, model: Any, tokenizer: Any, batch_size: int = 16, chat_template_kwargs: dict[str, Any] | None = None
    ) -> None:
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.chat_template_kwargs = chat_template_kwargs

    def generate(
        self,
        prompts: Sequence[Any],
        seeds: Sequence[int],
        sampling: Sampling,
        chat: bool | None = None,
        special_tokens: bool = False,
    ) -> Iterator[list[Completion]]:
        dressed = [as_fed(self.tokenizer, prompt, chat) for prompt in prompts]
        longest = self._longest(dressed)
        for start in range(0, len(dressed), self.batch_size):
            batch = dressed[start : start + self.batch_size]
            (rollouts,) = generate(
                self.model,
                self.tokenizer,
                batch,
                max_new_tokens=min(sampling.max_new_tokens, longest),
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=seeds[start],
                batch_size=len(batch),
                chat_template_kwargs=self.chat_template_kwargs,
            )
            yield [
                Completion(
                    start + rollout.prompt_id,
                    self.tokenizer.decode(rollout.completion_ids, skip_special_tokens=not special_tokens),
                    len(rollout.completion_ids),
                    rollout.finished,
                )
                for rollout in rollouts
            ]

    def _longest(self, prompts: Sequence[Any]) -> int:
        """Tokens that are left for a completion after the longest prompt, by what the model can take."""
        config = getattr(self.model, "config", None)
        positions = None if config is None else position_limit(config)
        if positions is None or not prompts:
            return sys.maxsize  # vLLM watches its own limit
        longest = max(map(len, encode_prompts(prompts, self.tokenizer, self.chat_template_kwargs)))
        if longest >= positions:
            raise ValueError(f"a prompt has {longest} tokens, and the model takes {positions}.")
        return positions - longest


class ServerError(OSError):
    """The server gave no usable answer; what was sampled before is kept."""


class Server:
    """An OpenAI-compatible server: vLLM, SGLang, llama.cpp, or a hosted one.

    Sends the key in the environment variable OPENAI_API_KEY, where there is one. A request that fails is sent again,
    with growing pauses, before the evaluation stops.

    Args:
        base_url: up to and with the version, such as http://localhost:8000/v1.
        model: the name that the server knows.
        concurrency: requests in flight.
        attempts: how often a request is sent before it counts as failed.
        timeout: of one request, in seconds.
        pause: before the second attempt, in seconds; each later one is twice as long.
        chat_template_kwargs: see `open_engine`; vLLM and SGLang pass them on.

    Raises:
        ValueError: the URL is none.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        concurrency: int = 32,
        attempts: int = 5,
        timeout: float = 3600.0,
        pause: float = 1.0,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url must begin with http:// or https://, got {base_url!r}.")
        self.base_url, self.model, self.concurrency = base_url.rstrip("/"), model, concurrency
        self.attempts, self.timeout, self.pause = attempts, timeout, pause
        self.chat_template_kwargs = chat_template_kwargs

    def generate(
        self,
        prompts: Sequence[Any],
        seeds: Sequence[int],
        sampling: Sampling,
        chat: bool | None = None,
        special_tokens: bool = False,
    ) -> Iterator[list[Completion]]:
        if not prompts:
            return
        failed: ServerError | None = None
        dead = threading.Event()
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            futures = [
                pool.submit(self._ask_unless_dead, dead, index, prompt, seed, sampling, chat, special_tokens)
                for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
            ]
            for future in as_completed(futures):
                if future.cancelled():
                    continue
                try:
                    completion = future.result()
                    if completion is not None:
                        yield [completion]
                except ServerError as error:
                    if failed is None:  # no new requests; those in flight may still succeed, and are kept
                        failed = error
                        for other in futures:
                            other.cancel()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        if failed is not None:
            raise failed

    def _ask_unless_dead(
        self,
        dead: threading.Event,
        index: int,
        prompt: Any,
        seed: int,
        sampling: Sampling,
        chat: bool | None,
        special_tokens: bool,
    ) -> Completion | None:
        if dead.is_set():
            return None
        try:
            return self._ask(index, prompt, seed, sampling, chat, special_tokens)
        except ServerError:
            dead.set()
            raise

    def _ask(
        self, index: int, prompt: Any, seed: int, sampling: Sampling, chat: bool | None, special_tokens: bool
    ) -> Completion:
        body: dict[str, Any] = {
            "model": self.model,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
            "seed": seed,
        }
        if special_tokens:
            body["skip_special_tokens"] = False  # beyond OpenAI's interface; vLLM and SGLang know it
        as_chat = not isinstance(prompt, str) or chat is not False
        if as_chat:
            if self.chat_template_kwargs:
                body["chat_template_kwargs"] = self.chat_template_kwargs
            messages = prompt if not isinstance(prompt, str) else [{"role": "user", "content": prompt}]
            reply = self._post("/chat/completions", {**body, "messages": messages})
        else:
            reply = self._post("/completions", {**body, "prompt": prompt})
        try:
            choice = reply["choices"][0]
            text = choice["message"].get("content") if as_chat else choice["text"]
            tokens = int(reply["usage"]["completion_tokens"])
            return Completion(index, text or "", tokens, choice["finish_reason"] != "length")
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise ServerError(
                f"{self.base_url} answered without choices, finish_reason or usage.completion_tokens: {reply!r:.200}"
            ) from error

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        url = self.base_url + path
        try:
            return http.ask(
                url,
                body,
                again=http.doubling(self.attempts, self.pause),
                api_key=os.environ.get("OPENAI_API_KEY"),
                timeout=self.timeout,
            ).value
        except (http.RefusedError, http.NoAnswerError) as error:
            raise ServerError(f"the server at {url} failed: {error}") from error


def as_fed(tokenizer: Any, prompt: Any, chat: bool | None) -> Any:
    """A prompt as the engine takes it: a text that stays one, or messages for the chat template.

    Args:
        tokenizer: the model's.
        prompt: a text or a list of messages.
        chat: see `Engine.generate`.

    Raises:
        ValueError: a chat template is needed and the tokenizer has none.
    """
    has_template = getattr(tokenizer, "chat_template", None) is not None
    if isinstance(prompt, str) and not (has_template if chat is None else chat):
        return prompt
    if not has_template:
        raise ValueError("the prompt is a conversation, and the tokenizer has no chat template: give plain text.")
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
