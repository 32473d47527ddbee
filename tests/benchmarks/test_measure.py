import json
import os
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

from benchmarks import measure
from benchmarks.measure import Here, Worker, counted_once, growth, kernels, matmul_rate, peak_bytes, time_split, write


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
    taken = kernels(lambda: [function(value) for _ in range(10)], "cpu")
    assert time_split(taken, "cpu")["exponential"] > 0.3


def event(key, device, milliseconds, **more):
    # a profile's averaged event: the device's time stands on the operation that launched a kernel, and on the kernel
    values = {"count": 1, "self_device_time_total": 1e3 * milliseconds, "is_user_annotation": False} | more
    return SimpleNamespace(key=key, device_type=device, **values)


def test_a_kernel_is_counted_once_and_not_with_the_operation_that_launched_it():
    cpu, gpu = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA
    events = [
        event("aten::mm", cpu, 6.0),
        event("nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_NTT", gpu, 6.0, count=3),
        event("aten::copy_", cpu, 1.0),
        event("Memcpy DtoD (Device -> Device)", gpu, 1.0),
        event("_online_kernel", gpu, 3.0),  # Triton's, which no operation launches
        event("step", gpu, 10.0, is_user_annotation=True),
    ]
    taken = counted_once(events, "cuda")
    assert taken[0] == ("nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_NTT", 3, pytest.approx(6e-3))
    assert sum(seconds for _, _, seconds in taken) == pytest.approx(10e-3)
    assert time_split(taken, "cuda") == pytest.approx({"matmul": 0.6, "exponential": 0.3, "other": 0.1})


def test_the_matmul_rate_looks_at_the_clock_between_batches(monkeypatch):
    """A look empties a GPU's queue: half a millisecond of it, once for 50 milliseconds of work."""
    looks, calls = [], []

    def timed(run, device):
        before = len(calls)
        run()
        looks.append(len(calls) - before)
        return 5e-4 * looks[-1], 0.0, None

    monkeypatch.setattr(measure, "timed", timed)
    monkeypatch.setattr(measure, "_repeat", lambda run, times: calls.extend([None] * times))
    assert matmul_rate(torch.randn(64, 32), torch.randn(64, 32)) == pytest.approx(2 * 64 * 64 * 32 / 5e-4)
    assert looks == [1, 64, 128] * 2


def test_work_in_this_process_fails_as_that_of_a_worker_does():
    here = Here(import_module, "os")
    assert here.ask("getpid") == os.getpid()
    with pytest.raises(RuntimeError, match="TypeError"):
        here.ask("remove")
