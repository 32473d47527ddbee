"""Of a model without a trainer: its hidden states, its lm_head, and rollouts scored with both.

    rollouts → hidden_states → head_of → score_heads → Scored            score_rollouts goes all this way

`tipdistill score`, the probe and the small tasks use the whole of it; a training step has hidden states of its own and
begins at `head`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..types import Head, Rollout, Scored, TokenScores, TopTokens
from .tokens import NonFiniteLogitsError, token_scores
from .top import top_tokens

TOP_TOKENS = 5  # how many of the likeliest tokens of each model are kept beside the statistics


# A model's hidden states and lm_head.


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
    # a PEFT model's base_model is its adapters' wrapper
    backbone = (model.get_base_model() if hasattr(model, "get_base_model") else model).base_model
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
    return head(model, model.get_output_embeddings(), hidden)


def head(model: Any, layer: Any, hidden: Tensor) -> Head:
    """Hidden states with an lm_head, and what the model's own forward does to the logits.

    Args:
        model: a transformers model, whose configuration says what.
        layer: its lm_head; weight and bias may be sharded (FSDP2).
        hidden: [N, H].
    """
    logit_scale, softcap = logit_transform(model.config)
    weight = whole(layer.weight, hidden.dtype)
    assert weight is not None
    return Head(hidden.to(weight.device), weight, whole(layer.bias, hidden.dtype), logit_scale, softcap)


def logit_transform(config: Any) -> tuple[float, float | None]:
    """(logit_scale, softcap) that a model's own forward applies after its lm_head, read as TRL reads it."""
    config = config.get_text_config()
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):  # Cohere, Muse Glimmer, Falcon-H1
        if getattr(config, name, None) is not None:
            scale = float(getattr(config, name))
            break
    else:
        scaling = getattr(config, "logits_scaling", None)  # Granite and MiniCPM3 divide, HyperCLOVA X multiplies
        if scaling is None:
            scale = 1.0
        else:
            scale = float(scaling) if config.model_type == "hyperclovax" else 1.0 / float(scaling)
    return scale, getattr(config, "final_logit_softcapping", None)


def whole(parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The full tensor of a parameter that FSDP2 may have sharded, gathered once; others pass unchanged."""
    if isinstance(parameter, DTensor):
        return parameter.full_tensor().to(dtype)
    return parameter


# Rollouts scored.


@torch.no_grad()
def score_rollouts(
    student: Any,
    teacher: Any,
    rollouts: Sequence[Rollout],
    fields: Sequence[str] | None = None,
    *,
    temperature: float = 1.0,
    tokens_per_forward: int = 16384,
    top: int = TOP_TOKENS,
) -> Scored:
    """Statistics of every completion token and the likeliest tokens of both models, without an [N, V] tensor.

    Args:
        student, teacher: transformers models with one tokenizer, on one device.
        rollouts: R of them, N completion tokens together.
        fields: names of statistics, see `TokenScores`; None: all.
        temperature: of the sampling.
        tokens_per_forward: tokens of a forward, padding included.
        top: k, how many of the likeliest tokens.

    Returns:
        Scored, on the CPU.

    Raises:
        NonFiniteLogitsError: a ValueError that names the rollout and the token.
    """
    was_training = student.training, teacher.training
    # no dropout: the scores are those of the student that generated
    student.eval()
    teacher.eval()
    try:
        batches = micro_batches(rollouts, tokens_per_forward)
        pieces = [
            _score([rollouts[place] for place in places], places, student, teacher, fields, temperature, top)
            for places in batches
        ]
    finally:
        student.train(was_training[0])
        teacher.train(was_training[1])
    # The pieces hold the rollouts in the micro-batches' order. `spans` has each rollout's rows as they are wanted; put
    # into the micro-batches' order they say where each row at hand belongs, and argsort turns that around.
    spans = torch.arange(sum(map(_length, rollouts))).split(list(map(_length, rollouts)))
    order = torch.cat([spans[place] for places in batches for place in places]).argsort()
    return joined(pieces).map(lambda value: value[order])


def _score(
    rollouts: Sequence[Rollout],
    numbers: Sequence[int],
    student: Any,
    teacher: Any,
    fields: Sequence[str] | None,
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
def score_heads(
    student: Head,
    teacher: Head,
    sampled: Tensor,
    fields: Sequence[str] | None,
    temperature: float,
    top: int = TOP_TOKENS,
) -> Scored:
    """Statistics of N tokens and the likeliest tokens of both models, on the CPU.

    Args:
        student, teacher: heads of the N tokens.
        sampled: int64 [N], the tokens themselves.
        fields: names of statistics, see `TokenScores`; None: all.
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
