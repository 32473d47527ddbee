"""A model's last hidden states: its backbone, at the positions that its tokens have, up to its lm_head."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

# What a class computes between its backbone and its last projection: model_type → where that module is.
BEFORE_LM_HEAD = {
    "bert": "cls.predictions.transform",
    "big_bird": "cls.predictions.transform",
    "electra": "generator_predictions",
    "ernie": "cls.predictions.transform",
    "megatron-bert": "cls.predictions.transform",
    "modernbert-decoder": "lm_head",
    "roc_bert": "cls.predictions.transform",
    "roformer": "cls.predictions.transform",
}


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """The model in eval mode meanwhile: no dropout, so that scores are those of the student that wrote."""
    was_training = model.training
    model.eval()
    for module in model.modules():
        # in eval mode bitsandbytes packs a layer's weights for a CPU, once and for all: no gradient passes them then
        if any(kind.__name__ == "Linear4bit" for kind in type(module).__mro__):
            module.training = True
    try:
        yield
    finally:
        model.train(was_training)


def last_hidden_states(
    model: Any, input_ids: Tensor, attention_mask: Tensor, cache: Any = None, **multimodal: Tensor
) -> Tensor:
    """What the model's lm_head projects, at every position.

    Padding does not count as positions: a row has the same states on whichever side, and however far, it is padded.
    Images have positions of their own, which the model works out itself.

    Args:
        model: a transformers model, with PEFT or without; its lm_head is not applied.
        input_ids: int64 [B, L].
        attention_mask: [B, L], 0 where padded.
        cache: what transformers calls a `Cache`, which the layers put their keys and values into; None: there is none.
        multimodal: images and the like, as the model takes them; or `position_ids`, where they are not those of all L.

    Returns:
        [B, L, H].

    Raises:
        ValueError: a model whose backbone cannot be called alone.
    """
    plain = without_peft(model)
    backbone = plain.base_model
    if backbone is plain:  # base_model_prefix names no attribute of this class, as for Llama 4's text model
        backbone = getattr(plain, "model", plain)
    if not multimodal and "position_ids" in inspect.signature(backbone.forward).parameters:
        multimodal = {"position_ids": positions_of(attention_mask)}
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **multimodal}
    if cache is not None:
        inputs["past_key_values"] = cache
    outputs = None if backbone is plain else backbone(**inputs, use_cache=cache is not None)
    states = getattr(outputs, "last_hidden_state", None)
    if states is None:
        raise ValueError(f"{called(model)} gives no last hidden states without its lm_head")
    path = BEFORE_LM_HEAD.get(plain.config.model_type)
    return plain.get_submodule(path)(states) if path else states


def positions_of(attention_mask: Tensor) -> Tensor:
    """Position ids as `generate` makes them: tokens count from 0, padding is 0.

    Args:
        attention_mask: [B, L], 0 where padded.

    Example:
        >>> import torch
        >>> positions_of(torch.tensor([[0, 0, 1, 1, 1]])).tolist()
        [[0, 0, 0, 1, 2]]
    """
    return (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 0)


def without_peft(model: Any) -> Any:
    """The transformers model inside a PEFT model; its layers hold the adapters. Others as they are."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def called(model: Any) -> str:
    """A model's class, and where it came from, for messages."""
    plain = without_peft(model)
    name = str(getattr(plain.config, "_name_or_path", ""))
    return type(plain).__name__ + (f" ({name})" if name else "")
