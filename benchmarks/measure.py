"""What every benchmark shares: processes that take turns, the machine and versions, time, memory, the matmul rate."""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NoReturn

import torch

from tipdistill import files
from tipdistill.documents import read_json
from tipdistill.score import tiles

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
START_METHOD = "spawn"  # of processes that share no memory


class Worker:
    """A process that builds one piece of work and then does what it is asked, so that variants share no memory."""

    def __init__(self, build: Callable[..., Any], *arguments: Any) -> None:
        context: Any = multiprocessing.get_context(START_METHOD)
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, build, arguments), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, command: str) -> Any:
        """The answer of the work's method `command`.

        Raises:
            RuntimeError: the method raised, or the process died.
        """
        try:
            self._connection.send(command)
            done, answer = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join()
            raise RuntimeError(f"the process ended with exit code {self._process.exitcode}") from error
        if not done:
            raise RuntimeError(answer)
        return answer

    def close(self) -> None:
        self._connection.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()


class Here:
    """Like `Worker`, in this process: on a GPU, where one process at a time holds memory and the variants share it."""

    def __init__(self, build: Callable[..., Any], *arguments: Any) -> None:
        self._build, self._arguments, self._work = build, arguments, None

    def ask(self, command: str) -> Any:
        """The answer of the work's method `command`; RuntimeError where it raised."""
        failure = None
        try:
            self._work = self._build(*self._arguments) if self._work is None else self._work
            return getattr(self._work, command)()
        except Exception:  # it is raised below
            failure = traceback.format_exc(limit=-3)
        finally:
            self._free()
        # out of the handler, so that nothing holds on to the tensors of what failed
        raise RuntimeError(failure)

    def close(self) -> None:
        self._work = None
        self._free()

    def _free(self) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def _serve(connection: Any, build: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    work = None
    while True:
        try:
            command = connection.recv()
        except EOFError:
            return
        try:
            work = build(*arguments) if work is None else work
            connection.send((True, getattr(work, command)()))
        except Exception:
            connection.send((False, traceback.format_exc(limit=-3)))
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # the other variants' processes share the device


def timed(run: Callable[[], Any], device: str) -> tuple[float, float, Any]:
    """Wall-clock and processor seconds of one run, and what it returned."""
    if device == "cuda":
        torch.cuda.synchronize()
    wall, processor = time.perf_counter(), time.process_time()
    returned = run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - processor, returned


def peak_bytes(run: Callable[[], Any], device: str) -> int:
    """The most memory, in bytes, that tensors allocated by one run held at once, its gradients included."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak


_KINDS = {
    "matmul": ("mm", "addmm", "addmm_", "_linear_pointwise", "bmm"),
    "exponential": ("exp", "exp_", "exp2", "exp2_", "_log_softmax", "_log_softmax_backward_data", "tanh_"),
}
# Parts of the names of a GPU's kernels: cuBLAS's and CUTLASS's; then what reads logits, ours and TRL's in Triton.
_KINDS_OF_KERNELS = {
    "matmul": ("gemm", "nvjet", "cutlass", "xmma", "splitkreduce"),
    "exponential": (
        *("softmax", "exp", "_online_kernel", "_second_kernel", "_gradient_kernel"),
        *("_stats_kernel", "_backward_kernel"),
    ),
}


def kernels(run: Callable[[], Any], device: str) -> list[tuple[str, int, float]]:
    """(name, calls, seconds) of what one run spent its time on, longest first, each counted once.

    On a GPU these are its kernels and copies; on a CPU torch's operations, without those that they call.

    Example:
        >>> kernels(lambda: torch.randn(64, 64) @ torch.randn(64, 64), "cpu")[0][1] > 0
        True
    """
    with torch.profiler.profile() as profile:
        run()
        if device == "cuda":
            torch.cuda.synchronize()
    return counted_once(profile.key_averages(), device)


def counted_once(events: Iterable[Any], device: str) -> list[tuple[str, int, float]]:
    """As `kernels`, from a profile's averaged events.

    On a GPU a profile holds a kernel twice, as itself and as the device's time of the operation that launched it. A
    kernel that no operation launched, as Triton's are, is there once, and so kernels are what is counted.
    """
    of_device = torch.autograd.DeviceType.CUDA if device == "cuda" else torch.autograd.DeviceType.CPU
    taken = []
    for event in events:
        if event.device_type != of_device or getattr(event, "is_user_annotation", False):
            continue
        microseconds = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        taken.append((event.key, event.count, microseconds / 1e6))
    return sorted(taken, key=lambda kernel: -kernel[2])


def time_split(taken: Sequence[tuple[str, int, float]], device: str) -> dict[str, float]:
    """Shares of the time of `kernels` by kind: matmul, exponential, other (passes and the rest).

    Example:
        >>> split = time_split(kernels(lambda: torch.randn(64, 64) @ torch.randn(64, 64), "cpu"), "cpu")
        >>> sorted(split), round(sum(split.values()), 6)
        (['exponential', 'matmul', 'other'], 1.0)
    """
    seconds = dict.fromkeys((*_KINDS, "other"), 0.0)
    for name, _, spent in taken:
        seconds[_kind(name, device)] += spent
    total = sum(seconds.values()) or 1.0
    return {kind: spent / total for kind, spent in seconds.items()}


def _kind(name: str, device: str) -> str:
    if device == "cuda":
        lower = name.lower()
        return next((kind for kind, parts in _KINDS_OF_KERNELS.items() if any(p in lower for p in parts)), "other")
    name = name.rsplit("::", 1)[-1]
    return next((kind for kind, names in _KINDS.items() if name in names), "other")


def matmul_rate(hidden: torch.Tensor, weight: torch.Tensor, seconds: float = 0.05) -> float:
    """Flops per second of tiles of a projection, by whichever of torch's matmuls is faster here.

    Args:
        hidden: [N, H].
        weight: [V, H].
        seconds: how long each is tried.

    Example:
        >>> matmul_rate(torch.randn(8, 4), torch.randn(16, 4), seconds=0.001) > 0
        True
    """
    tokens, columns = (4096, 16384) if hidden.is_cuda else (512, 512)
    left, right = hidden.detach()[:tokens], weight.detach()[:columns]
    flops = 2 * len(left) * len(right) * left.shape[1]
    ways = (lambda: torch.mm(left, right.t()), lambda: tiles.project(left, right))
    return max(flops / seconds_per_call(multiply, left.device.type, seconds) for multiply in ways)


def seconds_per_call(run: Callable[[], Any], device: str, seconds: float = 0.05) -> float:
    """The time of one of many calls, with as few looks at the clock as can be: each empties a GPU's queue.

    Args:
        run: what is timed, after one call that is not.
        device: "cpu" or "cuda".
        seconds: how long the batch that counts takes at least.

    Example:
        >>> 0 < seconds_per_call(lambda: sum(range(100)), "cpu", 1e-4) < 1e-3
        True
    """
    run()
    batch = 1
    while True:
        taken = timed(partial(_repeat, run, batch), device)[0]
        if taken >= seconds:
            return taken / batch
        batch = max(2 * batch, min(64 * batch, math.ceil(1.2 * batch * seconds / max(taken, 1e-9))))


def _repeat(run: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        run()


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles.

    Example:
        >>> spread([1.0, 2.0, 3.0])
        {'median': 2.0, 'low': 1.0, 'high': 3.0, 'runs': 3}
    """
    low, _, high = quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return {"median": median(values), "low": low, "high": high, "runs": len(values)}


def growth(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Exponent k of value ~ size^k by least squares in logarithms.

    Example:
        >>> growth([1, 10, 100], [2, 20, 200])
        1.0
    """
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
    return round(slope, 3)


def write(path: Path, result: Any, digits: int = 4) -> Path:
    """Write a result as JSON with so many digits of each fraction, in full or not at all; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return files.write_text(path, json.dumps(rounded(result, digits), indent=1) + "\n")


def evaluated_tasks(directory: Path) -> dict[str, dict[str, Any]]:
    """Each task's figures, by its name, from a directory that `tipdistill eval` wrote.

    Raises:
        ValueError: no evaluation there, or a damaged one.
    """
    try:
        return read_json(directory / "metrics.json")["tasks"]
    except FileNotFoundError:
        command = f"tipdistill eval --output_dir {directory}"
        raise ValueError(f"{directory} has no metrics.json: {command} writes it.") from None


def rounded(value: Any, digits: int) -> Any:
    """The same with so many digits of every float inside.

    Example:
        >>> rounded({"a": [1 / 3, 12345.678], "n": 12345}, 4)
        {'a': [0.3333, 12350.0], 'n': 12345}
    """
    if isinstance(value, Mapping):
        return {key: rounded(entry, digits) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(entry, digits) for entry in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


# What every command shares.


def parser(module: str, text: str | None) -> argparse.ArgumentParser:
    """A parser for `python -m benchmarks.MODULE`.

    Args:
        module: its name after the package's.
        text: its docstring, of which the first paragraph is shown.
    """
    description = (text or "").split("\n\n")[0]
    return argparse.ArgumentParser(prog=f"python -m benchmarks.{module}", description=description, allow_abbrev=False)


@contextmanager
def stored_bytes(model: Any) -> Iterator[Callable[[], int]]:
    """A function that says how many bytes autograd has stored meanwhile: each storage once, the model's weights not.

    Args:
        model: a module.
    """
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(sizes.values())


def run(
    module: str,
    measurement: Callable[..., dict[str, Any]],
    options: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
) -> int:
    """Measure with the options that are given, write the result, say where it is; 1 where a variant was refused.

    Args:
        module: as in `parser`; the file is named after it and the result's "preset".
        measurement: takes the options by name.
        options: the parser of what the measurement takes; --output is added here.
        argv: the arguments; None: the process's own.
    """
    options.add_argument("--output", type=Path, help=f"the JSON file (default benchmarks/results/{module}-NAME.json)")
    given = {name: value for name, value in vars(options.parse_args(argv)).items() if value is not None}
    output = given.pop("output", None)
    result = measurement(**given)
    path = write(output or RESULTS / f"{module}-{result['preset']}.json", result)
    refused = [name for name, entry in result.get("variants", {}).items() if "refused" in entry]
    print(f"written: {path}" + (f"; refused: {', '.join(refused)}" if refused else ""))
    return 1 if refused else 0


def end(main: Callable[[], int | None]) -> NoReturn:
    """Run a command on the process's arguments and end with its code: 2 and one line where it refuses them."""
    try:
        code = main() or 0
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).stem}: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    raise SystemExit(code)
