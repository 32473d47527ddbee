"""Does the probe's ranking agree with what training comes to? On the laptop's addition task, rule by rule.

    python -m benchmarks.probe_agreement train --seeds 0 1        # about ten minutes of a core per seed
    python -m benchmarks.probe_agreement probe --seeds 0 1 2 3    # writes benchmarks/results/probe-agreement.json

`train` distils the demo's student on every cell below and keeps the outcomes; `probe` asks the probe about the same
student before any training, with prompts and rollouts of several seeds, and compares the two rankings by Spearman's
rank correlation.
"""

import json
from dataclasses import replace
from pathlib import Path
from statistics import correlation, mean, stdev

from . import measure

CELLS = (
    ("all", 1.0),
    *(("soft_or", retention) for retention in (0.5, 0.2, 0.1)),
    *(("entropy_sampling", retention) for retention in (0.5, 0.2, 0.1)),
    *(("random", retention) for retention in (0.5, 0.2, 0.1)),
    *(("q3", retention) for retention in (0.1, 0.05)),
    *(("gradient_norm", retention) for retention in (0.1, 0.05)),
    *(("divergence", retention) for retention in (0.1, 0.05)),
    ("soft_or_log", 0.1),
    ("complement:soft_or", 0.5),
)
OUTCOMES = Path("runs/probe-agreement/outcomes.json")
RESULT = measure.RESULTS / "probe-agreement.json"


def train(seeds, workers, directory):
    from tipdistill import demo
    from tipdistill.sweep import Row

    rows_of_cells = tuple(Row(rule, rule, retention) for rule, retention in CELLS)
    outcomes = json.loads(OUTCOMES.read_text()) if OUTCOMES.exists() else {}
    for seed in seeds:
        grid = replace(demo.demo_grid("demo", directory, seed), rows=rows_of_cells)
        rows = demo.run(grid, demo.TAUGHT["demo"], workers, threads=1)["rows"]
        outcomes[str(seed)] = [
            {name: row[name] for name in ("rule", "retention", "accuracy", "standard_error", "accuracy_before")}
            for row in rows
        ]
        OUTCOMES.parent.mkdir(parents=True, exist_ok=True)
        OUTCOMES.write_text(json.dumps(outcomes, indent=2) + "\n")


def ask(seeds, directory, prompts):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tipdistill.probe import Settings, probe
    from tipdistill.rollout import generate
    from tipdistill.score.models import score_rollouts
    from tipdistill.tasks import arithmetic

    torch.set_num_threads(1)
    models = directory / "models"
    student, teacher = (AutoModelForCausalLM.from_pretrained(models / name).eval() for name in ("student", "teacher"))
    tokenizer = AutoTokenizer.from_pretrained(models / "student")
    rules = dict.fromkeys(rule for rule, _ in CELLS if rule not in ("all", "random"))
    retentions = sorted({retention for _, retention in CELLS if retention < 1}, reverse=True)
    results = []
    for seed in seeds:
        settings = Settings(rules=tuple(rules), retentions=tuple(retentions), seed=seed)
        # prompts that no training of seed 0 or 1 has seen
        texts = [arithmetic.prompt_of(*pair) for pair in arithmetic.problems(prompts, 1000 + seed)]
        batches = generate(
            student, tokenizer, texts, max_new_tokens=arithmetic.COMPLETION_TOKENS, seed=seed, batch_size=prompts
        )
        rollouts = [rollout for batch in batches for rollout in batch]
        scores = score_rollouts(student, teacher, rollouts, settings.fields()).scores
        results.append(probe(student, teacher, rollouts, scores, settings))
        print(f"seed {seed}: {results[-1]['recommendation']}", flush=True)
    return results


def ranks(values):
    """Ranks from 1, equal values share the mean of theirs."""
    ordered = sorted(values)
    return [mean(place for place, other in enumerate(ordered, 1) if other == value) for value in values]


def spearman(first, second):
    """The correlation of the ranks; 0 where one side is constant, and orders nothing."""
    x, y = ranks(first), ranks(second)
    return correlation(x, y) if len(set(x)) > 1 and len(set(y)) > 1 else 0.0


def compare(outcomes, probes):
    accuracy = {
        cell: mean(
            row["accuracy"] for rows in outcomes.values() for row in rows if (row["rule"], row["retention"]) == cell
        )
        for cell in CELLS
    }
    rows = [{(row["rule"], row["retention"]): row for row in result["rows"]} for result in probes]
    figures = ("descent", "cosine", "divergence_share", "q3_share", "kept")
    by_figure = {}
    for name in figures:
        each = [spearman([by_cell[cell][name] for cell in CELLS], list(accuracy.values())) for by_cell in rows]
        averaged = [mean(by_cell[cell][name] for by_cell in rows) for cell in CELLS]
        by_figure[name] = {
            "per_probe": each,
            "standard_deviation": stdev(each) if len(each) > 1 else None,
            "of_the_mean_over_probes": spearman(averaged, list(accuracy.values())),
        }
    sparse = [cell for cell in CELLS if cell[0] not in ("all", "random")]
    return {
        "spearman_with_trained_accuracy": by_figure,
        "spearman_of_descent_without_controls": spearman(
            [mean(by_cell[cell]["descent"] for by_cell in rows) for cell in sparse], [accuracy[cell] for cell in sparse]
        ),
        "recommendations": [result["recommendation"] for result in probes],
        "cells": [
            {
                "rule": cell[0],
                "retention": cell[1],
                "trained_accuracy": accuracy[cell],
                "accuracy_before": next(iter(outcomes.values()))[0]["accuracy_before"],
                **{name: mean(by_cell[cell][name] for by_cell in rows) for name in figures},
                "descent_share": mean(by_cell[cell]["descent_share"] for by_cell in rows),
                "descent_share_per_probe": [by_cell[cell]["descent_share"] for by_cell in rows],
            }
            for cell in CELLS
        ],
    }


def main():
    parser = measure.parser("probe_agreement", __doc__)
    parser.add_argument("what", choices=("train", "probe"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--directory", type=Path, default=Path("runs/probe-agreement"), help="of the demo's models")
    parser.add_argument("--prompts", type=int, nargs="+", default=[64, 256], help="of a probe, one rollout each")
    options = parser.parse_args()
    if options.what == "train":
        train(options.seeds, options.workers, options.directory)
        return
    from tipdistill.provenance import environment

    outcomes = json.loads(OUTCOMES.read_text())
    result = {
        "benchmark": "probe-agreement",
        "task": "four-digit addition with planted errors: a mechanism, no replication",
        **environment("cpu", 1),
        "settings": {"training_seeds": sorted(outcomes), "probe_seeds": options.seeds},
        "prompts": {
            str(prompts): compare(outcomes, ask(options.seeds, options.directory, prompts))
            for prompts in options.prompts
        },
    }
    measure.write(RESULT, result)
    print(f"written: {RESULT}")


if __name__ == "__main__":
    measure.end(main)
