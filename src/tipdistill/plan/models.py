"""The sizes of a model, from its configuration alone; those of the paper's pairs are built in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..text import near_names

# As published in the models' config.json on the hub. Sizes only: what does not change a byte or a flop is left out.
PUBLISHED: dict[str, dict[str, Any]] = {
    name: {
        "model_type": kind,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "head_dim": 128,
        "intermediate_size": intermediate,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }
    for name, kind, hidden, layers, heads, key_value_heads, intermediate, vocabulary, tied in (
        ("Qwen/Qwen3-0.6B", "qwen3", 1024, 28, 16, 8, 3072, 151_936, True),
        ("Qwen/Qwen3-1.7B", "qwen3", 2048, 28, 16, 8, 6144, 151_936, True),
        ("Qwen/Qwen3-4B", "qwen3", 2560, 36, 32, 8, 9728, 151_936, True),
        ("Qwen/Qwen3-8B", "qwen3", 4096, 36, 32, 8, 12_288, 151_936, False),
        ("Qwen/Qwen3-14B", "qwen3", 5120, 40, 40, 8, 17_408, 151_936, False),
        ("Qwen/Qwen3-32B", "qwen3", 5120, 64, 64, 8, 25_600, 151_936, False),
        ("Qwen/Qwen2.5-1.5B-Instruct", "qwen2", 1536, 28, 12, 2, 8960, 151_936, True),
        ("Qwen/Qwen2.5-14B-Instruct", "qwen2", 5120, 48, 40, 8, 13_824, 152_064, False),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama", 4096, 32, 32, 8, 14_336, 128_256, False),
        ("meta-llama/Llama-3.3-70B-Instruct", "llama", 8192, 80, 64, 8, 28_672, 128_256, False),
    )
}
# DeepseekV3Config's defaults are DeepSeek-V3's sizes.
PUBLISHED["deepseek-ai/DeepSeek-V3"] = {"model_type": "deepseek_v3"}
# The same with the rows of Qwen3's lm_head, since student and teacher need one tokenizer: no such model is published.
PUBLISHED["moe-671b-qwen3-vocabulary"] = {"model_type": "deepseek_v3", "vocab_size": 151_936}


@dataclass(frozen=True)
class Sizes:
    """Parameters of a model, in numbers, and what a token costs.

    Attributes:
        parameters: all of them, a tied lm_head once.
        backbone: those that a token's forward multiplies with, lm_head and embedding left out; of routed experts the
            share that a token is sent to.
        lm_head: V·H.
        layer: those of the largest layer, which a sharded engine gathers at a time.
        largest: those of the largest single parameter.
        vocabulary: rows of the lm_head.
        width: of the hidden states.
        layers: of the decoder.
        attention: Σ over layers of heads · (width of a key + width of a value) / 2.
        tied: whether lm_head and embedding are one.
    """

    parameters: int
    backbone: int
    lm_head: int
    layer: int
    largest: int
    vocabulary: int
    width: int
    layers: int
    attention: int
    tied: bool


def read_config(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The configuration of a model: a directory's, a built-in one's, or the hub's.

    Args:
        name: a directory, a name in PUBLISHED, or a hub id.
        revision: on the hub.
        trust_remote_code: run code that comes with it.

    Raises:
        ValueError: it cannot be read; the nearest built-in names are given.

    Example:
        >>> read_config("Qwen/Qwen3-8B").num_hidden_layers
        36
    """
    if not Path(name).is_dir() and name in PUBLISHED:
        return AutoConfig.for_model(**PUBLISHED[name])
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # a damaged config.json makes transformers raise anything
        near = near_names(name, PUBLISHED, cutoff=0.4) or list(PUBLISHED)
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"the configuration of {name!r} could not be read ({reason}): give a directory with a config.json, a hub "
            f"id or a built-in name such as {', '.join(near)}."
        ) from error


@contextmanager
def on_paper() -> Iterator[None]:
    """Tensors made inside have sizes and no memory (torch's fake tensors)."""
    with FakeTensorMode():
        yield


def _mask(*args: Any, attention_mask: Tensor | None = None, **settings: Any) -> Tensor | None:
    """The mask of scaled_dot_product_attention, left out where it hides nothing but the future.

    transformers looks into the mask for that, which it cannot do in a tensor without memory, and then makes one always.
    """
    if attention_mask is None and settings.get("local_size") is None:
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, **settings)


AttentionInterface.register("on_paper", sdpa_attention_forward)
AttentionMaskInterface.register("on_paper", _mask)


def build(config: Any, dtype: torch.dtype) -> Any:
    """A model whose weights take no memory; to be called inside `on_paper`."""
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="on_paper")
    # the loop over experts asks which tokens each of them got, and a tensor without memory cannot say
    model.config._experts_implementation = "grouped_mm"
    return model


def sizes(config: Any) -> Sizes:
    """Count a model's parameters, from its own code, without building it in memory.

    Args:
        config: of a decoder-only transformers model.

    Raises:
        ValueError: an architecture without attention heads or layers to count.

    Example:
        >>> counts = sizes(read_config("Qwen/Qwen3-8B"))
        >>> round(counts.parameters / 1e9, 2), counts.lm_head == 151_936 * 4096
        (8.19, True)
    """
    return _sizes(config.to_json_string(use_diff=False))


def config_of(text: str) -> Any:
    """A configuration back from the JSON it was written to."""
    return AutoConfig.for_model(**json.loads(text))


@lru_cache(maxsize=64)
def _sizes(text: str) -> Sizes:
    config = config_of(text)
    of_text = config.get_text_config()
    heads, layers = (getattr(of_text, name, None) for name in ("num_attention_heads", "num_hidden_layers"))
    if not heads or not layers:
        raise ValueError(f"{config.model_type} has no num_attention_heads or num_hidden_layers: it cannot be planned.")
    with on_paper():
        model = build(config, torch.bfloat16)
        named = {name: (parameter.numel(), parameter.ndim) for name, parameter in model.named_parameters()}
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        tied, (vocabulary, width) = embedding is head, head.shape
    outside = embedding.numel() + (0 if tied else head.numel())
    total = sum(count for count, _ in named.values())
    routed = sum(count for name, (count, _) in named.items() if ".experts." in name)
    share = 1.0
    if routed:
        experts = next(
            getattr(of_text, name)
            for name in ("n_routed_experts", "num_experts", "num_local_experts")
            if getattr(of_text, name, None)
        )
        share = of_text.num_experts_per_tok / experts
    of_layer: dict[str, int] = {}
    for name, (count, _) in named.items():
        layer = name.partition(".layers.")[2].partition(".")[0]
        if layer:
            of_layer[layer] = of_layer.get(layer, 0) + count
    head_dim = getattr(of_text, "head_dim", None) or of_text.hidden_size // heads
    key = getattr(of_text, "qk_nope_head_dim", 0) + getattr(of_text, "qk_rope_head_dim", 0) or head_dim
    value = getattr(of_text, "v_head_dim", None) or head_dim
    return Sizes(
        parameters=total,
        backbone=int(total - outside - routed + routed * share),
        lm_head=head.numel(),
        layer=max(of_layer.values()),
        largest=max(count for count, _ in named.values()),
        vocabulary=vocabulary,
        width=width,
        layers=layers,
        attention=layers * heads * (key + value) // 2,
        tied=tied,
    )
