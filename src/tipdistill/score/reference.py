"""The oracle: full logits, plain autograd, any dtype up to float64. It reads like the equations and is slow."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..types import Head, TokenScores
from .checks import InRange


def logits(head: Head, vocabulary: int, temperature: float = 1.0) -> Tensor:
    """Logits over the first `vocabulary` rows of the lm_head, in the dtype of the hidden states.

    z = softcap · tanh(logit_scale · (hidden @ weight.T + bias) / softcap) / temperature

    Args:
        head: hidden states [N, H] and lm_head [V, H].
        vocabulary: rows to use, the vocabulary that student and teacher share.
        temperature: divides the logits, after the softcap.

    Example:
        >>> logits(Head(torch.ones(1, 2), torch.eye(2)), vocabulary=2)
        tensor([[1., 1.]])
    """
    hidden, weight = head.hidden, head.weight
    if hidden.dtype == torch.float16:
        hidden, weight = (InRange.apply(value, hidden.detach()) for value in (hidden, weight))
    z = hidden @ weight[:vocabulary].to(hidden.dtype).T
    if head.bias is not None:
        z = z + head.bias[:vocabulary].to(z.dtype)
    z = z * head.logit_scale
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    return z / temperature


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
    log_s = torch.log_softmax(logits(student, vocabulary, temperature), dim=-1)
    log_t = None if teacher is None else torch.log_softmax(logits(teacher, vocabulary, temperature), dim=-1)
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
    s = log_s.exp()
    entropy = -_weighted(s, log_s).sum(-1)
    statistics = {"entropy": entropy.detach(), "entropy_norm": entropy.detach() / math.log(vocabulary)}
    if token_ids is not None:
        statistics["student_logprob"] = log_s.detach().gather(-1, token_ids[:, None])[:, 0]
    if log_t is not None:
        log_t = log_t.detach().to(log_s.dtype)
        t = log_t.exp()
        log_m = torch.logaddexp(log_s + _log(1 - beta), log_t + _log(beta))
        divergences = {
            "reverse_kl": _weighted(s, log_s - log_t).sum(-1),
            "forward_kl": _weighted(t, log_t - log_s).sum(-1),
            "jsd": beta * _weighted(t, log_t - log_m).sum(-1) + (1 - beta) * _weighted(s, log_s - log_m).sum(-1),
        }
        statistics |= {name: value.detach().clamp(min=0) for name, value in divergences.items()}
        statistics["divergence"] = divergences[divergence]
        statistics["teacher_entropy"] = -_weighted(t, log_t).sum(-1)
        s, log_s = s.detach(), log_s.detach()
        gradient = _weighted(s, log_s - log_t - statistics["reverse_kl"][:, None])
        # an infinite divergence has an infinite gradient, which the equation above writes as ∞ − ∞
        statistics["gradient_norm"] = torch.where(statistics["reverse_kl"].isinf(), math.inf, gradient.norm(dim=-1))
        statistics["hellinger"] = (s.sqrt() - t.sqrt()).norm(dim=-1) / math.sqrt(2)
        g = s - t
        # gᵀHg is the variance of g under P_S; about the likeliest token, since it is far below g² where P_S is certain
        about = g - g.gather(-1, log_s.argmax(-1, keepdim=True))
        curvature = (s * about**2).sum(-1) - (s * about).sum(-1) ** 2
        statistics["signal_to_curvature"] = bounded_ratio((g**2).sum(-1), curvature)
        statistics |= _of_likeliest(log_s, log_t)
        if token_ids is not None:
            statistics["teacher_logprob"] = log_t.gather(-1, token_ids[:, None])[:, 0]
    return TokenScores(**{name: statistics[name] for name in fields})


def _of_likeliest(log_s: Tensor, log_t: Tensor) -> dict[str, Tensor]:
    """Statistics of both models' 16 (and the teacher's 5) likeliest tokens; all of them where V is smaller."""
    k = min(16, log_s.shape[1])
    of_s, of_t = (torch.zeros_like(log_s).scatter_(1, log.topk(k).indices, 1.0).bool() for log in (log_s, log_t))
    in_top5 = torch.zeros_like(of_t).scatter_(1, log_t.topk(min(5, k)).indices, True)
    on_union = [log.masked_fill(~(of_s | of_t), -math.inf).log_softmax(-1) for log in (log_s, log_t)]
    t = on_union[1].exp()
    return {
        "top16_forward_kl": _weighted(t, on_union[1] - on_union[0]).sum(-1).clamp(min=0),
        "top16_teacher_mass": _weighted(of_s.to(log_t.dtype), log_t.exp()).sum(-1).clamp(max=1),
        "top16_overlap": (of_s & of_t).sum(-1).to(log_s.dtype) / k,
        "argmax_in_top5": in_top5.gather(1, log_s.argmax(-1, keepdim=True))[:, 0].to(log_s.dtype),
    }


def _weighted(probability: Tensor, value: Tensor) -> Tensor:
    """probability · value with 0 · ±∞ = 0, the limit of p log p."""
    return probability * value.masked_fill(probability == 0, 0.0)


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
