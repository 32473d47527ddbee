"""The mistakes that a student makes most often, and what they cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

CONTEXTS = (0, 1, 2, 3, 4, 6, 8)
SHOWN = 50
_BEFORE = -1  # where a context reaches into the prompt, or into a tool's result


@dataclass(frozen=True)
class Confusion:
    """One kind of mistake.

    Attributes:
        token: the first token where it was made, an index into all tokens.
        count: how often.
        mass: reverse KL of those tokens, nats.
        tokens: all of them, int64, ascending.
    """

    token: int
    count: int
    mass: float
    tokens: np.ndarray


def confusions(
    mistakes: np.ndarray,
    student: np.ndarray,
    teacher: np.ndarray,
    token_id: np.ndarray,
    before: np.ndarray,
    divergence: np.ndarray,
    context: int,
    shown: int = SHOWN,
) -> list[Confusion]:
    """Confident mistakes (preceding tokens, student's first choice → teacher's), those of most divergence first.

    Args:
        mistakes: int64 [M], ascending, the tokens to look at.
        student: int64 [M], id of the student's most probable token.
        teacher: int64 [M], the teacher's.
        token_id: int [N], the tokens written.
        before: int [N], how many tokens there are before each; what is before those is not known.
        divergence: float [N], reverse KL in nats.
        context: how many of the preceding tokens must agree as well.
        shown: how many kinds to return.

    Example:
        >>> wrong, twos = np.array([1, 3]), np.array([2, 2])
        >>> kinds = confusions(wrong, twos, twos + 1, np.array([7, 2, 7, 2]), np.array([0, 1, 0, 1]), np.ones(4), 1)
        >>> [(kind.token, kind.count, kind.mass) for kind in kinds]
        [(1, 2, 2.0)]
    """
    if len(mistakes) == 0:
        return []
    keys: dict[str, Any] = {"student": student, "teacher": teacher}
    for back in range(1, context + 1):
        inside = before[mistakes] >= back
        keys[f"back{back}"] = np.where(inside, token_id[np.maximum(mistakes - back, 0)], _BEFORE)
    names = list(keys)
    row = np.arange(len(mistakes))
    table = pa.table({**keys, "mass": divergence[mistakes].astype(np.float64), "row": row})
    grouped = table.group_by(names, use_threads=False).aggregate([("mass", "sum"), ("row", "count"), ("row", "list")])
    order = np.lexsort((-grouped["row_count"].to_numpy(), -grouped["mass_sum"].to_numpy()))[:shown]
    kinds = []
    for index in order.tolist():
        tokens = mistakes[np.asarray(grouped["row_list"][index].values)]
        kinds.append(Confusion(int(tokens[0]), len(tokens), grouped["mass_sum"][index].as_py(), tokens))
    return kinds
