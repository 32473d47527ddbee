"""Confusions count what a plain loop counts."""

from collections import defaultdict

import numpy as np
import pytest

from tipdistill.report.confusions import CONTEXTS, confusions


def by_hand(mistakes, student, teacher, token_id, position, divergence, context):
    kinds = defaultdict(list)
    for row, token in enumerate(mistakes):
        before = tuple(int(token_id[token - back]) if position[token] >= back else -1 for back in range(1, context + 1))
        kinds[(before, int(student[row]), int(teacher[row]))].append(int(token))
    return {tuple(tokens): sum(float(divergence[token]) for token in tokens) for tokens in kinds.values()}


@pytest.mark.parametrize("context", CONTEXTS)
def test_kinds_counts_and_mass(context):
    draw = np.random.default_rng(context)
    lengths = [1, 2, 5, 30, 200]
    position = np.concatenate([np.arange(length) for length in lengths])
    token_id, divergence = draw.integers(0, 3, len(position)), draw.random(len(position)).astype(np.float32)
    mistakes = np.flatnonzero(draw.random(len(position)) < 0.7)
    student, teacher = draw.integers(0, 2, (2, len(mistakes)))
    kinds = confusions(mistakes, student, teacher, token_id, position, divergence, context, shown=10**6)
    expected = by_hand(mistakes, student, teacher, token_id, position, divergence, context)
    assert {tuple(kind.tokens.tolist()): kind.mass for kind in kinds} == pytest.approx(expected)
    assert [kind.mass for kind in kinds] == sorted((kind.mass for kind in kinds), reverse=True)
    assert all(kind.count == len(kind.tokens) and kind.token == kind.tokens[0] for kind in kinds)
    assert len(confusions(mistakes, student, teacher, token_id, position, divergence, context, shown=2)) == min(
        2, len(kinds)
    )


def test_no_mistake_is_no_confusion():
    none = np.zeros(0, dtype=np.int64)
    assert confusions(none, none, none, np.ones(3), np.arange(3), np.ones(3), 2) == []
