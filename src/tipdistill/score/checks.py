"""What the scores refuse: inputs that do not fit, before anything is computed, and rows that are no distribution."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..text import check_known
from ..types import DIVERGENCES, Head

IMPLEMENTATIONS = ("auto", "reference", "chunked", "triton")
_NO_DISTRIBUTION = (
    "the logits are NaN or infinite, so there is no distribution to compare. Check the weights (a diverged run, a "
    "wrong dtype) and the hidden states."
)
_IMPOSSIBLE = (
    "the divergence is infinite: one model gives probability 0 to what the other can say (a logit of −∞). Forbid these "
    "tokens to both, or train on the Jensen-Shannon divergence, which stays finite."
)


class NonFiniteLogitsError(ValueError):
    """A row's logits hold NaN or +∞, or nothing but −∞, or make a loss infinite; `token` is the first such row."""

    def __init__(self, token: int, where: str, cause: str = _NO_DISTRIBUTION) -> None:
        self.token, self.cause = token, cause
        super().__init__(f"{where}: {cause}")


def check_inputs(
    student: Head,
    teacher: Head | None,
    divergence: str,
    beta: float,
    temperature: float,
    token_ids: Tensor | None,
    impl: str,
) -> int:
    """Refuse what cannot be computed, before anything is; returns the shared vocabulary."""
    check_known("divergence", divergence, DIVERGENCES)
    check_known("impl", impl, IMPLEMENTATIONS)
    if not (isinstance(temperature, int | float) and 0 < temperature < math.inf):
        raise ValueError(f"temperature must be a positive number, got {temperature!r}.")
    if not 0 <= beta <= 1 or (divergence == "jsd" and not 0 < beta < 1):
        hint = " 0 and 1 are the forward and the reverse KL: ask for these." if 0 <= beta <= 1 else ""
        raise ValueError(f"beta must be in (0, 1) for the Jensen-Shannon divergence, got {beta!r}.{hint}")
    heads = {"student": student} | ({} if teacher is None else {"teacher": teacher})
    for name, head in heads.items():
        _check_head(name, head)
    if teacher is not None:
        if len(student.hidden) != len(teacher.hidden):
            raise ValueError(
                f"student and teacher must score the same tokens: hidden states of {len(student.hidden)} and "
                f"{len(teacher.hidden)} rows were given."
            )
        if student.hidden.device != teacher.hidden.device:
            raise ValueError(
                f"the student is on {student.hidden.device} and the teacher on {teacher.hidden.device}: move the "
                "teacher's hidden states and lm_head to the student's device."
            )
    vocabulary = min(len(head.weight) for head in heads.values())
    if token_ids is not None:
        if token_ids.shape != student.hidden.shape[:1] or token_ids.dtype != torch.int64:
            raise ValueError(
                f"token_ids must be int64 [{len(student.hidden)}], got {token_ids.dtype} {list(token_ids.shape)}."
            )
        if not token_ids.is_cuda:  # on a GPU a look waits for the device: see check_rows
            _check_token_ids(token_ids, vocabulary)
    return vocabulary


def _check_head(name: str, head: Head) -> None:
    hidden, weight, bias = head.hidden, head.weight, head.bias
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"the {name}'s hidden states must be [N, H] and its lm_head weight [V, H], got {list(hidden.shape)} and "
            f"{list(weight.shape)}. Flatten [B, T, H] with hidden[mask]."
        )
    if not (hidden.is_floating_point() and weight.is_floating_point()):
        raise ValueError(
            f"the {name}'s hidden states and weight must be floating point, got {hidden.dtype}, {weight.dtype}."
        )
    if len(weight) < 2:
        raise ValueError(f"the {name}'s vocabulary must have at least 2 tokens, got {len(weight)}.")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"the {name}'s bias must be [{len(weight)}], got {list(bias.shape)}.")
    devices = {str(tensor.device) for tensor in (hidden, weight, bias) if tensor is not None}
    if len(devices) > 1:
        raise ValueError(
            f"the {name}'s hidden states, weight and bias are on {', '.join(sorted(devices))}: move them to one."
        )
    if head.softcap is not None and not head.softcap > 0:
        raise ValueError(f"the {name}'s softcap must be > 0 or None, got {head.softcap}.")
    if not math.isfinite(head.logit_scale):
        raise ValueError(f"the {name}'s logit_scale must be finite, got {head.logit_scale}.")


def _check_token_ids(token_ids: Tensor, vocabulary: int) -> None:
    if ((token_ids < 0) | (token_ids >= vocabulary)).any():
        raise ValueError(
            f"token_ids must lie in [0, {vocabulary}), got {int(token_ids.min())} to {int(token_ids.max())}."
        )


def check_rows(
    normaliser: Tensor,
    vocabulary: int,
    token_ids: Tensor | None = None,
    divergence: Tensor | None = None,
    factor: Tensor | None = None,
) -> None:
    """Refuse what only the numbers show, all [N], after one look: on a GPU each look waits for the device."""
    bad = ~torch.isfinite(normaliser if divergence is None else normaliser + divergence)
    if token_ids is not None:
        bad |= (token_ids < 0) | (token_ids >= vocabulary)
    if factor is not None:
        bad |= ~((factor >= 0) & torch.isfinite(factor))
    if not bad.any():
        return
    if token_ids is not None:
        _check_token_ids(token_ids, vocabulary)
    if factor is not None and not bool(((factor >= 0) & torch.isfinite(factor)).all()):
        raise ValueError("weights must be finite and ≥ 0, and their denominator positive.")
    token = int(bad.nonzero()[0, 0])
    cause = _IMPOSSIBLE if torch.isfinite(normaliser[token]) else _NO_DISTRIBUTION
    raise NonFiniteLogitsError(token, f"token {token} of {len(bad)}", cause)
