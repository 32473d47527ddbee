"""Every private name of TRL that the trainer touches, in one place.

TRL's trainer is subclassed, so its private methods and attributes are our interface. `OVERRIDDEN` names the methods
with the parameters we rely on, `ATTRIBUTES` what we read or write on the instance; tests/contract/test_trl.py compares
them with the installed TRL and says what moved.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from trl.models import prepare_deepspeed
from trl.trainer import distillation_trainer
from trl.trainer.utils import (
    RepeatSampler,
    create_model_from_path,
    disable_dropout_in_model,
    maybe_gather_lm_head_ctx,
    split_pixel_values_by_grid,
    unsplit_pixel_values_by_grid,
)

from ..environments.play import parsed_turn
from ..text import printable

__all__ = [
    "ATTRIBUTES",
    "GENERATION_ATTRIBUTES",
    "GENERATION_METHODS",
    "MULTIMODAL_KEYS",
    "OVERRIDDEN",
    "TOKEN_KEYS",
    "EpochSampler",
    "create_model_from_path",
    "disable_dropout_in_model",
    "maybe_gather_lm_head_ctx",
    "prepare_deepspeed",
    "take_rollouts",
    "without_false_counts",
]

OVERRIDDEN = {
    "_compute_loss": ("self", "unwrapped_student", "inputs", "num_items_in_batch"),
    "_generate_and_score_completions": ("self", "inputs"),
    "_get_last_hidden_state": ("self", "unwrapped_model", "input_ids", "attention_mask", "logits_to_keep"),
    "_generate_single_turn": ("self", "prompt_ids", "images", "multimodal_fields", "has_tool_images"),
    "_get_train_sampler": ("self", "dataset"),
    "_prepare_inputs": ("self", "generation_batch"),
    "_tool_call_loop": (
        *("self", "prompts", "prompt_ids", "completion_ids", "completions", "images"),
        "multimodal_fields",
    ),
    "_tokenize_prompts": ("self", "prompts"),
    "compute_loss": ("self", "model", "inputs", "return_outputs", "num_items_in_batch"),
    "training_step": ("self", "model", "inputs", "num_items_in_batch"),
}
ATTRIBUTES = (
    "_buffered_inputs",
    "_forward_redirection",
    "_is_vlm",
    "_last_loaded_step",
    "_metrics",
    "_step",
    "_tokenizer",
    "_tool_dict",
    "beta",
    "chat_template",
    "chat_template_kwargs",
    "eos_token_ids",
    "generation_config",
    "generation_kwargs",
    "shuffle_dataset",
    "teacher_model",
    "temperature",
    "tools",
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
    "vllm_client",
)
# of a generation batch, [B, ...] each: the tokens, and what else a model may be fed
TOKEN_KEYS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
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
# by which the images of a batch are told apart: of each rollout, a list of B numbers
IMAGE_COUNTS = ("num_images", "num_tiles")


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


def without_false_counts(batch: dict[str, Any]) -> dict[str, Any]:
    """A generation batch without the numbers of images where these lie by rollouts already, padded: [B, images, ...].

    Idefics and SmolVLM have them so. TRL tells this from one row per image by the number of rows alone, and where there
    are as many images as rollouts it would hand images to the wrong ones.

    Example:
        >>> import torch
        >>> padded = torch.zeros(2, 2, 3, 8, 8)  # two of the first rollout, none of the second
        >>> sorted(without_false_counts({"pixel_values": padded, "num_images": [2, 0]}))
        ['pixel_values']
    """
    images = batch.get("pixel_values")
    if images is None or images.ndim != 5 or "image_sizes" in batch:  # 5 axes and sizes: the tiles of LLaVA-NeXT
        return batch
    return {key: value for key, value in batch.items() if key not in IMAGE_COUNTS}


def take_rollouts(batch: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """Some rollouts of a generation batch as models see them: tokens, images and the dataset's rows.

    Images are cut as TRL cuts them into micro-batches: models lay them out in several ways, few by rollouts.

    Args:
        batch: `TOKEN_KEYS`, [B, ...] each; `MULTIMODAL_KEYS` and `IMAGE_COUNTS` where there are images; maybe
            "examples", B rows.
        rows: int64 [b], which rollouts.

    Example:
        >>> import torch
        >>> tokens, images = torch.tensor([[1], [2], [3]]), torch.ones(3, 1)
        >>> batch = {"prompt_ids": tokens, "pixel_values": images, "num_images": [2, 1, 0]}
        >>> part = take_rollouts(batch, torch.tensor([1, 2]))
        >>> part["prompt_ids"].tolist(), part["num_images"], len(part["pixel_values"])
        ([[2], [3]], [1, 0], 1)
    """
    keys = (*TOKEN_KEYS, *MULTIMODAL_KEYS, *IMAGE_COUNTS, "examples")
    by_rollout = split_pixel_values_by_grid({key: batch[key] for key in keys if batch.get(key) is not None})
    numbers = rows.tolist()
    return unsplit_pixel_values_by_grid(
        {
            key: value[rows] if isinstance(value, Tensor) else [value[number] for number in numbers]
            for key, value in by_rollout.items()
        }
    )


def _shown(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, list):
        return [_shown(inside) for inside in value]
    return {name: _shown(inside) for name, inside in value.items()} if isinstance(value, dict) else value


def print_completions(prompts: list[Any], completions: list[Any], *rest: Any, **named: Any) -> None:
    """What `log_completions` prints, without the escapes that a model may have written."""
    _print_completions_of_trl(_shown(prompts), _shown(completions), *rest, **named)


# by another name where this module was loaded before
if distillation_trainer.print_prompt_completions_sample.__name__ != print_completions.__name__:
    _print_completions_of_trl = distillation_trainer.print_prompt_completions_sample
    distillation_trainer.print_prompt_completions_sample = print_completions
distillation_trainer.parse_response = parsed_turn  # which a model's words do not make fail
