"""A perfect plan holds everything, and each change to it loses exactly the check or the constraint that it is about."""

from dataclasses import replace

import pytest
import travel

from tipdistill.environments.deepplanning.commonsense import DIMENSIONS
from tipdistill.environments.deepplanning.data import database_path, read_database, read_queries
from tipdistill.environments.deepplanning.hard import hard_constraints, trip_cost
from tipdistill.environments.deepplanning.plan import parse_plan
from tipdistill.environments.deepplanning.score import score, verdict

CHECKS = [check for checks in DIMENSIONS.values() for check in checks]
BOTH = pytest.mark.parametrize("language", ["en", "zh"])


@pytest.fixture(scope="module")
def benchmark_dir(tmp_path_factory):
    return travel.write_benchmark(tmp_path_factory.mktemp("deepplanning"))


@pytest.fixture(scope="module")
def judged(benchmark_dir):
    """(problem, language, changes) → the scores of its plan."""

    def judge(id, language="en", changes=()):
        query = read_queries(benchmark_dir, language)[id]
        database = read_database(database_path(benchmark_dir, language, id))
        return score(parse_plan(travel.plan(id, language, changes)), query, database)

    return judge


def failed(scores):
    checks = {name: passed for of_dimension in scores.checks.values() for name, passed in of_dimension.items()}
    return [name for name, held in {**scores.constraints, **checks}.items() if not held]


def test_there_are_21_checks_in_eight_dimensions_and_six_kinds_of_hard_constraints():
    assert len(CHECKS) == 21
    assert len(DIMENSIONS) == 8
    kinds = {name.split("_")[0] for name in travel.MUTATIONS if name not in CHECKS}
    assert kinds == {"train", "flight", "hotel", "restaurant", "attraction", "budget"}
    assert set(CHECKS) < set(travel.MUTATIONS)


@BOTH
@pytest.mark.parametrize("id", ["0", "4"])
def test_a_perfect_plan_holds_everything(judged, id, language):
    scores = judged(id, language)
    assert failed(scores) == []
    assert (scores.hard, scores.hard_share, scores.commonsense, scores.composite) == (True, 1, 1, 1)
    assert scores.case_accuracy


@BOTH
@pytest.mark.parametrize("name", travel.MUTATIONS)
def test_a_change_loses_its_own_check_alone(judged, name, language):
    id, *changes = travel.MUTATIONS[name]
    scores = judged(id, language, changes)
    assert failed(scores) == [name]
    assert not scores.case_accuracy
    if name in CHECKS:
        assert (scores.hard, scores.commonsense, scores.composite) == (True, 7 / 8, 15 / 16)
    else:
        constraints = len(scores.constraints)
        assert (scores.hard, scores.hard_share) == (False, (constraints - 1) / constraints)
        assert (scores.commonsense, scores.composite) == (1, 0.5)


@pytest.mark.parametrize("id", ["0", "4"])
def test_the_cost_is_that_of_a_count_by_hand(benchmark_dir, id):
    query = read_queries(benchmark_dir, "en")[id]
    assert trip_cost(parse_plan(travel.plan(id)), query.people, query.rooms) == pytest.approx(travel.COSTS[id])


def test_five_people_take_two_cars_and_of_a_journey_with_changes_the_first_leg_is_paid():
    lines = [
        "08:00-12:00 | travel_intercity_public | train K1 | Aville South -> Midway | 60",
        "13:00-15:00 | travel_intercity_public | train K2 | Midway -> Beeton North | 60",
        "15:00-15:20 | travel_city | Beeton North -> Inn | 7",
    ]
    text = "<plan>\nDay 1 | Aville -> Beeton | stay: Inn | 100\n" + "\n".join(lines) + "\nDay 2 | Beeton\n</plan>"
    assert trip_cost(parse_plan(text), people=5, rooms=3) == 5 * 60 + 2 * 7 + 3 * 100
    assert trip_cost(parse_plan(text), people=4, rooms=3) == 4 * 60 + 7 + 3 * 100


def test_a_number_counts_for_its_mode_alone_and_a_budget_may_be_spent_in_full(benchmark_dir):
    query = read_queries(benchmark_dir, "en")["0"]
    by_plane = parse_plan(travel.plan("0", changes=[("train G12", "flight G12")]))
    assert not hard_constraints(by_plane, query)["train_cheapest_direct"]
    for budget, kept in ((travel.COSTS["0"], True), (travel.COSTS["0"] - 1, False)):
        asked = replace(query, constraints={"budget_constraint": {"max_budget": budget}})
        assert hard_constraints(parse_plan(travel.plan("0")), asked) == {"budget_constraint": kept}


def test_a_plan_that_is_not_delivered_holds_nothing(benchmark_dir):
    query = read_queries(benchmark_dir, "en")["0"]
    scores = score(None, query, read_database(database_path(benchmark_dir, "en", "0")))
    said = verdict(scores, own_parser=True)
    assert len(failed(scores)) == 21 + 5
    assert not said.correct
    assert set(said.parts.values()) == {False}
    assert {name: value for name, value in said.figures.items() if value} == {"own_parser": 1.0}


def test_the_verdict_names_constraints_and_dimensions_and_whose_parser_it_was(judged):
    said = verdict(judged("0", changes=[("Old Mill | 40", "Old Mill | 41")]), own_parser=False)
    assert [name for name, held in said.parts.items() if not held] == ["sandbox_compliance"]
    assert set(said.parts) == {*travel.QUERIES[0]["meta_info"]["hard_constraints"], *DIMENSIONS}
    others = {"hard": 1.0, "hard_share": 1.0, "commonsense": 0.875, "composite": 0.9375, "delivered": 1.0}
    dimensions = {name: float(name != "sandbox_compliance") for name in DIMENSIONS}
    assert said.figures == {**others, **dimensions, "own_parser": 0.0}


def test_a_constraint_of_an_unknown_kind_is_left_out_and_told(benchmark_dir, caplog):
    query = replace(read_queries(benchmark_dir, "en")["0"], constraints={"weather_sunny": {}})
    plan = parse_plan(travel.plan("0"))
    assert hard_constraints(plan, query) == {}
    assert "'weather_sunny' is of no kind that is judged" in caplog.text
    assert not score(plan, query, read_database(database_path(benchmark_dir, "en", "0"))).hard


@pytest.mark.parametrize(
    "asked", [{}, {"hotel_name": None}, {"attraction_names": "Old Mill"}, {"attraction_names": []}, {"max_budget": "-"}]
)
def test_a_constraint_that_names_nothing_holds_for_no_plan(benchmark_dir, asked):
    plan = parse_plan(travel.plan("0"))
    for kind in ("hotel_", "attraction_", "budget_constraint"):
        query = replace(read_queries(benchmark_dir, "en")["0"], constraints={kind: asked})
        assert hard_constraints(plan, query) == {kind: False}
