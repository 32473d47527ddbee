"""tipdistill train: one configuration from a recipe and flags, checked, then trained."""

from __future__ import annotations

from ..recipes.run import run_recipe


def main(argv: list[str]) -> int:
    """Distil as the recipe and the flags say; returns the exit code.

    Args:
        argv: `--config F.yaml` (a file or a packaged recipe's name) and any field as a flag.

    Raises:
        ValueError, FileNotFoundError, ImportError: anything that can be refused before weights are loaded.
    """
    return run_recipe(argv)
