"""The grammar of a plan: what is read, in which forms, and that nothing a model writes makes it fail or take long."""

import random
import string
import time
from contextlib import suppress

import pytest
import travel
from hypothesis import given, settings
from hypothesis import strategies as st

from tipdistill.environments.deepplanning import plan as grammar
from tipdistill.environments.deepplanning.data import database_path, read_database, read_queries
from tipdistill.environments.deepplanning.plan import Activity, Plan, PlanError, cost_in, parse_plan, plan_text, slot
from tipdistill.environments.deepplanning.prompts import SYSTEM
from tipdistill.environments.deepplanning.score import score

SECONDS = 2.0  # that any answer may take, on a busy machine


def lines(*of_day, header="Day 1 | Aville"):
    return parse_plan("<plan>\n" + "\n".join([header, *of_day]) + "\n</plan>").days[0]


def test_a_day_is_read_field_by_field():
    read = parse_plan(travel.plan("0"))
    assert (len(read.days), read.total) == (3, 3100)
    first, _, last = read.days
    assert (first.cities, first.stay, first.price) == (("Aville", "Beeton"), "Park Inn", 300)
    assert (last.cities, last.stay) == (("Beeton", "Aville"), "")
    leg, wait, way, visit, *_, hotel = first.activities
    stations = {"origin": "Aville South", "destination": "Beeton North"}
    assert leg == Activity("travel_intercity_public", 540, 660, "G12", **stations, mode="train", cost=100)
    assert wait == Activity("buffer", 660, 675)
    assert way == Activity("travel_city", 675, 695, "", "Beeton North", "Old Mill", cost=20)
    assert visit == Activity("attraction", 695, 785, "Old Mill", cost=40)
    assert hotel == Activity("hotel", 870, 900, "Park Inn")


@pytest.mark.parametrize(
    ("header", "cities", "stay", "price"),
    [
        ("Day 1 | A -> B | stay: Inn | 30", ("A", "B"), "Inn", 30),
        ("## **Day 1** | from A to B | hotel: Inn | ¥30/night", ("A", "B"), "Inn", 30),
        ("day 1: A → B | accommodation: Inn | 30 yuan", ("A", "B"), "Inn", 30),
        ("Day 1 (2025-11-12) | A | Stay: none", ("A",), "", None),
        ("Day 1 | 2025-11-12 | A | stay: Inn - North | 1,030.5", ("A",), "Inn - North", 1030.5),
        ("第1天 | 从甲市到乙市 | 住宿：公园酒店 | 30元", ("甲市", "乙市"), "公园酒店", 30),
        ("第 1 天｜甲市｜住宿：无", ("甲市",), "", None),
        ("Day 1", ("",), "", None),
        ("Day 1 | A | stay: Inn", ("A",), "Inn", None),
    ],
)
def test_forms_of_a_header(header, cities, stay, price):
    day = lines(header=header)
    assert (day.cities, day.stay, day.price) == (cities, stay, price)


@pytest.mark.parametrize(
    ("line", "kind", "start", "cost"),
    [
        ("- 9:00 - 10:00 | Lunch | Inn | 30", "meal", 540, 30),
        ("09:00–10:00 | meal | Inn | ¥30 per person | with a view", "meal", 540, 30),
        ("09：00~10：00｜用餐｜Inn｜人均30元", "meal", 540, 30),
        ("**09:00-10:00** | attraction | Inn | free", "attraction", 540, 0),
        ("09:00-10:00 | attraction | Inn", "attraction", 540, None),
        ("morning | meal | Inn | 30", "meal", None, 30),
        ("25:00-26:00 | meal | Inn | 30", "meal", None, 30),
        ("09:00-10:00 | dancing | Inn | 30", "other", 540, None),
        ("09:00-10:00 | meal | Inn | -30", "meal", 540, None),
        ("23:30-00:30 | meal | Inn | 30", "meal", 1410, 30),
    ],
)
def test_forms_of_a_line(line, kind, start, cost):
    (activity,) = lines(line).activities
    assert (activity.kind, activity.start, activity.cost) == (kind, start, cost)
    assert activity.end is None or activity.end == start + 60
    assert kind == "other" or activity.name == "Inn"


def test_words_around_the_plan_are_no_part_of_it():
    read = lines("we have a look around", "", "| |", "note | bring water", "10:00-11:00 | hotel | Inn")
    assert [activity.kind for activity in read.activities] == ["hotel"]


@pytest.mark.parametrize(
    ("text", "mode", "number"),
    [
        ("train G12", "train", "G12"),
        ("高铁 G12", "train", "G12"),
        ("flight 3U88", "flight", "3U88"),
        ("G12", "train", "G12"),
        ("Flight G12", "flight", "G12"),
        ("CA1234", "flight", "CA1234"),
        ("", "flight", ""),
    ],
)
def test_whether_a_journey_is_a_trains_or_a_flights(text, mode, number):
    (leg,) = lines(f"09:00-10:00 | travel_intercity_public | {text} | A -> B | 9").activities
    assert (leg.mode, leg.name, leg.origin, leg.destination) == (mode, number, "A", "B")


@pytest.mark.parametrize(
    ("line", "total"),
    [
        ("Budget | total | 1,480.50", 1480.5),
        ("Total: 1480 yuan", 1480),
        ("**Budget | Total estimated budget | 1480**", 1480),
        ("预算 | 总计 | 1480元", 1480),
        ("Total | a lot", None),
        ("Budget | meals | 1480", None),
        ("Total distance | 30 km", None),
        ("Budget | total | " + "9" * 400, None),
    ],
)
def test_forms_of_the_total(line, total):
    assert parse_plan(f"<plan>\nDay 1 | A\n{line}\n</plan>").total == total


@pytest.mark.parametrize(
    "response",
    [
        "",
        "Day 1 | Aville\n09:00-10:00 | meal | Inn | 30",
        "<plan>\nDay 1 | Aville\n",
        "</plan> Day 1 <plan>",
        "<think><plan>\nDay 1\n</plan></think> I could not find a train.",
        "Here it is. <think> no <plan>\nDay 1\n</plan>",
        "<plan></plan>",
        "<plan>\n09:00-10:00 | meal | Inn | 30\nBudget | total | 30\n</plan>",
        "<plan>" + "\nDay 1" * 40 + "</plan>",
        "<plan>\nDay 1" + "\nx" * 3000 + "</plan>",
        "<plan>\nDay 1 | " + "x" * 1_100_000 + "</plan>",
    ],
    ids=lambda text: f"{text[:20]!r}{len(text)}",
)
def test_what_is_no_plan(response):
    with pytest.raises(PlanError):
        parse_plan(response)


def test_the_last_plan_after_the_thoughts_counts():
    assert plan_text("<plan>a</plan></think><plan>b</plan> or <plan>c</plan>.") == "c"


@pytest.mark.parametrize(("language", "cities"), [("en", "Aville"), ("zh", "甲市")])
def test_the_example_in_the_prompt_is_a_plan_of_its_grammar(language, cities):
    read = parse_plan(SYSTEM[language][SYSTEM[language].index("<plan>\n") :])
    assert read.days[0].cities[0] == cities
    assert [activity.kind for day in read.days for activity in day.activities].count("other") == 0
    assert {*grammar.KINDS} == {activity.kind for day in read.days for activity in day.activities}
    assert all(word in SYSTEM[language] for word in grammar.KINDS)
    legs, each = [day.of("travel_intercity_public") for day in read.days], 2
    people = each * (legs[0][0].cost + legs[1][0].cost + 40 + 85)
    assert read.total == people + read.days[0].price + sum(way.cost for way in read.days[0].of("travel_city"))


# What a model may write.


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    root = travel.write_benchmark(tmp_path_factory.mktemp("deepplanning"), ["en"])
    query, database = read_queries(root, "en")["0"], read_database(database_path(root, "en", "0"))

    def judge(text):
        """The scores of any text, within bounded time."""
        started = time.perf_counter()
        try:
            plan = parse_plan(text)
        except PlanError:
            plan = None
        scores = score(plan, query, database)
        assert time.perf_counter() - started < SECONDS
        return scores

    return judge


@pytest.mark.parametrize("seed", range(150))
def test_a_mutated_plan_never_fails(judge, seed):
    draw = random.Random(seed)
    text = list(travel.plan(draw.choice("04")))
    pieces = ["\0", "|", "\n", "->", "-", "9" * 5000, "1e999", "nan", "(" * 500, "（", "<plan>", "</plan>", "</think>"]
    pieces += ["\ud800", "\u202e", "٣", "Day 2 | ", "Budget | total | ", "24:00-24:00 | meal | ", "x" * 3000, ","]
    for _ in range(draw.randint(1, 40)):
        place = draw.randrange(len(text))
        if draw.random() < 0.5:
            text[place] = draw.choice(pieces)
        else:
            del text[place : place + draw.randint(1, 30)]
        text = text or ["x"]
    judge("".join(text))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text(alphabet=string.printable + "｜：-–→天第从到免费\0\ud800", max_size=60), max_size=40))
def test_any_text_between_the_tags_never_fails(texts):
    with suppress(PlanError):
        assert isinstance(parse_plan("<plan>" + "\n".join(texts) + "</plan>"), Plan)


@pytest.mark.parametrize(
    "text",
    [
        "a" * 1_000_000,
        "(" * 900_000,
        "<plan>" * 160_000,
        "</plan>" * 140_000,
        "<think>" * 140_000,
        "<plan>\nDay 1 | " + "(" * 900_000 + "</plan>",
        "<plan>\nDay 1 | from " + " to " * 220_000 + "</plan>",
        "<plan>\nDay 1 | 从" + "到" * 900_000 + "</plan>",
        "<plan>\nDay 1 | " + "-" * 900_000 + "</plan>",
        "<plan>\nDay 1 | A\n" + "1," * 450_000 + "</plan>",
        "<plan>\nDay 1 | A\n" + "9" * 900_000 + "</plan>",
        "<plan>\nDay 1 | A\n09:00-10:00 | meal | " + "|" * 900_000 + "</plan>",
        "<plan>\nDay 1 | A\n09:00-10:00 | meal | Inn | " + "1" * 900_000 + "</plan>",
        "<plan>\nDay 1 | A\n09:00-10:00 | travel_city | " + " " * 900_000 + "-> | 3</plan>",
        "<plan>\nDay 1 | A" + "\n09:00-10:00 | buffer | " * 990 + "\n09:00-10:00 | hotel | Inn" * 990 + "</plan>",
        "<plan>\nTotal " + "total " * 150_000 + "</plan>",
    ],
    ids=lambda text: f"{text[:40]!r}{len(text)}",
)
def test_a_large_answer_takes_bounded_time(judge, text):
    judge(text)


def test_a_long_line_is_cut():
    (meal,) = lines("09:00-10:00 | meal | " + "x" * 5000 + " | 30").activities
    assert (len(meal.name) < grammar.LONGEST_LINE, meal.cost) == (True, None)


def test_numbers_that_no_price_has_are_none():
    for text in ("9" * 13, "9" * 100_000, "x", "", "-5", "−5", "1e400"):
        assert cost_in(text) in (None, 1.0)
    assert cost_in("12,345,678.25") == 12345678.25
    assert slot("99:99-00:00") is None
    assert slot("09:00-" + "0" * 100_000) is None
