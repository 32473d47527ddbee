"""The k + 1 outcomes of a teacher that is known by its k likeliest tokens, and what they give of each statistic.

The outcomes are each of the k tokens, and the tail, all other tokens together:

    P_o = P_S(o) of a token, Σ P_S over the tail      Q_o = P_T(o) of a token, 1 − Σ P_T over the k tokens

Merging outcomes never raises a divergence (data processing inequality), so every divergence of P and Q is a lower bound
of that of the two models; they are equal where P_S / P_T is the same for all tokens of the tail. The student's own
statistics are exact, over the whole vocabulary. `OF_TOP_K` says of each statistic what it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..types import TokenScores
from . import reference
from .tiles import NEGATIVE

EXACT, LOWER_BOUND, REFUSED = "exact", "lower bound", "refused"
# The norm of the gradient of the reverse KL on k + 1 outcomes, the loss that is trained on at beta = 1. Of the whole
# vocabulary's it is neither a lower nor an upper bound.
EXACT_ON_OUTCOMES = "exact, on k + 1 outcomes"


class FromTopK(NamedTuple):
    """What a teacher's k likeliest tokens give of a statistic.

    Attributes:
        gives: `EXACT`, `EXACT_ON_OUTCOMES`, `LOWER_BOUND` or `REFUSED`.
        least: the smallest k.
        server_only: given by the front from hidden states alone, whose server is also asked for the sampled token.
        why_not: why the others do not give it.
    """

    gives: str
    least: int = 1
    server_only: bool = False
    why_not: str = ""


_OF_THE_STUDENTS = "it needs the teacher's probability of the student's likeliest tokens, whichever they are"
# Every field of TokenScores. docs/vllm.md and docs/verl.md print this table, and what follows from it for each rule.
OF_TOP_K = {
    "entropy": FromTopK(EXACT),
    "entropy_norm": FromTopK(EXACT),
    "student_logprob": FromTopK(EXACT, server_only=True),
    "teacher_logprob": FromTopK(
        EXACT,
        server_only=True,
        why_not="the sampled token need not be among them; a loss on the sampled tokens has it",
    ),
    "argmax_in_top5": FromTopK(EXACT, least=5),
    "top16_overlap": FromTopK(EXACT, least=16),
    "gradient_norm": FromTopK(EXACT_ON_OUTCOMES),
    "reverse_kl": FromTopK(LOWER_BOUND),
    "forward_kl": FromTopK(LOWER_BOUND),
    "jsd": FromTopK(LOWER_BOUND),
    "hellinger": FromTopK(LOWER_BOUND),
    "teacher_entropy": FromTopK(LOWER_BOUND),
    "divergence": FromTopK(LOWER_BOUND, server_only=True),
    "signal_to_curvature": FromTopK(
        REFUSED, why_not="it needs the teacher's probability of every token, the tail's one by one"
    ),
    "top16_forward_kl": FromTopK(REFUSED, why_not=_OF_THE_STUDENTS),
    "top16_teacher_mass": FromTopK(REFUSED, why_not=_OF_THE_STUDENTS),
}
# What rounding of the log-probabilities leaves of 1 − Σ p over the top k; a teacher's tail is never taken to be less. A
# floor above the true tail lowers the reverse KL further and leaves it a lower bound; teacher entropy and forward KL it
# raises, by at most about −2 ε log ε = 3e-5 nats (float32).
TAIL_FLOOR = 1e-6
TAIL_FLOOR_FLOAT64 = 1e-10


def unavailable(fields: Iterable[str], top_k: int | None, server: bool = True) -> list[str]:
    """The statistics among `fields` that a teacher's k likeliest tokens do not tell, not even as bounds.

    Args:
        fields: names of `TokenScores`.
        top_k: k, how many of the teacher's likeliest tokens are known; None: as many as it takes.
        server: the teacher is behind a server, which tells the sampled token too.

    Example:
        >>> unavailable(["entropy", "reverse_kl", "signal_to_curvature", "top16_overlap"], top_k=8)
        ['signal_to_curvature', 'top16_overlap']
    """
    return [
        name
        for name in fields
        if name not in OF_TOP_K
        or OF_TOP_K[name].gives == REFUSED
        or (OF_TOP_K[name].server_only and not server)
        or (top_k is not None and OF_TOP_K[name].least > top_k)
    ]


def check_fields(fields: Iterable[str], top_k: int, server: bool) -> None:
    """Refuse statistics that a teacher's k likeliest tokens do not tell.

    Args:
        fields, top_k, server: as in `unavailable`.

    Raises:
        ValueError: which they do not give, and which they do, or how many tokens it takes.

    Example:
        >>> check_fields(["entropy", "top16_overlap"], top_k=8, server=True)
        Traceback (most recent call last):
        ValueError: 'top16_overlap' needs the teacher's 16 likeliest tokens, got 8.
    """
    missing = unavailable(fields, top_k, server)
    few = [name for name in missing if not unavailable([name], None, server)]
    if few:
        least = max(OF_TOP_K[name].least for name in few)
        raise ValueError(f"{', '.join(map(repr, few))} needs the teacher's {least} likeliest tokens, got {top_k}.")
    if missing:
        given = ", ".join(name for name in OF_TOP_K if not unavailable([name], None, server))
        raise ValueError(
            f"{', '.join(map(repr, missing))} cannot be had, nor bounded, from the teacher's likeliest tokens; they "
            f"give {given}."
        )


# The student's outcomes come in two ways, which agree to rounding: with autograd, or in place without it.


def student_by_autograd(log_s: Tensor, token_ids: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """What the student says of the k + 1 outcomes, differentiable.

    Args:
        log_s: [n, V], log P_S of the whole vocabulary.
        token_ids: int64 [n, k].
        known: bool [n, k], which columns are tokens of the student; the others have log P = `NEGATIVE`.

    Returns:
        log P [n, k + 1], and log P_S of the tail's tokens [n, V], `NEGATIVE` at the k tokens.

    Example:
        >>> even = torch.full((1, 4), 0.25).log()
        >>> log_p, _ = student_by_autograd(even, torch.tensor([[2]]), torch.tensor([[True]]))
        >>> log_p.exp()
        tensor([[0.2500, 0.7500]])
    """
    vocabulary = log_s.shape[1]
    absent = torch.where(known, 0.0, NEGATIVE).to(log_s.dtype)
    of_top = log_s.gather(1, torch.where(known, token_ids, 0)) + absent
    # where nothing is known of a column, it repeats a token that is; a row without any has the whole rest
    first = torch.where(known, token_ids, vocabulary).amin(1, keepdim=True)
    masked = log_s.scatter(1, torch.where(known, token_ids, first.clamp(max=vocabulary - 1)), NEGATIVE)
    of_tail = torch.where(first < vocabulary, masked, log_s)
    return torch.cat([of_top, of_tail.logsumexp(1, keepdim=True)], 1), of_tail


def student_in_place(z: Tensor, token_ids: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """What the student says of the k + 1 outcomes, without autograd and with one more tensor of the logits' size.

    Args:
        z: [n, V], logits, which are overwritten.
        token_ids: int64 [n, k].
        with_entropy: whether to compute it.

    Returns:
        log P [n, k + 1], P_S of the tail's tokens [n, V] (0 at the k tokens), the entropy over the whole vocabulary [n]
        and the log-normaliser [n].

    Example:
        >>> student_in_place(torch.zeros(1, 4), torch.tensor([[2]]), with_entropy=False)[0].exp()
        tensor([[0.2500, 0.7500]])
    """
    highest = z.amax(1, keepdim=True)
    # finite, so that a forbidden token's p log p is 0
    z.sub_(highest).clamp_(min=NEGATIVE)
    of_top = z.gather(1, token_ids)
    p = z.exp()
    total = p.sum(1, keepdim=True)
    log_total = total.log()
    entropy = log_total[:, 0] - z.mul_(p).sum(1) / total[:, 0] if with_entropy else None
    # not 1 − Σ over the k tokens, which has no digits left where the student is nearly certain
    of_tail = p.scatter_(1, token_ids, 0.0).div_(total)
    log_tail = of_tail.sum(1, keepdim=True).clamp_(min=torch.finfo(z.dtype).tiny).log_()
    return torch.cat([of_top - log_total, log_tail], 1), of_tail, entropy, (highest + log_total)[:, 0]


def teacher_outcomes(logprobs: Tensor, all_known: Tensor | None = None) -> Tensor:
    """What the teacher says of the k + 1 outcomes; 1 − Σ p is summed in float64, since it cancels.

    Args:
        logprobs: [n, k], `NEGATIVE` where nothing is known.
        all_known: bool [n], rows whose k tokens are the whole vocabulary, so that there is no tail.

    Returns:
        log Q [n, k + 1], the tail never below `TAIL_FLOOR`.

    Example:
        >>> teacher_outcomes(torch.tensor([[0.5, 0.25]]).log()).exp()
        tensor([[0.5000, 0.2500, 0.2500]])
    """
    mass = logprobs.double().exp().sum(1, keepdim=True)
    floor = min(TAIL_FLOOR, TAIL_FLOOR_FLOAT64) if logprobs.dtype == torch.float64 else TAIL_FLOOR
    log_tail = (1 - mass).clamp(min=floor).log().to(logprobs.dtype)
    if all_known is not None:
        log_tail = torch.where(all_known[:, None], NEGATIVE, log_tail)
    return torch.cat([logprobs, log_tail], 1)


def lower_bounds(
    log_p: Tensor, log_q: Tensor, fields: Iterable[str], divergence: str = "reverse_kl", beta: float = 0.5
) -> TokenScores:
    """The lower bounds among `fields`: the reference's statistics of two distributions over the k + 1 outcomes.

    Args:
        log_p, log_q: [n, k + 1], of student and teacher.
        fields: keys of `OF_TOP_K`; those that are no bounds are passed over.
        divergence, beta: as in `tipdistill.token_scores`.

    Returns:
        TokenScores; "divergence" is differentiable in `log_p`.

    Example:
        >>> student, teacher = torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[0.5, 0.5]]).log()
        >>> round(lower_bounds(student, teacher, ["reverse_kl"]).reverse_kl.item(), 4)
        0.1308
    """
    bounds = [name for name in fields if OF_TOP_K[name].gives == LOWER_BOUND]
    log_p, log_q = (log.masked_fill(_forbidden(log), -math.inf) for log in (log_p, log_q))
    return reference.of_logprobs(log_p, log_q, divergence, beta, None, bounds)


def gradient_norm(log_p: Tensor, log_q: Tensor, of_tail: Tensor) -> Tensor:
    """‖∂D/∂z‖₂ [n] of the reverse KL on k + 1 outcomes, ∂D/∂z_v = P_S(v) · (log P_o/Q_o − D); ∞ where D is.

    The gradient that is trained with at beta = 1; the norm of the whole vocabulary's may be smaller or larger.

    Args:
        log_p, log_q: [n, k + 1], of student and teacher.
        of_tail: [n, V], P_S of the tail's tokens, 0 at the others.

    Example:
        >>> log_p, log_q = torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[0.5, 0.5]]).log()
        >>> round(gradient_norm(log_p, log_q, torch.tensor([[0.0, 0.25, 0.25, 0.25]])).item(), 4)
        0.2379
    """
    p, ratio = log_p.exp(), log_p - log_q
    divergence = _weighted(p, ratio).sum(1, keepdim=True)
    excess = _weighted(p, ratio - divergence)
    # the tail's share of the gradient is spread over its tokens ∝ P_S; a tail without any has none
    within = of_tail.norm(dim=1) / p[:, -1].clamp(min=torch.finfo(p.dtype).tiny)
    norm = torch.cat([excess[:, :-1], (excess[:, -1] * within)[:, None]], 1).norm(dim=1)
    return norm.masked_fill((_forbidden(log_q) & ~_forbidden(log_p)).any(1), math.inf)


def _forbidden(log: Tensor) -> Tensor:
    """bool [n, k + 1]: the outcome's logit was −∞; what is added to `NEGATIVE` is far smaller."""
    return log.detach() < NEGATIVE / 2


def _weighted(probability: Tensor, value: Tensor) -> Tensor:
    """probability · value with 0 · ±∞ = 0, the limit of p log p."""
    return probability * value.masked_fill(probability == 0, 0.0)


def of_ranks(student: Tensor, likeliest: Tensor, fields: Sequence[str]) -> dict[str, Tensor]:
    """The statistics of ranks among `fields`, exact.

    Args:
        student: [n, V], logits or log-probabilities.
        likeliest: int64 [n, k], the teacher's likeliest tokens, the likeliest first.
        fields: names of statistics; the others are passed over.

    Example:
        >>> of_ranks(torch.tensor([[0.0, 2.0, 1.0]]), torch.tensor([[1, 0]]), ["argmax_in_top5"])
        {'argmax_in_top5': tensor([1.])}
    """
    ranks = {}
    if "argmax_in_top5" in fields:
        best = student.argmax(1, keepdim=True)
        ranks["argmax_in_top5"] = (likeliest[:, :5] == best).any(1).to(student.dtype)
    if "top16_overlap" in fields:
        k = min(16, student.shape[1])
        in_both = student.topk(k).indices[:, :, None] == likeliest[:, None, :k]
        ranks["top16_overlap"] = in_both.any(2).sum(1).to(student.dtype) / k
    return ranks
