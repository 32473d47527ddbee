"""Draw what drifts at small budgets: the divergence of each kind of token over the steps, and how many of it are kept.

    tipdistill train --config laptop --selection_rule q3 --retention 0.02 --selection_scope batch \\
        --learning_rate 1e-3 --record_rollouts 16 --score_logging_steps 5 --output_dir runs/drift/arithmetic/q3-batch-2
    python -m benchmarks.plot_drift runs/drift docs/drift.png

The folder holds one folder per task, with a run of `tipdistill train` in each of theirs; the table goes beside the
picture as JSON.
"""

import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from tipdistill.records import open_records
from tipdistill.report.figures import COLOURS, DASHES
from tipdistill.report.tip_map import FAINT, INK
from tipdistill.tasks import arithmetic, machine, modular

from . import measure

# task → kind of token → its places in a solution
ARITHMETIC = {
    "digits copied": [9 * column + place for column in range(arithmetic.DIGITS) for place in (0, 2)],
    "carries": [9 * column + 4 for column in range(arithmetic.DIGITS)],
    "sums": [9 * column + place for column in range(arithmetic.DIGITS) for place in (6, 7)],
    "separators (a free choice)": [9 * column + 8 for column in range(arithmetic.DIGITS)],
    "signs": [9 * column + place for column in range(arithmetic.DIGITS) for place in (1, 3, 5)],
    "answer and end": list(range(9 * arithmetic.DIGITS, arithmetic.COMPLETION_TOKENS)),
}
MACHINE = {
    "line": [5 * step for step in range(machine.STEPS)],
    "operation": [5 * step + 1 for step in range(machine.STEPS)],
    "registers": [5 * step + place for step in range(machine.STEPS) for place in (2, 3, 4)],
    "answer and end": list(range(5 * machine.STEPS, machine.TASK.completion_tokens)),
}
MODULAR = {
    "sign and digit copied": [4 * step + place for step in range(modular.STEPS) for place in (0, 1)],
    "equals": [4 * step + 2 for step in range(modular.STEPS)],
    "values": [4 * step + 3 for step in range(modular.STEPS)],
    "answer and end": list(range(4 * modular.STEPS, modular.TASK.completion_tokens)),
}
KINDS = {"arithmetic": ARITHMETIC, "modular": MODULAR, "machine": MACHINE}


def measured(run: Path, kinds: dict[str, list[int]]) -> dict:
    """Per recorded step: of each kind of token the mean divergence of what is dropped (nats) and the share kept."""
    by_step = {}
    for step, directory in sorted((int(path.name.removeprefix("step-")), path) for path in run.glob("records/step-*")):
        table = open_records(directory).read(["position", "reverse_kl", "kept"])
        position, divergence, kept = (table[name].to_numpy() for name in ("position", "reverse_kl", "kept"))
        total = divergence[~kept].sum()
        by_step[step] = {
            kind: {
                "dropped_divergence": float(divergence[of_kind & ~kept].mean()) if (of_kind & ~kept).any() else None,
                "share_of_dropped": float(divergence[of_kind & ~kept].sum() / total) if total else None,
                "kept": float(kept[of_kind].mean()) if of_kind.any() else None,
            }
            for kind, places in kinds.items()
            for of_kind in [np.isin(position, places)]
        }
    state = json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    accuracy = [value for entry in state for name, value in entry.items() if "/mean_at_" in name]
    return {"accuracy": accuracy[-1] if accuracy else None, "first_step": first_step(run, state), "steps": by_step}


def first_step(run: Path, log: list[dict]) -> dict:
    """The norm of the first step's gradient, and the medians of what was kept for it in the recorded rollouts."""
    table = open_records(run / "records" / "step-0").read(["student_logprob", "reverse_kl", "kept"])
    logprob, divergence, kept = (table[name].to_numpy() for name in ("student_logprob", "reverse_kl", "kept"))
    return {
        "gradient_norm": next(entry["grad_norm"] for entry in log if "grad_norm" in entry and entry["step"] == 1),
        "kept": int(kept.sum()),
        "student_probability": float(np.exp(np.median(logprob[kept]))),
        "reverse_kl": float(np.median(divergence[kept])),
    }


def draw(table: dict[str, dict[str, dict]]) -> Figure:
    columns = max(len(runs) for runs in table.values())
    figure = Figure(figsize=(2.7 * columns + 0.6, 4.4 * len(table)), dpi=110, layout="constrained")
    grid = figure.subplots(2 * len(table), columns, sharey="row", squeeze=False)
    for row, (task, runs) in enumerate(table.items()):
        for column, (name, run) in enumerate(runs.items()):
            above, below = grid[2 * row][column], grid[2 * row + 1][column]
            for number, kind in enumerate(KINDS[task]):
                line = {"color": COLOURS[number], "linestyle": DASHES[number % len(DASHES)], "linewidth": 1.4}
                steps = list(run["steps"])
                values = [run["steps"][step][kind]["dropped_divergence"] for step in steps]
                above.plot(
                    steps, [np.nan if value is None else max(value, 1e-6) for value in values], label=kind, **line
                )
                kept = [run["steps"][step][kind]["kept"] for step in steps]
                below.plot(steps, [np.nan if value is None else 100 * value for value in kept], **line)
            above.set_yscale("log")
            below.set_yscale("symlog", linthresh=1)
            below.set_ylim(0, 100)
            below.set_yticks([0, 1, 10, 100], labels=["0", "1", "10", "100"])
            ended = "" if run["accuracy"] is None else f", accuracy {run['accuracy']:.2f}"
            above.set_title(f"{name}{ended}", fontsize=7.5, color=INK)
            below.set_xlabel("step", fontsize=8, color=INK)
            for axes in (above, below):
                axes.spines[["top", "right"]].set_visible(False)
                axes.tick_params(labelsize=7, colors=FAINT)
        for column in range(len(runs), columns):
            grid[2 * row][column].axis("off")
            grid[2 * row + 1][column].axis("off")
        grid[2 * row][0].set_ylabel(f"{task}\nmean divergence of\nwhat is dropped (nats)", fontsize=8, color=INK)
        grid[2 * row + 1][0].set_ylabel("% kept of each kind", fontsize=8, color=INK)
        grid[2 * row][0].legend(frameon=False, fontsize=6.5)
    return figure


def main() -> None:
    parser = measure.parser("plot_drift", __doc__)
    parser.add_argument("runs", type=Path, help="a folder with a folder of runs for each task")
    parser.add_argument("picture", type=Path, help="the PNG; the table goes beside it as JSON")
    options = parser.parse_args()
    table = {
        task: {run.name: measured(run, KINDS[task]) for run in sorted(folder.iterdir()) if (run / "records").is_dir()}
        for task in KINDS
        for folder in [options.runs / task]
        if folder.is_dir()
    }
    draw(table).savefig(options.picture)
    options.picture.with_suffix(".json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    measure.end(main)
