"""Every private name of TRL that the trainer touches, in one place.

TRL's trainer is subclassed, so its private methods and attributes are our interface. `OVERRIDDEN` and `CALLED` name the
methods with the parameters we rely on, `ATTRIBUTES` what we read or write on the instance; tests/contract/test_trl.py
compares them with the installed TRL and says what moved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from trl.models import prepare_deepspeed
from trl.trainer.utils import (
    RepeatSampler,
    create_model_from_path,
    disable_dropout_in_model,
    maybe_gather_lm_head_ctx,
)

from ..types import Head

__all__ = [
    "ATTRIBUTES",
    "CALLED",
    "GENERATION_ATTRIBUTES",
    "GENERATION_METHODS",
    "MULTIMODAL_KEYS",
    "OVERRIDDEN",
    "EpochSampler",
    "create_model_from_path",
    "disable_dropout_in_model",
    "head",
    "logit_transform",
    "maybe_gather_lm_head_ctx",
    "prepare_deepspeed",
    "whole",
]

OVERRIDDEN = {
    "_compute_loss": ("self", "unwrapped_student", "inputs", "num_items_in_batch"),
    "_generate_and_score_completions": ("self", "inputs"),
    "_generate_single_turn": ("self", "prompt_ids", "images", "multimodal_fields", "has_tool_images"),
    "_get_train_sampler": ("self", "dataset"),
    "_prepare_inputs": ("self", "generation_batch"),
    "compute_loss": ("self", "model", "inputs", "return_outputs", "num_items_in_batch"),
    "training_step": ("self", "model", "inputs", "num_items_in_batch"),
}
CALLED = {
    "_get_last_hidden_state": ("self", "unwrapped_model", "input_ids", "attention_mask", "logits_to_keep"),
}
ATTRIBUTES = (
    "_buffered_inputs",
    "_forward_redirection",
    "_is_vlm",
    "_last_loaded_step",
    "_metrics",
    "_step",
    "_tokenizer",
    "beta",
    "chat_template_kwargs",
    "eos_token_ids",
    "generation_config",
    "generation_kwargs",
    "shuffle_dataset",
    "teacher_model",
    "temperature",
    "use_vllm",
    "vllm_generation",
)
# of trl.generation.vllm_generation.VLLMGeneration; `llm` is there in colocate mode
GENERATION_METHODS = {"generate": ("self", "prompts", "images", "num_generations"), "sync_weights": ("self",)}
GENERATION_ATTRIBUTES = (
    "generation_kwargs",
    "llm",
    "logprobs",
    "max_completion_length",
    "min_p",
    "mode",
    "repetition_penalty",
    "structured_outputs_regex",
    "temperature",
    "top_k",
    "top_p",
)
MULTIMODAL_KEYS = (
    "pixel_values",
    "image_grid_thw",
    "pixel_attention_mask",
    "spatial_shapes",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


class EpochSampler(RepeatSampler):
    """TRL's RepeatSampler, reseeded with seed + epoch at every epoch.

    TRL's sampler draws each epoch's order from one running generator, so a run resumed in epoch 2 replays the order
    of epoch 0. Here the order is a function of (seed, epoch) alone, and a resumed run continues as if it had never
    stopped. `Trainer` calls `set_epoch` at the start of every epoch.
    """

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        if self.shuffle:
            self.generator.manual_seed((self.seed or 0) + self.epoch)
        return super().__iter__()


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


def head(model: Any, layer: Any, hidden: Tensor) -> Head:
    """Hidden states [N, H] with the lm_head `layer` that projects them, and what the model does to the logits."""
    logit_scale, softcap = logit_transform(model.config)
    weight = whole(layer.weight, hidden.dtype)
    assert weight is not None
    return Head(hidden.to(weight.device), weight, whole(layer.bias, hidden.dtype), logit_scale, softcap)


def whole(parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The full tensor of a parameter that FSDP2 may have sharded, gathered once; others pass unchanged."""
    if isinstance(parameter, torch.distributed.tensor.DTensor):
        return parameter.full_tensor().to(dtype)
    return parameter
