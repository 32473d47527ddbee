"""Score + select + loss of two lm_heads, forward and backward: ours, plain PyTorch, TRL's, Liger's, on the same inputs.

Ours is what a training step does: statistics of all tokens without gradients, then the fused loss of the
kept rows. "One pass" is what it does where tokens are chosen in the loss: both at once. On
a CPU every variant has a process of its own; on a GPU one process holds the inputs, which are drawn there, and the
variants share them. Rounds go through all of them in turn, and a ratio is the median over rounds of what two variants
took in the same round, so that a machine that is busy for a while is busy for both. A variant that does not agree with
the float64 reference is refused: it has no time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch
from torch import Tensor

from tipdistill.loss import fused_divergence_loss, fused_selected_loss
from tipdistill.provenance import environment
from tipdistill.score import IMPLEMENTATIONS, token_scores
from tipdistill.select import RULES, kept_counts, needs_teacher, rule_fields, running_of, select
from tipdistill.text import check_known
from tipdistill.types import Head, Selection, TokenScores

from . import measure as measuring
from .measure import Here, Worker, growth, kernels, matmul_rate, peak_bytes, spread, time_split, timed

# Those of training/monitor.py, which takes seconds to import.
LOGGED_FIELDS = ("entropy", "entropy_norm", "reverse_kl")
PEERS = ("plain", "trl", "liger")
RETENTIONS = (0.5, 0.2, 0.1)
# Relative errors against float64 from the same inputs: loss and Frobenius norm of the gradients. Float32 sums of 10⁵
# terms lose two or three of seven digits; bf16 gradients are rounded to 2⁻⁹, and a peer with bf16 logits loses more.
TOLERANCES = {"float32": 1e-4, "bfloat16": 3e-2}
# Scores closer than this may be ranked either way by a float32 score.
RANKING_TOLERANCE = 1e-4
# Elements of the reference's float64 tensors, so that its many steps do not each map fresh memory.
REFERENCE_ELEMENTS = {"cpu": 3 * 2**20, "cuda": 2**27}


@dataclass(frozen=True)
class HeadSettings:
    """Sizes of the two heads, and how they are run.

    Attributes:
        tokens, vocabulary, student_width, teacher_width: N, V, H_S and H_T.
        rollout_length: tokens of one rollout, inside which the budget is spent.
        dtype: of hidden states and weights, a key of TOLERANCES.
        device: "cpu" or "cuda".
        threads: torch's threads on the CPU.
    """

    tokens: int = 1024
    vocabulary: int = 50_000
    student_width: int = 512
    teacher_width: int = 1024
    rollout_length: int = 128
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1

    def __post_init__(self) -> None:
        check_known("dtype", self.dtype, TOLERANCES)
        check_known("device", self.device, ("cpu", "cuda"))
        for name in ("tokens", "vocabulary", "student_width", "teacher_width", "rollout_length", "threads"):
            if getattr(self, name) < (2 if name == "vocabulary" else 1):
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("this preset needs a GPU, and torch sees none here. On the CPU: --preset cpu.")


_QWEN3 = {"vocabulary": 151_936, "student_width": 2560, "teacher_width": 4096, "rollout_length": 1024} | {
    "dtype": "bfloat16",
    "device": "cuda",
}
PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {},
    "qwen3-4k": {**_QWEN3, "tokens": 4096},
    "qwen3-8k": {**_QWEN3, "tokens": 8192},
    "qwen3-16k": {**_QWEN3, "tokens": 16384},
    "qwen3-32k": {**_QWEN3, "tokens": 32768},
    "scaling": {"student_width": 256, "teacher_width": 512},
}
SCALING = {"tokens": (256, 512, 1024, 2048), "vocabulary": (8192, 16384, 32768, 65536)}
SCALING_FIXED = {"tokens": 512, "vocabulary": 16384}


@dataclass(frozen=True)
class Variant:
    """One way of doing the work: a peer, or an engine of ours with a rule and a retention.

    Attributes:
        engine: of PEERS, or an `impl` of ours.
        rule, retention: what is selected.
        one_pass: each rollout's tokens are chosen while their logits are held, with the scales of the step before.
        switches: (attribute, value) pairs of score/triton.py that hold while it runs.

    Example:
        >>> Variant("triton", "soft_or", 0.5, (("TWO_STREAMS", True),)).name
        'triton soft_or 0.5, TWO_STREAMS=True'
    """

    engine: str
    rule: str = "all"
    retention: float = 1.0
    switches: tuple[tuple[str, Any], ...] = ()
    one_pass: bool = False

    @property
    def name(self) -> str:
        name = self.engine if self.rule == "all" else f"{self.engine} {self.rule} {self.retention:g}"
        name += ", one pass" if self.one_pass else ""
        return name + "".join(f", {attribute}={shown(value)}" for attribute, value in self.switches)

    def floor(self, width_ratio: float) -> float:
        """Matmuls that cannot be left out, in student projections (2·N·V·H_S flops); width_ratio = H_T / H_S.

        Example:
            >>> Variant("chunked").floor(2.0), Variant("chunked", "entropy", 0.1).floor(2.0), Variant("trl").floor(2.0)
            (5.0, 1.5, 8.0)
            >>> Variant("chunked", "soft_or", 0.1, one_pass=True).floor(2.0)
            3.2
        """
        whole = 3 + width_ratio
        if self.engine == "trl":
            return 2 * (1 + width_ratio) + 2
        if self.rule == "all":
            return whole
        if self.one_pass:
            return 1 + width_ratio + self.retention * 2
        return 1 + (width_ratio if needs_teacher(self.rule) else 0) + self.retention * whole


def shown(value: Any) -> str:
    """A switch's value in words.

    Example:
        >>> shown(0.0625), shown((4096, 4096, 256, 1)), shown(False)
        ('0.0625', '4096 x 4096 x 256 x 1', 'False')
    """
    return " x ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def variants_of(device: str) -> list[Variant]:
    """Every variant that can run on a device, with the packages that are here.

    Example:
        >>> [variant.name for variant in variants_of("cpu") if variant.engine != "trl"][:3]
        ['plain', 'chunked', 'chunked soft_or 0.5']
    """
    peers = [Variant(name) for name in PEERS if name not in missing_peers(device)]
    engines = [name for name in ("chunked", "triton") if name in IMPLEMENTATIONS]
    engines = [name for name in engines if name == "chunked" or device == "cuda"]
    rules = [("all", 1.0), *((rule, retention) for rule in ("soft_or", "entropy") for retention in RETENTIONS)]
    held = [Variant(engine, "soft_or", share, one_pass=True) for engine in engines for share in RETENTIONS]
    return peers + [Variant(engine, *rule) for engine in engines for rule in rules] + held


def missing_peers(device: str) -> dict[str, str]:
    """The peers that cannot run here, and why.

    Example:
        >>> missing_peers("cpu")["liger"]
        'it needs a GPU'
    """
    packages = {"trl": "trl", "liger": "liger_kernel"}
    missing = {peer: f"{package} is not installed" for peer, package in packages.items() if not find_spec(package)}
    return missing if device == "cuda" else missing | {"liger": "it needs a GPU"}


@contextmanager
def switched(switches: Iterable[tuple[str, Any]]) -> Iterator[None]:
    """score/triton.py with other values of some of its attributes meanwhile; a tuple is the fields of a tile."""
    switches = tuple(switches)
    if not switches:
        yield
        return
    from tipdistill.score import triton as engine

    before = [(attribute, getattr(engine, attribute)) for attribute, _ in switches]
    try:
        for attribute, value in switches:
            setattr(engine, attribute, engine.Tile(*value) if isinstance(value, tuple) else value)
        yield
    finally:
        for attribute, value in before:
            setattr(engine, attribute, value)


class HeadInputs:
    """The heads of both models [N, H] and [V, H], drawn on the device, and each token's rollout, int64 [N]."""

    def __init__(self, settings: HeadSettings) -> None:
        device, dtype = settings.device, getattr(torch, settings.dtype)
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device, dtype=dtype).mul_(scale)

        # logits with a standard deviation of 2, as uncertain as those of a language model
        students, teachers = settings.student_width, settings.teacher_width
        hidden, weight = draw(settings.tokens, students), draw(settings.vocabulary, students, scale=2 / students**0.5)
        teacher_weight = draw(settings.vocabulary, teachers, scale=2 / teachers**0.5)
        self.student = Head(hidden.requires_grad_(), weight.requires_grad_())
        self.teacher = Head(draw(settings.tokens, teachers), teacher_weight)
        self.rollout = torch.arange(settings.tokens, device=device) // settings.rollout_length


class HeadWork:
    """One variant, and what is asked about it.

    Args:
        settings: sizes.
        variant: what is measured.
        inputs: those of `settings` where variants share them; None: its own.
    """

    def __init__(self, settings: HeadSettings, variant: Variant, inputs: HeadInputs | None = None) -> None:
        torch.set_num_threads(settings.threads)
        self.settings, self.variant = settings, variant
        inputs = HeadInputs(settings) if inputs is None else inputs
        self.student, self.teacher, self.rollout = inputs.student, inputs.teacher, inputs.rollout
        self.everything = torch.tensor(float(settings.tokens), device=settings.device)
        if variant.one_pass:
            with torch.no_grad():
                before = token_scores(self.student, self.teacher, fields=rule_fields(variant.rule))
            self.running = running_of(before, variant.rule, variant.retention, self.rollout)
            self.lengths = self.rollout.unique(return_counts=True)[1].tolist()
            kept = kept_counts(torch.tensor(self.lengths), variant.retention, variant.rule).sum()
            self.kept = kept.to(settings.device, torch.float32)
        self.work: Callable[[], tuple[Tensor, Tensor | None]] = {
            "plain": self._plain,
            "trl": self._trl,
            "liger": self._liger,
        }.get(variant.engine, self._ours)

    def run(self) -> tuple[Tensor, Tensor | None]:
        """One forward and backward; the loss, and the mask of what was selected."""
        self.forget()
        with switched(self.variant.switches):
            loss, mask = self.work()
            loss.backward()
        return loss.detach(), mask

    def forget(self) -> None:
        """Let go of the gradients, which count as memory of the run that makes them."""
        self.student.hidden.grad = self.student.weight.grad = None

    def round(self) -> dict[str, float]:
        """One timed run, and the rate of the machine's matmuls right before it."""
        if self.settings.device == "cuda":
            self.run()  # memory was given back to the other variants, and is claimed again before the clock starts
        rate = matmul_rate(self.student.hidden, self.student.weight)
        seconds, processor, _ = timed(self.run, self.settings.device)
        self.forget()
        return {"seconds": seconds, "processor_seconds": processor, "matmul_rate": rate}

    def memory(self) -> dict[str, Any]:
        """Bytes that one run takes and that its gradients are, and the shares of its time by kind of operation."""
        split = time_split(kernels(self.run, self.settings.device), self.settings.device)
        self.forget()
        gradients = self.student.hidden.nbytes + self.student.weight.nbytes
        extra = peak_bytes(self.run, self.settings.device)
        self.forget()
        return {"extra_bytes": extra, "gradient_bytes": gradients, "time_split": split}

    def errors(self) -> dict[str, float]:
        """Relative errors of loss and gradients against float64, and the share of tokens that were ranked wrongly."""
        loss, mask = self.run()
        gradients = [self.student.hidden.grad, self.student.weight.grad]
        self.forget()
        student, teacher = _double(self.student), _double(self.teacher)
        misranked = 0.0
        if mask is None:
            mask = torch.ones_like(self.rollout, dtype=torch.bool)
        else:
            misranked = _misranked(self.variant, student, teacher, self.rollout, mask)
        student.hidden.requires_grad_(), student.weight.requires_grad_()
        truth = torch.zeros((), dtype=torch.float64, device=loss.device)
        for rows in mask.nonzero()[:, 0].split(_reference_rows(student)):
            scores = token_scores(*_take(student, teacher, rows), fields=["divergence"], impl="reference")
            part = scores.require("divergence").sum() / mask.sum()
            part.backward()
            truth += part.detach()
        errors = {"loss": _relative(loss, truth), "misranked": misranked}
        for name, value, exact in zip(("hidden", "weight"), gradients, (student.hidden, student.weight), strict=True):
            errors[name] = float("inf") if value is None or exact.grad is None else _relative(value, exact.grad)
        return errors

    def _plain(self) -> tuple[Tensor, None]:
        log_s = torch.log_softmax((self.student.hidden @ self.student.weight.T).float(), -1)
        with torch.no_grad():
            log_t = torch.log_softmax((self.teacher.hidden @ self.teacher.weight.T).float(), -1)
        return (log_s.exp() * (log_s - log_t)).sum(-1).mean(), None

    def _trl(self) -> tuple[Tensor, None]:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        heads = (self.student.hidden, self.student.weight, None, self.teacher.hidden, self.teacher.weight, None)
        divergence, _ = ChunkedDivergenceFunction.apply(*heads, 1.0)
        return divergence.mean(), None

    def _liger(self) -> tuple[Tensor, None]:
        from liger_kernel.transformers import LigerFusedLinearJSD

        student, teacher = self.student, self.teacher
        loss = LigerFusedLinearJSD(jsd_beta=1.0)(student.hidden, student.weight, teacher.hidden, teacher.weight)
        return loss, None

    def _ours(self) -> tuple[Tensor, Tensor | None]:
        """What a training step does with its hidden states (`TIPTrainer._score_rows` and `_compute_loss`)."""
        engine, rule, retention = self.variant.engine, self.variant.rule, self.variant.retention
        if rule == "all":
            loss, _ = fused_divergence_loss(
                self.student, self.teacher, denominator=self.everything, fields=LOGGED_FIELDS, impl=engine
            )
            return loss, None
        if self.variant.one_pass:
            return self._one_pass()
        teacher = self.teacher if needs_teacher(rule) else None
        logged = LOGGED_FIELDS if teacher is not None else ("entropy", "entropy_norm")
        with torch.no_grad():
            fields = tuple(dict.fromkeys((*(rule_fields(rule) or ()), *logged)))
            scores = token_scores(self.student, teacher, fields=fields, impl=engine)
            selection = select(scores, rule, retention, self.rollout)
        kept = _take(self.student, self.teacher, selection.mask)
        weight = selection.weight[selection.mask]
        return fused_divergence_loss(*kept, weight, denominator=selection.total, impl=engine), selection.mask

    def _one_pass(self) -> tuple[Tensor, Tensor]:
        """The same where tokens are chosen in the loss (`training/choosing.py`)."""
        rule, retention = self.variant.rule, self.variant.retention

        def choose(scores: TokenScores, tokens: slice) -> Selection:
            return select(scores, rule, retention, self.rollout[tokens], running=self.running)

        fields = tuple(dict.fromkeys((*(rule_fields(rule) or ()), *LOGGED_FIELDS)))
        loss, _, selection = fused_selected_loss(
            self.student,
            self.teacher,
            choose,
            self.lengths,
            fields=fields,
            denominator=self.kept,
            impl=self.variant.engine,
        )
        return loss, selection.mask


def run_head(
    preset: str = "cpu",
    rounds: int = 5,
    say: Callable[[str], None] = print,
    variants: list[Variant] | None = None,
    **sizes: Any,
) -> dict[str, Any]:
    """Measure every variant on heads of one size; the result as it is written to benchmarks/results.

    Args:
        preset: a key of PRESETS.
        rounds: timed runs of each variant, after one that checks it and one that counts its memory.
        say: takes one line of progress.
        variants: None: all that the device can run.
        sizes: fields of `HeadSettings` that differ from the preset's.

    Raises:
        ValueError: an unknown preset, sizes that are not positive, or no GPU where one is needed.

    Example:
        >>> result = run_head(rounds=1, tokens=4, vocabulary=8, student_width=2, teacher_width=2,  # doctest: +SKIP
        ...                   variants=[Variant("plain"), Variant("chunked")])
    """
    settings = settings_of(preset, sizes)
    chosen, left_out = variants, {}
    if chosen is None:
        chosen, left_out = variants_of(settings.device), missing_peers(settings.device)
        for name, reason in left_out.items():
            say(f"{name}: left out, {reason}")
    return {
        "benchmark": "head",
        "preset": preset,
        **environment(settings.device, settings.threads),
        "settings": asdict(settings),
        "tolerance": TOLERANCES[settings.dtype],
        "left_out": left_out,
        "variants": measure(settings, chosen, rounds, say),
    }


def run_scaling(rounds: int = 3, say: Callable[[str], None] = print, **sizes: Any) -> dict[str, Any]:
    """Time and memory over four numbers of tokens and four vocabularies, the other held fixed.

    Args:
        rounds, say, sizes: as in `run_head`; sizes may give "tokens" or "vocabulary" as the four to measure.

    Example:
        >>> result = run_scaling(rounds=1)  # doctest: +SKIP
    """
    axes = {axis: tuple(sizes.pop(axis, four)) for axis, four in SCALING.items()}
    base = settings_of("scaling", sizes)
    chosen = [Variant("plain"), Variant("chunked"), Variant("chunked", "soft_or", 0.5)]
    points = []
    for axis, values in axes.items():
        for value in values:
            settings = settings_of("scaling", {**asdict(base), **SCALING_FIXED, axis: value})
            say(f"{axis} {value}")
            points.append({"axis": axis, "size": value, "variants": measure(settings, chosen, rounds, say)})
    return {
        "benchmark": "scaling",
        "preset": "scaling",
        **environment(base.device, base.threads),
        "settings": {**asdict(base), **SCALING_FIXED},
        "points": points,
        "growth": growth_along(points),
    }


def growth_along(points: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Exponents of time and of memory beside the gradients along each axis, by variant.

    Args:
        points: those of `run_scaling`'s result. Time is one thread's processor time, which other work leaves alone.
    """
    exponents: dict[str, dict[str, Any]] = {}
    for axis in SCALING:
        along = [point for point in points if point["axis"] == axis]
        sizes = [point["size"] for point in along]
        for name in along[0]["variants"]:
            measured = [point["variants"][name] for point in along]
            if all("processor_seconds" in entry for entry in measured):
                exponents.setdefault(name, {})[axis] = {
                    "time": growth(sizes, [entry["processor_seconds"]["median"] for entry in measured]),
                    "memory": growth(sizes, [entry["extra_bytes"] - entry["gradient_bytes"] for entry in measured]),
                }
    return exponents


def settings_of(preset: str, sizes: dict[str, Any]) -> HeadSettings:
    """Settings of a preset with some fields replaced; ValueError names the nearest preset."""
    check_known("preset", preset, PRESETS)
    return HeadSettings(**{**PRESETS[preset], **sizes})


def measure(
    settings: HeadSettings,
    variants: list[Variant],
    rounds: int,
    say: Callable[[str], None],
    flush: Callable[[dict[str, Any]], None] = lambda entries: None,
    worker: type[Worker] | type[Here] | None = None,
) -> dict[str, dict[str, Any]]:
    """Errors, memory, times and ratios of each variant, by name.

    Args:
        settings, variants: what is measured.
        rounds, say: as in `run_head`.
        flush: takes the entries as they stand after each round.
        worker: a process for each variant, or this one for all, which then share the inputs; None: as the device wants.
    """
    worker = worker or (Here if settings.device == "cuda" else Worker)
    entries: dict[str, dict[str, Any]] = {variant.name: asdict(variant) for variant in variants}
    taken: dict[str, list[dict[str, float]]] = {variant.name: [] for variant in variants}
    with _workers(worker, settings, variants) as workers:
        for name in list(workers):
            refusal = _examine(workers[name], entries[name], TOLERANCES[settings.dtype])
            if refusal is not None:
                say(f"{name}: refused, {refusal}")
                entries[name]["refused"] = refusal
                workers.pop(name).close()
            else:
                say(f"{name}: agrees with float64")
        for number in range(rounds):
            for name in list(workers):
                try:
                    taken[name].append(workers[name].ask("round"))
                except RuntimeError as error:  # no memory any more, say
                    entries[name]["refused"], taken[name] = _last_line(error), []
                    workers.pop(name).close()
            flush(summarised(settings, variants, entries, taken))
            say(f"round {number + 1} of {rounds}: " + _summary({name: taken[name][-1] for name in workers}))
    entries = summarised(settings, variants, entries, taken)
    for name, entry in entries.items():
        say(f"{name}: {in_words(entry)}")
    return entries


def in_words(entry: dict[str, Any]) -> str:
    """A variant's time, and its ratios over the peers that are there and over the floor.

    Example:
        >>> in_words({"seconds": {"median": 0.05}, "ratio": {"plain": {"median": 0.5}}, "over_floor": {"median": 1.25}})
        '0.05 s, 0.50 of plain, 1.25 of the floor'
        >>> in_words({"refused": "out of memory"})
        'refused, out of memory'
    """
    if "seconds" not in entry:
        return f"refused, {entry['refused']}" if "refused" in entry else "not measured"
    ratios = {peer: ratio["median"] for peer, ratio in entry.get("ratio", {}).items()}
    ratios["the floor"] = entry["over_floor"]["median"]
    return f"{entry['seconds']['median']:.3g} s, " + ", ".join(f"{ratio:.2f} of {of}" for of, ratio in ratios.items())


def summarised(
    settings: HeadSettings,
    variants: list[Variant],
    entries: dict[str, dict[str, Any]],
    taken: dict[str, list[dict[str, float]]],
) -> dict[str, dict[str, Any]]:
    """The entries with times, time over the floor, and ratios over the peers, from the rounds that were taken."""
    unit = 2 * settings.tokens * settings.vocabulary * settings.student_width
    for variant in variants:
        runs = taken[variant.name]
        if not runs:
            continue
        entry = entries[variant.name]
        entry["floor"] = variant.floor(settings.teacher_width / settings.student_width)
        for key in ("seconds", "processor_seconds", "matmul_rate"):
            entry[key] = spread([run[key] for run in runs])
        entry["over_floor"] = spread([run["seconds"] * run["matmul_rate"] / unit / entry["floor"] for run in runs])
        for peer in PEERS:
            if peer != variant.name and taken.get(peer):
                pairs = list(zip(runs, taken[peer], strict=True))
                entry.setdefault("ratio", {})[peer] = spread([own["seconds"] / its["seconds"] for own, its in pairs])
                entry.setdefault("processor_ratio", {})[peer] = spread(
                    [own["processor_seconds"] / its["processor_seconds"] for own, its in pairs]
                )
                entry.setdefault("memory_ratio", {})[peer] = entry["extra_bytes"] / entries[peer]["extra_bytes"]
    return entries


@contextmanager
def _workers(
    worker: type[Worker] | type[Here], settings: HeadSettings, variants: list[Variant]
) -> Iterator[dict[str, Worker | Here]]:
    shared = (HeadInputs(settings),) if worker is Here else ()
    workers: dict[str, Worker | Here] = {
        variant.name: worker(HeadWork, settings, variant, *shared) for variant in variants
    }
    try:
        yield workers
    finally:
        for work in workers.values():
            work.close()


def _examine(worker: Worker | Here, entry: dict[str, Any], tolerance: float) -> str | None:
    """Fill in errors and memory; the reason for a refusal, or None."""
    try:
        entry["errors"] = worker.ask("errors")
        wrong = {name: error for name, error in entry["errors"].items() if not error <= tolerance}
        if wrong:
            return f"it does not agree with the float64 reference (allowed {tolerance:g}): " + ", ".join(
                f"{name} {error:.1e}" for name, error in wrong.items()
            )
        entry |= worker.ask("memory")
    except RuntimeError as error:
        return _last_line(error)
    return None


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]


def _summary(runs: dict[str, dict[str, float]]) -> str:
    rate = median(run["matmul_rate"] for run in runs.values()) / 1e9 if runs else 0.0
    return ", ".join(f"{name} {run['seconds']:.3g} s" for name, run in runs.items()) + f" ({rate:.0f} Gflop/s)"


def _misranked(variant: Variant, student: Head, teacher: Head, rollout: Tensor, mask: Tensor) -> float:
    """Share of the tokens that a top-k by float64 scores would decide otherwise, near ties aside."""
    fields = rule_fields(variant.rule) or ()
    parts = [
        token_scores(*_take(student, teacher, rows), fields=fields, impl="reference")
        for rows in torch.arange(len(mask), device=mask.device).split(_reference_rows(student))
    ]
    scores = parts[0].map(lambda value: value)
    scores = type(scores)(**{name: torch.cat([getattr(part, name) for part in parts]) for name, _ in scores.present()})
    score = RULES[variant.rule].score(scores)
    wrong = 0
    for number, count in enumerate(kept_counts(rollout.bincount(), variant.retention, variant.rule).tolist()):
        inside = rollout == number
        own, kept = score[inside], mask[inside]
        if int(kept.sum()) != count:
            return 1.0
        cut = own.sort(descending=True).values[count - 1]
        wrong += int((kept & (own < cut - RANKING_TOLERANCE)).sum() + (~kept & (own > cut + RANKING_TOLERANCE)).sum())
    return wrong / len(mask)


def _reference_rows(student: Head) -> int:
    return max(1, REFERENCE_ELEMENTS[student.hidden.device.type] // len(student.weight))


def _double(head: Head) -> Head:
    return Head(head.hidden.detach().double(), head.weight.detach().double())


def _take(student: Head, teacher: Head, rows: Tensor) -> tuple[Head, Head]:
    return Head(student.hidden[rows], student.weight), Head(teacher.hidden[rows], teacher.weight)


def _relative(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm().clamp(min=1e-300))


def main(argv: list[str] | None = None) -> int:
    """Measure one preset and write its JSON; 1 where a variant was refused.

    Raises:
        ValueError: an unknown preset (the nearest is given), or sizes that make no sense.
    """
    parser = measuring.parser("head", __doc__)
    parser.add_argument("--preset", help=f"{', '.join(PRESETS)} (default cpu)")
    parser.add_argument("--rounds", type=int, help="timed runs of each variant, taking turns")
    for name in ("tokens", "vocabulary", "student_width", "teacher_width", "rollout_length", "threads"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--dtype", help=" or ".join(TOLERANCES))
    parser.add_argument("--device", help="cpu or cuda")
    return measuring.run("head", _run_preset, parser, argv)


def _run_preset(preset: str = "cpu", **given: Any) -> dict[str, Any]:
    return run_scaling(**given) if preset == "scaling" else run_head(preset, **given)


if __name__ == "__main__":
    measuring.end(main)
