"""Score: the last hidden states and lm_heads of both models → TokenScores, never an [N, V] tensor."""

from __future__ import annotations

import difflib
import importlib.util
import math
import os
from collections.abc import Sequence
from dataclasses import fields as dataclass_fields
from types import ModuleType

import torch
from torch import Tensor

from ..types import DIVERGENCES, Head, TokenScores
from . import chunked, reference
from .top import STATISTICS as _OF_LIKELIEST
from .top import top_statistics

__all__ = ["IMPLEMENTATIONS", "NonFiniteLogitsError", "fused_rows", "token_scores"]

IMPLEMENTATIONS = ("auto", "reference", "chunked", "triton")
_FIELDS = tuple(field.name for field in dataclass_fields(TokenScores))
_OF_STUDENT = {"entropy", "entropy_norm", "student_logprob"}
_DEFAULT = (
    "entropy",
    "entropy_norm",
    "teacher_entropy",
    "reverse_kl",
    "forward_kl",
    "divergence",
    "student_logprob",
    "teacher_logprob",
)
_OF_TOKENS = ("student_logprob", "teacher_logprob")
_OF_TRITON = {torch.float32, torch.bfloat16, torch.float16}
# torch.mm of half-precision operands with a float32 result
_MIXED_MATMUL = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)


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


def token_scores(
    student: Head,
    teacher: Head | None = None,
    divergence: str = "reverse_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    token_ids: Tensor | None = None,
    fields: Sequence[str] | None = None,
    impl: str = "auto",
) -> TokenScores:
    """Entropies and divergences of N tokens from hidden states and lm_heads (paper Eq. 1 to 3).

    entropy = H(P_S), reverse_kl = KL(P_S ‖ P_T), forward_kl = KL(P_T ‖ P_S), all in nats over the shared vocabulary;
    jsd = β KL(P_T ‖ M) + (1 − β) KL(P_S ‖ M) with M = (1 − β) P_S + β P_T, as in TRL. `divergence` is the one asked for
    and differentiable in the student: its backward projects again the tokens whose incoming gradient is not zero,
    and no others.

    Args:
        student: hidden states [N, H_S] and lm_head [V_S, H_S].
        teacher: hidden states [N, H_T] and lm_head [V_T, H_T]; None: the student's entropies alone. Where V_S and V_T
            differ by padding, the first min(V_S, V_T) rows are compared.
        divergence: "reverse_kl", "forward_kl" or "jsd".
        beta: β of the Jensen-Shannon divergence, in (0, 1).
        temperature: divides both models' logits, > 0.
        token_ids: int64 [N], the sampled tokens, for student_logprob and teacher_logprob.
        fields: names of the statistics wanted, see `TokenScores`; None: those of the paper, that is all but jsd,
            hellinger, gradient_norm, signal_to_curvature and those of the likeliest tokens. Nothing else is computed.
        impl: "chunked" (tiles, any device), "triton" (CUDA, float32 and half precision), "reference" (full logits, any
            dtype up to float64) or "auto": triton where it can be had, and chunked elsewhere.

    Returns:
        TokenScores, each statistic float32 [N] (float64 where the hidden states are float64).

    Raises:
        ValueError: shapes, devices, names or ranges that do not fit.
        NonFiniteLogitsError: a ValueError that names the first token with NaN or infinite logits.

    Example:
        >>> student, teacher = (Head(torch.eye(3), torch.randn(50, 3), logit_scale=2.0) for _ in range(2))
        >>> scores = token_scores(student, teacher)
        >>> scores.entropy.shape, bool((scores.reverse_kl >= 0).all())
        (torch.Size([3]), True)
        >>> token_scores(student).entropy_norm.max() <= 1
        tensor(True)
    """
    vocabulary = _check(student, teacher, divergence, beta, temperature, token_ids, impl)
    engine = _engine(impl, student, teacher)
    wanted = _wanted(fields, teacher, token_ids, beta)
    if _OF_STUDENT.issuperset(wanted):
        teacher = None  # nobody asked for it, so it is not projected
    if impl == "reference":
        for head in (student, teacher):
            if head is not None:
                normaliser = reference.logits(head, vocabulary, temperature).detach().logsumexp(-1)
                _check_rows(normaliser, vocabulary, token_ids)
        return reference.token_scores(student, teacher, divergence, beta, temperature, token_ids, wanted)
    likeliest = tuple(name for name in wanted if name in _OF_LIKELIEST)
    computed = tuple(divergence if name == "divergence" else name for name in wanted if name not in likeliest)
    if "entropy_norm" in wanted:
        computed += ("entropy",)
    with torch.no_grad(), torch.autocast(student.hidden.device.type, enabled=False):
        found = engine.statistics(student, teacher, computed, beta, temperature, token_ids, vocabulary)
    normaliser = found["s_log"] if teacher is None else found["s_log"] + found["t_log"]
    _check_rows(normaliser, vocabulary, token_ids)
    values = {name: found[name] for name in wanted if name in found}
    if "entropy_norm" in wanted:
        values["entropy_norm"] = found["entropy"] / math.log(vocabulary)
    if likeliest:
        assert teacher is not None
        values |= top_statistics(student, teacher, likeliest, temperature, vocabulary)
    if "divergence" in wanted:
        assert teacher is not None
        values["divergence"] = engine.TokenDivergence.apply(
            student.hidden,
            student.weight,
            student.bias,
            divergence,
            beta,
            chunked.Projection.of(student, vocabulary, temperature),
            chunked.Projection.of(teacher, vocabulary, temperature),
            teacher.hidden.detach(),
            found,
        )
    return TokenScores(**values)


def fused_rows(
    student: Head,
    teacher: Head,
    factor: Tensor,
    divergence: str,
    beta: float,
    temperature: float,
    fields: Sequence[str],
    token_ids: Tensor | None,
    impl: str,
) -> tuple[Tensor, TokenScores]:
    """Σ factor · divergence over N rows, each projected once, and the asked statistics of the same pass.

    What `tipdistill.fused_divergence_loss` is made of; the arguments are those of `token_scores`, and `factor` [N].

    Example:
        >>> head = Head(torch.zeros(2, 3, requires_grad=True), torch.randn(9, 3))
        >>> fused_rows(head, head, torch.ones(2), "reverse_kl", 0.5, 1.0, (), None, "auto")[0].item()
        0.0
    """
    vocabulary = _check(student, teacher, divergence, beta, temperature, token_ids, impl)
    engine = _engine(impl, student, teacher)
    wanted = _wanted(fields, teacher, token_ids, beta)
    if impl == "reference":
        scores = token_scores(
            student, teacher, divergence, beta, temperature, token_ids, tuple({*wanted, "divergence"}), impl
        )
        divergences = scores.require("divergence").detach()
        _check_rows(torch.zeros_like(divergences), vocabulary, divergence=divergences, factor=factor)
        loss = (scores.require("divergence") * factor).sum()
        return loss, TokenScores(**{name: getattr(scores, name).detach() for name in wanted})
    computed = tuple(
        dict.fromkeys(
            {"divergence": divergence, "entropy_norm": "entropy"}.get(name, name)
            for name in wanted
            if name not in _OF_LIKELIEST
        )
    )
    loss, of_rows, normaliser, *values = engine.FusedLoss.apply(
        student.hidden,
        student.weight,
        student.bias,
        divergence,
        beta,
        chunked.Projection.of(student, vocabulary, temperature),
        chunked.Projection.of(teacher, vocabulary, temperature),
        teacher.hidden.detach(),
        factor.detach(),
        computed,
        token_ids,
    )
    _check_rows(normaliser, vocabulary, token_ids, of_rows, factor)
    found = dict(zip(computed, values, strict=True))
    if "divergence" in wanted:
        found["divergence"] = found[divergence]
    if "entropy" in found:
        found["entropy_norm"] = found["entropy"] / math.log(vocabulary)
    likeliest = tuple(name for name in wanted if name in _OF_LIKELIEST)
    if likeliest:
        found |= top_statistics(student, teacher, likeliest, temperature, vocabulary)
    return loss, TokenScores(**{name: found[name] for name in wanted})


def _engine(impl: str, student: Head, teacher: Head | None) -> ModuleType:
    """The module that computes: `triton` where it was asked for or is the fastest, else `chunked`."""
    if impl == "triton" or (impl == "auto" and student.hidden.is_cuda):
        obstacle = _triton_obstacle(student, teacher)
        if obstacle is None:
            from . import triton  # imported where it is used: the package is not everywhere

            return triton
        if impl == "triton":
            raise ValueError(f"impl='triton' {obstacle} Or ask for impl='auto', which takes it where it can be had.")
    return chunked


def _triton_obstacle(student: Head, teacher: Head | None) -> str | None:
    """Why the Triton kernels cannot take these inputs, and what to do; None where they can."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and not student.hidden.is_cuda
    if not (student.hidden.is_cuda or interpreted):
        return f"needs a CUDA device, and the tensors are on {student.hidden.device}: move them to one."
    if torch.version.hip is not None:
        return "is written and measured for CUDA, not for ROCm: use impl='chunked'."
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton: pip install triton."
    dtypes = {tensor.dtype for head in (student, teacher) if head is not None for tensor in (head.hidden, head.weight)}
    if not dtypes <= _OF_TRITON:
        return "takes float32, bfloat16 and float16: use impl='chunked' for other dtypes."
    half = student.hidden.dtype != torch.float32 or (teacher is not None and teacher.hidden.dtype != torch.float32)
    if half and not interpreted and not _MIXED_MATMUL:
        return "needs torch 2.8 or newer for half precision: pip install -U torch."
    if not interpreted and torch.cuda.get_device_capability(student.hidden.device) < (8, 0):
        return "needs a GPU of compute capability 8.0 (Ampere) or newer: use impl='chunked'."
    return None


def _wanted(
    fields: Sequence[str] | None, teacher: Head | None, token_ids: Tensor | None, beta: float
) -> tuple[str, ...]:
    if fields is None:
        fields = [name for name in _DEFAULT if teacher is not None or name in _OF_STUDENT]
        return tuple(name for name in fields if token_ids is not None or name not in _OF_TOKENS)
    if isinstance(fields, str):
        raise ValueError(f"fields must be a list of names, got the string {fields!r}: write [{fields!r}].")
    for name in fields:
        if name not in _FIELDS:
            raise ValueError(f"unknown statistic {name!r}; there are {', '.join(_FIELDS)}.{_nearest(name, _FIELDS)}")
        if teacher is None and name not in _OF_STUDENT:
            raise ValueError(f"'{name}' compares with a teacher: pass teacher=Head(...).")
        if name == "jsd" and not 0 < beta < 1:
            raise ValueError(f"'jsd' is a statistic at β in (0, 1), got beta = {beta!r}: 0 and 1 are the KLs.")
        if token_ids is None and name in _OF_TOKENS:
            raise ValueError(f"'{name}' is of the sampled tokens: pass token_ids, int64 [N].")
    return tuple(dict.fromkeys(fields))


def _check(
    student: Head,
    teacher: Head | None,
    divergence: str,
    beta: float,
    temperature: float,
    token_ids: Tensor | None,
    impl: str,
) -> int:
    """Refuse what cannot be computed, before anything is; returns the shared vocabulary."""
    if divergence not in DIVERGENCES:
        raise ValueError(
            f"divergence must be one of {', '.join(DIVERGENCES)}, got {divergence!r}."
            f"{_nearest(divergence, DIVERGENCES)}"
        )
    if impl not in IMPLEMENTATIONS:
        raise ValueError(
            f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}.{_nearest(impl, IMPLEMENTATIONS)}"
        )
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
        if not token_ids.is_cuda:  # on a GPU a look waits for the device: see _check_rows
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


def _check_rows(
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


def _nearest(name: str, allowed: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(name), allowed, n=1)
    return f" Did you mean '{near[0]}'?" if near else ""
