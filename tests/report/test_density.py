"""Hexagons hold the tokens that are nearest to their centres."""

import numpy as np
import pytest

from tipdistill.report.density import hexagons
from tipdistill.report.tip_map import FLOOR


@pytest.mark.parametrize("seed", range(3))
def test_every_token_lies_in_the_nearest_hexagon(seed):
    draw = np.random.default_rng(seed)
    entropy, divergence = draw.random(500), 10.0 ** draw.uniform(-9, 2, 500)
    lattice = hexagons(entropy, divergence, 0.1)
    assert lattice.tokens.sum() == 500
    assert (np.bincount(lattice.of_token) == lattice.tokens).all()
    height = np.log10(np.maximum(divergence, FLOOR))
    unit = (lattice.top - lattice.bottom) / lattice.rows
    # every centre of both lattices, brute force
    columns, rows = np.meshgrid(np.arange(-1, lattice.columns + 2), np.arange(-1, lattice.rows + 2))
    centres = np.concatenate(
        [np.stack([columns, rows], -1).reshape(-1, 2), np.stack([columns + 0.5, rows + 0.5], -1).reshape(-1, 2)]
    )
    points = np.stack([entropy * lattice.columns, (height - lattice.bottom) / unit], -1)
    offset = points[:, None] - centres
    distance = offset[..., 0] ** 2 + 3 * offset[..., 1] ** 2
    own = np.stack([lattice.x * lattice.columns, (lattice.y - lattice.bottom) / unit], -1)[lattice.of_token]
    own_distance = (points[:, 0] - own[:, 0]) ** 2 + 3 * (points[:, 1] - own[:, 1]) ** 2
    assert own_distance == pytest.approx(distance.min(axis=1), abs=1e-9)


def test_extremes_lie_inside():
    lattice = hexagons(np.array([0.0, 1.0]), np.array([0.0, 1e4]), 0.1)
    assert lattice.bottom < lattice.y.min() < lattice.y.max() < lattice.top
    assert lattice.x.tolist() == pytest.approx([0.0, 1.0], abs=0.51 / lattice.columns)
