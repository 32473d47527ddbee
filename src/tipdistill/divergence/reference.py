"""The oracle: full logits, plain autograd, any dtype up to float64. It reads like the equations and is slow."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..types import Head, TokenScores


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
    z = head.hidden @ head.weight[:vocabulary].to(head.hidden.dtype).T
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
    s = log_s.exp()
    entropy = -_weighted(s, log_s).sum(-1)
    found = {"entropy": entropy.detach(), "entropy_norm": entropy.detach() / math.log(vocabulary)}
    if token_ids is not None:
        found["student_logprob"] = log_s.detach().gather(-1, token_ids[:, None])[:, 0]
    if teacher is not None:
        log_t = torch.log_softmax(logits(teacher, vocabulary, temperature).to(log_s.dtype), dim=-1).detach()
        t = log_t.exp()
        log_m = torch.logaddexp(log_s + _log(1 - beta), log_t + _log(beta))
        divergences = {
            "reverse_kl": _weighted(s, log_s - log_t).sum(-1),
            "forward_kl": _weighted(t, log_t - log_s).sum(-1),
            "jsd": beta * _weighted(t, log_t - log_m).sum(-1) + (1 - beta) * _weighted(s, log_s - log_m).sum(-1),
        }
        found |= {name: value.detach().clamp(min=0) for name, value in divergences.items()}
        found["divergence"] = divergences[divergence]
        found["teacher_entropy"] = -_weighted(t, log_t).sum(-1)
        s, log_s = s.detach(), log_s.detach()
        gradient = _weighted(s, log_s - log_t - found["reverse_kl"][:, None])
        # an infinite divergence has an infinite gradient, which the equation above writes as ∞ − ∞
        found["gradient_norm"] = torch.where(found["reverse_kl"].isinf(), math.inf, gradient.norm(dim=-1))
        found["hellinger"] = (s.sqrt() - t.sqrt()).norm(dim=-1) / math.sqrt(2)
        g = s - t
        curvature = (s * (g - (s * g).sum(-1, keepdim=True)) ** 2).sum(-1)  # gᵀHg, the variance of g under P_S
        found["signal_to_curvature"] = torch.where(curvature > 0, (g**2).sum(-1) / curvature, 0.0)
        if token_ids is not None:
            found["teacher_logprob"] = log_t.gather(-1, token_ids[:, None])[:, 0]
    return TokenScores(**{name: found[name] for name in fields})


def _weighted(probability: Tensor, value: Tensor) -> Tensor:
    """probability · value with 0 · ±∞ = 0, the limit of p log p."""
    return probability * value.masked_fill(probability == 0, 0.0)


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf
