"""The student's own distribution, and nothing else: what a generation_config says of sampling stays out of rollouts.

On-policy distillation trains on what the student itself would write. `generate` of transformers fills every setting
that a caller leaves open from the model's generation_config, so a `min_p` or a `num_beams` that its authors chose for
their users would narrow the rollouts without a word. Only the ids of special tokens are taken from there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig

# of a generation_config, but not of the distribution that is sampled
_NO_SAMPLING = ("transformers_version", "max_length", "max_new_tokens", "use_cache", "return_dict_in_generate")
# values that change nothing
_NEUTRAL = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "diversity_penalty": 0.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
}


@contextmanager
def sampled_with(model: Any, config: Any) -> Iterator[None]:
    """The model with `config` as its generation_config, so that `generate` has no other defaults to take.

    Args:
        model: a transformers model, with PEFT or without; afterwards it has its own configuration again.
        config: a `GenerationConfig`.

    Example:
        >>> from types import SimpleNamespace
        >>> model = SimpleNamespace(generation_config="its own")
        >>> with sampled_with(model, "ours"):
        ...     model.generation_config
        'ours'
        >>> model.generation_config
        'its own'
    """
    # PEFT hands its configuration down to the model inside, and does not take it back
    layers = [model, model.get_base_model()] if hasattr(model, "get_base_model") else [model]
    own = [layer.generation_config for layer in layers]
    try:
        for layer in layers:
            layer.generation_config = config
        yield
    finally:
        for layer, its_own in zip(layers, own, strict=True):
            layer.generation_config = its_own


def left_out(own: Any, used: Any) -> dict[str, Any]:
    """What a model's generation_config says of sampling and the rollouts are not drawn with, name → value.

    Args:
        own: the model's `GenerationConfig`.
        used: the one that rollouts are drawn with.

    Example:
        >>> from transformers import GenerationConfig
        >>> left_out(GenerationConfig(min_p=0.3, top_p=0.9, eos_token_id=1), GenerationConfig(top_p=0.9))
        {'min_p': 0.3}
    """

    def changes(name: str, value: Any) -> bool:
        there = getattr(used, name, None)
        if there is None:
            return value is not False and value != _NEUTRAL.get(name)
        return there != value

    return {
        name: value
        for name, value in own.to_diff_dict().items()
        if name not in _NO_SAMPLING
        and not name.startswith(("_", "output_"))
        and (not name.endswith("_token_id") or name.startswith("forced_"))
        and changes(name, value)
    }


def end_tokens(*sources: Any) -> list[int]:
    """Ids that end a completion, each once, in the order of the sources.

    Args:
        sources: what has an `eos_token_id`, a number, a list or None: generation_configs and tokenizers.

    Example:
        >>> from types import SimpleNamespace
        >>> end_tokens(SimpleNamespace(eos_token_id=[2, 1]), SimpleNamespace(eos_token_id=1))
        [2, 1]
    """
    ids: list[int] = []
    for source in sources:
        own = getattr(source, "eos_token_id", None)
        ids += [own] if isinstance(own, int) else list(own or [])
    return list(dict.fromkeys(ids))


def saved_end_tokens(name: str, revision: str | None, configuration: Any, processor: Any) -> list[int]:
    """Ids that end the completions of a model that is not loaded.

    Args:
        name, revision: of the model.
        configuration: which says it where there is no generation_config.json.
        processor: its tokenizer, or a processor that holds one.
    """
    try:
        generation: Any = GenerationConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError):
        generation = configuration.get_text_config()
    return end_tokens(generation, getattr(processor, "tokenizer", processor))
