"""A student made of its teacher: the layers that change the hidden states least are dropped.

Training it on the teacher's word then heals it. ShortGPT (arXiv 2403.03853) measures a layer's influence this way;
Minitron (arXiv 2407.14679) prunes and distils to make small models of large ones.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from .files import sync_tree, write_text
from .score.forward import called, last_hidden_states, without_peft
from .score.models import padded

# lists that name layers by their numbers, which would name others once some are dropped
_BY_NUMBER = ("mlp_only_layers", "no_rope_layer_indices", "attn_layer_indices", "full_attn_idxs", "global_attn_idx")


def decoder_layers(model: Any) -> nn.ModuleList:
    """The layers of a decoder, first to last.

    Raises:
        ValueError: a model without a list of them.
    """
    plain = without_peft(model)
    backbone = plain.get_decoder() if hasattr(plain, "get_decoder") else plain
    layers = getattr(backbone, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"{called(model)} has no list of decoder layers, so none can be dropped.")
    return layers


@torch.no_grad()
def block_influence(model: Any, batches: Sequence[tuple[Tensor, Tensor]]) -> list[float]:
    """How much each layer changes the hidden states: 1 − cos(h_in, h_out), the mean over all tokens (ShortGPT, Eq. 1).

    Args:
        model: a transformers decoder, in eval mode.
        batches: pairs of input_ids and attention_mask, int64 [B, T] each.

    Returns:
        One number per layer, in [0, 2].

    Raises:
        ValueError: no token, or a model without a list of layers.
    """
    layers = decoder_layers(model)
    sums, tokens = [0.0] * len(layers), 0
    mask = torch.zeros(0)

    def watch(number: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            cosine = torch.cosine_similarity(before.float(), after.float(), dim=-1)
            sums[number] += float((1 - cosine.double())[mask].sum())

        return hook

    hooks = [layer.register_forward_hook(watch(number), with_kwargs=True) for number, layer in enumerate(layers)]
    try:
        for input_ids, attention_mask in batches:
            mask = attention_mask.bool()
            tokens += int(mask.sum())
            last_hidden_states(model, input_ids, attention_mask)
    finally:
        for hook in hooks:
            hook.remove()
    if not tokens:
        raise ValueError("the influence of a layer is a mean over tokens, and there is none: give some text.")
    return [total / tokens for total in sums]


def least_influential(influence: Sequence[float], count: int) -> list[int]:
    """The numbers of the `count` layers with the least influence, ascending; never the first or the last.

    Args:
        influence: of each layer, see `block_influence`.
        count: how many, at least 1 and at most all but two.

    Raises:
        ValueError: a count out of range.

    Example:
        >>> least_influential([0.0, 0.3, 0.1, 0.2, 0.0], 2)
        [2, 3]
    """
    if not 1 <= count <= len(influence) - 2:
        raise ValueError(
            f"layers to drop are between 1 and {len(influence) - 2} of {len(influence)}, since the first and the last "
            f"stay; got {count}."
        )
    inner = sorted(range(1, len(influence) - 1), key=lambda number: (influence[number], number))
    return sorted(inner[:count])


def drop_layers(model: Any, numbers: Sequence[int]) -> Any:
    """The model without some of its layers, changed in place; its configuration says so.

    Args:
        model: a transformers decoder such as Llama, Qwen, Mistral or Gemma.
        numbers: of the layers, counted from 0.

    Returns:
        The model.

    Raises:
        ValueError: a number that no layer has, no layer left, or a configuration that names layers by their numbers.
    """
    layers, config = decoder_layers(model), without_peft(model).config.get_text_config()
    count = len(layers)
    unknown = sorted(set(numbers) - set(range(count)))
    if unknown or len(set(numbers)) >= count:
        raise ValueError(f"layers are numbered 0 to {count - 1} and one must stay; cannot drop {sorted(set(numbers))}.")
    for name in _BY_NUMBER:
        if getattr(config, name, None):
            raise ValueError(
                f"{called(model)} names layers by their numbers ({name}), so dropping some is not offered."
            )
    kept = [number for number in range(count) if number not in set(numbers)]
    for name, value in vars(config).items():
        of_layers = not name.endswith("token_id") and name != "architectures"  # several end tokens are no layers
        if of_layers and isinstance(value, list) and len(value) == count:
            setattr(config, name, [value[number] for number in kept])
    config.num_hidden_layers = len(kept)
    for number in sorted(set(numbers), reverse=True):
        del layers[number]
    for place, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):  # where the cache keeps its keys and values
                module.layer_idx = place  # type: ignore[assignment]  # to mypy a module holds modules and tensors
    return model


def save_tokenizer(tokenizer: Any, directory: Path) -> None:
    """Write a tokenizer, without a word on how it was read.

    transformers notes `local_files_only` in tokenizer_config.json, which HF_HUB_OFFLINE=1 sets. So the same model would
    have other bytes where it was written offline, and what is known by a hash of them would have to be made again.
    """
    for name in ("is_local", "local_files_only"):
        getattr(tokenizer, "init_kwargs", {}).pop(name, None)
    tokenizer.save_pretrained(directory)


def write_pruned(
    model: str,
    layers: int,
    output_dir: Path,
    prompts: Sequence[Any],
    *,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    max_new_tokens: int = 48,
    seed: int = 0,
) -> list[int]:
    """Write a model without its `layers` least influential layers, with its tokenizer and prune.json.

    The influence is measured on the model's own answers to some prompts, since that is what it will be asked to write.

    Args:
        model: a directory or a hub id.
        layers: how many to drop.
        output_dir: where the pruned model goes.
        prompts: plain or conversational; plain ones go through the chat template where there is one. Without a template
            the last message is taken as it stands.
        dtype: of the weights; "auto": as they were saved.
        device: where the influence is measured.
        trust_remote_code: run code that comes with the model.
        max_new_tokens: of an answer, at most.
        seed: of the answers' sampling.

    Returns:
        The numbers of the dropped layers, counted from 0.

    Raises:
        ValueError: layers out of range, or a model whose layers cannot be dropped.
    """
    from transformers import AutoTokenizer

    from .integrations import _trl
    from .rollout import generate

    def load(name: str) -> Any:
        found = _trl.create_model_from_path(
            name,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            trust_remote_code=trust_remote_code,
            device_map=None,
        )
        return found.to(device).eval().requires_grad_(False)

    loaded = load(model)
    count = len(decoder_layers(loaded))
    least_influential([0.0] * count, layers)  # the number of layers, before anything is generated
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left", trust_remote_code=trust_remote_code)
    if tokenizer.chat_template:
        prompts = [[{"role": "user", "content": text}] if isinstance(text, str) else text for text in prompts]
    else:
        prompts = [text if isinstance(text, str) else text[-1]["content"] for text in prompts]
    rollouts = [
        rollout
        for batch in generate(loaded, tokenizer, prompts, max_new_tokens=max_new_tokens, seed=seed, batch_size=32)
        for rollout in batch
    ]
    pieces = [rollouts[start : start + 32] for start in range(0, len(rollouts), 32)]
    influence = block_influence(loaded, [padded(piece, loaded.device) for piece in pieces])
    numbers = least_influential(influence, layers)
    drop_layers(loaded, numbers)
    probe, mask = padded(rollouts[:1], device)
    expected = last_hidden_states(loaded, probe, mask).float()
    kind = called(loaded)
    output_dir.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=output_dir, prefix=".pruned-") as folder:
        partial = Path(folder)
        loaded.save_pretrained(partial)
        save_tokenizer(tokenizer, partial)
        del loaded
        _check_loaded(last_hidden_states(load(folder), probe, mask).float(), expected, kind)
        about = {
            "model": model,
            "layers": count,
            "dropped": numbers,
            "influence": [round(value, 6) for value in influence],
            "prompts": len(prompts),
            "tokens": sum(len(rollout.prompt_ids) + len(rollout.completion_ids) for rollout in rollouts),
            "seed": seed,
        }
        write_text(partial / "prune.json", json.dumps(about, indent=1) + "\n")
        sync_tree(partial)
        # the configuration last: where it is, the model is whole
        for path in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):
            path.replace(output_dir / path.name)
    return numbers


def _check_loaded(states: Tensor, expected: Tensor, kind: str) -> None:
    """Refuse a model that is another once it is loaded again: one whose layers depend on how deep they stand."""
    if not torch.allclose(states, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max())):
        raise ValueError(
            f"{kind} gives other hidden states once it is loaded without these layers: what its layers do depends on "
            "their number, so dropping some is not offered."
        )
