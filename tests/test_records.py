"""Token records: what is written is what was scored, whole or in parts, and damage is named in one line."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tipdistill import quadrants, select
from tipdistill.records import (
    ROLLOUTS_SCHEMA,
    STATISTICS,
    About,
    Choice,
    RecordsWriter,
    joined_text,
    open_records,
    tokens_schema,
)
from tipdistill.types import Rollout, Scored, TokenScores, TopTokens
from tipdistill.vocabulary import token_bytes

VOCABULARY = 400
ABOUT = About("student", "teacher", VOCABULARY, rules=("soft_or", "random", "gradient_norm"), retention=0.3, seed=3)


def draw(about, lengths, vocabulary, seed=0):
    """Rollouts of the given lengths with random tokens, and statistics in nats as they come out of scoring."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(lengths)
    ids = torch.randint(vocabulary, (count,), generator=generator).split(lengths)
    rollouts = [
        Rollout(number // 2, f"prompt {number // 2}", (1, 2), tuple(piece.tolist()), number % 3 > 0)
        for number, piece in enumerate(ids)
    ]
    scores = {name: torch.rand(count, generator=generator) ** 4 * 3 for name in about.fields()}
    scores["entropy_norm"] = scores["entropy"] / np.log(about.vocabulary)
    top = [
        TopTokens(
            torch.randint(about.vocabulary, (count, 5), generator=generator),
            torch.rand(count, 5, generator=generator).sort(descending=True).values,
        )
        for _ in range(2)
    ]
    return rollouts, Scored(TokenScores(**scores), *top)


def rows(batch, first, last):
    """Rollouts [first, last) of a drawn batch."""
    rollouts, scored = batch
    edges = np.cumsum([0, *(len(rollout.completion_ids) for rollout in rollouts)])
    return rollouts[first:last], scored.map(lambda value: value[edges[first] : edges[last]])


@pytest.fixture
def batch(tiny_tokenizer):
    return draw(ABOUT, [7, 1, 12, 30, 5, 9], len(tiny_tokenizer))


def test_what_is_written_is_what_was_scored(tmp_path, tiny_tokenizer, batch):
    with RecordsWriter(tmp_path, tiny_tokenizer, ABOUT) as writer:
        writer.write(*batch)
    records = open_records(tmp_path)
    rollouts, scored = batch
    scores = scored.scores
    assert records.tokens.schema_arrow.equals(tokens_schema(ABOUT.rules))
    assert records.rollouts.schema.equals(ROLLOUTS_SCHEMA)
    table = records.read().to_pydict()
    ids = [index for rollout in rollouts for index in rollout.completion_ids]
    assert table["token_id"] == ids
    assert table["rollout"] == [number for number, rollout in enumerate(rollouts) for _ in rollout.completion_ids]
    assert table["position"] == [place for rollout in rollouts for place in range(len(rollout.completion_ids))]
    assert table["prompt_id"] == [rollout.prompt_id for rollout in rollouts for _ in rollout.completion_ids]
    for name in STATISTICS:
        assert table[name] == scores.require(name).tolist()
    pieces = token_bytes(tiny_tokenizer)
    for name, top in (("student_top5", scored.student_top), ("teacher_top5", scored.teacher_top)):
        for row, cell in enumerate(table[name]):
            assert [entry["token_id"] for entry in cell] == top.token_ids[row].tolist()
            assert [entry["probability"] for entry in cell] == top.probability[row].tolist()
            assert [entry["token"] for entry in cell] == [
                pieces[index].decode("utf-8", "replace") if index < len(pieces) else ""
                for index in top.token_ids[row].tolist()
            ]
    rollout = torch.tensor(table["rollout"])
    assert table["quadrant"] == quadrants(scores).tolist()
    for rule, suffix in (("soft_or", ""), ("random", "_random"), ("gradient_norm", "_gradient_norm")):
        chosen = select(scores, rule, 0.3, rollout, generator=torch.Generator().manual_seed(3))
        assert table[f"kept{suffix}"] == chosen.mask.tolist()
        assert table[f"score{suffix}"] == chosen.score.tolist()
    assert records.rollouts.to_pydict()["completion"] == [
        tiny_tokenizer.decode(rollout.completion_ids, clean_up_tokenization_spaces=False) for rollout in rollouts
    ]
    assert records.sidecar["complete"] is True
    assert records.sidecar["rule"] == "soft_or"
    assert sum(quadrant["token_share"] for quadrant in records.sidecar["quadrants"].values()) == pytest.approx(1)
    assert not (tmp_path / "parts").exists()


def test_parts_make_no_difference(tmp_path, tiny_tokenizer, batch):
    with RecordsWriter(tmp_path / "whole", tiny_tokenizer, ABOUT) as writer:
        writer.write(*batch)
    with RecordsWriter(tmp_path / "parts", tiny_tokenizer, ABOUT, part_tokens=10) as writer:
        for first, last in ((0, 2), (2, 3), (3, 6)):
            writer.write(*rows(batch, first, last))
    whole, parts = open_records(tmp_path / "whole"), open_records(tmp_path / "parts")
    assert parts.tokens.num_row_groups > 1
    assert parts.read().equals(whole.read())
    assert parts.rollouts.equals(whole.rollouts)
    assert parts.sidecar == whole.sidecar


def test_tokens_that_a_teacher_does_not_tell_are_none(tmp_path, tiny_tokenizer, batch):
    rollouts, scored = batch
    top = scored.teacher_top
    unknown = torch.arange(5) >= (torch.arange(len(top.token_ids)) % 6)[:, None]
    told = TopTokens(top.token_ids.masked_fill(unknown, -1), top.probability.masked_fill(unknown, 0.0))
    with RecordsWriter(tmp_path, tiny_tokenizer, ABOUT) as writer:
        writer.write(rollouts, replace(scored, teacher_top=told))
    found = open_records(tmp_path).read(["teacher_top5"])["teacher_top5"].to_pylist()
    assert [[entry["token_id"] for entry in entries] for entries in found] == [
        [index for index in row if index >= 0] for row in told.token_ids.tolist()
    ]


def test_a_training_step_hands_its_own_choice_over(tmp_path, tiny_tokenizer, batch):
    about = About("student", "teacher", VOCABULARY, step=20)
    rollouts, scored = batch
    count = len(scored.scores)
    choice = Choice(torch.full((count,), 3, dtype=torch.int8), torch.arange(count) % 2 == 0, torch.arange(count) / 2)
    with RecordsWriter(tmp_path, tiny_tokenizer, about) as writer:
        writer.write(rollouts, scored, choice)
    records = open_records(tmp_path)
    assert records.read(["kept"])["kept"].to_pylist() == choice.kept.tolist()
    assert records.read(["score"])["score"].to_pylist() == choice.score.tolist()
    assert records.sidecar["quadrants"]["q3"]["token_share"] == 1
    assert records.sidecar["step"] == 20


def test_scores_come_back(tmp_path, tiny_tokenizer, batch):
    with RecordsWriter(tmp_path, tiny_tokenizer, ABOUT) as writer:
        writer.write(*batch)
    scores = open_records(tmp_path).scores()
    torch.testing.assert_close(scores.entropy_norm, batch[1].scores.entropy_norm)
    assert torch.equal(scores.reverse_kl, batch[1].scores.reverse_kl)


# Text.


def test_a_character_split_between_tokens_is_whole_again(tmp_path, tiny_tokenizer):
    text = "né 🙂\n<|end|>"
    ids = tuple(tiny_tokenizer(text)["input_ids"])
    about = About("s", "t", VOCABULARY)
    _, scored = draw(about, [len(ids)], len(tiny_tokenizer))
    with RecordsWriter(tmp_path, tiny_tokenizer, about) as writer:
        writer.write([Rollout(0, "p", (1,), ids, True)], scored)
    records = open_records(tmp_path)
    table = records.read(["token", "token_bytes"]).to_pydict()
    assert joined_text(table["token"], table["token_bytes"]) == text
    assert records.rollouts["completion"].to_pylist() == [text]
    # bytes are there for the pieces of é and 🙂, and for nothing else
    assert [raw for raw in table["token_bytes"] if raw] == [bytes([byte]) for byte in "é🙂".encode()]
    assert table["token"][-1] == "<|end|>"


def test_other_tools_read_them(tmp_path, tiny_tokenizer, batch):
    with RecordsWriter(tmp_path, tiny_tokenizer, ABOUT) as writer:
        writer.write(*batch)
    path = str(tmp_path / "tokens.parquet")
    expected = pq.read_table(path).to_pydict()
    readers = {
        "pandas": lambda module: module.read_parquet(path)["token_id"].tolist(),
        "polars": lambda module: module.read_parquet(path)["token_id"].to_list(),
        "duckdb": lambda module: [row[0] for row in module.sql(f"SELECT token_id FROM '{path}'").fetchall()],
    }
    read = 0
    for name, reader in readers.items():
        try:
            module = __import__(name)
        except ImportError:
            continue
        assert reader(module) == expected["token_id"], name
        read += 1
    assert read, "none of pandas, polars and DuckDB is installed"


# Interruption.


def interrupt(folder, tokenizer, batch):
    with contextlib.suppress(KeyboardInterrupt), RecordsWriter(folder, tokenizer, ABOUT) as writer:
        writer.write(*batch)
        raise KeyboardInterrupt


def test_an_error_keeps_what_was_written_and_the_same_run_goes_on(tmp_path, tiny_tokenizer, batch):
    with RecordsWriter(tmp_path / "whole", tiny_tokenizer, ABOUT) as writer:
        writer.write(*batch)
    interrupt(tmp_path / "cut", tiny_tokenizer, rows(batch, 0, 4))
    begun = open_records(tmp_path / "cut")
    assert begun.sidecar["complete"] is False
    assert len(begun.rollouts) == 4
    with RecordsWriter(tmp_path / "cut", tiny_tokenizer, ABOUT) as writer:
        assert writer.rollouts == 4
        writer.write(*rows(batch, 4, 6))
    assert open_records(tmp_path / "cut").read().equals(open_records(tmp_path / "whole").read())


def test_a_killed_run_leaves_its_parts_and_the_earlier_records(tmp_path, tiny_tokenizer, batch):
    with RecordsWriter(tmp_path, tiny_tokenizer, ABOUT) as writer:
        writer.write(*rows(batch, 0, 1))
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    torch.save(batch, tmp_path / "batch.pt")
    killed = """
import os, signal, sys, torch
from transformers import AutoTokenizer
from test_records import ABOUT, rows
from tipdistill.records import RecordsWriter
import tipdistill.records as records
folder = sys.argv[1]
batch = torch.load(f"{folder}/batch.pt", weights_only=False)
writer = RecordsWriter(folder, AutoTokenizer.from_pretrained(f"{folder}/tokenizer"), ABOUT, part_tokens=1)
writer.write(*rows(batch, 0, 2))
writer.write(*rows(batch, 2, 3))
write = records.write_tables
def die(path, tables):  # between the two files of a part
    if path.name.startswith("rollouts"):
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, tables)
records.write_tables = die
writer.write(*rows(batch, 3, 5))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    done = subprocess.run([sys.executable, "-c", killed, str(tmp_path)], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(open_records(tmp_path).rollouts) == 1  # the earlier records
    (tmp_path / "tokens.parquet").unlink()
    assert len(open_records(tmp_path).rollouts) == 3  # what the killed run had finished
    with RecordsWriter(tmp_path, tiny_tokenizer, ABOUT) as writer:
        assert writer.rollouts == 3
        writer.write(*rows(batch, 3, 6))
    with RecordsWriter(tmp_path / "whole", tiny_tokenizer, ABOUT) as writer:
        writer.write(*batch)
    assert open_records(tmp_path).read().equals(open_records(tmp_path / "whole").read())


def test_parts_of_other_settings_are_not_mixed_in(tmp_path, tiny_tokenizer, batch):
    interrupt(tmp_path, tiny_tokenizer, batch)
    with pytest.raises(ValueError, match=r"other settings \(rules, retention, seed differ\)"):
        RecordsWriter(tmp_path, tiny_tokenizer, About("student", "teacher", VOCABULARY))


# What is refused.


def test_statistics_that_are_not_finite_are_named(tmp_path, tiny_tokenizer, batch):
    rollouts, scored = batch
    scored.scores.reverse_kl[9] = torch.inf
    with pytest.raises(ValueError, match="reverse_kl is inf in rollout 2, token 1"):
        RecordsWriter(tmp_path, tiny_tokenizer, ABOUT).write(rollouts, scored)


def test_nothing_written_is_an_error(tmp_path, tiny_tokenizer):
    with pytest.raises(ValueError, match="nothing was scored"), RecordsWriter(tmp_path, tiny_tokenizer, ABOUT):
        pass
    empty = TokenScores(**dict.fromkeys(ABOUT.fields(), torch.zeros(0)))
    top = TopTokens(torch.zeros(0, 5, dtype=torch.int64), torch.zeros(0, 5))
    writer = RecordsWriter(tmp_path, tiny_tokenizer, ABOUT)
    with pytest.raises(ValueError, match="no completion token"):
        writer.write([Rollout(0, "", (1,), (), False)], Scored(empty, top, top))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rules": ("softor",)}, "soft_or"),
        ({"rules": ()}, "at least one rule"),
        ({"rules": ("q3", "q3")}, "each once"),
        ({"scope": "token"}, "scope must be one of rollout, batch"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        About("s", "t", VOCABULARY, **options)


def spoil_empty(folder):
    (folder / "tokens.parquet").write_bytes(b"")


def spoil_cut(folder):
    path = folder / "tokens.parquet"
    path.write_bytes(path.read_bytes()[:-100])


def spoil_kind(folder):
    pq.write_table(pa.table({"a": [1]}), folder / "tokens.parquet")


def spoil_rows(folder):
    pq.write_table(pq.read_table(folder / "tokens.parquet").slice(0, 0), folder / "tokens.parquet")


def spoil_match(folder):
    pq.write_table(pq.read_table(folder / "rollouts.parquet").slice(0, 2), folder / "rollouts.parquet")


def spoil_sidecar(folder):
    (folder / "records.json").write_text("{")


def spoil_version(folder):
    sidecar = json.loads((folder / "records.json").read_text())
    (folder / "records.json").write_text(json.dumps(sidecar | {"schema_version": 99}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_empty, "tokens.parquet is empty: it was not written to its end"),
        (spoil_cut, "is cut off or no Parquet file"),
        (spoil_kind, "has no column rollout, position"),
        (spoil_rows, "holds no token"),
        (spoil_match, "do not belong together"),
        (spoil_sidecar, "is no sidecar of token records"),
        (spoil_version, "version 99 of the records"),
        (lambda folder: (folder / "rollouts.parquet").unlink(), "no rollouts.parquet"),
        (lambda folder: (folder / "tokens.parquet").unlink(), "holds no token records"),
    ],
    ids=["empty", "cut", "kind", "rows", "match", "sidecar", "version", "no_rollouts", "no_tokens"],
)
def test_damage_is_one_clear_line(tmp_path, tiny_tokenizer, batch, spoil, message):
    with RecordsWriter(tmp_path, tiny_tokenizer, ABOUT) as writer:
        writer.write(*batch)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        open_records(tmp_path)
    assert "\n" not in str(caught.value)


def test_no_directory():
    with pytest.raises(FileNotFoundError, match="there is no directory no/such"):
        open_records("no/such")


def test_unknown_columns(tmp_path, tiny_tokenizer, batch):
    with RecordsWriter(tmp_path, tiny_tokenizer, ABOUT) as writer:
        writer.write(*batch)
    with pytest.raises(ValueError, match="no column score_q4; it has rollout"):
        open_records(tmp_path).read(["score_q4"])
