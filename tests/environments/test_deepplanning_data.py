"""The user's files: where they are looked for, what of them is refused and how, and which ids are held out."""

import csv
import json
import shutil

import pytest
import travel

from tipdistill.environments.deepplanning.data import (
    TABLES,
    database_path,
    is_held_out,
    read_database,
    read_queries,
    read_split,
)

FILES = [file for file, _ in TABLES.values()]


@pytest.fixture
def root(tmp_path):
    return travel.write_benchmark(tmp_path / "DIR")


def of(root, name="", id="4", language="en"):
    return root / f"database/database_{language}/id_{id}" / name


def test_a_fifth_of_the_ids_is_held_out_the_same_ones_in_both_languages(root):
    held_out = [id for id in map(str, range(120)) if is_held_out(id)]
    assert len(held_out) == 24
    # twenty ids in a row have one length of trip: four of each are held out
    assert [sum(first <= int(id) < first + 20 for id in held_out) for first in range(0, 120, 20)] == [4] * 6
    for language in ("en", "zh"):
        assert [query.id for query in read_split(root, language, "train")] == ["0"]
        assert [query.id for query in read_split(root, language, "test")] == ["4"]


@pytest.mark.parametrize("base", ["", "travelplanning", "deepplanning/travelplanning"])
@pytest.mark.parametrize("databases", ["database/database_en", "database_en", "database/database_en/database_en"])
def test_the_folders_of_a_checkout(tmp_path, root, base, databases):
    place = tmp_path / "other" / base
    place.mkdir(parents=True)
    shutil.move(root / "data", place / "data")
    (place / databases).parent.mkdir(parents=True, exist_ok=True)
    shutil.move(root / "database/database_en", place / databases)
    assert [query.id for query in read_split(tmp_path / "other", "en", "test")] == ["4"]


def test_a_query_is_read_with_what_it_asks_for(root):
    query = read_queries(root, "en")["0"]
    assert (query.home, query.days, query.people, query.rooms, query.weekday) == ("Aville", 3, 3, 2, 3)
    assert query.constraints["budget_constraint"] == {"max_budget": 4300}
    assert read_queries(root, "zh")["0"].home == "甲市"


def test_values_are_texts_as_they_are_written_and_the_first_row_of_a_name_counts(root):
    path = of(root, "attractions/attractions.csv", "0")
    rows = list(csv.reader(path.open(encoding="utf-8-sig")))
    again = [*rows[1]]
    again[-1] = "999"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\r\n").writerows([*rows, again, []])
    mill = read_database(of(root, id="0")).attraction["Old Mill"]
    values = mill["ticket_price"], mill["latitude"], mill["description"]
    assert values == ("40.0", "30.11", "About Old Mill, in short.")


@pytest.mark.parametrize("file", ["trains/trains.csv", "flights/flights.csv"])
@pytest.mark.parametrize("content", [None, "", "heading"])
def test_one_of_trains_and_flights_may_be_absent_or_empty(root, file, content):
    path = of(root, file, "4" if file.startswith("trains") else "0")
    heading = travel.HEADINGS[file] + "\n"
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_text(heading if content == "heading" else "")
    kind = file.split("/")[0]
    assert not getattr(read_database(path.parents[1]), kind)
    with pytest.raises(ValueError, match=f"{path}.*unpack the databases' zip file again"):
        read_database(path.parents[1], frozenset([kind]))


@pytest.mark.parametrize("file", [file for file in FILES if file != "trains/trains.csv"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: None, "the file is missing"),
        (lambda text: "", "it is empty"),
        (lambda text: text.split("\n")[0] + "\n", "it has no row"),
        (lambda text: text.replace(text.split(",")[1], "x", 1), "it has no column"),
        (lambda text: text.rstrip("\n") + ",more\n", r"line \d+ has \d+ values for \d+ columns"),
        (lambda text: text.rstrip("\n") + '\n"open', r"line \d+: unexpected end of data"),
        (lambda text: text + "\n" + "x" * 200_000 + "\n", r"line \d+: field larger than field limit"),
    ],
    ids=["missing", "empty", "no row", "column", "long row", "quote", "huge"],
)
def test_a_damaged_table_is_named_with_the_remedy(root, file, damage, message):
    path = of(root, file)
    text = damage(path.read_text(encoding="utf-8-sig"))
    path.unlink()
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=rf"{path}: {message}.*; unpack the databases' zip file again\.$") as told:
        read_split(root, "en", "test")
    assert "\n" not in str(told.value)


def test_a_table_in_another_encoding_is_named(root):
    path = of(root, "hotels/hotels.csv", language="zh")
    path.write_bytes(path.read_text(encoding="utf-8-sig").encode("gb18030"))
    with pytest.raises(ValueError, match=rf"{path}: is not UTF-8 .*; unpack"):
        read_split(root, "zh", "test")


def test_a_database_without_trains_and_flights_is_refused(root):
    of(root, "trains/trains.csv", "0").unlink()
    with pytest.raises(ValueError, match=r"neither trains/trains\.csv nor flights/flights\.csv"):
        read_database(of(root, id="0"))


def test_a_missing_directory_file_or_database_is_named_with_the_remedy(root, tmp_path):
    with pytest.raises(ValueError, match=r"there is no directory .*nowhere: give the folder benchmark/deepplanning"):
        read_split(tmp_path / "nowhere", "en", "test")
    with pytest.raises(ValueError, match=r"holds no travelplanning_query_en\.json, .*: give the folder"):
        read_split(tmp_path, "en", "test")
    with pytest.raises(ValueError, match=r"the language must be one of en, zh, got 'zhh'.* Did you mean 'zh'"):
        read_split(root, "zhh", "test")
    shutil.rmtree(of(root))
    with pytest.raises(ValueError, match=r"query 4 \(en\) has no database: there is no .*id_4; unpack"):
        read_split(root, "en", "test")
    shutil.rmtree(root / "database/database_en")
    (root / "database/database_en.zip").touch()
    with pytest.raises(ValueError, match=r"database_en\.zip is not unpacked: unpack it there"):
        read_split(root, "en", "test")
    shutil.rmtree(root / "database")
    with pytest.raises(ValueError, match=r"holds no database_en/id_4: download .*database_en\.zip"):
        read_split(root, "en", "test")
    with pytest.raises(ValueError, match="has no query of the split 'test'"):
        read_split(travel.write_benchmark(tmp_path / "few", ["en"], queries=travel.QUERIES[:1]), "en", "test")


@pytest.mark.parametrize("id", ["../0", "", "x", "0" * 7, "٣"])
def test_an_id_is_no_path(root, id):
    with pytest.raises(ValueError, match="a DeepPlanning id is a number of at most six digits"):
        database_path(root, "en", id)


def changed(**changes):
    query = json.loads(json.dumps(travel.QUERIES[0]))
    for name, value in changes.items():
        place = query if name in ("id", "query", "meta_info") else query["meta_info"]
        place[name] = value
    return [query]


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        ({}, "it holds no list of queries"),
        ([], "it holds no list of queries"),
        (["x"], r"query 0 \(counting from 0\) is a str"),
        (changed(id=None), r"query 0 \(counting from 0\) has the id None"),
        (changed(id="../0"), r".* has the id .*, and no number"),
        (changed(query=" "), r"query 0 has no text"),
        (changed(meta_info=[]), "query 0 has no 'meta_info'"),
        (changed(org=3), r"query 0 has no city to start from"),
        (changed(days=0), "query 0: days is 0, and no count"),
        (changed(people_number="many"), "query 0: people_number is 'many', and no count"),
        (changed(room_number=1.5), "query 0: room_number is 1.5"),
        (changed(room_number=1e300), "query 0: room_number is 1e"),
        (changed(depart_weekday=8), "query 0: depart_weekday is 8"),
        (changed(hard_constraints=[]), "query 0 has no 'hard_constraints'"),
        (changed(hard_constraints={"budget_constraint": 3}), "query 0 has no 'hard_constraints'"),
        (changed() * 2, "the id '0' stands there twice"),
    ],
)
def test_a_damaged_query_is_named_with_the_remedy(tmp_path, queries, message):
    root = travel.write_benchmark(tmp_path, ["en"], queries=queries)
    with pytest.raises(ValueError, match=rf"{root}.*query_en\.json: {message}.*; take it from .* again\.$") as told:
        read_queries(root, "en")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("text", ["[{", "[" * 100_000, '[{"id": ' + "9" * 5000 + "}]", "\0"])
def test_a_query_file_that_is_no_json_is_named(tmp_path, text):
    (tmp_path / "travelplanning_query_en.json").write_text(text)
    with pytest.raises(ValueError, match=rf"{tmp_path}/travelplanning_query_en\.json: .*; take it from .* again\.$"):
        read_queries(tmp_path, "en")


def test_counts_may_be_written_as_texts_and_the_weekday_may_be_missing(tmp_path):
    queries = changed(people_number="4", days=2.0)
    del queries[0]["meta_info"]["depart_weekday"]
    query = read_queries(travel.write_benchmark(tmp_path, ["en"], queries=queries), "en")["0"]
    assert (query.people, query.days, query.weekday) == (4, 2, None)
