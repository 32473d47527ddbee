"""Hexagons over entropy and divergence, and the tokens in each."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .tip_map import FLOOR

COLUMNS, ROWS = 44, 24  # as in tip_map


@dataclass(frozen=True)
class Hexagons:
    """The hexagons that hold a token.

    Attributes:
        columns, rows: of the lattice; a hexagon is 1 / columns wide.
        bottom, top: log₁₀ of the divergences (nats) at the lower and upper edge; x runs from 0 to 1.
        x, y: centres, float64 [K], y as log₁₀ of nats.
        tokens: int64 [K].
        of_token: int64 [N] in 0..K−1, the hexagon of each token.
    """

    columns: int
    rows: int
    bottom: float
    top: float
    x: np.ndarray
    y: np.ndarray
    tokens: np.ndarray
    of_token: np.ndarray


def hexagons(entropy: np.ndarray, divergence: np.ndarray, divergence_threshold: float) -> Hexagons:
    """Sort tokens into a lattice of hexagons: centres (i, √3·j) and those shifted by half a step, the nearer one wins.

    Args:
        entropy: ĥ, float [N] in [0, 1].
        divergence: nats, float [N], finite; below 10⁻⁶ counts as 10⁻⁶.
        divergence_threshold: nats; the lattice reaches a decade to either side of it.

    Example:
        >>> lattice = hexagons(np.array([0.0, 0.0, 1.0]), np.array([1e-3, 1e-3, 2.0]), 0.1)
        >>> lattice.tokens.tolist(), lattice.of_token.tolist()
        ([2, 1], [0, 0, 1])
    """
    height, border = np.log10(np.maximum(divergence, FLOOR)), math.log10(divergence_threshold)
    # room for the quadrants' names
    bottom, top = float(min(height.min(), border - 1) - 0.5), float(max(height.max(), border + 1) + 0.7)
    across = np.asarray(entropy, dtype=np.float64) * COLUMNS
    up = (height - bottom) / (top - bottom) * ROWS
    near = np.round(across), np.round(up)
    shifted = np.floor(across) + 0.5, np.floor(up) + 0.5
    # distances in the lattice's own measure, where its hexagons are regular
    distance = [(across - x) ** 2 + 3 * (up - y) ** 2 for x, y in (near, shifted)]
    second = distance[1] < distance[0]
    columns, rows = (np.where(second, b, a) for a, b in zip(near, shifted, strict=True))
    # every centre is a whole number of half steps
    key = (2 * columns).astype(np.int64) * (2 * ROWS + 3) + (2 * rows).astype(np.int64)
    cells, of_token, tokens = np.unique(key, return_inverse=True, return_counts=True)
    x = cells // (2 * ROWS + 3) / 2 / COLUMNS
    y = bottom + cells % (2 * ROWS + 3) / 2 / ROWS * (top - bottom)
    return Hexagons(COLUMNS, ROWS, bottom, top, x, y, tokens, of_token)
