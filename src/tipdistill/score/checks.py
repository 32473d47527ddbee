"""What the scores refuse: inputs that do not fit, before anything is computed, and rows that are no distribution."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..text import STAY_FINITE, check_known
from ..types import DIVERGENCES, Head

IMPLEMENTATIONS = ("auto", "reference", "chunked", "triton")
_NO_DISTRIBUTION = (
    "the logits are NaN or infinite (1e18 or more), so there is no distribution to compare. Check the weights (a "
    "diverged run, a wrong dtype) and the hidden states."
)
IMPOSSIBLE = (
    "the divergence is infinite: one model gives probability 0 to what the other can say (a logit of −∞). "
    f"{STAY_FINITE}"
)
_OUT_OF_RANGE = (
    "its gradient is beyond ±65504, the range of float16. Use bfloat16 or float32, smaller weights of the tokens, or a "
    "larger denominator."
)


class NonFiniteLogitsError(ValueError):
    """A row's logits hold NaN or 1e18 and more, nothing but −∞, or make a loss or a gradient infinite.

    `token` is such a row. A logit of −1e18 or less counts as −∞, a token that cannot be said.
    """

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


def rounded(gradient: Tensor | None, like: Tensor | None, hidden: Tensor, incoming: Tensor | None = None) -> Any:
    """A gradient in the dtype of what it is of. Float16 alone may not hold it, and then the token is named.

    Where the incoming gradient is above 1 a scaler may have scaled the loss: it looks for infinities itself.

    Args:
        gradient: [N, ...] of hidden states, or of a weight or bias that all tokens have a part in.
        like: what it is of.
        hidden: [N, H], hidden states of the tokens.
        incoming: [N] of a backward; None: the loss's own weights.
    """
    gradient = in_range(gradient, like, hidden, incoming)
    return None if gradient is None or like is None else gradient.to(like.dtype)


def in_range(gradient: Tensor | None, like: Tensor | None, hidden: Tensor, incoming: Tensor | None = None) -> Any:
    """The gradient as it is, where `rounded` of the same arguments is finite."""
    if gradient is None or like is None or like.dtype != torch.float16:
        return gradient
    # half a step above the largest float16 rounding begins to give ∞
    beyond = (gradient.abs() >= 65520) & gradient.isfinite()
    if not bool(beyond.any()) or (incoming is not None and bool(incoming.abs().amax() > 1)):
        return gradient
    token = _beyond(gradient, beyond, hidden)
    raise NonFiniteLogitsError(token, f"token {token} of {len(hidden)}", _OUT_OF_RANGE)


def scaled_(gradient: Tensor, factor: Tensor) -> Tensor:
    """gradient · factor, in place: the product of the factor as it is, rounded once to the gradient's dtype.

    Args:
        gradient: any shape, float.
        factor: a scalar; torch would round one of no dimension to a half-precision gradient's dtype first.

    Example:
        >>> scaled_(torch.full((2,), 3.0, dtype=torch.bfloat16), torch.tensor(1.003))  # in bfloat16 the factor is 1
        tensor([3.0156, 3.0156], dtype=torch.bfloat16)
    """
    wide = factor.detach().to(torch.promote_types(gradient.dtype, torch.float32)).reshape(1)
    if gradient.is_cuda or gradient.dtype == wide.dtype:
        return gradient.mul_(wide)
    # a CPU makes a float32 copy of what it multiplies: of a piece at a time
    for piece in gradient.view(-1).split(2**20):
        piece.mul_(wide)
    return gradient


def _beyond(gradient: Tensor, beyond: Tensor, hidden: Tensor) -> int:
    """The token to name: of a sum over the tokens that with the largest hidden state, which multiplies its part."""
    rows = beyond.any(1) if gradient.shape == hidden.shape else hidden.float().abs().amax(1)
    return int(rows.float().argmax())


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
    cause = IMPOSSIBLE if torch.isfinite(normaliser[token]) else _NO_DISTRIBUTION
    raise NonFiniteLogitsError(token, f"token {token} of {len(bad)}", cause)
