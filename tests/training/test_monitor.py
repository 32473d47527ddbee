import json
import math
import subprocess
import sys

import pytest
import torch
from transformers import TrainerState

from tipdistill import Selection, TokenScores, quadrants
from tipdistill.training.monitor import (
    BASELINE_STEPS,
    TALLIED,
    StepClock,
    StepEnd,
    TrainingMonitor,
    metrics,
    tally,
)


@pytest.fixture
def scores():
    generator = torch.Generator().manual_seed(0)
    entropy = torch.rand(40, generator=generator)
    return TokenScores(
        entropy=entropy,
        entropy_norm=entropy / math.log(50),
        reverse_kl=torch.rand(40, generator=generator),
        forward_kl=torch.rand(40, generator=generator),
    )


def selection_of(mask):
    return Selection(mask=mask, weight=mask.float(), score=torch.zeros(len(mask)))


def test_figures_are_those_of_the_tokens(scores):
    mask = torch.arange(40) % 4 == 0
    figures = metrics(tally(scores, selection_of(mask)))
    assert figures["selection/kept_fraction"] == 0.25
    assert figures["selection/kept_divergence_share"] == pytest.approx(
        (scores.reverse_kl[mask].sum() / scores.reverse_kl.sum()).item()
    )
    assert figures["selection/dropped_divergence"] == pytest.approx(scores.reverse_kl[~mask].mean().item())
    assert figures["reverse_kl"] == pytest.approx(scores.reverse_kl.mean().item())
    assert figures["forward_kl"] == pytest.approx(scores.forward_kl.mean().item())
    shares = [(quadrants(scores) == number).float().mean().item() for number in (1, 2, 3, 4)]
    assert [figures[f"quadrants/q{number}"] for number in (1, 2, 3, 4)] == pytest.approx(shares)


def test_tallies_of_parts_add_up_but_for_the_quadrants_normaliser(scores):
    mask = torch.arange(40) % 3 == 0
    whole = tally(scores, selection_of(mask))
    parts = [
        tally(scores.map(lambda value, part=part: value[part]), selection_of(mask[part]))
        for part in (slice(0, 7), slice(7, 40))
    ]
    added = [TALLIED.index(name) for name in TALLIED if not name.startswith("q")]
    assert torch.allclose(whole[added], (parts[0] + parts[1])[added])


def test_what_was_not_computed_is_left_out(scores):
    figures = metrics(tally(TokenScores(entropy=scores.entropy), None))
    assert figures == {"selection/kept_fraction": 1.0, "entropy": pytest.approx(float(scores.entropy.mean()))}


def test_no_token_at_all_is_no_error():
    figures = metrics(tally(TokenScores(entropy=torch.empty(0), reverse_kl=torch.empty(0)), None))
    assert figures["selection/kept_fraction"] == 0


def test_the_drift_guard_warns_once_per_excursion():
    monitor = TrainingMonitor(3.0, 0.5)
    assert [monitor.observe(0.1) for _ in range(BASELINE_STEPS)] == [None] * BASELINE_STEPS
    assert monitor.observe(0.29) is None
    assert "3.1 times where it began" in monitor.observe(0.31)
    assert monitor.observe(0.5) is None
    assert monitor.observe(0.2) is None
    assert monitor.observe(0.4) is not None


@pytest.mark.parametrize(("configured", "given", "raised"), [(0.1, 0.4, 0.4), (0.1, None, 0.1), (0.5, 0.4, 0.5)])
def test_retention_is_raised_by_the_first_warning_and_stays(configured, given, raised):
    monitor = TrainingMonitor(3.0, configured, given)
    for value in [0.1] * BASELINE_STEPS:
        monitor.observe(value)
    assert monitor.retention == configured
    warning = monitor.observe(0.5)
    assert monitor.retention == raised
    assert ("From here on 0.4 of the tokens" in warning) == (raised == 0.4)
    monitor.observe(0.1)
    assert monitor.retention == raised


@pytest.mark.parametrize(
    ("left", "still", "told"),
    [
        (
            (31.0, 0.1),
            (29.0, 0.1),
            "31 tokens in the mean, 10% cut at `max_completion_length`, where they began with 10",
        ),
        ((3.3, 0.0), (3.4, 0.0), "prompts that it answers in a word"),
        ((12.0, 0.71), (12.0, 0.69), "`mask_truncated_completions`"),
    ],
    ids=["longer", "shorter", "cut"],
)
def test_the_length_guard_warns_once_per_excursion(left, still, told):
    monitor = TrainingMonitor(3.0, 0.5)
    # the mean of the first five: 10 tokens, nine in ten of the completions end
    start = [(8.0, 0.0), (12.0, 0.2), (10.0, 0.1), (9.0, 0.1), (11.0, 0.1)]
    assert [monitor.observe_lengths(*values) for values in start] == [None] * BASELINE_STEPS
    assert monitor.observe_lengths(*still) is None
    assert told in monitor.observe_lengths(*left)
    assert monitor.observe_lengths(*left) is None
    assert monitor.observe_lengths(*still) is None
    assert monitor.observe_lengths(*left) is not None


def test_completions_that_never_ended_cannot_end_less():
    monitor = TrainingMonitor(3.0, 0.5)
    assert all(monitor.observe_lengths(16.0, 1.0) is None for _ in range(10))


def test_the_length_guard_goes_on_after_a_resume():
    before = TrainingMonitor(3.0, 0.5)
    for _ in range(BASELINE_STEPS):
        before.observe_lengths(10.0, 0.0)
    assert before.observe_lengths(40.0, 0.0) is not None
    state = TrainerState(stateful_callbacks=[before], global_step=7)
    after = TrainingMonitor(3.0, 0.5)
    after.on_train_begin(None, TrainerState(**json.loads(json.dumps(vars(state)))), None)
    assert after.observe_lengths(40.0, 0.0) is None  # the same excursion
    assert after.observe_lengths(10.0, 0.0) is None
    assert after.observe_lengths(40.0, 0.0) is not None


def test_factor_zero_turns_the_guard_off():
    assert all(TrainingMonitor(0, 0.5).observe_lengths(length, 0.0) is None for length in [1.0] * 9 + [99.0])
    monitor = TrainingMonitor(0, 0.5)
    assert all(monitor.observe(value) is None for value in [0.1] * 10 + [100.0])


def test_the_baseline_survives_a_resume():
    before = TrainingMonitor(3.0, 0.5)
    for _ in range(BASELINE_STEPS):
        before.observe(0.1)
    before.trained_tokens = 123
    state = TrainerState(stateful_callbacks=[before], global_step=7)
    after = TrainingMonitor(3.0, 0.5)
    after.on_train_begin(None, state, None)
    assert after.trained_tokens == 123
    assert after.observe(0.5) is not None


def test_a_raised_retention_survives_a_resume():
    before = TrainingMonitor(3.0, 0.1, 0.4)
    for value in [0.1] * BASELINE_STEPS + [0.9]:
        before.observe(value)
    after = TrainingMonitor(3.0, 0.1, 0.4)
    after.on_train_begin(None, TrainerState(stateful_callbacks=[before], global_step=7), None)
    assert after.retention == 0.4


def test_a_fresh_run_starts_its_own_baseline():
    state = TrainerState(stateful_callbacks=[TrainingMonitor(3.0, 0.5)], global_step=0)
    monitor = TrainingMonitor(3.0, 0.5)
    monitor.trained_tokens = 5
    monitor.on_train_begin(None, state, None)
    assert monitor.trained_tokens == 5


@pytest.mark.skipif(not sys.platform.startswith("linux") or torch.cuda.is_available(), reason="reads /proc of Linux")
def test_the_peak_counts_from_where_it_was_reset():
    # In a process of its own: nothing else allocates there meanwhile. And by a GiB: Linux counts resident pages per
    # CPU and adds them up late, so that on a machine of many CPUs a reading is some hundred MiB off.
    script = """
import json, torch
from tipdistill.training.monitor import peak_memory_gib, reset_peak_memory
block = torch.ones(2**28)  # a GiB, touched
high = peak_memory_gib()
del block
after = peak_memory_gib()
reset_peak_memory()
print(json.dumps([high, after, peak_memory_gib()]))
"""
    high, after_freeing, after_reset = json.loads(subprocess.check_output([sys.executable, "-c", script], text=True))
    assert high > 1.0
    assert after_freeing > high - 0.4
    assert after_reset < high - 0.6


@pytest.fixture
def gpu(monkeypatch):
    """A GPU whose queue takes a second for each launch: the clock moves when the host waits for it, and only then."""

    class Queue:
        clock = waiting = 0.0

        def launch(self):
            self.waiting += 1.0

        def synchronize(self):
            self.clock, self.waiting = self.clock + self.waiting, 0.0

    queue = Queue()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", queue.synchronize)
    monkeypatch.setattr("time.perf_counter", lambda: queue.clock)
    return queue


def test_a_part_of_a_step_answers_for_what_it_gave_the_gpu(gpu):
    clock = StepClock()
    with clock.part("score"):
        gpu.launch()
        gpu.launch()
    gpu.launch()  # of no part
    with clock.part("loss"):
        gpu.launch()
        with clock.part("select"):
            gpu.launch()
    end = StepEnd(clock, lambda: None)
    end.on_pre_optimizer_step(None, None, None)
    gpu.launch()
    end.on_optimizer_step(None, None, None)
    seconds = clock.take(tokens=10.0)
    assert {name: seconds[f"time/{name}"] for name in ("score", "select", "loss", "optimizer")} == {
        "score": 2.0,
        "select": 1.0,
        "loss": 1.0,
        "optimizer": 1.0,
    }


def test_without_a_gpu_nothing_is_waited_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: pytest.fail("there is no GPU to wait for"))
    clock = StepClock()
    with clock.part("score"):
        pass
    assert clock.take(tokens=1.0)["time/score"] >= 0


def test_a_student_that_has_left_the_one_that_wrote_is_told_once_per_excursion():
    monitor = TrainingMonitor(3.0, 0.5)
    assert monitor.observe_staleness(-0.29) is None
    warning = monitor.observe_staleness(-0.45)
    assert "moved 0.45 nats a token away from the one that wrote this step's rollouts, more than 0.3" in warning
    assert "rollout_ahead" in warning
    state = TrainerState(stateful_callbacks=[monitor], global_step=7)
    resumed = TrainingMonitor(3.0, 0.5)
    resumed.on_train_begin(None, TrainerState(**json.loads(json.dumps(vars(state)))), None)
    assert resumed.observe_staleness(-0.31) is None  # the same excursion
    assert resumed.observe_staleness(0.0) is None
    assert resumed.observe_staleness(-0.31) is not None
