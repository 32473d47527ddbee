"""What makes a plan possible at all: 21 checks in eight dimensions, each of which is lost by any of its checks.

They read a plan, its query and its database, and nothing else. Thresholds are the benchmark's (arXiv 2601.18137 and its
code); docs/deepplanning.md says where it is stricter here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from .data import Database, Query, Row, number, plain_city
from .hard import trip_cost
from .plan import Activity, Day, Plan

_WEEKDAYS = {"monday": 1, "tuesday": 2, "wednesday": 3, "thursday": 4, "friday": 5, "saturday": 6, "sunday": 7}
_WEEKDAYS |= {"周一": 1, "周二": 2, "周三": 3, "周四": 4, "周五": 5, "周六": 6, "周日": 7}
_ALL_DAY = ("open 24 hours", "全天开放")
_BETWEEN_MEALS = 120  # minutes
_MEAL = (30, 150)  # minutes, least and most
_WITHIN = 0.10  # of the stated total


@dataclass(frozen=True)
class Trip:
    """What a check reads."""

    plan: Plan
    query: Query
    database: Database

    @property
    def days(self) -> tuple[Day, ...]:
        return self.plan.days

    def all(self, *kinds: str) -> list[Activity]:
        """The activities of some kinds, of all days."""
        return [activity for day in self.days for activity in day.of(*kinds)]


def commonsense(plan: Plan, query: Query, database: Database) -> dict[str, dict[str, bool]]:
    """Dimension → check → whether a plan passes it.

    Args:
        plan: the plan.
        query: what was asked for.
        database: of the query.
    """
    trip = Trip(plan, query, database)
    return {
        dimension: {name: check(trip) for name, check in checks.items()} for dimension, checks in DIMENSIONS.items()
    }


# Route.


def days_as_asked(trip: Trip) -> bool:
    """As many days as the query asks for."""
    return len(trip.days) == trip.query.days


def closed_loop(trip: Trip) -> bool:
    """It starts from the home city and ends there."""
    ends = trip.days[0].cities[0], trip.days[-1].cities[-1]
    return all(plain_city(city) == trip.query.home for city in ends)


def stations_match(trip: Trip) -> bool:
    """Each day begins where the one before ended; a day between two cities has a journey between stations of theirs."""
    here = trip.query.home
    for day in trip.days:
        cities = [plain_city(city) for city in day.cities]
        if cities[0] != here:
            return False
        legs = [
            (_cities_of(leg.origin, trip.database), _cities_of(leg.destination, trip.database))
            for leg in day.of("travel_intercity_public")
        ]
        if len(cities) == 2 and not any(cities[0] in left and cities[1] in reached for left, reached in legs):
            return False
        here = cities[-1]
    return True


def _cities_of(station: str, database: Database) -> set[str]:
    if station in database.cities:
        return database.cities[station]
    # a Chinese station that is in no table bears its city's name, of two characters
    return set(re.findall("^[\u4e00-\u9fa5]{2}", station))


# Sandbox: what the database knows, at its prices.


def hotels_exist(trip: Trip) -> bool:
    """Every stay and hotel is in the database, and each stay at its price."""
    known = trip.database.hotel
    named = [hotel.name for day in trip.days[:-1] for hotel in day.of("hotel") if hotel.name]
    stays = [day for day in trip.days if day.stay]
    return all(name in known for name in named) and all(
        day.stay in known and _same_price(day.price, known[day.stay]["price"]) for day in stays
    )


def attractions_exist(trip: Trip) -> bool:
    """Every attraction is in the database, at its price."""
    return _exist(trip.all("attraction"), trip.database.attraction, "ticket_price")


def restaurants_exist(trip: Trip) -> bool:
    """Every meal is at a restaurant of the database, at its price."""
    return _exist(trip.all("meal"), trip.database.restaurant, "price_per_person")


def journeys_exist(trip: Trip) -> bool:
    """Every train and flight is in the database, at the price of one of its rows, and has its stations."""
    for leg in trip.all("travel_intercity_public"):
        rows = trip.database.legs.get(leg.name)
        if not rows or not leg.name or not leg.origin or not leg.destination or leg.cost is None:
            return False
        if not any(_same_price(leg.cost, row["price"]) for row in rows):
            return False
    return True


def _exist(activities: list[Activity], rows: dict[str, Row], price: str) -> bool:
    return all(
        activity.name in rows and _same_price(activity.cost, rows[activity.name][price]) for activity in activities
    )


def _same_price(given: float | None, known: str) -> bool:
    """Whether both round to the same; a price that the database does not know is not compared."""
    price = number(known)
    return price is None or (given is not None and round(given) == round(price))


# Structure.


def stays_traceable(trip: Trip) -> bool:
    """Each night has a stay in the header and a hotel among the lines; the last day has no stay."""
    nights = all(day.stay and day.of("hotel") for day in trip.days[:-1])
    return nights and not trip.days[-1].stay


def days_end_at_hotel(trip: Trip) -> bool:
    """The last line of each day but the last is a hotel."""
    return all(day.activities and day.activities[-1].kind == "hotel" for day in trip.days[:-1])


def enough_meals(trip: Trip) -> bool:
    """As many meals as the day has room for, two hours apart."""
    return all(_enough_meals(*day) for day in _by_place(trip))


def _enough_meals(day: Day, leaving: float | None, arriving: float | None) -> bool:
    meals = sorted((meal.start, meal.end) for meal in day.of("meal") if meal.start is not None and meal.end is not None)
    # as the benchmark does it, of the first two
    apart = len(meals) < 2 or meals[1][0] - meals[0][1] >= _BETWEEN_MEALS
    least, most = (2, math.inf) if len(day.cities) == 1 else (0, math.inf)
    if leaving is not None:
        least, most = (0, 0) if leaving < 9 else (0, 1) if leaving < 15 else (1, math.inf)
    if arriving is not None and arriving < 15:
        least = max(least, 2 if arriving < 10 else 1)
    elif arriving is not None:
        most = min(most, 1)
    return least <= len(meals) <= most and apart


def enough_attractions(trip: Trip) -> bool:
    """Two attractions on a whole day, or four hours of them; one on a day with an early arrival or a late departure."""
    for day, leaving, arriving in _by_place(trip):
        visits = day.of("attraction")
        if len(day.cities) == 1:
            names = {visit.name for visit in visits} - {""}
            ways = [way for way in day.of("travel_city") if {way.origin, way.destination} & names]
            minutes = sum(_minutes(activity) or 0 for activity in (*visits, *ways))
            if len(visits) < 2 and minutes < 240:
                return False
        elif not visits and ((leaving is not None and leaving > 16) or (arriving is not None and arriving < 12)):
            return False
    return True


def _by_place(trip: Trip) -> Iterator[tuple[Day, float | None, float | None]]:
    """Each day with the hour at which a place away from home is left, and the one at which one is reached.

    Both are those of the day's first journey that has times, as the benchmark reads them.
    """
    here = trip.query.home
    for day in trip.days:
        leaving = arriving = None
        if len(day.cities) == 2:
            origin, destination = map(plain_city, day.cities)
            leg = next((leg for leg in day.of("travel_intercity_public") if leg.start is not None), None)
            if leg is not None and leg.start is not None and leg.end is not None:
                if origin == here != trip.query.home:
                    leaving = leg.start / 60
                if destination != trip.query.home:
                    arriving = leg.end % 1440 / 60
            here = destination
        yield day, leaving, arriving


# Time.


def no_overlaps(trip: Trip) -> bool:
    """No two lines of a day overlap."""
    for day in trip.days:
        slots = sorted(
            (line.start, line.end) for line in day.activities if line.start is not None and line.end is not None
        )
        if any(later[0] < earlier[1] for earlier, later in pairwise(slots)):
            return False
    return True


def transfers_fit(trip: Trip) -> bool:
    """The time between two places, without the buffers in it, is that of the road; unknown roads are not judged."""
    return all(
        _transfer_fits(day, earlier, later, trip.database)
        for day in trip.days
        for earlier, later in _neighbours(day.of("hotel", "attraction", "meal", "travel_intercity_public"))
    )


def _neighbours(activities: list[Activity]) -> Iterator[tuple[Activity, Activity]]:
    timed = [activity for activity in activities if activity.start is not None]
    yield from pairwise(timed)


def _transfer_fits(day: Day, earlier: Activity, later: Activity, database: Database) -> bool:
    assert earlier.end is not None
    assert later.start is not None
    end, start = earlier.end, later.start
    if end - start > 720:  # the next is past midnight
        start += 1440
    origin = earlier.destination if earlier.kind == "travel_intercity_public" else earlier.name
    destination = later.origin if later.kind == "travel_intercity_public" else later.name
    if start < end or origin == destination:  # an overlap, which is another check's
        return True
    minutes = database.minutes(origin, destination)
    if minutes is None:
        return True
    waits = 0
    for wait in day.of("buffer"):
        if wait.start is None or wait.end is None:
            continue
        shift = 1440 if wait.start < end and start >= 1440 else 0
        if end <= wait.start + shift and wait.end + shift <= start:
            waits += wait.end - wait.start
    least = min(max(0.0, minutes - 5), math.floor(minutes / 10) * 10)
    most = max(minutes + 5, math.ceil(minutes / 10) * 10)
    return least <= start - end - waits <= most


# Hours.


def attractions_open(trip: Trip) -> bool:
    """Every visit is within the attraction's hours."""
    return all(
        _is_open(visit, trip.database.attraction[visit.name], unknown=False)
        for visit in trip.all("attraction")
        if visit.name in trip.database.attraction
    )


def restaurants_open(trip: Trip) -> bool:
    """Every meal is within the restaurant's hours, where these are known."""
    return all(
        _is_open(meal, trip.database.restaurant[meal.name], unknown=True)
        for meal in trip.all("meal")
        if meal.name in trip.database.restaurant
    )


def not_closed_that_day(trip: Trip) -> bool:
    """No attraction is visited on a weekday on which it is closed."""
    if trip.query.weekday is None:
        return True
    for place, day in enumerate(trip.days):
        weekday = 1 + (trip.query.weekday - 1 + place) % 7
        for visit in day.of("attraction"):
            closed = trip.database.attraction.get(visit.name, {}).get("closing_dates", "")
            if weekday in (_WEEKDAYS.get(name.strip().lower()) for name in re.split("[,，;；、]", closed)):
                return False
    return True


def _is_open(activity: Activity, row: Row, unknown: bool) -> bool:
    """Whether a time is within the hours of a row; `unknown`: what counts where these cannot be read."""
    if activity.start is None or activity.end is None:
        return False
    if row["opening_time"].lower() in _ALL_DAY and row["closing_time"].lower() in _ALL_DAY:
        return True
    opens, closes = _clock(row["opening_time"]), _clock(row["closing_time"])
    if opens is None or closes is None:
        return unknown
    if opens > closes:  # until past midnight
        closes += 1440
    # of such hours the end of one day's is the beginning of the next day's
    shifts = (0, 1440) if closes > 1440 else (0,)
    return any(opens <= activity.start + shift and activity.end + shift <= closes for shift in shifts)


def _clock(text: str) -> int | None:
    match = re.fullmatch("([0-9]{1,2}):([0-9]{2})(?::[0-9]{2})?", text)
    if match is None or int(match[1]) > 24 or int(match[2]) > 59:
        return None
    minutes = 60 * int(match[1]) + int(match[2])
    return 1440 if minutes == 1439 else minutes  # the last minute of a day stands for its end


# Duration.


def visits_reasonable(trip: Trip) -> bool:
    """Every visit takes as long as the database recommends."""
    for visit in trip.all("attraction"):
        row = trip.database.attraction.get(visit.name)
        if row is None:
            continue
        least, most, minutes = number(row["min_visit_hours"]), number(row["max_visit_hours"]), _minutes(visit)
        if least is None or most is None or minutes is None or not 60 * least <= minutes <= 60 * most:
            return False
    return True


def meals_reasonable(trip: Trip) -> bool:
    """Every meal takes between half an hour and two and a half."""
    times = [_minutes(meal) for meal in trip.all("meal") if meal.name]
    return all(minutes is not None and _MEAL[0] <= minutes <= _MEAL[1] for minutes in times)


def _minutes(activity: Activity) -> int | None:
    return None if activity.start is None or activity.end is None else activity.end - activity.start


# Cost and diversity.


def total_correct(trip: Trip) -> bool:
    """The stated total is what the lines add up to, within 10 %."""
    stated = trip.plan.total
    if stated is None:
        return False
    return abs(trip_cost(trip.plan, trip.query.people, trip.query.rooms) - stated) <= _WITHIN * stated


def restaurants_differ(trip: Trip) -> bool:
    """No restaurant comes twice."""
    return _differ(trip.all("meal"))


def attractions_differ(trip: Trip) -> bool:
    """No attraction comes twice."""
    return _differ(trip.all("attraction"))


def _differ(activities: list[Activity]) -> bool:
    names = [activity.name for activity in activities if activity.name]
    return len(names) == len(set(names))


DIMENSIONS: dict[str, dict[str, Callable[[Trip], bool]]] = {
    dimension: {check.__name__: check for check in checks}
    for dimension, checks in {
        "route_consistency": (days_as_asked, closed_loop, stations_match),
        "sandbox_compliance": (hotels_exist, attractions_exist, restaurants_exist, journeys_exist),
        "itinerary_structure": (stays_traceable, days_end_at_hotel, enough_meals, enough_attractions),
        "time_feasibility": (no_overlaps, transfers_fit),
        "business_hours": (attractions_open, restaurants_open, not_closed_that_day),
        "duration_rationality": (visits_reasonable, meals_reasonable),
        "cost_accuracy": (total_correct,),
        "activity_diversity": (restaurants_differ, attractions_differ),
    }.items()
}
