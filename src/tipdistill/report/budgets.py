"""What each rule would keep at each retention, from saved statistics alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..select import RULES, kept_counts, resolve_rule
from ..select.budget import race, ranks
from ..types import TokenScores

RETENTIONS = (
    *(0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.12, 0.15),
    *(0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
)
BOTTOM = "complement:soft_or"


def computable_rules(scores: TokenScores) -> list[str]:
    """The rules of `RULES` (but "all") and Soft-OR's complement that read nothing but the statistics given.

    Example:
        >>> computable_rules(TokenScores(reverse_kl=torch.ones(1)))
        ['random', 'divergence']
    """
    names = [name for name, rule in RULES.items() if rule.budget != "all"] + [BOTTOM]
    known = {name for name, _ in scores.present()}
    return [name for name in names if known.issuperset(resolve_rule(name).fields or ())]


@torch.no_grad()
def keep_levels(
    order: Tensor, rollout: Tensor, retentions: Sequence[float] = RETENTIONS, *, complement: bool = False
) -> np.ndarray:
    """How generous a budget must be for a token to be kept: a place among `retentions`.

    A token of level l is kept at retentions[l] and above, and at none below: what `select` keeps of a rollout at a
    small retention it keeps at any larger one, so that one byte per token holds its fate at all of them.

    Args:
        order: float [N], what the rule ranks by, see `ranking`.
        rollout: int64 [N] in 0..R−1, every number taken; all 0 where one budget is spent over all tokens.
        retentions: ascending, the last one 1; at most 255.
        complement: the rule keeps what comes last.

    Returns:
        uint8 [N].

    Example:
        >>> keep_levels(torch.tensor([0.1, 0.9, 0.5]), torch.zeros(3, dtype=torch.int64), [0.4, 0.7, 1.0]).tolist()
        [2, 0, 1]
    """
    assert [*retentions[:-1], 1] == sorted(retentions), "retentions ascend to 1"
    lengths = torch.bincount(rollout)
    place = ranks(order, rollout)
    level = torch.zeros(len(order), dtype=torch.uint8)
    for retention in retentions[:-1]:
        kept = kept_counts(lengths, retention, BOTTOM if complement else "soft_or")
        level += place < (lengths - kept)[rollout] if complement else place >= kept[rollout]
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
    return score, race(score, generator) if resolved.budget == "sample" else score
