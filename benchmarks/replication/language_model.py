"""The tables of docs/smollm2.md: what the sweeps on SmolLM2 found, and a verdict on each claim.

The outcome is a divergence, of which less is better, and its scale is that of the pair. So a difference of two rows is
told as a share of what all tokens gain, (KL of the second − KL of the first) / (KL before − KL of all tokens): positive
where the first is better.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tipdistill.sweep.result import compared, divergences_of
from tipdistill.text import markdown_table

from .claims import CLAIMS, CONTROLS, NOT_RUN, Comparison, overall, verdict
from .claims import TIE as TIE_OF_ACCURACIES
from .results import LANGUAGE_MODEL, At, Results, row_of
from .wording import brackets, percent, row_name, signed, with_interval

PAIRS = {f"{LANGUAGE_MODEL}/pruned": "six layers dropped", f"{LANGUAGE_MODEL}/closer": "two layers dropped"}
_SAMPLED = "gradient_norm_sampling batch"
# of what all tokens gain: closer than this is a tie; at most this far below is "nearly"; "much" is more than this
TIE, NEARLY, MUCH = 0.05, 0.10, 0.25
OURS = tuple(
    Comparison(
        f"Sampling by gradient norm at {100 * share:.0f} % {told}", (_SAMPLED, share), other, kind, number=number
    )
    for share, told, other, kind, number in (
        (0.1, "beats random tokens", ("random", 0.1), "above", None),
        (0.1, "beats Soft-OR at 10 %", ("soft_or", 0.1), "above", None),
        (0.1, "nearly matches all tokens", ("all", 1.0), "matches", 3),
        (0.05, "nearly matches all tokens", ("all", 1.0), "matches", 3),
        (0.02, "beats random tokens at 10 %", ("random", 0.1), "above", None),
    )
)
_MARGINS = {"matches": {1: TIE, 3: NEARLY}, "above": {4: MUCH}}


def rows(results: Results) -> str:
    """Every row of each pair: the divergence, its differences, the share of the gain, and the accuracies beside it."""
    parts = []
    for grid, title in PAIRS.items():
        if grid not in results:
            continue
        result = results[grid]
        parts.append(f"**{title}**, {len(result['seeds'])} seeds\n\n{row_table(result, 'reverse KL, nats')}")
    return "\n\n".join(parts) or "*Not run yet.*"


def row_table(result: Mapping[str, Any], heading: str) -> str:
    """The rows of a sweep: the outcome, its differences, the share of the gain, and the other tasks beside it.

    Args:
        result: of `tipdistill sweep`; its first test is the outcome.
        heading: of the outcome's column.
    """
    outcome, *beside = result["test"]
    before = result["before"]
    lines = [
        [
            "before",
            "",
            *(with_interval(before[outcome]), "", "", ""),
            *(f"{before[task]['mean']:.2f}" for task in beside),
        ]
    ]
    for row in result["rows"]:
        figure = row["tasks"].get(outcome)
        if figure is None:
            continue
        lines.append(
            [
                row_name(row["name"]),
                percent(row["retention"]),
                with_interval(figure),
                *(_signed(figure[name]) for name in ("to_all", "to_random")),
                _share(figure["gain_share"]),
                *(f"{row['tasks'][task]['mean']:.2f}" for task in beside),
            ]
        )
    return markdown_table(["", "", heading, "− all tokens", "− random", "share of the gain", *beside], lines)


def _signed(figure: Mapping[str, Any] | None) -> str:
    return "" if figure is None else f"{signed(figure['mean'])} {brackets(figure, signed)}"


def _share(figure: Mapping[str, Any] | None) -> str:
    return "" if figure is None else f"{percent(figure['mean'])} {brackets(figure, percent)}"


def lead(result: Mapping[str, Any], first: At, second: At) -> dict[str, Any] | None:
    """How far a row is ahead of another, as a share of what all tokens gain; None where one is missing, or no gain.

    Args:
        result: of a sweep whose first test is a divergence.
        first, second: names and retentions of rows.
    """
    outcome = result["test"][0]
    figures = []
    for at in (first, second, ("all", 1.0)):
        row = row_of(result, at)
        if row is None or outcome not in row["tasks"]:
            return None
        figures.append(row["tasks"][outcome])
    gain = result["before"][outcome]["mean"] - figures[2]["mean"]
    if gain <= 0:
        return None
    difference = compared(divergences_of(figures[1]), divergences_of(figures[0]))
    return {"mean": difference["mean"] / gain, "interval": [end / gain for end in difference["interval"]]}


def judged(result: Mapping[str, Any], claim: Comparison) -> tuple[str, str]:
    """The verdict of a claim on one pair, and the lead with its interval."""
    measured = lead(result, claim.first, claim.second)
    if measured is None:
        return NOT_RUN, ""
    low, high = measured["interval"]
    margin = _MARGINS.get(claim.kind, {}).get(claim.number or 0, 0.0)
    # `verdict` knows what is a tie of accuracies, so the lead is put in such units
    unit = TIE_OF_ACCURACIES / TIE
    answer = verdict(low * unit, high * unit, claim.kind, margin * unit)
    return answer, f"{percent(measured['mean'])} {brackets(measured, percent)}"


def told(results: Results, claim: Comparison, grid: str = next(iter(PAIRS))) -> str:
    """The verdict of a claim on a pair with the lead that it rests on, as a cell of a table."""
    answer, figure = judged(results[grid], claim) if grid in results else (NOT_RUN, "")
    return f"{answer}: {figure}" if figure else answer


def claims(results: Results) -> str:
    """Every claim and control that rows of these sweeps can decide."""
    lines = []
    for claim in (*CLAIMS, *CONTROLS, *OURS):
        cells = [told(results, claim, grid) for grid in PAIRS]
        if all(cell == NOT_RUN for cell in cells):
            continue
        number = f"{claim.number}. " if claim.number and claim not in OURS else ""
        lines.append([f"{number}{claim.claim}", overall([cell.partition(":")[0] for cell in cells]), *cells])
    return markdown_table(["claim", "in all", *PAIRS.values()], lines) if lines else "*Not run yet.*"


BLOCKS: dict[str, Callable[[Results], str]] = {"lm-rows": rows, "lm-claims": claims}
