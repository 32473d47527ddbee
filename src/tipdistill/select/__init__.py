"""Select: which tokens are trained on, and with what weight. Read choose.py; a rule is a line of registry.py."""

from .choose import draw, kept_counts, select
from .order import Order
from .quadrants import quadrants
from .registry import COMPLEMENT, DRAWN, RULES, SCOPES, Rule, needs_teacher, resolve_rule, rule_fields

__all__ = [
    "COMPLEMENT",
    "DRAWN",
    "RULES",
    "SCOPES",
    "Order",
    "Rule",
    "draw",
    "kept_counts",
    "needs_teacher",
    "quadrants",
    "resolve_rule",
    "rule_fields",
    "select",
]
