"""The tables of docs/trip.md: what the sweep on the planning task found, and a verdict on each claim it can decide.

The outcome is the hard score: the share of the plans that satisfy everything. `trip/more` has five more seeds of
the two rows that the paper's claim on planning compares.
"""

from __future__ import annotations

from collections.abc import Callable

from tipdistill.sweep.result import compared, counts_of
from tipdistill.text import markdown_table

from .claims import CLAIMS, CONTROLS, NOT_RUN, Comparison, verdict
from .language_model import row_table
from .results import PLANNING, Results, figure_of
from .wording import signed_with_interval

MORE_SEEDS = f"{PLANNING}/more"
SAMPLED = "gradient_norm_sampling"
OURS = (
    Comparison("Sampling by gradient norm at 20 % beats random tokens", (SAMPLED, 0.2), ("random", 0.2)),
    Comparison("Sampling by gradient norm at 10 % beats Q3 at 10 %", (SAMPLED, 0.1), ("q3", 0.1)),
)


def rows(results: Results) -> str:
    """Every row: the hard score, its differences, and the share of what all tokens gain."""
    return row_table(results[PLANNING], "hard score") if PLANNING in results else "*Not run yet.*"


def judged(results: Results, claim: Comparison) -> tuple[str, str]:
    """The verdict of a claim, and the difference with its interval, over all seeds that both rows have."""
    grids = [results[name] for name in (PLANNING, MORE_SEEDS) if name in results]
    figures = [[figure_of(grid, at) for grid in grids] for at in (claim.first, claim.second)]
    first, second = (
        {seed: counts for figure in of_row if figure is not None for seed, counts in counts_of(figure).items()}
        for of_row in figures
    )
    if not set(first) & set(second):
        return NOT_RUN, ""
    measured = compared(first, second, grids[0]["num_samples"])
    low, high = measured["interval"]
    return verdict(low, high, claim.kind, claim.margin), signed_with_interval(measured)


def claims(results: Results) -> str:
    """Every claim and control that rows of the sweep can decide."""
    lines = []
    for claim in (*CLAIMS, *CONTROLS, *OURS):
        answer, figure = judged(results, claim)
        if answer != NOT_RUN:
            lines.append([f"{claim.number}. {claim.claim}" if claim.number else claim.claim, answer, figure])
    return markdown_table(["claim", "on planning", "difference"], lines) if lines else "*Not run yet.*"


BLOCKS: dict[str, Callable[[Results], str]] = {"planning-rows": rows, "planning-claims": claims}
