"""Episodes in the page's data: counted over all tokens, cut where they are long, and never read across a turn."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from episodes import HOSTILE, SCRIPTS, acting_tokenizer, drawn, played

from tipdistill.kinds import KINDS
from tipdistill.records import About, RecordsWriter, open_records
from tipdistill.report.dataset import load_dataset
from tipdistill.report.episodes import (
    LONGEST_ARGUMENTS,
    LONGEST_NAME,
    LONGEST_RESULT,
    MOST_PARTS,
    MOST_TURNS,
    SHORTEST_RESULT,
)
from tipdistill.report.pack import Pack
from tipdistill.report.page import write_report
from tipdistill.report.payload import dataset_payload
from tipdistill.types import Rollout, ToolResult, Turn, Verdict

TOKENIZER = acting_tokenizer()
ABOUT = About("student", "teacher", len(TOKENIZER), rules=("soft_or",), retention=0.2)


def record(directory, rollouts, change=lambda scored: None):
    with RecordsWriter(directory, TOKENIZER, ABOUT) as writer:
        scored = drawn(rollouts, ABOUT, len(TOKENIZER))
        change(scored)
        writer.write(rollouts, scored)
    return open_records(directory)


def payload_of(records, max_tokens=10**6):
    dataset, pack = load_dataset(records), Pack()
    return dataset, dataset_payload(dataset, pack, max_tokens, 0), pack


def episode(turns, number=0, ending="answered", verdict=None):
    """Of (text of the student's, results) pairs; texts are one token a character."""
    made, place = [], 0
    for text, results in turns:
        made.append(Turn("student", place, len(text), text))
        place += len(text)
        if results is not None:
            made.append(Turn("tool", place, 2, "{}", tuple(results)))
            place += 2
    ids = TOKENIZER("".join(turn.text for turn in made))["input_ids"]
    assert len(ids) == place
    return Rollout(number, "p", (1,), tuple(ids), ending == "answered", tuple(made), ending, verdict)


@pytest.fixture(scope="module")
def played_records(tmp_path_factory):
    rollouts = played(TOKENIZER, SCRIPTS.values())
    return record(tmp_path_factory.mktemp("records"), [*rollouts, Rollout(9, "p", (1,), tuple(range(30)), True)])


def test_groups_are_counted_over_all_tokens_whatever_is_in_view(played_records, unpack):
    dataset, payload, pack = payload_of(played_records, max_tokens=40)
    played = payload["episodes"]
    table = played_records.read(["turn", "kind"]).to_pandas()
    table["quadrant"], table["mass"] = dataset.quadrant.numpy(), dataset.scores.reverse_kl.numpy()
    groups = {kind: table[table.kind == kind] for kind in KINDS}
    groups |= {f"turn {number}": table[table.turn == number] for number in range(5)}
    rows = [*played["kinds"], *played["by_turn"]]
    assert [row["name"] for row in rows] == list(groups)
    for row, group in zip(rows, groups.values(), strict=True):
        assert row["tokens"] == len(group)
        assert row["quadrants"] == [int((group.quadrant == number).sum()) for number in (1, 2, 3, 4)]
        assert row["mass"] == pytest.approx(group.mass.sum(), rel=1e-5)
        for rule, kept in zip(dataset.rules, row["kept"], strict=True):
            for retention, number in zip(dataset.retentions, kept, strict=True):
                mask = dataset.selection(rule.name, retention).mask.numpy()
                assert number == mask[group.index].sum()
    assert (played["count"], played["judged"], played["correct"]) == (4, 4, 2)
    assert (played["turns"], played["calls"]) == (12, 9)
    assert sorted(name for name, _ in played["failures"]) == ["bad arguments", "malformed", "raised", "unknown tool"]
    assert played["endings"] == [["answered", 3], ["cut", 1]]
    assert unpack(pack, payload["view"]["turn"]).max() <= 5


def test_the_view_holds_turns_results_and_verdicts(played_records, unpack):
    _, payload, pack = payload_of(played_records)
    view = payload["view"]
    table = played_records.read(["turn", "kind"]).to_pydict()
    turns, kinds = unpack(pack, view["turn"]).tolist(), unpack(pack, view["kind"]).tolist()
    assert [turn - 1 if turn else None for turn in turns] == table["turn"]
    assert [KINDS[kind - 1] if kind else None for kind in kinds] == table["kind"]
    assert view["rollouts"][4]["episode"] is None
    first = view["rollouts"][0]["episode"]
    assert [turn if isinstance(turn, int) else len(turn) for turn in first["turns"]] == [108, 1, 122, 2, 14]
    assert first["parts"] == [["train", True], ["budget", True], [HOSTILE, False]]
    assert first["correct"] is True


def test_records_without_episodes_have_none(tmp_path, records_writer):
    records_writer(tmp_path, [["a", "b"], ["c"]])
    _, payload, _ = payload_of(open_records(tmp_path))
    assert payload["episodes"] is None
    assert "turn" not in payload["view"]
    assert 'id="episodes"' not in write_report([tmp_path], figures=False).read_text(encoding="utf-8")


def test_what_a_tool_said_is_cut_to_what_a_page_can_hold(tmp_path):
    long = [ToolResult("n" * 500, "a" * 5000, "o" * 500, "x" * 10**6 + "END") for _ in range(3)]
    verdict = Verdict(False, {f"part {number}": number > 1 for number in range(500)}, {str(n): n for n in range(500)})
    records = record(tmp_path, [episode([("ab", long), ("c", None)], ending="e" * 500, verdict=verdict)])
    for max_tokens, longest in ((10**6, LONGEST_RESULT), (100, 100 * 40 // 3), (1, SHORTEST_RESULT)):
        _, payload, _ = payload_of(records, max_tokens)
        (shown,) = payload["view"]["rollouts"]
        for result in shown["episode"]["turns"][1]:
            assert len(result["text"]) + len(result["end"]) == longest
            assert result["cut"] == 10**6 + 3 - longest
            assert result["end"].endswith("xEND")
            assert len(result["name"]) == len(result["outcome"]) == LONGEST_NAME
            assert len(result["arguments"]) == LONGEST_ARGUMENTS
        assert len(shown["episode"]["ending"]) == LONGEST_NAME
        assert shown["episode"]["parts"][:3] == [["part 0", False], ["part 1", False], ["part 2", True]]
        assert len(shown["episode"]["parts"]) == len(shown["episode"]["figures"]) == MOST_PARTS
        assert shown["episode"]["more_parts"] == 500 - MOST_PARTS
    page = write_report([tmp_path], figures=False)
    assert page.stat().st_size < 400_000


def test_many_turns_are_counted_together_at_the_end(tmp_path):
    result = [ToolResult("f", "", "ok", "")]
    records = record(tmp_path, [episode([*[("a", result)] * 20, ("bc", None)])])
    _, payload, _ = payload_of(records)
    rows = payload["episodes"]["by_turn"]
    assert [row["tokens"] for row in rows] == [1] * MOST_TURNS + [20 - MOST_TURNS + 2]
    assert rows[-1]["name"] == f"turn {MOST_TURNS} and later"


def test_what_stands_before_a_token_ends_at_a_result(tmp_path):
    result = [ToolResult("f", "", "ok", "")]
    rollouts = [episode([("ab", result), ("cd", None)], number) for number in range(2)]

    def wrong(scored):  # the first token of the second turn, and the one behind it
        inside = torch.tensor([False, False, True, True] * 2)
        scored.scores.reverse_kl[:] = torch.where(inside, 3.0, 0.0)
        scored.scores.entropy[:] = torch.where(inside, 0.0, 1.0)
        scored.student_top.token_ids[:, 0], scored.teacher_top.token_ids[:, 0] = 1, 2

    dataset, payload, _ = payload_of(record(tmp_path, rollouts, wrong))
    assert dataset.before.tolist() == [0, 1, 0, 1] * 2
    place = payload["confusions"]["contexts"].index(1)
    rows = payload["confusions"]["tables"][place]
    assert sorted((row["before"], row["count"]) for row in rows) == [("", 2), ("c", 2)]


def test_characters_are_not_joined_across_turns(tmp_path):
    smile = TOKENIZER("🙂")["input_ids"]
    turns = (
        Turn("student", 0, 2, ""),
        Turn("tool", 2, 1, "x", (ToolResult("f", "", "ok", ""),)),
        Turn("student", 3, 6, ""),
    )
    rollout = Rollout(0, "p", (1,), (*smile[:2], 5, *smile[2:], *smile), True, turns, "answered")
    _, payload, _ = payload_of(record(tmp_path, [rollout]))
    assert payload["view"]["parts"] == [
        *([0, "⟨F0⟩"], [1, "⟨9F⟩"], [2, "⟨99⟩"], [3, "⟨82⟩"]),
        *([4, "🙂"], [5, ""], [6, ""], [7, ""]),
    ]


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("kind", ["poem"] * 4, "has the kind 'poem'; kinds are thought, call"),
        ("turn", [-2] * 4, "has a turn from -2 to -2"),
        ("turn", [2**15] * 4, "has a turn from 32768"),
        ("rollout", [0, 0, 0, 1], "rollout 0 has 2 tokens in its turns, and 3 in tokens.parquet"),
    ],
)
def test_columns_that_no_episode_has_are_named(tmp_path, name, values, message):
    record(tmp_path, [episode([("ab", None)], number) for number in range(2)])
    table = pq.read_table(tmp_path / "tokens.parquet")
    place = table.column_names.index(name)
    pq.write_table(table.set_column(place, name, pa.array(values)), tmp_path / "tokens.parquet")
    with pytest.raises(ValueError, match=message):
        write_report([tmp_path], figures=False)


def test_an_episode_without_tokens_of_the_students_breaks_nothing(tmp_path):
    empty = Rollout(
        0, "p", (1,), (3, 4), False, (Turn("tool", 0, 2, "cd", (ToolResult("f", "", "ok", "cd"),)),), "no room"
    )
    records = record(tmp_path, [empty, episode([("ab", None)], 1)])
    dataset, payload, _ = payload_of(records)
    assert payload["episodes"]["count"] == 2
    assert [shown["rollout"] for shown in payload["view"]["rollouts"]] == [1]
    assert np.array_equal(dataset.before, [0, 1])
