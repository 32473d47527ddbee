"""What each rule would keep at each retention, from saved statistics alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..select import DRAWN, RULES, draw, kept_counts, resolve_rule
from ..select.budget import ranks, top_k
from ..types import TokenScores

RETENTIONS = (
    *(0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.12, 0.15),
    *(0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
)
BOTTOM = "complement:soft_or"
# rules that weigh tokens keep them all, at any retention
BUDGETED = ("top", *DRAWN)


def computable_rules(scores: TokenScores) -> list[str]:
    """The rules that spend a budget, and Soft-OR's complement, as far as the statistics given suffice for them.

    Example:
        >>> computable_rules(TokenScores(reverse_kl=torch.ones(1)))
        ['random', 'divergence']
    """
    names = [name for name, rule in RULES.items() if rule.budget in BUDGETED] + [BOTTOM]
    known = {name for name, _ in scores.present()}
    return [name for name in names if known.issuperset(resolve_rule(name).fields or ())]


@torch.no_grad()
def keep_levels(
    order: Tensor,
    rollout: Tensor,
    retentions: Sequence[float] = RETENTIONS,
    rule: str = "soft_or",
    scope: str = "rollout",
) -> np.ndarray:
    """How generous a budget must be for a token to be kept: a place among `retentions`.

    A token of level l is kept at retentions[l] and above, and at none below: what `select` keeps of a rollout at a
    small retention it keeps at any larger one, so that one byte per token holds its fate at all of them.

    Args:
        order: float [N], what the rule ranks by, see `ranking`.
        rollout: int64 [N] in 0..R−1, every number taken.
        retentions: ascending, the last one 1; at most 255.
        rule: says how many are kept, and whether the first or the last.
        scope: "rollout", or "batch" where one budget is spent over all tokens.

    Returns:
        uint8 [N].

    Example:
        >>> keep_levels(torch.tensor([0.1, 0.9, 0.5]), torch.zeros(3, dtype=torch.int64), [0.4, 0.7, 1.0]).tolist()
        [2, 0, 1]
    """
    assert [*retentions[:-1], 1] == sorted(retentions), "retentions ascend to 1"
    resolved, lengths = resolve_rule(rule), torch.bincount(rollout)
    spent_in = torch.zeros_like(rollout) if scope == "batch" else rollout
    if scope == "batch" and resolved.every_rollout and not resolved.complement:
        order = order.masked_fill(top_k(order, rollout, torch.ones_like(lengths)), math.inf)
    sizes = torch.bincount(spent_in)
    place = ranks(order, spent_in, len(sizes))
    level = torch.zeros(len(order), dtype=torch.uint8)
    for retention in retentions[:-1]:
        kept = kept_counts(lengths, retention, rule, scope)
        level += place < (sizes - kept)[spent_in] if resolved.complement else place >= kept[spent_in]
    return level.numpy()


@torch.no_grad()
def ranking(scores: TokenScores, rule: str, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """What a rule scores, and what `select` orders the tokens by: the score, or a draw where the rule samples.

    Args:
        scores: the statistics that the rule reads, float32 [N].
        rule: a name in `RULES`, or "complement:<name>".
        generator: of the draws.

    Returns:
        Score float32 [N], order float [N].
    """
    resolved = resolve_rule(rule)
    score = resolved.score(scores)
    return score, draw(resolved, score, generator) if resolved.budget in DRAWN else score
