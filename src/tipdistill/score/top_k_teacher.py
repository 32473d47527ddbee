"""A teacher that is known by log-probabilities: those of its k likeliest tokens, or of the whole vocabulary.

With k tokens the vocabulary is read as k + 1 outcomes, each of the k tokens and all others together, and divergences
are lower bounds: `top_k_outcomes` has the equations, and `OF_TOP_K` says what each statistic is. Two fronts share them:

    from hidden states and an lm_head    served_scores, served_divergence_loss    a teacher behind a server
    from logits that an engine computed  top_k_scores, tail_reverse_kl            a teacher inside verl
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..types import Head, TeacherLogprobs, TokenScores
from . import reference
from .checks import NonFiniteLogitsError, check_rows
from .tiles import NEGATIVE, _spans
from .top_k_outcomes import (
    OF_TOP_K,
    _weighted,
    check_fields,
    gradient_norm,
    lower_bounds,
    of_ranks,
    student_by_autograd,
    student_in_place,
    teacher_outcomes,
    unavailable,
)

__all__ = [
    "DEFAULT_FIELDS",
    "OF_TOP_K",
    "served_divergence_loss",
    "served_scores",
    "tail_reverse_kl",
    "top_k_scores",
    "unavailable",
]

# Logits of one tile of rows, of which the statistics hold a few copies; in float32 32 and 128 MiB.
HEAD_TILE = 2**23
LOGITS_TILE = 2**25
# The statistics of `token_scores` by default, without those that a rule has to ask for.
DEFAULT_FIELDS = (
    *("entropy", "entropy_norm", "teacher_entropy", "reverse_kl", "forward_kl"),
    *("student_logprob", "teacher_logprob"),
)


# The front from logits.


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
        fields: names of the statistics, keys of `OF_TOP_K` that are neither refused nor a server's only.
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
    _check_logits(logits, token_ids, logprobs, fields)
    rows = torch.arange(len(logits), device=logits.device) if rows is None else rows
    dtype = _computed_in(logits)
    statistics = {name: logits.new_empty(len(rows), dtype=dtype) for name in dict.fromkeys(fields)}
    with torch.no_grad():
        for start, stop in _tiles(len(rows), logits.shape[1], LOGITS_TILE):
            tile = rows[start:stop]
            of_tile = _of_logits(logits[tile].to(dtype), token_ids[tile], logprobs[tile], fields)
            for name, values in of_tile.items():
                statistics[name][start:stop] = values
    return TokenScores(**statistics)


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

    Raises:
        ValueError: shapes that do not fit.

    Example:
        >>> logits = torch.zeros(1, 4, requires_grad=True)
        >>> divergence, mass = tail_reverse_kl(logits, torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.25]]).log())
        >>> divergence.sum().backward()
        >>> round(divergence.item(), 4), round(mass.item(), 4), [round(value, 4) for value in logits.grad[0].tolist()]
        (0.1733, 0.5, [-0.2166, -0.0433, 0.13, 0.13])
    """
    _check_logits(logits, token_ids, logprobs, ())
    rows = torch.arange(len(logits), device=logits.device) if rows is None else rows
    return _TailReverseKL.apply(logits, token_ids, logprobs, rows, keep_copy)


class _TailReverseKL(torch.autograd.Function):
    """KL(P ‖ Q) of rows of logits on the teacher's k likeliest tokens and the tail."""

    @staticmethod
    def forward(ctx, logits, token_ids, logprobs, rows, keep_copy):
        dtype = _computed_in(logits)
        divergence = logits.new_empty(len(rows), dtype=dtype)
        normaliser, mass = torch.empty_like(divergence), torch.empty_like(divergence)
        ratio = divergence.new_empty(len(rows), token_ids.shape[1] + 1)
        for start, stop in _tiles(len(rows), logits.shape[1], LOGITS_TILE):
            tile = rows[start:stop]
            log_p, _, _, normaliser[start:stop] = student_in_place(logits[tile].to(dtype), token_ids[tile], False)
            ratio[start:stop] = log_p - teacher_outcomes(logprobs[tile].to(dtype).clamp(min=NEGATIVE))
            p = log_p.exp()
            divergence[start:stop] = _weighted(p, ratio[start:stop]).sum(1)
            mass[start:stop] = p[:, :-1].sum(1)
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
        for start, stop in _tiles(len(active), ctx.shape[1], LOGITS_TILE):
            tile = active[start:stop]
            z = saved[tile if ctx.copied else rows[tile]].to(divergence.dtype)
            probability = z.sub_(normaliser[tile, None]).exp_()
            # the factor of P_S(v): one of each of the k tokens, and the tail's for every token of the tail
            excess = ratio[tile] - divergence[tile, None]
            of_top = probability.gather(1, token_ids[rows[tile]]) * excess[:, :-1]
            probability.mul_(excess[:, -1:]).scatter_(1, token_ids[rows[tile]], of_top)
            gradient[rows[tile]] = probability.mul_(incoming[tile, None]).to(gradient.dtype)
        return gradient, None, None, None, None


def _of_logits(z: Tensor, token_ids: Tensor, logprobs: Tensor, fields: Sequence[str]) -> dict[str, Tensor]:
    """The statistics of one tile; z [n, V], its logits, is overwritten."""
    vocabulary = z.shape[1]
    statistics: dict[str, Tensor] = {}
    if not {"argmax_in_top5", "top16_overlap"}.isdisjoint(fields):
        likeliest_first = logprobs.topk(min(16, logprobs.shape[1])).indices
        statistics |= of_ranks(z, token_ids.gather(1, likeliest_first), fields)
    with_entropy = not {"entropy", "entropy_norm"}.isdisjoint(fields)
    log_p, tail, entropy, _ = student_in_place(z, token_ids, with_entropy)
    log_q = teacher_outcomes(logprobs.to(z.dtype).clamp(min=NEGATIVE))
    if entropy is not None:
        statistics |= {"entropy": entropy, "entropy_norm": entropy / math.log(vocabulary)}
    statistics |= dict(lower_bounds(log_p, log_q, fields).present())
    if "jsd" in fields:  # at β = ½, where no product with β is needed
        p, q, log_m = log_p.exp(), log_q.exp(), torch.logaddexp(log_p, log_q) - math.log(2)
        halves = _weighted(p, log_p - log_m) + _weighted(q, log_q - log_m)
        statistics["jsd"] = halves.sum(1).mul(0.5).clamp(min=0)
    if "gradient_norm" in fields:
        statistics["gradient_norm"] = gradient_norm(log_p, log_q, tail)
    return {name: statistics[name] for name in fields}


# The front from hidden states.


def served_scores(
    student: Head,
    teacher: TeacherLogprobs,
    fields: Sequence[str] = DEFAULT_FIELDS,
    beta: float = 0.5,
    temperature: float = 1.0,
    token_ids: Tensor | None = None,
) -> TokenScores:
    """Statistics of N tokens against a served teacher, without gradients.

    Args:
        student: hidden states [N, H] and lm_head [V, H].
        teacher: of the same N tokens, on the student's device.
        fields: names of statistics, see `TokenScores`; with the likeliest tokens only, see `OF_TOP_K`.
        beta: β of the Jensen-Shannon divergence.
        temperature: divides both models' logits; 1 where only the teacher's likeliest tokens are known.
        token_ids: int64 [N], the sampled tokens, where student_logprob is among the fields.

    Returns:
        TokenScores, float32 [N] each (float64 where the hidden states are float64). Where the teacher gave its whole
        vocabulary, all are exact; else `OF_TOP_K` says which are, and which are lower bounds.

    Raises:
        ValueError: lengths that differ, a temperature or a statistic that the teacher's likeliest tokens do not allow.

    Example:
        >>> student = Head(torch.zeros(1, 2), torch.randn(4, 2))
        >>> teacher = TeacherLogprobs(torch.tensor([[0.5]]).log(), torch.tensor([[3]]), torch.tensor([0.5]).log())
        >>> round(served_scores(student, teacher, ["reverse_kl"]).reverse_kl.item(), 4)  # ¼ and ¾ against ½ and ½
        0.1308
    """
    _check_served(student, teacher, fields, temperature)
    with torch.no_grad(), torch.autocast(student.hidden.device.type, enabled=False):
        pieces = []
        for span in _tiles(len(student.hidden), len(student.weight), HEAD_TILE):
            ids = None if token_ids is None else token_ids[slice(*span)]
            head, rows = _rows(student, teacher, span)
            with _naming(span[0], len(teacher)):
                scores = _of_head(head, rows, "reverse_kl", fields, beta, temperature, ids)
            pieces.append(scores.detach())
    if not pieces:
        empty = student.hidden.new_zeros(0, dtype=_computed_in(student.hidden))
        return TokenScores(**dict.fromkeys(fields, empty))
    return TokenScores(**{name: torch.cat([piece.require(name) for piece in pieces]) for name in fields})


def served_divergence_loss(
    student: Head,
    teacher: TeacherLogprobs,
    weight: Tensor,
    divergence: str = "reverse_kl",
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    denominator: Tensor | float,
    fields: Sequence[str] = (),
) -> tuple[Tensor, TokenScores]:
    """Σ_t w_t D_t / denominator over N selected rows (paper Eq. 9), D on k + 1 outcomes where k tokens are known.

    Autograd's gradient in the student's hidden states and lm_head; logits exist one tile of rows at a time and are
    projected again in the backward.

    Args:
        student, teacher, beta, temperature: as in `served_scores`.
        weight: float [N], the tokens' weights.
        divergence: "reverse_kl", "forward_kl" or "jsd".
        denominator: divides the sum, for instance the kept tokens of all micro-batches and ranks.
        fields: statistics to return from the same pass.

    Returns:
        The loss and the TokenScores of the N rows, detached. N = 0 gives 0 with zero gradients.

    Raises:
        ValueError: as `served_scores`.
        NonFiniteLogitsError: a divergence is infinite: the token is named.

    Example:
        >>> student = Head(torch.zeros(2, 3, requires_grad=True), torch.randn(4, 3))
        >>> even = TeacherLogprobs(torch.full((2, 4), 0.25).log(), None, torch.full((2,), 0.25).log())
        >>> loss, _ = served_divergence_loss(student, even, torch.ones(2), denominator=2.0)
        >>> abs(loss.item()) < 1e-6
        True
    """
    _check_served(student, teacher, (divergence, *fields), temperature)
    weight = weight.to(_computed_in(student.hidden))
    total, pieces = weight.new_zeros(()), []
    if not len(weight):  # a rank without a kept token: a loss of 0 that still reaches the graph
        leaves = (student.hidden, student.weight, student.bias)
        total = torch.stack([value.sum().to(weight.dtype) * 0 for value in leaves if value is not None]).sum()
    with torch.autocast(student.hidden.device.type, enabled=False):
        for span in _tiles(len(weight), len(student.weight), HEAD_TILE):
            head, rows = _rows(student, teacher, span)
            run = partial(_tile_loss, head, rows, weight[slice(*span)], divergence, beta, temperature, tuple(fields))
            # its arguments are what is differentiated; the head's other tensors are constants
            with _naming(span[0], len(weight)):
                loss, *values = checkpoint(run, head.hidden, head.weight, head.bias, use_reentrant=False)
            total = total + loss
            pieces.append([value.detach() for value in values])
    columns = zip(*pieces, strict=True) if pieces else [[weight.new_zeros(0)] for _ in fields]
    scores = TokenScores(**{name: torch.cat(list(column)) for name, column in zip(fields, columns, strict=True)})
    return total / denominator, scores


def _tile_loss(
    head: Head,
    teacher: TeacherLogprobs,
    weight: Tensor,
    divergence: str,
    beta: float,
    temperature: float,
    fields: tuple[str, ...],
    hidden: Tensor,
    lm_head: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, ...]:
    head = Head(hidden, lm_head, bias, head.logit_scale, head.softcap)
    wanted = tuple(dict.fromkeys(("divergence", *fields)))
    scores = _of_head(head, teacher, divergence, wanted, beta, temperature, None)
    divergences = scores.require("divergence").detach()
    check_rows(torch.zeros_like(divergences), len(lm_head), divergence=divergences)
    return (scores.require("divergence") * weight).sum(), *(scores.require(name) for name in fields)


def _of_head(
    student: Head,
    teacher: TeacherLogprobs,
    divergence: str,
    fields: Sequence[str],
    beta: float,
    temperature: float,
    sampled_ids: Tensor | None,
) -> TokenScores:
    """Statistics of one tile, from full logits of the student; "divergence" is differentiable."""
    dtype = _computed_in(student.hidden)
    logits = reference.logits(student, len(student.weight), temperature)
    logits = logits.masked_fill(logits <= NEGATIVE, -math.inf)
    finite = logits.detach().amax(-1).abs() < -NEGATIVE
    if not bool(finite.all()):
        raise NonFiniteLogitsError(int((~finite).nonzero()[0, 0]), "")
    if teacher.token_ids is None:
        return _of_whole_vocabulary(logits, teacher, divergence, fields, beta, temperature, sampled_ids)
    log_s = torch.log_softmax(logits, -1)
    own = [name for name in fields if name in ("entropy", "entropy_norm", "student_logprob")]
    statistics = dict(reference.of_logprobs(log_s, None, divergence, beta, sampled_ids, own).present())
    # the teacher's padding rows count as others, as −1 does
    known = (teacher.token_ids >= 0) & (teacher.token_ids < log_s.shape[1])
    log_p, of_tail = student_by_autograd(log_s, teacher.token_ids, known)
    log_q = teacher_outcomes(
        torch.where(known, teacher.logprob.to(dtype), NEGATIVE), all_known=known.sum(1) >= log_s.shape[1]
    )
    statistics |= dict(lower_bounds(log_p, log_q, fields, divergence, beta).present())
    if "gradient_norm" in fields:
        statistics["gradient_norm"] = gradient_norm(log_p.detach(), log_q, of_tail.detach().exp())
    if "teacher_logprob" in fields:
        statistics["teacher_logprob"] = teacher.sampled.to(dtype)
    return TokenScores(**statistics | of_ranks(log_s.detach(), teacher.token_ids, fields))


def _of_whole_vocabulary(
    logits: Tensor,
    teacher: TeacherLogprobs,
    divergence: str,
    fields: Sequence[str],
    beta: float,
    temperature: float,
    sampled_ids: Tensor | None,
) -> TokenScores:
    """The reference's statistics, over the vocabulary that both have."""
    vocabulary = min(logits.shape[1], teacher.logprob.shape[1])
    log_s = torch.log_softmax(logits[:, :vocabulary], -1)
    # log-probabilities are logits: they too can be divided by the temperature
    log_t = torch.log_softmax(teacher.logprob[:, :vocabulary].to(logits.dtype) / temperature, -1)
    named = [name for name in fields if name != "teacher_logprob"]
    statistics = dict(reference.of_logprobs(log_s, log_t, divergence, beta, sampled_ids, named).present())
    if "teacher_logprob" in fields:
        given = teacher.sampled.to(logits.dtype)
        statistics["teacher_logprob"] = given if sampled_ids is None else log_t.gather(1, sampled_ids[:, None])[:, 0]
    return TokenScores(**statistics)


# Checks and tiles.


def _check_logits(logits: Tensor, token_ids: Tensor, logprobs: Tensor, fields: Sequence[str]) -> None:
    if logits.ndim != 2 or token_ids.ndim != 2 or len(token_ids) != len(logits) or logprobs.shape != token_ids.shape:
        raise ValueError(
            f"logits must be [N, V], token_ids and logprobs [N, k], got {list(logits.shape)}, {list(token_ids.shape)} "
            f"and {list(logprobs.shape)}."
        )
    if token_ids.shape[1] >= logits.shape[1]:
        raise ValueError(f"{token_ids.shape[1]} of {logits.shape[1]} tokens leave no tail: compare the distributions.")
    check_fields(fields, token_ids.shape[1], server=False)


def _check_served(student: Head, teacher: TeacherLogprobs, fields: Sequence[str], temperature: float) -> None:
    if len(student.hidden) != len(teacher):
        raise ValueError(f"the teacher's log-probabilities are of {len(teacher)} tokens, not {len(student.hidden)}.")
    if teacher.token_ids is None or not len(teacher):  # of no token nothing is asked
        return
    if temperature != 1:
        raise ValueError(
            f"temperature = {temperature:g} needs the teacher's whole vocabulary: of its likeliest tokens alone the "
            "rest cannot be brought to another temperature. Set temperature = 1, or let the server give all of them."
        )
    # the last column is the sampled token's
    check_fields(fields, max(1, teacher.token_ids.shape[1] - 1), server=True)


def _computed_in(given: Tensor) -> torch.dtype:
    return torch.float64 if given.dtype == torch.float64 else torch.float32


def _tiles(rows: int, vocabulary: int, logits: int) -> Iterator[tuple[int, int]]:
    return _spans(rows, max(1, logits // vocabulary))


def _rows(student: Head, teacher: TeacherLogprobs, span: tuple[int, int]) -> tuple[Head, TeacherLogprobs]:
    rows = slice(*span)
    head = Head(student.hidden[rows], student.weight, student.bias, student.logit_scale, student.softcap)
    return head, teacher.map(lambda value: value[rows])


@contextmanager
def _naming(start: int, tokens: int) -> Iterator[None]:
    """An error about a row of a tile becomes one about a token of all of them."""
    try:
        yield
    except NonFiniteLogitsError as error:
        token = start + error.token
        raise NonFiniteLogitsError(token, f"token {token} of {tokens}", error.cause) from None
