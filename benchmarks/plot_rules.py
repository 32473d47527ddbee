"""Draw docs/rules/*.png: which tokens each rule keeps, over entropy and divergence, on rollouts of the demo's student.

tipdistill demo                      # leaves both models in runs/demo/models
python -m benchmarks.plot_rules      # --models DIRECTORY for others of the addition task
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM

from tipdistill import RULES, TokenScores, select
from tipdistill.report.tip_map import FAINT, FLOOR, INK
from tipdistill.select import rule_fields
from tipdistill.select.normalize import clipped_entropy
from tipdistill.select.quadrants import DIVERGENCE_THRESHOLD, ENTROPY_THRESHOLD
from tipdistill.tasks import arithmetic

from . import measure
from .measure import ROOT

RETENTION = 0.2
PROMPTS = 256
# from hardly ever to always kept: pale blue, violet, vermilion, which differ in lightness as well
KEPT = LinearSegmentedColormap.from_list("kept", ["#D6E6F4", "#8C6BB1", "#D55E00"])


def scored(models: Path) -> tuple[TokenScores, torch.Tensor]:
    student, teacher = (AutoModelForCausalLM.from_pretrained(models / name).eval() for name in ("student", "teacher"))
    prompts = [arithmetic.prompt_of(*problem) for problem in arithmetic.problems(PROMPTS, 0)]
    fields = {name for rule in RULES for name in rule_fields(rule) or ()} | {"entropy_norm", "reverse_kl"}
    return arithmetic.score(student, teacher, prompts, 0, fields=sorted(fields))


def draw(axes: Any, scores: TokenScores, rollout: torch.Tensor, rule: str) -> Any:
    """Hexagons of the map, coloured by the share of their tokens that is kept, or by their mean weight."""
    picked = select(scores, rule, RETENTION, rollout=rollout, generator=torch.Generator().manual_seed(0))
    # the weights of an importance sample undo how often a token is drawn
    share = picked.mask.float() if picked.inverse_probability else picked.weight / picked.weight.max()
    x = clipped_entropy(scores.require("entropy_norm")).numpy()
    y = scores.require("reverse_kl").clamp(min=FLOOR).log10().numpy()
    border = math.log10(DIVERGENCE_THRESHOLD)
    bottom, top = math.floor(y.min()), y.max() + 0.3
    cells = axes.hexbin(
        x, y, C=share.numpy(), reduce_C_function=np.mean, gridsize=(26, 15), extent=(0, 1, bottom, top),
        cmap=KEPT, vmin=0, vmax=1, linewidths=0.2, edgecolors="white",
    )  # fmt: skip
    axes.axvline(ENTROPY_THRESHOLD, color=INK, linewidth=0.7, linestyle=(0, (5, 3)))
    axes.axhline(border, color=INK, linewidth=0.7, linestyle=(0, (5, 3)))
    for number in (1, 2, 3, 4):
        right, above = number in (1, 2), number in (1, 3)
        axes.annotate(
            f"Q{number}", (1.0 if right else 0.0, 1.0 if above else 0.0), xycoords="axes fraction",
            xytext=(-3 if right else 3, -3 if above else 3), textcoords="offset points",
            ha="right" if right else "left", va="top" if above else "bottom", fontsize=7, color=FAINT,
        )  # fmt: skip
    decades = range(bottom, math.floor(top) + 1, 2)
    axes.set_yticks(decades, labels=[f"$10^{{{decade}}}$" for decade in decades])
    axes.set_xticks([0, 0.5, 1], labels=["0", "½", "1"])
    axes.tick_params(labelsize=7, colors=FAINT)
    axes.spines[["top", "right"]].set_visible(False)
    budget = "weight" if RULES[rule].budget == "weight" else f"keeps {picked.mask.float().mean().item():.0%}"
    axes.set_title(f"{rule}: {budget}", fontsize=7, color=INK)
    return cells


def legend(figure: Figure, cells: Any, axes: Any) -> None:
    bar = figure.colorbar(cells, ax=axes, shrink=0.7, aspect=25)
    bar.set_label("share of a hexagon's tokens kept, or weight / the largest", fontsize=7, color=FAINT)
    bar.ax.tick_params(labelsize=7, colors=FAINT)
    bar.outline.set_visible(False)


def main() -> None:
    parser = measure.parser("plot_rules", __doc__)
    parser.add_argument("--models", type=Path, default=ROOT / "runs/demo/models")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "docs/rules")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    scores, rollout = scored(options.models)
    for rule in RULES:
        figure = Figure(figsize=(3.6, 2.3), dpi=100, layout="constrained")
        axes = figure.add_subplot()
        legend(figure, draw(axes, scores, rollout, rule), axes)
        axes.set_xlabel("student entropy $\\hat{h}$", fontsize=7, color=INK)
        axes.set_ylabel("KL(student ‖ teacher), nats", fontsize=7, color=INK)
        figure.savefig(options.output_dir / f"{rule}.png")
    columns = 5
    figure = Figure(figsize=(11, 2 * math.ceil(len(RULES) / columns)), dpi=100, layout="constrained")
    panels = figure.subplots(math.ceil(len(RULES) / columns), columns, sharex=True, sharey=True, squeeze=False)
    for rule, axes in zip(RULES, panels.flat, strict=False):
        cells = draw(axes, scores, rollout, rule)
    for axes in panels.flat[len(RULES) :]:
        axes.axis("off")
    legend(figure, cells, panels)
    figure.supxlabel("student entropy $\\hat{h}$ (98th-percentile clip, min-max)", fontsize=9, color=INK)
    figure.supylabel("divergence KL(student ‖ teacher), nats", fontsize=9, color=INK)
    figure.savefig(options.output_dir / "grid.png")


if __name__ == "__main__":
    measure.end(main)
