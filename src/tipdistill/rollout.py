"""The stage "rollout" outside a training run: a model writes completions, sampled by transformers or vLLM.

A rollout is a completion that the student wrote, with its prompt (`tipdistill.types.Rollout`). While training, TRL
writes them; everything else that samples comes here: `tipdistill score`, the probe, evaluations, the small tasks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig

from .chat import encode_prompts
from .environments import Acting, play_prompts
from .environments.play import Dialect, check_conversational, read_dialect
from .policy import end_tokens, sampled_with
from .types import Rollout


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Any],
    *,
    samples: int = 1,
    max_new_tokens: int = 512,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    batch_size: int = 32,
    first_batch: int = 0,
    forbidden: Sequence[int] = (),
    chat_template_kwargs: dict[str, Any] | None = None,
    acting: Acting | None = None,
) -> Iterator[list[Rollout]]:
    """Sample completions, batch by batch: y ~ P_S(· | x) at the given temperature.

    Sampling is what is asked for and no more: what a model's own generation_config adds (top_k, repetition penalties)
    is left out, since on-policy means the student's own distribution. A batch is seeded by (seed, its number), so that
    a later call with `first_batch` goes on as if there had been no break; another batch size is another draw. The
    process's random state stays as it is.

    Args:
        model: a transformers model (with PEFT or without) or a `vllm.LLM`.
        tokenizer: the model's.
        prompts: strings, or lists of messages, which the chat template turns into text.
        samples: completions per prompt, one after the other.
        max_new_tokens: tokens of a completion, at most.
        temperature: of the sampling; 0 takes the likeliest token.
        top_p: samples from the likeliest tokens that together have this probability.
        top_k: samples from so many of the likeliest tokens; 0: from all.
        seed: of the sampling.
        batch_size: completions per batch. vLLM schedules within it, so give it many.
        first_batch: leave out the batches before this one.
        forbidden: token ids never to sample, for instance rows of the lm_head that the teacher lacks.
        chat_template_kwargs: passed to the chat template.
        acting: the student's tools, which it then calls turn by turn; `max_new_tokens` holds for the whole episode.

    Yields:
        The rollouts of one batch, prompt by prompt; `prompt_id` counts the prompts given.

    Raises:
        ValueError: a number out of range.

    Example:
        >>> from transformers import Qwen3Config, Qwen3ForCausalLM
        >>> from tipdistill.tasks.arithmetic import build_tokenizer
        >>> model = Qwen3ForCausalLM(Qwen3Config(vocab_size=18, hidden_size=16, num_hidden_layers=1, pad_token_id=17))
        >>> ((first, second),) = generate(model, build_tokenizer(), ["1+2="], samples=2, max_new_tokens=3)
        >>> first.prompt, first.prompt_id, len(first.completion_ids) <= 3
        ('1+2=', 0, True)
    """
    for name, value, least in (
        ("samples", samples, 1),
        ("max_new_tokens", max_new_tokens, 1),
        ("batch_size", batch_size, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}.")
    if top_k < 0:
        raise ValueError(f"top_k must be 0 (all tokens) or a number of them, got {top_k}.")
    if not 0 <= temperature < math.inf or not 0 < top_p <= 1:
        raise ValueError(f"temperature must be ≥ 0 and top_p in (0, 1], got {temperature} and {top_p}.")
    sample = _sample_with_vllm if hasattr(model, "llm_engine") else _sample
    sampled = partial(
        sample, model, tokenizer, temperature=temperature, top_p=top_p, top_k=top_k, forbidden=forbidden
    )  # contexts, tokens of each at most, seed
    if acting is not None:
        check_conversational(prompts)
    dialect = None if acting is None else read_dialect(tokenizer, chat_template_kwargs)
    prompt_ids = [prompt_id for prompt_id in range(len(prompts)) for _ in range(samples)]
    for number, start in enumerate(range(0, len(prompt_ids), batch_size)):
        if number < first_batch:
            continue
        batch = prompt_ids[start : start + batch_size]
        batch_seed = (seed * 1_000_003 + number) % 2**63
        if acting is not None and dialect is not None:
            yield _played(sampled, batch_seed, dialect, prompts, batch, acting, max_new_tokens)
            continue
        distinct = list(dict.fromkeys(batch))  # each prompt of the batch is encoded once, however many its samples
        encoded = dict(
            zip(
                distinct,
                encode_prompts(
                    [prompts[prompt_id] for prompt_id in distinct], tokenizer, chat_template_kwargs, numbers=distinct
                ),
                strict=True,
            )
        )
        texts = {prompt_id: _text(tokenizer, ids) for prompt_id, ids in encoded.items()}
        completions = sampled([encoded[prompt_id] for prompt_id in batch], [max_new_tokens] * len(batch), batch_seed)
        yield [
            Rollout(prompt_id, texts[prompt_id], tuple(encoded[prompt_id]), tuple(completion), finished)
            for prompt_id, (completion, finished) in zip(batch, completions, strict=True)
        ]


def _played(
    sampled: Callable[..., list[tuple[list[int], bool]]],
    seed: int,
    dialect: Dialect,
    prompts: Sequence[Any],
    batch: Sequence[int],
    acting: Acting,
    tokens: int,
) -> list[Rollout]:
    """The episodes of a batch; each turn of it has a seed of its own."""
    seeds = (((seed + 1) * 10_007 + turn) % 2**63 for turn in itertools.count())

    def write(contexts: list[list[int]], most: list[int]) -> list[tuple[list[int], bool]]:
        return sampled(contexts, most, next(seeds))

    asked = [prompts[prompt_id] for prompt_id in batch]
    encoded, episodes = play_prompts(write, dialect, asked, batch, acting, tokens)
    return [
        Rollout(
            prompt_id,
            _text(dialect.tokenizer, ids),
            tuple(ids),
            tuple(episode.completion_ids),
            episode.ending == "answered",
            tuple(episode.turns),
            episode.ending,
            episode.verdict,
        )
        for prompt_id, ids, episode in zip(batch, encoded, episodes, strict=True)
    ]


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


# Engines: prompts as token ids in, (completion, finished) out.


@torch.no_grad()
def _sample(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    most: Sequence[int],
    seed: int,
    *,
    temperature: float,
    top_p: float,
    top_k: int,
    forbidden: Sequence[int],
) -> list[tuple[list[int], bool]]:
    ends = end_tokens(model.generation_config, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0]
    config = GenerationConfig(
        max_new_tokens=max(most),
        do_sample=temperature > 0,
        eos_token_id=ends or None,
        pad_token_id=pad,
        suppress_tokens=list(forbidden) or None,
        **({"temperature": temperature, "top_p": top_p, "top_k": top_k} if temperature else {}),
    )
    longest = max(map(len, prompts))
    device = model.get_input_embeddings().weight.device
    tokens = torch.tensor([[pad] * (longest - len(ids)) + list(ids) for ids in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    was_training = model.training
    model.eval()
    with sampled_with(model, config), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        try:
            rows = model.generate(input_ids=tokens, attention_mask=mask, generation_config=config)
        finally:
            model.train(was_training)
    completions = []
    for row in rows[:, longest:].tolist():
        # cut at the end, not at the padding, which a model may write as well
        end = next((place for place, index in enumerate(row) if index in ends), None)
        completions.append((row if end is None else row[: end + 1], end is not None))
    return completions


def _sample_with_vllm(
    engine: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    most: Sequence[int],
    seed: int,
    *,
    temperature: float,
    top_p: float,
    top_k: int,
    forbidden: Sequence[int],
) -> list[tuple[list[int], bool]]:
    from vllm import SamplingParams

    parameters = [
        SamplingParams(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k or -1,
            max_tokens=most[row],
            seed=(seed + row) % 2**31,
            logit_bias=dict.fromkeys(forbidden, -100.0) or None,
            detokenize=False,
        )
        for row in range(len(prompts))
    ]
    outputs = engine.generate([{"prompt_token_ids": list(ids)} for ids in prompts], parameters, use_tqdm=False)
    return [(list(output.outputs[0].token_ids), output.outputs[0].finish_reason == "stop") for output in outputs]
