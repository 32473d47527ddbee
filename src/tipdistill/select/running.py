"""What one step's tokens tell the next step's, so that tokens are chosen as they come and not once all are scored.

A choice looks at other tokens in two places: a rule scales its statistics by percentiles, minima and maxima, and a
budget over a batch is spent on the best of all. Both hardly move from a step to the next. `Running` keeps them, and
`select(..., running=...)` reads them there: what it then says of a token depends on no token of another rollout.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..types import TokenScores
from . import budget
from .choose import counts_of, score_of
from .normalize import Scales
from .registry import resolve_rule
from .rule import Rule

_HALVINGS = 200  # of an interval in log r, until neither end moves in float64


@dataclass(frozen=True)
class Running:
    """What a choice needs to know of the tokens of the step before.

    Attributes:
        scales: low and high end of each scaling of the rule, in its order.
        threshold: what a token's place in the order has to reach (`budget.race`, `budget.priority`, or the score
            itself), for a budget over the batch; None for one inside each rollout.
        mean_weight: of a rule that weighs, else None.
    """

    scales: tuple[tuple[float, float], ...] = ()
    threshold: float | None = None
    mean_weight: float | None = None

    def state(self) -> dict[str, Any]:
        """Itself as JSON holds it."""
        return asdict(self)

    @staticmethod
    def of_state(state: dict[str, Any]) -> Running:
        """What `state` gave.

        Example:
            >>> running = Running(((0.0, 1.0),), 0.5)
            >>> Running.of_state(running.state()) == running
            True
        """
        return Running(tuple(map(tuple, state["scales"])), state["threshold"], state["mean_weight"])


@torch.no_grad()
def running_of(
    scores: TokenScores,
    rule: str | Callable[..., Tensor] | Rule = "soft_or",
    retention: float = 0.5,
    rollout: Tensor | None = None,
    scope: str = "rollout",
) -> Running:
    """What these tokens tell the next.

    Where a budget is drawn, the threshold is the one at which the expected number of tokens is the budget k: −1/τ with
    Σ min(1, w/τ) = k for inverse probabilities, −r with Σ (1 − exp(−w·r)) = k for a race.

    Args:
        scores: statistics of the N tokens of a step, of all processes; N ≥ 1.
        rule, rollout, scope: as in `select`.
        retention: that of the next step.

    Raises:
        ValueError: an unknown rule.

    Example:
        >>> scores = TokenScores(reverse_kl=torch.tensor([0.0, 3.0, 1.0, 2.0]))
        >>> running_of(scores, "divergence", 0.5, scope="batch").threshold
        2.0
    """
    resolved, scales = resolve_rule(rule), Scales()
    score = score_of(resolved, scores, rollout, scales)
    threshold = mean_weight = None
    if resolved.budget == "weight":
        mean_weight = float(score.mean())
    elif resolved.budget != "all" and scope == "batch" and retention < 1:
        sizes = torch.tensor([len(score)])
        kept = int(counts_of(resolved, sizes, retention))
        # on the host, where looking at each halving does not wait for a GPU
        threshold = _threshold(resolved, score.double().cpu(), len(score) - kept if resolved.complement else kept)
    return Running(tuple(scales.read), threshold, mean_weight)


def _threshold(rule: Rule, score: Tensor, count: int) -> float:
    if rule.budget == "top":
        return float(torch.topk(score, count).values[-1]) if count else math.inf
    weight = score.clamp(min=budget.LEAST)
    # in log r: the weights may lie 200 orders of magnitude apart
    low, high = -math.log(float(weight.max())) - 50.0, -math.log(float(weight.min())) + 50.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        reached = (weight.log() + middle).exp()
        expected = reached.clamp(max=1) if rule.budget == "importance" else -torch.expm1(-reached)
        low, high = (middle, high) if float(expected.sum()) < count else (low, middle)
    return -math.exp(min(high, 700.0))
