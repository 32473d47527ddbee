"""What a training step did, in figures: every metric that is logged here is named here; and the drift guard.

A step's figures come from sums over tokens (`tally`), which add up over micro-batches and ranks. docs/metrics.md says
what each means.
"""

from __future__ import annotations

import gc
import math
import os
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..select.quadrants import quadrants
from ..types import Selection, TokenScores

TALLIED = ("tokens", "kept", "entropy", "reverse_kl", "kept_reverse_kl", "forward_kl", "q1", "q2", "q3", "q4")
# the statistics behind them: at every step, where they cost no projection of their own, and every score_logging_steps
LOGGED_FIELDS = ("entropy", "entropy_norm", "reverse_kl")
ALL_FIELDS = (*LOGGED_FIELDS, "forward_kl")
# parts of a step before its loss, which times them
PREPARATION = ("rollout", "score", "select", "record", "teacher")
BASELINE_STEPS = 5
# nats a token between a student and the one, a step before, that wrote its rollouts: twice the most that was seen in
# runs that lost nothing by it (benchmarks/replication/ahead/modular.yaml: 0.17, while the learning rate rises)
STALE = 0.3
# what TRL logs of the completions, as completions/<name>, and the length guard watches
WATCHED = ("mean_length", "clipped_ratio")


def tally(scores: TokenScores, selection: Selection | None) -> Tensor:
    """Sums over tokens, float64 [len(TALLIED)], NaN where a statistic was not computed.

    Sums of disjoint sets of tokens add up, so a step's figures do not depend on how it was split.

    Args:
        scores: the statistics of N tokens.
        selection: what was kept of them; None: all.

    Example:
        >>> scores = TokenScores(entropy=torch.ones(4))
        >>> dict(zip(TALLIED, tally(scores, None).tolist(), strict=True))["entropy"]
        4.0
    """
    _, some = next(scores.present())
    missing = some.new_full((), math.nan, dtype=torch.float64)

    def total(name: str, mask: Tensor | None = None) -> Tensor:
        value = getattr(scores, name)
        if value is None:
            return missing
        return (value if mask is None else value[mask]).sum(dtype=torch.float64)

    kept = None if selection is None else selection.mask
    sums = [
        torch.full_like(missing, len(scores)),
        torch.full_like(missing, len(scores)) if kept is None else kept.sum(dtype=torch.float64),
        total("entropy"),
        total("reverse_kl"),
        total("reverse_kl", kept),
        total("forward_kl"),
    ]
    if len(scores) and scores.entropy is not None and scores.reverse_kl is not None:
        quadrant = quadrants(scores)
        sums += [(quadrant == number).sum(dtype=torch.float64) for number in (1, 2, 3, 4)]
    else:
        sums += [missing if len(scores) else torch.zeros_like(missing)] * 4
    return torch.stack(sums)


def metrics(sums: Tensor) -> dict[str, float]:
    """The logged figures of a step from its `tally`; those not computed are left out.

    kept_fraction and kept_divergence_share are shares of the tokens and of the reverse KL; dropped_divergence is the
    mean reverse KL (nats) of the tokens that were not trained on; the quadrants are shares.

    Example:
        >>> values = dict.fromkeys(TALLIED, 1.0) | {"tokens": 4.0, "kept": 2.0, "reverse_kl": 2.0}
        >>> metrics(torch.tensor(list(values.values())))["selection/dropped_divergence"]
        0.5
    """
    total: Mapping[str, float] = dict(zip(TALLIED, sums.tolist(), strict=True))
    tokens = max(total["tokens"], 1.0)
    dropped = total["tokens"] - total["kept"]
    figures = {
        "selection/kept_fraction": total["kept"] / tokens,
        "selection/kept_divergence_share": (
            total["kept_reverse_kl"] / total["reverse_kl"] if total["reverse_kl"] else math.nan
        ),
        "selection/dropped_divergence": (
            max(total["reverse_kl"] - total["kept_reverse_kl"], 0.0) / dropped if dropped else math.nan
        ),
        "entropy": total["entropy"] / tokens,
        "reverse_kl": total["reverse_kl"] / tokens,
        "forward_kl": total["forward_kl"] / tokens,
    } | {f"quadrants/q{number}": total[f"q{number}"] / tokens for number in (1, 2, 3, 4)}
    return {name: value for name, value in figures.items() if not math.isnan(value)}


class ByTeacher:
    """What a step did with the tokens of each of several teachers, over all processes.

    teacher/<name>/tokens is their number, teacher/<name>/reverse_kl the mean divergence (nats), and
    teacher/<name>/kept_fraction the share that is trained on. A step without a token of a teacher logs 0 tokens of it.

    Args:
        trainer: a `TIPTrainer`; where it has one teacher, nothing is counted.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._sums: Tensor | None = None  # float64 [teachers, 3]: tokens, kept, reverse KL

    def add(self, scores: TokenScores, kept: Tensor | None, mask: Tensor, examples: Sequence[Any]) -> None:
        """Count tokens of this process.

        Args:
            scores: of the tokens in `mask`.
            kept: bool, of the same; None: all.
            mask: bool [B, T].
            examples: the B rows of the dataset, which name the teachers.
        """
        teacher = self._trainer.teacher
        if not teacher.names:
            return
        number = torch.tensor(teacher.numbers(examples), device=mask.device)[:, None].expand_as(mask)[mask]
        ones = torch.ones(len(number), dtype=torch.float64, device=mask.device)
        divergence = ones * math.nan if scores.reverse_kl is None else scores.reverse_kl.double()
        columns = torch.stack([ones, ones if kept is None else kept.double(), divergence], 1)
        if self._sums is None:
            self._sums = columns.new_zeros(len(teacher.names), 3)
        self._sums.index_add_(0, number, columns)

    def take(self) -> dict[str, float]:
        """The figures since the last call; every process calls it."""
        names = self._trainer.teacher.names
        if not names:
            return {}
        accelerator, sums = self._trainer.accelerator, self._sums
        if sums is None:
            sums = torch.zeros(len(names), 3, dtype=torch.float64, device=accelerator.device)
        self._sums = None
        figures = {}
        for name, (tokens, kept, divergence) in zip(names, accelerator.gather(sums[None]).sum(0).tolist(), strict=True):
            figures[f"teacher/{name}/tokens"] = tokens
            if tokens:
                figures[f"teacher/{name}/kept_fraction"] = kept / tokens
                figures[f"teacher/{name}/reverse_kl"] = divergence / tokens
        return {name: value for name, value in figures.items() if not math.isnan(value)}


def now() -> float:
    """The clock (seconds), once the GPU of this process has done what it was given; without one, the clock."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


class StepClock:
    """Seconds of each part of a step: those of `PREPARATION`, then loss and optimizer.

    A GPU's work is queued: the clock is read when all of it is done, so that each part answers for its own.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._start()

    def _start(self) -> None:
        self.seconds.clear()
        self.seconds.update(dict.fromkeys(PREPARATION, 0.0))

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time of the block to `name`; what a block of "loss" prepares meanwhile is not part of the loss."""
        started, prepared = now(), self._prepared()
        try:
            yield
        finally:
            self.seconds[name] += now() - started
            if name == "loss":
                self.seconds[name] -= self._prepared() - prepared

    def _prepared(self) -> float:
        return sum(self.seconds[name] for name in PREPARATION)

    def take(self, tokens: float) -> dict[str, float]:
        """The logged times of a step of `tokens` completion tokens (seconds), and start the next."""
        figures = {f"time/{name}": seconds for name, seconds in self.seconds.items()}
        figures["tokens_per_second"] = tokens / max(sum(self.seconds.values()), 1e-9)
        self._start()
        return figures


class StepEnd(TrainerCallback):
    """Times the optimiser and calls back when the whole step is done, before Trainer logs it.

    Args:
        clock: of the run.
        on_step_done: what to call.
    """

    def __init__(self, clock: StepClock, on_step_done: Callable[[], None]) -> None:
        self.clock = clock
        self.on_step_done = on_step_done
        self.started = 0.0

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.started = now()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.clock.seconds["optimizer"] += now() - self.started

    def on_step_end(self, args, state, control, **kwargs):
        self.on_step_done()


def peak_memory_gib() -> float:
    """Peak memory in GiB: allocated on the CUDA device, or the process's resident set where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(status.partition("VmHWM:")[2].split()[0]) / 2**20
    except (OSError, IndexError, ValueError):
        pass  # no Linux
    unit = 1 if sys.platform == "darwin" else 2**10  # ru_maxrss is in bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def reset_peak_memory() -> None:
    """Let `peak_memory_gib` count from here, where the system allows it: on CUDA and on Linux."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    # what was freed but not yet returned to the system would count as the next run's
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


class TrainingMonitor(TrainerCallback, ExportableState):
    """What must survive a resume: the tokens trained on so far, what those of the last step tell the next (`Running`),
    and the drift guard's baseline. It stops a run whose gradient is exactly 0.

    The drift guard: a run on few tokens can collapse through the tokens that are never trained, and only their
    divergence shows it in time. The baseline is the mean dropped divergence of the first `BASELINE_STEPS` observations;
    above `drift_factor` times it the guard warns, once per excursion, and from the first warning on `retention` is
    `drift_retention`, where that is given and higher: tokens that were let go once drift again when they are let go.

    The length guard: completions that grow, or do not end any more, have left what the teacher can judge, and those
    that shrink say nothing. It warns, once per excursion, where their mean length is above `drift_factor` times that of
    the first `BASELINE_STEPS` observations or below a `drift_factor`-th of it, or the share of them that end by
    themselves is below a `drift_factor`-th of that share.

    The staleness guard: where rollouts are written a step ahead it warns, once per excursion, that they are no longer
    the student's own.

    Args:
        drift_factor: multiple of the baseline that triggers the warnings; 0 turns the two guards above off.
        retention: share of the tokens that is trained on, in (0, 1].
        drift_retention: what it is raised to, in (0, 1]; None: nothing.
    """

    def __init__(self, drift_factor: float, retention: float, drift_retention: float | None = None) -> None:
        self.drift_factor = drift_factor
        self.configured = retention
        self.raised = max(retention, drift_retention or 0.0)
        self.trained_tokens = 0
        self.running: dict[str, Any] | None = None
        self.baseline: list[float] = []
        self.drifting = False
        self.has_drifted = False
        self.length_baseline: list[list[float]] = []  # of each observation: mean length, share that ended
        self.lengths_left = False
        self.stale = False

    @property
    def retention(self) -> float:
        """The share of the tokens to train on at the next step."""
        return self.raised if self.has_drifted else self.configured

    def standing(self) -> dict[str, float]:
        """The logged figures that are not of one step: tokens trained on since the start, and the peak memory."""
        return {"selection/trained_tokens": self.trained_tokens, "memory/peak_gib": peak_memory_gib()}

    def observe(self, dropped_divergence: float) -> str | None:
        """Take one step's dropped divergence (nats); return a warning when it leaves the range of its start."""
        if not self.drift_factor:
            return None
        if len(self.baseline) < BASELINE_STEPS:
            self.baseline.append(dropped_divergence)
            return None
        start = sum(self.baseline) / len(self.baseline)
        was_drifting, self.drifting = self.drifting, dropped_divergence > self.drift_factor * start
        if self.drifting and not was_drifting:
            raises, self.has_drifted = self.raised > self.retention, True
            remedy = (
                f"From here on {self.raised} of the tokens are trained on (`drift_retention`)."
                if raises
                else "What is never trained can collapse a run: raise `retention` (`drift_retention` does it for you), "
                "lower `learning_rate`, or choose a rule that follows the divergence (`gradient_norm`, `soft_or_log`). "
                "`drift_factor=0` turns this warning off."
            )
            return (
                f"the tokens that selection drops are drifting: their mean divergence is {dropped_divergence:.4g} "
                f"nats, {dropped_divergence / max(start, 1e-30):.1f} times where it began ({start:.4g}). {remedy}"
            )
        return None

    def observe_lengths(self, mean_length: float, clipped_ratio: float) -> str | None:
        """Take one step's mean length (tokens) and share of cut rollouts; return a warning when they leave their range.

        The share is looked at as that of rollouts which ended: a multiple of 0 cut ones would be any.
        """
        if not self.drift_factor:
            return None
        if len(self.length_baseline) < BASELINE_STEPS:
            self.length_baseline.append([mean_length, 1.0 - clipped_ratio])
            return None
        length, ended = (sum(values) / BASELINE_STEPS for values in zip(*self.length_baseline, strict=True))
        longer, shorter = mean_length > self.drift_factor * length, mean_length * self.drift_factor < length
        had_left, self.lengths_left = (
            self.lengths_left,
            (longer or shorter or (1.0 - clipped_ratio) * self.drift_factor < ended),
        )
        if had_left or not self.lengths_left:
            return None
        remedy = (
            "Look at what the student writes (`record_rollouts`): an end that the teacher never gives, or prompts that "
            "it answers in a word, make it so; raise `retention` or lower `learning_rate`."
            if shorter
            else "See whether both models end with one token (`end_as_teacher`); raise `max_completion_length` where "
            "longer completions are right, or leave those that are cut out of the loss "
            "(`mask_truncated_completions`)."
        )
        return (
            f"the completions have left the range of their lengths: {mean_length:.4g} tokens in the mean, "
            f"{clipped_ratio:.0%} cut at `max_completion_length`, where they began with {length:.4g} tokens and "
            f"{1.0 - ended:.0%}. {remedy} `drift_factor=0` turns this warning off."
        )

    def observe_staleness(self, log_ratio: float) -> str | None:
        """Take one step's mean of log P_now / P_writer (nats); return a warning when it falls below −`STALE`.

        Over what the writer samples, its mean is −KL(writer ‖ now): 0 for a student that has not moved.
        """
        had_left, self.stale = self.stale, log_ratio < -STALE
        if had_left or not self.stale:
            return None
        return (
            f"the student has moved {-log_ratio:.3g} nats a token away from the one that wrote this step's rollouts, "
            f"more than {STALE:g}: they are no longer its own. Lower `learning_rate`, or leave `rollout_ahead` out."
        )

    def state(self) -> dict[str, Any]:
        return {
            "args": {
                "drift_factor": self.drift_factor,
                "retention": self.configured,
                "drift_retention": self.raised,
            },
            "attributes": {
                "trained_tokens": self.trained_tokens,
                "running": self.running,
                "baseline": list(self.baseline),
                "drifting": self.drifting,
                "has_drifted": self.has_drifted,
                "stale": self.stale,
                "length_baseline": [list(values) for values in self.length_baseline],
                "lengths_left": self.lengths_left,
            },
        }

    def on_train_begin(self, args, state, control, **kwargs):
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if state.global_step > 0 and isinstance(saved, dict):  # a resumed run continues its own baseline
            for name, value in saved["attributes"].items():
                setattr(self, name, value)

    def on_log(self, args, state, control, logs=None, **kwargs):
        # DeepSpeed keeps the norm of the step before where float16 overflowed
        if logs and logs.get("grad_norm") == 0 and logs.get("loss") and "ACCELERATE_USE_DEEPSPEED" not in os.environ:
            raise ValueError(
                f"the gradient of step {state.global_step} is exactly 0 at a loss of {logs['loss']:.4g}: the student "
                "does not learn, since no trained parameter has a part in its logits. Look at `requires_grad`, at the "
                "adapter's target_modules, and train a quantized model with an adapter (use_peft)."
            )
