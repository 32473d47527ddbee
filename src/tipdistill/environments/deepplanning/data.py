"""The user's copy of DeepPlanning, checked: its travel queries, and the database that each of them comes with.

The queries are in the benchmark's repository, the databases on the hub; both are looked for in one directory and in the
folders that a checkout has. What is missing or damaged is named before anything runs.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from ...documents import read_json, read_text
from ...text import check_known, nearest

LANGUAGES = ("en", "zh")
SPLITS = ("train", "test")
Row = Mapping[str, str]

_SOURCE = "the folder benchmark/deepplanning of a checkout of QwenLM/Qwen-Agent"
_BASES = ("", "travelplanning", "deepplanning/travelplanning", "benchmark/deepplanning/travelplanning")
_EVERY = 5  # ids that leave 4 when divided by 5 are held out
_ID = re.compile(r"[0-9]{1,6}")
_LEGS = (
    *("route_index", "segment_index", "origin_city", "destination_city", "dep_date"),
    *("dep_station_code", "dep_station_name", "arr_station_code", "arr_station_name", "dep_datetime", "arr_datetime"),
    *("duration", "seat_class", "seat_status", "price"),
)
# table → its file and the columns that are read; a database may lack the trains or the flights, see `read_database`
TABLES: dict[str, tuple[str, tuple[str, ...]]] = {
    "trains": ("trains/trains.csv", (*_LEGS, "train_type", "train_no")),
    "flights": (
        "flights/flights.csv",
        (*_LEGS, "airline", "flight_no", "equip_size", "equip_type", "manufacturer"),
    ),
    "hotels": (
        "hotels/hotels.csv",
        (
            *("name", "address", "latitude", "longitude", "decoration_time", "hotel_star", "price", "score", "brand"),
            "services",
        ),
    ),
    "attractions": (
        "attractions/attractions.csv",
        (
            *("attraction_id", "attraction_name", "attraction_type", "city", "address", "latitude", "longitude"),
            *("description", "rating", "opening_time", "closing_time", "closing_dates"),
            *("min_visit_hours", "max_visit_hours", "ticket_price"),
        ),
    ),
    "restaurants": (
        "restaurants/restaurants.csv",
        (
            *("restaurant_id", "restaurant_name", "latitude", "longitude", "query_latitude", "query_longitude"),
            *("price_per_person", "cuisine", "opening_time", "closing_time", "nearby_attraction_name", "rating"),
            "tags",
        ),
    ),
    "locations": ("locations/locations_coords.csv", ("poi_name", "latitude", "longitude", "poi_type")),
    "roads": (
        "transportation/distance_matrix.csv",
        ("origin", "destination", "distance_meters", "duration_minutes", "cost"),
    ),
}


@dataclass(frozen=True)
class Query:
    """What a user asks for.

    Attributes:
        id: digits; the same trip has the same id in both languages.
        text: the user's words.
        home: city that the trip starts from and ends at.
        days: that it takes.
        people, rooms: how many.
        weekday: of the first day, 1 (Monday) to 7; None: not given.
        constraints: name of a hard constraint → what has to be in the plan.
    """

    id: str
    text: str
    home: str
    days: int
    people: int
    rooms: int
    weekday: int | None
    constraints: Mapping[str, Mapping[str, Any]]


class Database:
    """The tables of one query, and what is looked up in them by name.

    Args:
        tables: name → rows, for all of `TABLES`.
    """

    def __init__(self, tables: Mapping[str, Sequence[Row]]) -> None:
        self.trains, self.flights = tables["trains"], tables["flights"]
        self.hotels, self.attractions = tables["hotels"], tables["attractions"]
        self.restaurants, self.locations = tables["restaurants"], tables["locations"]
        self.roads = {(row["origin"], row["destination"]): row for row in reversed(tables["roads"])}

    @cached_property
    def hotel(self) -> dict[str, Row]:
        """Name → row, the first of each name."""
        return _first(self.hotels, "name")

    @cached_property
    def attraction(self) -> dict[str, Row]:
        """Name → row."""
        return _first(self.attractions, "attraction_name")

    @cached_property
    def restaurant(self) -> dict[str, Row]:
        """Name → row."""
        return _first(self.restaurants, "restaurant_name")

    @cached_property
    def location(self) -> dict[str, Row]:
        """Name of a place → row with its coordinates."""
        return _first(self.locations, "poi_name")

    @cached_property
    def legs(self) -> dict[str, list[Row]]:
        """Number of a train or a flight → its rows."""
        numbered: dict[str, list[Row]] = {}
        for rows, column in ((self.flights, "flight_no"), (self.trains, "train_no")):
            for row in rows:
                numbered.setdefault(row[column], []).append(row)
        return numbered

    @cached_property
    def cities(self) -> dict[str, set[str]]:
        """Station or airport → the cities that it serves."""
        served: dict[str, set[str]] = {}
        for row in (*self.trains, *self.flights):
            served.setdefault(row["dep_station_name"], set()).add(plain_city(row["origin_city"]))
            served.setdefault(row["arr_station_name"], set()).add(plain_city(row["destination_city"]))
        return served

    def minutes(self, origin: str, destination: str) -> float | None:
        """How long the road between two places is, in minutes; None where it is not known."""
        if origin not in self.location or destination not in self.location:
            return None
        ends = [f"{row['latitude']},{row['longitude']}" for row in (self.location[origin], self.location[destination])]
        road = self.roads.get((ends[0], ends[1]))
        return None if road is None else number(road["duration_minutes"])


def number(value: Any) -> float | None:
    """A number that a table or a server gave, if it is one that a price or a duration may be.

    Example:
        >>> number("441.0"), number("free"), number("nan"), number("1e300"), number(True)
        (441.0, None, None, None, None)
    """
    if isinstance(value, bool):
        return None
    try:
        read = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return read if abs(read) < 1e12 else None


def plain_city(name: str) -> str:
    """A city without what stands in brackets behind it.

    Example:
        >>> plain_city("Suzhou (Jiangsu)")
        'Suzhou'
    """
    return re.sub(r"[（(][^（()）]*[)）]", "", name).strip()


def is_held_out(id: str) -> bool:
    """Whether a trip is kept for measuring: every fifth, whatever the language, so that the trip lengths stay even.

    Example:
        >>> [id for id in map(str, range(12)) if is_held_out(id)]
        ['4', '9']
    """
    return int(id) % _EVERY == _EVERY - 1


def read_split(directory: str | Path, language: str, split: str) -> list[Query]:
    """The queries of a split, each with its database, which has been read once to see that it is whole.

    Args:
        directory: that holds the benchmark, see `read_queries`.
        language: "en" or "zh".
        split: "train", four ids of five, or "test", the fifth.

    Raises:
        ValueError: an unknown language or split, or anything that is missing or damaged, with what to do.
    """
    check_known("the split", split, SPLITS)
    queries = [
        query for query in read_queries(directory, language).values() if is_held_out(query.id) == (split == "test")
    ]
    if not queries:
        raise ValueError(
            f"{queries_path(directory, language)} has no query of the split {split!r} (held out are the ids that leave "
            f"{_EVERY - 1} when divided by {_EVERY}): give the whole file."
        )
    for query in queries:
        read_database.__wrapped__(database_path(directory, language, query.id), needed_tables(query))
    return queries


def queries_path(directory: str | Path, language: str) -> Path:
    """Where a directory holds the queries of a language.

    Raises:
        ValueError: no such directory, or none of its folders has the file.
    """
    check_known("the language", language, LANGUAGES)
    root = _root(directory)
    name = f"travelplanning_query_{language}.json"
    for base in _BASES:
        for folder in (root / base, root / base / "data"):
            if (folder / name).is_file():
                return folder / name
    raise ValueError(
        f"{root} holds no {name}, neither itself nor in data/, travelplanning/data/ and the like: give {_SOURCE}."
    )


@lru_cache(maxsize=8)
def read_queries(directory: str | Path, language: str) -> dict[str, Query]:
    """All queries of a language, by id.

    Args:
        directory: a checkout of the benchmark, or a folder of it; a folder with the file itself will do.
        language: "en" or "zh".

    Raises:
        ValueError: there is no such file, or it is damaged; with the query's id, and what to do.
    """
    path = queries_path(directory, language)
    try:
        rows = read_json(path)
    except ValueError as error:
        raise _Damaged(path, _without(path, error)) from None
    if not isinstance(rows, list) or not rows:
        raise _Damaged(path, "it holds no list of queries")
    queries: dict[str, Query] = {}
    for place, row in enumerate(rows):
        query = _query(row, place, path)
        if query.id in queries:
            raise _Damaged(path, f"the id {query.id!r} stands there twice")
        queries[query.id] = query
    return queries


def database_path(directory: str | Path, language: str, id: str) -> Path:
    """Where a directory holds the database of a query.

    Raises:
        ValueError: it holds no databases of this language, or not this one.
    """
    check_known("the language", language, LANGUAGES)
    if not _ID.fullmatch(str(id)):
        raise ValueError(f"a DeepPlanning id is a number of at most six digits, got {id!r:.40}.")
    root = _root(directory)
    name = f"database_{language}"
    places = [root / base / inner / name for base in _BASES for inner in ("", "database")]
    for place in (place / inner for place in places for inner in (name, "")):
        if (place / f"id_{id}").is_dir():
            return place / f"id_{id}"
        if any(place.glob("id_*")):
            raise ValueError(
                f"query {id} ({language}) has no database: there is no {place / f'id_{id}'}; unpack {name}.zip again."
            )
    for packed in (place.with_suffix(".zip") for place in places):
        if packed.is_file():
            raise ValueError(f"{packed} is not unpacked: unpack it there, so that {packed.with_suffix('')} is there.")
    raise ValueError(
        f"{root} holds no {name}/id_{id}: download travelplanning/database/{name}.zip of the dataset Qwen/DeepPlanning "
        f"from the hub, and unpack it into {root / 'database'}."
    )


def needed_tables(query: Query) -> frozenset[str]:
    """Which of trains and flights a query's constraints name."""
    kinds = {"train_": "trains", "flight_": "flights"}
    return frozenset(table for kind, table in kinds.items() if any(name.startswith(kind) for name in query.constraints))


@lru_cache(maxsize=16)
def read_database(folder: Path, needed: frozenset[str] = frozenset()) -> Database:
    """The tables of a query.

    Of trains and flights a database may have one, or none of a kind that can be had: the file may be absent or empty.

    Args:
        folder: of the query.
        needed: tables among these two that have to be there.

    Raises:
        ValueError: a file is missing, empty or damaged, or lacks a column; with what to do.
    """
    tables: dict[str, Sequence[Row]] = {}
    for name, (file, columns) in TABLES.items():
        optional = name in ("trains", "flights") and name not in needed
        path = folder / file
        if optional and (not path.is_file() or not path.stat().st_size):
            tables[name] = ()
            continue
        tables[name] = read_table(path, columns)
        if not tables[name] and not optional:
            raise _Damaged(path, "it has no row")
    if not tables["trains"] and not tables["flights"]:
        raise _Damaged(folder, "it has neither trains/trains.csv nor flights/flights.csv with a row")
    return Database(tables)


def read_table(path: Path, columns: Sequence[str]) -> list[Row]:
    """The rows of a CSV file, all values texts without blanks around them.

    Args:
        path: the file.
        columns: that it must have.

    Raises:
        ValueError: it is missing or damaged, with the line.
    """
    try:
        text = read_text(path)
    except FileNotFoundError:
        raise _Damaged(path, "the file is missing") from None
    except ValueError as error:
        raise _Damaged(path, _without(path, error)) from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[Row] = []
    try:
        heading = [name.strip() for name in next(reader, [])]
        if not heading:
            raise _Damaged(path, "it is empty")
        for column in columns:
            if column not in heading:
                raise _Damaged(path, f"it has no column {column!r}{nearest(column, heading)}")
        for cells in reader:
            if len(cells) != len(heading) and cells:
                raise _Damaged(path, f"line {reader.line_num} has {len(cells)} values for {len(heading)} columns")
            if cells:
                rows.append({name: cell.strip() for name, cell in zip(heading, cells, strict=True)})
    except csv.Error as error:
        raise _Damaged(path, f"line {reader.line_num}: {error}") from None
    return rows


class _Damaged(ValueError):
    """A file of the benchmark that cannot be used."""

    def __init__(self, path: Path, reason: str) -> None:
        again = f"take it from {_SOURCE} again" if path.suffix == ".json" else "unpack the databases' zip file again"
        super().__init__(f"{path}: {reason.rstrip('.')}; {again}.")


def _without(path: Path, error: ValueError) -> str:
    return str(error).removeprefix(str(path)).lstrip(":, ")


def _root(directory: str | Path) -> Path:
    root = Path(directory).expanduser()
    if not root.is_dir():
        raise ValueError(
            f"there is no directory {root}: give {_SOURCE}, with the databases of Qwen/DeepPlanning in it."
        )
    return root


def _query(row: Any, place: int, path: Path) -> Query:
    if not isinstance(row, Mapping):
        raise _Damaged(path, f"query {place} (counting from 0) is a {type(row).__name__}, and no object")
    id = str(row.get("id"))
    if not _ID.fullmatch(id):
        raise _Damaged(path, f"query {place} (counting from 0) has the id {row.get('id')!r:.40}, and no number")
    meta, text = row.get("meta_info"), row.get("query")
    if not isinstance(text, str) or not text.strip():
        raise _Damaged(path, f"query {id} has no text ('query')")
    if not isinstance(meta, Mapping):
        raise _Damaged(path, f"query {id} has no 'meta_info'")
    home, constraints, weekday = meta.get("org"), meta.get("hard_constraints"), meta.get("depart_weekday")
    if not isinstance(home, str) or not plain_city(home):
        raise _Damaged(path, f"query {id} has no city to start from ('org')")
    if not isinstance(constraints, Mapping) or not all(isinstance(value, Mapping) for value in constraints.values()):
        raise _Damaged(path, f"query {id} has no 'hard_constraints', an object of objects")
    counts = {}
    for name in ("days", "people_number", "room_number", *(["depart_weekday"] if weekday is not None else [])):
        value = number(meta.get(name))
        if value is None or value != int(value) or not 1 <= value <= (7 if name == "depart_weekday" else 1000):
            raise _Damaged(path, f"query {id}: {name} is {meta.get(name)!r:.40}, and no count")
        counts[name] = int(value)
    return Query(
        id,
        text,
        plain_city(home),
        counts["days"],
        counts["people_number"],
        counts["room_number"],
        counts.get("depart_weekday"),
        constraints,
    )


def _first(rows: Sequence[Row], column: str) -> dict[str, Row]:
    return {row[column]: row for row in reversed(rows) if row[column]}
