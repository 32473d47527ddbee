"""tipdistill sweep: every cell of a grid is a run of `tipdistill train`; then one table of them all."""

from __future__ import annotations

from pathlib import Path

from ..sweep import markdown, read_grid
from ..sweep.cells import Cells
from ..sweep.run import LOG, RESULT, run_sweep
from .flags import Parser


def main(argv: list[str]) -> int:
    """Run the cells of a grid that are not finished, and write the table; returns the exit code, 1 where a cell failed.

    Args:
        argv: the grid's YAML file, and flags.

    Raises:
        ValueError, FileNotFoundError: a grid, a recipe, a model or a file that would not run, cells that were made with
            other settings, or another sweep in the same directory.
    """
    parser = Parser(
        prog="tipdistill sweep",
        description="Run rule × retention × learning rate × seed over a recipe, and compare with intervals.",
        allow_abbrev=False,
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
    options = parser.read(argv)
    for name in ("workers", "threads"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(options, name)}.")
    grid = read_grid(options.grid)
    cells = Cells(grid, options.output_dir or grid.output_dir)
    cells.check()
    if options.dry_run:
        finished = sum(cells.known(cell) is not None for cell in cells.every_cell())
        print(f"{grid.number_of_cells()} cells in {len(grid.rows)} rows, {finished} finished; nothing was run.")
        return 0
    result = run_sweep(cells, options.workers, options.threads, options.rerun_changed)
    directory, failed = cells.directory, result["failed"]
    print(markdown(result))
    print(f"{directory / RESULT} · sweep.md · sweep.csv; `tipdistill report {directory}` draws the page.")
    if failed:
        print(f"{len(failed)} cells failed; the same command tries them again, {directory / LOG} has why:")
        print("\n".join(f"  {key}: {why}" for key, why in failed.items()), flush=True)
    return 1 if failed else 0
