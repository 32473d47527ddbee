"""What is particular to impl="triton"; `test_every_head.py` holds all implementations to one table.

Where there is no GPU the kernels are interpreted (`conftest.py`), element by element in Python: the sizes are tiny, and
so are the tiles, so that every case meets several blocks, several tiles and rows that fill none of them.
`tests/gpu` has the sizes of real heads.
"""

import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from heads import FIELDS, HEADS, error, gradients, leaves, make_head, make_pair, reference, to, tokens_of
from measure import matmul_flops

import tipdistill as tip
from tipdistill import Head, Selection
from tipdistill.loss import fused_selected_loss
from tipdistill.score import NonFiniteLogitsError, checks, tokens

pytest.importorskip("triton", reason="triton is built for Linux")

from tipdistill.score import triton as engine

# the interpreter is numpy, which warns where a GPU does not: of lanes that are masked, of rows that are NaN
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPTIONS = {"temperature": 0.7, "beta": 0.3}
# tokens, vocabulary: one token, two columns, a prime vocabulary, several tiles whose last is one column wide
SIZES = [(1, 37), (3, 2), (7, 37), (5, 97)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Three tokens by two blocks of 16 columns; two tokens of the fused loss at a time; 64 columns in a backward."""
    for name in ("TILE", "FEW"):
        monkeypatch.setattr(engine, name, engine.Tile(3, 32, 16, 1))
    monkeypatch.setattr(engine, "WIDE", 16)
    monkeypatch.setattr(engine, "INTERPRETED_WORKSPACE", 1)
    monkeypatch.setattr(engine, "_rows_held", lambda hidden, *_: max(1, min(2, len(hidden))))


def pair(rows, vocabulary, dtype=torch.float32, **options):
    """The pair of `make_pair`, on the device of the tests."""
    return [on_device(to(head, dtype)) for head in make_pair(rows, vocabulary, **options)]


def on_device(head):
    return replace(
        head,
        hidden=head.hidden.to(DEVICE),
        weight=head.weight.to(DEVICE),
        bias=None if head.bias is None else head.bias.to(DEVICE),
    )


def doubles(*heads):
    return [to(head, torch.float64) for head in heads]


def scores_of(student, teacher=None, **options):
    return tip.token_scores(student, teacher, impl="triton", **options)


def fused(student, teacher, weight, impl="triton", **options):
    """The loss, and its gradients in the student's hidden states, weight and bias."""
    tensors, student = leaves(student)
    loss = tip.fused_divergence_loss(student, teacher, weight, impl=impl, **options)
    loss.backward()
    return loss.detach(), [None if tensor is None else tensor.grad for tensor in tensors]


def test_a_gradient_of_one_in_a_million_survives_float16():
    """Formed as it is, most of it would be below what float16 can say, at the logits if not in the result."""
    student, teacher = pair(6, 37, torch.float16)
    incoming = torch.full((6,), 1e-6, device=DEVICE)
    found = gradients(student, teacher, incoming, impl="triton")[1]
    exact = gradients(*doubles(student, teacher), incoming.double(), impl="reference")[1]
    step = torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps
    assert (found.double() - exact).abs().max() <= 0.6 * step
    _, at_once = fused(student, teacher, torch.ones(6, device=DEVICE), denominator=1e6)
    assert (at_once[1].double() - exact).abs().max() <= 0.6 * step


@pytest.mark.parametrize(("student_rows", "teacher_rows"), [(41, 37), (37, 41)])
def test_padded_vocabularies_compare_the_rows_they_share(student_rows, teacher_rows):
    student, teacher = pair(4, student_rows, teacher_vocabulary=teacher_rows, bias=True)
    cut = [replace(head, weight=head.weight[:37], bias=head.bias[:37]) for head in (student, teacher)]
    torch.testing.assert_close(scores_of(student, teacher).reverse_kl, scores_of(*cut).reverse_kl)
    ones = torch.ones(4, device=DEVICE)
    for found, of_cut in (
        (gradients(student, teacher, ones, impl="triton"), gradients(*cut, ones, impl="triton")),
        (fused(student, teacher, ones)[1], fused(*cut, ones)[1]),
    ):
        for value, expected in zip(found[1:], of_cut[1:], strict=True):
            assert len(value) == student_rows
            assert not value[37:].any()
            torch.testing.assert_close(value[:37], expected)


@pytest.mark.parametrize("kind", HEADS)
def test_entropies_of_the_student_alone(kind):
    student, _ = pair(4, 37, **HEADS[kind])
    tokens = tokens_of(student).to(DEVICE)
    found = scores_of(student, token_ids=tokens, temperature=0.7)
    fields = ("entropy", "entropy_norm", "student_logprob")
    truth = reference(to(student, torch.float64), None, fields, token_ids=tokens, temperature=0.7)
    assert [name for name, _ in found.present()] == [name for name, _ in truth.present()]
    for name, value in found.present():
        torch.testing.assert_close(value.double(), getattr(truth, name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FIELDS)
def test_a_statistic_alone_is_what_it_is_among_all(name):
    student, teacher = pair(4, 37)
    options = {"token_ids": tokens_of(student).to(DEVICE), "divergence": "jsd"}
    alone = scores_of(student, teacher, fields=[name], **options).require(name)
    # a kernel with other sums is another kernel, in which the compiler may fuse another multiplication and addition
    among_all = getattr(scores_of(student, teacher, fields=FIELDS, **options), name)
    torch.testing.assert_close(alone, among_all, rtol=1e-5, atol=1e-6)


def test_a_tied_teacher_gets_no_gradient_and_no_divergence():
    student, _ = pair(4, 37)
    assert scores_of(student, student).reverse_kl.tolist() == [0.0] * 4
    for value in (*gradients(student, student, torch.ones(4, device=DEVICE), impl="triton")[:2],):
        assert value.abs().max() < 1e-7
    for value in fused(student, student, None)[1][:2]:
        assert value.abs().max() < 1e-7


def test_no_token():
    student, teacher = pair(0, 37)
    assert {len(value) for _, value in scores_of(student, teacher, fields=["entropy", "jsd"]).present()} == {0}
    hidden, weight, _ = gradients(student, teacher, torch.ones(0, device=DEVICE), impl="triton")
    assert hidden.shape == (0, 24)
    assert not weight.any()
    loss, (hidden, weight, _) = fused(student, teacher, None)
    assert loss.item() == 0.0
    assert hidden.shape == (0, 24)
    assert not weight.any()


def test_no_token_with_a_gradient():
    student, teacher = pair(3, 37, bias=True)
    for value in gradients(student, teacher, torch.zeros(3, device=DEVICE), impl="triton"):
        assert not value.any()


# Extreme logits.


def one_hot_head(rows):
    """A head whose logits are the given rows."""
    logits = torch.tensor(rows)
    return on_device(Head(torch.eye(len(rows)), logits.t().contiguous()))


def test_logits_of_ten_thousand():
    student = one_hot_head([[1e4, -1e4, 0.0], [1e4, 1e4, -1e4], [-1e4, -1e4, -1e4 + 1]])
    teacher = one_hot_head([[-1e4, 1e4, 0.0], [1e4, 1e4, -1e4], [0.0, 0.0, 1.0]])
    tokens = torch.tensor([0, 1, 2], device=DEVICE)
    found = scores_of(student, teacher, fields=FIELDS, token_ids=tokens)
    truth = reference(*doubles(student, teacher), token_ids=tokens)
    assert found.reverse_kl.tolist() == pytest.approx([2e4, 0.0, 0.0], abs=1e-6)
    for name, value in found.present():
        # float32 resolves 10⁴ to 10⁻³
        torch.testing.assert_close(value.detach().double(), getattr(truth, name).detach(), rtol=2e-3, atol=2e-3)
    for value in gradients(student, teacher, torch.ones(3, device=DEVICE), impl="triton")[:2]:
        assert torch.isfinite(value).all()
    assert torch.isfinite(fused(student, teacher, None)[1][1]).all()


def test_logits_of_ten_thousand_held_in_float16():
    """The held difference from the maximum saturates at the lowest float16, where a probability is 0 all the same."""
    student = to(one_hot_head([[1e4, -9e4, 0.0], [0.0, 1.0, -1e5]]), torch.bfloat16)
    teacher = to(one_hot_head([[1e4, -1e4, 0.0], [1.0, 0.0, -1e5]]), torch.bfloat16)
    found = fused(student, teacher, None, divergence="jsd")
    exact = fused(*doubles(student, teacher), None, impl="reference", divergence="jsd")
    torch.testing.assert_close(found[0].double(), exact[0], rtol=1e-3, atol=1e-6)
    for value, truth in zip(found[1][:2], exact[1][:2], strict=True):
        torch.testing.assert_close(value.double(), truth, rtol=0.01, atol=1e-4)


def test_a_column_that_only_the_teacher_forbids():
    """KL(P_S ‖ P_T) is infinite where P_S > 0 = P_T; the other statistics are not."""
    student, teacher = pair(3, 37, bias=True)
    bias = teacher.bias.clone()
    bias[2] = -math.inf
    teacher = replace(teacher, bias=bias)
    tokens = torch.tensor([2, 2, 3], device=DEVICE)
    found = scores_of(student, teacher, fields=FIELDS, token_ids=tokens)
    truth = reference(*doubles(student, teacher), token_ids=tokens)
    assert found.reverse_kl.tolist() == [math.inf] * 3
    assert found.gradient_norm.tolist() == [math.inf] * 3
    assert found.teacher_logprob.tolist()[:2] == [-math.inf] * 2
    for name, value in found.present():
        torch.testing.assert_close(value.detach().double(), getattr(truth, name).detach(), rtol=1e-4, atol=1e-5)
    ones = torch.ones(3, device=DEVICE)
    ours = gradients(student, teacher, ones, divergence="jsd", impl="triton")
    expected = gradients(*doubles(student, teacher), ones.double(), divergence="jsd", impl="reference")
    for value, exact in zip(ours, expected, strict=True):
        assert error(value, exact) < 1e-5
    with pytest.raises(NonFiniteLogitsError, match="token 0 of 3: the divergence is infinite"):
        tip.fused_divergence_loss(student, teacher, impl="triton")
    assert math.isfinite(tip.fused_divergence_loss(student, teacher, divergence="jsd", impl="triton"))


def test_a_column_that_both_forbid_is_no_column():
    student, teacher = pair(3, 37, bias=True)
    bias = torch.zeros(37, device=DEVICE).index_fill_(0, torch.tensor([0, 36], device=DEVICE), -math.inf)
    student, teacher = (replace(head, bias=bias) for head in (student, teacher))
    cut = [replace(head, weight=head.weight[1:36], bias=None) for head in (student, teacher)]
    for name in ("entropy", "reverse_kl", "jsd", "hellinger", "gradient_norm"):
        ours, expected = (getattr(scores_of(*heads, fields=[name]), name) for heads in ((student, teacher), cut))
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("whose", [0, 1])
def test_a_logit_that_is_none_names_its_token(value, whose):
    heads = pair(4, 37)
    heads[whose].hidden[2, 0] = value
    with pytest.raises(NonFiniteLogitsError, match="token 2 of 4: the logits are NaN or infinite"):
        scores_of(*heads)
    with pytest.raises(NonFiniteLogitsError, match="token 2 of 4: the logits are NaN or infinite"):
        tip.fused_divergence_loss(*heads, impl="triton")


def test_a_row_of_nothing_but_minus_infinity_is_refused():
    student, _ = pair(3, 37, bias=True)
    student = replace(student, bias=torch.full((37,), -math.inf, device=DEVICE))
    with pytest.raises(NonFiniteLogitsError, match="token 0 of 3"):
        scores_of(student)


# Half precision.


def near(dtype, log_ratio, rows=8, vocabulary=1000, width=16):
    """A student, and a teacher whose log-probabilities differ from its own by about `log_ratio` nats."""
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    hidden, weight = draw(rows, width).to(dtype), (draw(vocabulary, width) * 3 / width**0.5).to(dtype)
    # the student's head, and as many columns again that make the difference
    beside, other = (draw(rows, width) * log_ratio / width**0.5).to(dtype), draw(vocabulary, width).to(dtype)
    wide = Head(torch.cat([hidden, beside], 1), torch.cat([weight, other], 1))
    return on_device(Head(hidden, weight)), on_device(wide)


@pytest.fixture
def real_tiles(monkeypatch):
    monkeypatch.undo()


@pytest.mark.parametrize("log_ratio", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_gradient_near_agreement_keeps_its_digits(kind, log_ratio, real_tiles):
    student, teacher = near(torch.bfloat16, log_ratio)
    exact = fused(*doubles(student, teacher), None, impl="reference", divergence=kind)[1]
    for value, truth in zip(fused(student, teacher, None, divergence=kind)[1][:2], exact[:2], strict=True):
        assert error(value, truth) <= torch.finfo(torch.bfloat16).eps  # 0.8 %; a and b held apart: 3.6 % at 0.01


def test_a_student_that_is_certain_has_next_to_no_gradient(real_tiles):
    """All that is left is what the unlikely tokens' ratios differ by; the likely one's rounding, 0.03, must not be."""
    student, _ = near(torch.bfloat16, 1.0, 6, 40)
    teacher, _ = near(torch.bfloat16, 1.0, 6, 40)
    certain = student.weight.clone()
    certain[3] = 30 * student.hidden[0] / student.hidden[0].float().square().sum()
    student = replace(student, hidden=student.hidden[:1], weight=certain)
    teacher = replace(teacher, hidden=-17 * teacher.hidden[:1])
    for kind in DIVERGENCES[::2]:
        value = fused(student, teacher, None, divergence=kind)[1][1]
        truth = fused(*doubles(student, teacher), None, impl="reference", divergence=kind)[1][1]
        # float32 knows a ratio of 60 nats to 4e-6
        torch.testing.assert_close(value.double(), truth, rtol=0.02, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_norm_of_a_certain_student_does_not_cancel(dtype):
    student = to(one_hot_head([[30.37, 0.0, 12.1, 2.3], [0.0, -3.1, 28.71, 13.3]]), dtype)
    teacher = to(one_hot_head([[-101.3, 0.0, 3.3, 1.7], [5.1, 0.0, -103.9, 61.7]]), dtype)
    found = scores_of(student, teacher, fields=["gradient_norm"]).gradient_norm
    exact = reference(*doubles(student, teacher), ["gradient_norm"]).gradient_norm
    assert exact.max() < 1e-4
    # float32 knows a ratio of 130 nats to 8e-6, and the square of one to 1e-3
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_incoming_scale_is_rounded_with_the_gradient_and_not_before(dtype):
    student, teacher = near(dtype, 1.0, 4, 50)
    _, once = fused(student, teacher, None)
    tensors, own = leaves(student)
    factor = 1 + torch.finfo(dtype).eps / 2  # the dtype has no number nearer than 1
    (factor * tip.fused_divergence_loss(own, teacher, impl="triton")).backward()
    exact = fused(*doubles(student, teacher), None, impl="reference")[1]
    off = [(tensor.grad.double() / factor - truth).norm() for tensor, truth in zip(tensors[:2], exact[:2], strict=True)]
    before = [(value.double() - truth).norm() for value, truth in zip(once[:2], exact[:2], strict=True)]
    assert off[0] <= 1.1 * before[0]  # rounded once
    assert off[1] <= 2 * before[1]  # once when it is formed, and once more


def test_gradients_are_scaled_where_they_lie():
    values = torch.arange(6.0, device=DEVICE)
    engine._scaled_(values, torch.tensor(1.0, device=DEVICE))
    assert values.tolist() == [0, 1, 2, 3, 4, 5]
    engine._scaled_(values, torch.tensor(0.5, device=DEVICE))
    assert values.tolist() == [0, 0.5, 1, 1.5, 2, 2.5]
    assert engine._scaled_(values[:0], torch.tensor(2.0, device=DEVICE)).shape == (0,)


# Views.


@pytest.mark.parametrize("view", ["column", "expanded", "reversed"])
def test_views_are_read_as_they_lie(view):
    student, teacher = pair(6, 37, bias=True)
    column = torch.stack([student.bias, student.bias + 9], dim=1)[:, 0]
    bias = {"column": column, "expanded": torch.tensor(0.3).expand(37), "reversed": student.bias.flip(0)}[view]
    ids = torch.stack([tokens_of(student), torch.zeros(6, dtype=torch.int64)], dim=1)[:, 0].to(DEVICE)
    ids = ids[:1].expand(6) if view == "expanded" else ids
    student = replace(student, bias=bias.to(DEVICE))
    dense = replace(student, bias=student.bias.clone(memory_format=torch.contiguous_format))
    options = {"token_ids": ids, "fields": ("student_logprob", "teacher_logprob", "reverse_kl")}
    found, expected = (
        scores_of(student, teacher, **options),
        scores_of(dense, teacher, **options | {"token_ids": ids.clone()}),
    )
    for (name, value), (_, truth) in zip(found.present(), expected.present(), strict=True):
        assert torch.equal(value, truth), name
    for value, truth in zip(fused(student, teacher, None)[1], fused(dense, teacher, None)[1], strict=True):
        assert torch.equal(value, truth)


# What it costs.


@pytest.fixture
def launches(monkeypatch):
    """(kernel, grid) of every launch."""
    seen = []

    class Recorded:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            seen.append((self.name, grid))
            return self.kernel[grid]

    for name in ("_online_kernel", "_second_kernel", "_gradient_kernel"):
        monkeypatch.setattr(engine, name, Recorded(name, getattr(engine, name)))
    return seen


def test_the_backward_launches_for_the_kept_tokens_alone(launches):
    student, teacher = pair(7, 97)
    _, head = leaves(student)
    divergence = scores_of(head, teacher, fields=["divergence"]).divergence
    # 3 + 3 + 1 tokens, 32 + 32 + 32 + 1 columns
    assert launches == [("_online_kernel", (rows,)) for rows in (3, 3, 1) for _ in range(4)]
    launches.clear()
    divergence[torch.tensor([1, 4], device=DEVICE)].sum().backward()
    # both kept tokens at once, 64 + 33 columns in blocks of 16
    assert launches == [("_gradient_kernel", (2, 4)), ("_gradient_kernel", (2, 3))]


def test_a_backward_of_no_token_launches_nothing(launches):
    student, teacher = pair(3, 37)
    _, head = leaves(student)
    divergence = scores_of(head, teacher, fields=["divergence"]).divergence
    launches.clear()
    (divergence * 0).sum().backward()
    assert not launches


def test_nothing_is_launched_twice_for_a_second_look(launches):
    student, teacher = pair(4, 53)
    scores_of(student, teacher, fields=["reverse_kl", "hellinger"])
    # two tokens at a time, 48 + 5 columns
    assert launches == [("_online_kernel", (2,)), ("_online_kernel", (2,)), ("_second_kernel", (2,))] * 2


@pytest.mark.parametrize(("trained", "projections"), [("all", 3), ("hidden", 2), ("nothing", 1)])
def test_fused_multiplies_for_what_is_trained_alone(trained, projections):
    student, teacher = pair(5, 37)
    if trained == "all":
        _, student = leaves(student)
    elif trained == "hidden":  # a frozen lm_head, as with LoRA
        student = replace(student, hidden=student.hidden.clone().requires_grad_())
    unit = 2 * 5 * 37

    def run():
        loss = tip.fused_divergence_loss(student, teacher, impl="triton")
        if loss.requires_grad:
            loss.backward()

    assert matmul_flops(run) == unit * (24 * projections + 40)


def test_a_backward_multiplies_for_what_is_kept_and_trained_alone():
    student, teacher = pair(5, 37)
    unit = 2 * 2 * 37  # two of five tokens are kept
    for head, products in ((leaves(student)[1], 3), (replace(student, hidden=student.hidden.requires_grad_()), 2)):
        divergence = scores_of(head, teacher, fields=["divergence"]).divergence
        assert matmul_flops(lambda d=divergence: d[:2].sum().backward()) == unit * (24 * products + 40)


def test_a_rule_without_a_teacher_projects_none():
    student, teacher = pair(5, 37)
    assert matmul_flops(lambda: scores_of(student, teacher, fields=["entropy"])) == 2 * 5 * 37 * 24


def test_memory_that_comes_as_nan_changes_nothing(monkeypatch):
    student, teacher = pair(3, 67, torch.bfloat16, bias=True)
    tokens, weight = tokens_of(student).to(DEVICE), torch.ones(3, device=DEVICE)

    def run():
        options = {"divergence": "jsd", "token_ids": tokens}
        scores = scores_of(student, teacher, fields=FIELDS, **options)
        return [
            *(value.detach() for _, value in scores.present()),
            *gradients(student, teacher, weight, impl="triton"),
            *fused(student, teacher, weight)[1],
        ]

    clean, empty = run(), torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(engine.torch, "empty", poisoned)
    for value, expected in zip(run(), clean, strict=True):
        assert torch.equal(value, expected)


def test_all_tokens_in_one_block_are_what_several_blocks_are(monkeypatch):
    """One block rounds the weight gradient as it is formed, several sum it in float32 first."""
    student, teacher = pair(5, 37, torch.bfloat16)
    _, several = fused(student, teacher, None)
    monkeypatch.setattr(engine, "_rows_held", lambda hidden, *_: len(hidden))
    _, one = fused(student, teacher, None)
    for value, expected in zip(one[:2], several[:2], strict=True):
        assert error(value, expected) <= torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("lengths", [[3, 1, 0, 5], [2] * 4 + [1]], ids=str)
@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_are_chosen_among_held_ones(dtype, kind, lengths, monkeypatch):
    """Spans of one group and of several, of which the first rows, the last ones, or none are kept."""
    monkeypatch.setattr(engine, "choice_rows", lambda hidden, _: 5)
    student, teacher = pair(9, 97, dtype, bias=True, softcap=3.0)
    weight = torch.tensor([0.0, 0.5, 0.0, 0.0, 0.0, 2.0, 0.0, 1.0, 0.3], device=DEVICE)

    def chosen(student, teacher, impl):
        tensors, own = leaves(student)
        loss, _, _ = fused_selected_loss(
            own,
            teacher,
            lambda _, rows: Selection(weight[rows] > 0, weight[rows], weight[rows]),
            lengths,
            kind,
            fields=["entropy"],
            denominator=2.0,
            impl=impl,
            **OPTIONS,
        )
        loss.backward()
        return loss.detach(), [tensor.grad for tensor in tensors]

    loss, found = chosen(student, teacher, "triton")
    truth, exact = chosen(*doubles(student, teacher), "reference")
    # the Jensen-Shannon divergence is of held logits, which are float16 in half precision
    rounding = 1e-5 if dtype == torch.float32 or kind != "jsd" else torch.finfo(torch.float16).eps
    torch.testing.assert_close(loss.double(), truth, rtol=rounding, atol=1e-6)
    assert (found[0] != 0).any(1).tolist() == (weight > 0).tolist()
    for value, of_truth in zip(found, exact, strict=True):
        assert error(value, of_truth) <= (1e-5 if dtype == torch.float32 else 2e-2)


def test_rows_are_held_together_where_that_costs_no_more_than_a_copy_of_the_weight_gradient(monkeypatch):
    monkeypatch.undo()
    hidden = torch.empty(4000, 2560, dtype=torch.bfloat16, device="meta")
    vocabulary = 151_936
    assert engine._rows_held(hidden, vocabulary, spare=4 * vocabulary * 2560) == 4000
    # a workspace of 1 GiB takes 1766: three blocks, in multiples of 128
    assert engine._rows_held(hidden, vocabulary) == 1408
    assert engine._rows_held(hidden[:0], vocabulary) == 1


@pytest.mark.parametrize("vocabulary", [2, 63, 64, 50_257, 128_256, 151_936, 256_000])
@pytest.mark.parametrize(("tiles", "multiple"), [(4, 64), (74, 256), (19, 1024)])
def test_tiles_of_a_vocabulary_are_as_wide_as_each_other(vocabulary, tiles, multiple):
    step = engine._even_columns(vocabulary, math.ceil(vocabulary / tiles), multiple)
    assert step % multiple == 0
    widths = [stop - start for start, stop in engine._spans(vocabulary, step)]
    assert sum(widths) == vocabulary
    assert len(widths) <= tiles
    assert max(widths) - min(widths) <= multiple * len(widths)  # what is rounded up in all but the last


def test_a_projection_s_pieces_fill_whole_waves(monkeypatch):
    gpu = torch.device("cuda", 0)
    properties = SimpleNamespace(multi_processor_count=132, total_memory=80 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    for rows in (128, 819, 1664, 4096, 8192):
        most = 4096 * 4096 // rows // 256 * 256
        columns = engine._full_waves(rows, most, 256, gpu)
        assert columns % 256 == 0
        assert most / 2 - 256 <= columns <= most

        def busy(width, rows=rows):
            pieces = math.ceil(rows / 128) * (width // 256)
            return pieces / (math.ceil(pieces / 132) * 132)

        assert busy(columns) >= max(busy(most), 0.9 if rows < 8192 else 0.96)
    assert engine._full_waves(100, 512, 256, torch.device("cpu")) == 512


@pytest.mark.parametrize("mixed", [True, False])
def test_products_are_added_in_float32_before_torch_2_10_too(monkeypatch, mixed):
    """addmm of halves into float32 came with 2.10; in 2.8 and 2.9 its operands must have one dtype."""
    called = []
    monkeypatch.setattr(engine, "MIXED_ADDMM", mixed)
    monkeypatch.setattr(torch, "addmm", lambda *args, **kwargs: called.append("addmm"))
    monkeypatch.setattr(
        torch, "mm", lambda left, right, out_dtype: called.append("mm") or left.to(out_dtype) @ right.to(out_dtype)
    )
    half = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, to=torch.ones(2, 3).to)
    total = torch.ones(2, 2)
    engine._add_product(total, half, torch.ones(3, 2))
    assert called == (["addmm"] if mixed else ["mm"])
    assert total.unique().tolist() == ([1.0] if mixed else [4.0])


# fused_divergence_loss


def test_fused_gives_statistics_of_the_same_pass():
    student, teacher = pair(3, 37)
    options = {"fields": FIELDS, "token_ids": tokens_of(student).to(DEVICE)}
    _, found = tip.fused_divergence_loss(student, teacher, impl="triton", **options)
    scores = scores_of(student, teacher, **options)
    for name, value in found.present():
        expected = getattr(scores, name).detach()
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
        assert not value.requires_grad


def test_fused_follows_the_gradient_that_comes_in_once():
    student, teacher = pair(3, 37)
    (hidden, _, _), head = leaves(student)
    loss = 3 * tip.fused_divergence_loss(head, teacher, impl="triton")
    loss.backward(retain_graph=True)
    torch.testing.assert_close(hidden.grad, 3 * fused(student, teacher, None)[1][0])
    with pytest.raises(RuntimeError, match="handed out already"):
        loss.backward()


def test_autocast_around_the_call_changes_nothing():
    student, teacher = pair(3, 37)
    weight = torch.ones(3, device=DEVICE)
    plain = fused(student, teacher, weight), gradients(student, teacher, weight, impl="triton")
    with torch.autocast(DEVICE, torch.bfloat16):
        under = fused(student, teacher, weight), gradients(student, teacher, weight, impl="triton")
    assert torch.equal(plain[0][0], under[0][0])
    assert torch.equal(plain[1][1], under[1][1])


def test_float32_weights_under_half_precision_hidden_states(monkeypatch):
    """Mixed precision: master weights stay float32, and so does their gradient; what is multiplied is half of that."""
    multiplied = set()
    product, add_product = engine._product, engine._add_product

    def recorded(run, out, left, right):
        multiplied.update((left.dtype, right.dtype))
        run(out, left, right)

    monkeypatch.setattr(engine, "_product", partial(recorded, product))
    monkeypatch.setattr(engine, "_add_product", partial(recorded, add_product))
    student, teacher = pair(5, 37, torch.bfloat16)
    student, teacher = (replace(head, weight=head.weight.float()) for head in (student, teacher))
    for found, truth in (
        (fused(student, teacher, None)[1], fused(*doubles(student, teacher), None, impl="reference")[1]),
        (
            gradients(student, teacher, torch.ones(5, device=DEVICE) / 5, impl="triton"),
            gradients(*doubles(student, teacher), torch.ones(5, device=DEVICE) / 5, impl="reference"),
        ),
    ):
        assert [value.dtype for value in found[:2]] == [torch.bfloat16, torch.float32]
        for value, exact in zip(found[:2], truth[:2], strict=True):
            assert error(value, exact) <= torch.finfo(torch.bfloat16).eps
    assert multiplied == {torch.bfloat16}


# Which engine computes.


def test_auto_is_chunked_without_cuda():
    student, teacher = make_pair(2, 9, torch.float32)
    assert tokens._engine("auto", student, teacher) is tokens.chunked


def stub_head(dtype=torch.bfloat16):
    """What `_triton_obstacle` reads of a head on a GPU."""
    tensor = SimpleNamespace(dtype=dtype, is_cuda=True, device=torch.device("cuda", 0))
    return SimpleNamespace(hidden=tensor, weight=tensor)


def test_auto_is_triton_on_cuda_where_the_inputs_qualify(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert tokens._engine("auto", stub_head(), stub_head()) is engine
    assert tokens._engine("auto", stub_head(torch.float64), None) is tokens.chunked
    assert tokens._engine("auto", stub_head(), stub_head(torch.float64)) is tokens.chunked
    assert tokens._engine("chunked", stub_head(), None) is tokens.chunked
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert tokens._engine("auto", stub_head(), stub_head()) is tokens.chunked


@pytest.mark.parametrize(
    ("change", "dtype", "message"),
    [
        ({"find_spec": None}, torch.bfloat16, "needs the package triton: pip install triton"),
        ({"mixed": False}, torch.bfloat16, "needs torch 2.8 or newer for half precision: pip install"),
        ({"capability": (7, 5)}, torch.float32, "compute capability 8.0"),
        ({}, torch.float64, "takes float32, bfloat16 and float16: use impl='chunked'"),
    ],
)
def test_what_triton_cannot_take_is_refused_with_a_remedy(monkeypatch, change, dtype, message):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: change.get("capability", (9, 0)))
    monkeypatch.setattr(tokens, "_MIXED_MATMUL", change.get("mixed", True))
    if "find_spec" in change:
        monkeypatch.setattr(tokens.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=message):
        tokens._engine("triton", stub_head(dtype), None)
    assert tokens._engine("auto", stub_head(dtype), None) is tokens.chunked


def test_a_cpu_without_the_interpreter_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"needs a CUDA device, and the tensors are on cpu.*impl='auto'"):
        tip.token_scores(*make_pair(2, 9, torch.float32), impl="triton")


def test_token_ids_outside_the_vocabulary_are_refused():
    student, teacher = pair(3, 37)
    with pytest.raises(ValueError, match=r"token_ids must lie in \[0, 37\), got 0 to 37"):
        scores_of(student, teacher, token_ids=torch.tensor([0, 37, 2], device=DEVICE))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_ids": [0, 9, 2]}, r"token_ids must lie in \[0, 9\), got 0 to 9"),
        ({"factor": [1.0, -1.0, 1.0]}, "weights must be finite and ≥ 0, and their denominator positive"),
        ({"factor": [1.0, math.inf, 1.0]}, "weights must be finite"),
        ({"factor": [math.nan, 1.0, 1.0]}, "weights must be finite"),
        ({"divergence": [0.0, 1.0, math.inf]}, "token 2 of 3: the divergence is infinite"),
        ({"normaliser": [0.0, math.nan, 0.0], "divergence": [0.0, math.nan, 0.0]}, "token 1 of 3: the logits are NaN"),
    ],
)
def test_one_look_finds_whatever_is_wrong(change, message):
    """What is refused ahead on a CPU is looked at together with the results on a GPU, where each look waits."""
    rows = {"normaliser": [0.0] * 3, "token_ids": [0, 1, 8], "divergence": [0.0] * 3, "factor": [0.0, 1.0, 2.0]}
    checks.check_rows(vocabulary=9, **{name: torch.tensor(value) for name, value in rows.items()})
    with pytest.raises(ValueError, match=message):
        checks.check_rows(vocabulary=9, **{name: torch.tensor(value) for name, value in (rows | change).items()})


def test_a_head_of_other_widths_and_dtypes():
    """The student in bfloat16 beside a teacher in float32, as with a quantised or a bigger teacher."""
    student = on_device(make_head(3, 37, 8, 0, torch.bfloat16))
    teacher = on_device(make_head(3, 37, 16, 1, torch.float32))
    found = scores_of(student, teacher, fields=["reverse_kl", "jsd"])
    truth = reference(*doubles(student, teacher), ["reverse_kl", "jsd"])
    torch.testing.assert_close(found.reverse_kl.double(), truth.reverse_kl, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.jsd.double(), truth.jsd, rtol=2e-3, atol=1e-6)
