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
from .forward import called, last_hidden_states
from .tokens import NonFiniteLogitsError, token_scores
from .top import top_of_both

TOP_TOKENS = 5  # how many of the likeliest tokens of each model are kept beside the statistics


# A model's hidden states and lm_head.


def hidden_states(model: Any, rollouts: Sequence[Rollout]) -> Tensor:
    """Last hidden states at the positions that predict the student's tokens, in one forward of the backbone.

    Args:
        model: a transformers model; its lm_head is not applied. Gradients flow where they are enabled.
        rollouts: R of them; the student wrote N tokens of their completions, tools the others.

    Returns:
        [N, H], in the order of the rollouts' tokens.
    """
    hidden = last_hidden_states(model, *padded(rollouts, model.get_input_embeddings().weight.device))
    rows = []
    for row, rollout in enumerate(rollouts):
        first = len(rollout.prompt_ids) - 1
        states = hidden[row, first : first + len(rollout.completion_ids)]
        rows.append(states[torch.tensor(rollout.written, device=states.device)] if rollout.turns else states)
    return torch.cat(rows)


def padded(rollouts: Sequence[Rollout], device: Any = None) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask of whole rollouts, int64 [R, longest]; padded on the right, where causal attention
    needs no correction.

    Example:
        >>> padded([Rollout(0, "", (3,), (4, 5), True), Rollout(1, "", (6,), (), False)])
        (tensor([[3, 4, 5],
                [6, 0, 0]]), tensor([[1, 1, 1],
                [1, 0, 0]]))
    """
    sequences = [torch.tensor([*rollout.prompt_ids, *rollout.completion_ids], device=device) for rollout in rollouts]
    tokens, mask = (
        torch.nn.utils.rnn.pad_sequence(values, batch_first=True)
        for values in (sequences, list(map(torch.ones_like, sequences)))
    )
    return tokens, mask


def head_of(model: Any, hidden: Tensor) -> Head:
    """The model's lm_head with the hidden states [N, H] that it projects.

    Args:
        model: a transformers model.
        hidden: from `hidden_states`.
    """
    return head(model, model.get_output_embeddings(), hidden)


def lm_head_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype that a linear layer would multiply hidden states in here: float32 ones are lowered by autocast.

    The engine multiplies without autocast. It lowers the weight tile by tile, so that a float32 weight is never copied
    and has a float32 gradient.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     lm_head_dtype(torch.zeros(1))
        torch.bfloat16
    """
    device = hidden.device.type
    if hidden.dtype == torch.float32 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def head(model: Any, layer: Any, hidden: Tensor) -> Head:
    """Hidden states with an lm_head, and what the model's own forward does to the logits.

    An adapter on the lm_head is part of its weight, W + Σ scaling · B A, and has its gradient where it is trained.

    Args:
        model: a transformers model, whose configuration says what.
        layer: its lm_head; weight and bias may be sharded (FSDP2).
        hidden: [N, H].
    """
    logit_scale, softcap = logit_transform(model.config)
    rows = getattr(model.config.get_text_config(), "unpadded_vocab_size", None)  # Inkling cuts its logits
    weight, bias = (whole(parameter, hidden.dtype) for parameter in lm_head_parameters(layer))
    if weight is None or weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(
            f"the lm_head of {called(model)} is a {type(layer).__name__} without a weight [V, H] that can be read: "
            "load the model with an lm_head that is not quantized."
        )
    bias = None if bias is None else bias[:rows]
    return Head(hidden.to(weight.device), weight[:rows], bias, logit_scale, softcap)


def lm_head_parameters(layer: Any) -> tuple[Tensor | None, Tensor | None]:
    """(weight, bias) that an lm_head multiplies with, PEFT's active adapters included.

    Adapters that are no sum with the weight (DoRA, IA³ and so on) are left out; `agreement.check_model` refuses those.

    Args:
        layer: a linear layer, as it is or wrapped by PEFT.
    """
    if hasattr(layer, "token_adapter"):  # trainable_token_indices: some rows of the weight are the adapter's
        adapter = layer.token_adapter
        active = [] if adapter.disable_adapters or adapter.merged else adapter.active_adapters
        return adapter.get_merged_weights(active), getattr(adapter.base_layer, "bias", None)
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    if weight is None or not hasattr(layer, "get_delta_weight") or layer.disable_adapters or layer.merged:
        return weight, bias
    for name in layer.active_adapters:
        if name in getattr(layer, "lora_A", {}) and name not in getattr(layer, "lora_variant", {}):
            weight = weight + layer.get_delta_weight(name).to(weight.dtype)
    return weight, bias


def unread_adapters(layer: Any) -> list[str]:
    """Active adapters on an lm_head that `lm_head_parameters` leaves out, so that they would never be trained.

    Args:
        layer: a linear layer, as it is or wrapped by PEFT.
    """
    if (
        not hasattr(layer, "adapter_layer_names")
        or hasattr(layer, "modules_to_save")
        or hasattr(layer, "token_adapter")
    ):
        return []
    if layer.disable_adapters or layer.merged:
        return []
    there = [name for kind in layer.adapter_layer_names for name in getattr(layer, kind, {})]
    read = [
        name
        for name in getattr(layer, "lora_A", {})
        if name not in getattr(layer, "lora_variant", {}) and not getattr(layer, "lora_bias", {}).get(name)
    ]
    return [name for name in layer.active_adapters if name in there and name not in read]


# Of a configuration: what the model's class does to the logits of its lm_head.
_MULTIPLIED_BY = ("logit_scale", "output_multiplier", "lm_head_multiplier")  # Cohere, Muse Glimmer, Falcon-H1
_DIVIDED_BY = ("logits_scaling", "logits_mup_width_multiplier")  # Granite and MiniCPM3, Inkling
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM
_UNSCALED = ("aya_vision", "cohere2_vision")  # their text model's scale is not applied by the class around it


def logit_transform(config: Any) -> tuple[float, float | None]:
    """(logit_scale, softcap) that a model's own forward applies after its lm_head.

    `agreement.check_model` compares them with that forward.
    """
    text = config.get_text_config()
    scale = 1.0
    for name in (*_MULTIPLIED_BY, *_DIVIDED_BY) if config.model_type not in _UNSCALED else ():
        value = getattr(text, name, None)
        if value is not None:
            divides = name in _DIVIDED_BY and text.model_type != "hyperclovax"
            scale *= 1.0 / float(value) if divides else float(value)
    caps = [getattr(text, name, None) for name in _SOFTCAPS]
    return scale, next((float(cap) for cap in caps if cap), None)


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

    def score(places: Sequence[int], of_student: Head, sampled: Tensor) -> Scored:
        of_teacher = head_of(teacher, hidden_states(teacher, [rollouts[place] for place in places]))
        return score_heads(of_student, of_teacher, sampled, fields, temperature, top)

    was_training = teacher.training
    teacher.eval()
    try:
        return score_in_forwards(student, rollouts, score, tokens_per_forward)
    finally:
        teacher.train(was_training)


@torch.no_grad()
def score_in_forwards(
    student: Any,
    rollouts: Sequence[Rollout],
    score: Callable[[Sequence[int], Head, Tensor], Scored],
    tokens_per_forward: int,
) -> Scored:
    """Rollouts scored forward by forward of the student, put together in their own order.

    Args:
        student: a transformers model.
        rollouts: R of them.
        score: (places of some rollouts, the student's head of their tokens, the tokens) → Scored.
        tokens_per_forward: as in `score_rollouts`.

    Raises:
        NonFiniteLogitsError: a ValueError that names the rollout and the token.
    """
    was_training = student.training
    student.eval()  # no dropout: the scores are those of the student that generated
    batches = micro_batches(rollouts, tokens_per_forward)
    try:
        pieces = [_score_forward(student, [rollouts[place] for place in places], places, score) for places in batches]
    finally:
        student.train(was_training)
    # The pieces hold the rollouts in the micro-batches' order. `spans` has each rollout's rows as they are wanted; put
    # into the micro-batches' order they say where each row at hand belongs, and argsort turns that around.
    spans = torch.arange(sum(map(_length, rollouts))).split(list(map(_length, rollouts)))
    order = torch.cat([spans[place] for places in batches for place in places]).argsort()
    return joined(pieces).map(lambda value: value[order])


def _score_forward(
    student: Any,
    rollouts: Sequence[Rollout],
    numbers: Sequence[int],
    score: Callable[[Sequence[int], Head, Tensor], Scored],
) -> Scored:
    """One micro-batch; `numbers` is how an error calls its rollouts."""
    of_student = head_of(student, hidden_states(student, rollouts))
    sampled = torch.tensor([index for rollout in rollouts for index in rollout.student_ids])
    try:
        return score(numbers, of_student, sampled)
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
    scores = token_scores(
        student, teacher, temperature=temperature, token_ids=sampled.to(student.hidden.device), fields=fields
    )
    return Scored(scores.detach(), *top_of_both(student, teacher, top, temperature)).map(Tensor.cpu)


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
    return len(rollout.student_ids)
