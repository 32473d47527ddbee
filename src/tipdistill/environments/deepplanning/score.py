"""What a plan is worth: the hard score, eight dimensions of common sense, and what is made of both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean

from ...types import Verdict
from .commonsense import DIMENSIONS, commonsense
from .data import Database, Query
from .hard import hard_constraints
from .plan import Plan


@dataclass(frozen=True)
class Scores:
    """Of one plan.

    Attributes:
        constraints: hard constraint → whether it holds.
        checks: dimension → check → whether it is passed.
        delivered: whether there is a plan at all; without one nothing holds.

    Example:
        >>> checks = {"a": {"b": True, "c": False}, "d": {"e": True}}
        >>> scores = Scores({"train_seat_class": True}, checks)
        >>> scores.hard, scores.commonsense, scores.composite, scores.case_accuracy
        (True, 0.5, 0.75, False)
    """

    constraints: Mapping[str, bool]
    checks: Mapping[str, Mapping[str, bool]] = field(default_factory=dict)
    delivered: bool = True

    @property
    def hard(self) -> bool:
        """Whether all hard constraints hold, of which there is one at least."""
        return bool(self.constraints) and all(self.constraints.values())

    @property
    def hard_share(self) -> float:
        """Share of the hard constraints that hold."""
        return fmean(self.constraints.values()) if self.constraints else 0.0

    @property
    def dimensions(self) -> dict[str, bool]:
        """Dimension → whether it passes all of its checks."""
        return {dimension: all(checks.values()) for dimension, checks in self.checks.items()}

    @property
    def commonsense(self) -> float:
        """Share of the dimensions that are passed."""
        return fmean(self.dimensions.values())

    @property
    def composite(self) -> float:
        """Mean of the hard score and of the one for common sense."""
        return (self.hard + self.commonsense) / 2

    @property
    def case_accuracy(self) -> bool:
        """Whether everything holds."""
        return self.hard and all(self.dimensions.values())


def score(plan: Plan | None, query: Query, database: Database) -> Scores:
    """What a plan is worth.

    Args:
        plan: the plan; None: none was delivered.
        query: what was asked for.
        database: of the query.
    """
    if plan is None:
        nothing = {dimension: dict.fromkeys(checks, False) for dimension, checks in DIMENSIONS.items()}
        return Scores(dict.fromkeys(query.constraints, False), nothing, delivered=False)
    return Scores(hard_constraints(plan, query), commonsense(plan, query, database))


def verdict(scores: Scores, own_parser: bool) -> Verdict:
    """The scores as an environment gives them.

    Args:
        scores: of the plan.
        own_parser: whether the plan was read by the parser of this package, as which its figures are then labelled: an
            evaluation shows the mean of `own_parser` beside them.
    """
    figures = {
        "hard": scores.hard,
        "hard_share": scores.hard_share,
        "commonsense": scores.commonsense,
        **scores.dimensions,
        "composite": scores.composite,
        "delivered": scores.delivered,
        "own_parser": own_parser,
    }
    parts = {**scores.constraints, **scores.dimensions}
    return Verdict(scores.case_accuracy, parts, {name: float(figure) for name, figure in figures.items()})
