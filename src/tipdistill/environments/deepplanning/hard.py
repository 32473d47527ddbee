"""The hard constraints of a query, and what a plan costs by its own lines."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from .data import Query, number
from .plan import Plan

logger = logging.getLogger(__name__)


def hard_constraints(plan: Plan, query: Query) -> dict[str, bool]:
    """Which of a query's hard constraints a plan keeps.

    Args:
        plan: the plan.
        query: the query, whose constraints name what has to be in it.

    Returns:
        Constraint → whether it holds. One of a kind that the benchmark itself does not judge is left out.
    """
    kept = {}
    for name, asked in query.constraints.items():
        judge = _judge_of(name)
        if judge is None:
            _warn_of(name)
        else:
            kept[name] = judge(plan, query, asked)
    return kept


def trip_cost(plan: Plan, people: int, rooms: int) -> float:
    """What a plan costs, from the prices in its lines.

    cost = people · (first leg of each day + meals + tickets) + rooms · nights + ⌈people / 4⌉ · ways in town

    A journey with changes has its whole price at each leg, so that of each day the first leg counts. The last day has
    no night. A line without a cost costs nothing.

    Args:
        plan: the plan.
        people, rooms: how many.
    """
    total = 0.0
    for day in plan.days:
        legs = [leg.cost for leg in day.of("travel_intercity_public") if leg.cost is not None]
        each = sum(activity.cost or 0.0 for activity in day.of("meal", "attraction"))
        cars = sum(activity.cost or 0.0 for activity in day.of("travel_city"))
        total += people * (each + (legs[0] if legs else 0.0)) + math.ceil(people / 4) * cars
    return total + rooms * sum(day.price or 0.0 for day in plan.days[:-1] if day.stay)


def _journeys(mode: str) -> Callable[[Plan, Query, Mapping[str, Any]], bool]:
    def judge(plan: Plan, query: Query, asked: Mapping[str, Any]) -> bool:
        numbers = {leg.name for day in plan.days for leg in day.of("travel_intercity_public") if leg.mode == mode}
        wanted = [asked[f"{way}_{mode}_no"] for way in ("outbound", "inbound") if f"{way}_{mode}_no" in asked]
        return all(_text(name) in numbers for name in wanted)

    return judge


def _hotel(plan: Plan, query: Query, asked: Mapping[str, Any]) -> bool:
    return _text(asked.get("hotel_name")) in {day.stay for day in plan.days if day.stay}


def _restaurant(plan: Plan, query: Query, asked: Mapping[str, Any]) -> bool:
    return _text(asked.get("restaurant_name")) in {meal.name for day in plan.days for meal in day.of("meal")} - {""}


def _attraction(plan: Plan, query: Query, asked: Mapping[str, Any]) -> bool:
    wanted = asked.get("attraction_names")
    if not isinstance(wanted, list) or not wanted:
        return False
    return {_text(name) for name in wanted} <= {visit.name for day in plan.days for visit in day.of("attraction")}


def _budget(plan: Plan, query: Query, asked: Mapping[str, Any]) -> bool:
    most = number(asked.get("max_budget"))
    return most is not None and trip_cost(plan, query.people, query.rooms) <= most


_JUDGES: dict[str, Callable[[Plan, Query, Mapping[str, Any]], bool]] = {
    "flight_": _journeys("flight"),
    "train_": _journeys("train"),
    "hotel_": _hotel,
    "restaurant_": _restaurant,
    "attraction_": _attraction,
    "budget_constraint": _budget,
}


def _judge_of(name: str) -> Callable[[Plan, Query, Mapping[str, Any]], bool] | None:
    return next((judge for kind, judge in _JUDGES.items() if name.startswith(kind)), None)


@cache  # once for each
def _warn_of(name: str) -> None:
    logger.warning(f"The hard constraint {name!r} is of no kind that is judged ({', '.join(_JUDGES)}): it is left out.")


def _text(value: Any) -> str:
    return str(value).strip()
