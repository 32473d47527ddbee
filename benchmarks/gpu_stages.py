"""What is measured in a lease of a GPU: one function a stage, run by `python -m benchmarks.gpu_lease`.

A stage takes its sizes and `flush`, to which it gives what it has so far, so that a stage that is stopped at its time
limit leaves that. Everything is drawn on the device. What needs a package that is not there is left out and says so.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tipdistill.loss import fused_divergence_loss, selected_loss
from tipdistill.provenance import environment
from tipdistill.score import token_scores
from tipdistill.select import select
from tipdistill.types import Head

from .head import HeadInputs, HeadSettings, HeadWork, Variant, measure, missing_peers, shown
from .measure import ROOT, Here, Worker, growth, kernels, peak_bytes, seconds_per_call, time_split, timed

Flush = Callable[[dict[str, Any]], None]

# Attributes of score/triton.py that choose between two ways of doing the same, and their values; the first is the one
# that the others are compared with. One that is not there is left out, by name. Most telling first: time may run out.
SWITCHES: tuple[tuple[str, str, tuple[Any, ...]], ...] = (
    ("share of the memory for held logits", "WORKSPACE_SHARE", (0.0125, 0.025, 0.0625)),
    ("gradients on two streams", "TWO_STREAMS", (False, True)),
    # tokens, columns, block and warps
    ("tile", "TILE", ((4096, 4096, 256, 1), (2048, 8192, 256, 1), (4096, 4096, 1024, 4), (8192, 4096, 256, 1))),
)
RULES = (("all", 1.0), ("soft_or", 0.5), ("soft_or", 0.1), ("entropy", 0.1))
# Bytes of each logit pair that a kernel must move, for half-precision inputs: tiles are float32, held logits float16.
BYTES_OF_PAIR = {
    ("entropy", "_online_kernel"): 4,  # of the student alone
    ("Soft-OR", "_online_kernel"): 8,
    ("jsd, hellinger", "_online_kernel"): 8 + 4,
    ("jsd, hellinger", "_second_kernel"): 4,
    ("fused loss", "_online_kernel"): 8 + 4,
    ("fused loss", "_gradient_kernel"): 4 + 2,
    ("scores and their backward", "_online_kernel"): 8,
    ("scores and their backward", "_gradient_kernel"): 8 + 2,
}

# random heads against one table of tolerances
OTHER_TESTS = tuple(name for name in ("tests/score/test_every_head.py",) if (ROOT / name).is_file())


@dataclass(frozen=True)
class Sizes:
    """How large the stages are.

    Attributes:
        head: of the head stage, of micro, profile and switches: the lm_heads of Qwen3-8B → 4B.
        rounds: timed runs of each variant.
        peers: what ours is held against, where it is installed.
        rules: rules and retentions of ours.
        values: of each switch, the first and so many more.
        errors: tokens, vocabulary and width of the heads whose gradients are held against float64.
        memory: tokens, and the vocabularies at which extra memory is counted.
        narrow: widths of the heads there.
        seconds: how long one matmul or copy is tried.
        copied: bytes of a copy.
        tests: what pytest is given.
        steps: timed training steps.
    """

    head: HeadSettings
    rounds: int = 8
    peers: tuple[str, ...] = ("trl", "plain")
    rules: tuple[tuple[str, float], ...] = RULES
    values: int = 9
    errors: tuple[int, int, int] = (512, 151_936, 2560)
    memory: tuple[int, tuple[int, ...]] = (65_536, (65_536, 131_072, 262_144))
    narrow: tuple[int, int] = (64, 128)
    seconds: float = 0.1
    copied: int = 2**30
    tests: tuple[str, ...] = ("-n", "8", "-m", "not slow", "tests/gpu", "tests/score/test_triton.py", *OTHER_TESTS)
    steps: int = 2

    @property
    def device(self) -> str:
        return self.head.device

    def present(self) -> list[str]:
        """The peers that can run here."""
        return [name for name in self.peers if name not in missing_peers(self.device)]


def sizes_of(dry_run: bool) -> Sizes:
    """Those of a lease, or tiny ones for a CPU, where the kernels are interpreted."""
    if not dry_run:
        return Sizes(HeadSettings(8192, 151_936, 2560, 4096, 1024, "bfloat16", "cuda"))
    return Sizes(
        HeadSettings(3, 97, 4, 6, 2, "bfloat16", "cpu"),
        rounds=1,
        peers=("plain",),
        rules=RULES[:2],
        values=1,
        errors=(2, 41, 4),
        memory=(2, (64, 128)),
        narrow=(4, 6),
        seconds=1e-4,
        copied=2**10,
        tests=(),
        steps=1,
    )


def versions(sizes: Sizes, flush: Flush) -> dict[str, Any]:
    """The machine, its clocks, the versions, and what is left out for lack of a package.

    Raises:
        ValueError: torch sees no GPU.
    """
    if sizes.device == "cpu":
        return {**environment("cpu", 1), "card": "cpu", "left_out": _left_out("cpu")}
    if not torch.cuda.is_available():
        raise ValueError("torch sees no GPU here. --dry_run tries every stage on the CPU, in tiny sizes.")
    properties = torch.cuda.get_device_properties(0)
    return {
        **environment("cuda", torch.get_num_threads()),
        "card": card_of(properties.name),
        "cuda": torch.version.cuda,
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "clocks": _clocks(),
        "left_out": _left_out("cuda"),
    }


def card_of(name: str) -> str:
    """What a result's file is called after.

    Example:
        >>> card_of("NVIDIA H100 80GB HBM3"), card_of("NVIDIA H200"), card_of("NVIDIA GeForce RTX 4090")
        ('h100-80gb-hbm3', 'h200', 'rtx-4090')
    """
    words = [word for word in re.findall(r"[a-z0-9.]+", name.lower()) if word not in ("nvidia", "geforce")]
    return "-".join(words) or "gpu"


def _left_out(device: str) -> dict[str, str]:
    left_out = {f"head: {peer}": reason for peer, reason in missing_peers(device).items()}
    left_out |= {f"switches: {name}": f"score/triton.py has no {attribute}" for name, attribute in _absent_switches()}
    missing = [package for package in ("trl", "datasets", "accelerate", "httpx2") if not find_spec(package)]
    if missing:
        left_out["step"] = f"{', '.join(missing)}: not installed"
    if not find_spec("pytest"):
        left_out["tests"] = "pytest is not installed"
    return left_out


def _absent_switches() -> Iterator[tuple[str, str]]:
    from tipdistill.score import triton as engine

    for name, attribute, _ in SWITCHES:
        if not hasattr(engine, attribute):
            yield name, attribute


def _clocks() -> dict[str, str]:
    asked = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu")
    command = ["nvidia-smi", f"--query-gpu={','.join(asked)}", "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return {"unknown": str(error)}
    return dict(zip(asked, (value.strip() for value in answer.split(",")), strict=False))


_OUTCOME = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b +(\S+::.+?)(?: +\[ *\d+%\])?$")
_OUTCOME_FIRST = re.compile(r"^(\S+::.+?) +(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")


def tests(sizes: Sizes, flush: Flush) -> dict[str, Any]:
    """The tests of the kernels, compiled: how many passed, which failed, and the last words of pytest."""
    if not find_spec("pytest"):
        return {"left_out": "pytest is not installed"}
    paths = [str(ROOT / "src"), str(ROOT / "tests"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with tempfile.TemporaryDirectory() as folder:
        arguments, cwd = list(sizes.tests), ROOT
        if not arguments:  # a dry run: that a pass, a failure and a skip are read
            cwd = Path(folder)
            (cwd / "test_some.py").write_text(
                "import pytest\n\ndef test_passes(): pass\n\ndef test_fails(): assert 1 == 2\n\n"
                "@pytest.mark.skip\ndef test_is_skipped(): pass\n"
            )
            arguments = ["--noconftest", "--rootdir", folder, folder]
            environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        if not find_spec("xdist") and "-n" in arguments:
            del arguments[arguments.index("-n") :][:2]
        command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--tb=line", *arguments]
        process = subprocess.Popen(
            command, cwd=cwd, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert process.stdout is not None
        return read_tests(_echoed(process.stdout), flush) | {"exit_code": process.wait()}


def _echoed(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        print(line, end="")
        yield line


def read_tests(output: Iterable[str], flush: Flush) -> dict[str, Any]:
    """What `pytest -v` says, test by test, with or without workers.

    Example:
        >>> said = ["[gw1] [ 50%] PASSED t.py::test_a[x-1] ", "t.py::test_b FAILED   [100%]", "= 1 failed, 1 passed ="]
        >>> result = read_tests(said, lambda result: None)
        >>> result["counts"], result["failed"], result["complete"]
        ({'PASSED': 1, 'FAILED': 1}, ['t.py::test_b'], True)
    """
    result: dict[str, Any] = {"counts": {}, "failed": [], "complete": False, "said": []}
    for raw in output:
        line = raw.strip()
        match = _OUTCOME_FIRST.search(line)
        outcome, name = (match[2], match[1]) if match else ("", "")
        if not match and (match := _OUTCOME.search(line)) and "[gw" in line:
            outcome, name = match[1], match[2]
        if outcome:
            result["counts"][outcome] = result["counts"].get(outcome, 0) + 1
            if outcome in ("FAILED", "ERROR"):
                result["failed"].append(name)
                flush(result)
            elif sum(result["counts"].values()) % 25 == 0:
                flush(result)
        else:
            if re.match(r"^=+ .*\b(passed|failed|skipped|error|deselected)", line):
                result["complete"] = True
            result["said"] = [*result["said"], line[:300]][-40:]
    return result


def micro(sizes: Sizes, flush: Flush) -> dict[str, Any]:
    """Rates of the matmuls (flop/s) and of copies (bytes/s), and the time of each kernel of ours in several cases."""
    inputs, device = HeadInputs(sizes.head), sizes.device
    result: dict[str, Any] = {"matmul": {}, "copy": {}, "kernels": {}}
    for name, multiply, flops in _matmuls(inputs):
        try:
            seconds = seconds_per_call(multiply, device, sizes.seconds)
            result["matmul"][name] = {"seconds": seconds, "flops_per_second": flops / seconds}
        except RuntimeError as error:  # a product that this torch does not have
            result["matmul"][name] = {"refused": _first_line(error)}
        flush(result)
    for name, copy, size in _copies(sizes):
        seconds = seconds_per_call(copy, device, sizes.seconds)
        result["copy"][name] = {"seconds": seconds, "bytes_per_second": size / seconds}
    flush(result)
    pairs = sizes.head.tokens * sizes.head.vocabulary
    for name, run in _kernel_cases(inputs).items():
        try:
            run()  # compiles
            seconds = timed(run, device)[0]
            taken = kernels(run, device) if device == "cuda" else []  # an interpreted kernel is no event
        except RuntimeError as error:
            result["kernels"][name] = {"refused": _first_line(error)}
            continue
        of_kernels = of_pairs(name, taken, pairs)
        result["kernels"][name] = {"seconds": seconds, "kernels": of_kernels}
        flush(result)
    return result


def of_pairs(case: str, taken: Iterable[tuple[str, int, float]], pairs: int) -> dict[str, dict[str, Any]]:
    """Calls, seconds and bytes/s of each of our kernels in a case, from `kernels`.

    Example:
        >>> of_pairs("Soft-OR", [("_online_kernel", 3, 2.0), ("Memcpy", 1, 9.0)], pairs=10)
        {'_online_kernel': {'calls': 3, 'seconds': 2.0, 'bytes_per_second': 40.0}}
    """
    found: dict[str, dict[str, Any]] = {}
    for kernel in dict.fromkeys(kernel for _, kernel in BYTES_OF_PAIR):
        own = [(calls, spent) for name, calls, spent in taken if name.startswith(kernel)]
        calls, seconds = sum(calls for calls, _ in own), sum(spent for _, spent in own)
        if calls:
            moved = BYTES_OF_PAIR.get((case, kernel))
            rate = None if moved is None or not seconds else moved * pairs / seconds
            found[kernel] = {"calls": calls, "seconds": seconds, "bytes_per_second": rate}
    return found


def _matmuls(inputs: HeadInputs) -> Iterator[tuple[str, Callable[[], Any], int]]:
    student, teacher = (head.hidden.detach() for head in (inputs.student, inputs.teacher))
    s_weight, t_weight = inputs.student.weight.detach(), inputs.teacher.weight.detach()
    tokens, vocabulary, quarter = len(student), len(s_weight), len(s_weight) // 4
    for rows, columns in dict.fromkeys(
        (min(rows, tokens), min(columns, vocabulary))
        for rows, columns in ((2048, 8192), (4096, 4096), (tokens, 8192), (tokens, quarter))
    ):
        for name, hidden, weight in (("student", student, s_weight), ("teacher", teacher, t_weight)):
            multiply = partial(_mm, hidden[:rows], weight[:columns].t())
            yield f"{name} {rows} x {columns}, float32 out", multiply, 2 * rows * columns * hidden.shape[1]
    multiply = partial(torch.mm, student, s_weight[:quarter].t())
    yield f"student {tokens} x {quarter}", multiply, 2 * tokens * quarter * student.shape[1]
    # random, as what is measured is: on equal numbers a GPU draws less power, and runs faster
    gradient = torch.randn(tokens, quarter, dtype=student.dtype, device=student.device)
    flops, total = 2 * tokens * quarter * student.shape[1], torch.zeros_like(student, dtype=torch.float32)
    yield "gradient of the hidden states", partial(_add_mm, total, gradient, s_weight[:quarter]), flops
    yield "gradient of the weight", partial(torch.mm, gradient.t(), student), flops
    total = torch.zeros(quarter, student.shape[1], device=student.device)
    yield "gradient of the weight, added in float32", partial(_add_mm, total, gradient.t(), student), flops


def _mm(left: Tensor, right: Tensor) -> Tensor:
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left.float(), right.float())


def _add_mm(total: Tensor, left: Tensor, right: Tensor) -> None:
    if left.is_cuda:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left.float(), right.float())


def _copies(sizes: Sizes) -> Iterator[tuple[str, Callable[[], Any], int]]:
    for name, size in (("large", sizes.copied), ("32 MiB, which a cache holds", min(sizes.copied, 2**25))):
        source = torch.ones(size // 4, device=sizes.device)
        yield f"copy, {name}", partial(torch.empty_like(source).copy_, source), 2 * size
        yield f"sum, {name}", source.sum, size


def _kernel_cases(inputs: HeadInputs) -> dict[str, Callable[[], Any]]:
    student, teacher = inputs.student, inputs.teacher
    frozen = Head(student.hidden.detach(), student.weight.detach())

    def scores(*fields: str, alone: bool = False) -> Any:
        return token_scores(frozen, None if alone else teacher, fields=fields, impl="triton")

    def fused() -> None:
        student.hidden.grad = student.weight.grad = None
        fused_divergence_loss(student, teacher, impl="triton").backward()

    def backward() -> None:
        student.hidden.grad = student.weight.grad = None
        token_scores(student, teacher, fields=["divergence"], impl="triton").require("divergence").sum().backward()

    return {
        "entropy": partial(scores, "entropy", alone=True),
        "Soft-OR": partial(scores, "entropy_norm", "reverse_kl"),
        "jsd, hellinger": partial(scores, "jsd", "hellinger"),
        "fused loss": fused,
        "scores and their backward": backward,
    }


def head(sizes: Sizes, flush: Flush) -> dict[str, Any]:
    """The head stage in one process, variants in turn: TRL, plain, all tokens at three workspaces, and the rules."""
    peers = [Variant(name) for name in sizes.present()]
    ours = [Variant("triton", *rule) for rule in sizes.rules]
    held = [Variant("triton", switches=switches) for switches in _switched("WORKSPACE_SHARE")[: sizes.values]]
    left_out = missing_peers(sizes.device)

    def whole(entries: dict[str, Any]) -> dict[str, Any]:
        return {"settings": asdict(sizes.head), "left_out": left_out, "variants": entries}

    # scored, chosen and differentiated with the logits made once: of the rules that read the teacher
    chosen = [Variant("triton", *rule, one_pass=True) for rule in sizes.rules if rule[0] == "soft_or"]
    variants = [*peers, *ours, *chosen, *held]
    return whole(measure(sizes.head, variants, sizes.rounds, print, lambda entries: flush(whole(entries)), Here))


def _switched(attribute: str) -> list[tuple[tuple[str, Any], ...]]:
    from tipdistill.score import triton as engine

    values = next(values for _, name, values in SWITCHES if name == attribute)
    return [((attribute, value),) for value in values] if hasattr(engine, attribute) else []


RATIOS = (0.01, 0.1, 1.0)
SPREADS = {"uncertain": 2.0, "peaky": 12.0}


def errors(sizes: Sizes, flush: Flush) -> dict[str, Any]:
    """Relative errors of the gradients against float64, at log-ratios of three sizes, uncertain and peaky.

    The teacher's lm_head is the student's and a little noise, so that log p/q has the standard deviation that is said.
    "rounding" is the error that is left where the exact gradient is rounded to the dtype of the weights.
    """
    result: dict[str, Any] = {"settings": dict(zip(("tokens", "vocabulary", "width"), sizes.errors, strict=True))}
    result["cases"] = {}
    for dtype in (torch.bfloat16, torch.float16):
        for logits, spread in SPREADS.items():
            for ratio in RATIOS:
                name = f"{str(dtype).removeprefix('torch.')}, {logits}, log-ratio {ratio:g}"
                try:
                    result["cases"][name] = _errors_of(sizes, dtype, spread, ratio)
                except RuntimeError as error:
                    result["cases"][name] = {"refused": _first_line(error)}
                flush(result)
    return result


def _errors_of(sizes: Sizes, dtype: torch.dtype, spread: float, ratio: float) -> dict[str, dict[str, float]]:
    tokens, vocabulary, width = sizes.errors
    generator = torch.Generator(sizes.device).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=sizes.device)
    hidden, weight = draw(tokens, width).to(dtype), draw(vocabulary, width).mul_(spread / width**0.5)
    noise = draw(vocabulary, width).mul_(ratio / width**0.5)
    heads = [Head(hidden, weight.to(dtype)), Head(hidden, (weight + noise).to(dtype))]
    del weight, noise
    exact = _gradients(_reference, *(Head(head.hidden.double(), head.weight.double()) for head in heads))
    ways: dict[str, Callable[[Head, Head], Tensor]] = {"fused loss": _fused, "scores and their backward": _scored}
    ways |= {name: {"plain": _plain, "trl": _of_trl}[name] for name in sizes.present()}
    errors = {"rounding": _distance([value.to(dtype) for value in exact], exact)}
    for name, loss in ways.items():
        errors[name] = _distance(_gradients(loss, *heads), exact)
    return errors


def _gradients(loss: Callable[[Head, Head], Tensor], student: Head, teacher: Head) -> list[Tensor]:
    hidden, weight = student.hidden.detach().requires_grad_(), student.weight.detach().requires_grad_()
    loss(Head(hidden, weight), teacher).backward()
    return [leaf.grad for leaf in (hidden, weight) if leaf.grad is not None]


def _distance(values: Sequence[Tensor], exact: Sequence[Tensor]) -> dict[str, float]:
    hidden, weight = ((value.double() - truth) for value, truth in zip(values, exact, strict=True))
    rows = hidden.norm(dim=1) / exact[0].norm(dim=1).clamp(min=1e-300)
    return {
        "hidden": float(hidden.norm() / exact[0].norm()),
        "weight": float(weight.norm() / exact[1].norm()),
        "worst row": float(rows.max()),
    }


def _reference(student: Head, teacher: Head) -> Tensor:
    log_s, log_t = (torch.log_softmax(head.hidden @ head.weight.T, -1) for head in (student, teacher))
    return (log_s.exp() * (log_s - log_t)).sum(-1).mean()


def _fused(student: Head, teacher: Head) -> Tensor:
    return fused_divergence_loss(student, teacher, impl="triton")


def _scored(student: Head, teacher: Head) -> Tensor:
    scores = token_scores(student, teacher, fields=["divergence"], impl="triton")
    return selected_loss(scores, select(scores, "all", 1.0))


def _plain(student: Head, teacher: Head) -> Tensor:
    log_s, log_t = (torch.log_softmax((head.hidden @ head.weight.T).float(), -1) for head in (student, teacher))
    return (log_s.exp() * (log_s - log_t)).sum(-1).mean()


def _of_trl(student: Head, teacher: Head) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    heads = (student.hidden, student.weight, None, teacher.hidden, teacher.weight, None)
    return ChunkedDivergenceFunction.apply(*heads, 1.0)[0].mean()


def memory(sizes: Sizes, flush: Flush) -> dict[str, Any]:
    """Extra memory of the head stage, without its gradients, at growing vocabularies and a fixed number of tokens."""
    tokens, vocabularies = sizes.memory
    cases: dict[str, Any] = {}
    result = {"settings": {"tokens": tokens, "widths": sizes.narrow, "vocabularies": vocabularies}, "cases": cases}
    for vocabulary in vocabularies:
        students, teachers = sizes.narrow
        settings = replace(
            sizes.head, tokens=tokens, vocabulary=vocabulary, student_width=students, teacher_width=teachers
        )
        inputs = HeadInputs(settings)
        for rule in sizes.rules:
            work = HeadWork(settings, Variant("triton", *rule), inputs)
            work.run()  # compiles
            work.forget()
            gradients = work.student.hidden.nbytes + work.student.weight.nbytes
            extra = peak_bytes(work.run, sizes.device) - gradients
            work.forget()
            name = Variant("triton", *rule).name
            case = cases.setdefault(name, {"extra_bytes": {}, "growth": None, "exponent": None})
            case["extra_bytes"][str(vocabulary)] = extra
        del inputs, work
        flush(result)
    for case in cases.values():
        peaks = list(case["extra_bytes"].values())
        if min(peaks) > 0:
            case["growth"], case["exponent"] = max(peaks) / min(peaks), growth(vocabularies, peaks)
    return result


def profile(sizes: Sizes, flush: Flush) -> dict[str, Any]:
    """What each variant spends its time on: its longest kernels, each counted once, and the time that none ran."""
    cases: dict[str, Any] = {}
    inputs, result = HeadInputs(sizes.head), {"settings": asdict(sizes.head), "cases": cases}
    for variant in [*(Variant("triton", *rule) for rule in sizes.rules), *map(Variant, sizes.present())]:
        work = HeadWork(sizes.head, variant, inputs)
        try:
            work.run()
            seconds = timed(work.run, sizes.device)[0]
            taken = kernels(work.run, sizes.device)
        except RuntimeError as error:
            cases[variant.name] = {"refused": _first_line(error)}
            continue
        work.forget()
        busy = sum(spent for _, _, spent in taken)
        cases[variant.name] = {
            "seconds": seconds,
            "busy_seconds": busy,
            "split": time_split(taken, sizes.device),
            "longest": [
                {"name": name[:120], "calls": calls, "seconds": spent, "share": spent / (busy or 1.0)}
                for name, calls, spent in taken[:12]
            ],
        }
        flush(result)
    return result


def step(sizes: Sizes, flush: Flush) -> dict[str, Any]:
    """A whole training step with random completions: TRL, all tokens, Soft-OR 0.5, plain; each in its own process."""
    try:
        from . import step as steps
    except ImportError as error:
        return {"left_out": f"it needs TRL's trainer: {error}"}
    settings = steps.PRESETS["tiny"]
    worker: type[Worker] | type[Here] = Here
    variants = [steps.StepVariant("trl"), steps.StepVariant("tip"), steps.StepVariant("tip", 0.5)]
    if sizes.device == "cpu":
        settings, variants = replace(settings, vocabulary=64, rollouts=2, completion=4), variants[::2]
    else:
        settings, worker = steps.settings_for(torch.cuda.get_device_properties(0).total_memory), Worker
        variants.append(steps.StepVariant("plain"))

    def whole(entries: dict[str, Any]) -> dict[str, Any]:
        return {"settings": asdict(settings), "variants": entries}

    return whole(
        steps.measure_steps(
            settings, variants, 1, sizes.steps, print, lambda entries: flush(whole(entries)), worker=worker
        )
    )


def switches(sizes: Sizes, flush: Flush) -> dict[str, Any]:
    """Each of SWITCHES on and off, in turn: all tokens and Soft-OR 0.5."""
    cases: dict[str, Any] = {}
    left_out = {name: f"score/triton.py has no {attribute}" for name, attribute in _absent_switches()}
    result = {"settings": asdict(sizes.head), "left_out": left_out, "cases": cases}
    for name, attribute, all_values in SWITCHES:
        if name in left_out:
            continue
        values = all_values[: 1 + sizes.values]
        variants = [Variant("triton", *rule, ((attribute, value),)) for rule in RULES[:2] for value in values]
        entries = measure(sizes.head, variants, min(sizes.rounds, 5), print, worker=Here)
        rules: dict[str, Any] = {}
        cases[name] = {"attribute": attribute, "rules": rules}
        for rule in RULES[:2]:
            of_values = [entries[Variant("triton", *rule, ((attribute, value),)).name] for value in values]
            first = of_values[0].get("seconds", {}).get("median")
            rules[Variant("triton", *rule).name] = {
                shown(value): {
                    "seconds": entry["seconds"]["median"],
                    "over_first": None if first is None else entry["seconds"]["median"] / first,
                    "extra_bytes": entry["extra_bytes"],
                }
                if "seconds" in entry
                else {"refused": entry.get("refused")}
                for value, entry in zip(values, of_values, strict=True)
            }
        flush(result)
    return result


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


STAGES: dict[str, Callable[[Sizes, Flush], dict[str, Any]]] = {
    stage.__name__: stage for stage in (versions, tests, micro, head, errors, memory, profile, step, switches)
}
