"""The likeliest tokens of a model, from hidden states and an lm_head, in tiles over the vocabulary."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..types import Head, TeacherLogprobs, TopTokens
from .chunked import _tile_shape
from .tiles import NEGATIVE, Projection, _operand, _spans, accumulation_dtype

LIKELIEST, LIKELIEST_OF_TEACHER = 16, 5
OF_LIKELIEST = ("top16_forward_kl", "top16_teacher_mass", "top16_overlap", "argmax_in_top5")
_GATHERED = 2**22  # entries of lm_head rows that are gathered at a time


@torch.no_grad()
def top_tokens(head: Head, k: int = 5, temperature: float = 1.0, vocabulary: int | None = None) -> TopTokens:
    """The k likeliest tokens at each of N positions, the likeliest first, without an [N, V] tensor.

    Each tile of logits gives its k largest, which are merged with those kept so far; the log-normaliser runs along.

    Args:
        head: hidden states [N, H] and lm_head [V, H].
        k: how many; at most the vocabulary.
        temperature: divides the logits, > 0.
        vocabulary: the first so many rows of the lm_head, the vocabulary that two models share; None: all.

    Returns:
        TopTokens: token_ids int64 [N, k], probability float32 [N, k] (float64 for float64 hidden states).

    Raises:
        ValueError: k, temperature or vocabulary out of range.

    Example:
        >>> top = top_tokens(Head(torch.tensor([[0.0, 3.0, 1.0, 2.0]]), torch.eye(4)), k=2)
        >>> top.token_ids.tolist()
        [[1, 3]]
    """
    rows = len(head.weight)
    vocabulary = rows if vocabulary is None else vocabulary
    if not 1 <= vocabulary <= rows:
        raise ValueError(f"vocabulary must be between 1 and the {rows} rows of the lm_head, got {vocabulary}.")
    if not 1 <= k <= vocabulary:
        raise ValueError(f"k must be between 1 and the vocabulary, {vocabulary} tokens, got {k}.")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a positive number, got {temperature!r}.")
    ids, best, normaliser = _top(head, k, temperature, vocabulary, head.hidden)
    return TopTokens(ids, (best - normaliser[:, None]).exp_().masked_fill_(best <= NEGATIVE, 0.0))


def _top(head: Head, k: int, temperature: float, vocabulary: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The k likeliest tokens, the likeliest first, and their logits, [N, k] each, and the log-normalisers [N].

    They are computed in the precision that hidden states `like` these have.
    """
    hidden, dtype = head.hidden.detach(), accumulation_dtype(like)
    projection = Projection.of(head, vocabulary, temperature)
    tokens, columns = _tile_shape(hidden, vocabulary)
    ids = torch.empty(len(hidden), k, dtype=torch.int64, device=hidden.device)
    logits = torch.empty(len(hidden), k, dtype=dtype, device=hidden.device)
    normalisers = torch.empty(len(hidden), dtype=dtype, device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        for row, end in _spans(len(hidden), tokens):
            operand = _operand(hidden[row:end], like)
            best = hidden.new_zeros(end - row, 0, dtype=dtype)
            where = ids.new_zeros(end - row, 0)
            normaliser = hidden.new_full((end - row,), -math.inf, dtype=dtype)
            for start, stop in _spans(vocabulary, columns):
                tile = projection.logits(operand, projection.rows(start, stop, operand), start)
                largest = tile.topk(min(k, stop - start))
                normaliser = torch.logaddexp(normaliser, tile.logsumexp(1))
                best, where = torch.cat([best, largest.values], 1), torch.cat([where, largest.indices + start], 1)
                best, order = best.topk(min(k, best.shape[1]))
                where = where.gather(1, order)
            ids[row:end], logits[row:end], normalisers[row:end] = where, best, normaliser
    return ids, logits, normalisers


def top_of_both(student: Head, teacher: Head, k: int = 5, temperature: float = 1.0) -> tuple[TopTokens, TopTokens]:
    """`top_tokens` of two models, over the rows that both lm_heads have; fewer than k where these are fewer.

    Args:
        student, teacher: of the same N tokens.
        k, temperature: as in `top_tokens`.
    """
    vocabulary = min(len(student.weight), len(teacher.weight))
    of_student, of_teacher = (
        top_tokens(head, min(k, vocabulary), temperature, vocabulary) for head in (student, teacher)
    )
    return of_student, of_teacher


@torch.no_grad()
def top_of_served(
    student: Head, teacher: TeacherLogprobs, k: int = 5, temperature: float = 1.0
) -> tuple[TopTokens, TopTokens]:
    """`top_tokens` of a student, and of a teacher that is known by log-probabilities.

    Of the whole vocabulary: over the tokens that both have, at the temperature. Of its likeliest tokens: k of these, or
    as many as are known, as they are; the token that the student wrote is none of them by being written.

    Args:
        student: of N tokens.
        teacher: of the same, on the student's device.
        k, temperature: as in `top_tokens`.

    Returns:
        Student's and teacher's, [N, k] each; token_ids −1 and probability 0 where no token is known.

    Example:
        >>> teacher = TeacherLogprobs(torch.tensor([[0.5, 0.2, 0.1]]).log(), torch.tensor([[3, 9, 0]]), torch.zeros(1))
        >>> top_of_served(Head(torch.zeros(1, 2), torch.randn(4, 2)), teacher)[1].token_ids
        tensor([[ 3, -1, -1, -1]])
    """
    rows = len(student.weight)
    if teacher.token_ids is None:
        rows = min(rows, teacher.logprob.shape[1])
        tiles = [
            torch.log_softmax(teacher.logprob[start:stop, :rows] / temperature, 1).topk(min(k, rows))
            for start, stop in _spans(len(teacher), max(1, _GATHERED // rows))
        ] or [teacher.logprob.new_zeros(0, rows).topk(min(k, rows))]
        best, ids = (torch.cat(parts) for parts in zip(*tiles, strict=True))
    else:
        # the last column is the token that was written, where it is none of the likeliest
        given, logprob = teacher.token_ids[:, :-1], teacher.logprob[:, :-1]
        known = (given >= 0) & (given < rows)
        best, places = logprob.masked_fill(~known, -math.inf).topk(min(k, logprob.shape[1]))
        unknown = (0, min(k, rows) - best.shape[1])
        ids = nn.functional.pad(given.gather(1, places).masked_fill(best == -math.inf, -1), unknown, value=-1)
        best = nn.functional.pad(best, unknown, value=-math.inf)
    return top_tokens(student, min(k, rows), temperature, rows), TopTokens(ids, best.exp())


@torch.no_grad()
def top_statistics(
    student: Head, teacher: Head, names: Sequence[str], temperature: float, vocabulary: int
) -> dict[str, Tensor]:
    """Those of `OF_LIKELIEST` that are asked for, see `TokenScores`, each [N]; one more projection of either lm_head.

    Args:
        student, teacher: hidden states [N, H] and lm_heads.
        names: some of `OF_LIKELIEST`.
        temperature: divides the logits.
        vocabulary: rows of the lm_heads that are compared.

    Example:
        >>> head = Head(torch.eye(3), torch.randn(50, 3))
        >>> top_statistics(head, head, ["top16_overlap"], 1.0, 50)["top16_overlap"]
        tensor([1., 1., 1.])
    """
    k = min(LIKELIEST, vocabulary)
    dtype = accumulation_dtype(student.hidden)
    (ids_s, best_s, _), (ids_t, best_t, normaliser_t) = (
        _top(head, k, temperature, vocabulary, student.hidden) for head in (student, teacher)
    )
    # where fewer than k tokens can be said, those whose logit is −∞ are nobody's likeliest
    says_s, says_t = best_s > NEGATIVE, best_t > NEGATIVE
    same = (ids_t[:, :, None] == ids_s[:, None, :]) & says_t[:, :, None] & says_s[:, None, :]
    shared = same.any(2)  # of the teacher's tokens
    statistics: dict[str, Tensor] = {}
    if "top16_overlap" in names:
        statistics["top16_overlap"] = shared.sum(1).to(dtype) / says_s.sum(1)
    if "argmax_in_top5" in names:
        statistics["argmax_in_top5"] = same[:, : min(LIKELIEST_OF_TEACHER, k), 0].any(1).to(dtype)
    if not {"top16_forward_kl", "top16_teacher_mass"}.isdisjoint(names):
        union = torch.cat([ids_s, ids_t], 1)
        log_s, log_t = (_logits_of(head, union, temperature, dtype) for head in (student, teacher))
        if "top16_teacher_mass" in names:
            beside_the_likeliest = (log_t[:, :k] - log_t[:, k, None]).exp().mul_(says_s).sum(1)
            highest = (best_t[:, 0] - normaliser_t).exp()
            statistics["top16_teacher_mass"] = (highest * beside_the_likeliest).clamp(max=1)
        if "top16_forward_kl" in names:
            once = torch.cat([says_s, says_t & ~shared], 1)
            impossible = (once & (log_s <= NEGATIVE) & (log_t > NEGATIVE)).any(1)
            log_s, log_t = (
                log.masked_fill(~once, -math.inf).log_softmax(1).clamp(min=NEGATIVE) for log in (log_s, log_t)
            )
            divergence = (log_t.exp() * (log_t - log_s)).sum(1).clamp(min=0)
            statistics["top16_forward_kl"] = divergence.masked_fill(impossible, math.inf)
    return {name: statistics[name] for name in names}


def _logits_of(head: Head, token_ids: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    """Logits [N, K] of some tokens at each position."""
    hidden, weight = head.hidden.detach(), head.weight.detach()
    z = torch.empty(token_ids.shape, dtype=dtype, device=hidden.device)
    rows = max(1, _GATHERED // (token_ids.shape[1] * weight.shape[1]))
    with torch.autocast(hidden.device.type, enabled=False):
        for start, stop in _spans(len(hidden), rows):
            gathered = weight[token_ids[start:stop]].to(dtype)
            z[start:stop] = (gathered @ hidden[start:stop].to(dtype)[:, :, None])[:, :, 0]
    if head.bias is not None:
        z += head.bias.detach()[token_ids].to(dtype)
    z *= head.logit_scale
    if head.softcap is not None:
        z = head.softcap * (z / head.softcap).tanh()
    return (z / temperature).clamp(min=NEGATIVE)
