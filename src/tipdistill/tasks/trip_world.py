"""The world of the task `trip`: its problems with their databases, and whether a plan does what is asked.

A problem follows from a number, its seed: who travels where, for how long, under which constraints, and forty rows of
trains, hotels, places and meals. A row's code is its own within its city. All prices are for each traveller.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ..types import Verdict

CITIES = ("berlin", "lisbon", "madrid", "oslo", "paris", "prague", "rome", "vienna")
SPEEDS = ("fast", "slow")
STYLES = ("classic", "lively", "modern", "quiet")  # of hotels, places and restaurants
MOST_DAYS, MOST_PEOPLE, MOST_SEATS, MOST_PRICE = 3, 4, 5, 5
ROWS, ROWS_THERE = 10, (3, 5)  # of a table, and how many of them are in the city that is asked for
WISHES = ("fast", "sleep", "see", "eat")  # constraints beside the budget, of which a problem has two or three
SLOTS = ("train", "sleep", *(f"{verb}-{day}" for verb in ("see", "eat") for day in range(1, MOST_DAYS + 1)))
MOST_TOTAL = len(SLOTS) * MOST_PRICE
MOST_SLACK = 3  # what a budget has beyond the solver's plan


class Train(NamedTuple):
    """A train there and back."""

    code: str
    origin: str
    city: str
    speed: str
    seats: int
    price: int


class Hotel(NamedTuple):
    """A hotel, and its price for the whole stay."""

    code: str
    city: str
    style: str
    beds: int
    price: int


class Place(NamedTuple):
    """A sight, and the day of the trip on which it is closed; 0: on none."""

    code: str
    city: str
    style: str
    closed: int
    price: int


class Meal(NamedTuple):
    """A restaurant, and its price for a meal."""

    code: str
    city: str
    style: str
    price: int


@dataclass(frozen=True)
class Problem:
    """A trip to plan, and the rows of its database.

    Attributes:
        origin, destination: cities.
        days: 2 or 3, each with a place and a meal.
        people: who all need a seat and a bed.
        trains, hotels, places, meals: rows of the four tables, the cheapest first.
        fast: the train must be fast.
        sleep: style that the hotel must have; "": any.
        see, eat: styles that one of the places, and one of the restaurants, must have; "": any.
        budget: for each traveller.
    """

    origin: str
    destination: str
    days: int
    people: int
    trains: tuple[Train, ...]
    hotels: tuple[Hotel, ...]
    places: tuple[Place, ...]
    meals: tuple[Meal, ...]
    fast: bool
    sleep: str
    see: str
    eat: str
    budget: int = 0

    @property
    def slots(self) -> tuple[str, ...]:
        """What a plan fills, in the order of its writing."""
        return tuple(slot for slot in SLOTS if not slot[-1].isdigit() or int(slot[-1]) <= self.days)

    @property
    def request(self) -> str:
        """What the user asks for.

        Example:
            >>> problem_of(0).request
            '2 days in prague from lisbon for 1 people , budget 25 each , sleep classic , eat lively'
        """
        parts = [
            f"{self.days} days in {self.destination} from {self.origin} for {self.people} people",
            f"budget {self.budget} each",
            *(["fast train"] if self.fast else []),
            *([f"sleep {self.sleep}"] if self.sleep else []),
            *([f"see {self.see}"] if self.see else []),
            *([f"eat {self.eat}"] if self.eat else []),
        ]
        return " , ".join(parts)


def problem_of(seed: int, there: tuple[int, int] = ROWS_THERE) -> Problem:
    """The problem of a seed, for which there is a plan.

    Args:
        seed: any whole number.
        there: how few and how many rows of each table are in the city that is asked for.

    Example:
        >>> problem = problem_of(0)
        >>> sum(map(len, (problem.trains, problem.hotels, problem.places, problem.meals)))
        40
    """
    draw = random.Random(f"trip {seed}")
    while True:
        problem = _drawn(draw, there)
        looked = looked_at(problem)
        if looked is not None:
            cost = sum(rows[-1].price for rows in looked.values())
            return replace(problem, budget=cost + draw.randint(0, MOST_SLACK))


def _drawn(draw: random.Random, there: tuple[int, int]) -> Problem:
    """A problem without a budget; there may be no plan for it."""
    origin, destination, elsewhere = draw.sample(CITIES, 3)

    def table(letter: str, row: Callable[[str, str, int], Any]) -> tuple[Any, ...]:
        """Rows of a table, in each city coded in the order of their prices."""
        rows, near = [], draw.randint(*there)
        for city, count in ((destination, near), (elsewhere, ROWS - near)):
            prices = sorted(draw.randint(1, MOST_PRICE) for _ in range(count))
            rows += [row(f"{letter}{number}", city, price) for number, price in enumerate(prices, start=1)]
        return tuple(rows)

    seats = range(1, MOST_SEATS + 1)
    wishes = draw.sample(WISHES, draw.choice((2, 3)))
    return Problem(
        origin,
        destination,
        draw.choice((2, 3)),
        draw.randint(1, MOST_PEOPLE),
        table("t", lambda code, city, price: Train(code, origin, city, draw.choice(SPEEDS), draw.choice(seats), price)),
        table("h", lambda code, city, price: Hotel(code, city, draw.choice(STYLES), draw.choice(seats), price)),
        table("p", lambda code, city, price: Place(code, city, draw.choice(STYLES), draw.randint(0, MOST_DAYS), price)),
        table("m", lambda code, city, price: Meal(code, city, draw.choice(STYLES), price)),
        fast="fast" in wishes,
        sleep=draw.choice(STYLES) if "sleep" in wishes else "",
        see=draw.choice(STYLES) if "see" in wishes else "",
        eat=draw.choice(STYLES) if "eat" in wishes else "",
    )


def looked_at(problem: Problem) -> dict[str, list[Any]] | None:
    """For each slot of a plan the rows that are looked at, the cheapest first, up to the one that is taken.

    A table is read once: what did not fit a day is not looked at again for the next one. A wish for a style of places
    or restaurants is seen to on the first day.

    Args:
        problem: whose budget is not looked at.

    Returns:
        Slot → rows, of which the last fits; None where there is a slot that no row fits.
    """
    left: dict[str, list[Any]] = {
        verb: [row for row in rows if row.city == problem.destination] for verb, rows in _tables(problem).items()
    }
    looked: dict[str, list[Any]] = {}
    for slot in problem.slots:
        verb, _, day = slot.partition("-")
        rows = left[verb]
        number = next((number for number, row in enumerate(rows, start=1) if _fits(row, problem, day)), None)
        if number is None:
            return None
        looked[slot], left[verb] = rows[:number], rows[number:]
    return looked


def _tables(problem: Problem) -> dict[str, tuple[Any, ...]]:
    return {"train": problem.trains, "sleep": problem.hotels, "see": problem.places, "eat": problem.meals}


def _fits(row: Any, problem: Problem, day: str) -> bool:
    match row:
        case Train():
            return row.seats >= problem.people and (row.speed == "fast" or not problem.fast)
        case Hotel():
            return row.beds >= problem.people and problem.sleep in ("", row.style)
        case Place():
            return row.closed != int(day) and (day != "1" or problem.see in ("", row.style))
        case _:
            return day != "1" or problem.eat in ("", row.style)


def plan_text(plan: Mapping[str, Any], total: int | None = None) -> str:
    """A plan as it is written, with its total at the end.

    Args:
        plan: slot → row.
        total: that it states; None: what it costs.

    Example:
        >>> plan_text(plan_of(problem_of(0)))
        'train t1 sleep h2 see-1 p1 see-2 p2 eat-1 m1 eat-2 m2 total 24'
    """
    words = [f"{slot} {row.code}" for slot, row in plan.items()]
    return " ".join([*words, "total", str(sum(row.price for row in plan.values()) if total is None else total)])


def plan_of(problem: Problem) -> dict[str, Any]:
    """The solver's plan: slot → row."""
    looked = looked_at(problem)
    assert looked is not None, "every problem has a plan"
    return {slot: rows[-1] for slot, rows in looked.items()}


def check(text: str, problem: Problem) -> Verdict:
    """Whether a plan does what is asked, constraint by constraint: any plan that satisfies all of them is right.

    hard = 1 if every constraint holds, else 0;  constraints = share of them that hold

    Args:
        text: the last turn; what is thought in it does not count.
        problem: that it answers.

    Returns:
        `correct` is the hard score, `parts` has the constraints, `figures` their share. A text that is no plan, or that
        fills not all slots, satisfies none.

    Example:
        >>> problem = problem_of(0)
        >>> verdict = check("train t1 sleep h2 see-1 p1 see-2 p2 eat-1 m1 eat-2 m1 total 24", problem)
        >>> verdict.correct, [name for name, holds in verdict.parts.items() if not holds]
        (False, ['nothing twice', 'total'])
    """
    codes, total = _read(text.rpartition("</think>")[2], problem)
    tables = _tables(problem)
    known = {
        slot: row
        for slot, code in codes.items()
        for row in tables[slot.partition("-")[0]]
        if row.code == code and row.city == problem.destination
    }
    complete = set(codes) == set(problem.slots)
    every = complete and len(known) == len(codes)
    cost = sum(row.price for row in known.values())
    train, hotel = known.get("train"), known.get("sleep")
    places = {int(slot[-1]): row for slot, row in known.items() if isinstance(row, Place)}
    seen = {row.style for row in places.values()}
    eaten = {row.style for row in known.values() if isinstance(row, Meal)}
    parts = {
        "complete": complete,
        "in the database": every,
        "seats": train is not None and train.seats >= problem.people,
        "beds": hotel is not None and hotel.beds >= problem.people,
        "open": every and all(row.closed != day for day, row in places.items()),
        "nothing twice": every and len(set(codes.values())) == len(codes),
        **({"fast": train is not None and train.speed == "fast"} if problem.fast else {}),
        **({"sleep": hotel is not None and hotel.style == problem.sleep} if problem.sleep else {}),
        **({"see": problem.see in seen} if problem.see else {}),
        **({"eat": problem.eat in eaten} if problem.eat else {}),
        "budget": every and cost <= problem.budget,
        "total": every and total == cost,
    }
    parts = {name: holds and complete for name, holds in parts.items()}
    return Verdict(all(parts.values()), parts, {"constraints": sum(parts.values()) / len(parts)})


def _read(text: str, problem: Problem) -> tuple[dict[str, str], int | None]:
    """Slot → code and the stated total of a plan; nothing of a text that is none."""
    words = text.split()
    slots, codes = words[:-2:2], words[1:-2:2]
    if len(words) % 2 or words[-2:-1] != ["total"] or re.fullmatch(r"[0-9]{1,9}", words[-1]) is None:
        return {}, None
    if len(set(slots)) < len(slots) or not set(slots) <= set(problem.slots):
        return {}, None
    return dict(zip(slots, codes, strict=True)), int(words[-1])
