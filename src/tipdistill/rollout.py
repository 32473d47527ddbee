"""Rollouts of a plain model, without a trainer: sampled by transformers or vLLM, then scored beside a teacher."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from transformers import GenerationConfig

from .data import encode_prompts
from .divergence import NonFiniteLogitsError, token_scores, top_tokens
from .integrations import _trl
from .types import Head, Rollout, Scored, TokenScores, TopTokens

TOP_TOKENS = 5


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Any],
    *,
    samples: int = 1,
    max_new_tokens: int = 512,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
    first_batch: int = 0,
    forbidden: Sequence[int] = (),
    chat_template_kwargs: dict[str, Any] | None = None,
) -> Iterator[list[Rollout]]:
    """Sample completions, batch by batch: y ~ P_S(· | x) at the given temperature.

    Sampling is the temperature and top_p alone: what a model's own generation_config adds (top_k, repetition penalties)
    is left out, since on-policy means the student's own distribution. A batch is seeded by (seed, its number), so that
    a later call with `first_batch` goes on as if there had been no break; the process's random state stays as it is.

    Args:
        model: a transformers model (with PEFT or without) or a `vllm.LLM`.
        tokenizer: the model's.
        prompts: strings, or lists of messages, which the chat template turns into text.
        samples: completions per prompt, one after the other.
        max_new_tokens: tokens of a completion, at most.
        temperature: of the sampling; 0 takes the likeliest token.
        top_p: samples from the likeliest tokens that together have this probability.
        seed: of the sampling.
        batch_size: completions per batch. vLLM schedules within it, so give it many.
        first_batch: leave out the batches before this one.
        forbidden: token ids never to sample, for instance rows of the lm_head that the teacher lacks.
        chat_template_kwargs: passed to the chat template.

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
    if not 0 <= temperature < math.inf or not 0 < top_p <= 1:
        raise ValueError(f"temperature must be ≥ 0 and top_p in (0, 1], got {temperature} and {top_p}.")
    sample = _sample_with_vllm if hasattr(model, "llm_engine") else _sample
    rows = [prompt_id for prompt_id in range(len(prompts)) for _ in range(samples)]
    for number, start in enumerate(range(0, len(rows), batch_size)):
        if number < first_batch:
            continue
        batch = rows[start : start + batch_size]
        chosen = list(dict.fromkeys(batch))
        encoded = dict(
            zip(chosen, encode_prompts([prompts[row] for row in chosen], tokenizer, chat_template_kwargs), strict=True)
        )
        texts = {row: _text(tokenizer, ids) for row, ids in encoded.items()}
        completions = sample(
            model,
            tokenizer,
            [encoded[row] for row in batch],
            {"max_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p},
            (seed * 1_000_003 + number) % 2**63,
            forbidden,
        )
        yield [
            Rollout(row, texts[row], tuple(encoded[row]), tuple(completion), finished)
            for row, (completion, finished) in zip(batch, completions, strict=True)
        ]


def hidden_states(model: Any, rollouts: Sequence[Rollout]) -> Tensor:
    """Last hidden states at the positions that predict the completion tokens, in one forward of the backbone.

    Args:
        model: a transformers model; its lm_head is not applied. Gradients flow where they are enabled.
        rollouts: R of them, N completion tokens together.

    Returns:
        [N, H], in the order of the rollouts' tokens.
    """
    sequences = [(*rollout.prompt_ids, *rollout.completion_ids) for rollout in rollouts]
    longest = max(map(len, sequences))
    device = model.get_input_embeddings().weight.device
    # padded on the right, where causal attention and position ids need no correction
    tokens = torch.tensor([(*sequence, *(0,) * (longest - len(sequence))) for sequence in sequences], device=device)
    mask = torch.tensor(
        [[1] * len(sequence) + [0] * (longest - len(sequence)) for sequence in sequences], device=device
    )
    backbone = (model.base_model.model if is_peft_model(model) else model).base_model
    hidden = backbone(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
    return torch.cat(
        [hidden[row, len(rollout.prompt_ids) - 1 : len(sequences[row]) - 1] for row, rollout in enumerate(rollouts)]
    )


def head_of(model: Any, hidden: Tensor) -> Head:
    """The model's lm_head with the hidden states [N, H] that it projects.

    Args:
        model: a transformers model.
        hidden: from `hidden_states`.
    """
    return _trl.head(model, model.get_output_embeddings(), hidden)


def micro_batches(rollouts: Sequence[Rollout], tokens: int) -> list[list[int]]:
    """Places of the rollouts in forwards of at most `tokens` tokens, padding included (one rollout at least).

    Args:
        rollouts: in any order; those of like length go together.
        tokens: prompt, completion and padding.

    Example:
        >>> rollouts = [Rollout(0, "", (1,) * prompt, (1,), True) for prompt in (1, 7, 2, 6)]
        >>> micro_batches(rollouts, tokens=16)
        [[1, 3], [2, 0]]
    """
    lengths = [len(rollout.prompt_ids) + len(rollout.completion_ids) for rollout in rollouts]
    batches: list[list[int]] = []
    for place in sorted(range(len(rollouts)), key=lambda place: -lengths[place]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= tokens:
            batches[-1].append(place)
        else:
            batches.append([place])
    return batches


@torch.no_grad()
def score_rollouts(
    student: Any,
    teacher: Any,
    rollouts: Sequence[Rollout],
    fields: Sequence[str],
    *,
    temperature: float = 1.0,
    tokens_per_forward: int = 16384,
    top: int = TOP_TOKENS,
) -> Scored:
    """Statistics of every completion token and the likeliest tokens of both models, without an [N, V] tensor.

    Args:
        student, teacher: transformers models with one tokenizer, on one device.
        rollouts: R of them, N completion tokens together.
        fields: names of statistics, see `TokenScores`.
        temperature: of the sampling.
        tokens_per_forward: tokens of a forward, padding included.
        top: k, how many of the likeliest tokens.

    Returns:
        Scored, on the CPU.

    Raises:
        NonFiniteLogitsError: a ValueError that names the rollout and the token.
    """
    was_training = student.training, teacher.training
    student.eval(), teacher.eval()  # no dropout: the scores are the student's that generated
    try:
        batches = micro_batches(rollouts, tokens_per_forward)
        pieces = [
            _score([rollouts[place] for place in places], places, student, teacher, fields, temperature, top)
            for places in batches
        ]
    finally:
        student.train(was_training[0]), teacher.train(was_training[1])
    # rows as the micro-batches have them → rows as the rollouts have them
    spans = torch.arange(sum(map(_length, rollouts))).split(list(map(_length, rollouts)))
    order = torch.cat([spans[place] for places in batches for place in places]).argsort()
    return joined(pieces).map(lambda value: value[order])


def _score(
    rollouts: Sequence[Rollout],
    numbers: Sequence[int],
    student: Any,
    teacher: Any,
    fields: Sequence[str],
    temperature: float,
    top: int,
) -> Scored:
    """One micro-batch; `numbers` is how an error calls its rollouts."""
    heads = [head_of(model, hidden_states(model, rollouts)) for model in (student, teacher)]
    sampled = torch.tensor([index for rollout in rollouts for index in rollout.completion_ids])
    try:
        return score_heads(heads[0], heads[1], sampled, fields, temperature, top)
    except NonFiniteLogitsError as error:
        token = error.token
        for number, rollout in zip(numbers, rollouts, strict=True):
            if token < _length(rollout):
                raise NonFiniteLogitsError(token, f"rollout {number}, token {token}", error.cause) from None
            token -= _length(rollout)
        raise


@torch.no_grad()
def score_heads(
    student: Head, teacher: Head, sampled: Tensor, fields: Sequence[str], temperature: float, top: int = TOP_TOKENS
) -> Scored:
    """Statistics of N tokens and the likeliest tokens of both models, on the CPU.

    Args:
        student, teacher: heads of the N tokens.
        sampled: int64 [N], the tokens themselves.
        fields: names of statistics, see `TokenScores`.
        temperature: divides both models' logits.
        top: how many of the likeliest tokens.
    """
    vocabulary = min(len(student.weight), len(teacher.weight))
    scores = token_scores(
        student, teacher, temperature=temperature, token_ids=sampled.to(student.hidden.device), fields=fields
    )
    tops = [top_tokens(head, min(top, vocabulary), temperature, vocabulary) for head in (student, teacher)]
    return Scored(scores.detach(), tops[0], tops[1]).map(Tensor.cpu)


def joined(pieces: Sequence[Scored]) -> Scored:
    """The rows of several pieces, one after the other."""

    def top(of: Callable[[Scored], TopTokens]) -> TopTokens:
        return TopTokens(
            torch.cat([of(piece).token_ids for piece in pieces]), torch.cat([of(piece).probability for piece in pieces])
        )

    names = [name for name, _ in pieces[0].scores.present()]
    return Scored(
        TokenScores(**{name: torch.cat([piece.scores.require(name) for piece in pieces]) for name in names}),
        top(lambda piece: piece.student_top),
        top(lambda piece: piece.teacher_top),
    )


def _length(rollout: Rollout) -> int:
    return len(rollout.completion_ids)


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


# Engines: prompts as token ids in, (completion, finished) out.


@torch.no_grad()
def _sample(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    options: dict[str, Any],
    seed: int,
    forbidden: Sequence[int],
) -> list[tuple[list[int], bool]]:
    ends = _end_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0]
    config = GenerationConfig(
        max_new_tokens=options["max_tokens"],
        do_sample=options["temperature"] > 0,
        eos_token_id=ends or None,
        pad_token_id=pad,
        suppress_tokens=list(forbidden) or None,
        **(
            {"temperature": options["temperature"], "top_p": options["top_p"], "top_k": 0}
            if options["temperature"]
            else {}
        ),
    )
    longest = max(map(len, prompts))
    device = model.get_input_embeddings().weight.device
    tokens = torch.tensor([[pad] * (longest - len(ids)) + list(ids) for ids in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    with _as_it_samples(model, config), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        rows = model.generate(input_ids=tokens, attention_mask=mask, generation_config=config)[:, longest:].tolist()
    completions = []
    for row in rows:
        # cut at the end, not at the padding, which a model may write as well
        end = next((place for place, index in enumerate(row) if index in ends), None)
        completions.append((row if end is None else row[: end + 1], end is not None))
    return completions


@contextmanager
def _as_it_samples(model: Any, config: GenerationConfig) -> Iterator[None]:
    """In eval mode, and with a generation_config of ours: `generate` fills what is unset from the model's own."""
    was_training, own = model.training, model.generation_config
    model.eval()
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own
        model.train(was_training)


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    own = model.generation_config.eos_token_id
    ends = [own] if isinstance(own, int) else list(own or [])
    return list(dict.fromkeys([*ends, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])]))


def _sample_with_vllm(
    engine: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    options: dict[str, Any],
    seed: int,
    forbidden: Sequence[int],
) -> list[tuple[list[int], bool]]:
    from vllm import SamplingParams

    parameters = [
        SamplingParams(
            **options,
            seed=(seed + row) % 2**31,
            logit_bias=dict.fromkeys(forbidden, -100.0) or None,
            detokenize=False,
        )
        for row in range(len(prompts))
    ]
    outputs = engine.generate([{"prompt_token_ids": list(ids)} for ids in prompts], parameters, use_tqdm=False)
    return [(list(output.outputs[0].token_ids), output.outputs[0].finish_reason == "stop") for output in outputs]
