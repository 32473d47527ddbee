"""Select: TokenScores → Selection. A rule is a score and a budget; nothing here knows a model, a config or a rank."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from dataclasses import fields as dataclass_fields
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..types import Selection, TokenScores
from . import budget, rules

__all__ = ["RULES", "SCOPES", "Rule", "kept_counts", "needs_teacher", "resolve_rule", "rule_fields", "select"]

SCOPES = ("rollout", "batch")
COMPLEMENT = "complement:"
_OF_STUDENT = {"entropy", "entropy_norm", "student_logprob"}


@dataclass(frozen=True)
class Rule:
    """A score, the statistics it reads, and what is done with it.

    Attributes:
        score: TokenScores → float [N].
        fields: names of the statistics that it reads; None: all of them.
        budget: "top" keeps the highest scores, "sample" draws ∝ score without replacement, "all" keeps everything.
        complement: keep what the rule would not have kept.
    """

    score: Callable[[TokenScores], Tensor]
    fields: tuple[str, ...] | None
    budget: str = "top"
    complement: bool = False


RULES: dict[str, Rule] = {
    "all": Rule(rules.uniform, (), "all"),
    "random": Rule(rules.uniform, (), "sample"),
    "entropy": Rule(rules.entropy, ("entropy_norm",)),
    "entropy_sampling": Rule(rules.entropy, ("entropy_norm",), "sample"),
    "soft_or": Rule(rules.soft_or, ("entropy_norm", "reverse_kl")),
    "soft_or_log": Rule(rules.soft_or_log, ("entropy_norm", "reverse_kl")),
    "q3": Rule(rules.q3, ("entropy_norm", "forward_kl")),
    "divergence": Rule(rules.divergence, ("reverse_kl",)),
    "hellinger": Rule(rules.hellinger, ("hellinger",)),
    "gradient_norm": Rule(rules.gradient_norm, ("gradient_norm",)),
    "signal_to_curvature": Rule(rules.signal_to_curvature, ("signal_to_curvature",)),
}


@torch.no_grad()
def select(
    scores: TokenScores,
    rule: str | Callable[[TokenScores], Tensor] | Rule = "soft_or",
    retention: float = 0.5,
    rollout: Tensor | None = None,
    scope: str = "rollout",
    generator: torch.Generator | None = None,
) -> Selection:
    """Choose the tokens that are trained on.

    K = the max(1, ⌊ρ·m⌋) tokens of each rollout (of m tokens) with the highest score, the earlier of equal ones
    (paper Eq. 8); sampling rules draw as many without replacement, each ∝ score. Percentiles and min-max run over all
    the tokens given, so give no padding and no prompt.

    Args:
        scores: statistics of N tokens; those that the rule reads must have been computed.
        rule: a name in `RULES`; "complement:<name>", which at retention ρ keeps what the rule at 1 − ρ would not keep
            (at ρ = 1 everything); a function TokenScores → float [N]; or the dotted path of one. A function may say
            what it reads in an attribute `fields`.
        retention: ρ in (0, 1]. "all" keeps everything whatever it is.
        rollout: int64 [N], which rollout each token belongs to; None: one rollout.
        scope: "rollout" spends the budget inside each rollout, "batch" over all tokens.
        generator: source of randomness of sampling rules, on the scores' device.

    Returns:
        Selection: mask bool [N], weight float32 [N] (1 for the kept tokens, 0 for the others), score float32 [N].

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
    if isinstance(retention, bool) or not 0.0 < retention <= 1.0:
        raise ValueError(f"retention must be in (0, 1], got {retention}.")
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(SCOPES)}, got {scope!r}.{_nearest(scope, SCOPES)}")
    _, some = next(scores.present(), (None, None))
    if some is None or len(some) == 0:
        raise ValueError("there is no token to select from: scores hold no statistic, or no token.")
    group, tokens = _groups(rollout, len(some), some.device)
    _check_finite(scores, resolved.fields, group)
    score = _scored(resolved, scores, len(some), group)
    if scope == "batch":
        spent_in, tokens = torch.zeros_like(group), tokens.sum().reshape(1)
    else:
        spent_in = group
    if resolved.budget == "all" or (retention == 1.0 and not resolved.complement):
        mask = torch.ones_like(group, dtype=torch.bool)
    else:
        key = budget.race(score, _on(generator, some.device)) if resolved.budget == "sample" else score.double()
        counts = _counts(resolved, tokens, retention)
        # the complement is what comes last in the very same order
        mask = (
            ~budget.top_k(key, spent_in, tokens - counts)
            if resolved.complement
            else budget.top_k(key, spent_in, counts)
        )
    return Selection(mask=mask, weight=mask.float(), score=score.float())


def kept_counts(
    lengths: Tensor, retention: float, rule: str | Callable[[TokenScores], Tensor] | Rule = "soft_or"
) -> Tensor:
    """Tokens that `select` keeps of each rollout, known from the lengths alone.

    Args:
        lengths: int64 [R], tokens of each rollout (or one entry with those of the batch, for scope "batch").
        retention: ρ in (0, 1].
        rule: as in `select`.

    Example:
        >>> kept_counts(torch.tensor([10, 3, 1]), 0.3).tolist()
        [3, 1, 1]
        >>> kept_counts(torch.tensor([10, 3, 1]), 0.3, "complement:soft_or").tolist()
        [3, 1, 1]
    """
    return _counts(resolve_rule(rule), lengths, retention)


def resolve_rule(rule: str | Callable[[TokenScores], Tensor] | Rule) -> Rule:
    """The Rule behind a name, a "complement:" of one, a callable or the dotted path of one.

    Raises:
        ValueError: no such rule; the nearest names are given.

    Example:
        >>> resolve_rule("complement:soft_or").complement
        True
        >>> resolve_rule("tipdistill.select.rules.entropy").budget
        'top'
    """
    if isinstance(rule, Rule):
        return rule
    if callable(rule):
        return Rule(rule, _declared_fields(rule))
    if not isinstance(rule, str):
        raise ValueError(f"a rule is a name, a dotted path or a callable, got {rule!r}.")
    if rule.startswith(COMPLEMENT):
        inner = resolve_rule(rule.removeprefix(COMPLEMENT))
        if inner.budget == "all" or inner.complement:
            raise ValueError(f"{rule!r} keeps nothing or is a rule itself: take the complement of a plain rule.")
        return replace(inner, complement=True)
    if rule in RULES:
        return RULES[rule]
    if "." not in rule.replace(":", "."):
        known = (*RULES, *(COMPLEMENT + name for name in RULES))
        raise ValueError(
            f"unknown rule {rule!r}; there are {', '.join(RULES)}, '{COMPLEMENT}<rule>', and the dotted path of a "
            f"function.{_nearest(rule, known)}"
        )
    module, _, name = rule.replace(":", ".").rpartition(".")
    try:
        function = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"the rule {rule!r} is no name in RULES and cannot be imported as a path: {error}.") from error
    if not callable(function):
        raise ValueError(f"the rule {rule!r} is a {type(function).__name__}, not a function of TokenScores.")
    return Rule(function, _declared_fields(function))


def rule_fields(rule: str | Callable[[TokenScores], Tensor] | Rule) -> tuple[str, ...] | None:
    """Names of the statistics that a rule reads; None: all of them.

    Example:
        >>> rule_fields("q3")
        ('entropy_norm', 'forward_kl')
    """
    return resolve_rule(rule).fields


def needs_teacher(rule: str | Callable[[TokenScores], Tensor] | Rule) -> bool:
    """Whether a rule reads anything of the teacher's, and so needs it projected for every token.

    Example:
        >>> needs_teacher("soft_or"), needs_teacher("entropy")
        (True, False)
    """
    fields = rule_fields(rule)
    return fields is None or not _OF_STUDENT.issuperset(fields)


def _declared_fields(function: Any) -> tuple[str, ...] | None:
    fields = getattr(function, "fields", None)
    if fields is None:
        return None
    known = [field.name for field in dataclass_fields(TokenScores)]
    for name in fields:
        if name not in known:
            raise ValueError(f"the rule reads an unknown statistic {name!r}.{_nearest(name, known)}")
    return tuple(fields)


def _counts(rule: Rule, lengths: Tensor, retention: float) -> Tensor:
    if rule.budget == "all" or retention == 1.0:
        return lengths
    if rule.complement:
        # what the rule at 1 − ρ leaves over; one token where that is nothing
        return (lengths - budget.share_of(lengths, 1 - retention)).clamp(min=1).minimum(lengths)
    return budget.share_of(lengths, retention)


def _groups(rollout: Tensor | None, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rollouts numbered from 0, [N], and the tokens of each, [R]."""
    if rollout is None:
        return torch.zeros(tokens, dtype=torch.int64, device=device), torch.tensor([tokens], device=device)
    if rollout.shape != (tokens,) or rollout.dtype.is_floating_point or rollout.dtype == torch.bool:
        raise ValueError(f"rollout must be int64 [{tokens}], got {rollout.dtype} {list(rollout.shape)}.")
    if rollout.device != device:
        raise ValueError(f"rollout is on {rollout.device}, the scores on {device}: move it there.")
    _, group, sizes = rollout.unique(return_inverse=True, return_counts=True)
    return group, sizes


def _scored(rule: Rule, scores: TokenScores, tokens: int, group: Tensor) -> Tensor:
    score = rule.score(scores)
    if not isinstance(score, Tensor) or score.shape != (tokens,) or score.dtype == torch.bool:
        given = f"{score.dtype} {list(score.shape)}" if isinstance(score, Tensor) else type(score).__name__
        raise ValueError(f"a rule must return a float tensor [{tokens}], this one returned {given}.")
    bad = ~torch.isfinite(score)
    if bad.any():
        raise ValueError(f"the rule's score is {_where(score, bad, group)}")
    if rule.budget == "sample" and bool((score < 0).any()):
        raise ValueError("a sampling rule's score must be ≥ 0: tokens are drawn in proportion to it.")
    return score


def _check_finite(scores: TokenScores, fields: tuple[str, ...] | None, group: Tensor) -> None:
    for name, value in scores.present():
        if value.shape != group.shape:
            raise ValueError(f"statistic '{name}' has {list(value.shape)} values for {len(group)} tokens.")
        if fields is not None and name not in fields:
            continue
        bad = ~torch.isfinite(value)
        if bad.any():
            raise ValueError(f"statistic '{name}' is {_where(value, bad, group)}")


def _where(value: Tensor, bad: Tensor, group: Tensor) -> str:
    first = int(bad.nonzero()[0, 0])
    number = int(group[first])
    position = int((group[:first] == number).sum())
    found = float(value[first])
    cause = (
        "the logits of a model are NaN or infinite"
        if math.isnan(found)
        else "the teacher gives probability 0 to what the student can say, or a model has diverged"
    )
    return f"{found} in rollout {number}, token {position}: {cause}. {int(bad.sum())} tokens are affected."


def _on(generator: torch.Generator | None, device: torch.device) -> torch.Generator | None:
    if generator is not None and generator.device.type != device.type:
        raise ValueError(
            f"the generator is on {generator.device}, the scores on {device}: make it with torch.Generator('{device}')."
        )
    return generator


def _nearest(name: Any, allowed: Any) -> str:
    near = difflib.get_close_matches(str(name), list(allowed), n=1)
    return f" Did you mean '{near[0]}'?" if near else ""
