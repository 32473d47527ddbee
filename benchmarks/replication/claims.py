"""The paper's claims as differences of two rows, and verdicts as a function of an interval: no one's opinion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tipdistill.text import markdown_table

from .results import TASKS, TEACHER, At, Results, difference
from .wording import signed_with_interval

NOT_RUN = "not run"
VERDICTS = ("holds", "does not hold", "undecided")
# Accuracies closer than this are called equal, and at most this far below counts as "nearly".
TIE, NEARLY, MUCH = 0.02, 0.05, 0.10


@dataclass(frozen=True)
class Comparison:
    """A claim as a difference of two rows.

    Attributes:
        claim: what it says of these two rows.
        first, second: rows.
        kind: "above": first − second > margin; "matches": first − second ≥ −margin;
            "level": |first − second| < margin;
            "below": first < margin.
        margin: see there.
        number: which of the paper's claims it belongs to; None: a control of ours.
        grids: the folder of the grids that have these rows.
    """

    claim: str
    first: At
    second: At
    kind: str = "above"
    margin: float = 0.0
    number: int | None = None
    grids: str = ""


CLAIMS = (
    Comparison(
        "Entropy sampling at 50 % matches or beats all tokens",
        ("entropy_sampling", 0.5),
        ("all", 1.0),
        "matches",
        TIE,
        number=1,
    ),
    Comparison(
        "Entropy sampling is worse at 20 % than at 50 %", ("entropy_sampling", 0.5), ("entropy_sampling", 0.2), number=1
    ),
    Comparison(
        "Entropy sampling is worse at 10 % than at 50 %", ("entropy_sampling", 0.5), ("entropy_sampling", 0.1), number=1
    ),
    Comparison("Soft-OR beats entropy sampling at 50 %", ("soft_or", 0.5), ("entropy_sampling", 0.5), number=2),
    Comparison("Soft-OR beats entropy sampling at 20 %", ("soft_or", 0.2), ("entropy_sampling", 0.2), number=2),
    Comparison("Q3 at 10 % nearly matches all tokens", ("q3", 0.1), ("all", 1.0), "matches", NEARLY, number=3),
    Comparison("Q3 at 20 % beats all tokens (there: agentic planning)", ("q3", 0.2), ("all", 1.0), number=3),
    Comparison(
        "The top half by Soft-OR is much better than the bottom half",
        ("soft_or", 0.5),
        ("complement:soft_or", 0.5),
        margin=MUCH,
        number=4,
    ),
    Comparison("Q3 at 10 % is better than divergence alone at 10 %", ("q3", 0.1), ("divergence", 0.1), number=5),
)
TEACHERS_ENTROPY = tuple(
    Comparison(
        f"The {which} {100 * share:.0f} % by the teacher's entropy do as well as random tokens",
        (f"{which} teacher entropy", share),
        ("random", share),
        "level",
        TIE,
        number=7,
        grids=TEACHER,
    )
    for share in (0.5, 0.1)
    for which in ("highest", "lowest")
)
CONTROLS = (
    Comparison("Soft-OR at 50 % beats random tokens", ("soft_or", 0.5), ("random", 0.5)),
    Comparison("Soft-OR at 20 % beats random tokens", ("soft_or", 0.2), ("random", 0.2)),
    Comparison("Entropy sampling at 10 % beats random tokens", ("entropy_sampling", 0.1), ("random", 0.1)),
    Comparison("Q3 at 10 % beats random tokens", ("q3", 0.1), ("random", 0.1)),
    Comparison("Soft-OR at 10 % beats random tokens", ("soft_or", 0.1), ("random", 0.1)),
)


def verdict(low: float, high: float, kind: str, margin: float) -> str:
    """What the interval of a difference says of a claim.

    Args:
        low, high: the 95 % interval of first − second.
        kind, margin: see `Comparison`.

    Returns:
        "holds", "does not hold" or "undecided". A claim of "above" does not hold where the lead is below a tie for
        certain, although it may not be zero. One of "level" does not hold where the interval excludes zero and reaches
        beyond the margin.

    Example:
        >>> verdict(0.01, 0.05, "above", 0.0), verdict(-0.01, 0.05, "above", 0.0), verdict(-0.01, 0.01, "above", 0.0)
        ('holds', 'undecided', 'does not hold')
    """
    if kind == "level":
        return "holds" if -margin < low and high < margin else "does not hold" if low > 0 or high < 0 else "undecided"
    if kind == "below":
        return "holds" if high < margin else "does not hold" if low >= margin else "undecided"
    if kind == "matches":
        return "holds" if low >= -margin else "does not hold" if high < -margin else "undecided"
    assert kind == "above", kind
    return "holds" if low > margin else "does not hold" if high < max(margin, TIE) else "undecided"


def overall(verdicts: Sequence[str]) -> str:
    """One verdict of several tasks: theirs where they agree, else how many of them say what.

    Example:
        >>> overall(["holds", "holds", "holds"]), overall(["holds", "undecided", "not run"])
        ('**holds**', 'holds: 1, undecided: 1')
    """
    reached = [text for text in verdicts if text != NOT_RUN]
    if not reached:
        return NOT_RUN
    if len(set(reached)) == 1 and len(reached) == len(verdicts):
        return f"**{reached[0]}**"
    return ", ".join(f"{text}: {reached.count(text)}" for text in VERDICTS if text in reached)


def judged(results: Results, comparison: Comparison) -> tuple[list[str], list[str]]:
    """The verdicts of one comparison, task by task, and the differences with their intervals that they rest on."""
    verdicts, differences = [], []
    for name in TASKS:
        grid = f"{comparison.grids}/{name}".lstrip("/")
        measured = difference(results[grid], comparison.first, comparison.second) if grid in results else None
        if measured is None:
            verdicts.append(NOT_RUN)
            differences.append("")
            continue
        low, high = measured["interval"]
        verdicts.append(verdict(low, high, comparison.kind, comparison.margin))
        differences.append(signed_with_interval(measured))
    return verdicts, differences


def verdict_row(claim: str, verdicts: Sequence[str], figures: Sequence[str]) -> list[str]:
    """A row of a table of verdicts: the claim, the verdict of all tasks, then each task's verdict with its figure.

    Example:
        >>> verdict_row("a claim", ["holds", "not run", "holds"], ["+0.1", "", "+0.2"])
        ['a claim', 'holds: 2', 'holds: +0.1', 'not run', 'holds: +0.2']
    """
    pairs = zip(verdicts, figures, strict=True)
    return [claim, overall(verdicts), *(f"{text}: {figure}" if figure else text for text, figure in pairs)]


def verdict_table(rows: Sequence[Sequence[str]], first: str = "claim") -> str:
    """The table of such rows."""
    return markdown_table([first, "in all", *TASKS.values()], rows)
