"""Some of a run's GPUs write, the others train: which split, and what a step takes."""

from dataclasses import replace

import pytest

from tipdistill.plan import setup_of
from tipdistill.plan.beside import SERVER_SHARE, best_split
from tipdistill.plan.machines import MACHINES
from tipdistill.plan.report import as_text, plan
from tipdistill.plan.time import step_time

MACHINE = MACHINES["h100"]


@pytest.fixture(scope="module")
def eight():
    setup = setup_of(
        *("Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B"),
        gpus=8,
        accumulation=8,
        prompt=128,
        completion=1024,
        engine="colocate",
        sharding="zero2",
    )
    student, teacher = (model.with_layers(3) for model in (setup.student, setup.teacher))  # memory is replayed
    return replace(setup, student=student, teacher=teacher)


def test_the_split_is_the_one_whose_longer_part_is_shortest(eight):
    split = best_split(eight, MACHINE)
    by_hand = {}
    for writers in (4, 6, 7):  # the others' GPUs do not divide 64 rollouts
        server = replace(eight, gpus=writers, micro_batch=1, accumulation=-(-64 // writers), vllm_share=SERVER_SHARE)
        trainers = replace(eight, gpus=8 - writers, accumulation=64 // (8 - writers), engine="server")
        training = step_time(trainers, MACHINE)
        assert training["rollout"] == 0
        by_hand[writers] = (step_time(server, MACHINE)["rollout"], sum(training.values()))
    best = min(by_hand, key=lambda writers: max(by_hand[writers]))
    assert split.writers == best
    assert (split.rollout, split.training) == by_hand[best]


def test_a_plan_shows_the_server_in_turn_and_ahead(eight):
    planned = plan(eight, MACHINE, (1.0, 0.5))
    split = best_split(eight, MACHINE)
    in_turn, ahead = planned["settings"][-2:]
    assert in_turn["setting"] == f"vllm_mode: server on {split.writers} of the 8 GPUs"
    assert ahead["setting"] == in_turn["setting"] + ", rollout_ahead: 1"
    assert in_turn["step_seconds"] == split.rollout + split.training
    assert ahead["step_seconds"] == max(split.rollout, split.training)
    assert ahead["without_rollout_seconds"] == split.training
    assert "rollouts that are a step old" in as_text(planned)


@pytest.mark.parametrize(
    "changed",
    [
        {"gpus": 1, "sharding": "none"},
        {"engine": "server"},  # whose GPUs are not among those planned
        {"gpus": 7},  # not in eighths
        {"memory": 2**30},  # no rollout fits into the server
    ],
)
def test_what_cannot_be_split_is_not_offered(eight, changed):
    assert best_split(replace(eight, **changed), MACHINE) is None
