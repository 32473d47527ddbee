"""What the sweeps on a language model say: less divergence is a lead, told as a share of what all tokens gain."""

import pytest

from benchmarks.replication import language_model
from benchmarks.replication.claims import Comparison


def figure(mean):
    values = [mean - 0.01, mean, mean + 0.01]
    by_seed = {str(seed): " ".join(f"{value + 0.001 * seed:.6g}" for value in values) for seed in range(3)}
    return {"mean": mean, "interval": [mean - 0.01, mean + 0.01], "divergence": by_seed, "to_all": None} | {
        "to_random": None,
        "gain_share": None,
    }


@pytest.fixture
def results():
    """All tokens fall from 1.0 to 0.5, half as far as Soft-OR's bottom half's 0.9, and so on."""
    means = {("all", 1.0): 0.5, ("soft_or", 0.5): 0.51, ("complement:soft_or", 0.5): 0.9, ("q3", 0.1): 0.7}
    rows = [
        {"name": name, "retention": share, "tasks": {"kl": figure(mean), "capitals": {"mean": 0.25}}}
        for (name, share), mean in means.items()
    ]
    result = {"test": ["kl", "capitals"], "seeds": [0, 1, 2], "rows": rows}
    result["before"] = {"kl": figure(1.0), "capitals": {"mean": 0.1}}
    return {"smollm2/pruned": result}


def test_a_lead_is_a_share_of_the_gain_and_positive_where_the_first_diverges_less(results):
    (result,) = results.values()
    measured = language_model.lead(result, ("soft_or", 0.5), ("complement:soft_or", 0.5))
    assert measured["mean"] == pytest.approx((0.9 - 0.51) / 0.5)
    assert measured["interval"] == pytest.approx([0.78, 0.78])  # paired: seeds and prompts are the same for both
    assert language_model.lead(result, ("q3", 0.1), ("all", 1.0))["mean"] == pytest.approx(-0.4)
    assert language_model.lead(result, ("random", 0.1), ("all", 1.0)) is None
    result["before"]["kl"]["mean"] = 0.4  # all tokens gained nothing
    assert language_model.lead(result, ("q3", 0.1), ("all", 1.0)) is None


@pytest.mark.parametrize(
    ("first", "second", "kind", "number", "expected"),
    [
        (("soft_or", 0.5), ("complement:soft_or", 0.5), "above", 4, "holds"),  # 78 % of the gain, and 25 % are asked
        (("q3", 0.1), ("complement:soft_or", 0.5), "above", None, "holds"),
        (("soft_or", 0.5), ("all", 1.0), "matches", 1, "holds"),  # 2 % behind, and 5 % are allowed
        (("soft_or", 0.5), ("all", 1.0), "above", None, "does not hold"),
        (("q3", 0.1), ("all", 1.0), "matches", 3, "does not hold"),  # 40 % behind, and 10 % are allowed
        (("random", 0.1), ("all", 1.0), "above", None, "not run"),
    ],
)
def test_verdicts_have_margins_of_the_gain(results, first, second, kind, number, expected):
    (result,) = results.values()
    claim = Comparison("a claim", first, second, kind, number=number)
    assert language_model.judged(result, claim)[0] == expected


def test_the_tables_leave_out_what_was_not_run(results):
    claims, rows = language_model.claims(results), language_model.rows(results)
    assert "4. The top half by Soft-OR is much better than the bottom half" in claims
    assert "entropy" not in claims.lower()
    assert "holds: +78 % [+78 %, +78 %]" in claims or "holds: 78 % [78 %, 78 %]" in claims
    assert "| before |" in rows
    assert "two layers dropped" not in rows
    assert language_model.claims({}) == language_model.rows({}) == "*Not run yet.*"
