"""The tables of docs/trip.md: what the sweep on the planning task found, and a verdict on each claim it can decide.

The outcome is the hard score: the share of the plans that satisfy everything. `trip/planning` has ten seeds of the
rows that the paper's claim on planning compares, `trip/rules` five of the other rules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tipdistill.text import markdown_table

from .claims import CLAIMS, CONTROLS, NOT_RUN, Comparison, verdict
from .language_model import row_table
from .results import PLANNING, Results, difference
from .wording import signed_with_interval

PAPERS, RULES = f"{PLANNING}/planning", f"{PLANNING}/rules"
SAMPLED = "gradient_norm_sampling"
OURS = (
    Comparison("Sampling by gradient norm at 20 % beats random tokens", (SAMPLED, 0.2), ("random", 0.2)),
    Comparison("Sampling by gradient norm at 10 % beats Q3 at 10 %", (SAMPLED, 0.1), ("q3", 0.1)),
)


def rows(results: Results) -> str:
    """Every row: the hard score, its differences, and the share of what all tokens gain."""
    tables = [row_table(results[name], "hard score") for name in (PAPERS, RULES) if name in results]
    return "\n\n".join(tables) or "*Not run yet.*"


def judged(results: Results, claim: Comparison) -> tuple[str, str]:
    """The verdict of a claim, and the difference with its interval, from the first grid that has both rows."""
    grids = [results[name] for name in (PAPERS, RULES) if name in results]
    measured = next((paired for grid in grids if (paired := difference(grid, claim.first, claim.second))), None)
    if measured is None:
        return NOT_RUN, ""
    low, high = measured["interval"]
    return verdict(low, high, claim.kind, claim.margin), signed_with_interval(measured)


def claims(results: Results) -> str:
    """Every claim and control that rows of the sweeps can decide."""
    return _table(results, (*CLAIMS, *CONTROLS, *OURS))


def claim_on_planning(results: Results) -> str:
    """The paper's own claim on planning."""
    return _table(results, [claim for claim in CLAIMS if (claim.first, claim.second) == (("q3", 0.2), ("all", 1.0))])


def _table(results: Results, comparisons: Sequence[Comparison]) -> str:
    lines = []
    for claim in comparisons:
        answer, figure = judged(results, claim)
        if answer != NOT_RUN:
            lines.append([f"{claim.number}. {claim.claim}" if claim.number else claim.claim, answer, figure])
    return markdown_table(["claim", "on planning", "difference"], lines) if lines else "*Not run yet.*"


BLOCKS: dict[str, Callable[[Results], str]] = {
    "planning-rows": rows,
    "planning-claims": claims,
    "planning-claim": claim_on_planning,
}
