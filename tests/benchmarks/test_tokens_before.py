"""What docs/replication.md has from token records: the tokens before distillation, the first step of a drift run."""

import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import plot_drift
from benchmarks.replication import tokens_before
from tipdistill.records import tokens_schema


def test_an_interval_is_over_rollouts_and_not_over_tokens():
    random = np.random.default_rng(0)
    of_rollout = random.normal(size=400)
    rollout = np.repeat(np.arange(400), 50)
    figure = tokens_before.mean_over_rollouts(of_rollout[rollout], rollout)
    low, high = figure["interval"]
    assert figure["mean"] == pytest.approx(of_rollout.mean())
    # 50 tokens that are all alike are one observation
    assert (high - low) / 2 == pytest.approx(1.96 * of_rollout.std() / 20, rel=0.05)
    assert low < figure["mean"] < high


def test_long_rollouts_weigh_what_their_tokens_do():
    value, rollout = np.array([1.0, 0.0, 0.0, 0.0]), np.array([0, 1, 1, 1])
    assert tokens_before.mean_over_rollouts(value, rollout)["mean"] == 0.25


def test_ranks_are_shared_by_ties():
    values = np.array([1.0, 2.0, 2.0, 10.0])
    assert tokens_before.rank_correlation(values, values**3) == pytest.approx(1)
    assert tokens_before.rank_correlation(values, -values) == pytest.approx(-1)
    # ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4
    assert tokens_before.rank_correlation(values, np.arange(4.0)) == pytest.approx(4.5 / np.sqrt(4.5 * 5))


def write_records(directory, columns, **sidecar):
    directory.mkdir(parents=True)
    count = len(columns["rollout"])
    given = [
        pa.array(columns[field.name], field.type)
        if field.name in columns
        else pa.array([0] * count, field.type)
        if pa.types.is_integer(field.type)
        else pa.nulls(count, field.type)
        for field in tokens_schema()
    ]
    pq.write_table(pa.table(given, tokens_schema().names), directory / "tokens.parquet")
    rollouts, lengths = np.unique(columns["rollout"], return_counts=True)
    texts = {name: [""] * len(rollouts) for name in ("prompt", "completion")}
    of_rollouts = {"rollout": rollouts, "prompt_id": rollouts, **texts, "tokens": lengths}
    of_rollouts["finished"] = [True] * len(rollouts)
    pq.write_table(pa.table(of_rollouts), directory / "rollouts.parquet")
    sidecar = {"schema_version": 1, "complete": True, "tokens": count, "rollouts": len(rollouts), **sidecar}
    (directory / "records.json").write_text(json.dumps(sidecar))


def test_entropies_are_shares_of_the_largest_and_the_teacher_is_the_teachers(tmp_path):
    columns = {
        "rollout": [4, 4, 7],
        "entropy": [math.log(16), 0.0, math.log(4)],
        "teacher_entropy": [0.0, math.log(2), math.log(16)],
        "reverse_kl": [3.0, 1.0, 2.0],
    }
    write_records(tmp_path / "records", columns, vocabulary=16, quadrants={"q1": {}})
    metrics = {"tasks": {"modular[64:]": {"mean_at_k": 0.75, "standard_error": 0.1, "num_samples": 4, "problems": 9}}}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    measured = tokens_before.measured(tmp_path / "records", tmp_path)
    assert (measured["rollouts"], measured["tokens"], measured["quadrants"]) == (2, 3, {"q1": {}})
    assert measured["student_entropy_norm"]["mean"] == pytest.approx(1.5 / 3)
    assert measured["teacher_entropy_norm"]["mean"] == pytest.approx(1.25 / 3)
    assert measured["reverse_kl"]["mean"] == pytest.approx(2)
    ranks = measured["rank_correlation_with_reverse_kl"]
    assert ranks == pytest.approx({"student_entropy": 1, "teacher_entropy": -0.5})
    assert measured["teacher_accuracy"]["mean_at_k"] == 0.75


def test_the_first_step_of_a_drift_run_is_that_of_its_kept_tokens(tmp_path):
    columns = {
        "rollout": [0, 0, 1, 1],
        "student_logprob": [math.log(0.5), math.log(0.9), math.log(0.7), math.log(0.1)],
        "reverse_kl": [4.0, 2.0, 3.0, 9.0],
        "kept": [True, True, True, False],
    }
    write_records(tmp_path / "records" / "step-0", columns)
    first = plot_drift.first_step(tmp_path, [{"step": 0, "eval": 1}, {"step": 1, "grad_norm": 0.25}])
    assert first == pytest.approx({"gradient_norm": 0.25, "kept": 3, "student_probability": 0.7, "reverse_kl": 3.0})
