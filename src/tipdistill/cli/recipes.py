"""tipdistill recipes: the packaged recipes, and where `--config NAME` finds them."""

from __future__ import annotations

from ..recipes import recipe_head, recipe_names, recipe_path
from ..recipes.fields import SCHEMA


def main(argv: list[str]) -> int:
    """List the recipes with their hardware and command; print one (`show NAME`), or their schema's path (`schema`).

    Raises:
        ValueError: unknown arguments, or an unknown name (the nearest are given).
    """
    if argv in (["-h"], ["--help"]):
        print("usage: tipdistill recipes [show NAME | schema]")
        return 0
    if argv == ["schema"]:
        print(SCHEMA)
        return 0
    if len(argv) == 2 and argv[0] == "show":
        print(recipe_path(argv[1]).read_text(encoding="utf-8"), end="")
        return 0
    if argv:
        raise ValueError(f"expected no arguments, `show NAME` or `schema`; got {' '.join(argv)!r}.")
    for name in recipe_names():
        summary, notes = recipe_head(recipe_path(name))
        print(f"{name}\n  {summary}")
        print("".join(f"  {label.lower()}: {notes[label]}\n" for label in ("Hardware", "Command")))
    return 0
