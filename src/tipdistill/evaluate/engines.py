"""Who writes the completions: transformers, vLLM, or an OpenAI-compatible server."""

from __future__ import annotations

import importlib.util
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any, Protocol

import torch

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
        return VLLM(model, dtype, trust_remote_code, chat_template_kwargs)
    return Transformers.load(model, batch_size, dtype, trust_remote_code, chat_template_kwargs)


class Transformers:
    """A model in this process.

    Args:
        model: causal language model.
        tokenizer: its tokenizer.
        batch_size: prompts per call of `generate`.
        chat_template_kwargs: see `open_engine`.
    """

    def __init__(
        self, model: Any, tokenizer: Any, batch_size: int = 16, chat_template_kwargs: dict[str, Any] | None = None
    ) -> None:
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.chat_template_kwargs = chat_template_kwargs

    @classmethod
    def load(
        cls,
        model: str,
        batch_size: int,
        dtype: str,
        trust_remote_code: bool,
        chat_template_kwargs: dict[str, Any] | None,
    ) -> Transformers:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
        loaded = AutoModelForCausalLM.from_pretrained(
            model,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            trust_remote_code=trust_remote_code,
        )
        loaded = loaded.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        return cls(loaded, tokenizer, batch_size, chat_template_kwargs)

    def generate(
        self,
        prompts: Sequence[Any],
        seeds: Sequence[int],
        sampling: Sampling,
        chat: bool | None = None,
        special_tokens: bool = False,
    ) -> Iterator[list[Completion]]:
        encoded = [token_ids(self.tokenizer, prompt, chat, self.chat_template_kwargs) for prompt in prompts]
        for start in range(0, len(prompts), self.batch_size):
            rows = range(start, min(start + self.batch_size, len(prompts)))
            completions = self._batch([encoded[row] for row in rows], seeds[rows[0]], sampling)
            yield [
                Completion(
                    row,
                    self.tokenizer.decode(ids, skip_special_tokens=not special_tokens),
                    len(ids),
                    finished,
                )
                for row, (ids, finished) in zip(rows, completions, strict=True)
            ]

    @torch.no_grad()
    def _batch(self, prompts: list[list[int]], seed: int, sampling: Sampling) -> list[tuple[list[int], bool]]:
        width = max(map(len, prompts))
        limit = self._limit(width, sampling)
        ends = self._ends()
        pad = self.tokenizer.pad_token_id
        pad = ends[0] if pad is None else pad
        device = self.model.device
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        # none of the checkpoint's own sampling defaults: what is reported is what was asked for
        drawn: dict[str, Any] = dict.fromkeys(("temperature", "top_p", "top_k"))
        if sampling.temperature:
            drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            rows = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=bool(sampling.temperature),
                max_new_tokens=limit,
                max_length=None,
                eos_token_id=ends,
                pad_token_id=pad,
                **drawn,
            )
        found = []
        for row in rows[:, width:].tolist():
            end = next((position for position, token in enumerate(row) if token in ends), None)
            found.append((row if end is None else row[: end + 1], end is not None))
        return found

    def _ends(self) -> list[int]:
        ends = getattr(self.model.generation_config, "eos_token_id", None)
        ends = self.tokenizer.eos_token_id if ends is None else ends
        if ends is None:
            raise ValueError("neither the model nor its tokenizer says which token ends a sequence (eos_token_id).")
        return [ends] if isinstance(ends, int) else list(ends)

    def _limit(self, prompt_tokens: int, sampling: Sampling) -> int:
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if positions is None:
            return sampling.max_new_tokens
        if prompt_tokens >= positions:
            raise ValueError(f"a prompt has {prompt_tokens} tokens, and the model takes {positions}.")
        return min(sampling.max_new_tokens, positions - prompt_tokens)


class VLLM:
    """vLLM in this process, one request per completion and a seed for each.

    Args:
        model: directory or hub id.
        dtype: of the weights.
        trust_remote_code: run the model's own code.
        chat_template_kwargs: see `open_engine`.
    """

    def __init__(
        self,
        model: str,
        dtype: str = "auto",
        trust_remote_code: bool = False,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        from vllm import LLM

        self.llm = LLM(model, dtype=dtype, trust_remote_code=trust_remote_code)
        self.tokenizer = self.llm.get_tokenizer()
        self.chat_template_kwargs = chat_template_kwargs

    def generate(
        self,
        prompts: Sequence[Any],
        seeds: Sequence[int],
        sampling: Sampling,
        chat: bool | None = None,
        special_tokens: bool = False,
    ) -> Iterator[list[Completion]]:
        from vllm import SamplingParams

        for start in range(0, len(prompts), _VLLM_REQUESTS):
            rows = range(start, min(start + _VLLM_REQUESTS, len(prompts)))
            outputs = self.llm.generate(
                [
                    {"prompt_token_ids": token_ids(self.tokenizer, prompts[row], chat, self.chat_template_kwargs)}
                    for row in rows
                ],
                [
                    SamplingParams(
                        temperature=sampling.temperature,
                        top_p=sampling.top_p,
                        top_k=-1,
                        max_tokens=sampling.max_new_tokens,
                        seed=seeds[row],
                        skip_special_tokens=not special_tokens,
                    )
                    for row in rows
                ],
                use_tqdm=False,
            )
            yield [
                Completion(row, output.outputs[0].text, len(output.outputs[0].token_ids), _ended(output.outputs[0]))
                for row, output in zip(rows, outputs, strict=True)
            ]


def _ended(output: Any) -> bool:
    return output.finish_reason == "stop"


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
                pool.submit(self._one, dead, index, prompt, seed, sampling, chat, special_tokens)
                for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
            ]
            for future in as_completed(futures):
                if future.cancelled():
                    continue
                try:
                    yield [future.result()]
                except ServerError as error:
                    if failed is None:  # no new requests; those in flight may still succeed, and are kept
                        failed = error
                        for other in futures:
                            other.cancel()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        if failed is not None:
            raise failed

    def _one(
        self,
        dead: threading.Event,
        index: int,
        prompt: Any,
        seed: int,
        sampling: Sampling,
        chat: bool | None,
        special_tokens: bool,
    ) -> Completion:
        if dead.is_set():
            raise ServerError(f"the server at {self.base_url} failed before")
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
        headers = {"Content-Type": "application/json"}
        if os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {os.environ['OPENAI_API_KEY']}"
        request = urllib.request.Request(self.base_url + path, json.dumps(body).encode(), headers)
        said = ""
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(self.pause * 2 ** (attempt - 1))
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return json.load(response)
            except urllib.error.HTTPError as error:
                said = f"HTTP {error.code}: {error.read(300).decode(errors='replace')}"
                if error.code < 500 and error.code not in (408, 429):
                    break  # asking again would not change the answer
            except (OSError, ValueError, HTTPException) as error:  # refused, reset, timed out, cut off in the middle
                said = str(getattr(error, "reason", error)) or type(error).__name__
        raise ServerError(f"the server at {self.base_url}{path} failed: {said}")


def token_ids(
    tokenizer: Any, prompt: Any, chat: bool | None, chat_template_kwargs: dict[str, Any] | None = None
) -> list[int]:
    """Tokens of a prompt: messages, and texts where `chat` says so, through the chat template.

    Args:
        tokenizer: the model's.
        prompt: a text or a list of messages.
        chat: see `Engine.generate`.
        chat_template_kwargs: passed to the chat template.

    Raises:
        ValueError: a chat template is needed and the tokenizer has none.
    """
    has_template = getattr(tokenizer, "chat_template", None) is not None
    if isinstance(prompt, str) and not (has_template if chat is None else chat):
        return tokenizer(prompt)["input_ids"]
    if not has_template:
        raise ValueError("the prompt is a conversation, and the tokenizer has no chat template: give plain text.")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    encoded = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, **(chat_template_kwargs or {})
    )
    return list(encoded["input_ids"])
