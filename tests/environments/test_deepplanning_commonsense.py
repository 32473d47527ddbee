"""The thresholds of the checks, each at its two sides."""

from dataclasses import replace

import pytest
import travel

from tipdistill.environments.deepplanning import commonsense as checks
from tipdistill.environments.deepplanning.commonsense import Trip
from tipdistill.environments.deepplanning.data import Database, Query
from tipdistill.environments.deepplanning.plan import Activity, Day, Plan, slot

QUERY = Query("0", "", "A", 1, 1, 1, 3, {})


def database(**tables):
    """A database of the rows that are given, their other columns empty."""
    columns = {name.split("/")[0]: heading.split(",") for name, heading in travel.HEADINGS.items()}
    columns["roads"] = columns["transportation"]
    names = ("trains", "flights", "hotels", "attractions", "restaurants", "locations", "roads")
    return Database({name: [dict.fromkeys(columns[name], "") | row for row in tables.get(name, [])] for name in names})


def line(kind, time, name="", origin="", destination="", cost=None):
    start, end = slot(time) if time else (None, None)
    return Activity(kind, start, end, name, origin, destination, cost=cost)


def trip(*lines, cities=("B",), tables=None, stay="", query=QUERY):
    return Trip(Plan((Day(tuple(cities), stay, None, lines),), None), query, tables or database())


def meals(*times):
    return [line("meal", time, f"inn {place}") for place, time in enumerate(times)]


@pytest.mark.parametrize(
    ("times", "enough"),
    [
        ([], False),
        (["12:00-13:00"], False),
        (["12:00-13:00", "15:00-16:00"], True),
        (["12:00-13:00", "14:59-16:00"], False),
        (["15:00-16:00", "12:00-13:00"], True),
        (["12:00-13:00", "15:00-16:00", "16:00-17:00"], True),
    ],
)
def test_meals_of_a_whole_day(times, enough):
    assert checks.enough_meals(trip(*meals(*times))) is enough


@pytest.mark.parametrize(
    ("arrival", "counts"),
    [("09:59", {2, 3}), ("10:00", {1, 2, 3}), ("14:59", {1, 2, 3}), ("15:00", {0, 1}), ("23:00", {0, 1})],
)
def test_meals_of_the_day_of_arrival(arrival, counts):
    leg = line("travel_intercity_public", f"06:00-{arrival}")
    for count in range(4):
        times = [f"{hour:02}:00-{hour:02}:30" for hour in (11, 14, 17)][:count]
        assert checks.enough_meals(trip(leg, *meals(*times), cities="AB")) is (count in counts), count
    # too near each other
    close = meals("17:00-18:00", "18:30-19:00")
    assert not checks.enough_meals(trip(leg, *close, cities="AB"))


@pytest.mark.parametrize(
    ("departure", "counts"), [("08:59", {0}), ("09:00", {0, 1}), ("14:59", {0, 1}), ("15:00", {1, 2, 3})]
)
def test_meals_of_the_day_of_departure(departure, counts):
    away = Day(("A", "B"), "", None, ())  # without times, so that nothing is asked of it
    for count in range(4):
        times = [f"{hour:02}:00-{hour:02}:30" for hour in (6, 11, 14)][:count]
        leg = line("travel_intercity_public", f"{departure}-23:00")
        plan = Plan((away, Day(("B", "A"), "", None, (leg, *meals(*times)))), None)
        assert checks.enough_meals(Trip(plan, QUERY, database())) is (count in counts), count


def test_a_day_from_one_place_to_the_next_is_of_departure_and_of_arrival():
    away = Day(("A", "B"), "", None, ())
    for departure, arrival, counts in (("15:00", "23:00", {1}), ("09:00", "11:00", {1}), ("08:00", "09:30", set())):
        for count in range(3):
            leg = line("travel_intercity_public", f"{departure}-{arrival}")
            day = Day(("B", "C"), "", None, (leg, *meals(*["11:00-12:00", "18:00-19:00"][:count])))
            assert checks.enough_meals(Trip(Plan((away, day), None), QUERY, database())) is (count in counts)


def test_a_departure_from_where_one_is_not_asks_for_nothing():
    leg = line("travel_intercity_public", "16:30-23:00")
    for cities, asked in (("BA", True), ("CA", False)):
        plan = Plan((Day(("A", "B"), "", None, ()), Day(tuple(cities), "", None, (leg,))), None)
        assert checks.enough_meals(Trip(plan, QUERY, database())) is not asked
        assert checks.enough_attractions(Trip(plan, QUERY, database())) is not asked


@pytest.mark.parametrize(
    ("lines", "enough"),
    [
        ([], False),
        ([line("attraction", "09:00-12:59", "X")], False),
        ([line("attraction", "09:00-13:00", "X")], True),
        ([line("attraction", "09:00-10:00", "X"), line("attraction", "11:00-12:00", "Y")], True),
        ([line("attraction", "09:00-12:00", "X"), line("travel_city", "12:00-13:00", "", "X", "inn")], True),
        ([line("attraction", "09:00-12:00", "X"), line("travel_city", "12:00-13:00", "", "hotel", "inn")], False),
    ],
)
def test_attractions_of_a_whole_day(lines, enough):
    assert checks.enough_attractions(trip(*lines)) is enough


@pytest.mark.parametrize(
    ("cities", "time", "needed"),
    [
        ("AB", "06:00-11:59", True),
        ("AB", "06:00-12:00", False),
        ("BA", "16:01-20:00", True),
        ("BA", "16:00-20:00", False),
        ("BA", None, False),
    ],
)
def test_attractions_of_a_day_between_cities(cities, time, needed):
    leg = line("travel_intercity_public", time)
    before = [Day(("A", "B"), "", None, ())] if cities == "BA" else []
    for visits in ((), (line("attraction", "13:00-14:00", "X"),)):
        plan = Plan((*before, Day(tuple(cities), "", None, (leg, *visits))), None)
        assert checks.enough_attractions(Trip(plan, QUERY, database())) is (bool(visits) or not needed)


def roads(minutes):
    places = [{"poi_name": name, "latitude": str(place), "longitude": "0"} for place, name in enumerate("XYS")]
    times = [("0,0", "1,0", minutes), ("2,0", "0,0", minutes)]
    named = [{"origin": origin, "destination": to, "duration_minutes": time} for origin, to, time in times]
    return database(locations=places, roads=named)


@pytest.mark.parametrize(
    ("minutes", "fitting", "others"),
    [
        ("20", (15, 20, 25), (14, 26)),
        ("12", (7, 10, 12, 17, 20), (6, 21)),  # down to 12 − 5, up to 20
        ("28", (20, 28, 33), (19, 34)),  # down to 20, up to 28 + 5
        ("3", (0, 10), (11,)),
        ("x", (0, 300), ()),
        ("nan", (0, 300), ()),
    ],
)
def test_the_time_between_two_places(minutes, fitting, others):
    for gap in (*fitting, *others):
        start = f"{10 + gap // 60:02}:{gap % 60:02}"
        lines = line("attraction", "09:00-10:00", "X"), line("meal", f"{start}-23:00", "Y")
        assert checks.transfers_fit(trip(*lines, tables=roads(minutes))) is (gap in fitting), gap


def test_buffers_between_two_places_are_no_way():
    visit, meal = line("attraction", "09:00-10:00", "X"), line("meal", "11:00-12:00", "Y")
    within, across, after = (line("buffer", time) for time in ("10:10-10:50", "09:50-10:30", "12:00-12:40"))
    for wait, fits in ((within, True), (across, False), (after, False)):
        assert checks.transfers_fit(trip(visit, wait, meal, tables=roads("20"))) is fits
    late = line("attraction", "22:00-23:50", "X"), line("buffer", "23:55-00:25"), line("meal", "00:40-01:30", "Y")
    assert checks.transfers_fit(trip(*late, tables=roads("20")))
    assert not checks.transfers_fit(trip(late[0], late[2], tables=roads("20")))


def test_a_journey_counts_at_its_station_and_places_that_are_not_known_are_not_judged():
    leg = line("travel_intercity_public", "08:00-09:00", "G1", "X", "S")
    for gap, fits in (("09:20", True), ("09:40", False)):
        assert checks.transfers_fit(trip(leg, line("attraction", f"{gap}-12:00", "X"), tables=roads("20"))) is fits
    assert checks.transfers_fit(trip(leg, line("meal", "11:00-12:00", "Z"), tables=roads("20")))
    same = line("hotel", "09:00-10:00", "X"), line("hotel", "15:00-16:00", "X")
    assert checks.transfers_fit(trip(*same, tables=roads("20")))


@pytest.mark.parametrize(
    ("hours", "time", "is_open"),
    [
        (("09:00", "17:00"), "09:00-17:00", True),
        (("09:00", "17:00"), "08:59-12:00", False),
        (("09:00", "17:00"), "16:00-17:01", False),
        (("09:00", "24:00"), "22:00-24:00", True),
        (("09:00", "23:59"), "22:00-24:00", True),
        (("09:00", "24:00"), "23:00-00:30", False),
        (("17:00", "02:00"), "23:00-01:30", True),
        (("17:00", "02:00"), "00:30-01:30", True),
        (("17:00", "02:00"), "01:30-02:30", False),
        (("17:00", "02:00"), "16:00-18:00", False),
        (("Open 24 Hours", "Open 24 Hours"), "01:00-05:00", True),
        (("全天开放", "全天开放"), "01:00-05:00", True),
    ],
)
def test_hours_of_attractions_and_restaurants(hours, time, is_open):
    times = dict(zip(("opening_time", "closing_time"), hours, strict=True))
    tables = database(attractions=[{"attraction_name": "X", **times}], restaurants=[{"restaurant_name": "Y", **times}])
    assert checks.attractions_open(trip(line("attraction", time, "X"), tables=tables)) is is_open
    assert checks.restaurants_open(trip(line("meal", time, "Y"), tables=tables)) is is_open


def test_hours_that_are_not_known_close_an_attraction_and_no_restaurant():
    tables = database(attractions=[{"attraction_name": "X"}], restaurants=[{"restaurant_name": "Y"}])
    assert not checks.attractions_open(trip(line("attraction", "09:00-10:00", "X"), tables=tables))
    assert checks.restaurants_open(trip(line("meal", "09:00-10:00", "Y"), tables=tables))
    assert not checks.restaurants_open(trip(line("meal", None, "Y"), tables=tables))


@pytest.mark.parametrize(
    ("closed", "weekday", "day", "is_open"),
    [
        ("Monday", 1, 0, False),
        ("Monday", 7, 1, False),
        ("Monday", 7, 0, True),
        ("周一,周日", 5, 2, False),
        ("Tuesday, sunday", 6, 1, False),
        ("", 1, 0, True),
        ("Monday", None, 0, True),
    ],
)
def test_weekdays_on_which_an_attraction_is_closed(closed, weekday, day, is_open):
    tables = database(attractions=[{"attraction_name": "X", "closing_dates": closed}])
    days = [Day(("B",), "", None, ())] * day + [Day(("B",), "", None, (line("attraction", None, "X"),))]
    query = replace(QUERY, weekday=weekday)
    assert checks.not_closed_that_day(Trip(Plan(tuple(days), None), query, tables)) is is_open


@pytest.mark.parametrize(
    ("time", "fine"),
    [("09:00-10:30", True), ("09:00-10:29", False), ("09:00-12:00", True), ("09:00-12:01", False), (None, False)],
)
def test_how_long_a_visit_takes(time, fine):
    tables = database(attractions=[{"attraction_name": "X", "min_visit_hours": "1.5", "max_visit_hours": "3"}])
    assert checks.visits_reasonable(trip(line("attraction", time, "X"), tables=tables)) is fine
    unknown = database(attractions=[{"attraction_name": "X"}])
    assert not checks.visits_reasonable(trip(line("attraction", time, "X"), tables=unknown))


@pytest.mark.parametrize(
    ("time", "fine"),
    [
        ("12:00-12:30", True),
        ("12:00-12:29", False),
        ("12:00-14:30", True),
        ("12:00-14:31", False),
        ("23:30-00:30", True),
        (None, False),
    ],
)
def test_how_long_a_meal_takes(time, fine):
    assert checks.meals_reasonable(trip(line("meal", time, "inn"))) is fine


@pytest.mark.parametrize(("stated", "correct"), [(100, True), (111, True), (112, False), (91, True), (90, False)])
def test_a_total_within_ten_percent(stated, correct):
    plan = Plan((Day(("B",), "", None, (line("meal", None, "inn", cost=100.0),)),), float(stated))
    assert checks.total_correct(Trip(plan, QUERY, database())) is correct
    assert not checks.total_correct(Trip(replace(plan, total=None), QUERY, database()))


def test_prices_are_compared_as_rounded_and_an_unknown_one_is_not():
    for known, given, same in (("299.6", 300, True), ("299.6", 299, False), ("", None, True), ("nan", 7, True)):
        tables = database(attractions=[{"attraction_name": "X", "ticket_price": known}])
        assert checks.attractions_exist(trip(line("attraction", None, "X", cost=given), tables=tables)) is same
    tables = database(attractions=[{"attraction_name": "X", "ticket_price": "5"}])
    assert not checks.attractions_exist(trip(line("attraction", None, "X"), tables=tables))
    assert not checks.attractions_exist(trip(line("attraction", None, "", cost=5), tables=tables))


def test_a_hotel_that_is_not_known_costs_its_night_and_not_the_last_day():
    hotels = database(hotels=[{"name": "Inn", "price": "30"}])
    known, other = (Day(("B",), "", None, (line("hotel", None, name),)) for name in ("Inn", "Ruin"))
    for days, exist in (((known, known), True), ((known, other), True), ((other, known), False)):
        assert checks.hotels_exist(Trip(Plan(days, None), QUERY, hotels)) is exist


def test_a_station_of_several_cities_and_a_chinese_one_that_is_not_known():
    names = ("origin_city", "destination_city", "dep_station_name", "arr_station_name", "train_no")
    rows = [("A", "B", "A South", "Hub", "K1"), ("A", "B", "Hub", "B North", "K2")]
    tables = database(trains=[dict(zip(names, row, strict=True)) for row in rows])
    legs = [line("travel_intercity_public", None, "K1", "A South", "Hub")]
    assert checks.stations_match(trip(*legs, cities="AB", tables=tables))
    elsewhere = [line("travel_intercity_public", None, "K1", "A South", "C")]
    assert not checks.stations_match(trip(*elsewhere, cities="AB", tables=tables))
    assert not checks.stations_match(trip(cities="AB", tables=tables))
    leg = line("travel_intercity_public", None, "G1", "合肥南站", "南京南站")
    home = replace(QUERY, home="合肥")
    assert checks.stations_match(trip(leg, cities=("合肥（安徽）", "南京"), tables=tables, query=home))
