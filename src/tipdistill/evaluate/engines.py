"""Who writes the completions: transformers, vLLM, or an OpenAI-compatible server."""

from __future__ import annotations

import importlib.util
import itertools
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch

from .. import http, replies
from ..chat import check_chat_template_kwargs, encode_prompts
from ..environments import Acting, Episode, play_prompts
from ..environments.play import check_conversational, read_dialect
from ..positions import position_limit
from ..rollout import generate
from ..types import Turn, Verdict

logger = logging.getLogger(__name__)
ENGINES = ("auto", "transformers", "vllm")
_VLLM_REQUESTS = 512
# what a server's answer may take: itself, and each token of it
_ANSWER, _BYTES_OF_TOKEN = 2**20, 1024
# What a server fills in from the model's generation_config where a request leaves it open, at values that do nothing;
# beyond OpenAI's interface, and known to vLLM, SGLang and llama.cpp.
_NOTHING_ELSE = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Attributes:
        temperature: divides the logits; 0 takes the most probable token.
        top_p: nucleus, in (0, 1].
        max_new_tokens: longest completion, in tokens.
        top_k: so many of the likeliest tokens; 0: all.

    Raises:
        ValueError: a number out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 8192
    top_k: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be ≥ 0, got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}.")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}.")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (all tokens) or a number of them, got {self.top_k}.")

    def described(self) -> dict[str, Any]:
        """What an evaluation writes down; a top_k only where there is one, as before there was any."""
        return {name: value for name, value in asdict(self).items() if name != "top_k" or value}


@dataclass(frozen=True)
class Completion:
    """What was written for one prompt.

    Attributes:
        index: of the prompt, in the list that was given.
        text: without special tokens, unless they were asked for.
        tokens: with the end of the sequence.
        finished: ended by itself, not by the limit.
        divergence: mean over its tokens, nats; None where there was no teacher to compare with.
        turns, ending, verdict: of an episode, as `tipdistill.types.Rollout` has them.
    """

    index: int
    text: str
    tokens: int
    finished: bool
    divergence: float | None = None
    turns: tuple[Turn, ...] = ()
    ending: str = ""
    verdict: Verdict | None = None


class Engine(Protocol):
    """Writes one completion per prompt.

    One that samples several prompts together, from one seed, has their number as `batch_size`: an evaluation that goes
    on after a kill then gives it the same batches.
    """

    def generate(
        self,
        prompts: Sequence[Any],
        seeds: Sequence[int],
        sampling: Sampling,
        chat: bool | None = None,
        special_tokens: bool = False,
        acting: Acting | None = None,
    ) -> Iterator[list[Completion]]:
        """Yield completions as they are done, some at a time, in any order.

        Args:
            prompts: texts, or lists of messages.
            seeds: one for each prompt.
            sampling: how to draw.
            chat: put texts through the chat template as a user's message; None: where there is a template.
            special_tokens: keep them in the text, up to the end of the sequence.
            acting: tools that the model may call, with a row for each prompt; what is written is then an episode.
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
    api_key_env: str | None = None,
    tokenizer: str | None = None,
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
        api_key_env, tokenizer: see `Server`.

    Raises:
        ValueError: an unknown engine, or a number out of range.
        ImportError: vLLM is asked for and not installed.
    """
    if batch_size < 1 or concurrency < 1:
        raise ValueError(f"batch_size and concurrency must be at least 1, got {batch_size} and {concurrency}.")
    if base_url is not None:
        return Server(
            base_url,
            model,
            concurrency,
            chat_template_kwargs=chat_template_kwargs,
            api_key_env=api_key_env,
            tokenizer=tokenizer,
        )
    if api_key_env is not None:
        raise ValueError("api_key_env is the key of a server: name it with base_url.")
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}.")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    installed = importlib.util.find_spec("vllm") is not None
    if engine == "vllm" and not installed:
        raise ImportError('engine "vllm" needs the package vllm: pip install "tipdistill[vllm]"')
    if engine == "vllm" or (engine == "auto" and installed and torch.cuda.is_available()):
        from vllm import LLM

        if chat_template_kwargs:
            check_chat_template_kwargs(
                chat_template_kwargs, AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
            )
        llm = LLM(model, dtype=dtype, trust_remote_code=trust_remote_code)
        return Local(llm, llm.get_tokenizer(), max(batch_size, _VLLM_REQUESTS), chat_template_kwargs)
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    check_chat_template_kwargs(chat_template_kwargs, tokenizer)
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
        acting: Acting | None = None,
    ) -> Iterator[list[Completion]]:
        dressed = [as_fed(self.tokenizer, prompt, chat) for prompt in prompts]
        tools = [] if acting is None else acting.worlds.schemas()
        self._longest(dressed, tools)  # before the first is sampled
        for start in range(0, len(dressed), self.batch_size):
            batch = dressed[start : start + self.batch_size]
            (rollouts,) = generate(
                self.model,
                self.tokenizer,
                batch,
                max_new_tokens=min(sampling.max_new_tokens, self._longest(batch, tools)),
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                seed=seeds[start],
                batch_size=len(batch),
                chat_template_kwargs=self.chat_template_kwargs,
                acting=acting and replace(acting, rows=acting.rows[start : start + self.batch_size]),
            )
            yield [
                Completion(
                    start + rollout.prompt_id,
                    self.tokenizer.decode(rollout.completion_ids, skip_special_tokens=not special_tokens),
                    len(rollout.student_ids),
                    rollout.finished,
                    turns=rollout.turns,
                    ending=rollout.ending,
                    verdict=rollout.verdict,
                )
                for rollout in rollouts
            ]

    def _longest(self, prompts: Sequence[Any], tools: Sequence[Any]) -> int:
        """Tokens that are left for a completion after the longest prompt, by what the model can take."""
        config = getattr(self.model, "config", None)
        positions = None if config is None else position_limit(config)
        if positions is None or not prompts:
            return sys.maxsize  # vLLM watches its own limit
        longest = max(map(len, encode_prompts(prompts, self.tokenizer, self.chat_template_kwargs, tools)))
        if longest >= positions:
            raise ValueError(f"a prompt has {longest} tokens, and the model takes {positions}.")
        return positions - longest


class ServerError(OSError):
    """The server gave no usable answer; what was sampled before is kept."""


class ServerRefusedError(ServerError, ValueError):
    """The server answered, and asking again would not change the answer."""


class Server:
    """An OpenAI-compatible server: vLLM, SGLang, llama.cpp, or a hosted one.

    A request that fails is sent again, with growing pauses, before the evaluation stops.

    Args:
        base_url: up to and with the version, such as http://localhost:8000/v1.
        model: the name that the server knows.
        concurrency: requests in flight.
        attempts: how often a request is sent before it counts as failed.
        timeout: of one request, from its first byte to its last, in seconds.
        pause: before the second attempt, in seconds; each later one is twice as long.
        chat_template_kwargs: see `open_engine`; vLLM and SGLang pass them on.
        api_key_env: the environment variable that holds the key; None: OPENAI_API_KEY, for https://api.openai.com
            alone.
        tokenizer: the model's, a directory or a hub id, which conversations with tools need here; None: `model` names
            it.

    Raises:
        ValueError: the URL is none or holds a secret, or the variable is not set.
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
        *,
        api_key_env: str | None = None,
        tokenizer: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.base_url, self.model, self.concurrency = http.server_url("base_url", base_url), model, concurrency
        self._api_key = http.key_of("api_key_env", api_key_env, self.base_url)
        self.attempts, self.timeout, self.pause = attempts, timeout, pause
        self.chat_template_kwargs = chat_template_kwargs
        self._nothing_else = _NOTHING_ELSE

    def generate(
        self,
        prompts: Sequence[Any],
        seeds: Sequence[int],
        sampling: Sampling,
        chat: bool | None = None,
        special_tokens: bool = False,
        acting: Acting | None = None,
    ) -> Iterator[list[Completion]]:
        if not prompts:
            return
        failed: ServerError | None = None
        dead = threading.Event()
        ask = (
            partial(self._ask, sampling=sampling, chat=chat, special_tokens=special_tokens)
            if acting is None
            else self._player(prompts, sampling, chat, acting)
        )
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            futures = [
                pool.submit(_unless_dead, dead, ask, index, prompt, seed)
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

    def _player(
        self, prompts: Sequence[Any], sampling: Sampling, chat: bool | None, acting: Acting
    ) -> Callable[[int, Any, int], Completion]:
        """What plays one episode: (index, prompt, seed) → Completion; every turn is a request."""
        from transformers import AutoTokenizer

        named = self.tokenizer or self.model
        try:
            tokenizer = AutoTokenizer.from_pretrained(named)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"conversations with tools are encoded here, and there is no tokenizer {named!r}: name the model's as "
                "--tokenizer, a directory or a hub id."
            ) from error
        dialect = read_dialect(tokenizer, self.chat_template_kwargs)
        dressed = [as_fed(tokenizer, prompt, chat) for prompt in prompts]
        check_conversational(dressed[:1])
        acting.worlds.schemas()  # before threads ask for them

        def episode(index: int, prompt: Any, seed: int) -> Completion:
            turns = itertools.count()

            def write(contexts: list[list[int]], most: list[int]) -> list[tuple[list[int], bool]]:
                ((context,), (room,)) = contexts, most
                return [self._turn(context, room, (seed + next(turns)) % 2**31, sampling)]

            # threads play at the same time: each has a world of its own
            own = replace(acting, worlds=acting.worlds.apart())
            try:
                _, (played,) = play_prompts(write, dialect, [dressed[index]], [index], own, sampling.max_new_tokens)
            finally:
                own.worlds.close()
            return of_episode(index, played, tokenizer)

        return episode

    def _turn(self, context: list[int], room: int, seed: int, sampling: Sampling) -> tuple[list[int], bool]:
        body = {
            "model": self.model,
            "prompt": context,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            **({"top_k": sampling.top_k} if sampling.top_k else {}),
            "max_tokens": room,
            "seed": seed,
            "return_token_ids": True,
        }
        return self._sample("/completions", body, lambda reply: replies.written_ids(reply, room, 2**31))

    def _ask(
        self, index: int, prompt: Any, seed: int, sampling: Sampling, chat: bool | None, special_tokens: bool
    ) -> Completion:
        body: dict[str, Any] = {
            "model": self.model,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            **({"top_k": sampling.top_k} if sampling.top_k else {}),
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
            if messages[-1].get("role") == "assistant":  # vLLM and SGLang: go on with it, as the other engines do
                body |= {"add_generation_prompt": False, "continue_final_message": True}
            asked, path = {**body, "messages": messages}, "/chat/completions"
        else:
            asked, path = {**body, "prompt": prompt}, "/completions"
        most = sampling.max_new_tokens
        return Completion(index, *self._sample(path, asked, lambda reply: replies.written(reply, as_chat, most)))

    def _sample(self, path: str, body: dict[str, Any], read: Callable[[Any], Any]) -> Any:
        """Ask for the sampling that is asked for and no more; in its own words where a server knows no others."""
        given = self._nothing_else
        try:
            return self._post(path, {**given, **body}, read)
        except ServerRefusedError as error:
            if not any(name in str(error) for name in given):
                raise
        reply = self._post(path, body, read)
        if self._nothing_else:
            self._nothing_else = {}
            logger.warning(
                f"The server at {self.base_url} takes no {', '.join(given)}: what it sets of these by itself is part "
                "of the sampling."
            )
        return reply

    def _post(self, path: str, body: dict[str, Any], read: Callable[[Any], Any]) -> Any:
        url = self.base_url + path
        try:
            answer = http.ask(
                url,
                body,
                again=http.doubling(self.attempts, self.pause),
                read=read,
                api_key=self._api_key,
                timeout=self.timeout,
                largest=_ANSWER + body["max_tokens"] * _BYTES_OF_TOKEN,
            )
        except http.RefusedError as error:
            raise ServerRefusedError(f"the server at {url} failed: {error}") from error
        except http.NoAnswerError as error:
            raise ServerError(f"the server at {url} failed: {error}") from error
        return answer.value


def of_episode(index: int, episode: Episode, tokenizer: Any) -> Completion:
    """An episode as a completion: its text holds the results too, its number of tokens counts the model's own.

    Args:
        index: of the prompt.
        episode: that is over.
        tokenizer: the model's.
    """
    return Completion(
        index,
        tokenizer.decode(episode.completion_ids, skip_special_tokens=True),
        sum(episode.written),
        episode.ending == "answered",
        turns=tuple(episode.turns),
        ending=episode.ending,
        verdict=episode.verdict,
    )


def _unless_dead(
    dead: threading.Event, ask: Callable[[int, Any, int], Completion], index: int, prompt: Any, seed: int
) -> Completion | None:
    if dead.is_set():
        return None
    try:
        return ask(index, prompt, seed)
    except ServerError:
        dead.set()
        raise


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
