"""tipdistill train: one configuration from a recipe and flags, checked, then trained."""

from __future__ import annotations

from ..recipes import recipe_names


def main(argv: list[str]) -> int:
    """Distil as the recipe and the flags say; returns the exit code.

    Args:
        argv: `--config F.yaml` (a file or a packaged recipe's name) and any field as a flag; `--help`, or `--help all`.

    Raises:
        ValueError, FileNotFoundError, ImportError: anything that can be refused before weights are loaded.
    """
    if "-h" in argv or "--help" in argv:
        from ..recipes.fields import help_text

        print(help_text(argv[-1] == "all", recipe_names()))
        return 0
    from ..recipes.fields import check_flags

    check_flags(argv)
    from ..recipes.run import run_recipe

    return run_recipe(argv)
