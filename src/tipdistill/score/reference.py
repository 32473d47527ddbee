"""The oracle: full logits, in float32 or float64 whatever the inputs. It reads like the equations and is slow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..types import Head, TokenScores
from .checks import rounded
from .tiles import NEGATIVE, accumulation_dtype, without_infinities


def logits(head: Head, vocabulary: int, temperature: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
    """Logits over the first `vocabulary` rows of the lm_head, float32 (float64 where the hidden states are).

    z = softcap · tanh(logit_scale · (hidden @ weight.T + bias) / softcap) / temperature

    Half precision is lifted before the projection, and its gradient is rounded once, at the end.

    Args:
        head: hidden states [N, H] and lm_head [V, H].
        vocabulary: rows to use, the vocabulary that student and teacher share.
        temperature: divides the logits, after the softcap.
        dtype: float64 to compute in it whatever the hidden states are.

    Example:
        >>> logits(Head(torch.ones(1, 2, dtype=torch.bfloat16), torch.eye(2)), vocabulary=2)
        tensor([[1., 1.]])
    """
    dtype = accumulation_dtype(head.hidden) if dtype is None else dtype
    z = _Projected.apply(head.hidden, head.weight, head.bias, dtype)[:, :vocabulary] * head.logit_scale
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    return z / temperature


class _Projected(torch.autograd.Function):
    """hidden @ weight.T + bias and its gradient, both outside of autocast."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias)
        with torch.autocast(hidden.device.type, enabled=False):
            z = hidden.to(dtype) @ weight.to(dtype).T
            return z if bias is None else z + bias.to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (of_z,), (hidden, weight, bias) = grads, ctx.saved_tensors
        with torch.autocast(hidden.device.type, enabled=False):
            of_hidden = of_z @ without_infinities(weight.to(of_z.dtype)) if ctx.needs_input_grad[0] else None
            of_weight = of_z.T @ hidden.to(of_z.dtype) if ctx.needs_input_grad[1] else None
            of_bias = of_z.sum(0) if ctx.needs_input_grad[2] else None
        gradients = zip((of_hidden, of_weight, of_bias), (hidden, weight, bias), strict=True)
        return (*(rounded(gradient, like, hidden) for gradient, like in gradients), None)


def log_probabilities(
    head: Head, vocabulary: int, temperature: float = 1.0, dtype: torch.dtype | None = None
) -> Tensor:
    """log P [N, vocabulary] of a head, exactly −∞ where a logit is −∞ (or so low that the engine takes it for that).

    Args:
        head, vocabulary, temperature, dtype: as in `logits`.

    Example:
        >>> log_probabilities(Head(torch.ones(1, 1), torch.tensor([[0.0], [0.0], [-math.inf]])), 3).exp()
        tensor([[0.5000, 0.5000, 0.0000]])
    """
    z = logits(head, vocabulary, temperature, dtype)
    return torch.log_softmax(z.masked_fill(z <= NEGATIVE, -math.inf), -1)


def token_scores(
    student: Head,
    teacher: Head | None,
    divergence: str,
    beta: float,
    temperature: float,
    token_ids: Tensor | None,
    fields: Sequence[str],
) -> TokenScores:
    """Every statistic of `TokenScores` from full logits; the arguments are those of `tipdistill.token_scores`.

    Example:
        >>> head = Head(torch.zeros(1, 2), torch.eye(2))
        >>> round(token_scores(head, None, "reverse_kl", 0.5, 1.0, None, ["entropy"]).entropy.item(), 4)
        0.6931
    """
    vocabulary = student.weight.shape[0] if teacher is None else min(student.weight.shape[0], teacher.weight.shape[0])
    log_s = log_probabilities(student, vocabulary, temperature)
    log_t = None if teacher is None else log_probabilities(teacher, vocabulary, temperature, log_s.dtype)
    return of_logprobs(log_s, log_t, divergence, beta, token_ids, fields)


def of_logprobs(
    log_s: Tensor, log_t: Tensor | None, divergence: str, beta: float, token_ids: Tensor | None, fields: Sequence[str]
) -> TokenScores:
    """Every statistic of `TokenScores` from log-probabilities; only those of the student are differentiated.

    Args:
        log_s: [N, V], log P_S.
        log_t: [N, V], log P_T; None: the student's statistics alone.
        divergence, beta, token_ids, fields: as in `tipdistill.token_scores`.

    Example:
        >>> even = torch.full((1, 2), 0.5).log()
        >>> of_logprobs(even, even, "reverse_kl", 0.5, None, ["reverse_kl"]).reverse_kl
        tensor([0.])
    """
    vocabulary = log_s.shape[1]
    says_s, of_s = log_s.detach() > -math.inf, _finite(log_s)
    s = of_s.exp()
    entropy = -(s * of_s).sum(-1)
    statistics = {"entropy": entropy.detach(), "entropy_norm": entropy.detach() / math.log(vocabulary)}
    if token_ids is not None:
        statistics["student_logprob"] = log_s.detach().gather(-1, token_ids[:, None])[:, 0]
    if log_t is not None:
        log_t = log_t.detach().to(log_s.dtype)
        says_t, of_t = log_t > -math.inf, _finite(log_t)
        t = of_t.exp()
        # with β of 0 or 1 there is no mixture, and its divergence is not asked for
        log_m = torch.logaddexp(of_s + _log(1 - beta), of_t + _log(beta))
        values = {
            "reverse_kl": _infinite((s * (of_s - of_t)).sum(-1), says_s & ~says_t),
            "forward_kl": _infinite((t * (of_t - of_s)).sum(-1), says_t & ~says_s),
            "jsd": beta * (t * (of_t - log_m)).sum(-1) + (1 - beta) * (s * (of_s - log_m)).sum(-1),
        }
        statistics |= {name: value.detach().clamp(min=0) for name, value in values.items()}
        statistics["divergence"] = values[divergence]
        statistics["teacher_entropy"] = -(t * of_t).sum(-1)
        s, of_s = s.detach(), of_s.detach()
        gradient = s * (of_s - of_t - (s * (of_s - of_t)).sum(-1, keepdim=True))
        statistics["gradient_norm"] = _infinite(gradient.norm(dim=-1), says_s & ~says_t)
        statistics["hellinger"] = ((of_s / 2).exp() - (of_t / 2).exp()).norm(dim=-1) / math.sqrt(2)
        g = s - t
        # gᵀHg is the variance of g under P_S; about the likeliest token, since it is far below g² where P_S is certain
        about = g - g.gather(-1, of_s.argmax(-1, keepdim=True))
        curvature = (s * about**2).sum(-1) - (s * about).sum(-1) ** 2
        statistics["signal_to_curvature"] = bounded_ratio((g**2).sum(-1), curvature)
        statistics |= _of_likeliest(log_s.detach(), log_t)
        if token_ids is not None:
            statistics["teacher_logprob"] = log_t.gather(-1, token_ids[:, None])[:, 0]
    return TokenScores(**{name: statistics[name] for name in fields})


def _of_likeliest(log_s: Tensor, log_t: Tensor) -> dict[str, Tensor]:
    """Statistics of both models' 16 (and the teacher's 5) likeliest tokens; of fewer where fewer are no −∞."""
    top_s, top_t = (_likeliest(log, 16) for log in (log_s, log_t))
    union = top_s | top_t
    of_s, of_t = (_finite(log.masked_fill(~union, -math.inf).log_softmax(-1)) for log in (log_s, log_t))
    t = of_t.exp()
    best = log_s.argmax(-1, keepdim=True)
    return {
        "top16_forward_kl": _infinite(
            (t * (of_t - of_s)).sum(-1).clamp(min=0), union & (log_t > -math.inf) & (log_s == -math.inf)
        ),
        "top16_teacher_mass": (top_s * log_t.exp()).sum(-1).clamp(max=1),
        "top16_overlap": (top_s & top_t).sum(-1).to(log_s.dtype) / top_s.sum(-1),
        "argmax_in_top5": _likeliest(log_t, 5).gather(1, best)[:, 0].to(log_s.dtype),
    }


def _likeliest(log: Tensor, k: int) -> Tensor:
    """bool [N, V]: the k likeliest tokens, those of probability 0 left out."""
    top = torch.zeros_like(log, dtype=torch.bool)
    return top.scatter_(1, log.topk(min(k, log.shape[1])).indices, True) & (log > -math.inf)


def _finite(log: Tensor) -> Tensor:
    """−∞ becomes a number whose exponential is 0, so that p log p is 0 there, and so is its gradient."""
    return log.masked_fill(log == -math.inf, NEGATIVE)


def _infinite(value: Tensor, impossible: Tensor) -> Tensor:
    """∞ for rows where one model says what is impossible to the other; such a row has no gradient."""
    return value.masked_fill(impossible.any(-1), math.inf)


def bounded_ratio(signal: Tensor, curvature: Tensor) -> Tensor:
    """signal / curvature, 0 without a signal; at most float32's largest number, which a certain student exceeds.

    Example:
        >>> bounded_ratio(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0.5, 0.0, 0.0]))
        tensor([2.0000e+00, 0.0000e+00, 3.4028e+38])
    """
    largest = min(torch.finfo(dtype).max for dtype in (torch.float32, signal.dtype))
    ratio = torch.where(curvature > 0, signal / curvature, math.inf).clamp(max=largest)
    return torch.where(signal > 0, ratio, torch.where(signal.isnan(), math.nan, 0.0))


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf
