"""The environment: nine tools, their schemas, results and misses; rows, verdicts, and a converter behind a URL."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import travel
from transformers.utils import get_json_schema

from tipdistill.environments.deepplanning import DeepPlanning, converter
from tipdistill.environments.deepplanning.converter import plan_of
from tipdistill.environments.deepplanning.plan import PlanError, parse_plan
from tipdistill.environments.deepplanning.prompts import ENVIRONMENT, rows
from tipdistill.environments.deepplanning.score import score
from tipdistill.environments.world import read_environment, tools_of

TOOLS = {
    "query_train_info": (["origin", "destination", "depDate"], ["seatClassName"]),
    "query_flight_info": (["origin", "destination", "depDate"], ["seatClassName"]),
    "query_hotel_info": (["destination", "checkinDate", "checkoutDate"], ["hotelStar", "hotelBrands"]),
    "query_attraction_details": (["attraction_name"], []),
    "recommend_attractions": (["city"], ["attraction_type"]),
    "search_location": (["place_name"], []),
    "query_road_route_info": (["origin", "destination"], []),
    "recommend_restaurants": (["latitude", "longitude"], []),
    "query_restaurant_details": (["restaurant_name"], []),
}


@pytest.fixture(autouse=True)
def no_converter(monkeypatch):
    for name in (converter.URL, converter.MODEL, converter.KEY):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return travel.write_benchmark(tmp_path_factory.mktemp("deepplanning"))


def opened(root, id="0", language="en", **row):
    made = DeepPlanning()
    assert made.reset(directory=str(root), language=language, id=id, prompt=[], **row) is None
    return made


@pytest.fixture(scope="module")
def world(root):
    return opened(root)


def test_the_class_is_an_environment_with_nine_tools_of_which_a_student_can_be_told():
    made = read_environment(ENVIRONMENT)()
    schemas = {tool.__name__: get_json_schema(tool)["function"] for tool in tools_of(made)}
    assert set(schemas) == set(TOOLS)
    for name, (needed, optional) in TOOLS.items():
        parameters = schemas[name]["parameters"]
        assert parameters["required"] == needed, name
        assert list(parameters["properties"]) == [*needed, *optional], name
        assert {one["type"] for one in parameters["properties"].values()} == {"string"}, name
        assert all(len(one["description"]) > 8 for one in parameters["properties"].values()), name


def test_trains_come_by_route_with_the_legs_of_each_in_order(world):
    routes = json.loads(world.query_train_info("Aville", "Beeton", "2025-11-12"))
    assert [[leg["train_no"] for leg in route["legs"]] for route in routes] == [["G12"], ["G14"], ["K1", "K2"]]
    assert [route["price"] for route in routes] == ["100.0", "100.0", "60.0"]
    assert [route["legs"][0]["seat_status"] for route in routes] == ["available", "2", "9"]
    assert routes[0]["legs"][0]["dep_datetime"] == "2025-11-12 09:00:00"
    assert json.loads(world.query_train_info("Aville", "Beeton", "2025-11-12", "Second Class Seat")) == routes
    assert "\n  " in world.query_train_info("Aville", "Beeton", "2025-11-12")


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("query_train_info", ("Aville", "Beeton", "2025-11-13")),
        ("query_train_info", ("aville", "Beeton", "2025-11-12")),
        ("query_train_info", ("Aville", "Beeton", "2025-11-12", "Business Seat")),
        ("query_flight_info", ("Aville", "Beeton", "2025-11-12")),  # there is no table of flights at all
        ("query_flight_info", ("Aville", "Beeton", "2025-11-12", "First Class")),
        ("query_hotel_info", ("Beeton", "2025-11-12", "2025-11-14", "4")),
        ("query_hotel_info", ("Beeton", "2025-11-12", "2025-11-14", "", "Hilton")),
        ("query_attraction_details", ("Mill",)),
        ("recommend_attractions", ("Beeton", "Theme Park")),
        ("search_location", ("",)),
        ("query_road_route_info", ("30.01,120.01", "1,2")),
        ("query_road_route_info", ("30.11,120.11", "30.01,120.01")),  # one way is known, the other is not
        ("recommend_restaurants", ("30.11", "120.110")),
        ("query_restaurant_details", ("{}",)),
    ],
)
@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_miss_is_a_sentence(root, tool, arguments, language):
    said = getattr(opened(root, language=language), tool)(*arguments)
    assert said.endswith("." if language == "en" else "。")
    assert "\n" not in said
    assert said.isascii() == (language == "en")


@pytest.mark.parametrize("value", [None, 3, 1.5, True, [], {"a": []}, "\0", "{0}{x}", "\ud800", "x" * 1_000_000])
@pytest.mark.parametrize("tool", TOOLS)
def test_arguments_of_any_kind_are_a_miss(world, tool, value):
    needed, optional = TOOLS[tool]
    for asked in (needed, [*needed, *optional]):
        said = getattr(world, tool)(**dict.fromkeys(asked, value))
        assert isinstance(said, str)
        assert said


def test_which_coordinates_are_not_known_is_told(world):
    assert "'1,2' are not known" in world.query_road_route_info("30.01,120.01", "1,2")
    assert "The road from 30.11,120.11 to 30.01,120.01" in world.query_road_route_info("30.11,120.11", "30.01,120.01")


def test_hotels_by_stars_and_brand_whatever_the_city(world):
    def names(*asked):
        return [hotel["name"] for hotel in json.loads(world.query_hotel_info("nowhere", "", "", *asked))]

    assert names() == ["Park Inn", "Lake Hotel", "Grand"]
    assert names("3") == names(3) == ["Park Inn", "Lake Hotel"]
    assert names("3", "Lake") == names("", "Lake") == names(None, "Lake") == ["Lake Hotel"]
    (park, *_) = json.loads(world.query_hotel_info("", "", "", "3"))
    assert (park["services"], park["latitude"], park["price"]) == (["Pool", "Gym"], "30.100001", "300.0")


def test_attractions_are_text_whatever_the_city(world):
    assert world.recommend_attractions("nowhere").count("\n") == 5
    assert world.recommend_attractions("Beeton", "Natural Scenery") == (
        "River Park (Natural Scenery): About River Park, in short.\n"
        "Botanic Garden (Natural Scenery): About Botanic Garden, in short."
    )
    details = world.query_attraction_details("City Museum").split("\n")
    assert {"closing_dates: Monday", "min_visit_hours: 1.5", "latitude: 30.13", "ticket_price: 55.0"} <= set(details)


def test_places_roads_and_restaurants(world):
    place = json.loads(world.search_location(" Old Mill "))
    assert (place["latitude"], place["longitude"]) == ("30.11", "120.11")
    road = json.loads(world.query_road_route_info("30.01,120.01", "30.11,120.11"))
    assert (road["distance_meters"], road["duration_minutes"], road["cost"]) == ("9000", "20", "20")
    near = json.loads(world.recommend_restaurants("30.12", "120.12"))
    assert [one["restaurant_name"] for one in near] == ["River Kitchen", "Harbour Grill"]
    assert not any(column.startswith("query_") for one in near for column in one)
    details = json.loads(world.query_restaurant_details("Miller's Table"))
    assert (details["tags"], details["price_per_person"]) == (["Room", "Queue"], "80.0")


@pytest.mark.parametrize(("id", "language"), [("0", "en"), ("4", "en"), ("0", "zh"), ("4", "zh")])
def test_the_verdict_on_a_perfect_plan(root, id, language):
    said = opened(root, id, language)._verdict(travel.plan(id, language))
    assert said.correct
    assert set(said.parts.values()) == {True}
    assert set(said.figures.values()) == {1.0}
    assert len(said.figures) == 5 + 8 + 1


@pytest.mark.parametrize("response", ["", "I cannot.", "<plan>\nfirst we go to the mill\n</plan>", "\0" * 9])
def test_the_verdict_on_no_plan(root, response):
    said = opened(root)._verdict(response)
    assert not said.correct
    assert {name for name, value in said.figures.items() if value} == {"own_parser"}


def test_one_object_is_reset_for_problem_after_problem(root):
    made = opened(root)
    made.reset(directory=str(root), language="zh", id="4")
    assert "CA101" in made.query_flight_info("甲市", "丁岸", "2025-11-15")
    assert made._verdict(travel.plan("4", "zh")).correct
    assert not made._verdict(travel.plan("0", "zh")).correct


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, r"the row has no text in directory and language and id: write the prompts with"),
        ({"directory": "x", "language": "en", "id": 3}, "no text in id:"),
        ({"language": "en", "id": "3"}, "has no en query with the id '3'"),
        ({"language": "fr", "id": "0"}, "the language must be one of en, zh"),
        ({"language": "en", "id": "../0"}, "has no en query with the id '../0'"),
    ],
)
def test_a_row_that_names_no_problem(root, row, message):
    row = {"directory": str(root), **row} if row and "directory" not in row else row
    with pytest.raises(ValueError, match=message):
        DeepPlanning().reset(**row)


def test_rows_hold_what_reset_takes(root, monkeypatch):
    monkeypatch.chdir(root.parent)
    (row,) = rows(root.name, "zh", "train")
    assert {name: row[name] for name in row if name != "prompt"} == {
        "directory": str(root),
        "language": "zh",
        "id": "0",
    }
    assert [message["role"] for message in row["prompt"]] == ["system", "user"]
    assert row["prompt"][1]["content"] == travel.in_chinese(travel.QUERIES[0]["query"])
    assert opened(root, row["id"], row["language"])._verdict(travel.plan("0", "zh")).correct


def test_the_prompt_leaves_room_for_the_query_within_the_papers_4096_tokens(root):
    for language in ("en", "zh"):
        (row,) = rows(root, language, "train")
        system = row["prompt"][0]["content"]
        # English: four characters to a token or more; Chinese: one, or less
        chinese = sum("一" <= character <= "鿿" for character in system)
        schemas = json.dumps([get_json_schema(tool) for tool in tools_of(DeepPlanning())])
        assert chinese + (len(system) - chinese) / 3 + len(schemas) / 3 < 3600, language


# A converter.


def as_json(text):
    """What a good converter answers to a plan."""
    read = parse_plan(text)
    days = []
    for day in read.days:
        activities = []
        for one in day.activities:
            clock = "-".join(f"{minute // 60:02}:{minute % 60:02}" for minute in (one.start, one.end))
            details = {"name": one.name, "cost": one.cost, "from": one.origin, "to": one.destination}
            details |= {"number": one.name, "mode": one.mode} if one.mode else {}
            activities.append({"time_slot": clock, "type": one.kind, "details": details})
        cities = "from {} to {}".format(*day.cities) if len(day.cities) == 2 else day.cities[0]
        stay = {"name": day.stay, "price_per_night": day.price} if day.stay else {"name": "-"}
        days.append({"current_city": cities, "accommodation": stay, "activities": activities})
    return json.dumps({"budget_summary": {"total_estimated_budget": read.total}, "daily_plans": days})


@contextmanager
def converting(answer, status=200):
    """A server whose model answers `answer`, and what it was asked."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, None, dict(self.headers)))
            self._send({"data": [{"id": "reader"}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, body, dict(self.headers)))
            message = {"choices": [{"message": {"content": answer}, "finish_reason": "stop"}]}
            self._send(message | {"usage": {"completion_tokens": 5}})

        def _send(self, reply):
            payload = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(("id", "language"), [("0", "en"), ("4", "zh")])
def test_what_a_converter_answers_is_read_as_the_parser_reads_the_plan(id, language):
    text = travel.plan(id, language)
    assert plan_of(f"Here is the JSON:\n<JSON>{as_json(text)}</JSON>") == parse_plan(text)


def test_a_converter_takes_the_parsers_place_and_the_figures_say_so(root, monkeypatch):
    text = travel.plan("0")
    with converting(as_json(text)) as (url, asked):
        monkeypatch.setenv(converter.URL, url + "/")
        said = opened(root)._verdict(text)
        assert said.correct
        assert said.figures["own_parser"] == 0.0
        monkeypatch.setenv(converter.KEY, "sk-1")
        monkeypatch.setenv(converter.MODEL, "mine")
        assert opened(root)._verdict(text).correct
    assert [path for path, *_ in asked] == ["/v1/models", "/v1/chat/completions", "/v1/chat/completions"]
    assert [body["model"] for _, body, _ in asked if body] == ["reader", "mine"]
    assert asked[1][1]["messages"][1]["content"].startswith("\nDay 1 | Aville")  # no thoughts, and no tags
    assert [headers.get("Authorization") for *_, headers in asked] == [None, None, "Bearer sk-1"]


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "no",
        "{}",
        "[1]",
        '{"daily_plans": []}',
        '{"daily_plans": {}}',
        '{"daily_plans": [1' + "]" * 9,
        '{"a": ' * 100_000,
        '{"daily_plans": ' + "9" * 6000 + "}",
        json.dumps({"daily_plans": [{}] * 100}),
    ],
    ids=lambda text: f"{text[:20]}{len(text)}",
)
def test_an_answer_that_is_no_plan_delivers_none(root, answer, monkeypatch):
    with pytest.raises(PlanError):
        plan_of(answer)
    with converting(answer) as (url, _):
        monkeypatch.setenv(converter.URL, url)
        said = opened(root)._verdict(travel.plan("0"))
    assert {name for name, value in said.figures.items() if value} == set()


@pytest.mark.parametrize("wrong", [None, 3, "x", [], {}, [[]], "9" * 50, -5, 1e308, True, float("nan"), "\0|\ud800"])
def test_values_of_any_type_in_an_answer_are_taken_as_absent(root, wrong):
    whole = json.loads(as_json(travel.plan("0")))

    def places(value, path=()):
        yield path
        inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for name, inside in inner:
            yield from places(inside, (*path, name))

    made = opened(root)
    for path in list(places(whole))[1:120]:
        copy = json.loads(json.dumps(whole))
        place = copy
        for name in path[:-1]:
            place = place[name]
        place[path[-1]] = wrong
        try:
            plan = plan_of(json.dumps(copy))
        except PlanError:
            continue
        score(plan, made._query, made._tables)


def test_a_negative_or_endless_cost_is_none():
    for cost, read in ((-5, None), (1e300, None), (float("inf"), None), ("30", 30.0), (12.5, 12.5)):
        day = {"activities": [{"type": "meal", "details": {"name": "Inn", "cost": cost}}]}
        assert plan_of(json.dumps({"daily_plans": [day]})).days[0].activities[0].cost == read


def test_a_server_that_refuses_ends_the_run_and_no_plan_is_lost_in_silence(root, monkeypatch):
    with converting("", status=404) as (url, _):
        monkeypatch.setenv(converter.URL, url)
        monkeypatch.setenv(converter.MODEL, "reader")
        made = opened(root)
        with pytest.raises(ValueError, match="refused the request: HTTP 404"):
            made._verdict(travel.plan("0"))


def test_no_server_is_asked_where_there_is_no_plan_nor_one_that_a_dataset_names(root, monkeypatch):
    with converting("{}") as (url, asked):
        assert opened(root, converter_url=url, converter=[url, None])._verdict(travel.plan("0")).correct
        monkeypatch.setenv(converter.URL, url)
        opened(root)._verdict("I cannot.")
    assert asked == []


def test_the_converter_is_named_by_environment_variables(monkeypatch):
    assert converter.named() is None
    monkeypatch.setenv(converter.URL, "http://localhost:8000/v1/")
    assert converter.named() == ("http://localhost:8000/v1", None)
    monkeypatch.setenv(converter.MODEL, "reader")
    assert converter.named() == ("http://localhost:8000/v1", "reader")
    monkeypatch.setenv(converter.URL, "http://me:secret@localhost")
    with pytest.raises(ValueError, match="DEEPPLANNING_CONVERTER_URL holds a user name or a password") as told:
        converter.named()
    assert "secret" not in str(told.value)
