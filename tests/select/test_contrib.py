"""Rules that nobody has trained with stand apart, and are found by name like the others."""

import csv
from pathlib import Path

import pytest

from tipdistill import RULES
from tipdistill.select import CONTRIB, Rule, contrib, resolve_rule

SWEEPS = Path(__file__).parents[2] / "benchmarks" / "results" / "replication"
TRIED = "signal_to_curvature"


def trained_rules():
    """The rules that a kept result of a sweep is of."""
    rules = set()
    for path in SWEEPS.glob("*.csv"):
        with path.open(newline="", encoding="utf-8") as file:
            rules |= {row["rule"] for row in csv.DictReader(file)}
    return rules


def test_these_are_offered_unmeasured():
    assert list(CONTRIB) == [
        "hellinger",
        "entropy_jsd_sampling",
        "teachability",
        "teachability_soft_or",
        "selectkd",
        "position",
        "prefix_compatibility",
        "confidence_ratio",
        "entropy_gap",
        "cumulative_advantage",
        TRIED,
    ]


def test_a_rule_is_among_them_until_a_sweep_has_a_figure_of_it():
    trained = trained_rules()
    assert not trained & (set(CONTRIB) - {TRIED})
    # what is drawn by the entropy was trained with; the highest entropies are in the engine's benchmarks alone
    assert set(RULES) - set(CONTRIB) - trained == {"entropy"}
    assert TRIED in trained


@pytest.mark.parametrize("name", CONTRIB)
def test_they_are_found_by_name(name):
    assert RULES[name] is CONTRIB[name] is resolve_rule(name)
    assert isinstance(RULES[name], Rule)
    assert RULES[name].score.__module__ == contrib.__name__


def test_the_measured_rules_come_first():
    assert list(RULES)[-len(CONTRIB) :] == list(CONTRIB)
