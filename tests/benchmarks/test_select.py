import pytest

from benchmarks.select import run_select
from tipdistill import RULES


def test_every_rule_is_timed_at_every_size():
    result = run_select(rounds=1, say=lambda line: None, sizes=(50, 2000))
    assert set(result["rules"]) == set(RULES)
    for entry in result["rules"].values():
        assert set(entry["seconds"]) == {"50", "2000"}
        assert entry["seconds_per_million"]["50"] == pytest.approx(entry["seconds"]["50"]["median"] * 20_000)
        assert entry["growth"] < 1.5


def test_an_unknown_rule_names_the_nearest():
    with pytest.raises(ValueError, match=r"rule must be one of .*, got 'soft-or'. Did you mean 'soft_or'"):
        run_select(rules=["soft-or"])
