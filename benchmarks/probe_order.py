"""Does the probe order the rows of a sweep as training does? Asked about SmolLM2's student, before it was trained.

`python -m tipdistill.tasks smollm2` writes the pair; benchmarks/replication/smollm2/pruned.yaml is the sweep.

The probe sees prompts to train on and rollouts of its own seeds, and looks at the gradient as `tipdistill probe` does.
Each of its figures is compared with the sweep's outcome by Spearman's rank correlation, over the rows. The interval is
over what was drawn: the sweep's seeds and held-out prompts, and the probe's seeds. The rows themselves stay.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from tipdistill.probe import Settings, probe
from tipdistill.provenance import environment
from tipdistill.rollout import generate
from tipdistill.score.models import score_rollouts
from tipdistill.sweep.bootstrap import Bootstrap
from tipdistill.sweep.result import divergences_of
from tipdistill.tasks.instructions import as_chat, train_prompts
from tipdistill.types import Rollout, TokenScores

from . import measure
from .probe_agreement import spearman
from .smollm2 import ROOT, read_pair

SWEEP = measure.RESULTS / "replication" / "smollm2" / "pruned.json"
FIGURES = ("descent", "cosine", "divergence_share", "q3_share", "q2_of_kept", "kept")
DRAWS = 2000
Place = tuple[str, float]  # name and retention of a row


def run_probe(
    sweep: Path = SWEEP,
    root: Path = ROOT,
    prompts: int = 32,
    tokens: int = 32,
    probes: int = 3,
    threads: int = 2,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Probe the student several times, and compare each figure with what training came to.

    Args:
        sweep: the kept sweep.json, whose first test is a divergence.
        root: of `python -m tipdistill.tasks smollm2`.
        prompts: of a probe, answered once each.
        tokens: of an answer, at most.
        probes: how many, each with prompts and rollouts of its own.
        threads: of torch.
        say: takes a line of progress.

    Raises:
        ValueError: no models, or no sweep there.
    """
    if not sweep.is_file():
        raise ValueError(f"there is no {sweep}: run the sweep and keep its result (docs/smollm2.md).")
    tokenizer, student, teacher = read_pair(root, threads)
    result = json.loads(sweep.read_text(encoding="utf-8"))
    rows = {(row["name"], row["retention"]): row for row in result["rows"] if row["tasks"]}
    fields = Settings(rules=tuple({row["rule"] for row in rows.values()} - {"all", "random"})).fields()
    asked = []
    for seed in range(probes):
        texts = random.Random(seed).sample(train_prompts(), prompts)
        (rollouts,) = generate(
            student, tokenizer, list(map(as_chat, texts)), max_new_tokens=tokens, seed=seed, batch_size=prompts
        )
        scores = score_rollouts(student, teacher, rollouts, fields).scores
        asked.append(figures_of(student, teacher, rollouts, scores, rows, seed))
        say(f"probe {seed + 1} of {probes}")
    outcome = result["test"][0]
    by_seed = {place: divergences_of(row["tasks"][outcome]) for place, row in rows.items()}
    return {
        "benchmark": "probe_order",
        "preset": "smollm2",
        **environment("cpu", threads),
        "settings": {"prompts": prompts, "tokens": tokens, "probes": probes, "outcome": outcome},
        "correlation": {name: correlation([probed[name] for probed in asked], by_seed) for name in FIGURES},
        "rows": [
            {
                "name": name,
                "retention": retention,
                "outcome": row["tasks"][outcome]["mean"],
                **{figure: fmean(probed[figure][name, retention] for probed in asked) for figure in FIGURES},
            }
            for (name, retention), row in rows.items()
        ],
    }


def figures_of(
    student: Any,
    teacher: Any,
    rollouts: Sequence[Rollout],
    scores: TokenScores,
    rows: Mapping[Place, Mapping[str, Any]],
    seed: int,
) -> dict[str, dict[Place, float]]:
    """What one probe says of every row: its figure → row → value.

    Args:
        student, teacher, rollouts, scores: see `tipdistill.probe.probe`.
        rows: of the sweep, with rule, retention and the fields of the run that a row changes.
        seed: of the draws.
    """
    groups: dict[str | None, list[Place]] = {}
    for place, row in rows.items():
        if row["rule"] != "all":
            groups.setdefault(row["overrides"].get("selection_scope"), []).append(place)
    values: dict[str, dict[Place, float]] = {figure: {} for figure in FIGURES}
    for scope, places in groups.items():
        # `random` is the control of every probe, and no rule to ask about
        rules = dict.fromkeys(rows[place]["rule"] for place in places if rows[place]["rule"] != "random")
        settings = Settings(
            rules=tuple(rules) or ("soft_or",),
            # more pairs of a rule and a retention than the sweep has, but the gradients of held-out prompts, which
            # are most of a probe, are the same for all of them
            retentions=tuple(sorted({retention for _, retention in places}, reverse=True)),
            scope=scope,
            random_seeds=2,
            seed=seed,
            bootstrap=1,
        )
        asked = probe(student, teacher, rollouts, scores, settings)["rows"]
        by_rule = {(row["rule"], row["retention"]): row for row in asked}
        for place in [*places, *(place for place, row in rows.items() if row["rule"] == "all")]:
            for figure in FIGURES:
                values[figure][place] = float(by_rule[rows[place]["rule"], place[1]][figure] or 0.0)
    return values


def correlation(
    probed: list[dict[Place, float]], outcomes: Mapping[Place, Mapping[int, list[float]]], draws: int = DRAWS
) -> dict[str, Any]:
    """Spearman's rank correlation of a figure and the outcome over the rows, positive where more of it trains better.

    Args:
        probed: of each probe, row → figure.
        outcomes: row → seed → divergence at each held-out prompt.
        draws: of the interval, which redraws seeds and prompts of the sweep, and probes.
    """
    places = list(outcomes)
    tables = [np.array([outcomes[place][seed] for seed in sorted(outcomes[place])]) for place in places]
    figures = np.array([[probe[place] for place in places] for probe in probed])
    seeds, prompts = tables[0].shape
    bootstrap = Bootstrap(seeds, prompts, draws)
    ends = np.stack([bootstrap.of(table) for table in tables], 1)
    picks = np.random.default_rng(0).integers(0, len(probed), (draws, len(probed)))
    drawn = [spearman(list(figures[pick].mean(0)), list(-end)) for pick, end in zip(picks, ends, strict=True)]
    means = list(-np.array([table.mean() for table in tables]))
    return {
        "mean": spearman(list(figures.mean(0)), means),
        "interval": [float(end) for end in np.quantile(drawn, (0.025, 0.975))],
        "per_probe": [spearman(list(row), means) for row in figures],
    }


def main(argv: list[str] | None = None) -> int:
    """Measure and write benchmarks/results/probe_order-smollm2.json.

    Raises:
        ValueError: no models, or no sweep there.
    """
    parser = measure.parser("probe_order", __doc__)
    parser.add_argument("--sweep", type=Path, help="a kept sweep.json (default that of docs/smollm2.md)")
    parser.add_argument("--root", type=Path, help="of `python -m tipdistill.tasks smollm2` (default runs/smollm2)")
    parser.add_argument("--prompts", type=int, help="of a probe, answered once each (default 32)")
    parser.add_argument("--probes", type=int, help="how many, with prompts of their own (default 3)")
    parser.add_argument("--threads", type=int, help="of torch (default 2)")
    return measure.run("probe_order", run_probe, parser, argv)


if __name__ == "__main__":
    measure.end(main)
