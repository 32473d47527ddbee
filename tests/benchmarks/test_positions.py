"""What a loss leaves out, counted on a tiny model in the place of SmolLM2."""

import pytest
import torch
from tiny_smollm2 import write_tiny_pair
from transformers import AutoModelForCausalLM

from benchmarks import positions
from benchmarks.table import TABLES
from tipdistill.types import Rollout


def test_fewer_kept_tokens_leave_more_out(tmp_path):
    write_tiny_pair(tmp_path)
    threads = torch.get_num_threads()
    result = positions.run_positions(tmp_path, 32, 12, batches=2, threads=threads, say=lambda line: None)
    shares = {
        name: (entry["without_rollouts"], entry["without_columns_too"]) for name, entry in result["rules"].items()
    }
    assert len(shares) == len(positions.ROWS)
    assert all(0 < entry["time"] < 5 for entry in result["rules"].values())
    assert all(0 < both <= rows <= 1 for rows, both in shares.values())
    # a budget of each rollout leaves a token in each
    assert shares["soft_or 10% rollout"][0] == 1
    assert shares["soft_or 2% batch"] < shares["soft_or 10% batch"]
    assert shares["random 2% batch"][0] < 0.7
    table = TABLES["positions-smollm2"](result)
    assert "| `random` | 2 % | batch |" in table


def test_what_is_left_has_the_gradient_of_the_whole(tmp_path, monkeypatch):
    """Or the two times would not be of the same work."""
    write_tiny_pair(tmp_path)
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "models" / role).eval() for role in ("student", "teacher")
    )
    rollouts = [Rollout(row, "", (5,) * (1 + row), tuple(range(6, 10 + row)), True) for row in range(4)]
    kept = torch.zeros(sum(len(rollout.completion_ids) for rollout in rollouts), dtype=torch.bool)
    kept[[1, 2, 5]] = True
    gradients = []

    def taken():
        if weight.grad is not None:
            gradients.append(weight.grad.clone())
        return 0.0

    weight = student.get_input_embeddings().weight
    monkeypatch.setattr(positions.time, "perf_counter", taken)
    (batch,) = positions.micro_batches(rollouts, kept)
    assert positions.seconds(student, teacher, *batch) == (0.0, 0.0)
    whole, left = gradients
    assert whole.abs().max() > 0
    torch.testing.assert_close(left, whole)


def test_without_models_the_command_that_writes_them_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"run `python -m tipdistill\.tasks smollm2` first"):
        positions.run_positions(tmp_path)
