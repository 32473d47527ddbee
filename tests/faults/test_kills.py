"""A few of the kills of `make crash`: the same command goes on to the same end, and nothing is half-written."""

import pytest
from faults import crash

KILLS = (
    ("eval", "kill", 0.3),
    ("eval", "half", 0.68),  # in the lines of a batch: the next batches must not move
    ("score", "half", 0.5),
    ("score", "full", 0.2),
    ("train", "kill", 0.2),
    ("train", "full", 0.7),
    ("train", "kill", 0.97),
)
_straight = {}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "action", "share"), KILLS, ids=lambda value: str(value))
def test_a_killed_run_goes_on_to_the_same_end(world, kind, action, share):
    if kind not in _straight:
        _straight[kind] = crash.reference(kind, world)
    straight, count = _straight[kind]
    result = crash.kill(kind, action, max(1, int(share * count)), world, straight)
    assert result["struck"], "the fault did not reach the run"
    assert not result["wrong"]
