"""What the sweeps on the planning task say: verdicts from the grid that has both rows of a claim."""

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
    results = {"trip/planning": grid(range(5), {ALL: 1, Q3: of_q3})}
    assert planning.judged(results, claim_on_planning())[0] == expected


def test_a_claim_is_judged_where_both_of_its_rows_are_and_first_where_there_are_more_seeds():
    results = {
        "trip/planning": grid(range(10), {ALL: 1, Q3: 2}),
        "trip/rules": grid(range(5), {ALL: 1, Q3: 0, ("random", 0.5): 2}),
    }
    assert planning.judged(results, claim_on_planning())[1].startswith("+0.500")
    claim = Comparison("a claim", ("random", 0.5), ALL)
    assert planning.judged(results, claim)[0] == "holds"
    assert planning.judged({"trip/planning": results["trip/planning"]}, claim) == ("not run", "")


def test_the_tables_say_what_was_run_and_nothing_else():
    assert planning.rows({}) == planning.claims({}) == planning.claim_on_planning({}) == "*Not run yet.*"
    results = {"trip/planning": grid(range(5), {ALL: 1, Q3: 2})}
    (line,) = planning.claims(results).splitlines()[2:]
    assert line.startswith("| 3. Q3 at 20 % beats all tokens")
    assert "| Q3 | 20 % | 1.000" in planning.rows(results)
    results["trip/planning"]["rows"] += grid(range(5), {("random", 0.2): 0})["rows"]
    assert len(planning.claims(results).splitlines()) == 3
    assert planning.claim_on_planning(results).splitlines()[2:] == [line]
