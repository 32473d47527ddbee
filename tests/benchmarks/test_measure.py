import json
import os
from importlib import import_module

import pytest
import torch

from benchmarks.measure import Worker, growth, matmul_rate, peak_bytes, time_split, write


@pytest.mark.slow
def test_work_is_done_in_a_process_of_its_own():
    worker = Worker(import_module, "os")  # the module stands for the work, its functions for the methods
    try:
        process = worker.ask("getpid")
        assert process != os.getpid()
        with pytest.raises(RuntimeError, match="TypeError"):
            worker.ask("remove")
        assert worker.ask("getpid") == process
        with pytest.raises(RuntimeError, match="exit code -6"):
            worker.ask("abort")
    finally:
        worker.close()


def test_peak_memory_counts_what_is_held_at_once():
    def run():
        torch.zeros(1000, 1000)
        kept = torch.zeros(500, 1000)
        return kept + 1

    assert 4_000_000 <= peak_bytes(run, "cpu") < 4_100_000


def test_growth_is_the_exponent():
    assert growth([10, 100, 1000], [3, 300, 30_000]) == 2
    assert growth([1, 2, 4], [5, 5, 5]) == 0


def test_the_matmul_rate_is_that_of_a_projection():
    assert 1e8 < matmul_rate(torch.randn(64, 32), torch.randn(64, 32), seconds=0.01) < 1e14


def test_a_result_is_written_in_full_with_four_digits(tmp_path):
    path = tmp_path / "new" / "r.json"
    write(path, {"a": 1 / 3, "b": [{"c": 12345.678}], "n": 2, "none": None})
    assert json.loads(path.read_text()) == {"a": 0.3333, "b": [{"c": 12350.0}], "n": 2, "none": None}
    assert [entry.name for entry in path.parent.iterdir()] == ["r.json"]


@pytest.mark.parametrize("function", [torch.exp, torch.exp2, torch.Tensor.exp2_])
def test_every_exponential_counts_as_one(function):
    value = torch.randn(512, 512)
    assert time_split(lambda: [function(value) for _ in range(10)], "cpu")["exponential"] > 0.3
