"""token_scores three ways: a float64 reference, the naive computation in low precision, ours."""

import math
import time
from dataclasses import replace
from statistics import median

import pytest
import torch
from heads import FIELDS, HEADS, error, gradients, incoming_of, leaves, make_head, make_pair, reference, to, tokens_of
from measure import matmul_flops, peak_bytes

import tipdistill as tip
from tipdistill import Head
from tipdistill.score import NonFiniteLogitsError
from tipdistill.select import Rule, rule_fields

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")
# rows, vocabulary: one token, tiles that do not fill, several tiles of rows and of columns, a prime vocabulary
SIZES = [(1, 37), (3, 2), (5, 2048), (257, 37), (259, 2111), (513, 4099)]


# Float64 against float64: only the order of the sums differs.


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", HEADS)
def test_values_in_float64(size, kind):
    student, teacher = make_pair(*size, **HEADS[kind])
    options = {"token_ids": tokens_of(student), "temperature": 0.7, "beta": 0.3}
    ours, expected = (
        tip.token_scores(student, teacher, fields=FIELDS, **options),
        reference(student, teacher, **options),
    )
    assert {name for name, _ in ours.present()} == set(FIELDS)
    for name in FIELDS:
        value, truth = getattr(ours, name), getattr(expected, name)
        assert value.shape == (size[0],)
        assert value.dtype == torch.float64
        # relative where values are large, absolute where they are differences of numbers near 1
        torch.testing.assert_close(
            value.detach(), truth.detach(), rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n} {m}"
        )


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", HEADS)
def test_gradients_in_float64(size, kind, divergence):
    student, teacher = make_pair(*size, **HEADS[kind])
    incoming = incoming_of(size[0]).index_fill(0, torch.tensor([0]), 1.5)
    options = {"divergence": divergence, "temperature": 1.4, "beta": 0.7}
    ours = gradients(student, teacher, incoming, **options)
    expected = gradients(student, teacher, incoming, impl="reference", **options)
    for value, truth in zip(ours, expected, strict=True):
        assert (value is None) == (truth is None)
        if value is not None:
            assert value.shape == truth.shape
            assert error(value, truth) < 1e-10


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradients_agree_with_finite_differences(divergence):
    """An independent check: the reference itself could have the wrong formula."""
    student, teacher = make_pair(3, 5, bias=True, softcap=4.0)

    def value(hidden, weight, bias):
        head = replace(student, hidden=hidden, weight=weight, bias=bias)
        return tip.token_scores(head, teacher, divergence=divergence, beta=0.4, fields=["divergence"]).divergence

    tensors, _ = leaves(student)
    assert torch.autograd.gradcheck(value, tensors, eps=1e-6, atol=1e-7)


@pytest.mark.parametrize(("student_rows", "teacher_rows"), [(61, 53), (53, 61)])
def test_padded_vocabularies_compare_the_rows_they_share(student_rows, teacher_rows):
    student, teacher = make_pair(7, student_rows, teacher_vocabulary=teacher_rows, bias=True)
    cut = [replace(head, weight=head.weight[:53], bias=head.bias[:53]) for head in (student, teacher)]
    ours, expected = tip.token_scores(student, teacher), reference(*cut, fields=("entropy_norm", "reverse_kl"))
    torch.testing.assert_close(ours.reverse_kl, expected.reverse_kl)
    torch.testing.assert_close(ours.entropy_norm, expected.entropy_norm)
    weight, bias = gradients(student, teacher, torch.ones(7, dtype=torch.float64))[1:]
    assert weight.shape == student.weight.shape
    assert not weight[53:].any()
    assert not bias[53:].any()
    expected_weight = gradients(cut[0], cut[1], torch.ones(7, dtype=torch.float64), impl="reference")[1]
    torch.testing.assert_close(weight[:53], expected_weight)


def test_a_tied_teacher_gets_no_gradient_and_no_divergence():
    student, _ = make_pair(4, 11)
    (hidden, weight, _), head = leaves(student)
    scores = tip.token_scores(head, head)
    # exactly: the same logits on both sides
    assert scores.reverse_kl.tolist() == [0.0] * 4
    scores.divergence.sum().backward()
    assert hidden.grad.abs().max() < 1e-15
    assert weight.grad.abs().max() < 1e-15


# Low precision: how far ours may be from the float64 truth of the same inputs, beside the same equations in float32 on
# full logits, which are the naive computation.

# Values are float32 whatever the inputs: online sums move between maxima, the naive ones do not, a few roundings more.
# The floor, in units of float32's epsilon: errors that small are one or two roundings of the largest entry, where
# "times" means nothing.
OF_VALUES = (3.0, 8)
TOLERANCES = {
    # dtype: (gradients: times the naive error, floor in units of the format's epsilon)
    torch.float32: (2.0, 8),
    # a gradient is rounded once to the format at the end: half an epsilon is in both
    torch.bfloat16: (1.0, 0.5),
    torch.float16: (1.0, 0.5),
}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("kind", HEADS)
def test_values_in_low_precision(dtype, kind):
    student, teacher = (to(head, dtype) for head in make_pair(67, 1021, **HEADS[kind]))
    truth = reference(to(student, torch.float64), to(teacher, torch.float64), token_ids=tokens_of(student))
    naive = reference(student, teacher, token_ids=tokens_of(student))
    ours = tip.token_scores(student, teacher, fields=FIELDS, token_ids=tokens_of(student))
    times, floor = OF_VALUES
    for name in FIELDS:
        if name == "signal_to_curvature":  # a quotient of two vanishing sums where both models agree
            continue
        value, exact, rounded = (getattr(scores, name).detach() for scores in (ours, truth, naive))
        assert value.dtype == torch.float32
        # ours is a float32 result whatever the inputs
        allowed = max(times * error(rounded, exact), floor * torch.finfo(torch.float32).eps)
        assert error(value, exact) <= allowed, name


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("kind", HEADS)
def test_gradients_in_low_precision(dtype, kind, divergence):
    student, teacher = (to(head, dtype) for head in make_pair(67, 1021, **HEADS[kind]))
    incoming = incoming_of(67)
    exact = gradients(
        to(student, torch.float64), to(teacher, torch.float64), incoming, impl="reference", divergence=divergence
    )
    rounded = gradients(student, teacher, incoming.to(dtype), impl="reference", divergence=divergence)
    ours = gradients(student, teacher, incoming.float(), divergence=divergence)
    times, floor = TOLERANCES[dtype]
    for value, truth, naive in zip(ours, exact, rounded, strict=True):
        if truth is not None:
            assert value.dtype == dtype
            assert error(value, truth) <= max(times * error(naive, truth), floor * torch.finfo(dtype).eps)


def test_signal_to_curvature_in_float32():
    """Where student and teacher differ the quotient is well conditioned; there it must be right."""
    student, teacher = (make_head(31, 203, 24, seed, torch.float32) for seed in (0, 1))
    ours = tip.token_scores(student, teacher, fields=["signal_to_curvature"]).signal_to_curvature
    truth = reference(to(student, torch.float64), to(teacher, torch.float64), ["signal_to_curvature"])
    torch.testing.assert_close(ours.double(), truth.signal_to_curvature, rtol=1e-4, atol=0)


def test_autocast_around_the_call_changes_nothing():
    student, teacher = make_pair(9, 301, torch.float32)
    incoming = incoming_of(9, torch.float32)
    plain = tip.token_scores(student, teacher), gradients(student, teacher, incoming)
    with torch.autocast("cpu", torch.bfloat16):
        under = tip.token_scores(student, teacher), gradients(student, teacher, incoming)
    assert torch.equal(plain[0].reverse_kl, under[0].reverse_kl)
    assert torch.equal(plain[1][1], under[1][1])


# Extreme logits.


def one_hot_head(rows):
    """A head whose logits are the given rows."""
    logits = torch.tensor(rows)
    return Head(torch.eye(len(rows), dtype=logits.dtype), logits.t().contiguous())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_of_ten_thousand(dtype):
    student = one_hot_head([[1e4, -1e4, 0.0], [1e4, 1e4, -1e4], [-1e4, -1e4, -1e4 + 1]])
    teacher = one_hot_head([[-1e4, 1e4, 0.0], [1e4, 1e4, -1e4], [0.0, 0.0, 1.0]])
    student, teacher = to(student, dtype), to(teacher, dtype)
    scores = tip.token_scores(student, teacher, fields=FIELDS, token_ids=torch.tensor([0, 1, 2]))
    truth = reference(to(student, torch.float64), to(teacher, torch.float64), token_ids=torch.tensor([0, 1, 2]))
    # two logits 10⁴ apart are certain; the same logits agree, whatever their offset
    assert scores.reverse_kl.tolist() == pytest.approx([2e4, 0.0, 0.0], abs=1e-6)
    assert scores.entropy.tolist() == pytest.approx([0.0, math.log(2), truth.entropy[2].item()], rel=1e-3, abs=1e-7)
    for name, value in scores.present():
        # float32 resolves 10⁴ to 10⁻³
        torch.testing.assert_close(value.detach().double(), getattr(truth, name).detach(), rtol=2e-3, atol=2e-3)
    for gradient in gradients(student, teacher, torch.ones(3, dtype=dtype)):
        assert gradient is None or torch.isfinite(gradient).all()


def test_a_column_that_only_the_teacher_forbids():
    """KL(P_S ‖ P_T) is infinite where P_S > 0 = P_T; the other statistics are not."""
    student, teacher = make_pair(3, 7, bias=True)
    bias = teacher.bias.clone()
    bias[2] = -math.inf
    teacher = replace(teacher, bias=bias)
    ours, truth = (
        tip.token_scores(student, teacher, fields=FIELDS, token_ids=torch.tensor([2, 2, 3]), impl=impl)
        for impl in ("chunked", "reference")
    )
    assert ours.reverse_kl.tolist() == [math.inf] * 3
    assert ours.teacher_logprob.tolist()[:2] == [-math.inf] * 2
    assert ours.gradient_norm.tolist() == [math.inf] * 3
    for name in FIELDS:
        torch.testing.assert_close(getattr(ours, name), getattr(truth, name))
    in_tiles, expected = (
        gradients(student, teacher, torch.ones(3, dtype=torch.float64), divergence="jsd", impl=impl)
        for impl in ("chunked", "reference")
    )
    for value, exact in zip(in_tiles, expected, strict=True):
        torch.testing.assert_close(value, exact)


def test_a_column_that_both_forbid_takes_no_part():
    student, teacher = make_pair(3, 7, bias=True)
    heads = []
    for head in (student, teacher):
        bias = head.bias.clone()
        bias[2] = -math.inf
        heads.append(replace(head, bias=bias))
    without = [
        replace(head, weight=head.weight[[0, 1, 3, 4, 5, 6]], bias=head.bias[[0, 1, 3, 4, 5, 6]]) for head in heads
    ]
    ours, expected = tip.token_scores(*heads, fields=FIELDS[3:6]), reference(*without, fields=FIELDS[3:6])
    for name, value in ours.present():
        torch.testing.assert_close(value.detach(), getattr(expected, name).detach())
    hidden, weight, _ = gradients(*heads, torch.ones(3, dtype=torch.float64))
    assert torch.isfinite(hidden).all()
    assert not weight[2].any()


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_name_their_token(impl, bad):
    student, teacher = make_pair(5, 19)
    for which in ("student", "teacher"):
        heads = {"student": student, "teacher": teacher}
        hidden = heads[which].hidden.clone()
        hidden[3, 0] = bad
        heads[which] = replace(heads[which], hidden=hidden)
        with pytest.raises(NonFiniteLogitsError, match="token 3 of 5") as caught:
            tip.token_scores(**heads, impl=impl)
        assert caught.value.token == 3


def test_a_row_of_minus_infinity_alone_is_no_distribution():
    head = Head(torch.ones(1, 2), torch.randn(5, 2), bias=torch.full((5,), -math.inf))
    with pytest.raises(NonFiniteLogitsError):
        tip.token_scores(head)


# Cost: what is projected, counted in floating-point operations.

ROWS, VOCABULARY, WIDTHS = 40, 301, (24, 40)
STUDENT, TEACHER = (2 * ROWS * VOCABULARY * width for width in WIDTHS)


def test_scoring_projects_every_row_of_both_heads_once():
    student, teacher = make_pair(ROWS, VOCABULARY, torch.float32)
    assert matmul_flops(lambda: tip.token_scores(student, teacher)) == STUDENT + TEACHER
    # of statistics that need the normalisers first, a second time
    assert matmul_flops(lambda: tip.token_scores(student, teacher, fields=["jsd"])) == 2 * (STUDENT + TEACHER)


def test_entropies_alone_never_project_the_teacher():
    student, teacher = make_pair(ROWS, VOCABULARY, torch.float32)
    assert matmul_flops(lambda: tip.token_scores(student)) == STUDENT
    assert matmul_flops(lambda: tip.token_scores(student, teacher, fields=["entropy"])) == STUDENT


@pytest.mark.parametrize("kept", [0, 1, 10, ROWS])
def test_backward_projects_the_rows_with_a_gradient_and_no_others(kept):
    student, teacher = make_pair(ROWS, VOCABULARY, torch.float32)
    _, student = leaves(student)
    scores = tip.token_scores(student, teacher)
    weight = torch.zeros(ROWS)
    weight[torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))[:kept]] = 1.0
    loss = (scores.divergence * weight).sum()
    # both logits again, then the gradients of hidden states and weight
    assert matmul_flops(loss.backward) == (3 * STUDENT + TEACHER) * kept // ROWS
    assert (student.hidden.grad.abs().sum(1) > 0).tolist() == (weight > 0).tolist()


def test_a_frozen_weight_costs_no_gradient():
    student, teacher = make_pair(ROWS, VOCABULARY, torch.float32)
    student = replace(student, hidden=student.hidden.requires_grad_())
    loss = tip.token_scores(student, teacher).divergence.sum()
    assert matmul_flops(loss.backward) == 2 * STUDENT + TEACHER
    assert student.weight.grad is None


def test_a_rule_that_reads_entropy_alone_costs_the_teacher_its_selected_rows():
    """The whole stage in the README's names: score, select, and the loss of what was selected."""
    student, teacher = make_pair(ROWS, VOCABULARY, torch.float32)
    _, student = leaves(student)

    def stage():
        picked = tip.select(tip.token_scores(student), rule="entropy", retention=0.25).mask
        kept = [replace(head, hidden=head.hidden[picked]) for head in (student, teacher)]
        tip.fused_divergence_loss(*kept).backward()

    assert matmul_flops(stage) == STUDENT + (3 * STUDENT + TEACHER) // 4


def test_nothing_selected_is_a_gradient_of_0():
    student, teacher = make_pair(5, 19, torch.float32)
    for gradient in gradients(student, teacher, torch.zeros(5))[:2]:
        assert not gradient.any()


def test_no_token_at_all():
    student, teacher = make_pair(0, 19, torch.float32)
    scores = tip.token_scores(student, teacher, fields=FIELDS, token_ids=torch.zeros(0, dtype=torch.int64))
    assert {value.shape for _, value in scores.present()} == {(0,)}
    assert not gradients(student, teacher, torch.zeros(0))[1].any()


# Memory.


def head_stage(rows, vocabulary, retention=0.5):
    student, teacher = make_pair(rows, vocabulary, torch.float32)
    _, student = leaves(student)

    def run():
        scores = tip.token_scores(student, teacher, fields=["entropy_norm", "reverse_kl", "divergence"])
        tip.selected_loss(scores, tip.select(scores, "soft_or", retention)).backward()

    gradient_bytes = student.hidden.nbytes + student.weight.nbytes
    return peak_bytes(run), gradient_bytes


def test_peak_memory_does_not_grow_with_rows_times_vocabulary():
    extra = {}
    for rows, vocabulary in ((512, 4096), (1024, 4096), (2048, 4096), (512, 8192), (512, 16384), (2048, 16384)):
        peak, gradient_bytes = head_stage(rows, vocabulary)
        extra[rows, vocabulary] = peak - gradient_bytes
        # an [N, V] tensor in float32 would be this large; the two gradients are part of any backward
        assert peak - gradient_bytes < 0.5 * rows * vocabulary * 4 or (rows, vocabulary) == (512, 4096)
    smallest, largest = extra[512, 4096], extra[2048, 16384]
    # sixteen times the logits; what grows is a few numbers per token and one gradient of [V, H] in its own dtype
    assert largest < 2 * smallest


def test_the_check_of_memory_sees_full_logits():
    """The same measure on the plain computation, so that a measure that sees nothing would fail here."""
    student, teacher = make_pair(512, 4096, torch.float32)
    full = peak_bytes(lambda: tip.token_scores(student, teacher, impl="reference", fields=["reverse_kl"]))
    assert full > 2 * 512 * 4096 * 4


def test_a_frozen_weight_takes_no_memory_for_its_gradient():
    student, teacher = make_pair(64, 50_000, torch.float32)
    student = replace(student, hidden=student.hidden.requires_grad_())
    loss = tip.token_scores(student, teacher, fields=["divergence"]).divergence.sum()
    assert peak_bytes(loss.backward) < student.weight.nbytes


def test_poisoned_buffers_show_nowhere(monkeypatch):
    """Fresh memory holds anything: nothing may be read before it is written."""
    empty = torch.empty

    def poisoned(*args, **options):
        fresh = empty(*args, **options)
        return fresh.fill_(math.nan) if fresh.is_floating_point() else fresh

    student, teacher = make_pair(259, 2111, torch.float32, bias=True)
    incoming = incoming_of(259, torch.float32)
    expected = tip.token_scores(student, teacher, fields=FIELDS[:6]), gradients(student, teacher, incoming)
    monkeypatch.setattr(torch, "empty", poisoned)
    ours = tip.token_scores(student, teacher, fields=FIELDS[:6]), gradients(student, teacher, incoming)
    for name, value in expected[0].present():
        assert torch.equal(getattr(ours[0], name), value), name
    for value, truth in zip(ours[1], expected[1], strict=True):
        assert torch.equal(value, truth)


@pytest.mark.slow
def test_backward_time_falls_with_retention():
    student, teacher = make_pair(1024, 8192, torch.float32)
    _, student = leaves(student)
    scores = tip.token_scores(student, teacher, fields=["divergence"])
    seconds = {1.0: [], 0.5: [], 0.1: []}
    for _ in range(5):
        for retention, taken in seconds.items():
            weight = torch.zeros(1024)
            weight[: int(1024 * retention)] = 1.0
            loss = (scores.divergence * weight).sum()
            began = time.perf_counter()
            loss.backward(retain_graph=True)
            taken.append(time.perf_counter() - began)
    whole, half, tenth = (median(taken) for taken in seconds.values())
    # 0.5 and 0.1 if the rest were free; a [V, H] gradient and tiles that do not fill are what is left
    assert half < 0.75 * whole
    assert tenth < 0.4 * whole


# What is asked for, and what is refused.


def test_only_what_is_asked_for_is_returned():
    student, teacher = make_pair(2, 9)
    present = lambda **options: {name for name, _ in tip.token_scores(student, **options).present()}  # noqa: E731
    assert present(teacher=teacher, fields=["reverse_kl"]) == {"reverse_kl"}
    assert present() == {"entropy", "entropy_norm"}
    assert present(token_ids=torch.tensor([0, 8])) == {"entropy", "entropy_norm", "student_logprob"}
    assert present(teacher=teacher) == set(FIELDS[:6])
    assert present(teacher=teacher, token_ids=torch.tensor([0, 8])) == set(FIELDS[:8])


@pytest.mark.parametrize("name", FIELDS)
def test_a_statistic_alone_is_what_it_is_among_all(name):
    student, teacher = make_pair(5, 2311, torch.float32)
    options = {"token_ids": tokens_of(student), "divergence": "jsd"}
    alone = tip.token_scores(student, teacher, fields=[name], **options).require(name)
    assert torch.equal(alone, getattr(tip.token_scores(student, teacher, fields=FIELDS, **options), name))


def test_only_the_divergence_is_differentiable():
    _, student = leaves(make_pair(2, 9)[0])
    scores = tip.token_scores(student, make_pair(2, 9)[1], fields=FIELDS, token_ids=torch.tensor([0, 1]))
    assert [name for name, value in scores.present() if value.requires_grad] == ["divergence"]


def test_any_mask_composed_in_plain_pytorch_works():
    student, teacher = make_pair(6, 19)
    mask = torch.tensor([True, False, True, True, False, False])
    (hidden, weight, _), head = leaves(student)
    scores = tip.token_scores(head, teacher)
    scores.divergence[mask].pow(2).mean().backward()
    (expected_hidden, expected_weight, _), head = leaves(student)
    tip.token_scores(head, teacher, impl="reference").divergence[mask].pow(2).mean().backward()
    torch.testing.assert_close(hidden.grad, expected_hidden.grad)
    torch.testing.assert_close(weight.grad, expected_weight.grad)


# What a rule asks for.


def surprise(scores):
    """How much less likely the teacher finds the sampled token."""
    return scores.require("student_logprob") - scores.require("teacher_logprob")


surprise.fields = ("student_logprob", "teacher_logprob")
IMPORTANT = Rule(lambda scores: scores.require("hellinger"), ("hellinger",), "importance")


@pytest.mark.parametrize(
    "rule",
    [
        *tip.RULES,
        "complement:soft_or",
        "complement:entropy_sampling",
        pytest.param(surprise, id="function"),
        pytest.param(IMPORTANT, id="Rule"),
    ],
)
@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_a_rule_asks_for_what_is_read_and_for_nothing_else(rule, impl):
    student, teacher = make_pair(24, 97, torch.float32)
    (hidden, weight, _), head = leaves(student)
    scores = tip.token_scores(head, teacher, rule=rule, token_ids=tokens_of(student), impl=impl)
    assert {name for name, _ in scores.present()} == {*rule_fields(rule), "divergence"}
    picked = tip.select(scores, rule, 0.5, torch.arange(24) // 8, generator=torch.Generator().manual_seed(0))
    tip.selected_loss(scores, picked).backward()
    assert weight.grad.abs().sum() > 0
    assert torch.equal(hidden.grad.abs().sum(1) > 0, picked.mask)


def test_a_rule_costs_the_projections_of_what_it_reads():
    student, teacher = make_pair(ROWS, VOCABULARY, torch.float32)
    assert matmul_flops(lambda: tip.token_scores(student, teacher, rule="soft_or")) == STUDENT + TEACHER
    assert matmul_flops(lambda: tip.token_scores(student, rule="entropy")) == STUDENT


def test_a_function_that_says_nothing_gets_the_papers_statistics():
    student, teacher = make_pair(4, 9)
    for rule in (lambda scores: scores.require("entropy"), "tipdistill.select.rules:entropy"):
        assert {name for name, _ in tip.token_scores(student, teacher, rule=rule).present()} == set(FIELDS[:6])
        scores = tip.token_scores(student, teacher, rule=rule, token_ids=torch.tensor([0, 1, 2, 8]))
        assert {name for name, _ in scores.present()} == set(FIELDS[:8])
        assert {name for name, _ in tip.token_scores(student, rule=rule).present()} == {"entropy", "entropy_norm"}


def test_fields_come_on_top_of_what_a_rule_reads():
    student, teacher = make_pair(4, 9)
    scores = tip.token_scores(student, teacher, rule="soft_or", fields=["teacher_entropy", "reverse_kl"])
    read = {"entropy_norm", "reverse_kl", "divergence"}
    assert {name for name, _ in scores.present()} == read | {"teacher_entropy"}
    assert {name for name, _ in tip.token_scores(student, rule="random", fields=["entropy"]).present()} == {"entropy"}


def test_without_a_teacher_a_rule_gets_what_it_reads_of_the_student():
    student, _ = make_pair(4, 9)
    assert [name for name, _ in tip.token_scores(student, rule="entropy").present()] == ["entropy_norm"]
    with pytest.raises(ValueError, match="'reverse_kl' compares with a teacher: pass teacher"):
        tip.token_scores(student, rule="soft_or")
    for rule in ("all", "random", "position"):
        with pytest.raises(ValueError, match=f"the rule '{rule}' reads no statistic, and without a teacher"):
            tip.token_scores(student, rule=rule)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "cumulative_advantage"}, "'student_logprob' is of the sampled tokens: pass token_ids"),
        ({"rule": surprise}, "'student_logprob' is of the sampled tokens: pass token_ids"),
        ({"rule": "soft-or"}, "unknown rule 'soft-or'.*Did you mean 'soft_or'"),
        ({"rule": "soft_or", "fields": "entropy"}, "fields must be a list of names"),
        ({"rule": "soft_or", "fields": ["entropi"]}, "got 'entropi'.*Did you mean 'entropy'"),
    ],
)
def test_what_a_rule_cannot_be_given_is_said(options, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        tip.token_scores(*make_pair(3, 9), **options)


def test_scores_that_lack_what_a_rule_reads_say_how_to_ask():
    student, teacher = make_pair(4, 9)
    with pytest.raises(ValueError, match=r"'reverse_kl' was not computed .*token_scores\(\.\.\., rule=\.\.\.\)"):
        tip.select(tip.token_scores(student, teacher, rule="entropy"), "soft_or")


GOOD = make_pair(3, 9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"divergence": "reverse-kl"}, r"divergence must be one of .*'reverse-kl'.*Did you mean 'reverse_kl'"),
        ({"impl": "chunk"}, r"impl must be one of .*Did you mean 'chunked'"),
        ({"temperature": 0.0}, "temperature must be a positive number, got 0.0"),
        ({"temperature": math.inf}, "temperature must be a positive number"),
        ({"divergence": "jsd", "beta": 1.0}, "beta must be in .*ask for these"),
        ({"beta": -0.1}, "beta must be in"),
        ({"fields": "entropy"}, r"fields must be a list of names, got the string 'entropy'"),
        ({"fields": ["entropi"]}, r"statistic must be one of .*, got 'entropi'.*Did you mean 'entropy'"),
        ({"fields": ["student_logprob"]}, "pass token_ids"),
        ({"fields": ["jsd"], "beta": 1.0}, "'jsd' is a statistic at β in"),
        ({"teacher": None, "fields": ["reverse_kl"]}, "compares with a teacher"),
        ({"token_ids": torch.tensor([0, 1])}, r"token_ids must be int64 \[3\]"),
        ({"token_ids": torch.tensor([0.0, 1.0, 2.0])}, r"token_ids must be int64 \[3\], got torch.float32"),
        ({"token_ids": torch.tensor([0, 1, 9])}, r"token_ids must lie in \[0, 9\)"),
        ({"token_ids": torch.tensor([0, -1, 2])}, r"token_ids must lie in \[0, 9\), got -1"),
        ({"teacher": make_pair(4, 9)[1]}, "same tokens: hidden states of 3 and 4 rows"),
        ({"student": Head(torch.zeros(2, 3, 4), torch.zeros(9, 4))}, r"must be \[N, H\].*hidden\[mask\]"),
        ({"student": Head(torch.zeros(3, 5), torch.zeros(9, 4))}, r"must be \[N, H\] and its lm_head weight \[V, H\]"),
        ({"student": Head(torch.zeros(3, 4).long(), torch.zeros(9, 4))}, "must be floating point"),
        ({"student": Head(torch.zeros(3, 4), torch.zeros(1, 4))}, "at least 2 tokens"),
        ({"student": Head(torch.zeros(3, 4), torch.zeros(9, 4), torch.zeros(8))}, r"bias must be \[9\]"),
        ({"student": Head(torch.zeros(3, 4), torch.zeros(9, 4), softcap=0.0)}, "softcap must be > 0 or None"),
        ({"student": Head(torch.zeros(3, 4), torch.zeros(9, 4), logit_scale=math.nan)}, "logit_scale must be finite"),
        ({"student": Head(torch.zeros(3, 4), torch.zeros(9, 4, device="meta"))}, "are on cpu, meta: move them to one"),
        ({"teacher": Head(torch.zeros(3, 4, device="meta"), torch.zeros(9, 4, device="meta"))}, "move the teacher's"),
    ],
)
def test_bad_input_is_refused(change, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        tip.token_scores(**{"student": GOOD[0], "teacher": GOOD[1], **change})
