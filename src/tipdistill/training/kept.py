"""backward="kept": the gradient flows through the kept positions alone, and no other position stores anything for it.

    read          all positions, without gradient: hidden states, and every layer's keys and values
    kept_states   the kept positions once more, with gradient, against those keys and values as constants

A position is kept where it predicts a kept token: one before it, the prompt's last position too. Its queries, keys,
values, MLPs and norms are differentiated. Of every other position only keys and values are seen, as numbers. So the
gradient is that of the whole graph with the keys and values of dropped positions detached: an approximation, unless
all positions are kept (TokenTune, arXiv 2501.18824, which draws the positions).

How the second forward finds its place: transformers asks a cache for the keys and values to attend to, and a table for
the function that makes the masks. The cache puts the kept positions' own keys and values where they stand among the
constants; and the function is asked about the kept positions as if they were the rows of the whole mask. So whatever
mask a model's class makes, a sliding window or chunks, its kept rows are these.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from ..integrations._trl import MULTIMODAL_KEYS, TOKEN_KEYS
from ..score.agreement import two_rows, without_dropout
from ..score.forward import called, evaluating, last_hidden_states, positions_of
from ..score.models import lm_head_dtype
from .scoring import trimmed

MASKED = ("sdpa", "eager")  # attention that takes a mask of any form
_LAYERS = ("full_attention", "sliding_attention", "chunked_attention")  # which know the past by keys and values alone
_ROPES = ("dynamic", "longrope")  # whose angles depend on the longest position in a forward
_REMEDY = 'take backward="full"'
_FLOAT32, _ROUNDINGS = 1e-3, 16  # as `agreement` allows for padding: sums in another order


@dataclass
class Reading:
    """What a forward without gradient leaves for the kept positions. It serves one call of `kept_states`.

    Attributes:
        input_ids: int64 [B, L].
        attention_mask: [B, L], 0 where padded.
        states: [B, L, H], what the lm_head projects.
        cache: keys and values of every layer.
    """

    input_ids: Tensor
    attention_mask: Tensor
    states: Tensor
    cache: Cache


class _Constants(CacheLayerMixin):
    """Keys and values of one layer: recorded in the first forward, constants in the second."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: Tensor | None
        self.values: Tensor | None
        self.length = 0
        self.places: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is allocated ahead."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.places is None:
            self.keys, self.values, self.length = key_states, value_states, key_states.shape[-2]
            self.is_initialized = True
            return key_states, value_states
        if self.keys is None or self.values is None:
            raise ValueError("the keys of a layer were asked for twice")
        keys = _put(self.keys, key_states, *self.places)
        values = _put(self.values, value_states, *self.places)
        self.keys = self.values = None  # the constants are needed no more
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (query_length if self.places is None else self.length), 0

    def get_seq_length(self) -> int:
        return 0  # so that masks begin at the first query, whose columns `_rows_of_masks` then says

    def get_max_length(self) -> int:
        return -1


def _put(constants: Tensor, own: Tensor, rows: Tensor, row: Tensor, slot: Tensor, column: Tensor) -> Tensor:
    """Constants [B, heads, L, d] of some rows, with `own` [R, heads, Q, d] where its slots stand in their row."""
    heads = torch.arange(own.shape[1], device=own.device)[None]
    return constants[rows].index_put_((row[:, None], heads, column[:, None]), own[row, :, slot])


@torch.no_grad()
def read(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Reading:
    """One forward of all positions, without gradient, whose keys and values are put by.

    Args:
        model: a transformers model, with PEFT or without.
        input_ids: int64 [B, L].
        attention_mask: [B, L], 0 where padded.
    """
    cache = Cache(layer_class_to_replicate=_Constants)
    with _not_checkpointed(model):
        states = last_hidden_states(model, input_ids, attention_mask, cache)
    return Reading(input_ids, attention_mask, states, cache)


def kept_states(model: Any, reading: Reading, kept: Tensor) -> Tensor:
    """Hidden states of the kept positions, with a gradient that flows through these positions alone.

    h_i = f(x_i, {k_j, v_j : j ≤ i}), with k_j and v_j differentiable where j is kept, and constants elsewhere.

    Args:
        model: that was read.
        reading: of it; its keys and values are used up.
        kept: bool [B, L], no padding among them. Rows without a kept position are left out.

    Returns:
        [N, H], in the order of `kept.nonzero()`. N = 0 has a graph too, for engines that run forwards together.

    Raises:
        ValueError: a model whose layers do not ask a cache for their keys, or ask twice.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
        >>> model, ids = LlamaForCausalLM(config), torch.arange(10).view(2, 5)
        >>> kept = torch.tensor([[False, True, False, False, True], [False, False, True, False, False]])
        >>> kept_states(model, read(model, ids, torch.ones_like(ids)), kept).shape
        torch.Size([3, 8])
    """
    count = int(kept.sum())
    if not count:  # the first token of the first row goes through, and counts for nothing
        kept = (torch.arange(len(kept), device=kept.device) == 0)[:, None] & _first(reading.attention_mask)
    rows = kept.any(1).nonzero()[:, 0]
    row, column = kept[rows].nonzero(as_tuple=True)
    counts = kept[rows].sum(1)
    slot = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    # int64 [R, Q]: where the queries stand; beyond a row's own, its first once more, whose states nobody reads
    columns = kept[rows].int().argmax(1)[:, None].repeat(1, int(counts.max()))
    columns[row, slot] = column
    layers: list[Any] = reading.cache.layers
    if not layers:
        raise ValueError("no layer puts its keys and values into a cache")
    for layer in layers:
        layer.places = rows, row, slot, column
    mask = reading.attention_mask[rows]
    with _not_checkpointed(model), _rows_of_masks(columns):
        states = last_hidden_states(
            model,
            reading.input_ids[rows].gather(1, columns),
            mask,
            reading.cache,
            position_ids=positions_of(mask).gather(1, columns),
        )
    return states[row, slot][:count]


def _first(attention_mask: Tensor) -> Tensor:
    return torch.arange(attention_mask.shape[1], device=attention_mask.device) == attention_mask[0].int().argmax()


@contextmanager
def _rows_of_masks(columns: Tensor) -> Iterator[None]:
    """Masks that models make meanwhile have these columns of each row as their queries, int64 [R, Q]."""

    def of_kept(make: Callable[..., Any]) -> Callable[..., Any]:
        def made(*arguments: Any, mask_function: Callable[..., Any], **options: Any) -> Any:
            def asked(row: Any, head: Any, query: Any, key: Any) -> Any:
                return mask_function(row, head, columns[row, query], key)

            return make(*arguments, mask_function=asked, **{**options, "allow_is_causal_skip": False})

        return made

    masks = ALL_MASK_ATTENTION_FUNCTIONS
    before = dict(masks._local_mapping)
    for name in MASKED:
        masks[name] = of_kept(masks[name])
    try:
        yield
    finally:
        masks._local_mapping.clear()
        masks._local_mapping.update(before)


@contextmanager
def _not_checkpointed(model: Any) -> Iterator[None]:
    """Layers store what they compute meanwhile: of the kept positions that is little, and recomputed no cache holds."""
    modules = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in modules:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in modules:
            module.gradient_checkpointing = True


# In a training step.


class KeptForward:
    """The two parts of a micro-batch's forward.

    Args:
        trainer: a `TIPTrainer`.
        model: its student, without the wrappers of an engine.
        batch: TRL's, of a micro-batch.
        mask: bool [B, T], the N completion tokens whose hidden states are asked for; the kept ones are among them.
    """

    def __init__(self, trainer: Any, model: Any, batch: dict[str, Any], mask: Tensor) -> None:
        present = [key for key in MULTIMODAL_KEYS if key in batch]
        if present:
            raise ValueError(f'backward="kept" reads text alone, the batch has {", ".join(present)}: {_REMEDY}.')
        tokens = {key: batch[key] for key in TOKEN_KEYS}
        if trainer.pad_to_multiple_of is None:
            tokens, mask = trimmed(tokens, mask)
        self._model, self._autocast = model, trainer.accelerator.autocast
        self._asked = pad(mask, (tokens["prompt_ids"].shape[1] - 1, 1))  # a position predicts the token after it
        # No dropout: the constants, and the scores that choose among them, are of the student that wrote.
        with evaluating(trainer.model), self._autocast():
            self._reading = read(
                model,
                torch.cat([tokens["prompt_ids"], tokens["completion_ids"]], 1),
                torch.cat([tokens["prompt_mask"], tokens["completion_mask"]], 1),
            )
            states = self._reading.states[self._asked]
            self.states = states.to(lm_head_dtype(states))  # [N, H], without gradient
        # older releases of torch would hand the kept positions weights that an outer autocast lowered without gradient
        torch.clear_autocast_cache()

    def rows(self, kept: Tensor | None = None) -> Tensor:
        """Hidden states of the kept ones of the N tokens, with gradient; called once.

        Args:
            kept: bool [N]; None: all.
        """
        mask = self._asked if kept is None else self._asked.masked_scatter(self._asked, kept)
        with self._autocast():
            states = kept_states(self._model, self._reading, mask)
            return states.to(lm_head_dtype(states))


# What cannot be done.


def check_kept(config: Any, args: Any, attention: str | None = None) -> None:
    """Refuse a student of whose positions some cannot go backward alone, as far as its configuration tells.

    Args:
        config: the student's; None: not known.
        args: the `TIPConfig`.
        attention: the implementation that is asked for; None: the model's own choice.

    Raises:
        ValueError: what stands in the way, and what to do.
    """
    if args.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise ValueError(f'backward="kept" was not tried with DeepSpeed: shard with FSDP2, or {_REMEDY}.')
    recomputes = (args.fsdp_config or {}).get("activation_checkpointing", False)
    if recomputes or os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", "false").lower() == "true":
        raise ValueError(
            'backward="kept" stores little, and what it stores cannot be computed again: turn off FSDP\'s '
            f"activation_checkpointing, or {_REMEDY}."
        )
    if attention is not None and attention not in MASKED:
        raise ValueError(
            f'backward="kept" needs attention that takes any mask ({" or ".join(MASKED)}), and '
            f"attn_implementation = {attention} does not: leave it out, or {_REMEDY}."
        )
    reason = None if config is None else _obstacle(config)
    if reason is not None:
        raise ValueError(f'backward="kept" cannot train this student, a {config.model_type}: {reason}. Here {_REMEDY}.')


def _obstacle(config: Any) -> str | None:
    text = config.get_text_config()
    if text is not config or getattr(config, "vision_config", None) is not None:
        return "it reads more than text"
    if getattr(config, "is_encoder_decoder", False):
        return "it has an encoder"
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ()
    other = sorted({str(kind) for kind in kinds} - {*_LAYERS})
    if other:
        return f"its layers of kind {', '.join(other)} know the past by more than keys and values"
    if getattr(text, "num_kv_shared_layers", 0):
        return "layers share their keys and values"
    known = AutoModelForCausalLM._model_mapping
    if type(config) in known and getattr(known[type(config)], "_is_stateful", False):
        return "its layers carry a state from position to position"
    rope = getattr(text, "rope_parameters", None) or {}
    ropes = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    for part in ropes:
        if part.get("rope_type") in _ROPES:
            return f"its positions are scaled by the longest of a forward (rope_type {part['rope_type']})"
    return None


def check_forward(model: Any, autocast: Callable[[], Any]) -> None:
    """Refuse a student whose kept positions have other hidden states alone than among all.

    Two rows of a few tokens go through both forwards: whatever a class does with a cache or a mask, values tell.

    Args:
        model: a transformers model, with PEFT or without, whose weights are at hand.
        autocast: of the forwards.

    Raises:
        ValueError: which model, by how much its states differ or what it raised, and what to do.
    """
    plain = called(model)
    kind = getattr(model.config.get_text_config(), "_attn_implementation", None)
    if kind not in MASKED:
        raise ValueError(
            f'backward="kept" needs attention that takes any mask, and {plain} has {kind}: load it with '
            f"attn_implementation={' or '.join(MASKED)}, or {_REMEDY}."
        )
    ids, mask = two_rows(model, model.get_input_embeddings().weight.device)
    kept = mask.bool() & (torch.arange(ids.shape[1], device=ids.device) % 3 != 1)
    with torch.no_grad(), without_dropout(model), autocast():
        try:
            states = last_hidden_states(model, ids, mask)[kept].float()
            own = kept_states(model, read(model, ids, mask), kept).float()
        except torch.OutOfMemoryError:
            raise
        except Exception as raised:  # whatever a class does with a cache, its name has to be said
            first = next(iter(str(raised).splitlines()), "")
            raise ValueError(
                f'backward="kept" cannot train {plain}, whose kept positions do not go forward alone '
                f"({type(raised).__name__}: {first}): {_REMEDY}."
            ) from raised
        lowered = torch.is_autocast_enabled(ids.device.type)
        precision = torch.get_autocast_dtype(ids.device.type) if lowered else model.get_input_embeddings().weight.dtype
    if not states.isfinite().all():
        return  # broken weights: the scores say at which token
    error = float(((own - states).square().mean(-1) / states.square().mean(-1)).sqrt().median())
    single = precision in (torch.float32, torch.float64)
    tolerance = max(_FLOAT32 if single else 0.0, _ROUNDINGS * torch.finfo(precision).eps)
    if not error <= tolerance:
        raise ValueError(
            f'backward="kept" cannot train {plain}: the states of kept positions differ by {error:.2g} of their size '
            f"from those among all positions ({tolerance:.2g} may be rounding): {_REMEDY}."
        )
