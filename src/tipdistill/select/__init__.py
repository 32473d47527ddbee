"""Select: which tokens are trained on, and with what weight.

Read choose.py. A rule is a function of rules.py and a line of registry.py; those nobody has measured are in contrib.py.
"""

from .choose import draw, kept_counts, select
from .contrib import CONTRIB
from .order import Order
from .quadrants import quadrants
from .registry import COMPLEMENT, RULES, needs_teacher, resolve_rule, rule_fields, rule_name
from .rule import DRAWN, SCOPES, Rule
from .running import Running, running_of

__all__ = [
    "COMPLEMENT",
    "CONTRIB",
    "DRAWN",
    "RULES",
    "SCOPES",
    "Order",
    "Rule",
    "Running",
    "draw",
    "kept_counts",
    "needs_teacher",
    "quadrants",
    "resolve_rule",
    "rule_fields",
    "rule_name",
    "running_of",
    "select",
]
