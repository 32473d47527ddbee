"""How rows and figures are written in the tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

NAMES = {
    "all": "all tokens",
    "entropy_sampling": "entropy, sampled",
    "soft_or": "Soft-OR",
    "soft_or_log": "Soft-OR (log)",
    "q3": "Q3",
    "complement:soft_or": "bottom half",
    "gradient_norm": "gradient norm",
    "gradient_norm_sampling": "gradient norm, sampled",
    "q3 guarded": "Q3, raised by the drift guard",
    "signal_to_curvature": "signal to curvature",
}


def row_name(name: str) -> str:
    """The name of a row as the tables have it.

    Example:
        >>> row_name("soft_or batch")
        'Soft-OR, over the batch'
    """
    plain = name.removesuffix(" batch")
    return NAMES.get(plain, plain.replace("_", " ")) + (", over the batch" if plain != name else "")


def percent(share: float) -> str:
    """
    Example:
        >>> percent(-0.05)
        '−5 %'
    """
    return f"{100 * share:.0f} %".replace("-", "−")


def signed(value: float) -> str:
    """
    Example:
        >>> signed(-0.05)
        '−0.050'
    """
    return f"{value:+.3f}".replace("-", "−")


def brackets(figure: Mapping[str, Any], text: Callable[[float], str]) -> str:
    """The interval of a figure, each end written by `text`."""
    return f"[{', '.join(text(value) for value in figure['interval'])}]"


def with_interval(figure: Mapping[str, Any]) -> str:
    """
    Example:
        >>> with_interval({"mean": 0.5, "interval": [0.4, 0.6]})
        '0.500 [0.400, 0.600]'
    """
    return f"{figure['mean']:.3f} {brackets(figure, '{:.3f}'.format)}"


def signed_with_interval(difference: Mapping[str, Any]) -> str:
    """
    Example:
        >>> signed_with_interval({"mean": 0.5, "interval": [-0.4, 1.4]})
        '+0.500 [−0.400, +1.400]'
    """
    return f"{signed(difference['mean'])} {brackets(difference, signed)}"
