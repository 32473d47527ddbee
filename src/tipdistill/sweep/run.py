"""Run the cells of a grid that are not finished, choose each row's learning rate on the way, and write the result.

The result is `sweep.json`, `sweep.md` and `sweep.csv` beside the cells; `workers.log` has what the runs printed.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Mapping
from typing import Any

from ..files import alone, write_text
from ..provenance import environment
from ..signals import StopRequest, stop
from .board import Board
from .cells import Cells, run_cell, source
from .grid import Cell
from .result import chosen_rate, csv_text, markdown, summarise
from .workers import Workers, cores

RESULT = "sweep.json"
LOG = "workers.log"
_NOTICE = "cells that are under way save a checkpoint first"


def run_sweep(
    cells: Cells, workers: int | None = None, threads: int | None = None, rerun_changed: bool = False
) -> dict[str, Any]:
    """Run what is not finished, and write the result.

    Args:
        cells: of a grid, checked (`Cells.check`).
        workers: cells at a time; None: one per core, with a GPU one.
        threads: of each worker; None: those that finished cells ran with, else the cores divided among the workers.
        rerun_changed: run cells again that were made with other settings or versions.

    Returns:
        What sweep.json holds; "failed" maps the key of a cell to why it has no figures.

    Raises:
        ValueError: another sweep is at work in the directory, or finished cells were made with something else.
    """
    import torch

    cells.directory.mkdir(parents=True, exist_ok=True)
    with alone(cells.directory, "sweep"):
        removed = cells.refuse_changed(rerun_changed)
        if removed:
            print(f"{removed} finished cells were made with other settings and run again.", flush=True)
        threads = threads or cells.kept_threads()
        if workers is None:
            workers = 1 if torch.cuda.is_available() else max(1, cores() // (threads or 1))
        threads = threads or max(1, cores() // workers)
        machine = environment("cuda" if torch.cuda.is_available() else "cpu", threads)
        run = {"commit": machine["commit"], "measured": machine["measured"], "workers": workers}
        results, failed = _run_cells(cells, workers, threads, run)
        return _write_result(cells, results, failed, workers, machine)


def _run_cells(
    cells: Cells, workers: int, threads: int, run: Mapping[str, Any]
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Key of a cell → its figures, and key → why it has none."""
    grid = cells.grid
    results: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    waiting = {row.key: [cell.key for cell in grid.first_cells(row)] for row in grid.rows}
    first = {key for keys in waiting.values() for key in keys}
    # seed by seed, so that whole rows can be compared early
    queue = deque(cell for row in zip(*(grid.first_cells(row) for row in grid.rows), strict=True) for cell in row)
    finished = sum(cells.known(cell) is not None for cell in cells.every_cell())
    board = Board(grid, finished, workers, threads)

    def settle(cell: Cell) -> None:
        """Once a row's first cells are done, its rate is known, and the others follow."""
        if cell.key not in first:
            return
        waiting[cell.row.key].remove(cell.key)
        if waiting[cell.row.key] or len(grid.learning_rates) == 1:
            return
        rate, means = chosen_rate(grid, cell.row, results)
        board.say_rate(cell.row, rate, means)
        if rate is not None:
            ended = {*results, *failed}
            queue.extend(last for last in grid.last_cells(cell.row, rate) if last.key not in ended)

    with Workers(workers, threads, cells.directory / LOG) as pool, board, StopRequest(_NOTICE, pool.kill) as request:
        request.waits = True
        while queue or pool.busy:
            if request.signum:
                pool.tell_to_stop()
                stop(request.signum)
            while queue and pool.idle:
                cell = queue.popleft()
                known = cells.known(cell)
                if known is None:
                    board.started(cell)
                    pool.start(cell, run_cell, cells.job(cell, threads, run))
                else:
                    results[cell.key] = known
                    board.kept(cell)
                    settle(cell)
            for cell, future in pool.finished(timeout=0.5) if pool.busy else []:
                error = future.exception()
                if isinstance(error, SystemExit):  # a signal that reached the worker alone
                    request.signum = request.signum or int(str(error.code)) - 128
                elif error is None:
                    results[cell.key] = future.result()
                    board.finished(cell, results[cell.key])
                else:
                    failed[cell.key] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                    board.failed(cell, failed[cell.key])
                if not request.signum:
                    settle(cell)
            board.refresh()
    return results, failed


def _write_result(
    cells: Cells, results: Mapping[str, Any], failed: Mapping[str, str], workers: int, machine: Mapping[str, Any]
) -> dict[str, Any]:
    settings = {**cells.base, **cells.common, **cells.grid.overrides}
    result = {
        **summarise(cells.grid, results, failed),
        "settings": settings,
        "workers": workers,
        "source": source(),
        **machine,
        "runs": _runs(results),
    }
    write_text(cells.directory / RESULT, json.dumps(result, indent=1) + "\n")
    write_text(cells.directory / "sweep.md", markdown(result))
    write_text(cells.directory / "sweep.csv", csv_text(result))
    return result


def _runs(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The sweeps that ran the cells, several where one was resumed; cells of an older version do not say which."""
    alike = Counter(json.dumps(result.get("run", {})) for result in results.values())
    return [{**json.loads(run), "cells": count} for run, count in alike.items()]
