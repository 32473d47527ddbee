"""The contract of `chunked` on CUDA: cuBLAS projects a tile, one Triton kernel reads it once for all running sums.

Scoring. A tile [tokens, columns] of both models' logits is projected by cuBLAS (half-precision operands, float32
results) into scratch memory that every tile reuses; `_online_kernel` applies bias, scale, softcap and temperature while
it reads the tile, and updates all sums of all asked statistics, one program per token. The alternative, matmul and
reductions in one kernel so that logits never leave the SM, was not taken: two float32 accumulators of 128 × 256 fill
the registers of a Hopper SM, and what a Triton matmul falls short of cuBLAS weighs more than writing and reading a tile
once, 16 bytes of traffic beside 2 (H_S + H_T) operations per pair of logits.

Statistics that need the normalisers first (jsd, hellinger, signal_to_curvature), and the gradients of `FusedLoss`, look
at the logits again. They are held for a block of tokens, relative to the running maxima: the larger of the two models'
and their difference (`_online_kernel` says why), in float16 for half-precision inputs, in float32 for float32. Nothing
is projected twice for them.

Gradients. `_gradient_kernel` forms softmax terms, weight, scale and softcap slope of a tile in one pass, in the dtype
of the hidden states; cuBLAS multiplies it with the lm_head (summed in float32 over the tiles) and the hidden states.
The backward of `TokenDivergence` takes all kept tokens at once and the vocabulary in tiles, so that a tile of the
weight gradient is complete when it is formed: it is rounded once, and no float32 copy of [V, H] exists. `FusedLoss`
does without that copy where holding all tokens costs no more memory than the copy would.

The host waits for the device where it must know a number: one finite check per call and one per block of gradients, and
the count of kept rows in the backward.

Without a GPU the kernels run under TRITON_INTERPRET=1, which is how the tests run them.
"""

# mypy: disable-error-code="no-untyped-def"
# (the parameters of a kernel: pointers and numbers whose types Triton infers)
from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..types import Head
from .checks import NonFiniteLogitsError, rounded
from .sums import NORMALISERS, OF_GRADIENT, SECOND_PASS, STATISTICS, Online, SecondPass
from .tiles import NEGATIVE, Choose, Projection, _even, _spans, packed, without_infinities

HALF = (torch.float16, torch.bfloat16)
# Logits and their gradients are held for as many tokens as fit into this share of a GPU's memory: of Qwen3's vocabulary
# 8192 in 80 GB. All tokens in one block spare the float32 sum of the weight gradient over the blocks.
WORKSPACE_SHARE = 1 / 16
INTERPRETED_WORKSPACE = 2**30  # bytes, where there is no GPU
# Products of a hidden state's and of the lm_head's gradient at the same time, each on a stream of its own.
TWO_STREAMS = False
# torch multiplies halves into a float32 result since 2.8, and adds them to one since 2.10.
MIXED_ADDMM = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 10)


@dataclass(frozen=True)
class Tile:
    """Shape of a scratch tile, and the columns that a program takes at a time, with so many warps.

    The same for every rank and every run, since the shape sets the order in which floats are added.
    """

    tokens: int
    columns: int
    block: int
    warps: int


# Many tokens fill a GPU with one warp each, which waits for no other; of fewer, each gets four. What was counted of the
# compiled kernels stands in docs/engine.md.
TILE = Tile(4096, 4096, 256, 1)
FEW = Tile(4096, 4096, 1024, 4)
# Columns and warps of the kernels that write an element for each that they read.
WIDE, WIDE_WARPS = 2048, 8

# Rows of the kernels' sums; the names are those of `Online` and `SecondPass`, which turn them into statistics.
ONLINE_SUMS = (
    *("s_max", "p", "pa", "pd", "t_max", "q", "qb", "qd", "pp", "ppd", "ppdd"),
    *("s_token", "t_token", "s_least", "t_least", "pd_held", "centre"),
)
SECOND_SUMS = ("s_to_mixture", "t_to_mixture", "root", "gg", "sgg", "sg")

_NEGATIVE = tl.constexpr(NEGATIVE)
_LOWEST_MAXIMUM = tl.constexpr(NEGATIVE / 2)
_LOWEST_HALF = tl.constexpr(-65504.0)  # the lowest float16
_HIGHEST_HALF = tl.constexpr(65504.0)


@triton.jit
def _logits(
    tile, bias, columns, inside, scale, cap, HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr, SCALED: tl.constexpr
):
    """cap · tanh(scale · (projection + bias)), or without the tanh; −∞ becomes NEGATIVE, NaN stays."""
    z = tl.load(tile + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        z *= scale
    if CAPPED:
        z = (1.0 - 2.0 / (tl.exp(2.0 * z) + 1.0)) * cap
    return tl.where(z < _NEGATIVE, _NEGATIVE, z)


@triton.jit
def _held(larger, difference):
    """(a, b) of max(a, b) and a − b: the form in which logits are held, see `_online_kernel`."""
    return larger + tl.minimum(difference, 0.0), larger - tl.maximum(difference, 0.0)


@triton.jit
def _started(sums, place, later, BLOCK: tl.constexpr):
    """A sum of earlier tiles in the first lane of as many as a block has, 0 in the others."""
    earlier = tl.load(sums + place, mask=later, other=0.0)
    return tl.where(tl.arange(0, BLOCK) == 0, earlier, 0.0)


@triton.jit
def _online_kernel(
    s_tile,
    t_tile,
    s_bias,
    t_bias,
    token_ids,
    sums,
    larger_held,
    difference_held,
    references,
    start,
    width,
    tile_stride,
    sums_stride,
    held_stride,
    blocks,
    s_scale,
    s_cap,
    t_scale,
    t_cap,
    TEACHER: tl.constexpr,
    S_BIAS: tl.constexpr,
    T_BIAS: tl.constexpr,
    S_CAPPED: tl.constexpr,
    T_CAPPED: tl.constexpr,
    S_SCALED: tl.constexpr,
    T_SCALED: tl.constexpr,
    TOKENS: tl.constexpr,
    ENTROPY: tl.constexpr,
    TEACHER_ENTROPY: tl.constexpr,
    REVERSE: tl.constexpr,
    FORWARD: tl.constexpr,
    SQUARES: tl.constexpr,
    HOLD: tl.constexpr,
    HOLD_HALF: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token, the columns [start, start + width): its running sums as in `Online`, moved when a maximum rises.

    Each lane of the block adds up for itself, and the lanes are added once, at the end: what all of them wait for in
    every block are the two maxima alone.

    What is held of a pair of logits, relative to the running maxima, is the larger of a and b, and a − b. Both may be
    float16: near agreement a − b is small and keeps all of its digits, where a and b, rounded apart, would differ by
    their roundings. The smaller one, which a − b leads to, is the less likely.
    """
    row = tl.program_id(0).to(tl.int64)
    s_tile += row * tile_stride
    t_tile += row * tile_stride
    sums += row
    later = start > 0  # there are sums of earlier tiles
    # never as low as a logit of −∞, so that forbidden tokens weigh nothing even before another is met
    s_max = tl.load(sums, mask=later, other=_LOWEST_MAXIMUM)
    t_max = tl.load(sums + 4 * sums_stride, mask=later & TEACHER, other=_LOWEST_MAXIMUM)
    centre = tl.load(sums + 16 * sums_stride, mask=later & SQUARES, other=0.0)  # d of the likeliest token so far
    p_sum = _started(sums, 1 * sums_stride, later, BLOCK)
    pa = _started(sums, 2 * sums_stride, later & ENTROPY, BLOCK)
    pd = _started(sums, 3 * sums_stride, later & REVERSE, BLOCK)
    q_sum = _started(sums, 5 * sums_stride, later & TEACHER, BLOCK)
    qb = _started(sums, 6 * sums_stride, later & TEACHER_ENTROPY, BLOCK)
    qd = _started(sums, 7 * sums_stride, later & FORWARD, BLOCK)
    pp = _started(sums, 8 * sums_stride, later & SQUARES, BLOCK)
    ppd = _started(sums, 9 * sums_stride, later & SQUARES, BLOCK)
    ppdd = _started(sums, 10 * sums_stride, later & SQUARES, BLOCK)
    s_least = _started(sums, 13 * sums_stride, later & FORWARD, BLOCK)
    t_least = _started(sums, 14 * sums_stride, later & REVERSE, BLOCK)
    pd_held = _started(sums, 15 * sums_stride, later & HOLD_HALF & REVERSE, BLOCK)
    for offset in range(0, width, BLOCK):
        columns = offset + tl.arange(0, BLOCK)
        inside = tl.full((BLOCK,), 1, tl.int1) if FULL else columns < width
        s = _logits(s_tile, s_bias, columns, inside, s_scale, s_cap, S_BIAS, S_CAPPED, S_SCALED)
        if not FULL:
            s = tl.where(inside, s, _NEGATIVE)
        above = tl.maximum(s_max, tl.max(s, axis=0))
        s_shift = s_max - above
        s_max = above
        s_factor = tl.exp(s_shift)
        a = s - s_max
        p = tl.exp(a)
        if not FULL:
            p = tl.where(inside, p, 0.0)
        if ENTROPY:
            pa = s_factor * (pa + s_shift * p_sum) + p * a
        if TEACHER:
            t = _logits(t_tile, t_bias, columns, inside, t_scale, t_cap, T_BIAS, T_CAPPED, T_SCALED)
            if not FULL:
                t = tl.where(inside, t, _NEGATIVE)
            above = tl.maximum(t_max, tl.max(t, axis=0))
            t_shift = t_max - above
            t_max = above
            t_factor = tl.exp(t_shift)
            b = t - t_max
            q = tl.exp(b)
            if not FULL:
                q = tl.where(inside, q, 0.0)
            d = a - b
            shift = s_shift - t_shift
            if REVERSE:
                pd = s_factor * (pd + shift * p_sum) + p * d
                t_least = tl.minimum(t_least, tl.where(s > _NEGATIVE, t, 0.0))
            if SQUARES:  # about the centre, as in `Online`
                likeliest = (s == s_max) & inside
                ties = tl.sum(tl.where(likeliest, 1.0, 0.0), axis=0)
                here = tl.sum(tl.where(likeliest, d, 0.0), axis=0) / tl.maximum(ties, 1.0)
                moved = tl.where(ties > 0, here, centre + shift)
                recentred = centre + shift - moved
                centre = moved
                squared = p * p
                square = s_factor * s_factor
                about = d - centre
                ppdd = square * (ppdd + recentred * (2.0 * ppd + recentred * pp)) + squared * about * about
                ppd = square * (ppd + recentred * pp) + squared * about
                pp = square * pp + squared
            if TEACHER_ENTROPY:
                qb = t_factor * (qb + t_shift * q_sum) + q * b
            if FORWARD:
                qd = t_factor * (qd + shift * q_sum) + q * d
                s_least = tl.minimum(s_least, tl.where(t > _NEGATIVE, s, 0.0))
            q_sum = t_factor * q_sum + q
            if HOLD:
                larger = tl.maximum(a, b)
                if HOLD_HALF:
                    larger = tl.maximum(larger, _LOWEST_HALF)
                    d = tl.minimum(tl.maximum(d, _LOWEST_HALF), _HIGHEST_HALF)
                difference = d.to(difference_held.dtype.element_ty)
                if HOLD_HALF and REVERSE:
                    # the mean of the differences as they are held: a gradient subtracts it, and where the student
                    # is nearly certain all that is left are the parts in which they differ from it
                    pd_held = s_factor * (pd_held + shift * p_sum) + p * difference.to(tl.float32)
                where = row * held_stride + start + columns
                tl.store(larger_held + where, larger.to(larger_held.dtype.element_ty), mask=inside)
                tl.store(difference_held + where, difference, mask=inside)
                reference = 2 * (row * blocks + (start + offset) // BLOCK)
                tl.store(references + reference, s_max)
                tl.store(references + reference + 1, t_max)
        p_sum = s_factor * p_sum + p
    tl.store(sums, s_max)
    tl.store(sums + 1 * sums_stride, tl.sum(p_sum, axis=0))
    if ENTROPY:
        tl.store(sums + 2 * sums_stride, tl.sum(pa, axis=0))
    if TEACHER:
        tl.store(sums + 4 * sums_stride, t_max)
        tl.store(sums + 5 * sums_stride, tl.sum(q_sum, axis=0))
    if REVERSE:
        tl.store(sums + 3 * sums_stride, tl.sum(pd, axis=0))
        tl.store(sums + 14 * sums_stride, tl.min(t_least, axis=0))
    if TEACHER_ENTROPY:
        tl.store(sums + 6 * sums_stride, tl.sum(qb, axis=0))
    if FORWARD:
        tl.store(sums + 7 * sums_stride, tl.sum(qd, axis=0))
        tl.store(sums + 13 * sums_stride, tl.min(s_least, axis=0))
    if SQUARES:
        tl.store(sums + 8 * sums_stride, tl.sum(pp, axis=0))
        tl.store(sums + 9 * sums_stride, tl.sum(ppd, axis=0))
        tl.store(sums + 10 * sums_stride, tl.sum(ppdd, axis=0))
        tl.store(sums + 16 * sums_stride, centre)
    if HOLD_HALF and REVERSE:
        tl.store(sums + 15 * sums_stride, tl.sum(pd_held, axis=0))
    if TOKENS:
        column = tl.load(token_ids + row) - start
        here = (column >= 0) & (column < width)
        z = _logits(s_tile, s_bias, column, here, s_scale, s_cap, S_BIAS, S_CAPPED, S_SCALED)
        tl.store(sums + 11 * sums_stride, z, mask=here)
        if TEACHER:
            z = _logits(t_tile, t_bias, column, here, t_scale, t_cap, T_BIAS, T_CAPPED, T_SCALED)
            tl.store(sums + 12 * sums_stride, z, mask=here)


@triton.jit
def _log_mixture(log_s, log_t, log_of_student, log_of_teacher):
    """log((1 − β) exp(log_s) + β exp(log_t)), with log(1 − β) and log β given."""
    x = log_s + log_of_student
    y = log_t + log_of_teacher
    top = tl.maximum(x, y)
    return top + tl.log(tl.exp(x - top) + tl.exp(y - top))


@triton.jit
def _second_kernel(
    larger_held,
    difference_held,
    references,
    of_rows,
    sums,
    width,
    held_stride,
    rows,
    blocks,
    log_of_student,
    log_of_teacher,
    MIXTURE: tl.constexpr,
    HELLINGER: tl.constexpr,
    CURVATURE: tl.constexpr,
    HELD_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token, all columns: the sums of `SecondPass` from held logits and the normalisers."""
    row = tl.program_id(0).to(tl.int64)
    larger_held += row * held_stride
    difference_held += row * held_stride
    references += 2 * row * blocks
    s_max = tl.load(of_rows + row)
    s_log = tl.load(of_rows + 1 * rows + row)
    t_max = tl.load(of_rows + 2 * rows + row)
    t_log = tl.load(of_rows + 3 * rows + row)
    s_to_mixture = s_max * 0.0
    t_to_mixture = s_max * 0.0
    root = s_max * 0.0
    gg = s_max * 0.0
    sgg = s_max * 0.0
    sg = s_max * 0.0
    mass = s_max * 0.0
    centre = s_max * 0.0
    likeliest = s_max * 0.0 - 1.0
    for offset in range(0, width, BLOCK):
        columns = offset + tl.arange(0, BLOCK)
        inside = columns < width
        reference = references + 2 * (columns // HELD_BLOCK)
        larger = tl.load(larger_held + columns, mask=inside, other=0.0).to(tl.float32)
        difference = tl.load(difference_held + columns, mask=inside, other=0.0).to(tl.float32)
        log_s, log_t = _held(larger, difference)
        # log-probabilities that a = 0 and b = 0 stand for
        s_zero = (tl.load(reference, mask=inside, other=0.0) - s_max) - s_log
        t_zero = (tl.load(reference + 1, mask=inside, other=0.0) - t_max) - t_log
        log_s += s_zero
        log_t += t_zero
        p = tl.where(inside, tl.exp(log_s), 0.0)
        q = tl.where(inside, tl.exp(log_t), 0.0)
        if MIXTURE:
            ratio = difference + (s_zero - t_zero)
            s_to_mixture -= tl.sum(p * _log_mixture(0.0 * ratio, -ratio, log_of_student, log_of_teacher), axis=0)
            t_to_mixture -= tl.sum(q * _log_mixture(ratio, 0.0 * ratio, log_of_student, log_of_teacher), axis=0)
        if HELLINGER:
            difference = tl.where(inside, tl.exp(0.5 * log_s) - tl.exp(0.5 * log_t), 0.0)
            root += tl.sum(difference * difference, axis=0)
        if CURVATURE:
            g = p - q
            gg += tl.sum(g * g, axis=0)
            # about g of the likeliest token so far, as in `SecondPass`
            highest = tl.max(p, axis=0)
            at = p == highest
            of_highest = tl.sum(tl.where(at, g, 0.0), axis=0) / tl.sum(tl.where(at, 1.0, 0.0), axis=0)
            moved = tl.where(highest > likeliest, of_highest, centre)
            likeliest = tl.maximum(likeliest, highest)
            shift = centre - moved
            centre = moved
            sgg += 2.0 * shift * sg + shift * shift * mass
            sg += shift * mass
            mass += tl.sum(p, axis=0)
            about = g - centre
            sgg += tl.sum(p * about * about, axis=0)
            sg += tl.sum(p * about, axis=0)
    tl.store(sums + row, s_to_mixture)
    tl.store(sums + 1 * rows + row, t_to_mixture)
    tl.store(sums + 2 * rows + row, root)
    tl.store(sums + 3 * rows + row, gg)
    tl.store(sums + 4 * rows + row, sgg)
    tl.store(sums + 5 * rows + row, sg)


@triton.jit
def _gradient_kernel(
    s_logits,
    t_logits,
    gradient,
    s_bias,
    t_bias,
    references,
    of_rows,
    kept,
    width,
    stride,
    gradient_stride,
    rows,
    blocks,
    s_scale,
    s_cap,
    t_scale,
    t_cap,
    log_of_student,
    log_of_teacher,
    slope,
    KIND: tl.constexpr,
    KEPT: tl.constexpr,
    S_BIAS: tl.constexpr,
    T_BIAS: tl.constexpr,
    S_CAPPED: tl.constexpr,
    T_CAPPED: tl.constexpr,
    S_SCALED: tl.constexpr,
    T_SCALED: tl.constexpr,
    HELD: tl.constexpr,
    HELD_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token, one block of columns: factor · ∂D/∂(hidden @ weight.T), as in `chunked._gradient_tile`.

    Each element of `gradient` is written by the program that has read the logits in its place, after reading them, so
    `gradient` may be the memory of `s_logits` where an element takes the same bytes. With KEPT the token in row r of
    `gradient` is in row kept[r] of the logits, and the memory is another.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    of_logits = tl.load(kept + row) if KEPT else row
    s_logits += of_logits * stride
    t_logits += of_logits * stride
    s_max, s_log = tl.load(of_rows + row), tl.load(of_rows + 1 * rows + row)
    t_max, t_log = tl.load(of_rows + 2 * rows + row), tl.load(of_rows + 3 * rows + row)
    mean = tl.load(of_rows + 4 * rows + row)
    factor = tl.load(of_rows + 5 * rows + row)
    if HELD:
        reference = references + 2 * (of_logits * blocks + columns // HELD_BLOCK)
        # log-probabilities that a = 0 and b = 0 stand for
        s_zero = (tl.load(reference, mask=inside, other=0.0) - s_max) - s_log
        t_zero = (tl.load(reference + 1, mask=inside, other=0.0) - t_max) - t_log
        larger = tl.load(s_logits + columns, mask=inside, other=0.0).to(tl.float32)
        difference = tl.load(t_logits + columns, mask=inside, other=0.0).to(tl.float32)
        log_s, log_t = _held(larger, difference)
        log_s += s_zero
        log_t += t_zero
        ratio = difference + (s_zero - t_zero)
        s = log_s + s_log + s_max
    else:
        s = _logits(s_logits, s_bias, columns, inside, s_scale, s_cap, S_BIAS, S_CAPPED, S_SCALED)
        t = _logits(t_logits, t_bias, columns, inside, t_scale, t_cap, T_BIAS, T_CAPPED, T_SCALED)
        log_s = (s - s_max) - s_log
        log_t = (t - t_max) - t_log
        ratio = log_s - log_t
    p = tl.exp(log_s)
    if KIND == "forward_kl":
        g = p - tl.exp(log_t)
    elif KIND == "reverse_kl":
        g = p * (ratio - mean)
    else:
        # log p/m, of log p/q alone, which near agreement is known better than log p and log q
        g = p * (-_log_mixture(0.0 * ratio, -ratio, log_of_student, log_of_teacher) - mean)
    g *= factor
    if S_CAPPED:
        g *= 1.0 - (s * slope) * (s * slope)
    if gradient.dtype.element_ty == tl.float16:  # where a divergence is beyond its range
        g = tl.where(g > _HIGHEST_HALF, _HIGHEST_HALF, tl.where(g < _LOWEST_HALF, _LOWEST_HALF, g))
    tl.store(gradient + row * gradient_stride + columns, g.to(gradient.dtype.element_ty), mask=inside)


@triton.jit
def _scale_kernel(values, factor, size, BLOCK: tl.constexpr):
    """values · factor in their place, computed in float32 and rounded once; a factor of 1 moves no byte of them."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    by = tl.load(factor)
    inside = place < tl.where(by == 1.0, 0, size)
    value = tl.load(values + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(values + place, (value * by).to(values.dtype.element_ty), mask=inside)


def statistics(
    student: Head,
    teacher: Head | None,
    fields: Sequence[str],
    beta: float,
    temperature: float,
    token_ids: Tensor | None,
    vocabulary: int,
) -> dict[str, Tensor]:
    """The asked statistics of every row, [N] each, and the normalisers that a backward needs."""
    hidden = student.hidden.detach()
    if not len(hidden):
        return dict.fromkeys(STATISTICS, torch.zeros(0, device=hidden.device))
    s_head = _dense(Projection.of(student, vocabulary, temperature))
    t_head = None if teacher is None else _dense(Projection.of(teacher, vocabulary, temperature))
    token_ids = None if token_ids is None else token_ids.contiguous()
    t_hidden = None if teacher is None else teacher.hidden.detach()
    hold = 0 if set(SECOND_PASS).isdisjoint(fields) else _rows_held(hidden, vocabulary)
    with torch.cuda.device_of(hidden):
        scorer = _Scorer(s_head, t_head, fields, beta, hidden, t_hidden, hold)
        pieces = [scorer.score(span, token_ids) for span in _spans(len(hidden), scorer.tokens)]
    return _joined(pieces)


class TokenDivergence(torch.autograd.Function):
    """[N] divergences whose backward projects again the rows with a gradient, and no others."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        kind: str,
        beta: float,
        s_head: Projection,
        t_head: Projection,
        teacher_hidden: Tensor,
        per_row: dict[str, Tensor],
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, teacher_hidden)
        ctx.kind, ctx.beta, ctx.heads, ctx.per_row = kind, beta, (s_head, t_head), per_row
        return per_row[kind].clone()  # a tensor of its own: the statistic of the same name carries no gradient

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        hidden, weight, bias, teacher_hidden = ctx.saved_tensors
        s_head, t_head = (_dense(head) for head in ctx.heads)
        vocabulary, needs = len(s_head.weight), ctx.needs_input_grad[:3]
        with torch.autocast(hidden.device.type, enabled=False), torch.cuda.device_of(hidden):
            index = grad.nonzero()[:, 0]
            rows = len(index)
            s_hidden, t_hidden = hidden[index], teacher_hidden[index]
            gradients = _Gradients(s_hidden, weight, bias, needs, vocabulary, blocks=1)
            if rows:
                per_row = {name: value[index] for name, value in ctx.per_row.items() if name in OF_GRADIENT}
                factor = grad[index].float()
                peak = _peak(factor, hidden.dtype)
                of_rows = _of_rows(ctx.kind, ctx.beta, per_row, factor, peak, s_head)
                half = hidden.dtype in HALF
                most = _workspace(hidden.device) // (rows * (10 if half else 8)) // 64 * 64
                columns = min(_even_columns(vocabulary, max(64, most), 64), vocabulary)
                size = rows * _aligned_up(columns)
                s_tile, t_tile = (torch.empty(size, device=hidden.device) for _ in range(2))
                tile = torch.empty(size, dtype=hidden.dtype, device=hidden.device) if half else s_tile

                def tiles() -> Iterator[tuple[Tensor, Tensor, int]]:
                    for start, stop in _spans(vocabulary, columns):
                        s_rows = s_head.weight[start:stop].to(hidden.dtype)
                        s = _projected(s_hidden, s_rows, s_tile)
                        t = _projected(t_hidden, t_head.weight[start:stop].to(t_hidden.dtype), t_tile)
                        gradient = _view(tile, *s.shape)
                        _form_gradient(ctx.kind, ctx.beta, s, t, gradient, of_rows, s_head, t_head, start)
                        yield gradient, s_rows, start

                for gradient, s_rows, start in tiles():
                    gradients.add(gradient, s_hidden, s_rows, slice(None), start)
                gradients.mend(slice(None), ((gradient, s_rows) for gradient, s_rows, _ in tiles()))
                gradients.rescale(peak)
            of_kept, of_weight, of_bias = gradients.finish(s_hidden, grad, index)
            if of_kept is not None:
                of_hidden = torch.zeros_like(hidden)
                of_hidden[index] = of_kept
                of_kept = of_hidden
        return (of_kept, of_weight, of_bias, *(None,) * 6)


class FusedLoss(torch.autograd.Function):
    """Σ factor · divergence over rows that are projected once, the gradient formed on the spot; see `chunked`'s."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        kind: str,
        beta: float,
        s_head: Projection,
        t_head: Projection,
        teacher_hidden: Tensor,
        factor: Tensor | Choose,
        fields: Sequence[str],
        token_ids: Tensor | None,
        lengths: Sequence[int] | None = None,
    ) -> tuple[Tensor, ...]:
        needs, vocabulary = ctx.needs_input_grad[:3], len(s_head.weight)
        s_head, t_head = _dense(s_head), _dense(t_head)
        token_ids = None if token_ids is None else token_ids.contiguous()
        # "reverse_kl" always: its gradient needs the value, and the sum is nearly free
        wanted = (kind, *fields, "reverse_kl")
        spare = 4 * vocabulary * hidden.shape[1] if needs[1] else 0  # the float32 weight gradient of several blocks
        pieces, factors, chosen = [], [], []
        with torch.autocast(hidden.device.type, enabled=False), torch.cuda.device_of(hidden):
            if lengths is not None:
                spans = packed(lengths, choice_rows(hidden, vocabulary))
                hold = max((end - row for row, end in spans), default=0)
            elif any(needs) or not set(SECOND_PASS).isdisjoint(wanted):
                hold = _rows_held(hidden, vocabulary, spare)
            else:
                hold = 0
            scorer = _Scorer(s_head, t_head, wanted, beta, hidden, teacher_hidden, hold)
            if lengths is None:
                spans = list(_spans(len(hidden), scorer.tokens))
            gradients = _Gradients(hidden, weight, bias, needs, vocabulary, blocks=len(spans))
            peak = None if callable(factor) else _peak(factor, hidden.dtype)
            place = 0  # of what is chosen, in the hidden states' gradient
            for row, end in spans:
                per_row = scorer.score((row, end), token_ids)
                pieces.append(per_row)
                given = factor(per_row, row, end) if callable(factor) else factor[row:end]
                factors.append(given.float())
                if not callable(factor):
                    if any(needs):
                        of_rows = _of_rows(kind, beta, per_row, factors[-1], peak, s_head)
                        scorer.differentiate(kind, of_rows, hidden[row:end], slice(row, end), gradients)
                    continue
                kept = factors[-1].nonzero()[:, 0]
                chosen.append(row + kept)
                if len(kept) and any(needs):
                    names = {*OF_GRADIENT, "held_kl"}.intersection(per_row)
                    of_kept = {name: per_row[name][kept] for name in names}
                    of_rows = _of_rows(kind, beta, of_kept, factors[-1][kept], peak, s_head)
                    rows = slice(place, place + len(kept))
                    scorer.differentiate(kind, of_rows, hidden[row + kept], rows, gradients, kept)
                place += len(kept)
            scorer.release()
            gradients.rescale(peak)
            # the hidden states' is rounded when it is handed out: the factor that comes in may lift it into range
            of_hidden, gradients.hidden = gradients.hidden, None
            index = torch.cat(chosen) if chosen else None
            if of_hidden is not None and index is not None:
                of_hidden = torch.zeros_like(of_hidden).index_copy_(0, index, of_hidden[:place])
            if gradients.weight is not None and not gradients.rows_of_weight:
                gradients.weight.zero_()  # no row was differentiated, so nothing is written there
            rounded(of_hidden if hidden.dtype == torch.float16 else None, hidden, hidden)
            ctx.gradients, ctx.dtype = [of_hidden, *gradients.finish(hidden)[1:]], hidden.dtype
        # no piece: a rank without a kept token has a loss of 0 that still reaches the graph
        per_row = _joined(pieces) if pieces else dict.fromkeys(STATISTICS, torch.zeros(0, device=hidden.device))
        normaliser = per_row["s_log"] + per_row["t_log"]
        divergence = per_row[kind]
        statistics = [per_row[name] for name in fields]
        ctx.mark_non_differentiable(divergence, normaliser, *statistics)
        weight_of = torch.cat(factors) if factors else divergence
        # an infinite divergence of a row that is not wanted must not turn the sum into NaN
        weighed = divergence * weight_of if index is None else divergence[index] * weight_of[index]
        return (weighed.sum(), divergence, normaliser, *statistics)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "the gradients of fused_divergence_loss were formed in its forward and handed out already: call it "
                "again for a second backward, or use token_scores and selected_loss."
            )
        gradients, ctx.gradients = ctx.gradients, None
        with torch.cuda.device_of(grads[0]):
            of_hidden, *rest = (None if value is None else _scaled_(value, grads[0]) for value in gradients)
        return (None if of_hidden is None else of_hidden.to(ctx.dtype), *rest, *(None,) * 9)


class _Scorer:
    """Scores spans of tokens in reused memory; with `hold`, keeps the logits of the last span of up to so many."""

    def __init__(
        self,
        student: Projection,
        teacher: Projection | None,
        fields: Sequence[str],
        beta: float,
        s_hidden: Tensor,
        t_hidden: Tensor | None,
        hold: int,
    ) -> None:
        self.student, self.teacher, self.wanted, self.beta = student, teacher, fields, beta
        self.fields = frozenset(fields)
        self.s_hidden, self.t_hidden = s_hidden, t_hidden
        self.second = [name for name in SECOND_PASS if name in self.fields]
        self.vocabulary = len(student.weight)
        self.held: list[Tensor] = []
        self.references: Tensor | None = None
        device = s_hidden.device
        self.tokens = hold or _rows(len(s_hidden), TILE.tokens)
        self.tile = TILE if self.tokens >= TILE.tokens else FEW
        block = self.tile.block
        self.blocks = math.ceil(self.vocabulary / block)
        # whole blocks: the held logits of a block share one reference
        most = max(1, self.tile.tokens * self.tile.columns // (self.tokens * block)) * block
        self.columns = min(
            _full_waves(self.tokens, _even_columns(self.vocabulary, most, block), block, device), self.vocabulary
        )
        models = 1 if teacher is None else 2
        size = self.tokens * _aligned_up(self.columns)
        self.scratch = [torch.empty(size, device=device) for _ in range(models)]
        if hold:
            dtype = torch.float16 if s_hidden.dtype in HALF else torch.float32
            shape = (self.tokens, _aligned_up(self.vocabulary))
            self.held = [torch.empty(shape, dtype=dtype, device=device) for _ in range(2)]
            self.references = torch.empty(2 * self.tokens * self.blocks, device=device)

    def score(self, span: tuple[int, int], token_ids: Tensor | None) -> dict[str, Tensor]:
        row, end = span
        s_hidden = self.s_hidden[row:end]
        t_hidden = None if self.t_hidden is None else self.t_hidden[row:end]
        token_ids = None if token_ids is None else token_ids[row:end]
        sums = torch.empty(len(ONLINE_SUMS), end - row, device=s_hidden.device)
        for start, stop in _spans(self.vocabulary, self.columns):
            self.take(s_hidden, t_hidden, token_ids, sums, start, stop)
        online = Online(0, self.wanted, self.teacher is not None, s_hidden)
        for name, value in zip(ONLINE_SUMS, sums, strict=True):
            setattr(online, name, value)
        per_row = online.finish()
        if self.held and self.held[0].dtype == torch.float16 and "reverse_kl" in per_row:
            per_row["held_kl"] = sums[ONLINE_SUMS.index("pd_held")] / online.p - per_row["s_log"] + per_row["t_log"]
        if self.second:
            per_row |= self.further(per_row)
        return per_row

    def take(
        self,
        s_hidden: Tensor,
        t_hidden: Tensor | None,
        token_ids: Tensor | None,
        sums: Tensor,
        start: int,
        stop: int,
    ) -> None:
        """Project one tile and add it to the sums."""
        rows, fields, student, teacher = len(s_hidden), self.fields, self.student, self.teacher
        s = t = _projected(s_hidden, student.weight[start:stop].to(s_hidden.dtype), self.scratch[0])
        if teacher is not None and t_hidden is not None:
            t = _projected(t_hidden, teacher.weight[start:stop].to(t_hidden.dtype), self.scratch[1])
        both = teacher is not None
        squares = both and "gradient_norm" in fields
        _online_kernel[(rows,)](
            s,
            t,
            _bias(student, start, s),
            _bias(teacher, start, s),
            s if token_ids is None else token_ids,
            sums,
            *(self.held or (s, t)),
            s if self.references is None else self.references,
            start,
            stop - start,
            s.stride(0),
            sums.stride(0),
            self.held[0].stride(0) if self.held else 0,
            self.blocks if self.held else 0,
            *_scales(student),
            *_scales(teacher),
            TEACHER=both,
            S_BIAS=student.bias is not None,
            T_BIAS=teacher is not None and teacher.bias is not None,
            S_CAPPED=student.softcap is not None,
            T_CAPPED=teacher is not None and teacher.softcap is not None,
            S_SCALED=_scales(student)[0] != 1.0,
            T_SCALED=_scales(teacher)[0] != 1.0,
            TOKENS=token_ids is not None,
            ENTROPY="entropy" in fields,
            TEACHER_ENTROPY=both and "teacher_entropy" in fields,
            REVERSE=both and ("reverse_kl" in fields or squares),
            FORWARD=both and "forward_kl" in fields,
            SQUARES=squares,
            HOLD=bool(self.held),
            HOLD_HALF=bool(self.held) and self.held[0].dtype == torch.float16,
            FULL=(stop - start) % self.tile.block == 0,
            BLOCK=self.tile.block,
            num_warps=self.tile.warps,
        )

    def further(self, per_row: dict[str, Tensor]) -> dict[str, Tensor]:
        """The statistics that need the normalisers, from the held logits."""
        rows = len(per_row["s_log"])
        sums = torch.empty(len(SECOND_SUMS), rows, device=self.s_hidden.device)
        _second_kernel[(rows,)](
            *self.held,
            self.references,
            torch.stack([per_row[name] for name in NORMALISERS]),
            sums,
            self.vocabulary,
            self.held[0].stride(0),
            rows,
            self.blocks,
            *_logs(self.beta),
            MIXTURE="jsd" in self.fields,
            HELLINGER="hellinger" in self.fields,
            CURVATURE="signal_to_curvature" in self.fields,
            HELD_BLOCK=self.tile.block,
            BLOCK=WIDE,
            num_warps=WIDE_WARPS,
        )
        further = SecondPass(per_row, self.second, self.beta)
        for name, value in zip(SECOND_SUMS, sums, strict=True):
            setattr(further, name, value)
        return further.finish()

    def differentiate(
        self,
        kind: str,
        of_rows: Tensor,
        hidden: Tensor,
        rows: slice,
        gradients: _Gradients,
        kept: Tensor | None = None,
    ) -> None:
        """Form the gradient at the logits of the last span, and add its products.

        Args:
            kind: the divergence.
            of_rows: of the rows that are differentiated, see `_of_rows`.
            hidden: theirs, [R, H].
            rows: their place in the gradient of the hidden states.
            gradients: to add to.
            kept: which rows of the span they are, int64 [R]; None: all, and the gradient takes the student's place.
        """
        assert self.teacher is not None
        s, t = (tile[:, : self.vocabulary] for tile in self.held)
        if kept is None:
            gradient = s[: len(hidden)].view(hidden.dtype)
        else:
            shape = (len(hidden), _aligned_up(self.vocabulary))
            gradient = torch.empty(shape, dtype=hidden.dtype, device=hidden.device)[:, : self.vocabulary]
        held = (self.references, self.blocks, self.tile.block)
        _form_gradient(kind, self.beta, s, t, gradient, of_rows, self.student, self.teacher, 0, held, kept)

        def tiles() -> Iterator[tuple[Tensor, Tensor, int]]:
            columns = _even_columns(self.vocabulary, math.ceil(self.vocabulary / 4), 64)
            for start, stop in _spans(self.vocabulary, columns):
                yield gradient[:, start:stop], self.student.weight[start:stop].to(hidden.dtype), start

        for of_logits, weight, start in tiles():
            gradients.add(of_logits, hidden, weight, rows, start)
        gradients.mend(rows, ((of_logits, weight) for of_logits, weight, _ in tiles()))

    def release(self) -> None:
        """Give back the memory before the gradients take their final form."""
        self.scratch, self.held, self.references = [], [], None


def _form_gradient(
    kind: str,
    beta: float,
    s: Tensor,
    t: Tensor,
    gradient: Tensor,
    of_rows: Tensor,
    student: Projection,
    teacher: Projection,
    start: int,
    held: tuple[Tensor | None, int, int] = (None, 0, 1),
    kept: Tensor | None = None,
) -> None:
    """Fill `gradient` [R, C] from held logits or from a projected tile of columns from `start`.

    `held`: the references, how many a row has, and of how many columns each is. `kept`: int64 [R], rows of the logits.
    """
    rows, width = gradient.shape[0], s.shape[1]
    references, blocks, held_block = held
    _gradient_kernel[(rows, math.ceil(width / WIDE))](
        s,
        t,
        gradient,
        _bias(student, start, of_rows),
        _bias(teacher, start, of_rows),
        of_rows if references is None else references,
        of_rows,
        of_rows if kept is None else kept,
        width,
        s.stride(0),
        gradient.stride(0),
        rows,
        blocks,
        *_scales(student),
        *_scales(teacher),
        *_logs(beta),
        0.0 if student.softcap is None else student.temperature / student.softcap,
        KIND=kind,
        KEPT=kept is not None,
        S_BIAS=student.bias is not None,
        T_BIAS=teacher.bias is not None,
        S_CAPPED=student.softcap is not None,
        T_CAPPED=teacher.softcap is not None,
        S_SCALED=_scales(student)[0] != 1.0,
        T_SCALED=_scales(teacher)[0] != 1.0,
        HELD=references is not None,
        HELD_BLOCK=held_block,
        BLOCK=WIDE,
        num_warps=WIDE_WARPS,
    )


class _Gradients:
    """Gradients of hidden states [R, H], weight and bias, of what needs one; nothing is allocated for the rest."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool], vocabulary: int, blocks: int
    ) -> None:
        self.like, self.first = (hidden, weight, bias), True
        device = hidden.device
        self.hidden = torch.zeros(hidden.shape, device=device) if needs[0] else None
        self.weight = self.bias = None
        if needs[1]:
            # complete after one block, and so rounded as it is formed; a float16 one awaits its factor
            complete = blocks == 1 and hidden.dtype != torch.float16
            dtype = weight.dtype if complete else torch.float32
            self.weight = torch.empty(weight.shape, dtype=dtype, device=device)
            self.weight[vocabulary if blocks and len(hidden) else 0 :].zero_()
        if bias is not None and needs[2]:
            self.bias = torch.zeros(bias.shape, device=device)
        self.rows_of_weight = 0
        self.beside = torch.cuda.Stream(device) if TWO_STREAMS and hidden.is_cuda and needs[0] and needs[1] else None

    def add(self, gradient: Tensor, hidden: Tensor, weight: Tensor, rows: slice, start: int) -> None:
        """Add the products of one tile: `rows` of the hidden states, the vocabulary from `start`."""
        stop = start + gradient.shape[1]
        if self.beside is not None:
            self.beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.beside):
                self._add_to_hidden(gradient, weight, rows)
        else:
            self._add_to_hidden(gradient, weight, rows)
        if self.weight is not None:
            if start >= self.rows_of_weight:  # the first block of tokens: nothing to add to
                _product(self.weight[start:stop], gradient.t(), hidden)
                self.rows_of_weight = stop
            else:
                _add_product(self.weight[start:stop], gradient.t(), hidden)
        if self.bias is not None:
            self.bias[start:stop] += gradient.sum(0, dtype=torch.float32)
        if self.beside is not None:  # the tile's memory is the next one's
            torch.cuda.current_stream().wait_stream(self.beside)

    def _add_to_hidden(self, gradient: Tensor, weight: Tensor, rows: slice) -> None:
        if self.hidden is not None:
            _add_product(self.hidden[rows], gradient, weight)

    def mend(self, rows: slice, tiles: Iterator[tuple[Tensor, Tensor]]) -> None:
        """Form the hidden states' again where a weight of −∞ made it NaN: its logit has no gradient, and 0 · ∞ is none.

        Args:
            rows: of the hidden states.
            tiles: (gradient at the logits, weight) of all columns, made only where they are wanted.
        """
        if self.hidden is None or bool(self.hidden[rows].isfinite().all()):
            return
        self.hidden[rows] = 0
        for gradient, weight in tiles:
            self._add_to_hidden(gradient, without_infinities(weight), rows)

    def rescale(self, peak: Tensor | None) -> None:
        if peak is not None:
            for value in (self.hidden, self.weight, self.bias):
                if value is not None:
                    value.mul_(peak.to(value.dtype))

    def finish(
        self, hidden: Tensor, incoming: Tensor | None = None, index: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        """The gradients in their dtypes; of `hidden`, of which tokens where it is not all of them."""
        values, self.hidden, self.weight, self.bias = (self.hidden, self.weight, self.bias), None, None, None
        try:
            return tuple(rounded(value, like, hidden, incoming) for value, like in zip(values, self.like, strict=True))
        except NonFiniteLogitsError as error:
            if index is None or incoming is None:
                raise
            token = int(index[error.token])
            raise NonFiniteLogitsError(token, f"token {token} of {len(incoming)}", error.cause) from None


def _scaled_(gradient: Tensor, factor: Tensor) -> Tensor:
    """gradient · factor, in its place; the host does not ask whether the factor is 1, which it mostly is."""
    size, block = gradient.numel(), 4096
    if size:
        _scale_kernel[(math.ceil(size / block),)](gradient, factor.float(), size, BLOCK=block)
    return gradient


def _of_rows(
    kind: str, beta: float, per_row: dict[str, Tensor], factor: Tensor, peak: Tensor | None, student: Projection
) -> Tensor:
    """[6, R] of the gradient kernel: the normalisers, the mean log ratio that it subtracts, and the factor."""
    factor = (factor if peak is None else factor / peak) * student.scale
    mean = per_row["s_max"]  # of forward_kl none
    if kind == "reverse_kl":
        mean = per_row.get("held_kl", per_row["reverse_kl"])
    if kind == "jsd":
        factor, mean = factor * (1 - beta), per_row["s_to_mixture"]
    return torch.stack([*(per_row[name] for name in NORMALISERS), mean, factor])


def _peak(factor: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Float16 alone has too few exponents for a gradient of 1 / tokens: it is formed with factors up to 1."""
    if dtype != torch.float16 or not len(factor):
        return None
    return factor.float().abs().amax().clamp(min=torch.finfo(torch.float32).tiny)


def _projected(hidden: Tensor, weight: Tensor, scratch: Tensor) -> Tensor:
    """hidden @ weight.T in float32, in the memory of `scratch`."""
    out = _view(scratch, len(hidden), len(weight))
    _product(out, hidden, weight.t())
    return out


def _view(scratch: Tensor, rows: int, columns: int) -> Tensor:
    """[rows, columns] in the memory of `scratch`, each row aligned."""
    stride = _aligned_up(columns)
    return scratch[: rows * stride].view(rows, stride)[:, :columns]


def _product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out = left @ right, summed in float32."""
    if out.dtype == left.dtype and (left.is_cuda or left.dtype == torch.float32):
        torch.mm(left, right, out=out)
    elif left.is_cuda and left.dtype in HALF and out.dtype == torch.float32:
        torch.mm(left, right, out_dtype=torch.float32, out=out)
    else:
        out.copy_(left.float() @ right.float())


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, summed in float32."""
    if left.is_cuda and left.dtype in HALF:
        if MIXED_ADDMM:
            torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
        else:
            total += torch.mm(left, right, out_dtype=torch.float32)
    else:
        total.addmm_(left.float(), right.float())


def _bias(head: Projection | None, start: int, otherwise: Tensor) -> Tensor:
    return otherwise if head is None or head.bias is None else head.bias[start:]


def _dense(head: Projection) -> Projection:
    """With a bias whose entries lie one after another, as the kernels read it: a view's do not."""
    return head if head.bias is None else replace(head, bias=head.bias.contiguous())


def _scales(head: Projection | None) -> tuple[float, float]:
    """What multiplies the projection, and what multiplies the tanh of that."""
    if head is None:
        return 1.0, 1.0
    if head.softcap is None:
        return float(head.scale), 1.0
    return head.logit_scale / head.softcap, head.softcap / head.temperature


def _logs(beta: float) -> tuple[float, float]:
    return (math.log(1 - beta), math.log(beta)) if 0 < beta < 1 else (0.0, 0.0)


def _joined(pieces: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


def _aligned_up(columns: int) -> int:
    """Rows of so many elements all start on a cache line, as cuBLAS and vector loads want them."""
    return math.ceil(columns / 64) * 64


def _even_columns(vocabulary: int, most: int, multiple: int) -> int:
    """The step over the vocabulary, a multiple, that takes as few tiles as `most` does, of nearly equal width."""
    return math.ceil(_even(vocabulary, most) / multiple) * multiple


def _full_waves(rows: int, most: int, multiple: int, device: torch.device) -> int:
    """Up to `most` columns, a multiple, for a projection that keeps the multiprocessors busy to its end.

    Of its pieces, 128 × 256 each, a GPU of 132 multiprocessors computes 133 in the time of 264.
    """
    if device.type != "cuda":
        return most
    processors = torch.cuda.get_device_properties(device).multi_processor_count

    def busy(columns: int) -> float:
        pieces = math.ceil(rows / 128) * math.ceil(columns / 256)
        return pieces / (math.ceil(pieces / processors) * processors)

    # from half as wide on: narrower tiles are read and launched more often than full waves are worth
    return max(range(most, max(multiple, most // 2) - 1, -multiple), key=busy)


def _workspace(device: torch.device) -> int:
    """Bytes of logits and of their gradients that are held at a time: of a model of GPU always the same."""
    if device.type != "cuda":
        return INTERPRETED_WORKSPACE
    return int(torch.cuda.get_device_properties(device).total_memory * WORKSPACE_SHARE)


def _rows_held(hidden: Tensor, vocabulary: int, spare: int = 0) -> int:
    """Tokens whose logits are held at a time: all where they fit into the workspace and `spare` bytes."""
    tokens, workspace = len(hidden), _workspace(hidden.device)
    of_token = 2 * vocabulary * (2 if hidden.dtype in HALF else 4)
    if tokens * of_token <= workspace + spare:
        return max(tokens, 1)
    return _rows(tokens, max(1, workspace // of_token))


def choice_rows(hidden: Tensor, vocabulary: int) -> int:
    """Most rows of a group that `FusedLoss` chooses among: their logits and a gradient of as many fit the workspace.

    None in float16: the factors of its gradients are scaled by the largest, which is known when all are chosen.
    """
    if hidden.dtype == torch.float16:
        return 0
    return _workspace(hidden.device) // (3 * vocabulary * (2 if hidden.dtype in HALF else 4))


def _rows(tokens: int, most: int) -> int:
    """Tokens of a block: nearly equal blocks of up to `most`, in the 128 rows that a tile of cuBLAS has."""
    if most < 128:
        return _even(tokens, most)
    return max(1, min(tokens, math.ceil(_even(tokens, most // 128 * 128) / 128) * 128))
