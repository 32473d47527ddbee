"""Where the backward through kept positions loses its gradient, on a tiny model in the place of SmolLM2."""

import json

import pytest
import torch
from tiny_smollm2 import write_tiny_pair

from benchmarks import kept_where, measure
from benchmarks.smollm2 import micro_batches, read_pair
from benchmarks.table import TABLES
from tipdistill.types import Rollout


def test_the_more_is_differentiated_the_nearer_is_the_gradient(tmp_path):
    write_tiny_pair(tmp_path)
    result = kept_where.run_where(tmp_path, prompts=8, tokens=10, threads=1, say=lambda line: None)
    assert len(result["rows"]) == len(kept_where.ROWS) * len(kept_where.DIFFERENTIATED)
    rows = {(row["rule"], row["retention"], row["differentiated"]): row for row in result["rows"]}
    for rule, retention, _ in kept_where.ROWS:
        alone, near, prompt, completion, everything = (
            rows[rule, retention, name] for name in kept_where.DIFFERENTIATED
        )
        # every position is the full gradient, in every layer
        assert everything["positions"] == 1
        figures = [everything[name] for name in ("cosine", "norm", *kept_where.THIRDS)]
        assert figures == pytest.approx([1] * 5, abs=1e-5)
        for more in (near, prompt, completion):
            assert alone["positions"] < more["positions"] < 1
        assert 0 < alone["cosine"] < 1 - 1e-4
        # the last layer's keys and values alone are cut there, and more than these in the layers before it
        assert alone["first"] < alone["last"]
    table = TABLES["kept_where-smollm2"](result)
    assert table.count("| all positions |") == len(kept_where.ROWS)


def test_where_every_token_is_kept_the_completion_adds_no_position(tmp_path):
    _, student, teacher = read_pair(write_tiny_pair(tmp_path), torch.get_num_threads())
    rollouts = [Rollout(row, "", (5,) * (1 + row), tuple(range(6, 10 + row)), True) for row in range(3)]
    (batch,) = micro_batches(rollouts, torch.ones(4 + 5 + 6))
    figures = kept_where.of_micro_batch(student, teacher, *batch)
    # each token by the position before it, of all tokens of prompts and completions
    assert figures["kept positions"]["positions"] == figures["and the completion"]["positions"] == 15 / 21


def test_without_models_the_command_that_writes_them_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"run `python -m tipdistill\.tasks smollm2` first"):
        kept_where.run_where(tmp_path)


def test_what_the_page_says_of_the_language_model_is_in_its_file():
    result = json.loads((measure.RESULTS / "kept_where-smollm2.json").read_text(encoding="utf-8"))
    for first in range(0, len(result["rows"]), len(kept_where.DIFFERENTIATED)):
        alone, near, prompt, *_ = result["rows"][first : first + len(kept_where.DIFFERENTIATED)]
        lost = 1 - alone["cosine"]
        assert 0.4 < (prompt["cosine"] - alone["cosine"]) / lost < 0.7  # "about half"
        assert (near["cosine"] - alone["cosine"]) / lost > 0.3  # "a third or more"
        assert alone["last"] > 0.87 > max(alone["first"], alone["middle"])
