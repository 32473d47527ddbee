"""The environment: a query's database behind nine tools, and a verdict on the plan that ends the episode."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ...types import Verdict
from .converter import Converter, convert, named
from .data import Database, Query, Row, database_path, needed_tables, number, read_database, read_queries
from .plan import Plan, PlanError, parse_plan, plan_text
from .score import score, verdict

_NEEDED = ("directory", "language", "id")
# what a tool says where there is nothing to tell
_MISSES = {
    "en": {
        "trains": "There is no train from {0} to {1} on {2}{3}.",
        "flights": "There is no flight from {0} to {1} on {2}{3}.",
        "hotels": "There is no hotel in {0} with what was asked for: ask for other stars, another brand, or neither.",
        "attractions": "There is no attraction of the type {0!r}.",
        "attraction": "There is no attraction named {0!r}: take a name as another tool gave it.",
        "location": "The place {0!r} is not known: take a name as another tool gave it.",
        "coordinates": "The coordinates {0!r} are not known: take them as a tool gave them, 'latitude,longitude'.",
        "road": "The road from {0} to {1} is not known.",
        "restaurants": "No restaurant is known near {0},{1}: take an attraction's coordinates as a tool gave them.",
        "restaurant": "There is no restaurant named {0!r}: take a name as another tool gave it.",
        "class": " in the class {0!r}",
        "available": "available",
    },
    "zh": {
        "trains": "{2}没有从{0}到{1}的火车{3}。",
        "flights": "{2}没有从{0}到{1}的航班{3}。",
        "hotels": "{0}没有符合要求的酒店：请换一个星级或品牌，或者不限定。",
        "attractions": "没有“{0}”类型的景点。",
        "attraction": "没有名为“{0}”的景点：请使用其他工具返回的名称。",
        "location": "不知道地点“{0}”：请使用其他工具返回的名称。",
        "coordinates": "不知道坐标“{0}”：请使用其他工具返回的坐标，格式为“纬度,经度”。",
        "road": "不知道从{0}到{1}的道路。",
        "restaurants": "{0},{1}附近没有已知的餐厅：请使用其他工具返回的景点坐标。",
        "restaurant": "没有名为“{0}”的餐厅：请使用其他工具返回的名称。",
        "class": "（{0}）",
        "available": "充足",
    },
}


class DeepPlanning:
    """A travel problem of DeepPlanning, in the protocol of TRL's environments.

    A row of the dataset names the problem: `directory`, `language` and `id`. `python -m tipdistill.tasks deepplanning
    DIR` writes such rows. Which model reads the plans, if one does, environment variables say and no row: a dataset is
    data, and names no server that anything is sent to.
    """

    def __init__(self) -> None:
        self._query: Query | None = None
        self._database: Database | None = None
        self._language = "en"
        self._converter: Converter | None = None

    def reset(self, **row: Any) -> None:
        """Open the problem of a row; its prompt says everything already.

        Args:
            row: of the dataset.

        Raises:
            ValueError: it names no problem, or the problem's files are missing or damaged.
        """
        missing = [name for name in _NEEDED if not isinstance(row.get(name), str)]
        if missing:
            raise ValueError(
                f"the row has no text in {' and '.join(missing)}: write the prompts with "
                "`python -m tipdistill.tasks deepplanning DIR`."
            )
        directory, language, id = (row[name] for name in _NEEDED)
        queries = read_queries(directory, language)
        if id not in queries:
            raise ValueError(f"{directory} has no {language} query with the id {id!r:.40}.")
        self._query = queries[id]
        self._database = read_database(database_path(directory, language, id), needed_tables(self._query))
        self._language = language
        self._converter = named()

    def query_train_info(self, origin: str, destination: str, depDate: str, seatClassName: str = "") -> str:
        """Trains from one city to another on a day: times, stations, seats left and the price for one person.

        Args:
            origin: The city to start from.
            destination: The city to go to.
            depDate: The day, YYYY-MM-DD.
            seatClassName: Only this class, such as 'Second Class Seat' or '二等座'.
        """
        return self._journeys("trains", origin, destination, depDate, seatClassName)

    def query_flight_info(self, origin: str, destination: str, depDate: str, seatClassName: str = "") -> str:
        """Flights from one city to another on a day: times, airports, aircraft, seats left, the price for one person.

        Args:
            origin: The city to start from.
            destination: The city to go to.
            depDate: The day, YYYY-MM-DD.
            seatClassName: Only this class, such as 'Economy Class' or '经济舱'.
        """
        return self._journeys("flights", origin, destination, depDate, seatClassName)

    def query_hotel_info(
        self, destination: str, checkinDate: str, checkoutDate: str, hotelStar: str = "", hotelBrands: str = ""
    ) -> str:
        """Hotels of the place that the trip goes to: stars, services, score and the price of a room for a night.

        Args:
            destination: The city.
            checkinDate: The first night, YYYY-MM-DD.
            checkoutDate: The morning after the last night, YYYY-MM-DD.
            hotelStar: Only hotels of so many stars, '1' to '5'.
            hotelBrands: Only hotels of this brand.
        """
        rows = [
            row
            for row in self._tables.hotels
            if _asked(hotelStar) in ("", row["hotel_star"]) and _asked(hotelBrands) in ("", row["brand"])
        ]
        return _shown([_with_list(row, "services") for row in rows]) if rows else self._miss("hotels", destination)

    def query_attraction_details(self, attraction_name: str) -> str:
        """All that is known of an attraction: coordinates, hours, closed days, how long a visit takes, ticket price.

        Args:
            attraction_name: Its exact name.
        """
        row = self._tables.attraction.get(_asked(attraction_name))
        if row is None:
            return self._miss("attraction", attraction_name)
        return "\n".join(f"{column}: {value}" for column, value in row.items() if value)

    def recommend_attractions(self, city: str, attraction_type: str = "") -> str:
        """Attractions worth a visit, each with a description and its type.

        Args:
            city: The city.
            attraction_type: Only those of this type, such as 'Natural Scenery' or '自然风光'.
        """
        rows = [row for row in self._tables.attractions if _asked(attraction_type) in ("", row["attraction_type"])]
        lines = [f"{row['attraction_name']} ({row['attraction_type']}): {row['description']}" for row in rows]
        return "\n".join(lines) if rows else self._miss("attractions", attraction_type)

    def search_location(self, place_name: str) -> str:
        """The coordinates of a station, an airport, a hotel, an attraction or a restaurant.

        Args:
            place_name: Its exact name.
        """
        row = self._tables.location.get(_asked(place_name))
        return self._miss("location", place_name) if row is None else _shown(row)

    def query_road_route_info(self, origin: str, destination: str) -> str:
        """The way between two places in town: metres, minutes and what a car for up to four people costs; 0 is on foot.

        Args:
            origin: Coordinates to start from, 'latitude,longitude'.
            destination: Coordinates to go to, 'latitude,longitude'.
        """
        places = [_asked(place) for place in (origin, destination)]
        row = self._tables.roads.get((places[0], places[1]))
        if row is not None:
            return _shown(row)
        known = {place for road in self._tables.roads for place in road}
        unknown = [place for place in places if place not in known]
        return self._miss("coordinates", unknown[0]) if unknown else self._miss("road", *places)

    def recommend_restaurants(self, latitude: str, longitude: str) -> str:
        """Restaurants near an attraction: cuisine, hours, tags and the price for one person.

        Args:
            latitude: Of the attraction.
            longitude: Of the attraction.
        """
        near = _asked(latitude), _asked(longitude)
        rows = [row for row in self._tables.restaurants if (row["query_latitude"], row["query_longitude"]) == near]
        shown = [_with_list(_without_query(row), "tags") for row in rows]
        return _shown(shown) if rows else self._miss("restaurants", *near)

    def query_restaurant_details(self, restaurant_name: str) -> str:
        """All that is known of a restaurant: coordinates, cuisine, hours, tags and the price for one person.

        Args:
            restaurant_name: Its exact name.
        """
        row = self._tables.restaurant.get(_asked(restaurant_name))
        if row is None:
            return self._miss("restaurant", restaurant_name)
        return _shown(_with_list(_without_query(row), "tags"))

    def _verdict(self, response: str) -> Verdict:
        """What the plan in the student's last message is worth."""
        assert self._query is not None
        try:
            plan: Plan | None = (
                convert(plan_text(response), self._converter) if self._converter else parse_plan(response)
            )
        except PlanError:
            plan = None
        return verdict(score(plan, self._query, self._tables), own_parser=self._converter is None)

    @property
    def _tables(self) -> Database:
        assert self._database is not None, "reset comes first"
        return self._database

    def _miss(self, what: str, *values: str) -> str:
        return _MISSES[self._language][what].format(*values)

    def _journeys(self, kind: str, origin: str, destination: str, day: str, seats: str) -> str:
        asked = {"origin_city": origin, "destination_city": destination, "dep_date": day}
        asked |= {"seat_class": seats} if _asked(seats) else {}
        routes: dict[str, list[Row]] = {}
        for row in getattr(self._tables, kind):
            if all(row[column] == _asked(value) for column, value in asked.items()):
                routes.setdefault(row["route_index"], []).append(row)
        if not routes:
            return self._miss(kind, origin, destination, day, self._miss("class", seats) if _asked(seats) else "")
        shown = []
        for _, rows in sorted(routes.items(), key=lambda route: _in_order(route[0])):
            legs = sorted(rows, key=lambda row: _in_order(row["segment_index"]))
            # of a journey with changes the price is that of all legs together
            shown.append({"price": legs[0]["price"], "legs": [self._leg(row) for row in legs]})
        return _shown(shown)

    def _leg(self, row: Row) -> dict[str, str]:
        left_out = ("route_index", "segment_index", "origin_city", "destination_city", "dep_date", "price")
        leg = {column: value for column, value in row.items() if column not in left_out}
        return {**leg, "seat_status": leg["seat_status"] or self._miss("available")}


def _asked(value: Any) -> str:
    """An argument as it is compared: a model may write a number for a text."""
    return "" if value is None else str(value).strip()


def _shown(value: Mapping[str, Any] | Sequence[Any]) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2)


def _with_list(row: Row, column: str) -> dict[str, Any]:
    return {**row, column: [part for part in row[column].split(";") if part]}


def _without_query(row: Row) -> dict[str, str]:
    return {column: value for column, value in row.items() if not column.startswith("query_")}


def _in_order(index: str) -> tuple[float, str]:
    return number(index) or 0.0, index
