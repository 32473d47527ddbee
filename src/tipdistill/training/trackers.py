"""The TIP map and the most disputed tokens of recorded steps, for Weights & Biases, trackio and TensorBoard.

The other trackers take numbers, which Trainer sends; token records and reports are on the disk for everyone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from ..records import open_records
from ..text import markdown_table
from ..types import Selection

logger = logging.getLogger(__name__)
MAP, TOKENS = "tip/map", "tip/tokens"
MAP_FILE = "tip_map.png"
COLUMNS = (
    *("rollout", "position", "before", "token", "entropy", "reverse_kl", "quadrant", "kept", "student", "teacher"),
)
ROWS = 50
_CONTEXT = 8  # tokens


def show_records(callbacks: Iterable[Any], directory: Path, step: int) -> None:
    """Send the map of a step's records, and its tokens with the largest divergence, to the trackers that show them.

    A tracker that fails costs a warning, not the run.

    Args:
        callbacks: of the trainer, transformers' integrations among them.
        directory: of the records; the map is written into it.
        step: optimiser steps taken.
    """
    showing = [
        (callback, _SENDERS[type(callback).__name__])
        for callback in callbacks
        if type(callback).__name__ in _SENDERS and _is_set_up(callback)
    ]
    if not showing:
        return
    path, rows = _drawn(directory), disputed(directory)
    for callback, send in showing:
        try:
            send(callback, path, rows, step)
        except Exception as error:  # a tracker is somebody else's code, and may raise anything
            logger.warning(f"Step {step}: {type(callback).__name__} did not take the TIP map: {error!r:.200}")


def disputed(directory: Path) -> list[list[Any]]:
    """The tokens of records with the largest reverse KL, largest first: values of `COLUMNS`.

    Args:
        directory: of the records.
    """
    table = open_records(directory).read().to_pydict()
    stretch = list(zip(table["rollout"], table.get("turn", table["rollout"]), strict=True))
    order = sorted(range(len(table["token"])), key=lambda row: -table["reverse_kl"][row])[:ROWS]
    rows = []
    for row in order:
        first = row  # back to the rollout's beginning, or to what a tool said before the student's turn
        while first > max(0, row - _CONTEXT) and stretch[first - 1] == stretch[row]:
            first -= 1
        choices = [table[f"{whose}_top5"][row] for whose in ("student", "teacher")]
        rows.append(
            [
                table["rollout"][row],
                table["position"][row],
                "".join(table["token"][first:row]),
                table["token"][row],
                round(table["entropy"][row], 4),
                round(table["reverse_kl"][row], 4),
                f"Q{table['quadrant'][row]}",
                table["kept"][row],
                *(f"{top[0]['token']} {top[0]['probability']:.2f}" if top else "" for top in choices),
            ]
        )
    return rows


def _drawn(directory: Path) -> Path:
    from ..report.tip_map import tip_map  # loads matplotlib

    records = open_records(directory)
    table = records.read(["kept", "score"])
    kept = torch.tensor(table["kept"].to_numpy(zero_copy_only=False))
    selection = Selection(kept, kept.float(), torch.tensor(table["score"].to_numpy()))
    return tip_map(records.scores(), directory / MAP_FILE, selection=selection)


def _is_set_up(callback: Any) -> bool:
    """Whether the run has begun for it, on this process."""
    return getattr(callback, "tb_writer", None) is not None or bool(getattr(callback, "_initialized", False))


def _to_wandb(callback: Any, path: Path, rows: list[list[Any]], step: int) -> None:
    wandb = callback._wandb
    shown = {MAP: wandb.Image(str(path)), TOKENS: wandb.Table(columns=list(COLUMNS), data=rows)}
    wandb.log({**shown, "train/global_step": step})


def _to_trackio(callback: Any, path: Path, rows: list[list[Any]], step: int) -> None:
    import pandas

    trackio = callback._trackio
    table = trackio.Table(dataframe=pandas.DataFrame(rows, columns=list(COLUMNS)))
    trackio.log({MAP: trackio.Image(str(path)), TOKENS: table, "train/global_step": step})


def _to_tensorboard(callback: Any, path: Path, rows: list[list[Any]], step: int) -> None:
    from matplotlib.image import imread

    pixels = (imread(path)[..., :3] * 255).round().astype("uint8")
    callback.tb_writer.add_image(MAP, pixels, step, dataformats="HWC")
    lines = [[str(value).replace("|", "\\|").replace("\n", "↵") for value in row] for row in rows]
    callback.tb_writer.add_text(TOKENS, markdown_table(list(COLUMNS), lines), step)
    callback.tb_writer.flush()


_SENDERS: dict[str, Callable[[Any, Path, list[list[Any]], int], None]] = {
    "WandbCallback": _to_wandb,
    "TrackioCallback": _to_trackio,
    "TensorBoardCallback": _to_tensorboard,
}
