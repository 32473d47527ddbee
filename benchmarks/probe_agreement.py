"""Does the probe's ranking agree with what training comes to? On the laptop's addition task, rule by rule.

    python benchmarks/probe_agreement.py train --seeds 0 1    # about ten minutes of a core per seed
    python benchmarks/probe_agreement.py probe                # writes benchmarks/results/probe-agreement.json

`train` distils the demo's student on every cell below and keeps the outcomes; `probe` asks the probe about the same
student before any training, with prompts and rollouts of several seeds, and compares the two rankings by Spearman's
rank correlation.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

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
RESULT = Path("benchmarks/results/probe-agreement.json")


def train(seeds, workers, directory):
    from tipdistill.cli import demo

    cells = tuple(demo.Cell(rule, rule, retention) for rule, retention in CELLS)
    outcomes = json.loads(OUTCOMES.read_text()) if OUTCOMES.exists() else {}
    for seed in seeds:
        settings = replace(demo.FULL, seed=seed, cells=cells)
        rows = demo.run(settings, directory, workers, threads=1)
        outcomes[str(seed)] = [
            {name: row[name] for name in ("rule", "retention", "accuracy", "standard_error", "accuracy_before")}
            for row in rows
        ]
        OUTCOMES.parent.mkdir(parents=True, exist_ok=True)
        OUTCOMES.write_text(json.dumps(outcomes, indent=2) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("train", "probe"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--directory", type=Path, default=Path("runs/probe-agreement"), help="of the demo's models")
    options = parser.parse_args()
    if options.what == "train":
        train(options.seeds, options.workers, options.directory)


if __name__ == "__main__":
    main()
