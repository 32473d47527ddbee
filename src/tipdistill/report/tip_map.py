"""The TIP map: where a student's tokens lie between certain and uncertain, right and wrong."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..files import replacing
from ..select.normalize import clipped_entropy
from ..select.quadrants import DIVERGENCE_THRESHOLD, ENTROPY_THRESHOLD, NAMES, quadrant_shares, quadrants
from ..types import Selection, TokenScores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")
# nats; smaller divergences are rounding and are drawn at the lower edge
FLOOR = 1e-6
# Blue against vermilion (Okabe and Ito): told apart by colour-blind readers, and in grey by lightness
TOKENS, DIVERGENCE, KEPT = "#9ECAE1", "#08519C", "#D55E00"
INK, FAINT, TRACK = "#222222", "#6B6B6B", "#F0F0F0"


@torch.no_grad()
def tip_map(
    scores: TokenScores,
    path: str | Path,
    *,
    selection: Selection | None = None,
    title: str | None = None,
    entropy_threshold: float = ENTROPY_THRESHOLD,
    divergence_threshold: float = DIVERGENCE_THRESHOLD,
) -> Path:
    """Draw the density of tokens over entropy and divergence, with the four quadrants (paper Table 1).

    x: ĥ, the entropy as Soft-OR normalises it. y: KL(P_S ‖ P_T) in nats, on a logarithmic scale. Beside the map stand
    each quadrant's share of the tokens, its share of the divergence, and how much of it a selection keeps; the hexagons
    most of whose tokens are kept are outlined.

    Args:
        scores: statistics with entropy_norm (or entropy) and reverse_kl (nats), float [N].
        path: a .png, .svg or .pdf file; written in full or not at all, in a folder that is made where there is none.
        selection: what a rule keeps of these tokens.
        title: above the map.
        entropy_threshold: border of the quadrants, in [0, 1].
        divergence_threshold: border of the quadrants, in nats, > 0.

    Returns:
        The path.

    Raises:
        ValueError: no token, a statistic that is missing or not finite, a selection of another length, a threshold out
            of range, or an unknown suffix.

    Example:
        >>> import tempfile
        >>> generator = torch.Generator().manual_seed(0)
        >>> scores = TokenScores(entropy_norm=torch.rand(99, generator=generator),
        ...                      reverse_kl=torch.rand(99, generator=generator))
        >>> tip_map(scores, Path(tempfile.mkdtemp()) / "map.svg").suffix
        '.svg'
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"a TIP map is a {', '.join(SUFFIXES)} file, got {str(path)!r}.")
    save_figure(tip_map_figure(scores, selection, title, entropy_threshold, divergence_threshold), path)
    return path


def save_figure(figure: Figure, path: Path) -> None:
    """Save a figure in full or not at all, in a folder that is made where there is none; the suffix is the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, durable=False) as partial:
        figure.savefig(partial, format=path.suffix[1:].lower())


@torch.no_grad()
def tip_map_figure(
    scores: TokenScores,
    selection: Selection | None = None,
    title: str | None = None,
    entropy_threshold: float = ENTROPY_THRESHOLD,
    divergence_threshold: float = DIVERGENCE_THRESHOLD,
) -> Figure:
    """The figure of `tip_map`, to be saved in several formats; the same arguments, and raises the same."""
    if divergence_threshold <= 0:
        raise ValueError(f"divergence_threshold must be > 0 on a logarithmic axis, got {divergence_threshold}.")
    quadrant = quadrants(scores, entropy_threshold, divergence_threshold)
    if len(quadrant) == 0:
        raise ValueError("there is no token to draw: give the scores of at least one completion token.")
    if selection is not None and len(selection.mask) != len(quadrant):
        raise ValueError(f"the selection is of {len(selection.mask)} tokens, the scores of {len(quadrant)}.")
    if not bool(scores.require("reverse_kl").isfinite().all()):
        raise ValueError("a reverse_kl is infinite and has no place on the map: the teacher gives probability 0.")
    return _figure(scores, quadrant, selection, title, entropy_threshold, divergence_threshold)


def _figure(
    scores: TokenScores,
    quadrant: torch.Tensor,
    selection: Selection | None,
    title: str | None,
    entropy_threshold: float,
    divergence_threshold: float,
) -> Figure:
    from matplotlib.figure import Figure  # no pyplot: its global state belongs to the caller

    entropy = scores.require("entropy") if scores.entropy_norm is None else scores.entropy_norm
    divergence = scores.require("reverse_kl").double().clamp(min=0)
    kept = None if selection is None else selection.mask.double()

    figure = Figure(figsize=(8.6, 5.0), dpi=200, layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(2.7, 1), height_ratios=(1, 0.028), wspace=0.03, hspace=0.02)
    axes = figure.add_subplot(grid[:, 0])
    cells = _density(
        axes,
        clipped_entropy(entropy.float()).cpu().double().numpy(),
        divergence.clamp(min=FLOOR).cpu().numpy(),
        None if kept is None else kept.cpu().numpy(),
        (entropy_threshold, divergence_threshold),
    )
    if title:
        axes.set_title(title, loc="left", fontsize=10.5, color=INK, pad=9)

    tokens, mass = quadrant_shares(quadrant), quadrant_shares(quadrant, divergence)
    blocks: list[tuple[str, str, list[tuple[str, str, float]]]] = []
    for number, name in NAMES.items():
        bars = [("tokens", TOKENS, tokens[number]), ("divergence", DIVERGENCE, mass[number])]
        if kept is not None:
            bars.append(("kept", KEPT, kept[quadrant == number].mean().nan_to_num().item()))
        blocks.append((f"Q{number}", name, bars))
    if kept is not None:
        caught = float((kept * divergence).sum() / divergence.sum().clamp(min=FLOOR))
        of_all = [("tokens", KEPT, kept.mean().item()), ("divergence", KEPT, caught)]
        blocks.append(("Kept", "outlined on the map", of_all))
    _bars(figure.add_subplot(grid[0, 1]), blocks)

    scale = figure.colorbar(cells, cax=figure.add_subplot(grid[1, 1]), orientation="horizontal")
    scale.set_label(f"tokens per hexagon, of {len(quadrant):,}", fontsize=8.5, color=FAINT)
    scale.ax.tick_params(labelsize=8.5, colors=FAINT)
    scale.outline.set_visible(False)
    return figure


def _density(axes: Axes, x: Any, y: Any, kept: Any, thresholds: tuple[float, float]) -> Any:
    """Hexagons coloured by their tokens, an outline around those that are mostly kept, and the quadrants' borders."""
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import LinearSegmentedColormap, LogNorm
    from matplotlib.patheffects import withStroke

    # log₁₀ of the divergence on a linear axis: hexbin's own logarithmic axis differs between versions of matplotlib
    y, border = np.log10(y), math.log10(thresholds[1])
    bottom, top = math.floor(min(y.min(), border - 1)), max(y.max(), border + 1) + 0.5
    grid: dict[str, Any] = {"gridsize": (44, 24), "mincnt": 1, "extent": (0, 1, bottom, top)}
    # the palest blue still stands out from the paper, so that single tokens are seen
    blues = LinearSegmentedColormap.from_list("tokens", ["#D6E6F4", "#6BAED6", "#2171B5", "#08306B"])
    cells = axes.hexbin(x, y, cmap=blues, norm=LogNorm(), linewidths=0.25, edgecolors="white", zorder=2, **grid)
    if kept is not None:
        share = axes.hexbin(x, y, C=kept, reduce_C_function=np.mean, visible=False, **grid).get_array()
        mostly = np.asarray(share) > 0.5
        centres, outline = np.asarray(cells.get_offsets())[mostly], np.asarray(cells.get_paths()[0].vertices)
        hexagons = list(centres[:, None] + outline)
        inside = cells.to_rgba(np.asarray(cells.get_array()))[mostly]
        # An outline under the hexagons that it surrounds and over all others, so that only the rim of a region shows.
        axes.add_collection(PolyCollection(hexagons, facecolors=KEPT, edgecolors=KEPT, linewidths=3.2, zorder=3))
        axes.add_collection(PolyCollection(hexagons, facecolors=inside, edgecolors="white", linewidths=0.25, zorder=4))
    axes.axvline(thresholds[0], color=INK, linewidth=0.9, linestyle=(0, (5, 3)), zorder=5)
    axes.axhline(border, color=INK, linewidth=0.9, linestyle=(0, (5, 3)), zorder=5)
    for number in NAMES:
        right, above = number in (1, 2), number in (1, 3)
        axes.annotate(
            f"Q{number}",
            (thresholds[0], top if above else bottom),
            xytext=(6 if right else -6, -4 if above else 5),
            textcoords="offset points",
            ha="left" if right else "right",
            va="top" if above else "bottom",
            fontsize=11,
            fontweight="bold",
            color=INK,
            path_effects=[withStroke(linewidth=3, foreground="white")],
            zorder=6,
        )
    axes.set_xlim(-0.03, 1.03)
    decades = range(bottom, math.floor(top) + 1)
    axes.set_yticks(decades, labels=[f"$10^{{{decade}}}$" for decade in decades])
    axes.set_yticks([decade + math.log10(digit) for decade in decades for digit in range(2, 10)], minor=True)
    axes.set_ylim(bottom, top)
    axes.set_xlabel("student entropy $\\hat{h}$ (98th-percentile clip, min–max)", color=INK)
    axes.set_ylabel("divergence KL(student ‖ teacher), nats", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    return cells


def _bars(side: Axes, blocks: list[tuple[str, str, list[tuple[str, str, float]]]]) -> None:
    """Blocks of a bold tag, a name, and bars of (label, colour, share)."""
    height = 0.0
    for tag, name, bars in blocks:
        side.text(-0.62, height, tag, fontsize=10.5, fontweight="bold", color=INK, va="center")
        side.text(-0.34 if len(tag) < 3 else -0.2, height, name, fontsize=9.5, color=INK, va="center")
        for label, colour, share in bars:
            height -= 1
            side.text(-0.05, height, label, fontsize=8.5, color=FAINT, va="center", ha="right")
            side.barh(height, 1, height=0.72, color=TRACK)
            side.barh(height, share, height=0.72, color=colour)
            side.text(1.04, height, _percent(share), fontsize=8.5, color=INK, va="center")
        height -= 1.55
    side.set_xlim(-0.64, 1.36)
    side.set_ylim(height + 0.9, 0.7)
    side.axis("off")


def _percent(share: float) -> str:
    if 0 < share < 0.0005:
        return "<0.1%"
    if 0.995 <= share < 1:
        return ">99%"
    return f"{share:.1%}" if 0 < share < 0.0995 else f"{share:.0%}"
