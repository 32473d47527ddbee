"""Every selection rule by name, and what may stand in the place of a name: a function, or the dotted path of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..dotted import is_dotted, load
from ..text import nearest
from ..types import OF_STUDENT, TokenScores
from . import rules
from .contrib import CONTRIB
from .rule import Rule

COMPLEMENT = "complement:"

# A line: the name, the score (a function of rules.py), the statistics that it reads, what is done with it. A new rule
# begins in contrib.py; see `Rule`.
RULES: dict[str, Rule] = {
    "all": Rule(rules.uniform, (), "all"),
    "random": Rule(rules.uniform, (), "sample"),
    "entropy": Rule(rules.entropy, ("entropy_norm",)),
    "entropy_sampling": Rule(rules.entropy, ("entropy_norm",), "sample"),
    "soft_or": Rule(rules.soft_or, ("entropy_norm", "reverse_kl"), scaled=True),
    "soft_or_log": Rule(rules.soft_or_log, ("entropy_norm", "reverse_kl"), scaled=True),
    "q3": Rule(rules.q3, ("entropy_norm", "forward_kl"), scaled=True),
    "divergence": Rule(rules.divergence, ("reverse_kl",)),
    "gradient_norm": Rule(rules.gradient_norm, ("gradient_norm",)),
    "gradient_norm_sampling": Rule(rules.gradient_norm, ("gradient_norm",), "importance"),
    **CONTRIB,  # not measured by us
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
        ordered, scaled = bool(getattr(rule, "ordered", False)), getattr(rule, "scaled", None)
        return Rule(rule, _declared_fields(rule), ordered=ordered, scaled=None if scaled is None else bool(scaled))
    if not isinstance(rule, str):
        raise ValueError(f"a rule is a name, a dotted path or a function of TokenScores, got {rule!r}.")
    if rule.startswith(COMPLEMENT):
        inner = resolve_rule(rule.removeprefix(COMPLEMENT))
        if inner.budget not in ("top", "sample") or inner.complement:
            raise ValueError(f"{rule!r} is no rule: take the complement of a rule that drops something, once.")
        return replace(inner, complement=True)
    return RULES[rule] if rule in RULES else _imported(rule)


def rule_name(rule: str | Callable[[TokenScores], Tensor] | Rule) -> str:
    """What a rule is called in records and logs: its name, or the dotted path of its function.

    Args:
        rule: as in `select`.

    Example:
        >>> rule_name("q3"), rule_name(rules.entropy), rule_name(RULES["random"])
        ('q3', 'tipdistill.select.rules.entropy', 'random')
    """
    if isinstance(rule, str):
        return rule
    if isinstance(rule, Rule):
        known = [name for name, listed in RULES.items() if listed == rule]
        if known:
            return known[0]
        return (COMPLEMENT if rule.complement else "") + rule_name(rule.score)
    named = rule if hasattr(rule, "__qualname__") else type(rule)  # a partial, or an object that can be called
    return f"{named.__module__}.{named.__qualname__}"


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
    return fields is None or not OF_STUDENT.issuperset(fields)


def is_code(rule: Any) -> bool:
    """Whether a rule is named by a dotted path outside of tipdistill, whose module runs when it is imported.

    Example:
        >>> [is_code(rule) for rule in ("soft_or", "complement:mine.rule", "tipdistill.select.rules:entropy")]
        [False, True, False]
    """
    if not isinstance(rule, str):
        return False
    path = rule.removeprefix(COMPLEMENT)
    return path not in RULES and is_dotted(path) and not path.startswith("tipdistill.")


def _imported(path: str) -> Rule:
    known = [*RULES, *(COMPLEMENT + name for name, rule in RULES.items() if rule.budget in ("top", "sample"))]
    unknown = (
        f"unknown rule {path!r}; there are {', '.join(RULES)}, '{COMPLEMENT}<rule>', and the dotted path of a function "
        f"of TokenScores.{nearest(path, known)}"
    )
    attribute = load(path, unknown)
    if not callable(attribute) and not isinstance(attribute, Rule):
        raise ValueError(f"the rule {path!r} is a {type(attribute).__name__}, not a function of TokenScores.")
    return resolve_rule(attribute)


def _declared_fields(function: Any) -> tuple[str, ...] | None:
    fields = getattr(function, "fields", None)
    return (fields,) if isinstance(fields, str) else None if fields is None else tuple(fields)
