"""The rules alone, from 10⁴ to 10⁷ tokens: seconds per million tokens, and how time grows with their number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields as dataclass_fields
from functools import partial
from typing import Any

import torch

from tipdistill.provenance import environment
from tipdistill.select import RULES, select
from tipdistill.text import check_known
from tipdistill.types import TokenScores

from . import measure
from .measure import growth, spread, timed

SIZES = (10_000, 100_000, 1_000_000, 10_000_000)
ROLLOUT_LENGTH = 1000
RETENTION = 0.5


def run_select(
    rounds: int = 5,
    say: Callable[[str], None] = print,
    sizes: Sequence[int] = SIZES,
    rules: Sequence[str] | None = None,
    device: str = "cpu",
    threads: int = 1,
) -> dict[str, Any]:
    """Time of `tipdistill.select` by rule and number of tokens, rollouts of a thousand tokens, half of them kept.

    Args:
        rounds: runs of each, rules and sizes in turn, after one that is not timed.
        say: takes one line of progress.
        sizes: numbers of tokens.
        rules: names in RULES; None: all.
        device, threads: where it runs.

    Raises:
        ValueError: an unknown rule; the nearest is given.

    Example:
        >>> result = run_select(rounds=1, say=lambda line: None, sizes=(100, 1000), rules=["entropy"])
        >>> sorted(result["rules"]["entropy"])
        ['growth', 'seconds', 'seconds_per_million']
    """
    rules = list(rules or RULES)
    for rule in rules:
        check_known("rule", rule, RULES)
    torch.set_num_threads(threads)
    taken: dict[tuple[str, int], list[float]] = {}
    for size in sizes:
        scores, rollout = _scores(size, device)
        for number in range(rounds + 1):
            for rule in rules:
                generator = torch.Generator(device).manual_seed(number)
                run = partial(select, scores, rule, RETENTION, rollout, generator=generator)
                seconds, _, _ = timed(run, device)
                if number:
                    taken.setdefault((rule, size), []).append(seconds)
        say(f"{size} tokens: " + ", ".join(f"{rule} {min(taken[rule, size]):.3g} s" for rule in rules))
    entries = {}
    for rule in rules:
        spreads = {size: spread(taken[rule, size]) for size in sizes}
        medians = [spreads[size]["median"] for size in sizes]
        entries[rule] = {
            "seconds": {str(size): value for size, value in spreads.items()},
            "seconds_per_million": {str(size): spreads[size]["median"] / size * 1e6 for size in sizes},
            "growth": growth(sizes, medians) if len(sizes) > 1 else None,
        }
    return {
        "benchmark": "select",
        "preset": device,
        **environment(device, threads),
        "settings": {"sizes": list(sizes), "rollout_length": ROLLOUT_LENGTH, "retention": RETENTION, "device": device},
        "rules": entries,
    }


def _scores(size: int, device: str) -> tuple[TokenScores, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = {
        field.name: torch.rand(size, generator=generator).pow_(4).to(device)
        for field in dataclass_fields(TokenScores)
        if field.name != "divergence"
    }
    return TokenScores(**values), torch.arange(size, device=device) // ROLLOUT_LENGTH


def main(argv: list[str] | None = None) -> int:
    """Time the rules and write the JSON.

    Raises:
        ValueError: an unknown rule; the nearest is given.
    """
    parser = measure.parser("select", __doc__)
    parser.add_argument("--rounds", type=int, help="timed runs of each rule and size")
    parser.add_argument("--sizes", type=int, nargs="+", help="numbers of tokens")
    parser.add_argument("--rules", nargs="+", help="names of rules")
    parser.add_argument("--device", help="cpu or cuda")
    parser.add_argument("--threads", type=int)
    return measure.run("select", run_select, parser, argv)


if __name__ == "__main__":
    measure.end(main)
