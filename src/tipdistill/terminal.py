"""What is printed: names and texts stand as they are, so that no escape, markup or emoji code in them is obeyed."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

from .text import printable


class PlainConsole(Console):
    """A rich console that shows every text as it is: paths may hold `[red]`, names escapes of a terminal.

    Args:
        named: of `rich.console.Console`.

    Example:
        >>> PlainConsole(width=40).print("runs/[red]a\\x1b[31m:smile:")
        runs/[red]a\\x1b[31m:smile:
    """

    def __init__(self, **named: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, **named})

    def render_str(self, text: str, **named: Any) -> Text:
        return super().render_str(printable(text), **named)


def say(text: Any = "", *, end: str = "\n", file: TextIO | None = None) -> None:
    """Print a text that holds names, at once.

    Args:
        text: with line breaks as they are.
        end: after it, as it stands.
        file: standard output where None.

    Example:
        >>> say("runs/a\\x1b[31m")
        runs/a\\x1b[31m
    """
    print(printable(text), end=end, file=file or sys.stdout, flush=True)
