"""Every implementation, every statistic and every gradient, on random heads: against float64, within one table.

The truth is written here, in float64 and token by token, from the very numbers that the implementations are given; it
shares no code with them. `TIPDISTILL_CASES=20000 pytest tests/score/test_every_head.py` tries that many heads.
"""

import math
import os
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from unittest.mock import patch

import pytest
import torch
from heads import FIELDS
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import tipdistill as tip
from tipdistill import Head, Selection
from tipdistill.loss import fused_selected_loss
from tipdistill.score import NonFiniteLogitsError, chunked

try:
    from tipdistill.score import triton as kernels
except ImportError:  # triton is built for Linux
    kernels = None

# the interpreter is numpy, which warns where a GPU does not: of lanes that are masked
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

CASES = int(os.environ.get("TIPDISTILL_CASES", "60"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOAT16_STEP = 2.0**-24  # the distance of float16's smallest numbers

# How far a result may be from the truth, each in roundings (half the distance of two neighbours) of
#     "values"    float32 (float64 for float64 heads), in which every statistic and every logit is computed
#     "at logits" the dtype: of the gradient at the logits, before it meets the lm_head and the hidden states
#     "result"    the dtype: of the gradient that is handed out
#     "held"      float16: of the larger logit of a pair and of their difference, relative to the maxima so far, in
#                 which a kernel keeps the logits of half-precision heads for a second look
TOLERANCES = {
    # A sum over 300 columns and 12 hidden dimensions, in an order of its own, with a handful of roundings a term.
    torch.float64: {"values": 32, "at logits": 32, "result": 2, "held": 0},
    torch.float32: {"values": 32, "at logits": 32, "result": 2, "held": 0},
    # "at logits": tensor cores take half precision alone, so a kernel rounds there once; it also makes up for two
    # models whose difference is rounded. "result": rounded when formed and when multiplied by the incoming scale.
    torch.bfloat16: {"values": 32, "at logits": 1, "result": 2, "held": 1},
    torch.float16: {"values": 32, "at logits": 1, "result": 2, "held": 1},
}


@dataclass(frozen=True)
class Case:
    """Numbers that make two heads, weights and token ids; hypothesis prints one when it fails."""

    seed: int
    dtype: torch.dtype
    teacher_dtype: torch.dtype | None  # None: the student's
    rows: int
    vocabularies: tuple[int, int]
    widths: tuple[int, int]
    spread: float  # of the logits
    teacher: str  # independent, near the student, or equal
    biases: tuple[bool, bool]
    forbidden: str  # whose bias has entries of −∞
    ties: bool
    layouts: tuple[str, str, str, str]  # of hidden states, weights, biases and token ids
    logit_scale: float
    softcap: float | None
    temperature: float
    beta: float
    divergence: str
    small_tiles: bool
    lengths: tuple[int, ...]  # of groups that are chosen from, each without the others


LAYOUTS = st.sampled_from(["plain", "strided", "transposed", "sliced", "expanded"])
HALVES = (torch.bfloat16, torch.float16)


@st.composite
def cases(draw):

    def one_of(*values):
        return draw(st.sampled_from(values))

    shared = draw(st.integers(2, 300))
    padding = one_of((0, 0), (0, 0), (draw(st.integers(1, 70)), 0), (0, draw(st.integers(1, 70))))
    dtype = one_of(torch.float32, torch.bfloat16, torch.float16, torch.float64)
    lengths = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    return Case(
        seed=draw(st.integers(0, 2**31)),
        dtype=dtype,
        teacher_dtype=one_of(None, None, None, torch.float32, torch.bfloat16),
        rows=sum(lengths),
        vocabularies=(shared + padding[0], shared + padding[1]),
        widths=(draw(st.integers(1, 12)), draw(st.integers(1, 12))),
        spread=one_of(0.1, 1.0, 3.0, 30.0, 300.0),
        teacher=one_of("independent", "near", "equal"),
        biases=(draw(st.booleans()), draw(st.booleans())),
        forbidden=one_of("nobody", "nobody", "both", "student", "teacher", "each"),
        ties=draw(st.booleans()),
        layouts=(draw(LAYOUTS), draw(LAYOUTS), draw(LAYOUTS), draw(LAYOUTS)),
        logit_scale=one_of(1.0, 1.0, 0.37, 1.3),
        softcap=one_of(None, None, 3.0, 30.0),
        temperature=one_of(1.0, 0.3, 2.0),
        beta=one_of(0.5, 0.1, 0.9),
        divergence=one_of("reverse_kl", "forward_kl", "jsd"),
        small_tiles=draw(st.booleans()),
        lengths=lengths,
    )


def laid_out(tensor, layout):
    """The tensor as a view of another memory; "expanded" repeats its first row."""
    if layout == "expanded" and len(tensor):
        return tensor[:1].expand(tensor.shape)
    if layout == "transposed" and tensor.ndim == 2:
        return tensor.t().contiguous().t()
    if layout == "strided":
        around = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), 77)
        around[..., ::2] = tensor
        return around[..., ::2]
    if layout == "sliced":
        around = tensor.new_full((len(tensor) + 3, *tensor.shape[1:]), 77)
        around[2:-1] = tensor
        return around[2:-1]
    return tensor


def heads_of(case):
    """(student, teacher, token ids, weights ≥ 0) of a case."""
    generator = torch.Generator().manual_seed(case.seed)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    shared = min(case.vocabularies)
    forbidden = torch.randint(0, shared, (2, 3), generator=generator)
    forbidden = {
        "nobody": (forbidden[0][:0], forbidden[0][:0]),
        "both": (forbidden[0], forbidden[0]),
        "student": (forbidden[0], forbidden[0][:0]),
        "teacher": (forbidden[0][:0], forbidden[0]),
        "each": (forbidden[0], forbidden[1]),
    }[case.forbidden]
    heads = []
    for index, (rows, width) in enumerate(zip(case.vocabularies, case.widths, strict=True)):
        dtype = case.dtype if index == 0 or case.teacher_dtype is None else case.teacher_dtype
        size = case.spread**0.5
        hidden, weight, bias = draw(case.rows, width) * size, draw(rows, width) * size / width**0.5, draw(rows)
        if index and case.teacher != "independent" and case.teacher_dtype is None:
            noise = {"near": 0.03, "equal": 0.0}[case.teacher]
            student = heads[0]
            hidden = student.hidden.double() + noise * draw(*student.hidden.shape)
            weight = torch.cat([student.weight.double()[:shared], draw(max(0, rows - shared), hidden.shape[1])])
        if case.ties:
            weight[1::2] = weight[0]
            bias = bias.round()
        if len(forbidden[index]) < shared - 1:  # something must be left to say
            bias[forbidden[index]] = -math.inf
        heads.append(
            Head(
                laid_out(hidden.to(dtype).to(DEVICE), case.layouts[0]),
                laid_out(weight.to(dtype).to(DEVICE), case.layouts[1]),
                laid_out(bias.to(dtype).to(DEVICE), case.layouts[2]) if case.biases[index] else None,
                case.logit_scale,
                case.softcap,
            )
        )
    if any(head.bias is not None and bool((head.bias == -math.inf).all()) for head in heads):
        heads = [replace(head, bias=None) for head in heads]
    token_ids = laid_out(torch.randint(0, shared, (case.rows,), generator=generator).to(DEVICE), case.layouts[3])
    weights = torch.rand(case.rows, generator=generator, dtype=torch.float64)
    weights = weights * (torch.rand(case.rows, generator=generator) < 0.7)
    return (*heads, token_ids, weights.float().to(DEVICE))


# The truth.


@dataclass
class Truth:
    """float64: statistics [N] with what one rounding of float32 at the logits may change of each, and gradients."""

    values: dict
    allowed: dict
    infinite: torch.Tensor  # bool [N], rows whose divergence is
    at_logits: torch.Tensor  # [N, V] ∂(Σ weight · D) / ∂(hidden @ weight.T)
    at_logits_allowed: torch.Tensor


def logits_of(head, vocabulary, temperature):
    z = head.hidden.double() @ head.weight.double()[:vocabulary].T
    size = head.hidden.double().abs() @ head.weight.double()[:vocabulary].abs().T
    if head.bias is not None:
        bias = head.bias.double()[:vocabulary]
        z, size = z + bias, size + bias.abs().masked_fill(bias.isinf(), 0)
    z, size = z * head.logit_scale, size * head.logit_scale
    slope = torch.full_like(z, head.logit_scale / temperature)
    if head.softcap is not None:
        slope = slope * (1 - torch.tanh(z / head.softcap) ** 2)
        z = head.softcap * torch.tanh(z / head.softcap)
    return z / temperature, slope, size.amax(1) / temperature if size.numel() else size.sum(1)


def truth_of(case, student, teacher, token_ids, weights):
    vocabulary, rows = min(case.vocabularies), case.rows
    z_s, slope, size_s = logits_of(student, vocabulary, case.temperature)
    z_t, _, size_t = logits_of(teacher, vocabulary, case.temperature)
    rounding = torch.finfo(torch.float64 if case.dtype == torch.float64 else torch.float32).eps / 2
    values = {name: torch.zeros(rows, dtype=torch.float64) for name in FIELDS}
    allowed = {name: torch.zeros(rows, dtype=torch.float64) for name in FIELDS}
    gradient, bound = torch.zeros(rows, vocabulary).double(), torch.zeros(rows, vocabulary).double()
    infinite = torch.zeros(rows, dtype=torch.bool)
    for row in range(rows):
        says_s, says_t = z_s[row] > -math.inf, z_t[row] > -math.inf
        log_p, log_q = (z[row].log_softmax(0) for z in (z_s, z_t))
        p, q = log_p.exp(), log_q.exp()
        both = says_s & says_t
        # what the roundings of a logit and of its logarithm of a probability are multiples of
        size = 1 + max(size_s[row], size_t[row], -log_p[says_s].min(), -log_q[says_t].min())
        u = rounding * size
        # probabilities below the smallest number of float32 (float64) are 0
        lost = torch.finfo(torch.float64 if case.dtype == torch.float64 else torch.float32).tiny * size
        r = torch.where(both, log_p - log_q, 0.0)
        m = torch.logaddexp(log_p + math.log(1 - case.beta), log_q + math.log(case.beta))
        to_m = torch.where(says_s, log_p - m, 0.0)
        kl = {
            "reverse_kl": (p * r).sum(),
            "forward_kl": (q * -r).sum(),
            "jsd": (1 - case.beta) * (p * to_m).sum() + case.beta * (q * torch.where(says_t, log_q - m, 0.0)).sum(),
        }
        about = {"reverse_kl": r - kl["reverse_kl"], "jsd": to_m - (p * to_m).sum()}
        scatter = {name: (p * value.abs()).sum() for name, value in about.items()}
        if bool((says_s & ~says_t).any()):
            kl["reverse_kl"] = torch.tensor(math.inf)
        if bool((says_t & ~says_s).any()):
            kl["forward_kl"] = torch.tensor(math.inf)
        h_s, h_t = (-(a[s] * b[s]).sum() for a, b, s in ((p, log_p, says_s), (q, log_q, says_t)))
        g, noise = p - q, u * (p + q)
        curvature = (p * (g - (p * g).sum()) ** 2).sum()
        norm = (p * about["reverse_kl"]).norm()

        held = of_held(case, z_s[row], z_t[row], p, q, r, to_m, about)

        def put(name, value, within, row=row, lost=lost):
            values[name][row], allowed[name][row] = value, within + lost

        put("entropy", h_s, u * (1 + (p * (torch.where(says_s, log_p, 0.0) + h_s).abs()).sum()))
        put("entropy_norm", h_s / math.log(vocabulary), allowed["entropy"][row] / math.log(vocabulary))
        put("teacher_entropy", h_t, u * (1 + (q * (torch.where(says_t, log_q, 0.0) + h_t).abs()).sum()))
        put("reverse_kl", kl["reverse_kl"], u * (1 + scatter["reverse_kl"]))
        put("forward_kl", kl["forward_kl"], u * (1 + (q * (r + (q * -r).sum()).abs()).sum()))
        put("jsd", kl["jsd"], u + held["jsd"])
        put("divergence", kl[case.divergence], allowed[case.divergence][row])
        put("hellinger", ((log_p / 2).exp() - (log_q / 2).exp()).norm() / math.sqrt(2), u + held["hellinger"])
        put(
            "gradient_norm",
            math.inf if kl["reverse_kl"].isinf() else norm,
            (u * p * (1 + about["reverse_kl"].abs() + scatter["reverse_kl"])).norm(),
        )
        put("student_logprob", log_p[token_ids[row]], u)
        put("teacher_logprob", log_q[token_ids[row]], u)
        signal = (g**2).sum()
        ratio = min(signal / curvature, torch.finfo(torch.float32).max) if curvature > 0 else math.inf
        relative = 2 * noise.norm() / g.norm() + 2 * ((p * noise**2).sum() / curvature).sqrt()
        of_g = held["forward_kl at logits"]
        roughly = 2 * of_g.norm() / g.norm() + 2 * ((p * of_g**2).sum() / curvature).sqrt()
        # and the probabilities that the curvature is a mean over
        roughly = roughly + (p * held["student's logit"] * (g - (p * g).sum()) ** 2).sum() / curvature
        # a quotient of what vanishes where both models agree: asked for where its digits are not all lost
        clear = relative < 1e-4 and roughly < 1e-3
        put("signal_to_curvature", ratio, ratio * (relative + roughly) if clear else math.inf)
        for name, (value, within) in of_likeliest(log_p, log_q, u).items():
            put(name, value, within)
        at_logits = {
            "reverse_kl": p * about["reverse_kl"],
            "forward_kl": p - q,
            "jsd": (1 - case.beta) * p * about["jsd"],
        }[case.divergence]
        if case.divergence == "forward_kl":
            within = noise
        else:
            within = u * p * (1 + about[case.divergence].abs() + scatter[case.divergence])
        within = within + held[f"{case.divergence} at logits"]
        infinite[row] = kl[case.divergence].isinf()
        gradient[row] = at_logits * slope[row]
        # a slope is 1 − tanh², which loses what tanh² is near 1
        steep = case.logit_scale / case.temperature if case.softcap is not None else 0.0
        # and follows the logit, which a held one says to float16's digits
        bend = 2 * held["student's logit"] * case.temperature / (case.softcap or math.inf)
        bound[row] = within * slope[row] + at_logits.abs() * (rounding * (slope[row] + steep) + steep * bend) + lost
    return Truth(values, allowed, infinite, gradient, bound)


def of_held(case, z_s, z_t, p, q, r, to_m, about):
    """What the roundings of held logits may change, to first order, divided as the table wants it."""
    table = TOLERANCES[case.dtype]
    rounding = torch.finfo(torch.float16).eps / 2 * table["held"] / table["values"]
    step = FLOAT16_STEP / 2 * table["held"] / table["values"]
    block = 32 if case.small_tiles else 256

    def relative(z):
        """To the maximum of all columns up to the end of its block, as it was when the block was seen; at most 0."""
        highest = torch.stack([part.max() for part in z.split(block)]).cummax(0).values
        return (z - highest.repeat_interleave(block)[: len(z)]).nan_to_num(nan=0.0).clamp(min=-65504)

    a, b = relative(z_s), relative(z_t)
    larger = rounding * torch.maximum(a, b).abs() + step
    ratio = rounding * (a - b).abs() + step
    # the smaller one is the larger one beside their difference
    of_a, of_b = larger + torch.where(a < b, ratio, 0.0), larger + torch.where(b < a, ratio, 0.0)
    of_g = (p - q).abs() * larger + torch.minimum(p, q) * ratio
    root = (p.sqrt() - q.sqrt()).abs() * larger / 2 + torch.minimum(p, q).sqrt() * ratio / 2
    to_t = torch.where(q > 0, to_m - r, 0.0).abs()
    # a gradient is what a ratio differs by from their mean: that of the likeliest token nearly is the mean
    from_mean = (1 - p) * ratio + (p * ratio).sum() - p * ratio
    of_mixture = (p * of_a * to_m.abs()).sum()
    return {
        "student's logit": of_a,
        "jsd": (p * (of_a * to_m.abs() + ratio)).sum() + (q * (of_b * to_t + ratio)).sum(),
        "hellinger": root.norm() / math.sqrt(2),
        "forward_kl at logits": of_g,
        "reverse_kl at logits": p * (of_a * about["reverse_kl"].abs() + from_mean),
        "jsd at logits": p * (of_a * about["jsd"].abs() + from_mean + of_mixture),
    }


def of_likeliest(log_p, log_q, u):
    """Values of the statistics of the likeliest tokens; any value (∞) where two tokens tie for a place."""

    def top(log, k):
        order = log.argsort(descending=True)[: int((log > -math.inf).sum())]
        clear = len(order) <= k or bool(log[order[k - 1]] - log[order[k]] > 100 * u)
        return set(order[:k].tolist()), clear

    (top_s, clear_s), (top_t, clear_t), (top5, clear5), (best, clear1) = (
        top(log, k) for log, k in ((log_p, 16), (log_q, 16), (log_q, 5), (log_p, 1))
    )
    union = sorted(top_s | top_t)
    on_s, on_t = (log[union].log_softmax(0) for log in (log_p, log_q))
    says = on_t > -math.inf
    terms = (on_t - on_s)[says]
    forward = math.inf if bool((on_s[says] == -math.inf).any()) else (on_t[says].exp() * terms).sum()
    mass = log_q[sorted(top_s)].exp().sum()
    spread = 0.0 if forward == math.inf else (on_t[says].exp() * (terms - forward).abs()).sum()
    both = clear_s and clear_t
    return {
        "top16_forward_kl": (forward, u * (1 + spread) if both else math.inf),
        "top16_teacher_mass": (mass, u * mass if clear_s else math.inf),
        "top16_overlap": (len(top_s & top_t) / len(top_s), u if both else math.inf),
        "argmax_in_top5": (float(best <= top5), u if clear1 and clear5 else math.inf),
    }


# What is held to it.


def check_values(scores, truth, case, where, names=FIELDS):
    times = TOLERANCES[case.dtype]["values"]
    expected_dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
    for name in names:
        value, exact, within = scores[name].detach(), truth.values[name], truth.allowed[name]
        assert value.dtype == expected_dtype, f"{where} {name} is {value.dtype}"
        value = value.double().cpu()
        assert not bool(value.isnan().any()), f"{where} {name} is NaN: {value.tolist()}, not {exact.tolist()}"
        finite = exact.isfinite() & within.isfinite()
        sure = within.isfinite() & ~exact.isfinite()
        assert torch.equal(value[sure], exact[sure]), f"{where} {name}: {value.tolist()}, not {exact.tolist()}"
        off = ((value - exact).abs() / within.clamp(min=1e-300))[finite]
        worst = off.amax().item() if len(off) else 0.0
        assert worst <= times, f"{where} {name} is off by {worst:.3g}: {value.tolist()}, not {exact.tolist()}"


def check_gradients(gradients, truth, case, student, factor, where):
    """`gradients` of hidden states, weight and bias are Σ factor · truth, within the table."""
    table, vocabulary = TOLERANCES[case.dtype], min(case.vocabularies)
    rounding = torch.finfo(case.dtype).eps / 2
    step = FLOAT16_STEP if case.dtype == torch.float16 else 0.0
    factor = factor.double().cpu()[:, None].masked_fill(truth.infinite[:, None], 0.0)
    g = truth.at_logits * factor
    noise = table["values"] * truth.at_logits_allowed * factor.abs() + table["at logits"] * rounding * g.abs()
    # float16 forms it for a factor of 1, so that its smallest numbers are as small as they can be
    peak = factor.abs().amax().item() if len(factor) else 0.0
    noise = noise + step * peak
    weight, hidden = student.weight.double().cpu()[:vocabulary], student.hidden.double().cpu()
    padded = (0, 0, 0, len(student.weight) - vocabulary)
    of = {
        "hidden": (g @ weight, noise @ weight.abs()),
        "weight": tuple(torch.nn.functional.pad(value, padded) for value in (g.T @ hidden, noise.T @ hidden.abs())),
        "bias": tuple(
            torch.nn.functional.pad(value.sum(0), (0, len(student.weight) - vocabulary)) for value in (g, noise)
        ),
    }
    for (name, (exact, within)), gradient in zip(of.items(), gradients, strict=True):
        if gradient is None:
            assert name == "bias"
            continue
        assert gradient.dtype == case.dtype
        value = gradient.double().cpu()
        assert bool(value.isfinite().all()), f"{where}, gradient of {name} is not finite"
        off = (value - exact).abs() / (within + table["result"] * rounding * exact.abs() + step + 1e-300)
        worst = off.amax().item() if off.numel() else 0.0
        assert worst <= 1, f"{where}, gradient of {name} is off by {worst:.3g} of what is allowed"


def leaves(head):
    """The head with views of its own that are differentiated, of the same strides."""
    tensors = [
        None if value is None else value.detach().requires_grad_() for value in (head.hidden, head.weight, head.bias)
    ]
    return tensors, replace(head, hidden=tensors[0], weight=tensors[1], bias=tensors[2])


@contextmanager
def tiles(small):
    """Tiles so small that a vocabulary is several and a row fills none, or those that are used."""
    with ExitStack() as stack:
        if small:
            for name, value in (("CPU_TILE", (4, 256)), ("CPU_WORKSPACE", 3000), ("CHOSEN_ROWS", 2)):
                stack.enter_context(patch.object(chunked, name, value))
        if kernels is not None:
            shape = kernels.Tile(4, 64, 32, 1) if small else kernels.Tile(8, 256, 256, 1)
            for name in ("TILE", "FEW"):
                stack.enter_context(patch.object(kernels, name, shape))
            stack.enter_context(patch.object(kernels, "WIDE", shape.block))
            if small:
                stack.enter_context(patch.object(kernels, "_rows_held", lambda hidden, *_: max(1, min(2, len(hidden)))))
                half = torch.float16  # is not chosen from in one pass
                stack.enter_context(patch.object(kernels, "choice_rows", lambda hidden, _: 3 * (hidden.dtype != half)))
        yield


def implementations(case):
    if kernels is not None and torch.float64 not in (case.dtype, case.teacher_dtype):
        return ("reference", "chunked", "triton")
    return ("reference", "chunked")


@given(cases())
@settings(
    max_examples=CASES,
    deadline=None,
    derandomize=CASES <= 60,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_every_head(case):
    student, teacher, token_ids, weights = heads_of(case)
    truth = truth_of(case, student, teacher, token_ids, weights)
    options = {"divergence": case.divergence, "beta": case.beta, "temperature": case.temperature}
    signs = torch.where(torch.arange(case.rows) % 2 == 0, 1.0, -1.0).to(DEVICE)
    dropped = torch.where(truth.infinite.to(DEVICE), 0.0, weights)
    for impl in implementations(case):
        with tiles(case.small_tiles):
            tensors, own = leaves(student)
            scores = tip.token_scores(own, teacher, token_ids=token_ids, fields=FIELDS, impl=impl, **options)
            check_values(dict(scores.present()), truth, case, f"{impl}, scored")
            torch.where(dropped > 0, scores.divergence, 0.0).mul(dropped * signs).sum().backward()
            gradients = [None if tensor is None else tensor.grad for tensor in tensors]
            check_gradients(gradients, truth, case, student, dropped.double() * signs, f"{impl}, scored")

            tensors, own = leaves(student)
            fields = ("entropy", "reverse_kl", *(("hellinger", "student_logprob") if case.seed % 2 else ()))
            loss, scores, selection = fused_selected_loss(
                own,
                teacher,
                lambda _, tokens: Selection(dropped[tokens] > 0, dropped[tokens], torch.zeros_like(dropped[tokens])),
                case.lengths,
                fields=fields,
                token_ids=token_ids,
                denominator=2.0,
                impl=impl,
                **options,
            )
            assert torch.equal(selection.weight, dropped)
            check_values(dict(scores.present()), truth, case, f"{impl}, chosen", fields)
            (loss * 0.37).backward()
            gradients = [None if tensor is None else tensor.grad for tensor in tensors]
            check_gradients(gradients, truth, case, student, dropped.double() * (0.37 / 2), f"{impl}, chosen")

            tensors, own = leaves(student)
            call = {"weight": weights, "denominator": 2.0, "token_ids": token_ids, "fields": FIELDS, "impl": impl}
            if bool(truth.infinite.any()):
                with pytest.raises(NonFiniteLogitsError, match="infinite"):
                    tip.fused_divergence_loss(own, teacher, **call, **options)
                continue
            loss, scores = tip.fused_divergence_loss(own, teacher, **call, **options)
            check_values(dict(scores.present()), truth, case, f"{impl}, fused")
            scale = 0.37  # what half precision has no number for
            (loss * scale).backward()
            gradients = [None if tensor is None else tensor.grad for tensor in tensors]
            check_gradients(gradients, truth, case, student, weights.double() * (scale / 2), f"{impl}, fused")
