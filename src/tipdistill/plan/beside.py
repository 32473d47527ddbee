"""A run whose rollouts a vLLM server writes, on GPUs of its own: how many to give it, and what a step takes.

In turn, a step takes the sum of the two times. With `rollout_ahead: 1` the server writes the next step's rollouts while
this one is trained, and a step takes the longer of them. The same GPUs can also all do both, one after the other, with
vLLM beside the trainer (`vllm_mode: colocate`): compare with that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from .machines import Machine
from .memory import Setup
from .time import step_time, vllm_tokens

# of a GPU that does nothing else
SERVER_SHARE = 0.9


@dataclass(frozen=True)
class Beside:
    """Some of a run's GPUs write, the others train.

    Attributes:
        writers: GPUs of the server.
        trainers: what the others hold and do.
        rollout: seconds that the server writes.
        training: seconds of all else.
    """

    writers: int
    trainers: Setup
    rollout: float
    training: float


def best_split(setup: Setup, machine: Machine) -> Beside | None:
    """The split of a run's GPUs at which a step with `rollout_ahead` is shortest; None: it cannot be split.

    max(rollout, training) is least over eighths of the GPUs that divide the rollouts of a step. Sending the weights to
    the server is not counted.

    Args:
        setup: with all the GPUs, and as many rollouts on each as it trains on.
        machine: rates of one of them.

    Example:
        >>> from tipdistill.plan import setup_of
        >>> from tipdistill.plan.machines import MACHINES
        >>> setup = setup_of("Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B", gpus=8, accumulation=8, completion=512)
        >>> split = best_split(setup, MACHINES["h100"])
        >>> split.writers + split.trainers.gpus
        8
        >>> best_split(setup_of("Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B"), MACHINES["h100"]) is None
        True
    """
    return min(_splits(setup, machine), key=lambda split: max(split.rollout, split.training), default=None)


def _splits(setup: Setup, machine: Machine) -> Iterator[Beside]:
    if setup.engine == "server":  # on GPUs that the setup does not count
        return
    rollouts = setup.rollouts * setup.gpus
    for eighths in range(1, 8):
        writers, rest = divmod(setup.gpus * eighths, 8)
        gpus = setup.gpus - writers
        if rest or writers % setup.vllm_parallel or rollouts % (gpus * setup.micro_batch):
            continue
        server = replace(
            setup,
            gpus=writers,
            micro_batch=1,
            accumulation=-(-rollouts // writers),
            engine="colocate",
            vllm_share=SERVER_SHARE,
        )
        if vllm_tokens(server) < setup.prompt + setup.completion:
            continue
        trainers = replace(
            setup, gpus=gpus, accumulation=rollouts // (gpus * setup.micro_batch), engine="server", vllm_parallel=1
        )
        yield Beside(
            writers, trainers, step_time(server, machine)["rollout"], sum(step_time(trainers, machine).values())
        )
