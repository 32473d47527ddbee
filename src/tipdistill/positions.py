"""How many positions does a model have, and do a prompt and its completion fit into them?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Llama and most others (GPT-2's n_positions is known by this name too), MPT, Whisper.
_LIMITS = ("max_position_embeddings", "max_seq_len", "max_target_positions")
_STRETCHING = ("linear", "yarn")  # rotary positions made for more than the limit that stands beside them
_CHANGING = ("dynamic", "longrope", "su")  # beyond the original limit each token's turn with the longest row of a batch


def position_limit(config: Any) -> int | None:
    """Tokens that a model's positions reach, prompt and completion together; None: no limit that it tells.

    A recurrent model has none, nor has one with ALiBi. Rotary positions that are scaled reach further. Those that
    change with the length of the batch reach to where they begin to change: beyond, what a rollout scores would depend
    on the rollouts beside it.

    Args:
        config: of a transformers model.

    Example:
        >>> from transformers import GPT2Config, LlamaConfig, MambaConfig
        >>> position_limit(GPT2Config()), position_limit(MambaConfig())
        (1024, None)
        >>> yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "rope_theta": 1e4}
        >>> position_limit(LlamaConfig(max_position_embeddings=1024, rope_parameters=yarn))
        4096
    """
    text = config.get_text_config()
    given = [getattr(text, name, None) for name in _LIMITS]
    limit = next((value for value in given if isinstance(value, int) and value > 0), None)
    if limit is None or getattr(text, "alibi", False):
        return None
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    # one dict, or one for each kind of layer
    parts = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    changing = [part for part in parts if part.get("rope_type", part.get("type")) in _CHANGING]
    if changing:
        originals = [part.get("original_max_position_embeddings") for part in changing]
        originals.append(getattr(text, "original_max_position_embeddings", None))
        return min(limit, *(value for value in originals if isinstance(value, int) and value > 0), limit)
    scaled = [part for part in parts if part.get("rope_type", part.get("type")) in _STRETCHING and part.get("factor")]
    return max(
        limit, *(int((part.get("original_max_position_embeddings") or limit) * part["factor"]) for part in scaled), 0
    )


def check_positions(
    limits: Mapping[str, int | None], longest: int, completion: int, option: str, remedy: str = "", of: str = ""
) -> None:
    """Refuse prompts that leave a completion too few positions.

    Args:
        limits: "student" or "teacher" → its `position_limit`.
        longest: tokens of the longest prompt.
        completion: tokens of a completion, at most.
        option: what sets the completion's length.
        remedy: what else may be done.
        of: whose prompts they are, "eval_dataset"; "" where there is one set.

    Raises:
        ValueError: whose positions do not suffice, and what to lower.
    """
    for who, room in limits.items():
        if room is not None and completion >= room:
            raise ValueError(
                f"{option} {completion} takes all of the {room} positions of the {who}, and a prompt needs some too: "
                f"lower {option}."
            )
        if room is not None and longest + completion > room:
            raise ValueError(
                f"the longest prompt{f' of {of}' if of else ''} has {longest} tokens, and with {option} {completion} "
                f"that is more than the {room} positions of the {who}: lower {option}{remedy}."
            )
