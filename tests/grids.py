"""Grids for tests."""

import yaml

from tipdistill.sweep import Grid, read_grid


def grid_of(tmp_path, learning_rates, seeds, validation_seeds=(0,)) -> Grid:
    """A small grid on the arithmetic task, read from a file as any other."""
    asked = {
        "base": "laptop",
        "cells": {"all": 1.0, "soft_or": [0.5, 0.2], "random": [0.2]},
        "learning_rates": list(learning_rates),
        "seeds": list(seeds),
        "validation": {"task": "arithmetic[:8]", "seeds": list(validation_seeds)},
        "test": "arithmetic[8:24]",
        "num_samples": 2,
    }
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(asked, sort_keys=False))
    return read_grid(path)
