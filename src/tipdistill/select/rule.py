"""What a rule is: a score, the statistics it reads, and what is done with it. Which there are: registry.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..text import check_known
from ..types import STATISTICS

SCOPES = ("rollout", "batch")
BUDGETS = ("top", "sample", "importance", "all", "weight")
DRAWN = ("sample", "importance")


@dataclass(frozen=True)
class Rule:
    """A score, the statistics it reads, and what is done with it.

    A rule of your own needs no change here: write a function TokenScores → float [N], and give `select` or
    `selection_rule` the function, its dotted path, or a Rule of it. One for everyone begins in select/contrib.py, as a
    function and a line of `CONTRIB`; the end of docs/rules.md has the whole list.

    Attributes:
        score: TokenScores → float [N]; (TokenScores, Order) → float [N] where `ordered`; (TokenScores, Scales) →
            float [N] where `scaled`.
        fields: names of the statistics that it reads; None: those that `token_scores` computes by default.
        budget: "top" keeps the highest scores; "sample" draws ∝ score without replacement; "importance" draws likewise
            and weighs what it keeps by the inverse of its probability, so that the loss and its gradient are those of
            all tokens in expectation; "all" keeps everything; "weight" keeps everything and weighs it by the score. A
            score that is drawn by or weighs is ≥ 0; a weight of 0 drops the token.
        complement: keep what the rule would not have kept.
        scope: where the budget is spent unless the caller says so, "rollout" or "batch".
        every_rollout: over a batch too, keep the best token of each rollout before any other.
        ordered: the score reads where the tokens stand in their rollouts.
        scaled: the score scales by percentiles, minima or maxima of the tokens given, and takes the `Scales` that hold
            them beside the scores; False: it reads each token alone; None: nobody knows, as of a plain function, and
            then it is not trained with normalization="running".

    Raises:
        ValueError: an unknown budget, scope or statistic (the nearest is given), or an importance sample that is to
            keep some tokens for certain.

    Example:
        >>> import torch
        >>> from tipdistill import TokenScores, select
        >>> wrong = Rule(lambda scores: scores.require("forward_kl"), ("forward_kl",), budget="sample")
        >>> select(TokenScores(forward_kl=torch.tensor([0.0, 2.0, 0.0])), wrong, retention=0.4).mask.tolist()
        [False, True, False]
    """

    score: Callable[..., Tensor]
    fields: tuple[str, ...] | None
    budget: str = "top"
    complement: bool = False
    scope: str = "rollout"
    every_rollout: bool = False
    ordered: bool = False
    scaled: bool | None = False

    def __post_init__(self) -> None:
        check_known("a rule's budget", self.budget, BUDGETS)
        check_known("a rule's scope", self.scope, SCOPES)
        for name in self.fields or ():
            check_known("a statistic that a rule reads", name, STATISTICS)
        if self.ordered and self.scaled:
            raise ValueError("a rule's score takes the Order of its tokens or their Scales, not both.")
        if self.budget == "importance" and (self.complement or self.every_rollout):
            raise ValueError(
                "a rule with the budget 'importance' has no complement and keeps no token for certain: take 'sample'."
            )
