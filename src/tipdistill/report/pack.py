"""Arrays and text on their way into a page: compact, and inert whatever they hold."""

from __future__ import annotations

import base64
import json
import zlib
from typing import Any

import numpy as np

# name in the page → what numpy calls it; little-endian, as every browser's typed arrays are
TYPES = {"u8": "<u1", "u16": "<u2", "u32": "<u4", "f32": "<f4"}
_HARMLESS = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}


def script_json(value: Any) -> str:
    r"""JSON that stays one JSON text inside a <script>: <, >, &, U+2028 and U+2029 are written as escapes.

    Args:
        value: what `json.dumps` takes; lone surrogates are allowed, NaN and infinities are not.

    Raises:
        ValueError: a number is NaN or infinite.

    Example:
        >>> print(script_json("</script>&"))
        "\u003c/script\u003e\u0026"
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # a lone surrogate has no UTF-8, and would make the file unwritable
    return text.translate(_HARMLESS).encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def short_floats(values: np.ndarray, mantissa_bits: int = 11) -> np.ndarray:
    """float32 rounded to `mantissa_bits` bits behind the leading one, so that the rest compresses to nothing.

    |x̃ − x| ≤ 2^−(mantissa_bits + 1) · |x|: 11 bits are three and a half decimal digits.

    Args:
        values: float [N], finite.
        mantissa_bits: 1 to 22.

    Example:
        >>> short_floats(np.array([1.0, 0.1])).tolist()
        [1.0, 0.100006103515625]
    """
    dropped = 23 - mantissa_bits
    bits = np.ascontiguousarray(values, dtype="<f4").view("<u4").astype(np.uint64)
    # rounds to nearest; a carry out of the mantissa raises the exponent, which is the right number too
    rounded = (bits + (1 << (dropped - 1))) >> dropped << dropped
    return rounded.astype("<u4").view("<f4")


class Pack:
    """Arrays one behind the other, compressed as one.

    Each array is written byte plane by byte plane (all lowest bytes first): neighbours are then alike, and deflate
    makes far less of them than of interleaved bytes.

    Example:
        >>> pack = Pack()
        >>> pack.add(np.arange(3), "u16")
        {'type': 'u16', 'at': 0, 'length': 3}
        >>> len(zlib.decompress(base64.b64decode(pack.text())))
        6
    """

    def __init__(self) -> None:
        self._planes: list[bytes] = []
        self._size = 0

    def add(self, values: np.ndarray, kind: str) -> dict[str, Any]:
        """Append an array and say where it lies.

        Args:
            values: any shape, read in C order; the page knows the shape.
            kind: a key of TYPES; the values must fit.
        """
        flat = np.ascontiguousarray(values).ravel()
        stored = flat.astype(TYPES[kind])
        assert kind == "f32" or bool((stored == flat).all()), f"values do not fit into {kind}"
        planes = stored.view(np.uint8).reshape(len(stored), stored.itemsize).T.tobytes()
        place = {"type": kind, "at": self._size, "length": len(stored)}
        self._planes.append(planes)
        self._size += len(planes)
        return place

    def text(self) -> str:
        """The compressed bytes (zlib) in base64."""
        return base64.b64encode(zlib.compress(b"".join(self._planes), 6)).decode("ascii")
