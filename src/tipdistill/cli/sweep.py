"""tipdistill sweep: every cell of a grid is a run of `tipdistill train`; then one table of them all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import sweep
from ..dotted import names_only
from ..recipes.trust import FLAG, confirm
from ..sweep import markdown, read_grid
from ..sweep.cells import Cells
from ..sweep.grid import code_in_grid
from ..sweep.run import LOG, RESULT, run_sweep
from ..terminal import say
from .flags import Parser


def main(argv: list[str]) -> int:
    """Run the cells of a grid that are not finished, and write the table; returns the exit code, 1 where a cell failed.

    Args:
        argv: the grid's YAML file, and flags.

    Raises:
        ValueError, FileNotFoundError: a grid, a recipe, a model or a file that would not run, cells that were made with
            other settings, or another sweep in the same directory.
    """
    options = parser().read(argv)
    for name in ("workers", "threads"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(options, name)}.")
    code = [] if options.trust_recipe or _is_packaged(options.grid) else code_in_grid(options.grid)
    if options.dry_run:  # imports nothing that the grid names
        with names_only():
            return _dry_run(options, code)
    confirm(options.grid, code)
    grid = read_grid(options.grid)
    cells = Cells(grid, options.output_dir or grid.output_dir)
    cells.check()
    result = run_sweep(cells, options.workers, options.threads, options.rerun_changed)
    directory, failed = cells.directory, result["failed"]
    say(markdown(result))
    say(f"{directory / RESULT} · sweep.md · sweep.csv; `tipdistill report {directory}` draws the page.")
    if failed:
        say(f"{len(failed)} cells failed; the same command tries them again, {directory / LOG} has why:")
        say("\n".join(f"  {key}: {why}" for key, why in failed.items()))
    return 1 if failed else 0


def parser() -> Parser:
    """The flags of `tipdistill sweep`."""
    parser = Parser(
        "sweep",
        "Run rule × retention × learning rate × seed over a recipe, and compare with intervals.",
        defaults=False,
    )
    parser.add_argument("grid", type=Path, help="YAML: base, cells, learning_rates, seeds, test, ... (docs/sweep.md)")
    parser.add_argument(
        "--output_dir", type=Path, help="where everything goes (default: the grid's, or runs/<its name>)"
    )
    parser.add_argument("--workers", type=int, help="cells at a time (default: one per core; with a GPU one)")
    parser.add_argument("--threads", type=int, help="of each worker (default: the cores divided among the workers)")
    parser.add_argument("--dry_run", action="store_true", help="check everything, say what would run, run nothing")
    parser.add_argument(
        "--rerun_changed", action="store_true", help="run cells again that were made with other settings or versions"
    )
    parser.add_argument(FLAG, action="store_true", help="run the code that the grid and its recipe name")
    return parser


def _is_packaged(path: Path) -> bool:
    return path.resolve().parent == Path(sweep.__file__).resolve().parent


def _dry_run(options: Any, code: list[str]) -> int:
    grid = read_grid(options.grid)
    cells = Cells(grid, options.output_dir or grid.output_dir)
    cells.check(trusted=not code)
    finished = sum(cells.known(cell) is not None for cell in cells.every_cell())
    print(f"{grid.number_of_cells()} cells in {len(grid.rows)} rows, {finished} finished; nothing was run.")
    if code:
        say(f"Named and not imported; {FLAG} runs it: {'; '.join(code)}")
    return 0
