"""Draw docs/engine.svg from the results of `python -m benchmarks.head` (presets cpu and scaling).

python -m benchmarks.plot_engine
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from . import measure
from .measure import RESULTS, ROOT

SHOWN = {
    "trl": "TRL, all tokens",
    "plain": "plain PyTorch, all tokens",
    "chunked": "ours, all tokens",
    "chunked soft_or 0.5": "ours, Soft-OR 0.5",
    "chunked soft_or 0.1": "ours, Soft-OR 0.1",
    "chunked soft_or 0.5, one pass": "ours, Soft-OR 0.5, one pass",
    "chunked soft_or 0.1, one pass": "ours, Soft-OR 0.1, one pass",
    "chunked entropy 0.1": "ours, entropy 0.1",
}
PARTS = {"matmul": "#35608d", "exponential": "#d9843b", "other": "#b9b9b9"}
LINES = {"plain": "#b9b9b9", "chunked": "#35608d", "chunked soft_or 0.5": "#d9843b"}


def draw_time(axes, result):
    variants = {name: result["variants"][name] for name in SHOWN if "seconds" in result["variants"][name]}
    plain = variants["plain"]["seconds"]["median"]
    for row, entry in enumerate(variants.values()):
        whole = entry["ratio"]["plain"]["median"] if "ratio" in entry and "plain" in entry["ratio"] else 1.0
        left = 0.0
        for part, color in PARTS.items():
            width = whole * entry["time_split"][part]
            axes.barh(row, width, left=left, color=color, height=0.6, label=part if row == 0 else None)
            left += width
        floor = whole / entry["over_floor"]["median"]
        axes.plot([floor] * 2, [row - 0.4, row + 0.4], color="black", label="arithmetic floor" if row == 0 else None)
        axes.text(left + 0.02, row, f"{whole:.2f}", va="center")
    axes.set_yticks(range(len(variants)), [SHOWN[name] for name in variants])
    axes.invert_yaxis()
    axes.set_xlabel(f"time / plain PyTorch ({plain:.1f} s)")
    settings = result["settings"]
    axes.set_title(f"N = {settings['tokens']:,}, V = {settings['vocabulary']:,}, one thread", fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="lower right")


def draw_memory(axes, result, axis, label):
    points = [point for point in result["points"] if point["axis"] == axis]
    for name, color in LINES.items():
        entries = [point["variants"][name] for point in points]
        extra = [(entry["extra_bytes"] - entry["gradient_bytes"]) / 2**20 for entry in entries]
        axes.plot([point["size"] for point in points], extra, "o-", color=color, label=SHOWN[name])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([point["size"] for point in points], [f"{point['size']:,}" for point in points], fontsize=8)
    axes.minorticks_off()
    axes.set_xlabel(label)
    axes.set_ylabel("MiB without the gradients")


def main():
    parser = measure.parser("plot_engine", __doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "engine.svg")
    options = parser.parse_args()
    head = json.loads((RESULTS / "head-cpu.json").read_text(encoding="utf-8"))
    scaling = json.loads((RESULTS / "head-scaling.json").read_text(encoding="utf-8"))
    figure, (time, tokens, vocabulary) = plt.subplots(
        1, 3, figsize=(14, 4), width_ratios=(1.7, 1, 1), layout="constrained"
    )
    draw_time(time, head)
    draw_memory(tokens, scaling, "tokens", "tokens N")
    draw_memory(vocabulary, scaling, "vocabulary", "vocabulary V")
    tokens.legend(frameon=False, fontsize=8)
    for axes in (time, tokens, vocabulary):
        axes.spines[["top", "right"]].set_visible(False)
    plt.rcParams["svg.hashsalt"] = "engine"  # the same picture, byte for byte, from the same results
    figure.savefig(options.output, metadata={"Date": None})


if __name__ == "__main__":
    measure.end(main)
