"""Text for people: the nearest known name, Markdown tables, and blocks of a document that a command writes."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

# C0 and C1 but for tab and line feed; line and paragraph separators, marks of direction, lone surrogates
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

# What to do where one model gives probability 0 to what the other can say, and a divergence is infinite. All of it at
# once: a rule that reads such a divergence is refused like a loss that is one.
STAY_FINITE = (
    "Forbid these tokens to both (−∞ in the same rows of both lm_heads), or train on the Jensen-Shannon divergence "
    "(divergence='jsd', in a TIPConfig beta=0.5) of tokens that a rule selects by what stays finite, such as 'entropy'."
)


def near_names(name: Any, known: Iterable[str], cutoff: float = 0.6) -> list[str]:
    """The known names that are like a given one, the nearest first, two at most.

    Args:
        name: what was given.
        known: what is allowed.
        cutoff: from 0, anything, to 1, the same.

    Example:
        >>> near_names("trian", ["train", "plan"])
        ['train']
    """
    return difflib.get_close_matches(str(name), list(known), n=2, cutoff=cutoff)


def nearest(name: Any, known: Iterable[str]) -> str:
    """A hint to append to an error about an unknown name; empty where none is near.

    Args:
        name: what was given.
        known: what is allowed.

    Example:
        >>> nearest("promt", ["prompt", "answer"])
        " Did you mean 'prompt'?"
    """
    near = near_names(name, known)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""


def check_known(kind: str, name: Any, known: Iterable[str]) -> None:
    """Refuse a name that is not known.

    Args:
        kind: what it names, as the error calls it.
        name: what was given.
        known: what is allowed.

    Raises:
        ValueError: it is none of them; the nearest is named.

    Example:
        >>> check_known("divergence", "reverse_k", ["reverse_kl", "jsd"])
        Traceback (most recent call last):
        ValueError: divergence must be one of reverse_kl, jsd, got 'reverse_k'. Did you mean 'reverse_kl'?
    """
    allowed = list(known)
    if name not in allowed:
        raise ValueError(f"{kind} must be one of {', '.join(allowed)}, got {name!r}.{nearest(name, allowed)}")


def printable(text: Any) -> str:
    """A text as a terminal may show it: control characters and marks that turn the writing direction stand as escapes.

    File names, names from a server and what a model wrote may hold them; a terminal would obey them. Line breaks and
    tabs are left.

    Example:
        >>> printable("a\\x1b[31mred\\u202e")
        'a\\\\x1b[31mred\\\\u202e'
    """
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode("ascii"), str(text))


def with_error(value: float | None, error: float | None) -> str:
    """A figure and what follows its ±, which is left out where there is none: one sample has no deviation.

    Args:
        value: the figure; None: the ± alone.
        error: a standard error or a deviation; NaN or None where it does not exist.

    Example:
        >>> with_error(0.5, 0.1), with_error(0.5, float("nan")), with_error(None, 0.1), with_error(None, None)
        ('0.500 ± 0.100', '0.500', '± 0.100', '–')
    """
    exists = error is not None and math.isfinite(error)
    parts = [f"{value:.3f}"] if value is not None else []
    return " ".join([*parts, *([f"± {error:.3f}"] if exists else [])]) or "–"


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table.

    Example:
        >>> print(markdown_table(["rule", "kept"], [["soft_or", "50 %"]]))
        | rule | kept |
        | --- | --- |
        | soft_or | 50 % |
    """
    lines = [list(headings), ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(' '.join(cell.splitlines()) for cell in line)} |" for line in lines)


def replace_blocks(document: str, kind: str, content: Callable[[str], str | None]) -> str:
    """Write anew what stands between `<!-- kind:NAME -->` and `<!-- /kind -->`.

    Args:
        document: the text.
        kind: of the blocks.
        content: NAME → what belongs between the marks; None leaves the block as it is.

    Example:
        >>> print(replace_blocks("<!-- bench:cpu -->\\nold\\n<!-- /bench -->", "bench", str.upper))
        <!-- bench:cpu -->
        CPU
        <!-- /bench -->
    """

    def block(match: re.Match[str]) -> str:
        text = content(match[2])
        return match[0] if text is None else f"{match[1]}{text}\n{match[3]}"

    return re.sub(rf"(<!-- {kind}:([\w.-]+) -->\n).*?(<!-- /{kind} -->)", block, document, flags=re.S)
