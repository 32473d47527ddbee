"""From the cells' figures to the table: means, intervals, paired differences.

A test task gives each problem of each seed an outcome: the share of its samples that are right, or the divergence from
the teacher over the tokens of its samples. Of the first more is better, of the second less.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from ..text import markdown_table
from .bootstrap import DRAWS, Bootstrap, interval
from .grid import Grid, Row

Results = Mapping[str, Mapping[str, Any]]


def chosen_rate(grid: Grid, row: Row, results: Results) -> tuple[float | None, dict[float, float]]:
    """The learning rate with the best mean over the validation seeds, of divergences the least; of equals the smallest.

    A rate that failed with a seed (a run that diverged) is not chosen.

    Args:
        grid: says which rates, task and seeds.
        row: of the grid.
        results: key of a cell → its figures, as far as there are any.

    Returns:
        The rate, None where none has all its seeds; and the mean of each rate that has.
    """
    if len(grid.learning_rates) == 1:
        return grid.learning_rates[0], {}
    assert grid.validation_task is not None
    means, least = {}, False
    for rate in grid.learning_rates:
        cells = [cell for cell in grid.first_cells(row) if cell.learning_rate == rate]
        if all(cell.key in results for cell in cells):
            measured = [results[cell.key]["tasks"][grid.validation_task] for cell in cells]
            means[rate], least = fmean(map(outcome, measured)), is_divergence(measured[0])
    if not means:
        return None, {}
    return min(means, key=lambda rate: (means[rate] if least else -means[rate], rate)), means


def summarise(grid: Grid, results: Results, failed: Mapping[str, str]) -> dict[str, Any]:
    """What sweep.json holds beside the machine: one entry per row, with every count that a figure rests on.

    Args:
        grid: what was asked for.
        results: key of a cell → its figures.
        failed: key of a cell → why it has none.
    """
    rated = []
    for row in grid.rows:
        rate, validation = chosen_rate(grid, row, results)
        cells = [] if rate is None else grid.last_cells(row, rate)
        rated.append((row, rate, validation, [(cell, results[cell.key]) for cell in cells if cell.key in results]))
    tables = {
        task: {
            row.key: {cell.seed: result["tasks"][task] for cell, result in runs} for row, _, _, runs in rated if runs
        }
        for task in grid.test
    }
    before = {
        task: {
            cell.seed: result["before"][task]
            for row, _, _, runs in rated
            if row == grid.reference()
            for cell, result in runs
        }
        for task in grid.test
    }
    rows = []
    for row, rate, validation, runs in rated:
        ran = [result for _, result in runs]
        rows.append(
            {
                "name": row.name,
                "rule": row.rule,
                "retention": row.retention,
                "overrides": dict(row.overrides),
                "learning_rate": rate,
                "validation": {f"{candidate:g}": mean for candidate, mean in validation.items()},
                "seeds": [cell.seed for cell, _ in runs],
                "trained_tokens": fmean(result["trained_tokens"] for result in ran) if ran else None,
                "seconds": fmean(result["seconds"] for result in ran) if ran else None,
                "peak_memory_gib": max(result["peak_memory_gib"] for result in ran) if ran else None,
                "tasks": {task: _of_task(grid, row, tables[task], before[task]) for task in grid.test if ran},
            }
        )
    drawn = "problems" if len(grid.seeds) == 1 else "seeds and problems"
    return {
        "num_samples": grid.num_samples,
        "test": list(grid.test),
        "seeds": list(grid.seeds),
        "validation": {"task": grid.validation_task, "seeds": list(grid.validation_seeds)},
        "learning_rates": list(grid.learning_rates),
        "interval": f"95 %, paired bootstrap over {drawn}, {DRAWS:,} draws",
        "before": {task: _figure(seeds) for task, seeds in before.items() if seeds},
        "rows": rows,
        "failed": dict(failed),
    }


def compared(
    first: Mapping[int, Sequence[float]], second: Mapping[int, Sequence[float]], samples: int = 1
) -> dict[str, Any]:
    """The paired difference of two rows over the seeds that both have.

    Args:
        first, second: seed → how many of its samples were correct at each problem, or the divergence there.
        samples: k of each problem, by which counts are divided; 1 for a divergence.

    Returns:
        {"mean", "interval", "seeds"} of first − second.

    Raises:
        ValueError: no seed in common.

    Example:
        >>> compared({0: [2, 1]}, {0: [1, 0]}, samples=2)
        {'mean': 0.5, 'interval': [0.5, 0.5], 'seeds': 1}
    """
    seeds = sorted(set(first) & set(second))
    if not seeds:
        raise ValueError("rows without a seed in common cannot be compared.")
    difference = _table(first, seeds, samples) - _table(second, seeds, samples)
    return _mean_and_interval(difference)


def gain_share(
    row: Mapping[int, Sequence[float]],
    whole: Mapping[int, Sequence[float]],
    before: Mapping[int, Sequence[float]],
    samples: int = 1,
    least: bool = False,
) -> dict[str, Any] | None:
    """(row − before) / (all tokens − before): how much of what all tokens gain a row gains.

    Args:
        row, whole, before: by seed and problem, see `compared`.
        samples: likewise.
        least: less is better (a divergence).

    Returns:
        {"mean", "interval", "seeds"}; None where all tokens do not gain for certain, since a share of nothing is none.
    """
    seeds = sorted(set(row) & set(whole) & set(before))
    if not seeds:
        return None
    sign = -1 if least else 1
    tables = [sign * _table(counts, seeds, samples) for counts in (row, whole, before)]
    bootstrap = _bootstrap(len(seeds), tables[0].shape[1])
    own, gain = (bootstrap.of(table - tables[2]) for table in tables[:2])
    if interval(gain)[0] <= 0:
        return None
    mean = (tables[0].mean() - tables[2].mean()) / (tables[1].mean() - tables[2].mean())
    gains = gain > 0  # a draw in which nothing is gained has no share
    return {"mean": float(mean), "interval": [*interval(own[gains] / gain[gains])], "seeds": len(seeds)}


def _of_task(grid: Grid, row: Row, table: dict[str, Any], before: dict[int, Any]) -> dict[str, Any]:
    own = table[row.key]
    values = {key: {seed: _values(figures) for seed, figures in seeds.items()} for key, seeds in table.items()}
    started = {seed: _values(figures) for seed, figures in before.items()}
    figure, least = _figure(own), any(map(is_divergence, own.values()))
    samples = 1 if least else grid.num_samples
    whole = next((other for other in grid.rows if other.rule == "all"), None)
    control = next((other for other in grid.rows if other.rule == "random" and other.retention == row.retention), None)
    for name, other in (("to_all", whole), ("to_random", control)):
        shared = other is not None and other != row and other.key in values and set(values[other.key]) & set(own)
        figure[name] = compared(values[row.key], values[other.key], samples) if shared and other else None
    figure["gain_share"] = None
    if whole is not None and whole.key in values and whole != row:
        figure["gain_share"] = gain_share(values[row.key], values[whole.key], started, samples, least)
    return figure


def _figure(seeds: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    first = next(iter(seeds.values()))
    least = is_divergence(first)
    values = {seed: _values(figures) for seed, figures in seeds.items()}
    means = [outcome(figures) for figures in seeds.values()]
    figure = _mean_and_interval(_table(values, sorted(values), 1 if least else first["num_samples"]))
    # seeds of which some collapsed and some did not can widen it beyond what an accuracy or a divergence can be
    figure["interval"] = [min(max(end, 0.0), math.inf if least else 1.0) for end in figure["interval"]]
    return {
        **figure,
        "by_seed": {str(seed): mean for seed, mean in zip(seeds, means, strict=True)},
        "mean_tokens": fmean(figures["mean_tokens"] for figures in seeds.values()),
        "truncated": fmean(figures["truncated"] for figures in seeds.values()),
        # as text: a list would take a line for each of thousands
        "divergence" if least else "correct": {
            str(seed): " ".join(f"{value:.6g}" if least else str(value) for value in row)
            for seed, row in values.items()
        },
    }


def counts_of(figure: Mapping[str, Any]) -> dict[int, list[int]]:
    """What `compared` takes, from a row's task (or "before") in sweep.json.

    Example:
        >>> counts_of({"correct": {"3": "0 2 1"}})
        {3: [0, 2, 1]}
    """
    return {int(seed): [int(count) for count in text.split()] for seed, text in figure["correct"].items()}


def divergences_of(figure: Mapping[str, Any]) -> dict[int, list[float]]:
    """The same of a task that measures a divergence, in nats.

    Example:
        >>> divergences_of({"divergence": {"3": "0.25 1.5"}})
        {3: [0.25, 1.5]}
    """
    return {int(seed): [float(value) for value in text.split()] for seed, text in figure["divergence"].items()}


def is_divergence(figures: Mapping[str, Any]) -> bool:
    """Whether a task's figures are divergences, of which less is better, and not counts of right answers."""
    return "divergence" in figures


def outcome(figures: Mapping[str, Any]) -> float:
    """The mean over the problems of a task's figures in a cell.

    Example:
        >>> outcome({"correct": [2, 1], "num_samples": 2}), outcome({"divergence": [0.5, 1.0]})
        (0.75, 0.75)
    """
    return (
        fmean(figures["divergence"]) if is_divergence(figures) else fmean(figures["correct"]) / figures["num_samples"]
    )


def _values(figures: Mapping[str, Any]) -> list[Any]:
    return figures["divergence"] if is_divergence(figures) else figures["correct"]


def _table(values: Mapping[int, Sequence[float]], seeds: Sequence[int], samples: int) -> np.ndarray:
    return np.array([values[seed] for seed in seeds], dtype=float) / samples


_BOOTSTRAPS: dict[tuple[int, int], Bootstrap] = {}


def _bootstrap(seeds: int, problems: int) -> Bootstrap:
    if (seeds, problems) not in _BOOTSTRAPS:
        _BOOTSTRAPS[seeds, problems] = Bootstrap(seeds, problems)
    return _BOOTSTRAPS[seeds, problems]


def _mean_and_interval(table: np.ndarray) -> dict[str, Any]:
    return {
        "mean": float(table.mean()),
        "interval": [*interval(_bootstrap(*table.shape).of(table))],
        "seeds": len(table),
    }


# As text.

_HEADINGS = (
    *("rule", "retention", "", "− all tokens", "− random", "share of the gain"),
    *("tokens trained on", "time", "peak memory", "rate"),
)


def markdown(result: Mapping[str, Any]) -> str:
    """The tables of a result, one per test task.

    Args:
        result: as `summarise` returns it.
    """
    parts = []
    for task in result["test"]:
        started = result["before"].get(task)
        figures = [started, *(row["tasks"].get(task) for row in result["rows"])]
        what = f"accuracy (mean@{result['num_samples']})"
        if any(is_divergence(figure) for figure in figures if figure is not None):
            what = "divergence, nats (less is better)"
        headings, lines = [text or what for text in _HEADINGS], []
        if started is not None:
            lines.append(["before distillation", "", _with_interval(started), *[""] * (len(headings) - 3)])
        lines += [_line(row, task) for row in result["rows"]]
        parts.append(f"**{task}**\n\n" + markdown_table(headings, lines))
    notes = [
        f"In brackets: {result['interval']} ({_seeds(result['seeds'])}). "
        "Differences are paired; the share of the gain is (row − before) / (all tokens − before)."
    ]
    if len(result["learning_rates"]) > 1:
        validation = result["validation"]
        notes.append(
            f"Each row's rate was chosen of {', '.join(f'{rate:g}' for rate in result['learning_rates'])} on "
            f"{validation['task']}, seeds {', '.join(map(str, validation['seeds']))}."
        )
    notes += [f"Failed: {key}: {why}" for key, why in result["failed"].items()]
    return "\n\n".join([*parts, *notes]) + "\n"


def _line(row: Mapping[str, Any], task: str) -> list[str]:
    figure = row["tasks"].get(task)
    start = [row["name"], f"{100 * row['retention']:g} %"]
    if figure is None:
        return [*start, "failed", *[""] * (len(_HEADINGS) - 3)]
    mean = _with_interval(figure)
    if figure["seeds"] < len(row["seeds"]):
        mean += f", {figure['seeds']} seeds"
    return [
        *start,
        mean,
        _with_interval(figure["to_all"], signed=True),
        _with_interval(figure["to_random"], signed=True),
        _with_interval(figure["gain_share"], percent=True),
        f"{row['trained_tokens']:,.0f}",
        f"{row['seconds']:.3g} s",
        f"{row['peak_memory_gib']:.2f} GiB",
        f"{row['learning_rate']:g}",
    ]


def _seeds(seeds: Sequence[int]) -> str:
    return f"one seed, {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds: {', '.join(map(str, seeds))}"


def _with_interval(figure: Mapping[str, Any] | None, signed: bool = False, percent: bool = False) -> str:
    if figure is None:
        return ""

    def text(value: float) -> str:
        written = f"{100 * value:.0f} %" if percent else f"{value:+.3f}" if signed else f"{value:.3f}"
        return written.replace("-", "−")

    return f"{text(figure['mean'])} [{text(figure['interval'][0])}, {text(figure['interval'][1])}]"


def csv_text(result: Mapping[str, Any]) -> str:
    """The result as CSV, one line per row and test task, intervals as two columns.

    "measure" is "accuracy" or "divergence"; "mean" is the mean of that.

    Args:
        result: as `summarise` returns it.
    """
    names = ["task", "measure", "name", "rule", "retention", "learning_rate", "seeds"]
    compared_as = ["to_all", "to_random", "gain_share"]
    for name in ("mean", *compared_as):
        names += [name, f"{name}_low", f"{name}_high"]
    names += ["trained_tokens", "seconds", "peak_memory_gib", "mean_tokens", "truncated"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    for task in result["test"]:
        for row in result["rows"]:
            figure = row["tasks"].get(task)
            measure = "" if figure is None else "divergence" if is_divergence(figure) else "accuracy"
            line = [task, measure, row["name"], row["rule"], row["retention"], row["learning_rate"], len(row["seeds"])]
            for shown in [figure, *(figure[name] if figure else None for name in compared_as)]:
                line += ["", "", ""] if shown is None else [shown["mean"], *shown["interval"]]
            line += [row["trained_tokens"], row["seconds"], row["peak_memory_gib"]]
            line += [figure["mean_tokens"], figure["truncated"]] if figure else ["", ""]
            writer.writerow(line)
    return out.getvalue()
