"""A plan as a model writes it, read by a grammar: `<plan>`, day headers, lines of time, type and details, a total.

    <plan>
    Day 1 | Aville -> Beeton | stay: Park Inn | 320
    08:00-09:30 | travel_intercity_public | train G12 | Aville South -> Beeton North | 95
    09:30-09:50 | travel_city | Beeton North -> Old Mill | 18
    09:50-12:00 | attraction | Old Mill | 40
    ...
    Budget | total | 1480
    </plan>

What cannot be read is left out, as far as a plan remains: a cost without a number has none, a line of no known type
holds its time alone. The text is a model's, so nothing in it may take long or fail: lines are cut, counts are bounded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

KINDS = ("travel_intercity_public", "travel_city", "attraction", "meal", "hotel", "buffer")
OTHER = "other"

LONGEST = 1_000_000  # characters of an answer in which a plan is looked for
LONGEST_LINE = 2_000
MOST_LINES = 2_000
MOST_DAYS = 31

# what models write in the place of a type
_SAID = {
    "intercity": "travel_intercity_public",
    "train": "travel_intercity_public",
    "flight": "travel_intercity_public",
    "城际交通": "travel_intercity_public",
    "taxi": "travel_city",
    "市内交通": "travel_city",
    "景点": "attraction",
    "breakfast": "meal",
    "lunch": "meal",
    "dinner": "meal",
    "用餐": "meal",
    "餐饮": "meal",
    "酒店": "hotel",
    "住宿": "hotel",
    "缓冲": "buffer",
    "休息": "buffer",
} | {kind: kind for kind in KINDS}
_TRAIN = ("train", "rail", "火车", "高铁", "动车", "列车")
_FLIGHT = ("flight", "plane", "air", "飞机", "航班")
_NO_STAY = ("", "-", "–", "—", "none", "no", "无")

_DAY = re.compile(r"(?:day\s{0,4}[0-9]{1,3}|第\s{0,4}[0-9]{1,3}\s{0,4}[天日])(?![0-9])(.*)", re.IGNORECASE)
# what a header may hold beside the cities and the stay: a date, with or without brackets
_DATE = re.compile(r"[（(]?[0-9年月日/.\- ]{0,20}[)）]?")
_SLOT = re.compile(r"([0-9]{1,2})[:：]([0-9]{2})\s{0,4}[-–—~～至]\s{0,4}([0-9]{1,2})[:：]([0-9]{2})")
_STAY = re.compile(r"(?:stay|hotel|accommodation|住宿|酒店)\s{0,4}[:：](.*)", re.IGNORECASE)
_COST = re.compile(r"([-−]?)(?<![0-9.])([0-9]{1,3}(?:,[0-9]{3}){1,3}|[0-9]{1,12})(\.[0-9]{1,6})?(?![0-9])")
_FREE = re.compile(r"free|免费", re.IGNORECASE)
_ARROW = re.compile(r"\s{0,4}(?:-{1,2}>|→|⟶|=>)\s{0,4}")
_FROM_TO = re.compile(r"(?:from\s{1,4}(.+?)\s{1,4}to\s{1,4}(.+)|从(.+?)到(.+))", re.IGNORECASE)
_TOTAL = re.compile(
    r"(?:budget |预算 )?(?:(?:estimated )?total(?: estimated)?(?: budget| cost| price)?|总计|合计|总价|总预算|总费用)",
    re.IGNORECASE,
)
_TRAIN_NUMBER = re.compile(r"[A-Z]?[0-9]{1,4}")


class PlanError(ValueError):
    """An answer holds no plan that can be read."""


@dataclass(frozen=True)
class Activity:
    """A line of a day.

    Attributes:
        kind: one of `KINDS`, or `OTHER`.
        start, end: minutes since the day began, end ≥ start (past midnight it is above 1440); None: no time was given.
        name: of the attraction, the restaurant or the hotel; of a journey between cities its number.
        origin, destination: of travel.
        mode: of a journey between cities "train" or "flight".
        cost: for one person, of a way in town for one car; None: none was given.
    """

    kind: str
    start: int | None
    end: int | None
    name: str = ""
    origin: str = ""
    destination: str = ""
    mode: str = ""
    cost: float | None = None


@dataclass(frozen=True)
class Day:
    """A day of a plan.

    Attributes:
        cities: where it is spent; two where it leads from one to the other.
        stay: hotel of the night; "" for none.
        price: of the hotel, a night and a room; None: none was given.
        activities: in the order given.
    """

    cities: tuple[str, ...]
    stay: str
    price: float | None
    activities: tuple[Activity, ...]

    def of(self, *kinds: str) -> list[Activity]:
        """The activities of some kinds."""
        return [activity for activity in self.activities if activity.kind in kinds]


@dataclass(frozen=True)
class Plan:
    """A plan.

    Attributes:
        days: at least one.
        total: what it costs in all, as it says itself; None: it does not say.
    """

    days: tuple[Day, ...]
    total: float | None


def plan_text(response: str) -> str:
    """What stands between `<plan>` and `</plan>`, the last of them, after the thoughts.

    Args:
        response: a model's last message.

    Raises:
        PlanError: there is no such text, or it is longer than any plan.

    Example:
        >>> plan_text("<think> <plan>no</plan> </think> Here: <plan>Day 1</plan>")
        'Day 1'
    """
    if len(response) > LONGEST:
        raise PlanError(f"the answer has more than {LONGEST:,} characters")
    said = response.rpartition("</think>")[2].partition("<think>")[0]
    text, closed, _ = said.rpartition("</plan>")
    _, opened, text = text.rpartition("<plan>")
    if not closed or not opened:
        raise PlanError("there is no <plan> … </plan>")
    if text.count("\n") >= MOST_LINES:
        raise PlanError(f"the plan has more than {MOST_LINES:,} lines")
    return text


def parse_plan(response: str) -> Plan:
    """The plan in a model's last message.

    Args:
        response: the message.

    Raises:
        PlanError: there is none, or none with a day.

    Example:
        >>> plan = parse_plan("<plan>\\nDay 1 | Aville\\n09:00-10:00 | meal | Inn | 30\\nBudget | total | 30\\n</plan>")
        >>> plan.total, plan.days[0].cities, plan.days[0].activities[0].name
        (30.0, ('Aville',), 'Inn')
    """
    headers: list[tuple[tuple[str, ...], str, float | None]] = []
    activities: list[list[Activity]] = []
    total: float | None = None
    for line in plan_text(response).split("\n"):
        fields = _fields(line[:LONGEST_LINE])
        day = _DAY.fullmatch(fields[0])
        if day:
            if len(headers) == MOST_DAYS:
                raise PlanError(f"the plan has more than {MOST_DAYS} days")
            headers.append(_header([day[1].strip(" :："), *fields[1:]]))
            activities.append([])
        elif (said := _total(fields)) is not None:
            total = cost_in(said)
        elif headers and (activity := _activity(fields)):
            activities[-1].append(activity)
    if not headers:
        raise PlanError("the plan has no day: a line such as 'Day 1 | …'")
    days = [Day(*header, tuple(of_day)) for header, of_day in zip(headers, activities, strict=True)]
    return Plan(tuple(days), total)


def cost_in(text: str) -> float | None:
    """The first number of a text, 0 where it says free; None where there is none, or a negative one.

    Example:
        >>> cost_in("¥1,250.50 per person"), cost_in("free"), cost_in("-5"), cost_in("9" * 40)
        (1250.5, 0.0, None, None)
    """
    match = _COST.search(text)
    if match is None:
        return 0.0 if _FREE.search(text) else None
    return None if match[1] else float(match[2].replace(",", "") + (match[3] or ""))


def slot(text: str) -> tuple[int, int] | None:
    """A time of a day as minutes since it began; an end before the start is on the next day.

    Example:
        >>> slot("09:30-10:00"), slot("23:30 - 00:15"), slot("morning")
        ((570, 600), (1410, 1455), None)
    """
    match = _SLOT.fullmatch(text.strip())
    if match is None:
        return None
    hours, minutes = (int(match[1]), int(match[3])), (int(match[2]), int(match[4]))
    start, end = (60 * hour + minute for hour, minute in zip(hours, minutes, strict=True))
    if max(minutes) > 59 or max(start, end) > 1440:
        return None
    return start, end if end >= start else end + 1440


def cities_in(text: str) -> tuple[str, ...]:
    """The city of a day, or the two between which it leads.

    Example:
        >>> cities_in("Aville -> Beeton"), cities_in("from Aville to Beeton"), cities_in("Beeton")
        (('Aville', 'Beeton'), ('Aville', 'Beeton'), ('Beeton',))
    """
    parts = _ARROW.split(text, maxsplit=1)
    if len(parts) == 1 and (match := _FROM_TO.fullmatch(text)):
        parts = [part for part in match.groups() if part]
    return tuple(part.strip() for part in parts)


def mode_of(said: str, number: str) -> str:
    """Whether a journey is a train's or a flight's, by what is said of it, else by the form of its number.

    Example:
        >>> mode_of("train", "G7798"), mode_of("", "G7798"), mode_of("", "G59098"), mode_of("", "CA1234")
        ('train', 'train', 'flight', 'flight')
    """
    said = said.lower()
    for mode, words in (("train", _TRAIN), ("flight", _FLIGHT)):
        if any(word in said for word in words):
            return mode
    return "train" if _TRAIN_NUMBER.fullmatch(number) else "flight"


def _fields(line: str) -> list[str]:
    line = line.strip().lstrip("#*•- ").rstrip("* ")
    # wide bars are for texts without any other: names may hold them
    return [field.strip().strip("*").strip() for field in line.split("|" if "|" in line else "｜")]


def _header(fields: list[str]) -> tuple[tuple[str, ...], str, float | None]:
    place = next((place for place, field in enumerate(fields) if _STAY.fullmatch(field)), len(fields))
    named = [field for field in fields[:place] if not _DATE.fullmatch(field)]
    cities = cities_in(named[0]) if named else ("",)
    match = _STAY.fullmatch(fields[place]) if place < len(fields) else None
    stay = match[1].strip() if match else ""
    price = cost_in(fields[place + 1]) if place + 1 < len(fields) else None
    return cities, "" if stay.lower() in _NO_STAY else stay, price


def _total(fields: list[str]) -> str | None:
    """What a line gives as the total; None where it is about something else."""
    if len(fields) == 1:
        fields = re.split("[:：]", fields[0], maxsplit=1)
    label = " ".join(field.strip(" :：") for field in fields[:-1])
    return fields[-1] if _TOTAL.fullmatch(label) else None


def _activity(fields: list[str]) -> Activity | None:
    if len(fields) < 2:
        return None
    times, kind = slot(fields[0]), _SAID.get(fields[1].lower(), OTHER)
    if times is None and kind == OTHER:
        return None
    start, end = times or (None, None)
    details = [*fields[2:], "", "", ""]
    if kind == "travel_intercity_public":
        said, _, number = details[0].rpartition(" ")
        origin, destination = _places(details[1])
        return Activity(kind, start, end, number, origin, destination, mode_of(said, number), _cost(details[2:]))
    if kind == "travel_city":
        origin, destination = _places(details[0])
        return Activity(kind, start, end, "", origin, destination, cost=_cost(details[1:]))
    if kind in ("attraction", "meal"):
        return Activity(kind, start, end, details[0], cost=_cost(details[1:]))
    return Activity(kind, start, end, details[0] if kind == "hotel" else "")


def _places(text: str) -> tuple[str, str]:
    parts = [part.strip() for part in _ARROW.split(text, maxsplit=1)]
    return (parts[0], parts[1]) if len(parts) == 2 else (parts[0], "")


def _cost(fields: list[str]) -> float | None:
    return next((cost for field in fields if (cost := cost_in(field)) is not None), None)
