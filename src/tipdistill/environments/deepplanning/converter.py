"""A model behind a URL that turns a plan's text into JSON, in the place of the parser of `plan.py`.

The benchmark itself reads plans so. What the model answers is not to be trusted: it is checked part by part, and what
is not there is taken as absent, as the parser does it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from ...documents import parse_json
from ...http import ask, doubling, key_of, server_url
from ...replies import model_names, written
from .data import number
from .plan import KINDS, MOST_DAYS, MOST_LINES, OTHER, Activity, Day, Plan, PlanError, cities_in, mode_of, slot

URL, MODEL, KEY = "DEEPPLANNING_CONVERTER_URL", "DEEPPLANNING_CONVERTER_MODEL", "DEEPPLANNING_CONVERTER_KEY"
_MOST_TOKENS = 12_000
_SECONDS = 300.0
_TASK = """\
You read a travel plan and write down what it says as JSON. Add nothing and repair nothing: what the plan does not say \
is null. Answer with the JSON alone, of this form:

{"budget_summary": {"total_estimated_budget": number},
 "daily_plans": [{"current_city": "CITY" or, on a day that leads from one city to another, "from CITY to CITY",
                  "accommodation": {"name": text, "price_per_night": number} or null,
                  "activities": [{"time_slot": "HH:MM-HH:MM", "type": TYPE, "details": DETAILS}]}]}

TYPE and its DETAILS:
travel_intercity_public {"mode": "train" or "flight", "number": text, "from": station, "to": station, "cost": number}
travel_city {"from": place, "to": place, "cost": number}
attraction {"name": text, "cost": number}
meal {"name": text, "cost": number}
hotel {"name": text}
buffer {}

Names stand exactly as in the plan, in its language. The activities keep their order. A cost is that of one person, of \
travel_city that of one car.\
"""


class Converter(NamedTuple):
    """A model that reads plans.

    Attributes:
        url: of an OpenAI-compatible server, with its /v1.
        model: which of its models; None: the first.
    """

    url: str
    model: str | None


def named() -> Converter | None:
    """The converter that the environment variables name, if they name one.

    Raises:
        ValueError: the URL is none.
    """
    url, model = (os.environ.get(name, "").strip() for name in (URL, MODEL))
    return Converter(server_url(URL, url), model or None) if url else None


def convert(text: str, converter: Converter) -> Plan:
    """A plan as a model reads it.

    Args:
        text: of the plan.
        converter: who reads it. The server's key, if it needs one, is in DEEPPLANNING_CONVERTER_KEY.

    Raises:
        PlanError: the model answers with no plan.
        OSError, ValueError: the server does not answer, or refuses.
    """
    url = converter.url
    key = key_of(KEY, KEY if os.environ.get(KEY, "").strip() else None, url)
    model = (
        converter.model
        or ask(f"{url}/models", again=doubling(3, 2.0), read=model_names, api_key=key, timeout=30.0).value[0]
    )
    messages = [{"role": "system", "content": _TASK}, {"role": "user", "content": text}]
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": _MOST_TOKENS}
    reply = ask(
        f"{url}/chat/completions",
        body,
        again=doubling(3, 2.0),
        read=lambda answer: written(answer, as_chat=True),
        api_key=key,
        timeout=_SECONDS,
    )
    return plan_of(reply.value.text)


def plan_of(answer: str) -> Plan:
    """The plan in a converter's answer.

    Args:
        answer: JSON, with or without words around it.

    Raises:
        PlanError: there is no JSON of a plan with a day.

    Example:
        >>> day = '{"current_city": "from A to B", "activities": [{"type": "meal", "details": {"name": "Inn"}}]}'
        >>> plan_of('{"daily_plans": [' + day + ']}').days[0].cities
        ('A', 'B')
    """
    answer = answer.rpartition("</think>")[2]
    begins, ends = answer.find("{"), answer.rfind("}")
    try:
        read = parse_json(answer[begins : ends + 1], "the converter's answer")
    except ValueError as error:
        raise PlanError(str(error)) from None
    days = _of(read, "daily_plans")
    if not isinstance(days, list) or not days:
        raise PlanError("the converter's answer has no daily_plans")
    if len(days) > MOST_DAYS:
        raise PlanError(f"the converter's answer has more than {MOST_DAYS} days")
    return Plan(tuple(map(_day, days)), _cost(_of(_of(read, "budget_summary"), "total_estimated_budget")))


def _day(day: Any) -> Day:
    accommodation = _of(day, "accommodation")
    name, price = _text(_of(accommodation, "name")), _cost(_of(accommodation, "price_per_night"))
    activities = _of(day, "activities")
    if not isinstance(activities, list):
        activities = []
    read = tuple(_activity(activity) for activity in activities[:MOST_LINES])
    return Day(cities_in(_text(_of(day, "current_city"))), "" if name == "-" else name, price, read)


def _activity(activity: Any) -> Activity:
    kind, details = _text(_of(activity, "type")), _of(activity, "details")
    start, end = slot(_text(_of(activity, "time_slot"))[:80]) or (None, None)
    travels = kind.startswith("travel_")
    name = _text(_of(details, "number" if kind == "travel_intercity_public" else "name"))
    return Activity(
        kind if kind in KINDS else OTHER,
        start,
        end,
        name,
        _text(_of(details, "from")) if travels else "",
        _text(_of(details, "to")) if travels else "",
        mode_of(_text(_of(details, "mode")), name) if kind == "travel_intercity_public" else "",
        _cost(_of(details, "cost")),
    )


def _of(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, Mapping) else None


def _text(value: Any) -> str:
    return value.strip() if isinstance(value, str) else ""


def _cost(value: Any) -> float | None:
    cost = number(value)
    return cost if cost is not None and cost >= 0 else None
