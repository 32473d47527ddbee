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
    start, held = 0, b""
    for place, piece in enumerate([*raw, None]):
        if piece is not None:
            start, held = (start, held + piece) if held else (place, piece)
            try:
                text = held.decode("utf-8")
            except UnicodeDecodeError:
                continue
            shown.update({start: text} | dict.fromkeys(range(start + 1, place + 1), ""))
            held = b""
        elif held:
            shown.update({lone: shown_bytes(raw[lone] or b"") for lone in range(start, place)})
            held = b""
    return shown
