"""The fast path on any device: logits in tiles, one online pass for the statistics, gradients of the asked rows alone.

Logits exist one tile of [tokens, vocabulary] at a time, in float32 (float64 for float64 inputs). Each statistic is a
sum over the vocabulary relative to a running maximum, as in online softmax. No tensor of [N, V] is ever held.

What happens to one tile of R tokens and C columns of the vocabulary, in order:

1. C rows of either lm_head meet the R hidden states: logits s of the student and t of the teacher, [R, C] (tiles.py).
2. The logits of sampled tokens that lie in these columns are noted.
3. The running maxima rise to those of the tile, and the sums so far move to the new reference (sums.py).
4. The tile is added to the sums. The tile itself is overwritten on the way, and gone.
5. After the last column the sums become normalisers and statistics of the R tokens. Statistics that are differences of
   nearly equal sums take a second pass over the same columns.

A backward makes the tiles again, now with the normalisers known: a tile becomes the gradient at its logits, and two
products carry it to the hidden states and to the lm_head. `TokenDivergence` does so for the rows that have a gradient;
`FusedLoss` is given rows that all have one, and differentiates them before their logits are gone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..types import Head
from .checks import in_range, rounded, scaled_
from .sums import OF_GRADIENT, SECOND_PASS, STATISTICS, Online, SecondPass
from .tiles import Gradients, Projection, _even, _like, _operand, _spans, accumulation_dtype, without_infinities

# Most tokens of a tile, and its elements. Tall, since both lm_heads are read once per row of tiles; on the CPU no
# larger than what stays in a core's cache, on a GPU large enough to fill it.
CPU_TILE = (512, 2**19)
GPU_TILE = (2048, 2**25)
# Bytes of logits that the fused loss holds at a time, both models together.
CPU_WORKSPACE = 39 * 2**20
GPU_WORKSPACE = 1024 * 2**20


def _tile_shape(hidden: Tensor, vocabulary: int) -> tuple[int, int]:
    tokens, elements = GPU_TILE if hidden.is_cuda else CPU_TILE
    tokens = _even(len(hidden), tokens)
    columns = elements // tokens
    # rows that begin on a cache line
    return tokens, min(columns - columns % 64 if columns > 64 else columns, vocabulary)


def _gradient_tile(
    kind: str, beta: float, s: Tensor, t: Tensor, of_rows: dict[str, Tensor], weight: Tensor, student: Projection
) -> Tensor:
    """weight · ∂D/∂(hidden @ weight.T) of one tile of logits [R, C], in place: overwrites s and t.

    reverse_kl: p (log p/q − KL) · forward_kl: p − q · jsd: (1 − β) p (log p/m − KL(p‖m))
    """
    slope = student.slope(s)
    log_s = s.sub_(of_rows["s_max"][:, None]).sub_(of_rows["s_log"][:, None])
    log_t = t.sub_(of_rows["t_max"][:, None]).sub_(of_rows["t_log"][:, None])
    if kind == "forward_kl":
        gradient = log_s.exp_().sub_(log_t.exp_())
    else:
        if kind == "reverse_kl":
            target, mean = log_t, of_rows["reverse_kl"]
        else:
            target = torch.logaddexp(log_s + math.log(1 - beta), log_t + math.log(beta), out=log_t)
            mean, weight = of_rows["s_to_mixture"], weight * (1 - beta)
        ratio = torch.sub(log_s, target, out=t).sub_(mean[:, None])
        gradient = log_s.exp_().mul_(ratio)
    gradient.mul_((weight * student.scale)[:, None])
    return gradient if slope is None else gradient.mul_(slope)


def _gradient_of_ratios(
    p: Tensor,
    d: Tensor,
    s_max: Tensor,
    t_max: Tensor,
    of_rows: dict[str, Tensor],
    weight: Tensor,
    student: Projection,
    out: Tensor,
) -> Tensor:
    """The reverse_kl of `_gradient_tile` from what `Online.update` left, relative to the maxima it then had."""
    log_p = s_max - of_rows["s_max"] - of_rows["s_log"]
    log_q = t_max - of_rows["t_max"] - of_rows["t_log"]
    mean = of_rows["reverse_kl"] - (log_p - log_q)
    return torch.sub(d, mean[:, None], out=out).mul_(p).mul_((weight * student.scale * log_p.exp())[:, None])


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
    s_head = Projection.of(student, vocabulary, temperature)
    t_head = None if teacher is None else Projection.of(teacher, vocabulary, temperature)
    dtype, device = accumulation_dtype(student.hidden), student.hidden.device
    tokens, columns = _tile_shape(student.hidden, vocabulary)
    scratch = torch.empty(tokens * columns, dtype=dtype, device=device)
    second = [name for name in SECOND_PASS if name in fields]
    pieces: list[dict[str, Tensor]] = []
    for row, end in _spans(len(student.hidden), tokens):
        s_hidden = _operand(student.hidden[row:end].detach(), student.hidden)
        t_hidden = None if teacher is None else _operand(teacher.hidden[row:end].detach(), teacher.hidden).to(s_hidden)
        online = Online(end - row, fields, teacher is not None, student.hidden)

        def logits(
            start: int, stop: int, s_hidden: Tensor = s_hidden, t_hidden: Tensor | None = t_hidden
        ) -> tuple[Tensor, Tensor | None]:
            s = s_head.logits(s_hidden, s_head.rows(start, stop, s_hidden), start)
            if t_head is None or t_hidden is None:
                return s, None
            return s, t_head.logits(t_hidden, t_head.rows(start, stop, t_hidden), start)

        for start, stop in _spans(vocabulary, columns):
            s, t = logits(start, stop)
            if token_ids is not None:
                online.take_tokens(s, t, token_ids[row:end], start, stop)
            online.update(s, t, s, s if t is None else t, _like(s, scratch))
            del s, t  # their memory is the next tile's
        of_rows = online.finish()
        if second:
            further = SecondPass(of_rows, second, beta)
            for start, stop in _spans(vocabulary, columns):
                s, t = logits(start, stop)
                assert t is not None, "the second pass compares with a teacher"
                further.update(s, t)
            of_rows |= further.finish()
        pieces.append(of_rows)
    if not pieces:
        return dict.fromkeys(STATISTICS, torch.zeros(0, dtype=dtype, device=device))
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


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
        of_rows: dict[str, Tensor],
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, teacher_hidden)
        ctx.kind, ctx.beta, ctx.heads, ctx.of_rows = kind, beta, (s_head, t_head), of_rows
        return of_rows[kind].clone()  # a tensor of its own: the statistic of the same name carries no gradient

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        hidden, weight, bias, teacher_hidden = ctx.saved_tensors
        s_head, t_head = ctx.heads
        dtype = accumulation_dtype(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            index = grad.nonzero()[:, 0]
            of_rows = {name: value[index] for name, value in ctx.of_rows.items() if name in OF_GRADIENT}
            rows = (hidden[index], teacher_hidden[index], of_rows, grad[index].to(dtype))
            gradients = Gradients.zeros(rows[0], weight, bias, ctx.needs_input_grad[:3])
            _differentiate(ctx.kind, ctx.beta, s_head, t_head, *rows, gradients)
            grad_hidden = None
            if gradients.hidden is not None:
                of_all = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
                of_all[index] = gradients.hidden
                grad_hidden = rounded(of_all, hidden, hidden, grad)
        return (
            grad_hidden,
            rounded(gradients.weight, weight, hidden, grad),
            rounded(gradients.bias, bias, hidden, grad),
            *(None,) * 6,
        )


def _differentiate(
    kind: str,
    beta: float,
    s_head: Projection,
    t_head: Projection,
    hidden: Tensor,
    teacher_hidden: Tensor,
    of_rows: dict[str, Tensor],
    factor: Tensor,
    gradients: Gradients,
    bounded: bool = False,
) -> None:
    """Project rows again, whose normalisers are known, and add Σ factor · ∂divergence to `gradients`.

    A weight of −∞ makes 0 · ∞ of the hidden states' gradient. No look at all weights is spent on that: where the
    gradient turns out NaN it is formed again, `bounded`, with 0 for such weights.
    """
    tokens, columns = _tile_shape(hidden, len(s_head.weight))
    for row, end in _spans(len(hidden), tokens):
        s_hidden = _operand(hidden[row:end], hidden)
        t_hidden = _operand(teacher_hidden[row:end], teacher_hidden).to(s_hidden)
        piece = {name: value[row:end] for name, value in of_rows.items()}
        for start, stop in _spans(len(s_head.weight), columns):
            s_rows = s_head.rows(start, stop, s_hidden)
            s = s_head.logits(s_hidden, s_rows, start)
            t = t_head.logits(t_hidden, t_head.rows(start, stop, t_hidden), start)
            gradient = _gradient_tile(kind, beta, s, t, piece, factor[row:end], s_head)
            gradients.add(gradient, s_hidden, without_infinities(s_rows) if bounded else s_rows, row, start)
            del s, t, gradient  # their memory is the next tile's
    if not bounded and gradients.hidden is not None and not bool(gradients.hidden.isfinite().all()):
        gradients.hidden.zero_()
        again = Gradients(gradients.hidden, None, None)
        _differentiate(kind, beta, s_head, t_head, hidden, teacher_hidden, of_rows, factor, again, bounded=True)


@dataclass
class _Rows:
    """Rows of the fused loss between their projection and their gradient."""

    first: int
    s_hidden: Tensor
    t_hidden: Tensor
    factor: Tensor
    online: Online

    @staticmethod
    def of(
        span: tuple[int, int], hidden: Tensor, teacher_hidden: Tensor, factor: Tensor, fields: Sequence[str]
    ) -> _Rows:
        rows = slice(*span)
        s_hidden = _operand(hidden[rows], hidden)
        t_hidden = _operand(teacher_hidden[rows], teacher_hidden).to(s_hidden)
        online = Online(len(s_hidden), fields, True, hidden)
        return _Rows(span[0], s_hidden, t_hidden, factor[rows].to(online.p.dtype), online)


def _fused_spans(hidden: Tensor, vocabulary: int, lender: Tensor | None) -> tuple[list[tuple[int, int]], int, int]:
    """Rows in flight at a time, how many of them in the memory of the lm_head's gradient, and a tile's columns.

    That gradient, [V, H], is nothing until the first rows are differentiated, and the tiles of R rows take 2·R·V.
    """
    cuda = hidden.is_cuda
    bytes_of_row = 2 * vocabulary * accumulation_dtype(hidden).itemsize
    most = max(1, (GPU_WORKSPACE if cuda else CPU_WORKSPACE) // bytes_of_row)
    lent = 0 if lender is None else min(len(hidden), lender.shape[1] // 2, (GPU_TILE if cuda else CPU_TILE)[0])
    if lent < min(most, len(hidden)):
        lent = 0
    rest = len(hidden) - lent
    rows = _even(rest, most)
    spans = [(lent + start, lent + stop) for start, stop in _spans(rest, rows)]
    columns = _tile_shape(hidden[: max(rows, lent // 2)], vocabulary)[1]
    return [(0, lent), *spans] if lent else spans, lent, columns


class FusedLoss(torch.autograd.Function):
    """Σ factor · divergence over rows that are all wanted: projected once, the gradient formed on the spot."""

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
        factor: Tensor,
        fields: Sequence[str],
        token_ids: Tensor | None,
    ) -> tuple[Tensor, ...]:
        # Rows come in groups ("spans") whose logits fit the workspace. Of a group, all tiles stay in `tiles` until its
        # normalisers are known, which is after the last column; then each tile becomes a gradient and is gone.
        #
        #   sweep 0    project group 0
        #   sweep 1    differentiate group 0, project group 1
        #   sweep 2    differentiate group 1, project group 2
        #   ...        and a last sweep that only differentiates
        #
        # In a sweep each tile of columns is first differentiated, for the group `scored` before, and then projected,
        # for the group `rows`, in the place of the tile that just went. So a tile of the lm_head is fetched once for
        # both, and the memory is that of one group. The first group borrows the memory of the lm_head's gradient,
        # which holds nothing yet: columns [start, stop) of its tiles lie where the gradient of these columns will be,
        # and are zeroed when they have been read.
        needs = [bool(need) for need in ctx.needs_input_grad[:3]]
        dtype = accumulation_dtype(hidden)
        vocabulary = len(s_head.weight)
        gradients = Gradients.zeros(hidden, weight, bias, needs)
        wanted = {kind, "reverse_kl", *fields}  # whose gradient needs its value; the sum is nearly free
        second = [name for name in SECOND_PASS if name in wanted]
        # The probabilities and ratios that the sums are taken over give this gradient in three passes more; the other
        # divergences, the second pass and a softcap's slope need the logits themselves.
        in_place = kind == "reverse_kl" and not second and s_head.softcap is None
        spans, lent, columns = _fused_spans(hidden, vocabulary, gradients.weight if in_place else None)
        most = max((stop - start for start, stop in spans), default=0)
        # by the tile's first column: (p, log p/q) where in_place, relative to the maxima beside them, else (s, t)
        tiles: dict[int, tuple[Tensor, Tensor]] = {}
        maxima: dict[int, tuple[Tensor, Tensor]] = {}
        scratch = [torch.empty(most * columns, dtype=dtype, device=hidden.device) for _ in range(1 if in_place else 3)]
        pieces: list[dict[str, Tensor]] = []
        scored: _Rows | None = None
        with torch.autocast(hidden.device.type, enabled=False):
            sweeps: list[tuple[int, int] | None] = [*spans]
            for span in (*sweeps, None) if any(needs) else sweeps:
                rows = None if span is None else _Rows.of(span, hidden, teacher_hidden, factor, tuple(wanted))
                for start, stop in _spans(vocabulary, columns):
                    s_rows = s_head.rows(start, stop, hidden)
                    # differentiate the tile of the group before
                    if scored is not None and any(needs):
                        a, b = tiles.pop(start)
                        if in_place:
                            gradient = _like(a, scratch[0])
                            _gradient_of_ratios(
                                a, b, *maxima.pop(start), pieces[-1], scored.factor, s_head, out=gradient
                            )
                            if scored.first < lent and gradients.weight is not None:
                                gradients.weight[start:stop] = 0  # the tile lay there; now it is a gradient again
                        else:
                            gradient = _gradient_tile(kind, beta, a, b, pieces[-1], scored.factor, s_head)
                        gradients.add(gradient, scored.s_hidden, s_rows, scored.first, start)
                        del a, b, gradient  # their memory is the next tile's
                    # project the same columns for the next group, and add them to its sums
                    if rows is not None:
                        s = s_head.logits(rows.s_hidden, s_rows, start)
                        t = t_head.logits(rows.t_hidden, t_head.rows(start, stop, rows.t_hidden), start)
                        if token_ids is not None:
                            rows.online.take_tokens(s, t, token_ids[rows.first :][: len(s)], start, stop)
                        free, *memory = scratch
                        if rows.first < lent and gradients.weight is not None:
                            memory = list(gradients.weight[start:stop].view(-1).chunk(2))
                        # what `update` leaves in a and b is p and log p/q: in memory of their own where s and t stay
                        a, b = (_like(s, part) for part in memory) if memory else (s, t)
                        rows.online.update(s, t, a, b, _like(s, free))
                        tiles[start] = (a, b) if in_place else (s, t)
                        if in_place:
                            maxima[start] = rows.online.s_max, rows.online.t_max
                # all columns were seen: the sums of the group become its normalisers and statistics
                if rows is not None:
                    of_rows = rows.online.finish()
                    if second:
                        further = SecondPass(of_rows, second, beta)
                        for s, t in tiles.values():
                            further.update(s, t)
                        of_rows |= further.finish()
                    pieces.append(of_rows)
                scored = rows
            if pieces:
                of_rows = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
            else:  # a rank without a kept token: a loss of 0 that still reaches the graph
                of_rows = dict.fromkeys(STATISTICS, torch.zeros(0, dtype=dtype, device=hidden.device))
            if gradients.hidden is not None and not bool(gradients.hidden.isfinite().all()):
                gradients.hidden.zero_()
                again = Gradients(gradients.hidden, None, None)
                everything = (hidden, teacher_hidden, of_rows, factor.to(dtype))
                _differentiate(kind, beta, s_head, t_head, *everything, again, bounded=True)
        # rounded only when handed out, multiplied by what comes in; a float16 that cannot hold one is named here
        ctx.gradients = [
            in_range(value, like, hidden)
            for value, like in zip(
                (gradients.hidden, gradients.weight, gradients.bias), (hidden, weight, bias), strict=True
            )
        ]
        ctx.dtypes = [None if like is None else like.dtype for like in (hidden, weight, bias)]
        normaliser = of_rows["s_log"] + of_rows["t_log"]
        divergence = of_rows[kind]
        statistics = [of_rows[name] for name in fields]
        ctx.mark_non_differentiable(divergence, normaliser, *statistics)
        return ((divergence * factor).sum(), divergence, normaliser, *statistics)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "the gradients of fused_divergence_loss were formed in its forward and handed out already: call it "
                "again for a second backward, or use token_scores and selected_loss."
            )
        gradients, ctx.gradients = ctx.gradients, None
        return (
            *(
                None if value is None else scaled_(value, grads[0]).to(dtype)
                for value, dtype in zip(gradients, ctx.dtypes, strict=True)
            ),
            *(None,) * 8,
        )
