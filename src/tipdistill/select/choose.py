"""Select: TokenScores → Selection. A rule is a score and a budget; nothing here knows a model, a config or a rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..text import STAY_FINITE, check_known
from ..types import Selection, TokenScores
from . import budget
from .normalize import Scales
from .order import Order
from .registry import RULES, resolve_rule
from .rule import DRAWN, SCOPES, Rule

if TYPE_CHECKING:
    from .running import Running

__all__ = ["RULES", "counts_of", "draw", "kept_counts", "score_of", "select"]

SCORE = "the rule's score"  # in messages


@torch.no_grad()
def select(
    scores: TokenScores,
    rule: str | Callable[[TokenScores], Tensor] | Rule = "soft_or",
    retention: float = 0.5,
    rollout: Tensor | None = None,
    scope: str | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    running: Running | None = None,
) -> Selection:
    """Choose the tokens that are trained on.

    K = the max(1, ⌊ρ·m⌋) tokens of each rollout (of m tokens) with the highest score, the earlier of equal ones
    (paper Eq. 8); sampling rules draw as many without replacement, each ∝ score, and those with the budget "importance"
    give what they keep the weight ρ/π, π a token's probability of being kept and ρ the share that is. Percentiles and
    min-max run over all the tokens given, so give no padding and no prompt. Weight rules keep every token, whatever the
    retention, and give it their score as its weight in the loss.

    Args:
        scores: statistics of N tokens, float [N]. `token_scores(..., rule=rule)` computes those that the rule reads.
        rule: a name in `RULES`; "complement:<name>", which at retention ρ keeps what the rule at 1 − ρ would not keep
            (one token where that is nothing, at ρ = 1 everything; drawn from the same state of the generator);
            a function TokenScores → float [N]; or the dotted path of one. A function may say what it reads in an
            attribute `fields`; one with an attribute `ordered = True` is given the tokens' `Order` beside the scores.
        retention: ρ in (0, 1], read as the fraction that was written. "all" keeps everything whatever it is.
        rollout: int64 [N], which rollout each token belongs to, any numbers in any order; None: one rollout. Rules that
            read positions take the tokens of a rollout to be in their order.
        scope: "rollout" spends the budget inside each rollout, "batch" over all tokens; None: the rule's own, which is
            "rollout" for all but teachability.
        generator: source of randomness of sampling rules; one for each rollout, in the order of their numbers, draws
            the same of a rollout whatever others are beside it; None: torch's default for the scores' device.
        running: what the tokens of the step before told (`running_of`): their percentiles, minima and maxima in the
            place of these tokens' own, over a batch the tokens that reach their threshold, about ρ of them, and weights
            whose mean is about 1.

    Returns:
        Selection: mask bool [N], weight float32 [N] (1 for the kept tokens or what a weight rule gives them, 0 for the
        others), score float32 [N]. `total` of it is what the loss divides by.

    Raises:
        ValueError: an unknown name (the nearest is given), a retention outside (0, 1], no token, a rollout that does
            not fit, or a statistic that is NaN or infinite (which, in which rollout, at which token).

    Example:
        >>> scores = TokenScores(entropy_norm=torch.tensor([0.9, 0.1, 0.0, 0.5]),
        ...                      reverse_kl=torch.tensor([0.0, 2.0, 0.1, 0.0]))
        >>> select(scores, "soft_or", retention=0.5).mask.tolist()
        [True, True, False, False]
    """
    resolved = resolve_rule(rule)
    _check_retention(retention)
    scope = resolved.scope if scope is None else scope
    check_known("scope", scope, SCOPES)
    _, some = next(scores.present(), (None, None))
    if some is None or some.numel() == 0:
        raise ValueError("there is no token to select from: give the scores of at least one completion token.")
    if rollout is None:
        rollout = torch.zeros(some.shape, dtype=torch.int64, device=some.device)
    _check_rollout(rollout, some)
    # half precision has too few steps to rank by
    scores = scores.map(lambda value: value if value.dtype == torch.float64 else value.float())
    _check_shapes(scores, rollout)
    read = {f"statistic '{name}'": value for name, value in scores.present() if _reads(resolved, name)}
    try:
        score = score_of(resolved, scores, rollout, Scales(None if running is None else running.scales))
    except Exception:  # a rule is anybody's code: a NaN that it was given may be why, and is told first
        if read:
            _check_numbers(read, rollout, resolved)
        raise
    _check_score(score, resolved, rollout)
    _check_numbers({**read, SCORE: score}, rollout, resolved)
    if resolved.budget == "weight":
        mean = 1.0 if running is None or not running.mean_weight else running.mean_weight
        return Selection(mask=score > 0, weight=(score / mean).float(), score=score.float())
    if resolved.budget == "all" or retention == 1:
        mask = torch.ones_like(rollout, dtype=torch.bool)
    else:
        spent_in = torch.zeros_like(rollout) if scope == "batch" else rollout
        _, group, sizes = spent_in.unique(return_inverse=True, return_counts=True)
        order = _drawn(resolved, score, rollout, generator) if resolved.budget in DRAWN else score
        kept = counts_of(resolved, sizes, retention)
        if scope == "batch" and _keeps_every_rollout(resolved):
            best = budget.top_k(score, *_one_each(rollout))
            order = order.masked_fill(best, math.inf)
            kept = kept.clamp(min=int(best.sum()))
        threshold = running.threshold if running is not None and scope == "batch" else None
        # a complement keeps what comes last in the very same order
        if threshold is None:
            first = budget.top_k(order, group, sizes - kept if resolved.complement else kept)
        else:
            first = order >= threshold
        mask = ~first if resolved.complement else first
        if resolved.budget == "importance":
            if threshold is None:
                chance = budget.inclusion(score, order, group, kept)
            else:
                chance = budget.reaching(score, threshold)
            share = kept.sum() / len(score) if running is None else retention
            weight = torch.where(mask, share / chance, 0.0)
            return Selection(mask, weight.float(), score.detach().float(), inverse_probability=True)
    return Selection(mask=mask, weight=mask.float(), score=score.detach().float())


def score_of(rule: Rule, scores: TokenScores, rollout: Tensor | None, scales: Scales) -> Tensor:
    """The score of each token, float [N].

    Args:
        rule: whose.
        scores: statistics of N tokens.
        rollout: int64 [N], which rollout each belongs to; None: one rollout.
        scales: where percentiles, minima and maxima come from, or where those of these tokens are put down.
    """
    if rule.ordered:
        if rollout is None:
            _, some = next(scores.present())
            rollout = torch.zeros(some.shape, dtype=torch.int64, device=some.device)
        return rule.score(scores, Order.of(rollout))
    return rule.score(scores, scales) if rule.scaled else rule.score(scores)


def _drawn(
    rule: Rule, score: Tensor, rollout: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None
) -> Tensor:
    if generator is None or isinstance(generator, torch.Generator):
        return draw(rule, score, generator)
    numbers = rollout.unique().tolist()
    if len(numbers) != len(generator):
        raise ValueError(f"give one generator for each of the {len(numbers)} rollouts, got {len(generator)}.")
    order = torch.empty(len(score), dtype=torch.float64, device=score.device)
    for number, own in zip(numbers, generator, strict=True):
        order[rollout == number] = draw(rule, score[rollout == number], own)
    return order


def draw(rule: Rule, score: Tensor, generator: torch.Generator | None) -> Tensor:
    """What a rule that draws orders the tokens by, float64 [N]: its sample of k are the k highest.

    Args:
        rule: with a budget in `DRAWN`.
        score: float [N], ≥ 0.
        generator: source of randomness; None: torch's default for the score's device.

    Example:
        >>> draw(RULES["entropy_sampling"], torch.tensor([1.0, 0.0]), torch.Generator().manual_seed(0)).argmax()
        tensor(0)
    """
    return (budget.priority if rule.budget == "importance" else budget.race)(score, generator)


def kept_counts(
    lengths: Tensor,
    retention: float,
    rule: str | Callable[[TokenScores], Tensor] | Rule = "soft_or",
    scope: str = "rollout",
) -> Tensor:
    """Tokens that `select` keeps of each rollout, known from the lengths alone.

    max(1, ⌊ρ·m⌋) of m tokens; max(1, m − max(1, ⌊(1 − ρ)·m⌋)) for a complement; m for "all" and for weight rules
    (whose weights of 0 are counted); 0 of an empty rollout.

    Args:
        lengths: int64 [B], tokens of each rollout.
        retention: ρ in (0, 1].
        rule: as in `select`.
        scope: "rollout", or "batch" for the one budget of all of them.

    Returns:
        int64 [B], tokens; [1] for scope "batch".

    Raises:
        ValueError: an unknown rule, a retention outside (0, 1], or lengths that are no counts.

    Example:
        >>> kept_counts(torch.tensor([10, 3, 1, 0]), 0.3).tolist()
        [3, 1, 1, 0]
        >>> kept_counts(torch.tensor([10, 3, 1, 0]), 0.3, "complement:soft_or").tolist()
        [3, 1, 1, 0]
    """
    _check_retention(retention)
    if lengths.dtype != torch.int64 or bool((lengths < 0).any()):
        raise ValueError(f"lengths must be int64 counts of tokens ≥ 0, got {lengths.dtype}: {lengths.tolist()}.")
    resolved = resolve_rule(rule)
    if scope == "rollout":
        return counts_of(resolved, lengths, retention)
    counts = counts_of(resolved, lengths.sum().reshape(1), retention)
    return counts.clamp(min=int((lengths > 0).sum())) if _keeps_every_rollout(resolved) else counts


def counts_of(rule: Rule, lengths: Tensor, retention: float) -> Tensor:
    """Tokens that a rule keeps of groups of these lengths, int64 [G] both."""
    if rule.budget in ("all", "weight") or retention == 1:
        return lengths
    if rule.complement:
        return (lengths - budget.share_of(lengths, 1 - retention)).clamp(min=1).minimum(lengths)
    return budget.share_of(lengths, retention)


def _keeps_every_rollout(rule: Rule) -> bool:
    # a complement is a control of the plain order
    return rule.every_rollout and not rule.complement and rule.budget in ("top", "sample")


def _one_each(rollout: Tensor) -> tuple[Tensor, Tensor]:
    numbers, group = rollout.unique(return_inverse=True)
    return group, torch.ones_like(numbers)


def _check_retention(retention: Any) -> None:
    # `bool` is an `int`, and True would pass as 1
    if isinstance(retention, bool) or not isinstance(retention, (int, float)) or not 0 < retention <= 1:
        raise ValueError(f"retention is the share of the tokens that is kept, a number in (0, 1], got {retention!r}.")


def _check_rollout(rollout: Any, some: Tensor) -> None:
    if not isinstance(rollout, Tensor) or rollout.shape != some.shape or rollout.dtype != torch.int64:
        given = f"{rollout.dtype} {list(rollout.shape)}" if isinstance(rollout, Tensor) else type(rollout).__name__
        raise ValueError(
            f"rollout must be int64 {list(some.shape)}, the rollout of each token, got {given}: "
            "give one entry per completion token, without padding."
        )
    if rollout.device != some.device:
        raise ValueError(f"rollout is on {rollout.device}, the scores on {some.device}: rollout.to(scores' device).")


def _reads(rule: Rule, name: str) -> bool:
    return rule.fields is None or name in rule.fields


def _check_shapes(scores: TokenScores, rollout: Tensor) -> None:
    for name, value in scores.present():
        if value.shape != rollout.shape or value.ndim != 1:
            raise ValueError(
                f"statistic '{name}' has shape {list(value.shape)}, for {len(scores)} tokens it must be "
                f"[{len(scores)}]: give real completion tokens, flattened, e.g. entropy[mask]."
            )


def _check_score(score: Any, rule: Rule, rollout: Tensor) -> None:
    if not isinstance(score, Tensor) or score.shape != rollout.shape or not score.is_floating_point():
        given = f"{score.dtype} {list(score.shape)}" if isinstance(score, Tensor) else type(score).__name__
        raise ValueError(f"a rule must return one float score per token, [{len(rollout)}]; this one returned {given}.")
    if score.device != rollout.device:
        raise ValueError(f"the rule's score is on {score.device}, the statistics on {rollout.device}.")


def _check_numbers(values: dict[str, Tensor], rollout: Tensor, rule: Rule) -> None:
    """Refuse what only the numbers show, after one look: on a GPU each look waits for the device."""
    bad = torch.stack([~torch.isfinite(value).all() for value in values.values()])
    if rule.budget in (*DRAWN, "weight") and SCORE in values:
        bad = torch.cat([bad, (values[SCORE] < 0).any()[None]])
    if not bool(bad.any()):
        return
    for name, value in values.items():
        _check_finite(name, value, rollout)
    raise ValueError(f"a {rule.budget} rule's score must be ≥ 0: tokens are drawn, or weighed, in proportion to it.")


def _check_finite(name: str, value: Tensor, rollout: Tensor) -> None:
    bad = ~torch.isfinite(value)
    if not bad.any():
        return
    first = int(bad.nonzero()[0, 0])
    number, offender = int(rollout[first]), float(value[first])
    position = int((rollout[:first] == number).sum())
    cause = (
        "the logits of a model are NaN or infinite."
        if math.isnan(offender)
        else f"one model gives probability 0 to what the other can say. {STAY_FINITE}"
    )
    raise ValueError(
        f"{name} is {offender} in rollout {number}, token {position} (both from 0), as one of "
        f"{int(bad.sum())} of {len(value)} tokens: {cause}"
    )
