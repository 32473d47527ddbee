"""The page holds what the records hold, and says in one line what is wrong with them."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tipdistill import TokenScores, cli, quadrants, select
from tipdistill.records import open_records
from tipdistill.report import page as page_module
from tipdistill.report.dataset import load_dataset
from tipdistill.report.pack import Pack
from tipdistill.report.page import write_report
from tipdistill.report.payload import dataset_payload
from tipdistill.select.quadrants import quadrant_shares


def data_of(path):
    """The page's JSON."""
    return json.loads(
        re.search(r'<script id="data"[^>]*>(.*?)</script>', path.read_text(encoding="utf-8"), re.S).group(1)
    )


def words(rollouts=12, tokens=40, seed=0):
    draw = np.random.default_rng(seed)
    return [[f" w{number}" for number in draw.integers(0, 30, draw.integers(1, tokens + 1))] for _ in range(rollouts)]


def scores_of(table):
    fields = {name: torch.tensor(table[name].to_numpy()) for name in ("reverse_kl", "forward_kl")}
    return TokenScores(entropy_norm=torch.tensor(table["entropy"].to_numpy()), **fields)


def payload_of(directory, max_tokens=10**6, **options):
    dataset, pack = load_dataset(open_records(directory), **options), Pack()
    return dataset, dataset_payload(dataset, pack, max_tokens, seed=0), pack


def test_shares_and_budgets_are_those_of_taxonomy_and_select(tmp_path, records_writer):
    table = records_writer(tmp_path, words())
    _, payload, _ = payload_of(tmp_path)
    scores, rollout = scores_of(table), torch.tensor(table["rollout"].to_numpy()).long()
    quadrant = quadrants(scores)
    shares = payload["shares"]
    assert [count / len(rollout) for count in shares["tokens"]] == pytest.approx(
        list(quadrant_shares(quadrant).values())
    )
    for number, rule in enumerate(payload["rules"]):
        if rule["recorded"]:
            continue
        for level, retention in enumerate(payload["retentions"]):
            generator = torch.Generator().manual_seed(0)
            mask = select(scores, rule["name"], retention, rollout, generator=generator).mask
            kept = [int((mask & (quadrant == q)).sum()) for q in (1, 2, 3, 4)]
            assert shares["kept_tokens"][number][level] == kept
            mass = [float(scores.reverse_kl[mask & (quadrant == q)].double().sum()) for q in (1, 2, 3, 4)]
            assert shares["kept_mass"][number][level] == pytest.approx(mass, abs=1e-4)


def test_a_recorded_score_is_what_its_rule_ranks_by(tmp_path, records_writer):
    tokens = words()
    lengths = torch.tensor([len(rollout) for rollout in tokens])
    rollout = torch.arange(len(tokens)).repeat_interleave(lengths)
    score = torch.rand(len(rollout), generator=torch.Generator().manual_seed(5))
    picked = select(TokenScores(reverse_kl=score), "divergence", 0.3, rollout)
    shared = {
        "score": score.numpy(),
        "kept": picked.mask.numpy(),
        "score_my.rule": 1 - score.numpy(),
        "score_complement:my.rule": score.numpy(),
    }
    records_writer(tmp_path, tokens, shared=shared, sidecar={"rule": "gradient_norm", "retention": 0.3})
    dataset, payload, _ = payload_of(tmp_path)
    assert payload["rules"][0] == {"name": "gradient_norm", "recorded": True, "sampled": False, "whole": False}
    assert torch.equal(dataset.selection("gradient_norm", 0.3).mask, picked.mask)
    # of a rule whose code is not here the score is all that is needed
    best_last = select(TokenScores(reverse_kl=1 - score), "divergence", 0.3, rollout).mask
    assert torch.equal(dataset.selection("my.rule", 0.3).mask, best_last)
    worst = select(TokenScores(reverse_kl=score), "complement:divergence", 0.3, rollout).mask
    assert torch.equal(dataset.selection("complement:my.rule", 0.3).mask, worst)
    assert (dataset.kept["gradient_norm"] == picked.mask.numpy()).all()


def test_budgets_are_spent_where_the_records_spent_them(tmp_path, records_writer):
    table = records_writer(tmp_path, words(), sidecar={"rule": "soft_or", "scope": "batch", "retention": 0.1})
    dataset, _, _ = payload_of(tmp_path)
    rollout = torch.tensor(table["rollout"].to_numpy()).long()
    for rule in ("divergence", "q3", "complement:soft_or"):
        mask = select(scores_of(table), rule, 0.1, rollout, scope="batch").mask
        assert torch.equal(dataset.selection(rule, 0.1).mask, mask)


def test_the_map_counts_every_token_and_what_is_kept_of_it(tmp_path, records_writer, unpack):
    records_writer(tmp_path, words(30))
    dataset, payload, pack = payload_of(tmp_path, max_tokens=50)
    tokens = unpack(pack, payload["map"]["tokens"])
    assert tokens.sum() == payload["tokens"] == len(dataset.before)
    for number, choice in enumerate(dataset.rules):
        kept = unpack(pack, payload["map"]["kept"][number]).reshape(len(tokens), -1)
        assert (kept.sum(axis=1) == tokens).all()
        assert (kept.sum(axis=0) == np.bincount(choice.level, minlength=kept.shape[1])).all()


def test_rollouts_are_drawn_whole_and_everything_else_counts_all(tmp_path, records_writer, unpack):
    tokens = words(50)
    records_writer(tmp_path, tokens)
    _, payload, pack = payload_of(tmp_path, max_tokens=200)
    view = payload["view"]
    assert 0 < view["tokens"] <= 200
    texts = [view["strings"][index] for index in unpack(pack, view["text"])]
    assert texts == [token for rollout in view["rollouts"] for token in tokens[rollout["rollout"]]]
    assert [rollout["prompt"] for rollout in view["rollouts"]] == [f"prompt {r['rollout']}" for r in view["rollouts"]]
    assert payload["tokens"] == sum(map(len, tokens))
    # one that fits nowhere is shown all the same
    _, payload, _ = payload_of(tmp_path, max_tokens=1)
    assert len(payload["view"]["rollouts"]) == 1


def test_top_choices_and_statistics_survive_the_packing(tmp_path, records_writer, unpack):
    table = records_writer(tmp_path, words())
    _, payload, pack = payload_of(tmp_path)
    view = payload["view"]
    for name, place in view["statistics"].items():
        assert unpack(pack, place) == pytest.approx(table[name].to_numpy(), rel=2.5e-4)
    for whose in ("student", "teacher"):
        top = unpack(pack, view[f"{whose}_top"]).reshape(5, -1)
        probability = unpack(pack, view[f"{whose}_probability"]).reshape(5, -1)
        for token, likeliest in enumerate(table[f"{whose}_top5"].to_pylist()):
            assert [view["strings"][index] for index in top[:, token]] == [entry["token"] for entry in likeliest]
            assert probability[:, token] / 1000 == pytest.approx(
                [entry["probability"] for entry in likeliest], abs=6e-4
            )


def test_confusions_have_counts_mass_and_places(tmp_path, records_writer, top_choices):
    # "b" after "a" is always wrong, "b" after "c" never
    tokens = [["a", "b", "c", "b"], ["a", "b"], ["c", "b", "a", "b"]]
    wrong = np.array([0, 1, 0, 0, 0, 1, 0, 0, 0, 1], dtype=bool)
    texts = ["a", "b", "c", "z"]
    ids = np.array([texts.index(token) for rollout in tokens for token in rollout])
    student = np.stack([ids, *[np.full(10, 3)] * 4], axis=1)
    teacher = np.where(wrong[:, None], np.array([3, 1, 0, 0, 0]), student)
    likely = np.tile([0.9, 0.05, 0.0, 0.0, 0.0], (10, 1))
    shared = {
        "entropy": np.where(np.arange(10) == 0, 1.0, 0.0).astype(np.float32),
        "reverse_kl": np.where(wrong, 2.0, 0.01).astype(np.float32),
        "student_top5": top_choices(student, likely, texts),
        "teacher_top5": top_choices(teacher, likely, texts),
    }
    records_writer(tmp_path, tokens, shared=shared)
    _, payload, _ = payload_of(tmp_path)
    mistakes = payload["confusions"]
    assert (mistakes["tokens"], mistakes["agreed"], mistakes["mass"]) == (3, 0, 6.0)
    for context, table in zip(mistakes["contexts"], mistakes["tables"], strict=True):
        if context == 1:
            (row,) = table
            assert (row["before"], row["student"], row["teacher"], row["count"], row["mass"]) == ("a", "b", "z", 3, 6.0)
            assert row["where"] == [1, 5, 9]
            assert row["student_probability"] == pytest.approx(0.9)
    assert sum(row["count"] for row in mistakes["tables"][-1]) == 3


def test_page_and_figures_are_where_they_are_said_to_be(tmp_path, records_writer, capsys):
    records_writer(tmp_path / "records", words())
    (tmp_path / "records" / "trainer_state.json").write_text(
        json.dumps({"log_history": [{"step": step, "loss": 1 / step, "time/rollout": 1.0} for step in (1, 2, 3)]})
    )
    assert cli.main(["report", str(tmp_path / "records"), "--rule", "q3", "--retention", "0.07"]) == 0
    assert str(tmp_path / "records" / "report.html") in capsys.readouterr().out
    data = data_of(tmp_path / "records" / "report.html")
    assert data["sets"][0]["rules"][0]["name"] == "q3"
    assert 0.07 in data["sets"][0]["retentions"]
    figures = {path.name for path in (tmp_path / "records" / "report-figures").iterdir()}
    names = ("tip_map", "budgets", "confusions", "training")
    assert figures == {f"{name}{suffix}" for name in names for suffix in (".png", ".svg")}
    for path in (tmp_path / "records" / "report-figures").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG" if path.suffix == ".png" else b"<?xml")


def test_several_steps_share_the_token_budget(tmp_path, records_writer):
    for step in (0, 50):
        records_writer(tmp_path / "run" / "records" / f"step-{step}", words(20), sidecar={"step": step, "rule": "q3"})
    data = data_of(write_report([tmp_path / "run"], figures=False, max_tokens=300))
    assert [shown["name"] for shown in data["sets"]] == ["run · step-0", "run · step-50"]
    assert [shown["step"] for shown in data["sets"]] == [0, 50]
    assert sum(shown["view"]["tokens"] for shown in data["sets"]) <= 300


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "tokens.parquet").write_bytes(b""), "tokens.parquet is empty"),
        (lambda d: os.truncate(d / "tokens.parquet", 2000), r"tokens.parquet \(2,000 bytes\) is cut off"),
        (lambda d: os.truncate(d / "rollouts.parquet", 700), r"rollouts.parquet \(700 bytes\) is cut off"),
        (lambda d: (d / "records.json").write_text('{"rule'), "records.json is no sidecar"),
        (lambda d: (d / "probe.json").write_text("{"), "probe.json is no JSON"),
        (lambda d: (d / "rollouts.parquet").unlink(), "but no rollouts.parquet"),
        (lambda d: (d / "tokens.parquet").unlink(), "neither token records"),
        (lambda d: pq.write_table(pq.read_table(d / "tokens.parquet")[:0], d / "tokens.parquet"), "holds no token"),
        (
            lambda d: pq.write_table(pq.read_table(d / "rollouts.parquet"), d / "tokens.parquet"),
            "has no column position",
        ),
        (
            lambda d: pq.write_table(
                pq.read_table(d / "tokens.parquet").sort_by([("rollout", "descending")]), d / "tokens.parquet"
            ),
            "not in the order of their rollouts",
        ),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path, records_writer, capsys, spoil, message):
    records_writer(tmp_path, words())
    spoil(tmp_path)
    assert cli.main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "report.html").exists()


def test_a_page_cut_in_its_data_pages_is_one_line(tmp_path, records_writer, capsys):
    records_writer(tmp_path, words(200))
    whole = bytearray((tmp_path / "tokens.parquet").read_bytes())
    whole[100:4000] = bytes(3900)  # the footer is intact
    (tmp_path / "tokens.parquet").write_bytes(whole)
    assert cli.main(["report", str(tmp_path)]) == 2
    assert re.search(r"tokens.parquet is damaged", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("reverse_kl", np.inf, "reverse_kl is inf in row 3"), ("entropy", np.nan, "entropy is nan in row 3")],
)
def test_statistics_that_are_not_finite_are_named(tmp_path, records_writer, name, value, message):
    tokens = words()
    values = np.ones(sum(map(len, tokens)), dtype=np.float32)
    values[3] = value
    records_writer(tmp_path, tokens, shared={name: values})
    with pytest.raises(ValueError, match=message):
        write_report([tmp_path])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "gradient_norm"}, "do not suffice for the rule 'gradient_norm'; they do for entropy, soft_or"),
        ({"rule": "position"}, "'position' keeps every token at any retention"),
        ({"retention": 0.0}, r"a number in \(0, 1\]"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
    ],
)
def test_options_are_checked(tmp_path, records_writer, options, message):
    records_writer(tmp_path, words())
    with pytest.raises(ValueError, match=message):
        write_report([tmp_path], **options)


def test_a_failure_leaves_the_old_page(tmp_path, records_writer, monkeypatch):
    records_writer(tmp_path, words())
    (tmp_path / "report.html").write_text("old")
    monkeypatch.setattr(page_module, "_render", lambda *_: "\ud800")  # cannot be encoded
    with pytest.raises(UnicodeEncodeError):
        write_report([tmp_path], figures=False)
    assert (tmp_path / "report.html").read_text() == "old"
    assert not list(tmp_path.glob(".report*"))


HOSTILE = "</script><script>window.pwned = 1</script><!--<script>"


def test_hostile_text_is_no_markup(tmp_path, records_writer):
    directory = tmp_path / "a<b onclick=x>&"
    records_writer(
        directory, [[HOSTILE, "\u2028", "b"]] * 3, [HOSTILE] * 3, sidecar={"student": HOSTILE, "rule": "soft_or"}
    )
    text = write_report([directory], figures=False).read_text(encoding="utf-8")
    assert "pwned" in text
    assert "</script><script>window" not in text
    assert "<b onclick" not in text
    # the data, and our own scripts
    assert text.count("</script>") == 1 + len(page_module.SCRIPTS)


def test_a_hundred_rollouts_of_a_thousand_tokens_are_under_ten_megabytes(tmp_path, records_writer):
    draw = np.random.default_rng(0)
    # harder than any model's: unlikely tokens at every place, and probabilities without a pattern
    tokens = [[f" {number:x}" for number in draw.integers(0, 50_000, 1000)] for _ in range(100)]
    records_writer(tmp_path, tokens, ["A prompt of some length. " * 40] * 100)
    page = write_report([tmp_path], figures=False)
    assert len(data_of(page)["sets"][0]["view"]["rollouts"]) == 100
    assert page.stat().st_size < 10e6


@pytest.mark.slow
def test_many_tokens_take_seconds_and_little_memory(tmp_path, records_writer):
    """A tenth of two million tokens in a tenth of what those may take, a process's start apart."""
    draw = np.random.default_rng(0)
    vocabulary = [f" {number:x}" for number in range(5000)]
    records_writer(tmp_path, [[vocabulary[n] for n in draw.integers(0, 5000, 1000)] for _ in range(200)])
    measure = (
        "import resource, sys, time; from tipdistill.report.page import write_report; import matplotlib.figure;"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; began = time.process_time();"
        "write_report([sys.argv[1]]);"
        "print(time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    least, command = [], [sys.executable, "-c", measure, tmp_path]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # several count the time that they wait for each other
    for _ in range(3):  # what else the machine does makes it slower, and never faster
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=one_thread)
        least.append(tuple(map(float, done.stdout.split())))
        if least[-1][0] < 3 + 9:
            break
    seconds, kibibytes = map(min, zip(*least, strict=True))
    # drawing the figures and the hundred rollouts takes 3 s and 0.35 GiB whatever the number of tokens
    assert seconds < 3 + 9
    assert kibibytes < (0.35 + 0.2) * 2**20
