"""The text of tokens that are no text on their own."""

from __future__ import annotations

from collections.abc import Sequence


def shown_bytes(raw: bytes) -> str:
    """Bytes that are no UTF-8, as a reader can tell them apart.

    Example:
        >>> shown_bytes(b"\\xf0\\x9f")
        '⟨F0 9F⟩'
    """
    return f"⟨{raw.hex(' ').upper()}⟩"


def joined_texts(raw: Sequence[bytes | None]) -> dict[int, str]:
    """What to show for tokens whose bytes make a character only together.

    Where consecutive such tokens complete their characters, the first of them gets the whole text and the others none;
    bytes that never do are shown as bytes.

    Args:
        raw: the bytes of each token of a rollout, None where its own text serves.

    Returns:
        Place → text, for the tokens with bytes alone.

    Example:
        >>> joined_texts([None, b"\\xf0\\x9f", b"\\x99\\x82", None, b"\\xe2"])
        {1: '🙂', 2: '', 4: '⟨E2⟩'}
    """
    shown: dict[int, str] = {}
    start, begun = 0, b""

    def give_up(end: int) -> None:
        nonlocal begun
        shown.update({lone: shown_bytes(raw[lone] or b"") for lone in range(start, end)} if begun else {})
        begun = b""

    for place, piece in enumerate(raw):
        if piece is None:
            give_up(place)
            continue
        if begun and _state(begun + piece) == "broken":
            give_up(place)
        start = start if begun else place
        begun += piece
        state = _state(begun)
        if state == "whole":
            shown.update({start: begun.decode("utf-8")} | dict.fromkeys(range(start + 1, place + 1), ""))
            begun = b""
        elif state == "broken":
            give_up(place + 1)
    give_up(len(raw))
    return shown


def _state(raw: bytes) -> str:
    """ "whole" UTF-8, "begun" where more bytes can complete it, or "broken"."""
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return "begun" if error.reason == "unexpected end of data" else "broken"
    return "whole"
