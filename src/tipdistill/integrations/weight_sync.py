"""Does the engine that writes the rollouts hold the student's weights? Asked of vLLM after TRL's weight sync.

A weight that an engine did not take is silent: it goes on writing fluent rollouts of another model. A tied lm_head that
the engine keeps a packed copy of is the known case (4.1 nats off), renamed or merged parameters are others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

PROBE_TOKENS = 16
# Mean |Δ log P| of a few tokens between two correct implementations. In float32 the kernels' order of summation is all
# that differs; in half precision the weights, the activations and the attention are rounded in different places.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}
# A student that has moved this many tolerances away from the weights the engine started with has put the sync to the
# test: a tensor left behind would have shown.
MOVED = 4.0
# What the engine adds to the distribution when it samples; neutral while it is asked about its weights.
_NEUTRAL: dict[str, Any] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "structured_outputs_regex": None,
    "logprobs": 0,
    "max_completion_length": PROBE_TOKENS,
    # a generator of its own, so that the rollouts' random numbers stay where they are
    "generation_kwargs": {"seed": 0},
}


class WeightSyncError(RuntimeError):
    """The engine's log-probabilities are not the student's: it did not take (all of) the weights."""


class WeightSyncCheck:
    """Compares engine and student after weight syncs until one of them has put it to the test.

    At the first sync the engine has mostly just loaded the very weights that it is sent, so a tensor that it does not
    take does not show yet. The check therefore goes on, at a few tokens per sync, until the student has moved
    `MOVED` tolerances away from where it was at the first one, and is `done` then.

    Args:
        tolerance: largest mean |Δ log P| in nats; see `tolerance_of`.

    Example:
        >>> check = WeightSyncCheck(tolerance=1e-3)
        >>> check([-1.0, -2.0], [-1.0, -2.0004], probe=[-3.0, -1.0], step=0)
        >>> check.done
        False
        >>> check([-1.5, -2.0], [-1.5, -2.0], probe=[-3.0, -1.2], step=1)
        >>> check.done
        True
    """

    def __init__(self, tolerance: float) -> None:
        self.tolerance, self.done = tolerance, False
        self._first_probe: Sequence[float] | None = None

    def __call__(self, engine: Sequence[float], student: Sequence[float], probe: Sequence[float], step: int) -> None:
        """Raise unless engine and student agree.

        Args:
            engine: log P of the tokens of a short completion that the engine just wrote, nats.
            student: log P of the same tokens by the student.
            probe: log P, by the student, of tokens that stay the same from call to call.
            step: of the training, for the message.

        Raises:
            WeightSyncError: they differ by more than the tolerance, or the engine gave none or NaN.
        """
        difference = _mean_difference(engine, student)
        if not difference <= self.tolerance:  # NaN differs as well
            raise WeightSyncError(
                f"after the weight sync of step {step} vLLM's log-probabilities are not the student's: over "
                f"{len(engine)} tokens they differ by {difference:.4g} nats on average, and {self.tolerance:g} is the "
                "most that rounding explains. The rollouts would be those of another model. Most often the engine did "
                "not take a tensor: a tied lm_head that it keeps a packed copy of (vLLM on a CPU), or a parameter "
                "whose name it does not know. Use a vLLM version that TRL supports, load the student with the dtype "
                "that vLLM runs in, or leave vLLM off (use_vllm: false). If you know that the two may differ by this "
                "much (quantised weights, an 8-bit KV cache), set vllm_sync_tolerance, in nats."
            )
        if self._first_probe is None:
            self._first_probe = list(probe)
        elif _mean_difference(self._first_probe, probe) > MOVED * self.tolerance:
            self.done = True


def _mean_difference(left: Sequence[float], right: Sequence[float]) -> float:
    if not len(left) or len(left) != len(right):
        return float("nan")
    return sum(abs(a - b) for a, b in zip(left, right, strict=True)) / len(left)


def tolerance_of(student: torch.dtype, generation: Any) -> float:
    """Tolerance for the coarser of the student's and the engine's dtype, in nats.

    Args:
        student: dtype that the student's forward computes in.
        generation: TRL's `VLLMGeneration`. A server does not tell its dtype, which is then taken to be bfloat16.

    Example:
        >>> from types import SimpleNamespace
        >>> tolerance_of(torch.float32, SimpleNamespace(mode="server"))
        0.1
    """
    engine: Any = torch.bfloat16
    if generation.mode == "colocate":
        engine = generation.llm.llm_engine.model_config.dtype
    return max(TOLERANCE.get(dtype, max(TOLERANCE.values())) for dtype in (student, engine))


def engine_completion(generation: Any, prompt_ids: list[int]) -> tuple[list[int], list[float]]:
    """A short completion by the engine and the log-probabilities that it gives its tokens, at temperature 1.

    Works in both of TRL's modes, since it goes through `VLLMGeneration.generate`; every process must call it.

    Args:
        generation: TRL's `VLLMGeneration`; its sampling settings are neutral meanwhile and put back.
        prompt_ids: tokens of the prompt.

    Raises:
        WeightSyncError: the engine returned no log-probabilities.
    """
    with _neutral(generation):
        _, completions, logprobs, _ = generation.generate(prompts=[prompt_ids], images=None, num_generations=1)
    if not completions or not completions[0] or not logprobs:
        raise WeightSyncError(
            "vLLM returned no log-probabilities of its completion, so the weight sync cannot be checked: allow at "
            "least one (its max_logprobs must not be 0), or set vllm_sync_tolerance = 0 to go without the check."
        )
    values = [float("nan") if token[0] is None else float(token[0]) for token in logprobs[0]]
    return list(completions[0]), values


@contextmanager
def _neutral(generation: Any) -> Iterator[None]:
    before = {name: getattr(generation, name) for name in _NEUTRAL}
    shorter = min(PROBE_TOKENS, generation.max_completion_length)
    for name, value in {**_NEUTRAL, "max_completion_length": shorter}.items():
        setattr(generation, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(generation, name, value)
