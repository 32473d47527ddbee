"""Statistics and the loss where the teacher tells its k likeliest tokens only, from the student's full logits.

The vocabulary is read as k + 1 outcomes: the teacher's k likeliest tokens and the tail, all the others together. A
divergence of distributions merged so is never above that of the distributions themselves (data processing inequality),
so every divergence here is a lower bound; the student's own statistics are exact. `OF_TOP_K` says which is which.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..types import TokenScores
from .sums import INFINITE
from .tiles import NEGATIVE, _spans

# Of which statistic the teacher's k likeliest tokens give what.
OF_TOP_K = {
    "entropy": "exact",
    "entropy_norm": "exact",
    "teacher_entropy": "lower bound",
    "reverse_kl": "lower bound",
    "forward_kl": "lower bound",
    "jsd": "lower bound",
    "hellinger": "lower bound",
    "gradient_norm": "exact, of the reverse KL with a tail",
    "top16_overlap": "exact from k = 16",
    "argmax_in_top5": "exact from k = 5",
}
LEAST_TOP = {"top16_overlap": 16, "argmax_in_top5": 5}
# What rounding of the log-probabilities leaves of 1 − Σ p over the top k; a teacher's tail is never
# taken to be less. A floor above the true tail lowers the reverse KL further and leaves it a lower bound; teacher
# entropy and forward KL it raises, by at most about −2 ε log ε = 3e-5 nats (float32).
TAIL_FLOOR = 1e-6
TAIL_FLOOR_FLOAT64 = 1e-10
_ENTRIES = 2**25  # logits of a chunk: 128 MiB in float32, of which a chunk holds a few copies


def top_k_scores(
    logits: Tensor, token_ids: Tensor, logprobs: Tensor, fields: Sequence[str], rows: Tensor | None = None
) -> TokenScores:
    """Statistics of N tokens from the student's logits and the teacher's k likeliest tokens, in chunks of rows.

    With P and Q the student and the teacher on the k + 1 outcomes, reverse_kl = Σ P log P/Q, forward_kl = Σ Q log Q/P,
    teacher_entropy = −Σ Q log Q, jsd at β = ½, hellinger = ‖√P − √Q‖₂ / √2; entropy = H(P_S) over the whole vocabulary,
    and gradient_norm the norm of the gradient of `tail_reverse_kl` at the logits.

    Args:
        logits: [N, V], the student's, any floating dtype; computed with in float32 (float64 for float64).
        token_ids: int64 [N, k], the teacher's k likeliest tokens, each once, in any order; k < V.
        logprobs: float [N, k], the teacher's log-probabilities of these (over its whole vocabulary, not renormalised).
        fields: names of the statistics, keys of `OF_TOP_K`.
        rows: int64 [M], which rows of the three to compute; None: all.

    Returns:
        TokenScores of the M rows, float32 [M] each (float64 for float64 logits).

    Raises:
        ValueError: a statistic that k tokens do not give, or shapes that do not fit.

    Example:
        >>> teacher = torch.log_softmax(torch.tensor([[3.0, 1.0, 0.0, 0.0]]), 1)
        >>> scores = top_k_scores(torch.zeros(1, 4), torch.tensor([[0, 1]]), teacher[:, :2], ["entropy", "reverse_kl"])
        >>> round(scores.entropy.item(), 4), round(scores.reverse_kl.item(), 4)
        (1.3863, 0.8247)
    """
    _check(logits, token_ids, logprobs, fields)
    rows = torch.arange(len(logits), device=logits.device) if rows is None else rows
    dtype = _computed_in(logits)
    found = {name: logits.new_empty(len(rows), dtype=dtype) for name in dict.fromkeys(fields)}
    with torch.no_grad():
        for start, stop in _chunks(len(rows), logits.shape[1]):
            part = rows[start:stop]
            of_part = _statistics(logits[part].to(dtype), token_ids[part], logprobs[part], fields)
            for name, values in of_part.items():
                found[name][start:stop] = values
    return TokenScores(**found)


def tail_reverse_kl(
    logits: Tensor, token_ids: Tensor, logprobs: Tensor, rows: Tensor | None = None, keep_copy: bool = False
) -> tuple[Tensor, Tensor]:
    """The reverse KL on the k + 1 outcomes, differentiable in the student's logits, and the student's mass on the k.

    D = Σ_o P_o log P_o/Q_o ≤ KL(P_S ‖ P_T), and with o the outcome that token v belongs to

        ∂D/∂z_v = P_S(v) · (log P_o/Q_o − D)

    The backward computes rows whose incoming gradient is not zero, and no others; beside the gradient of the logits
    nothing of size [N, V] is held.

    Args:
        logits, token_ids, logprobs, rows: as in `top_k_scores`.
        keep_copy: save a copy of these rows for the backward instead of the logits themselves; needed where something
            else overwrites the logits before, as an in-place cross-entropy does.

    Returns:
        D [M] and Σ P_S over the k tokens [M], which is not differentiable.

    Example:
        >>> logits = torch.zeros(1, 4, requires_grad=True)
        >>> divergence, mass = tail_reverse_kl(logits, torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.25]]).log())
        >>> divergence.sum().backward()
        >>> round(divergence.item(), 4), round(mass.item(), 4), [round(value, 4) for value in logits.grad[0].tolist()]
        (0.1733, 0.5, [-0.2166, -0.0433, 0.13, 0.13])
    """
    _check(logits, token_ids, logprobs, ())
    rows = torch.arange(len(logits), device=logits.device) if rows is None else rows
    return _TailReverseKL.apply(logits, token_ids, logprobs, rows, keep_copy)


def _statistics(z: Tensor, token_ids: Tensor, logprobs: Tensor, wanted: Sequence[str]) -> dict[str, Tensor]:
    """The statistics of one chunk; z [n, V], its logits, is overwritten."""
    best = z.argmax(1, keepdim=True) if "argmax_in_top5" in wanted else None
    likeliest = z.topk(min(16, z.shape[1])).indices if "top16_overlap" in wanted else None
    log_s, rest, entropy = _student_outcomes(z, token_ids, not {"entropy", "entropy_norm"}.isdisjoint(wanted))[:3]
    log_t = _teacher_outcomes(logprobs, z.dtype)
    s, t = log_s.exp(), log_t.exp()
    reverse_kl = _weighted(s, log_s - log_t).sum(1)
    found: dict[str, Tensor] = {}
    if entropy is not None:
        found |= {"entropy": entropy, "entropy_norm": entropy / math.log(z.shape[1])}
    if "reverse_kl" in wanted:
        found["reverse_kl"] = _finite_or_infinite(reverse_kl)
    if "forward_kl" in wanted:
        found["forward_kl"] = _finite_or_infinite(_weighted(t, log_t - log_s).sum(1))
    if "teacher_entropy" in wanted:
        found["teacher_entropy"] = -_weighted(t, log_t).sum(1)
    if "jsd" in wanted:
        log_m = torch.logaddexp(log_s, log_t) - math.log(2)
        halves = _weighted(s, log_s - log_m) + _weighted(t, log_t - log_m)
        found["jsd"] = halves.sum(1).mul(0.5).clamp(min=0)
    if "hellinger" in wanted:
        found["hellinger"] = (s.sqrt() - t.sqrt()).norm(dim=1) / math.sqrt(2)
    if "gradient_norm" in wanted:
        excess = _weighted(s, log_s - log_t - reverse_kl[:, None])
        # the tail's share of the gradient is spread over its tokens ∝ P_S
        within = rest.norm(dim=1) / s[:, -1]
        found["gradient_norm"] = torch.cat([excess[:, :-1], (excess[:, -1] * within)[:, None]], 1).norm(dim=1)
    if likeliest is not None:
        k = likeliest.shape[1]
        theirs = token_ids.gather(1, logprobs.topk(k).indices)
        found["top16_overlap"] = (likeliest[:, :, None] == theirs[:, None]).any(2).sum(1).to(z.dtype) / k
    if best is not None:
        theirs = token_ids.gather(1, logprobs.topk(min(5, z.shape[1])).indices)
        found["argmax_in_top5"] = (theirs == best).any(1).to(z.dtype)
    return {name: found[name] for name in wanted}


class _TailReverseKL(torch.autograd.Function):
    """KL(P ‖ Q) of rows of logits on the teacher's k likeliest tokens and the tail."""

    @staticmethod
    def forward(ctx, logits, token_ids, logprobs, rows, keep_copy):
        dtype = _computed_in(logits)
        divergence = logits.new_empty(len(rows), dtype=dtype)
        normaliser, mass = torch.empty_like(divergence), torch.empty_like(divergence)
        ratio = divergence.new_empty(len(rows), token_ids.shape[1] + 1)
        for start, stop in _chunks(len(rows), logits.shape[1]):
            part = rows[start:stop]
            log_s, _, _, normaliser[start:stop] = _student_outcomes(logits[part].to(dtype), token_ids[part], False)
            ratio[start:stop] = log_s - _teacher_outcomes(logprobs[part], dtype)
            s = log_s.exp()
            divergence[start:stop] = _weighted(s, ratio[start:stop]).sum(1)
            mass[start:stop] = s[:, :-1].sum(1)
        ctx.copied, ctx.shape = keep_copy, logits.shape
        saved = logits[rows] if keep_copy else logits
        ctx.save_for_backward(saved, token_ids, rows, normaliser, ratio, divergence)
        ctx.mark_non_differentiable(mass)
        return divergence, mass

    @staticmethod
    def backward(ctx, incoming, _):
        saved, token_ids, rows, normaliser, ratio, divergence = ctx.saved_tensors
        gradient = saved.new_zeros(ctx.shape)
        active = incoming.nonzero()[:, 0]
        for start, stop in _chunks(len(active), ctx.shape[1]):
            part = active[start:stop]
            z = saved[part if ctx.copied else rows[part]].to(divergence.dtype)
            probability = z.sub_(normaliser[part, None]).exp_()
            excess = ratio[part] - divergence[part, None]
            of_top = probability.gather(1, token_ids[rows[part]]) * excess[:, :-1]
            probability.mul_(excess[:, -1:]).scatter_(1, token_ids[rows[part]], of_top)
            gradient[rows[part]] = probability.mul_(incoming[part, None]).to(gradient.dtype)
        return gradient, None, None, None, None


def _student_outcomes(z: Tensor, token_ids: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Of logits z [n, V], which are overwritten: what the student says of the k + 1 outcomes.

    Returns log-probabilities [n, k + 1], the probabilities of the tail's tokens [n, V] (0 at the k tokens), the entropy
    over the whole vocabulary [n] and the log-normaliser [n].
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
    rest = p.scatter_(1, token_ids, 0.0).div_(total)
    log_tail = rest.sum(1, keepdim=True).clamp_(min=torch.finfo(z.dtype).tiny).log_()
    return torch.cat([of_top - log_total, log_tail], 1), rest, entropy, (highest + log_total)[:, 0]


def _teacher_outcomes(logprobs: Tensor, dtype: torch.dtype) -> Tensor:
    logprobs = logprobs.to(dtype).clamp(min=NEGATIVE)
    return torch.cat([logprobs, log_tail(logprobs)], 1)


def log_tail(logprobs: Tensor) -> Tensor:
    """log(1 − Σ p) [n, 1] of the teacher's known tokens [n, k], summed in float64 since it cancels."""
    known = logprobs.double().exp().sum(1, keepdim=True)
    floor = min(TAIL_FLOOR, TAIL_FLOOR_FLOAT64) if logprobs.dtype == torch.float64 else TAIL_FLOOR
    return (1 - known).clamp(min=floor).log().to(logprobs.dtype)


def _finite_or_infinite(divergence: Tensor) -> Tensor:
    """A divergence that met a forbidden token (`NEGATIVE`) is infinite; rounding may leave another below 0."""
    return divergence.clamp(min=0).masked_fill(divergence > INFINITE, math.inf)


def _weighted(probability: Tensor, value: Tensor) -> Tensor:
    return probability * value.masked_fill(probability == 0, 0.0)


def _computed_in(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _chunks(rows: int, vocabulary: int) -> Iterator[tuple[int, int]]:
    return _spans(rows, max(1, _ENTRIES // vocabulary))


def _check(logits: Tensor, token_ids: Tensor, logprobs: Tensor, fields: Sequence[str]) -> None:
    if logits.ndim != 2 or token_ids.ndim != 2 or len(token_ids) != len(logits) or logprobs.shape != token_ids.shape:
        raise ValueError(
            f"logits must be [N, V], token_ids and logprobs [N, k], got {list(logits.shape)}, {list(token_ids.shape)} "
            f"and {list(logprobs.shape)}."
        )
    if token_ids.shape[1] >= logits.shape[1]:
        raise ValueError(f"{token_ids.shape[1]} of {logits.shape[1]} tokens leave no tail: compare the distributions.")
    for name in fields:
        if name not in OF_TOP_K:
            raise ValueError(f"the teacher's likeliest tokens do not give '{name}'; they give {', '.join(OF_TOP_K)}.")
        least = min(LEAST_TOP.get(name, 1), logits.shape[1])
        if token_ids.shape[1] < least:
            raise ValueError(f"'{name}' needs the teacher's {least} likeliest tokens, got {token_ids.shape[1]}.")
