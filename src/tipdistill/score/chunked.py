"""The fast path on any device: logits in tiles, one online pass for the statistics, gradients of the asked rows alone.

Logits exist one tile of [tokens, vocabulary] at a time, in float32 (float64 for float64 inputs). Each statistic is a
sum over the vocabulary relative to a running maximum, as in online softmax. No tensor of [N, V] is ever held.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..types import Head

# Stands for a logit of −∞: its square is finite and its exponential 0, so that sums stay free of NaN.
NEGATIVE = -1e18
LOG2_E = math.log2(math.e)
# A sum that meets NEGATIVE with any weight worth the name is infinite; a divergence of finite logits is far below.
INFINITE = 1e6
# Most tokens of a tile, and its elements. Tall, since both lm_heads are read once per row of tiles; on the CPU no
# larger than what stays in a core's cache, on a GPU large enough to fill it.
CPU_TILE = (512, 2**19)
GPU_TILE = (2048, 2**25)
# Bytes of logits that the fused loss holds at a time, both models together.
CPU_WORKSPACE = 39 * 2**20
GPU_WORKSPACE = 1024 * 2**20

# On a CPU torch.mm is the BLAS it was built with; oneDNN, which torch ships beside it, takes a tenth less time for a
# projection (docs/engine.md). torch offers it for float32 under this private name alone, so torch.mm is the fallback.
# Not for the gradients: it sums thousands of columns one after another, and loses a bit where the BLAS sums in blocks.
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
if ONEDNN:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _(hidden: Sequence[int], weight: Sequence[int], *rest: Any, **options: Any) -> int:
        """What FlopCounterMode counts for it: torch leaves it out."""
        return 2 * hidden[0] * hidden[1] * weight[0]


ONLINE = (
    "entropy",
    "teacher_entropy",
    "reverse_kl",
    "forward_kl",
    "gradient_norm",
    "student_logprob",
    "teacher_logprob",
)
SECOND_PASS = ("jsd", "hellinger", "signal_to_curvature")
STATISTICS = (*ONLINE, *SECOND_PASS, "s_max", "s_log", "t_max", "t_log", "s_to_mixture")


@dataclass(frozen=True)
class Projection:
    """An lm_head without its hidden states, truncated to the shared vocabulary."""

    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None
    temperature: float

    @staticmethod
    def of(head: Head, vocabulary: int, temperature: float) -> Projection:
        bias = None if head.bias is None else head.bias.detach()[:vocabulary]
        return Projection(head.weight.detach()[:vocabulary], bias, head.logit_scale, head.softcap, temperature)

    def rows(self, start: int, stop: int, hidden: Tensor) -> Tensor:
        """Rows [start, stop) of the weight, in the dtype that `hidden` is multiplied in."""
        return _operand(self.weight[start:stop], hidden)

    def logits(self, hidden: Tensor, weight: Tensor, start: int) -> Tensor:
        """Logits of the weight's `rows` from `start` on, float32 (float64); −∞ becomes NEGATIVE."""
        out = project(hidden, weight)
        if self.bias is not None:
            out.add_(self.bias[start : start + len(weight)].to(out.dtype))
        if self.softcap is None:
            if self.scale != 1.0:
                out.mul_(self.scale)
        else:
            out.mul_(self.logit_scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)
        return out.clamp_(min=NEGATIVE)

    def slope(self, logits: Tensor) -> Tensor | None:
        """∂ logits / ∂ (hidden @ weight.T) where it is no constant; `scale` is the constant part."""
        if self.softcap is None:
            return None
        # tanh = logits · temperature / softcap, and tanh' = 1 − tanh²
        return (logits * (self.temperature / self.softcap)).square_().neg_().add_(1.0)

    @property
    def scale(self) -> float:
        return self.logit_scale / self.temperature


def accumulation_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _keeps_half(hidden: Tensor) -> bool:
    """Whether matmuls run on half-precision operands with float32 results (a GPU does; a CPU converts first)."""
    return hidden.is_cuda and hidden.dtype in (torch.float16, torch.bfloat16)


def _operand(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.to(like.dtype if _keeps_half(like) else accumulation_dtype(like))


def project(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden @ weight.T in float32 (float64 for float64)."""
    if _keeps_half(hidden):
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    if ONEDNN and hidden.dtype == torch.float32 and not hidden.is_cuda:
        return torch.ops.mkldnn._linear_pointwise(hidden, weight, None, "none", [], "")
    return torch.mm(hidden, weight.t())


def _accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in total's dtype."""
    if right.dtype == total.dtype:
        total.addmm_(left, right)
    else:  # half-precision operands, float32 total
        total.add_(torch.mm(left.to(right.dtype), right, out_dtype=torch.float32))


def _exponential(value: Tensor, out: Tensor) -> Tensor:
    """exp; on a CPU a product and the exponential of base 2 take half its time or less, at the same accuracy."""
    if value.is_cuda or value.dtype != torch.float32:
        return torch.exp(value, out=out)
    return torch.mul(value, LOG2_E, out=out).exp2_()


def _products(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """Σ_j left · right of each row, without memory of its own: torch's vecdot maps a tile for every call."""
    return torch.mul(left, right, out=out).sum(1)


def _like(tile: Tensor, memory: Tensor) -> Tensor:
    """A tensor of a tile's shape in memory that is there."""
    return memory[: tile.numel()].view(tile.shape)


def _spans(size: int, step: int) -> Iterator[tuple[int, int]]:
    for start in range(0, size, step):
        yield start, min(start + step, size)


def _tile_shape(hidden: Tensor, vocabulary: int) -> tuple[int, int]:
    tokens, elements = GPU_TILE if hidden.is_cuda else CPU_TILE
    tokens = _even(len(hidden), tokens)
    columns = elements // tokens
    # rows that begin on a cache line
    return tokens, min(columns - columns % 64 if columns > 64 else columns, vocabulary)


def _even(size: int, most: int) -> int:
    """The step that covers `size` in as few steps as `most` does, of nearly equal length."""
    return max(1, math.ceil(size / max(1, math.ceil(size / most))))


class Online:
    """Running sums of R rows over the vocabulary, relative to running maxima.

    With a = z_S − max z_S, b = z_T − max z_T, d = a − b, p = exp a, q = exp b, the sums are Σp, Σpa, Σpd, Σq, Σqb, Σqd
    and Σp², Σp²d, Σp²d². When a maximum rises, every sum is moved to the new reference in closed form.
    """

    def __init__(self, rows: int, fields: Sequence[str], teacher: bool, like: Tensor) -> None:
        def zeros() -> Tensor:
            return torch.zeros(rows, dtype=accumulation_dtype(like), device=like.device)

        self.fields = frozenset(fields)
        self.teacher = teacher
        self.first = True
        self.s_max, self.t_max = zeros(), zeros()
        self.p, self.pa, self.pd = zeros(), zeros(), zeros()
        self.q, self.qb, self.qd = zeros(), zeros(), zeros()
        self.pp, self.ppd, self.ppdd = zeros(), zeros(), zeros()
        self.s_token, self.t_token = zeros(), zeros()

    def update(self, s: Tensor, t: Tensor | None, a: Tensor, b: Tensor, scratch: Tensor) -> None:
        """Take one tile of logits [R, C]; `a` (may be s) ends as p, `b` (may be t) as d, relative to the new maxima."""
        s_max = s.amax(1)
        t_max = s_max if t is None else t.amax(1)
        if not self.first:
            s_max, t_max = torch.maximum(s_max, self.s_max), torch.maximum(t_max, self.t_max)
            self._move(self.s_max - s_max, self.t_max - t_max)
        self.s_max, self.t_max, self.first = s_max, t_max, False

        torch.sub(s, s_max[:, None], out=a)
        if t is not None:
            torch.sub(t, t_max[:, None], out=b)
            q = _exponential(b, out=scratch)
            self.q += q.sum(1)
            if "teacher_entropy" in self.fields:
                self.qb += torch.linalg.vecdot(q, b)
            d = torch.sub(a, b, out=b)
            if "forward_kl" in self.fields:
                self.qd += _products(q, d, out=scratch)
        if "entropy" in self.fields:
            p = _exponential(a, out=scratch)
            self.pa += _products(p, a, out=a)
            a.copy_(p)
        p = a if "entropy" in self.fields else _exponential(a, out=a)
        self.p += p.sum(1)
        if t is None:
            return
        if "reverse_kl" in self.fields or "gradient_norm" in self.fields:
            self.pd += _products(p, d, out=scratch)
        if "gradient_norm" in self.fields:
            squared = torch.square(p, out=scratch)
            self.pp += squared.sum(1)
            self.ppd += torch.linalg.vecdot(squared, d)
            self.ppdd += torch.linalg.vecdot(squared.mul_(d), d)

    def take_tokens(self, s: Tensor, t: Tensor | None, token_ids: Tensor, start: int, stop: int) -> None:
        """Remember the logits of the sampled tokens that lie in the columns [start, stop)."""
        column = token_ids - start
        inside = (column >= 0) & (column < stop - start)
        column = column.clamp(0, stop - start - 1)[:, None]
        self.s_token = torch.where(inside, s.gather(1, column)[:, 0], self.s_token)
        if t is not None:
            self.t_token = torch.where(inside, t.gather(1, column)[:, 0], self.t_token)

    def _move(self, s_shift: Tensor, t_shift: Tensor) -> None:
        s_factor, shift = s_shift.exp(), s_shift - t_shift
        if "gradient_norm" in self.fields:
            squared = s_factor.square()
            self.ppdd = squared * (self.ppdd + 2 * shift * self.ppd + shift.square() * self.pp)
            self.ppd = squared * (self.ppd + shift * self.pp)
            self.pp = squared * self.pp
        self.pa = s_factor * (self.pa + s_shift * self.p)
        self.pd = s_factor * (self.pd + shift * self.p)
        self.p = s_factor * self.p
        if self.teacher:
            t_factor = t_shift.exp()
            self.qb = t_factor * (self.qb + t_shift * self.q)
            self.qd = t_factor * (self.qd + shift * self.q)
            self.q = t_factor * self.q

    def finish(self) -> dict[str, Tensor]:
        """Log-normalisers (as maximum and log-sum, apart so that large logits lose nothing) and the statistics."""
        # A row whose logits are all −∞ is no distribution.
        s_log = self.p.log().masked_fill(self.s_max <= NEGATIVE, math.nan)
        found = {"s_max": self.s_max, "s_log": s_log}
        found["entropy"] = s_log - self.pa / self.p
        found["student_logprob"] = _minus_infinite_below(self.s_token - self.s_max - s_log)
        if self.teacher:
            t_log = self.q.log().masked_fill(self.t_max <= NEGATIVE, math.nan)
            mean_d = self.pd / self.p
            reverse_kl = -_minus_infinite_below(s_log - t_log - mean_d).clamp(max=0)
            square = self.ppdd - 2 * mean_d * self.ppd + mean_d.square() * self.pp
            gradient_norm = square.clamp(min=0).sqrt() / self.p
            found |= {
                "t_max": self.t_max,
                "t_log": t_log,
                "reverse_kl": reverse_kl,
                "forward_kl": -_minus_infinite_below(t_log - s_log + self.qd / self.q).clamp(max=0),
                "teacher_entropy": t_log - self.qb / self.q,
                "gradient_norm": torch.where(reverse_kl.isinf(), math.inf, gradient_norm),
                "teacher_logprob": _minus_infinite_below(self.t_token - self.t_max - t_log),
            }
        # a sum that was not asked for was never taken
        return {name: value for name, value in found.items() if name in self.fields or name not in ONLINE}


def _minus_infinite_below(value: Tensor) -> Tensor:
    return torch.where(value < -INFINITE, -math.inf, value)


def _log_probabilities(s: Tensor, t: Tensor, found: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    log_s = (s - found["s_max"][:, None]).sub_(found["s_log"][:, None])
    log_t = (t - found["t_max"][:, None]).sub_(found["t_log"][:, None])
    return log_s, log_t


class SecondPass:
    """Sums that need the normalisers first: they are differences of nearly equal numbers otherwise."""

    def __init__(self, found: dict[str, Tensor], fields: Sequence[str], beta: float) -> None:
        self.found, self.fields, self.beta = found, frozenset(fields), beta
        zeros = torch.zeros_like(found["s_log"])
        self.s_to_mixture, self.t_to_mixture, self.root = zeros.clone(), zeros.clone(), zeros.clone()
        self.gg, self.sgg, self.sg = zeros.clone(), zeros.clone(), zeros.clone()

    def update(self, s: Tensor, t: Tensor) -> None:
        log_s, log_t = _log_probabilities(s, t, self.found)
        if "jsd" in self.fields:
            log_m = torch.logaddexp(log_s + math.log(1 - self.beta), log_t + math.log(self.beta))
            self.s_to_mixture += torch.linalg.vecdot(log_s.exp(), log_s - log_m)
            self.t_to_mixture += torch.linalg.vecdot(log_t.exp(), log_t - log_m)
        if "hellinger" in self.fields:
            self.root += (log_s.mul(0.5).exp_() - log_t.mul(0.5).exp_()).square_().sum(1)
        if "signal_to_curvature" in self.fields:
            p = log_s.exp()
            g = p - log_t.exp()
            self.gg += torch.linalg.vecdot(g, g)
            self.sg += torch.linalg.vecdot(p, g)
            self.sgg += torch.linalg.vecdot(p.mul_(g), g)

    def finish(self) -> dict[str, Tensor]:
        found = {}
        if "jsd" in self.fields:
            found["s_to_mixture"] = self.s_to_mixture
            found["jsd"] = (1 - self.beta) * self.s_to_mixture + self.beta * self.t_to_mixture
            found["jsd"].clamp_(min=0)
        if "hellinger" in self.fields:
            found["hellinger"] = (self.root / 2).sqrt()
        if "signal_to_curvature" in self.fields:
            curvature = self.sgg - self.sg.square()
            found["signal_to_curvature"] = torch.where(curvature > 0, self.gg / curvature, 0.0)
        return found


def _gradient_tile(
    kind: str, beta: float, s: Tensor, t: Tensor, found: dict[str, Tensor], weight: Tensor, student: Projection
) -> Tensor:
    """weight · ∂D/∂(hidden @ weight.T) of one tile of logits [R, C], in place: overwrites s and t.

    reverse_kl: p (log p/q − KL) · forward_kl: p − q · jsd: (1 − β) p (log p/m − KL(p‖m))
    """
    slope = student.slope(s)
    log_s = s.sub_(found["s_max"][:, None]).sub_(found["s_log"][:, None])
    log_t = t.sub_(found["t_max"][:, None]).sub_(found["t_log"][:, None])
    if kind == "forward_kl":
        gradient = log_s.exp_().sub_(log_t.exp_())
    else:
        if kind == "reverse_kl":
            target, mean = log_t, found["reverse_kl"]
        else:
            target = torch.logaddexp(log_s + math.log(1 - beta), log_t + math.log(beta), out=log_t)
            mean, weight = found["s_to_mixture"], weight * (1 - beta)
        ratio = torch.sub(log_s, target, out=t).sub_(mean[:, None])
        gradient = log_s.exp_().mul_(ratio)
    gradient.mul_((weight * student.scale)[:, None])
    return gradient if slope is None else gradient.mul_(slope)


def _held_gradient_tile(
    p: Tensor,
    d: Tensor,
    s_max: Tensor,
    t_max: Tensor,
    found: dict[str, Tensor],
    weight: Tensor,
    student: Projection,
    out: Tensor,
) -> Tensor:
    """The reverse_kl of `_gradient_tile` from what `Online.update` left, relative to the maxima it then had."""
    log_p = s_max - found["s_max"] - found["s_log"]
    log_q = t_max - found["t_max"] - found["t_log"]
    mean = found["reverse_kl"] - (log_p - log_q)
    return torch.sub(d, mean[:, None], out=out).mul_(p).mul_((weight * student.scale * log_p.exp())[:, None])


@dataclass
class Gradients:
    """Where the gradients of one backward accumulate, float32 (or float64); None for what needs none."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @staticmethod
    def zeros(hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool]) -> Gradients:
        dtype = accumulation_dtype(hidden)

        def zeros(like: Tensor | None, need: bool) -> Tensor | None:
            if like is None or not need:
                return None
            return torch.zeros(like.shape, dtype=dtype, device=like.device)

        return Gradients(zeros(hidden, needs[0]), zeros(weight, needs[1]), zeros(bias, needs[2]))

    def add(self, gradient: Tensor, hidden: Tensor, weight: Tensor, row: int, start: int) -> None:
        """Add the products of one tile: rows from `row`, vocabulary from `start`."""
        rows, columns = gradient.shape
        if self.hidden is not None:
            _accumulate(self.hidden[row : row + rows], gradient, weight)
        if self.weight is not None:
            _accumulate(self.weight[start : start + columns], gradient.t(), hidden)
        if self.bias is not None:
            self.bias[start : start + columns] += gradient.sum(0)


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
        found = online.finish()
        if second:
            further = SecondPass(found, second, beta)
            for start, stop in _spans(vocabulary, columns):
                s, t = logits(start, stop)
                assert t is not None, "the second pass compares with a teacher"
                further.update(s, t)
            found |= further.finish()
        pieces.append(found)
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
        found: dict[str, Tensor],
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, teacher_hidden)
        ctx.kind, ctx.beta, ctx.heads, ctx.found = kind, beta, (s_head, t_head), found
        return found[kind].clone()  # a tensor of its own: the statistic of the same name carries no gradient

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        hidden, weight, bias, teacher_hidden = ctx.saved_tensors
        s_head, t_head = ctx.heads
        dtype = accumulation_dtype(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            index = grad.nonzero()[:, 0]
            kept = Gradients.zeros(hidden[index], weight, bias, ctx.needs_input_grad[:3])
            found = {
                name: ctx.found[name][index].to(dtype)
                for name in ("s_max", "s_log", "t_max", "t_log", "reverse_kl", "s_to_mixture")
                if name in ctx.found
            }
            vocabulary = len(s_head.weight)
            tokens, columns = _tile_shape(index, vocabulary)
            for row, end in _spans(len(index), tokens):
                s_hidden = _operand(hidden[index[row:end]], hidden)
                t_hidden = _operand(teacher_hidden[index[row:end]], teacher_hidden).to(s_hidden)
                piece = {name: value[row:end] for name, value in found.items()}
                factor = grad[index[row:end]].to(dtype)
                for start, stop in _spans(vocabulary, columns):
                    s_rows = s_head.rows(start, stop, s_hidden)
                    s = s_head.logits(s_hidden, s_rows, start)
                    t = t_head.logits(t_hidden, t_head.rows(start, stop, t_hidden), start)
                    gradient = _gradient_tile(ctx.kind, ctx.beta, s, t, piece, factor, s_head)
                    kept.add(gradient, s_hidden, s_rows, row, start)
                    del s, t, gradient  # their memory is the next tile's
            grad_hidden = None
            if kept.hidden is not None:
                grad_hidden = torch.zeros_like(hidden)
                grad_hidden[index] = kept.hidden.to(hidden.dtype)
        return (
            grad_hidden,
            None if kept.weight is None else kept.weight.to(weight.dtype),
            None if kept.bias is None else kept.bias.to(bias.dtype),
            *(None,) * 6,
        )


@dataclass
class _Rows:
    """Rows of the fused loss whose logits are held."""

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
    """Rows that are held at a time, how many of them in the memory of the lm_head's gradient, and a tile's columns.

    That gradient, [V, H], is nothing until the first rows are differentiated, and what is held of R rows takes 2·R·V.
    """
    cuda = hidden.is_cuda
    held = 2 * vocabulary * accumulation_dtype(hidden).itemsize
    most = max(1, (GPU_WORKSPACE if cuda else CPU_WORKSPACE) // held)
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
        needs = [bool(need) for need in ctx.needs_input_grad[:3]]
        dtype = accumulation_dtype(hidden)
        vocabulary = len(s_head.weight)
        kept = Gradients.zeros(hidden, weight, bias, needs)
        wanted = {kind, "reverse_kl", *fields}  # whose gradient needs its value; the sum is nearly free
        second = [name for name in SECOND_PASS if name in wanted]
        # The probabilities and ratios that the sums are taken over give this gradient in three passes more; the other
        # divergences, the second pass and a softcap's slope need the logits themselves.
        in_place = kind == "reverse_kl" and not second and s_head.softcap is None
        spans, lent, columns = _fused_spans(hidden, vocabulary, kept.weight if in_place else None)
        most = max((stop - start for start, stop in spans), default=0)
        held: dict[int, tuple[Tensor, Tensor]] = {}
        maxima: dict[int, tuple[Tensor, Tensor]] = {}
        scratch = [torch.empty(most * columns, dtype=dtype, device=hidden.device) for _ in range(1 if in_place else 3)]
        pieces: list[dict[str, Tensor]] = []
        scored: _Rows | None = None
        with torch.autocast(hidden.device.type, enabled=False):
            # One sweep over the vocabulary forms the gradients of the rows scored before and, in the place of their
            # logits, projects the next: a tile of the lm_head is fetched once for both.
            sweeps: list[tuple[int, int] | None] = [*spans]
            for span in (*sweeps, None) if any(needs) else sweeps:
                rows = None if span is None else _Rows.of(span, hidden, teacher_hidden, factor, tuple(wanted))
                for start, stop in _spans(vocabulary, columns):
                    s_rows = s_head.rows(start, stop, hidden)
                    if scored is not None and any(needs):
                        a, b = held.pop(start)
                        if in_place:
                            gradient = _like(a, scratch[0])
                            _held_gradient_tile(
                                a, b, *maxima.pop(start), pieces[-1], scored.factor, s_head, out=gradient
                            )
                            if scored.first < lent and kept.weight is not None:
                                kept.weight[start:stop] = 0
                        else:
                            gradient = _gradient_tile(kind, beta, a, b, pieces[-1], scored.factor, s_head)
                        kept.add(gradient, scored.s_hidden, s_rows, scored.first, start)
                        del a, b, gradient  # their memory is the next tile's
                    if rows is not None:
                        s = s_head.logits(rows.s_hidden, s_rows, start)
                        t = t_head.logits(rows.t_hidden, t_head.rows(start, stop, rows.t_hidden), start)
                        if token_ids is not None:
                            rows.online.take_tokens(s, t, token_ids[rows.first :][: len(s)], start, stop)
                        free, *memory = scratch
                        if rows.first < lent and kept.weight is not None:
                            memory = list(kept.weight[start:stop].view(-1).chunk(2))
                        a, b = (_like(s, part) for part in memory) if memory else (s, t)
                        rows.online.update(s, t, a, b, _like(s, free))
                        held[start] = (a, b) if in_place else (s, t)
                        if in_place:
                            maxima[start] = rows.online.s_max, rows.online.t_max
                if rows is not None:
                    found = rows.online.finish()
                    if second:
                        further = SecondPass(found, second, beta)
                        for s, t in held.values():
                            further.update(s, t)
                        found |= further.finish()
                    pieces.append(found)
                scored = rows
        if pieces:
            found = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
        else:  # a rank without a kept token: a loss of 0 that still reaches the graph
            found = dict.fromkeys(STATISTICS, torch.zeros(0, dtype=dtype, device=hidden.device))
        # the hidden states' is rounded only when handed out: for want of range, float16 is scaled in the backward
        ctx.gradients = [
            None if value is None or like is None else value.to(like.dtype)
            for value, like in ((kept.weight, weight), (kept.bias, bias))
        ]
        ctx.gradients.insert(0, kept.hidden)
        ctx.dtype = hidden.dtype
        normaliser = found["s_log"] + found["t_log"]
        divergence = found[kind]
        statistics = [found[name] for name in fields]
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
        of_hidden, *rest = (None if value is None else value.mul_(grads[0].to(value.dtype)) for value in gradients)
        return (None if of_hidden is None else of_hidden.to(ctx.dtype), *rest, *(None,) * 8)
