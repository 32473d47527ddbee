"""Every selection rule by name: a score, the statistics it reads, and what is done with it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from dataclasses import fields as dataclass_fields
from importlib import import_module
from typing import Any

from torch import Tensor

from ..types import TokenScores
from . import rules

SCOPES = ("rollout", "batch")
BUDGETS = ("top", "sample", "importance", "all", "weight")
DRAWN = ("sample", "importance")
COMPLEMENT = "complement:"
_STATISTICS = tuple(field.name for field in dataclass_fields(TokenScores))
_OF_STUDENT = {"entropy", "entropy_norm", "student_logprob"}


@dataclass(frozen=True)
class Rule:
    """A score, the statistics it reads, and what is done with it.

    Attributes:
        score: TokenScores → float [N]; (TokenScores, Order) → float [N] where `ordered`.
        fields: names of the statistics that it reads; None: those that `token_scores` computes by default.
        budget: "top" keeps the highest scores; "sample" draws ∝ score without replacement; "importance" draws likewise
            and weighs what it keeps by the inverse of its probability, so that the loss and its gradient are those of
            all tokens in expectation; "all" keeps everything; "weight" keeps everything and weighs it by the score. A
            score that is drawn by or weighs is ≥ 0; a weight of 0 drops the token.
        complement: keep what the rule would not have kept.
        scope: where the budget is spent unless the caller says so, "rollout" or "batch".
        every_rollout: over a batch too, keep the best token of each rollout before any other.
        ordered: the score reads where the tokens stand in their rollouts.
    """

    score: Callable[..., Tensor]
    fields: tuple[str, ...] | None
    budget: str = "top"
    complement: bool = False
    scope: str = "rollout"
    every_rollout: bool = False
    ordered: bool = False

    def __post_init__(self) -> None:
        if self.budget not in BUDGETS:
            raise ValueError(f"a rule's budget is one of {', '.join(BUDGETS)}, got {self.budget!r}.")
        if self.budget == "importance" and (self.complement or self.every_rollout):
            raise ValueError(
                "a rule with the budget 'importance' has no complement and keeps no token for certain: take 'sample'."
            )
        if self.scope not in SCOPES:
            raise ValueError(f"a rule's scope is one of {', '.join(SCOPES)}, got {self.scope!r}.")
        for name in self.fields or ():
            if name not in _STATISTICS:
                raise ValueError(
                    f"the rule reads an unknown statistic {name!r}; there are {', '.join(_STATISTICS)}."
                    f"{nearest(name, _STATISTICS)}"
                )


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
    "gradient_norm_sampling": Rule(rules.gradient_norm, ("gradient_norm",), "importance"),
    "signal_to_curvature": Rule(rules.signal_to_curvature, ("signal_to_curvature",)),
    "entropy_jsd_sampling": Rule(rules.entropy_jsd, ("entropy_norm", "jsd"), "sample"),
    "teachability": Rule(
        rules.teachability, ("top16_forward_kl", "top16_teacher_mass"), scope="batch", every_rollout=True
    ),
    "teachability_soft_or": Rule(
        rules.teachability_soft_or,
        ("entropy_norm", "top16_forward_kl", "top16_teacher_mass"),
        scope="batch",
        every_rollout=True,
    ),
    "selectkd": Rule(rules.selectkd, ("argmax_in_top5",), "weight"),
    "position": Rule(rules.position, (), "weight", ordered=True),
    "prefix_compatibility": Rule(rules.prefix_compatibility, ("top16_overlap",), "weight", ordered=True),
    "confidence_ratio": Rule(rules.confidence_ratio, ("entropy", "teacher_entropy"), "weight"),
    "entropy_gap": Rule(rules.entropy_gap, ("entropy", "teacher_entropy"), "weight"),
    "cumulative_advantage": Rule(
        rules.cumulative_advantage, ("student_logprob", "teacher_logprob"), "weight", ordered=True
    ),
}


def resolve_rule(rule: str | Callable[[TokenScores], Tensor] | Rule) -> Rule:
    """The Rule behind a name, a "complement:" of one, a callable or the dotted path of one.

    Args:
        rule: as in `select`; a path is "package.module.function" or "package.module:function".

    Raises:
        ValueError: no such rule; the nearest names are given.

    Example:
        >>> resolve_rule("complement:soft_or").complement
        True
        >>> resolve_rule("tipdistill.select.rules:entropy").budget
        'top'
    """
    if isinstance(rule, Rule):
        return rule
    if callable(rule):
        return Rule(rule, _declared_fields(rule), ordered=bool(getattr(rule, "ordered", False)))
    if not isinstance(rule, str):
        raise ValueError(f"a rule is a name, a dotted path or a function of TokenScores, got {rule!r}.")
    if rule.startswith(COMPLEMENT):
        inner = resolve_rule(rule.removeprefix(COMPLEMENT))
        if inner.budget not in ("top", "sample") or inner.complement:
            raise ValueError(f"{rule!r} is no rule: take the complement of a rule that drops something, once.")
        return replace(inner, complement=True)
    return RULES[rule] if rule in RULES else _imported(rule)


def rule_fields(rule: str | Callable[[TokenScores], Tensor] | Rule) -> tuple[str, ...] | None:
    """Names of the statistics that a rule reads; None: those that `token_scores` computes by default.

    Args:
        rule: as in `select`.

    Example:
        >>> rule_fields("q3")
        ('entropy_norm', 'forward_kl')
    """
    return resolve_rule(rule).fields


def needs_teacher(rule: str | Callable[[TokenScores], Tensor] | Rule) -> bool:
    """Whether a rule reads anything of the teacher's, and so needs it projected for every token.

    Args:
        rule: as in `select`.

    Example:
        >>> needs_teacher("soft_or"), needs_teacher("entropy")
        (True, False)
    """
    fields = rule_fields(rule)
    return fields is None or not _OF_STUDENT.issuperset(fields)


def _imported(path: str) -> Rule:
    module, _, name = path.replace(":", ".").rpartition(".")
    known = [*RULES, *(COMPLEMENT + name for name, rule in RULES.items() if rule.budget in ("top", "sample"))]
    unknown = (
        f"unknown rule {path!r}; there are {', '.join(RULES)}, '{COMPLEMENT}<rule>', and the dotted path of a function "
        f"of TokenScores.{nearest(path, known)}"
    )
    if not all(part.isidentifier() for part in (*module.split("."), name)):
        raise ValueError(unknown)
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{unknown} As a path: {error}; its folder must be on PYTHONPATH.") from error
    if not callable(found) and not isinstance(found, Rule):
        raise ValueError(f"the rule {path!r} is a {type(found).__name__}, not a function of TokenScores.")
    return resolve_rule(found)


def _declared_fields(function: Any) -> tuple[str, ...] | None:
    fields = getattr(function, "fields", None)
    return (fields,) if isinstance(fields, str) else None if fields is None else tuple(fields)


def nearest(name: Any, allowed: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(name), list(allowed), n=2)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
