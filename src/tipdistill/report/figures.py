"""The page's figures as files."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .dataset import Dataset
from .history import Run, is_accuracy, is_divergence
from .tip_map import FAINT, INK, KEPT, save_figure, tip_map_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg")
# Okabe and Ito's colours, as in the page; lines differ in their dashes as well
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C", "#000000")
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.6)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
MOST_CONFUSIONS = 20
# title → metrics; a metric that a run lacks is left out
PANELS: dict[str, tuple[str, ...]] = {
    "loss": ("loss",),
    "accuracy": (),
    "held-out divergence (nats)": (),
    "% of the tokens in Q1": ("quadrants/q1",),
    "% of the tokens in Q2": ("quadrants/q2",),
    "% of the tokens in Q3": ("quadrants/q3",),
    "% of the tokens in Q4": ("quadrants/q4",),
    "% of the divergence kept": ("selection/kept_divergence_share",),
    "divergence of the dropped tokens (nats)": ("selection/dropped_divergence",),
    "log-ratio to the student that wrote (nats)": ("rollout/log_ratio",),
    "entropy (nats)": ("entropy",),
    "reverse KL (nats)": ("reverse_kl",),
    "peak memory (GiB)": ("memory/peak_gib",),
    "tokens per second": ("tokens_per_second",),
}
STAGES = ("rollout", "teacher", "score", "select", "record", "loss", "optimizer")
STAGE_COLOURS = ("#0072B2", "#CC79A7", "#56B4E9", "#E69F00", "#8C8C8C", "#D55E00", "#009E73")


def draw_figures(
    folder: Path, name: str, payload: dict[str, Any], dataset: Dataset, rule: str, retention: float
) -> list[Path]:
    """The TIP map, what the rules keep, and the confusions of one set of records.

    Args:
        folder: made where there is none.
        name: of the records, part of the files' names; empty where there is but one set.
        payload: what the page shows of it, see `dataset_payload`.
        dataset: the same with every token.
        rule, retention: outlined on the map.
    """
    folder.mkdir(parents=True, exist_ok=True)
    end = f"-{re.sub(r'[^A-Za-z0-9.]+', '-', name).strip('-')}" if name else ""
    title = f"{name + ': ' if name else ''}kept by {rule} at {100 * retention:g} %"
    figure = tip_map_figure(dataset.scores, dataset.selection(rule, retention), _plain(title), *dataset.thresholds)
    written = _save(figure, folder / f"tip_map{end}")
    written += _save(_budgets(payload), folder / f"budgets{end}")
    if payload["confusions"]["tables"][2]:
        written += _save(
            _confusions(payload["confusions"], sum(payload["shares"]["mass"])), folder / f"confusions{end}"
        )
    return written


def draw_training(folder: Path, runs: Sequence[Run]) -> list[Path]:
    """Small multiples of what the runs logged, and where their time went."""
    folder.mkdir(parents=True, exist_ok=True)
    return _save(_training(runs), folder / "training")


def _save(figure: Figure, stem: Path) -> list[Path]:
    paths = [stem.with_name(stem.name + suffix) for suffix in SUFFIXES]
    for path in paths:
        save_figure(figure, path)
    return paths


def _plain(text: str) -> str:
    """Text as matplotlib shall draw it: no mathematics, no line breaks."""
    shown = "".join({"\n": "↵", "\t": "⇥"}.get(c, c if c.isprintable() else "\N{REPLACEMENT CHARACTER}") for c in text)
    return shown.replace("$", r"\$")


def _short(text: str, most: int) -> str:
    """The end of a text, since it is there that names differ and that a context meets its token."""
    return _plain(text if len(text) <= most else f"…{text[1 - most :]}")


def _token(text: str | None) -> str:
    return _plain((text or "∅")[:12].replace(" ", "␣"))


def _axes_style(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors=FAINT)


def _budgets(payload: dict[str, Any]) -> Figure:
    """Share of the divergence and of Q3 that every rule keeps at every retention."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 3.8), dpi=160, layout="constrained")
    shares, retentions = payload["shares"], 100 * np.array(payload["retentions"])
    total, q3 = sum(shares["mass"]) or 1.0, shares["tokens"][2] or 1
    for place, title in enumerate(("share of the divergence kept", "share of Q3 kept")):
        axes = figure.add_subplot(1, 2, place + 1)
        for number, rule in enumerate(payload["rules"]):
            kept = (
                np.sum(shares["kept_mass"][number], axis=1) / total
                if place == 0
                else np.array(shares["kept_tokens"][number])[:, 2] / q3
            )
            axes.plot(retentions, 100 * kept, label=rule["name"], **_line(number))
        axes.set_xscale("log")
        axes.set_xticks([1, 2, 5, 10, 20, 50, 100], labels=["1", "2", "5", "10", "20", "50", "100"])
        axes.minorticks_off()
        axes.set_ylim(-2, 102)
        axes.set_title(title, loc="left", fontsize=9.5, color=INK)
        axes.set_xlabel("retention, % of the tokens", fontsize=8.5, color=INK)
        axes.yaxis.set_major_formatter("{x:.0f} %")
        _axes_style(axes)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    return figure


def _line(number: int) -> dict[str, Any]:
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": DASHES[(number // len(COLOURS) + number) % len(DASHES)],
        "linewidth": 1.4,
    }


def _confusions(confusions: dict[str, Any], total: float) -> Figure:
    from matplotlib.figure import Figure

    table = confusions["tables"][2][:MOST_CONFUSIONS]
    figure = Figure(figsize=(8.6, 0.9 + 0.27 * len(table)), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    labels = [
        f"{_short('…' + row['before'], 24)} [{_token(row['student'])} → {_token(row['teacher'])}]" for row in table
    ]
    masses = [100 * row["mass"] / (total or 1.0) for row in table]
    axes.barh(range(len(table)), masses, color=KEPT, height=0.7)
    for place, row in enumerate(table):
        axes.text(masses[place], place, f"  {row['count']:,}×", va="center", fontsize=8, color=FAINT)
    axes.set_yticks(range(len(table)), labels=labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("share of the whole divergence, %", fontsize=8.5, color=INK)
    axes.set_title("confident mistakes: context [student → teacher]", loc="left", fontsize=9.5, color=INK)
    _axes_style(axes)
    return figure


def _training(runs: Sequence[Run]) -> Figure:
    from matplotlib.figure import Figure

    panels = []
    for title, metrics in PANELS.items():
        lines = []
        for number, run in enumerate(runs):
            told = is_divergence if "divergence" in title else is_accuracy
            named = metrics or [metric for metric in run.series if told(metric)][:1]
            lines += [(number, run.series[metric]) for metric in named if metric in run.series]
        if lines:
            panels.append((title, lines))
    columns = 3
    rows = max(1, math.ceil((len(panels) + 1) / columns))
    figure = Figure(figsize=(10.5, 2.4 * rows), dpi=160, layout="constrained")
    for place, (title, lines) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, place + 1)
        if title.startswith("%"):
            lines = [(number, (steps, [100 * value for value in values])) for number, (steps, values) in lines]
        for number, (steps, values) in lines:
            marker = "o" if len(steps) < 12 else None
            axes.plot(steps, values, marker=marker, markersize=3, **_line(number))
        low, high = min(min(v) for _, (_, v) in lines), max(max(v) for _, (_, v) in lines)
        if title.startswith("%") or title in ("accuracy", "entropy (nats)", "peak memory (GiB)"):
            axes.set_ylim(0, 1.05 * high or 1)
        elif low > 0 and high / low > 20:
            axes.set_yscale("log")
        axes.set_title(title, loc="left", fontsize=9, color=INK)
        _axes_style(axes)
    axes = figure.add_subplot(rows, columns, len(panels) + 1)
    left = np.zeros(len(runs))
    for number, stage in enumerate(STAGES):
        seconds = np.array([np.mean(run.series.get(f"time/{stage}", ([], [0.0]))[1]) for run in runs])
        axes.barh(range(len(runs)), seconds, left=left, color=STAGE_COLOURS[number], height=0.6, label=stage)
        left += seconds
    axes.set_yticks(range(len(runs)), labels=[_short(run.name, 14) for run in runs])
    axes.invert_yaxis()
    axes.set_title("seconds per step", loc="left", fontsize=9, color=INK)
    axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.12), ncols=3)
    _axes_style(axes)
    for number, run in enumerate(runs):
        figure.axes[0].plot([], [], label=_plain(run.name), **_line(number))
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=4, frameon=False, fontsize=8
    )
    return figure
