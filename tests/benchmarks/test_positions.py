"""What a loss leaves out, counted on a tiny model in the place of SmolLM2."""

import pytest
import torch
from tiny_smollm2 import write_tiny_pair

from benchmarks import positions
from benchmarks.table import TABLES


def test_fewer_kept_tokens_leave_more_out(tmp_path):
    write_tiny_pair(tmp_path)
    threads = torch.get_num_threads()
    result = positions.run_positions(tmp_path, 32, 12, batches=2, threads=threads, say=lambda line: None)
    shares = {
        name: (entry["without_rollouts"], entry["without_columns_too"]) for name, entry in result["rules"].items()
    }
    assert len(shares) == len(positions.ROWS)
    assert all(0 < both <= rows <= 1 for rows, both in shares.values())
    # a budget of each rollout leaves a token in each
    assert shares["soft_or 10% rollout"][0] == 1
    assert shares["soft_or 2% batch"] < shares["soft_or 10% batch"]
    assert shares["random 2% batch"][0] < 0.7
    table = TABLES["positions-smollm2"](result)
    assert "| `random` | 2 % | batch |" in table


def test_without_models_the_command_that_writes_them_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"run `python -m tipdistill\.tasks smollm2` first"):
        positions.run_positions(tmp_path)
