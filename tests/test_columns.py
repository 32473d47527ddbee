"""Episodes in token records: a row for each token that the student wrote, and what its tools answered."""

import contextlib
import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from episodes import HOSTILE, SCRIPTS, acting_tokenizer, drawn, played

from tipdistill.columns import ROLLOUT_COLUMNS, TOKEN_COLUMNS, read_verdict
from tipdistill.environments import Limits
from tipdistill.records import ROLLOUTS_SCHEMA, About, DamagedRecordsError, RecordsWriter, open_records, tokens_schema
from tipdistill.types import Rollout, Scored, TokenScores, ToolResult, TopTokens, Turn, Verdict
from tipdistill.vocabulary import token_bytes

TOKENIZER = acting_tokenizer()
ABOUT = About("student", "teacher", len(TOKENIZER), rules=("soft_or", "q3"), retention=0.3)


@pytest.fixture(scope="module")
def rollouts():
    return played(TOKENIZER, SCRIPTS.values())


def plain(number=0, length=5):
    return Rollout(number, "p", (1,), tuple(range(length)), True)


def record(directory, rollouts, **options):
    with RecordsWriter(directory, TOKENIZER, ABOUT, **options) as writer:
        writer.write(rollouts, drawn(rollouts, ABOUT, len(TOKENIZER)))
    return open_records(directory)


def test_a_row_is_a_token_that_the_student_wrote(tmp_path, rollouts):
    records = record(tmp_path, rollouts)
    assert records.tokens.schema_arrow.equals(tokens_schema(ABOUT.rules, turns=True))
    assert records.rollouts.schema.equals(pa.schema([*ROLLOUTS_SCHEMA, *ROLLOUT_COLUMNS]))
    table = records.read().to_pydict()
    written = [
        (number, position, index)
        for number, rollout in enumerate(rollouts)
        for position, (index, own) in enumerate(zip(rollout.completion_ids, rollout.written, strict=True))
        if own
    ]
    assert list(zip(table["rollout"], table["position"], table["token_id"], strict=True)) == written
    scores = drawn(rollouts, ABOUT, len(TOKENIZER)).scores
    assert table["reverse_kl"] == scores.require("reverse_kl").tolist()
    pieces = token_bytes(TOKENIZER)
    for number, rollout in enumerate(rollouts):
        turns = [turn for turn in rollout.turns if turn.role == "student"]
        for place, turn in enumerate(turns):
            rows = [
                row
                for row in range(len(table["turn"]))
                if table["rollout"][row] == number and table["turn"][row] == place
            ]
            assert [table["position"][row] for row in rows] == list(range(turn.first, turn.first + turn.tokens))
            assert b"".join(pieces[table["token_id"][row]] for row in rows).decode() == turn.text
    assert set(table["kind"]) == {"thought", "call", "argument", "answer", "text"}


def test_turns_results_and_verdicts_are_as_they_were(tmp_path, rollouts):
    rows = record(tmp_path, rollouts).rollouts.to_pylist()
    for row, rollout in zip(rows, rollouts, strict=True):
        assert row["tokens"] == len(rollout.student_ids)
        assert row["completion"] == TOKENIZER.decode(rollout.completion_ids, clean_up_tokenization_spaces=False)
        turns = [
            Turn(**{**turn, "results": tuple(ToolResult(**result) for result in turn["results"])})
            for turn in row["turns"]
        ]
        assert tuple(turns) == rollout.turns
        assert (row["ending"], row["correct"]) == (rollout.ending, rollout.verdict.correct)
        said = read_verdict(row["verdict"])
        assert (said.parts, said.figures) == (rollout.verdict.parts, rollout.verdict.figures)
    assert [row["ending"] for row in rows] == ["answered", "answered", "answered", "cut"]
    assert HOSTILE in rows[0]["verdict"] or json.loads(rows[0]["verdict"])["parts"][HOSTILE] is False


def test_records_without_episodes_have_no_columns_of_theirs(tmp_path):
    records = record(tmp_path, [plain(), plain(1, 3)])
    assert records.tokens.schema_arrow.equals(tokens_schema(ABOUT.rules))
    assert records.rollouts.schema.equals(ROLLOUTS_SCHEMA)


@pytest.mark.parametrize("first", ["plain", "episode"])
def test_parts_with_and_without_episodes_make_one_whole(tmp_path, rollouts, first):
    mixed = [plain(), rollouts[0]] if first == "plain" else [rollouts[0], plain()]
    whole = record(tmp_path / "whole", mixed)
    scored = drawn(mixed, ABOUT, len(TOKENIZER))
    border = len(mixed[0].student_ids)
    with contextlib.suppress(KeyboardInterrupt), RecordsWriter(tmp_path / "cut", TOKENIZER, ABOUT) as writer:
        writer.write(mixed[:1], scored.map(lambda values: values[:border]))
        raise KeyboardInterrupt
    with RecordsWriter(tmp_path / "cut", TOKENIZER, ABOUT) as writer:  # goes on
        assert writer.rollouts == 1
        writer.write(mixed[1:], scored.map(lambda values: values[border:]))
    parts = open_records(tmp_path / "cut")
    assert parts.read().equals(whole.read())
    assert parts.rollouts.equals(whole.rollouts)
    place = mixed.index(plain())
    row = parts.rollouts.to_pylist()[place]
    assert [row[name] for name in ROLLOUT_COLUMNS.names] == [None] * 4
    table = parts.read(["rollout", *TOKEN_COLUMNS.names]).to_pylist()
    assert {row["turn"] is None for row in table if row["rollout"] == place} == {True}
    assert {row["kind"] is None for row in table if row["rollout"] != place} == {False}


def empty(completion=(3, 4)):
    turns = (
        Turn("student", 0, 0, ""),
        Turn("tool", 0, len(completion), "cd", (ToolResult("f", "{}", "ok", "cd"),)),
    )
    return Rollout(0, "p", (1,), completion, False, turns, "no room")


def nothing():
    return Scored(
        TokenScores(**dict.fromkeys(ABOUT.fields(), torch.zeros(0))),
        *(TopTokens(torch.zeros(0, 5, dtype=torch.int64), torch.zeros(0, 5)) for _ in range(2)),
    )


def test_an_episode_of_which_the_student_wrote_nothing_is_a_rollout_without_rows(tmp_path):
    with RecordsWriter(tmp_path, TOKENIZER, ABOUT, part_tokens=1) as writer:
        writer.write([empty()], nothing())
        writer.write([empty(), plain()], drawn([plain()], ABOUT, len(TOKENIZER)))
        writer.write([empty()], nothing())
    records = open_records(tmp_path)
    assert records.rollouts["tokens"].to_pylist() == [0, 0, 5, 0]
    assert records.read(["rollout"])["rollout"].to_pylist() == [2] * 5
    with (
        pytest.raises(ValueError, match="nothing was scored"),
        RecordsWriter(tmp_path / "n", TOKENIZER, ABOUT) as writer,
    ):
        writer.write([empty()], nothing())


def test_what_is_no_text_or_no_number_is_recorded_all_the_same(tmp_path):
    turns = (
        Turn("student", 0, 2, "a\ud800"),
        Turn("tool", 2, 1, "\x00", (ToolResult("\udfff", "\ud800", "raised", "x" * 10**7),)),
        Turn("student", 3, 1, "b"),
    )
    verdict = Verdict(1, {"\ud800": 1}, {"share": math.nan, "cost": 3})
    rollout = Rollout(0, "p", (1,), (3, 4, 5, 6), True, turns, "answered", verdict)
    row = record(tmp_path, [rollout]).rollouts.to_pylist()[0]
    assert [turn["text"] for turn in row["turns"]] == ["a?", "\x00", "b"]
    assert row["turns"][1]["results"] == [
        {"name": "?", "arguments": "?", "outcome": "raised", "text": "x" * 10**7},
    ]
    assert json.loads(row["verdict"]) == {"parts": {"\ud800": True}, "figures": {"share": None, "cost": 3.0}}
    assert row["correct"] is True


def test_an_episode_that_nobody_judged_has_no_verdict(tmp_path):
    class Silent:
        def reset(self, **row):
            pass

        def find_train(self, origin: str):
            """Find a train.

            Args:
                origin: where from.
            """
            return "none"

    (rollout,) = played(TOKENIZER, [SCRIPTS["cut"]], Silent, Limits(tokens=200))
    row = record(tmp_path, [rollout]).rollouts.to_pylist()[0]
    assert (row["correct"], row["verdict"], row["ending"]) == (None, None, "cut")


def test_a_turn_is_read_with_what_stands_before_it_and_whether_it_was_answered(tmp_path):
    # a chat template that begins a thought in each turn, after the prompt and after a result
    before = "<|im_start|>assistant\n<think>\n"
    texts = ["a</think>b", before, "c</think>d"]
    ids = [TOKENIZER(text)["input_ids"] for text in texts]
    turns, place = [], 0
    for role, text, own in zip(("student", "tool", "student"), texts, ids, strict=True):
        turns.append(Turn(role, place, len(own), text, (ToolResult("f", "", "ok", ""),) if role == "tool" else ()))
        place += len(own)
    rollout = Rollout(0, before, (1,), tuple(index for own in ids for index in own), True, tuple(turns), "answered")
    kinds = record(tmp_path, [rollout]).read(["kind"])["kind"].to_pylist()
    assert kinds == ["thought", "thought", "text", "thought", "thought", "answer"]


# What others wrote.


def changed(name, change):
    def spoil(folder):
        table = pq.read_table(folder / name)
        pq.write_table(change(table), folder / name)

    return spoil


def turns_with(**values):
    """The first turn of the first rollout with other values."""

    def change(table):
        rows = table["turns"].to_pylist()
        rows[0][0] |= values
        return table.set_column(table.column_names.index("turns"), "turns", pa.array(rows, table["turns"].type))

    return changed("rollouts.parquet", change)


def with_column(file, name, values):
    def change(table):
        return table.set_column(table.column_names.index(name), name, pa.array(values(table)))

    return changed(file, change)


SPOILED = {
    "no turn": (changed("tokens.parquet", lambda table: table.drop_columns(["turn"])), "but no turn: it is not whole"),
    "no verdict": (changed("rollouts.parquet", lambda table: table.drop_columns(["verdict"])), "but no verdict"),
    "no columns of tokens": (
        changed("tokens.parquet", lambda table: table.drop_columns(TOKEN_COLUMNS.names)),
        "one is of episodes, and the other is not",
    ),
    "no columns of rollouts": (
        changed("rollouts.parquet", lambda table: table.drop_columns(ROLLOUT_COLUMNS.names)),
        "one is of episodes, and the other is not",
    ),
    "kind of a turn": (with_column("tokens.parquet", "turn", lambda table: ["0"] * len(table)), "turn of string"),
    "kind of a kind": (with_column("tokens.parquet", "kind", lambda table: [1] * len(table)), "kind of int64"),
    "kind of turns": (with_column("rollouts.parquet", "turns", lambda table: [[1]] * len(table)), "turns of list"),
    "kind of a result": (
        with_column(
            "rollouts.parquet",
            "turns",
            lambda table: [
                [{"role": "student", "first": 0, "tokens": 1, "text": "", "results": [{"name": 1}]}] for _ in range(4)
            ],
        ),
        "turns of list",
    ),
    "kind of correct": (with_column("rollouts.parquet", "correct", lambda table: ["yes"] * len(table)), "correct of"),
    "another role": (turns_with(role="world"), "rollout 0: a turn of 'world' at 0"),
    "no role": (turns_with(role=None), "lacks a value"),
    "no text": (turns_with(text=None), "lacks a value"),
    "another place": (turns_with(first=1), "rollout 0: a turn of 'student' at 1"),
    "another length": (turns_with(tokens=3), "a turn of 'tool' at 108"),
    "negative length": (turns_with(tokens=-1), "of -1 tokens"),
    "result without a text": (
        turns_with(results=[{"name": "f", "arguments": "", "outcome": "ok", "text": None}]),
        "lacks a value",
    ),
    "tokens of another": (
        with_column(
            "rollouts.parquet",
            "tokens",
            lambda table: [table["tokens"][1].as_py(), table["tokens"][0].as_py(), *table["tokens"].to_pylist()[2:]],
        ),
        "rollout 0 has 197 tokens, but 244 tokens in the student's turns",
    ),
    "no ending": (with_column("rollouts.parquet", "ending", lambda table: [None, *"abc"]), "and the ending None"),
    "no JSON": (with_column("rollouts.parquet", "verdict", lambda table: ["{"] * 4), "is damaged"),
    "deep JSON": (with_column("rollouts.parquet", "verdict", lambda table: ["[" * 10**5] * 4), "is damaged"),
    "another verdict": (
        with_column("rollouts.parquet", "verdict", lambda table: ['{"parts": {"a": 1}}'] * 4),
        "has no parts that hold or do not",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), SPOILED.values(), ids=SPOILED)
def test_damaged_and_foreign_columns_are_one_clear_line(tmp_path, rollouts, spoil, message):
    record(tmp_path / "r", rollouts)
    spoil(tmp_path / "r")
    with pytest.raises(DamagedRecordsError, match=message) as raised:
        open_records(tmp_path / "r")
    assert "\n" not in str(raised.value)
    assert str(tmp_path / "r") in str(raised.value)


def test_wider_types_of_another_tool_are_read(tmp_path, rollouts):
    record(tmp_path, rollouts)
    wide = changed(
        "tokens.parquet",
        lambda table: table.set_column(table.column_names.index("turn"), "turn", table["turn"].cast(pa.int64())),
    )
    wide(tmp_path)
    assert open_records(tmp_path).read(["turn"])["turn"].to_pylist()[-1] == 1
