"""Files that are damaged or odd: one ValueError with the file's name, whatever is wrong with them."""

import json
import random
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tipdistill.data import load_prompts
from tipdistill.documents import MOST_NODES, read_json, read_text, read_yaml
from tipdistill.evaluate.run import read_samples
from tipdistill.plan.machines import read_machine
from tipdistill.recipes.read import parse
from tipdistill.records import STATISTICS, About, DamagedRecordsError, RecordsWriter, open_records
from tipdistill.report.page import write_report
from tipdistill.sweep import read_grid
from tipdistill.tasks.arithmetic import build_tokenizer
from tipdistill.types import Rollout, Scored, TokenScores, ToolResult, TopTokens, Turn, Verdict

FILES = ("tokens.parquet", "rollouts.parquet", "records.json")
EACH = 120  # damages of each file


@pytest.fixture(scope="module", params=["rollouts", "episodes"])
def recorded(tmp_path_factory, request):
    """A directory of small records, and what they hold."""
    folder = tmp_path_factory.mktemp("records")
    about = About("student", "teacher", vocabulary=18, rules=("soft_or", "q3"), retention=0.5)
    generator = torch.Generator().manual_seed(0)
    scores = {name: torch.rand(12, generator=generator) for name in about.fields()}
    top = TopTokens(torch.arange(60).reshape(12, 5) % 18, torch.full((12, 5), 0.2))
    rollouts = [Rollout(0, "1+1=", (1, 10), tuple(range(5)), True), Rollout(1, "2+3=", (1, 10), tuple(range(7)), False)]
    if request.param == "episodes":
        result = ToolResult("add", "{}", "ok", "abc")
        turns = Turn("student", 0, 4, "0123"), Turn("tool", 4, 3, "456", (result,)), Turn("student", 7, 3, "789")
        verdict = Verdict(True, {"sum": True}, {"share": 1.0})
        rollouts[1] = Rollout(1, "2+3=", (1, 10), tuple(range(10)), True, turns, "answered", verdict)
    with RecordsWriter(folder, build_tokenizer(), about) as writer:
        writer.write(rollouts, Scored(TokenScores(**scores), top, top))
    records = open_records(folder)
    return folder, records.read(), records.rollouts


def damaged(raw: bytes, generator: random.Random) -> bytes:
    """The bytes cut, or with some of them changed, dropped or added."""
    kind, at = generator.randrange(4), generator.randrange(len(raw))
    if kind == 0:
        return raw[:at]
    if kind == 1:
        return raw[:at] + bytes([raw[at] ^ 1 << generator.randrange(8)]) + raw[at + 1 :]
    if kind == 2:
        return raw[:at] + generator.randbytes(generator.randrange(1, 9)) + raw[at:]
    return raw[:at] + raw[at + generator.randrange(1, 9) :]


@pytest.mark.parametrize("name", FILES)
def test_records_are_read_as_written_or_refused_by_name(recorded, tmp_path, name):
    folder, tokens, rollouts = recorded
    shutil.copytree(folder, tmp_path / "r")
    raw, refused, told = (folder / name).read_bytes(), 0, []
    for seed in range(EACH):
        (tmp_path / "r" / name).write_bytes(damaged(raw, random.Random(seed)))
        try:
            records = open_records(tmp_path / "r")
            table, scores = records.read(), records.scores()
        except ValueError as error:
            refused += 1
            told.append(str(error))
            continue
        assert bool(torch.isfinite(scores.entropy_norm).all()), seed
        if name == "tokens.parquet":  # what passed is what was written
            assert table.to_pydict() == tokens.to_pydict(), seed
        if name == "rollouts.parquet":
            assert records.rollouts.to_pydict() == rollouts.to_pydict(), seed
    assert refused > EACH / 4
    assert [error for error in told if "\n" in error or str(tmp_path / "r") not in error] == []


def sidecar(**changes):
    def spoil(folder):
        path = folder / "records.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return spoil


def column(file, name, values):
    def spoil(folder):
        table = pq.read_table(folder / file)
        place = table.column_names.index(name)
        pq.write_table(table.set_column(place, name, pa.array(values(table))), folder / file)

    return spoil


def a_directory(name):
    def spoil(folder):
        (folder / name).unlink()
        (folder / name).mkdir()

    return spoil


def bytes_of(name, raw):
    return lambda folder: (folder / name).write_bytes(raw)


SPOILED = {
    "kind of a statistic": column("tokens.parquet", "entropy", lambda table: ["x"] * len(table)),
    "kind of the choice": column("tokens.parquet", "kept", lambda table: [1.5] * len(table)),
    "kind of a text": column("tokens.parquet", "token", lambda table: [1] * len(table)),
    "kind of a list": column("tokens.parquet", "student_top5", lambda table: [1] * len(table)),
    "null rollout": column("tokens.parquet", "rollout", lambda table: [None, *[0] * (len(table) - 1)]),
    "negative length": column("rollouts.parquet", "tokens", lambda table: [-1, 13]),
    "null length": column("rollouts.parquet", "tokens", lambda table: [None, 12]),
    "kind of a prompt": column("rollouts.parquet", "prompt", lambda table: [1, 2]),
    "list for a sidecar": bytes_of("records.json", b"[]"),
    "number for a sidecar": bytes_of("records.json", b"3"),
    "deep sidecar": bytes_of("records.json", b"[" * 100_000),
    "huge number": bytes_of("records.json", b'{"tokens": ' + b"9" * 5000 + b"}"),
    "latin-1 sidecar": bytes_of("records.json", b'{"student": "\xe9"}'),
    "utf-16 sidecar": bytes_of("records.json", '{"tokens": 1}'.encode("utf-16")),
    "empty sidecar": bytes_of("records.json", b""),
    "version": sidecar(schema_version="1"),
    "retention": sidecar(retention="half"),
    "infinite threshold": sidecar(entropy_threshold=float("inf")),
    "scope": sidecar(scope=["rollout"]),
    "rule": sidecar(rule=3),
    "vocabulary": sidecar(vocabulary=None),
    "step": sidecar(step=-1),
    "directory for the sidecar": a_directory("records.json"),
    "directory for the tokens": a_directory("tokens.parquet"),
    "empty rollouts": bytes_of("rollouts.parquet", b""),
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_each_damage_has_the_one_error(recorded, tmp_path, spoil):
    shutil.copytree(recorded[0], tmp_path / "r")
    spoil(tmp_path / "r")
    with pytest.raises(ValueError, match=str(tmp_path / "r")) as raised:
        open_records(tmp_path / "r").read()
    assert isinstance(raised.value, DamagedRecordsError) or "holds no token records" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_bit_that_flips_in_a_figure_is_seen(recorded, tmp_path):
    folder, tokens, _ = recorded
    path = shutil.copytree(folder, tmp_path / "r") / "tokens.parquet"
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(tokens.column_names.index("reverse_kl"))
    raw = bytearray(path.read_bytes())
    raw[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 4
    path.write_bytes(raw)
    with pytest.raises(DamagedRecordsError, match=r"tokens\.parquet is damaged"):
        open_records(tmp_path / "r").read(list(STATISTICS))


@pytest.mark.parametrize("name", ["tokens-00000.parquet", "rollouts-00000.parquet", "records.json"])
def test_parts_that_are_damaged_are_named_with_the_folder_to_remove(tmp_path, recorded, name):
    about = About("s", "t", vocabulary=18)
    scores = TokenScores(**dict.fromkeys(about.fields(), torch.rand(2)))
    top = TopTokens(torch.zeros(2, 5, dtype=torch.int64), torch.full((2, 5), 0.2))
    writer = RecordsWriter(tmp_path, build_tokenizer(), about)
    writer.write([Rollout(0, "p", (1,), (2, 3), True)], Scored(scores, top, top))
    writer.flush()
    path = tmp_path / "parts" / name
    raw, told = path.read_bytes(), []
    for seed in range(30):
        path.write_bytes(damaged(raw, random.Random(seed)))
        try:
            open_records(tmp_path)
        except ValueError as error:
            told.append(str(error))
        (tmp_path / "tokens.parquet").unlink(missing_ok=True)
    assert len(told) > 5
    assert all(str(tmp_path) in error for error in told)


# What people write.

LAUGHS = b"a: &a [x, x]\n" + b"".join(
    b"%c: &%c [%s]\n" % (name, name, b", ".join([b"*%c" % (name - 1)] * 9)) for name in b"bcdefghijkl"
)
YAMLS = {
    "twice": (b"seed: 1\nretention: 0.5\nseed: 2\n", "line 3.*'seed'.*twice"),
    "twice inside": (b"a:\n  b: 1\n  b: 2\n", "line 3"),
    "laughs": (LAUGHS, f"more than {MOST_NODES:,} values"),
    "itself": (b"a: &a [*a]\n", "an alias stands inside"),
    "deep": (b"[" * 100_000, "nested too deeply"),
    "digits": (b"seed: " + b"9" * 5000, "no YAML that can be read"),
    "hexadecimal": (b"seed: 0x" + b"f" * 400, "an integer of 1,600 bits"),
    "utf-16": ("seed: 1".encode("utf-16"), "is UTF-16: save it as UTF-8"),
    "latin-1": ("a: é".encode("latin-1"), r"is not UTF-8 \(byte 3\)"),
    "surrogate": (b'a: "\\ud800"', "half of a character"),
    "date": (b"a: 2024-99-99", "no YAML that can be read"),
    "tagged": (b"a: !!int ''", "no YAML that can be read"),
    "boolean": (b"a: !!bool 3", "no YAML that can be read"),
    "object": (b"a: !!python/object/apply:os.system ['true']", "line 1 is not valid YAML"),
    "control": (b"a: \x00", "not valid YAML"),
    "two": (b"a: 1\n---\nb: 2\n", "line 2 is not valid YAML"),
    "key": (b"? [a]\n: 1\n", "YAML"),
}


@pytest.mark.parametrize(("raw", "message"), YAMLS.values(), ids=YAMLS)
def test_yaml_that_cannot_be_is_one_line_with_the_files_name(tmp_path, raw, message):
    path = tmp_path / "a.yaml"
    path.write_bytes(raw)
    for reader in (read_yaml, read_grid, read_machine, lambda path: parse(["--config", str(path)])):
        with pytest.raises(ValueError, match=message) as raised:
            reader(str(path))
        assert str(path) in str(raised.value)
        assert "\n" not in str(raised.value)
        assert len(str(raised.value)) < 600


def test_what_people_do_write_is_read(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\xef\xbb\xbfbase: &b {a: 1}\r\nown:\r\n  <<: *b\r\n  c: '\xc3\xa9'\r\n")
    assert read_yaml(path) == {"base": {"a": 1}, "own": {"a": 1, "c": "é"}}
    path.write_text("")
    assert read_yaml(path) is None


@pytest.mark.parametrize("reader", [read_text, read_yaml, read_json])
def test_a_directory_is_no_file(tmp_path, reader):
    with pytest.raises(ValueError, match="cannot be read"):
        reader(tmp_path)
    with pytest.raises(FileNotFoundError):
        reader(tmp_path / "nothing")


PROMPTS = {
    "deep": (b'{"prompt": "a"}\n{"prompt": ' + b"[" * 100_000, "line 2"),
    "deep array": (b"[" * 100_000, "nested too deeply"),
    "digits": (b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}", "line 1"),
    "wide integer": (b'{"prompt": "a", "n": 99999999999999999999999}', "line 1: an integer of 77 bits"),
    "surrogate": (b'{"prompt": "a"}\n{"prompt": "\\ud800"}', "line 2: .*half of a character"),
    "surrogate in a message": (b'[{"prompt": [{"role": "user", "content": "\\udfff"}]}]', "row 0: .*half"),
    "surrogate in a key": (b'{"prompt": "a", "\\ud800": 1}', "line 1: .*half"),
    "utf-16": ('{"prompt": "a"}'.encode("utf-16"), "is UTF-16"),
    "latin-1": (b'{"prompt": "\xe9"}', "is not UTF-8"),
    "bytes": (b"\x00\x01\x02", "line 1"),
}


@pytest.mark.parametrize(("raw", "message"), PROMPTS.values(), ids=PROMPTS)
def test_prompts_that_cannot_be_read_name_file_and_place(tmp_path, raw, message):
    path = tmp_path / "p.jsonl"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=message) as raised:
        load_prompts(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_prompts_with_a_byte_order_mark_are_read(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\n')
    assert load_prompts(tmp_path / "p.jsonl")["prompt"][:] == ["a"]


def test_parquet_prompts_that_are_damaged_name_the_file(tmp_path):
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"prompt": ["a", "b"]}), path)
    raw, told = path.read_bytes(), []
    for seed in range(25):
        path.write_bytes(damaged(raw, random.Random(seed)))
        try:
            load_prompts(path)
        except ValueError as error:
            told.append(str(error))
    assert len(told) > 5
    assert all(str(path) in error for error in told)


# What other commands wrote, and a report or a resumed run reads.


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        *((name, raw) for name in ("sweep.json", "probe.json") for raw in (b"[]", b"3", b"{", b"[" * 100_000, b"\xff")),
        *(("sweep.json", raw) for raw in (b"{}", b'{"before": []}', b'{"before": {}, "rows": [3]}')),
        *(("trainer_state.json", raw) for raw in (b"[]", b"{}", b"[" * 100_000, b"\xff", b'{"log_history": [3]}')),
        ("trainer_state.json", b'{"log_history": [{"step": Infinity, "loss": 1}]}'),
    ],
    ids=lambda value: value if isinstance(value, str) else value[:24].decode("latin-1"),
)
def test_a_report_names_the_file_that_it_cannot_read(tmp_path, name, raw):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(ValueError, match=name) as raised:
        write_report([tmp_path], figures=False)
    assert "\n" not in str(raised.value)


GOOD = {"problem": 0, "sample": 0, "response": "4", "tokens": 1, "finished": True}


@pytest.mark.parametrize(
    "row",
    [
        *({**GOOD, "problem": value} for value in (True, 0.0, "0", None, -1, 9)),
        *({**GOOD, "sample": value} for value in (True, 0.5, [0], -1)),
        *({**GOOD, "tokens": value} for value in ("1", -1, 1.5)),
        *({**GOOD, "correct": value, "decided": True, "answer": None} for value in ("yes", 1, None)),
        *({**GOOD, "correct": True, "decided": True, "answer": value} for value in (4, [])),
        *({**GOOD, "response": value} for value in (4, None)),
        *([], 3, None),
    ],
    ids=repr,
)
def test_samples_of_other_types_are_refused_by_line(tmp_path, row):
    path = tmp_path / "s.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=rf"{path}, line 2: no sample of this task"):
        read_samples(path, 2)
    path.write_bytes(b"[" * 100_000 + b"\n")
    with pytest.raises(ValueError, match=r"line 1: no sample"):
        read_samples(path, 2)
