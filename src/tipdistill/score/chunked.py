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
`FusedLoss` is given rows that all have one, or chooses among those that it has just scored, and differentiates before
the logits are gone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..types import Head
from .checks import in_range, rounded, scaled_
from .sums import OF_GRADIENT, SECOND_PASS, STATISTICS, Online, SecondPass
from .tiles import (
    Choose,
    Gradients,
    Projection,
    _even,
    _like,
    _operand,
    _spans,
    accumulation_dtype,
    packed,
    without_infinities,
)

# Most tokens of a tile, and its elements. Tall, since both lm_heads are read once per row of tiles; on the CPU no
# larger than what stays in a core's cache, on a GPU large enough to fill it.
CPU_TILE = (512, 2**19)
GPU_TILE = (2048, 2**25)
# Bytes of logits that the fused loss holds at a time, both models together.
CPU_WORKSPACE = 39 * 2**20
GPU_WORKSPACE = 1024 * 2**20
# The same where rows are chosen in it: a rollout's at once, and no more than that of a short one. Longer rollouts are
# scored first, and what is kept of them is projected again.
CPU_CHOICE = 256 * 2**20
# A product of few rows costs a pass over the lm_head and its gradient all the same, so chosen rows wait for so many.
CHOSEN_ROWS = 64


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
    online: Online
    factor: Tensor | None = None  # of what is differentiated: all of them, or those in `kept`
    of_rows: dict[str, Tensor] = field(default_factory=dict)  # the same
    kept: Tensor | None = None
    place: int = 0  # in the hidden states' gradient

    @staticmethod
    def of(span: tuple[int, int], hidden: Tensor, teacher_hidden: Tensor, fields: Sequence[str]) -> _Rows:
        s_hidden = _operand(hidden[slice(*span)], hidden)
        t_hidden = _operand(teacher_hidden[slice(*span)], teacher_hidden).to(s_hidden)
        return _Rows(span[0], s_hidden, t_hidden, Online(len(s_hidden), fields, True, hidden))

    def scored(self, of_rows: dict[str, Tensor], factor: Tensor, chosen: bool, place: int) -> _Rows:
        """Themselves with the factors of their gradient; where they are `chosen`, without those whose factor is 0."""
        of_gradient = {name: value for name, value in of_rows.items() if name in OF_GRADIENT}
        if not chosen:
            return replace(self, factor=factor, of_rows=of_gradient, place=self.first)
        kept = factor.nonzero()[:, 0]
        of_gradient = {name: value[kept] for name, value in of_gradient.items()}
        return replace(
            self, s_hidden=self.s_hidden[kept], factor=factor[kept], of_rows=of_gradient, kept=kept, place=place
        )


def choice_rows(hidden: Tensor, vocabulary: int) -> int:
    """Most rows of a group that `FusedLoss` chooses among.

    Args:
        hidden: [N, H], the student's.
        vocabulary: V.
    """
    workspace = GPU_WORKSPACE if hidden.is_cuda else CPU_CHOICE
    return workspace // (2 * vocabulary * accumulation_dtype(hidden).itemsize)


def _fused_spans(
    hidden: Tensor, vocabulary: int, lender: Tensor | None, lengths: Sequence[int] | None = None
) -> tuple[list[tuple[int, int]], int, int]:
    """Rows in flight at a time, how many of them in the memory of the lm_head's gradient, and a tile's columns.

    That gradient, [V, H], is nothing until the first rows are differentiated, and the tiles of R rows take 2·R·V. With
    `lengths` of groups, no group is divided.
    """
    cuda = hidden.is_cuda
    bytes_of_row = 2 * vocabulary * accumulation_dtype(hidden).itemsize
    most = max(1, (GPU_WORKSPACE if cuda else CPU_WORKSPACE) // bytes_of_row)
    lent = 0 if lender is None else min(len(hidden), lender.shape[1] // 2, (GPU_TILE if cuda else CPU_TILE)[0])
    if lengths is not None:
        most = max([most, *lengths])
        ends = list(accumulate(lengths))
        lent = max((end for end in ends if end <= lent), default=0)
    if lent < min(most, len(hidden)):
        lent = 0
    if lengths is None:
        rows = _even(len(hidden) - lent, most)
        spans = [(lent + start, lent + stop) for start, stop in _spans(len(hidden) - lent, rows)]
    else:
        behind = [length for length, end in zip(lengths, ends, strict=True) if end > lent]
        spans = [(lent + start, lent + stop) for start, stop in packed(behind, most)]
        rows = max((stop - start for start, stop in spans), default=1)
    columns = _tile_shape(hidden[: max(rows, lent // 2)], vocabulary)[1]
    return [(0, lent), *spans] if lent else spans, lent, columns


class FusedLoss(torch.autograd.Function):
    """Σ factor · divergence over rows that are projected once, the gradient formed on the spot.

    `factor` is a tensor [N] of rows that are all wanted; or, with the `lengths` of groups, a function that is given the
    statistics of the groups in rows [first, end) and gives their factors, 0 for those that are not wanted.
    """

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
        #
        # Where rows are chosen, a group is one or more rollouts. Its statistics are complete before its first tile is
        # differentiated, so what is chosen is known by then, and the other rows of its tiles are passed over. The
        # gradients of the chosen rows' hidden states lie one after another until the end.
        needs = [bool(need) for need in ctx.needs_input_grad[:3]]
        dtype = accumulation_dtype(hidden)
        vocabulary = len(s_head.weight)
        gradients = Gradients.zeros(hidden, weight, bias, needs)
        wanted = {kind, "reverse_kl", *fields}  # whose gradient needs its value; the sum is nearly free
        second = [name for name in SECOND_PASS if name in wanted]
        # The probabilities and ratios that the sums are taken over give this gradient in three passes more; the other
        # divergences, the second pass and a softcap's slope need the logits themselves.
        in_place = kind == "reverse_kl" and not second and s_head.softcap is None
        spans, lent, columns = _fused_spans(hidden, vocabulary, gradients.weight if in_place else None, lengths)
        most = max((stop - start for start, stop in spans), default=0)
        # by the tile's first column: (p, log p/q) where in_place, relative to the maxima beside them, else (s, t)
        tiles: dict[int, tuple[Tensor, Tensor]] = {}
        maxima: dict[int, tuple[Tensor, Tensor]] = {}
        scratch = [torch.empty(most * columns, dtype=dtype, device=hidden.device) for _ in range(1 if in_place else 3)]
        pieces: list[dict[str, Tensor]] = []
        factors: list[Tensor] = []
        chosen: list[Tensor] = []  # the rows, where they are chosen
        scored: _Rows | None = None
        # chosen rows whose gradients have been formed, by the tile's first column, and not been added yet
        waiting: list[_Rows] = []
        formed: dict[int, Tensor] = {}
        with torch.autocast(hidden.device.type, enabled=False):
            sweeps: list[tuple[int, int] | None] = [*spans]
            for span in (*sweeps, None) if any(needs) else sweeps:
                rows = None if span is None else _Rows.of(span, hidden, teacher_hidden, tuple(wanted))
                if scored is not None:
                    waiting.append(scored)
                of_waiting = [group.s_hidden for group in waiting]
                adds = not callable(factor) or span is None or sum(map(len, of_waiting)) >= CHOSEN_ROWS
                s_hidden = torch.cat(of_waiting) if adds and waiting else None
                for start, stop in _spans(vocabulary, columns):
                    s_rows = s_head.rows(start, stop, hidden)
                    # differentiate the tile of the group before
                    if scored is not None and any(needs):
                        assert scored.factor is not None
                        a, b = tiles.pop(start)
                        if scored.kept is not None:
                            a, b = a.index_select(0, scored.kept), b.index_select(0, scored.kept)
                        if in_place:
                            s_max, t_max = maxima.pop(start)
                            if scored.kept is not None:
                                s_max, t_max = s_max[scored.kept], t_max[scored.kept]
                            gradient = _like(a, scratch[0])
                            _gradient_of_ratios(a, b, s_max, t_max, scored.of_rows, scored.factor, s_head, out=gradient)
                            if scored.first < lent and gradients.weight is not None:
                                gradients.weight[start:stop] = 0  # the tile lay there; now it is a gradient again
                        else:
                            gradient = _gradient_tile(kind, beta, a, b, scored.of_rows, scored.factor, s_head)
                        if len(waiting) > 1:
                            gradient = torch.cat([formed.pop(start), gradient])
                        if s_hidden is not None:
                            gradients.add(gradient, s_hidden, s_rows, waiting[0].place, start)
                        else:
                            formed[start] = gradient.clone() if in_place and len(waiting) == 1 else gradient
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
                if adds:
                    waiting = []
                # all columns were seen: the sums of the group become its normalisers and statistics
                if rows is not None:
                    of_rows = rows.online.finish()
                    if second:
                        further = SecondPass(of_rows, second, beta)
                        for s, t in tiles.values():
                            further.update(s, t)
                        of_rows |= further.finish()
                    pieces.append(of_rows)
                    assert span is not None
                    given = factor(of_rows, *span) if callable(factor) else factor[slice(*span)]
                    factors.append(given.to(dtype))
                    rows = rows.scored(of_rows, factors[-1], callable(factor), sum(map(len, chosen)))
                    if rows.kept is not None:
                        chosen.append(span[0] + rows.kept)
                scored = rows
            nothing = torch.zeros(0, dtype=dtype, device=hidden.device)
            if pieces:
                of_rows = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
            else:  # a rank without a kept token: a loss of 0 that still reaches the graph
                of_rows = dict.fromkeys(STATISTICS, nothing)
            factors_of_all = torch.cat(factors) if factors else nothing
            everything = (hidden, teacher_hidden, of_rows, factors_of_all)
            index = None
            if callable(factor):
                index = torch.cat(chosen) if chosen else nothing.long()
                of_chosen = {name: value[index] for name, value in of_rows.items() if name in OF_GRADIENT}
                everything = (hidden[index], teacher_hidden[index], of_chosen, factors_of_all[index])
            if gradients.hidden is not None:
                gradients.hidden = gradients.hidden[: len(everything[0])]
                if not bool(gradients.hidden.isfinite().all()):
                    gradients.hidden.zero_()
                    again = Gradients(gradients.hidden, None, None)
                    _differentiate(kind, beta, s_head, t_head, *everything, again, bounded=True)
                if index is not None:
                    gradients.hidden = torch.zeros_like(hidden, dtype=dtype).index_copy_(0, index, gradients.hidden)
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
        # an infinite divergence of a row that is not wanted must not turn the sum into NaN
        weighed = divergence * factors_of_all if index is None else divergence[index] * factors_of_all[index]
        return (weighed.sum(), divergence, normaliser, *statistics)

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
            *(None,) * 9,
        )
