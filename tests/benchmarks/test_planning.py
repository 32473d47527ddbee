"""What the sweep on the planning task says: verdicts over all seeds that two rows have, from both of its grids."""

import pytest

from benchmarks.replication import planning
from benchmarks.replication.claims import CLAIMS, Comparison

PROBLEMS = 40
SAMPLES = 2
ALL, Q3 = ("all", 1.0), ("q3", 0.2)


def figure(by_seed):
    """Of each seed the number of right samples at each problem."""
    mean = sum(sum(counts) for counts in by_seed.values()) / (SAMPLES * PROBLEMS * len(by_seed))
    told = {str(seed): " ".join(map(str, counts)) for seed, counts in by_seed.items()}
    return {
        "mean": mean,
        "interval": [mean, mean],
        "correct": told,
        "to_all": None,
        "to_random": None,
        "gain_share": None,
    }


def grid(seeds, right):
    """A result in which a row is right as often as `right` says at every problem, of two samples."""
    rows = [
        {"name": name, "retention": share, "tasks": {"trip": figure({seed: [count] * PROBLEMS for seed in seeds})}}
        for (name, share), count in right.items()
    ]
    before = {"trip": figure({seed: [0] * PROBLEMS for seed in seeds})}
    return {"test": ["trip"], "seeds": list(seeds), "num_samples": SAMPLES, "rows": rows, "before": before}


def claim_on_planning():
    (claim,) = [claim for claim in CLAIMS if (claim.first, claim.second) == (Q3, ALL)]
    return claim


@pytest.mark.parametrize(("of_q3", "expected"), [(2, "holds"), (1, "does not hold"), (0, "does not hold")])
def test_the_paper_s_claim_on_planning_is_judged_by_its_two_rows(of_q3, expected):
    results = {"trip": grid(range(5), {ALL: 1, Q3: of_q3})}
    assert planning.judged(results, claim_on_planning())[0] == expected


def test_further_seeds_count_with_the_first_ones():
    results = {"trip": grid(range(5), {ALL: 1, Q3: 2}), "trip/more": grid(range(5, 10), {ALL: 1, Q3: 0})}
    assert planning.judged({"trip": results["trip"]}, claim_on_planning())[1].startswith("+0.500")
    answer, told = planning.judged(results, claim_on_planning())
    assert told.startswith("+0.000")
    assert answer == "undecided"


def test_rows_without_further_seeds_are_judged_by_those_they_have():
    results = {"trip": grid(range(5), {ALL: 1, ("random", 0.2): 0}), "trip/more": grid(range(5, 10), {ALL: 1, Q3: 0})}
    claim = Comparison("a claim", ALL, ("random", 0.2))
    assert planning.judged(results, claim) == planning.judged({"trip": results["trip"]}, claim)


def test_the_tables_say_what_was_run_and_nothing_else():
    assert planning.rows({}) == planning.claims({}) == "*Not run yet.*"
    results = {"trip": grid(range(5), {ALL: 1, Q3: 2})}
    (line,) = planning.claims(results).splitlines()[2:]
    assert line.startswith("| 3. Q3 at 20 % beats all tokens")
    assert "| Q3 | 20 % | 1.000" in planning.rows(results)
