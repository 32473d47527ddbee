"""The oracle in half precision: computed in float32 at least, rounded once, whatever stands around the call."""

import pytest
import torch
from heads import FIELDS, gradients, incoming_of, make_pair, reference, to, tokens_of

import tipdistill as tip
from tipdistill import Head
from tipdistill.score import reference as oracle

DTYPES = [torch.bfloat16, torch.float16]


def saturated_pair(dtype):
    """Tokens of which some are certain: logits up to 40, as after training."""
    return [to(head, dtype) for head in make_pair(23, 211, spread=8.0, bias=True)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_of_half_precision_are_float32_computed_in_float32(dtype):
    heads = saturated_pair(dtype)
    options = {"token_ids": tokens_of(heads[0])}
    scores = reference(*heads, **options)
    exact = reference(*(to(head, torch.float64) for head in heads), **options)
    for name in FIELDS:
        value = getattr(scores, name).detach()
        assert value.dtype == torch.float32, name
        # 2⁻²⁴ a rounding, and logits of 40 in which some 30 are made
        tolerance = 40 * 30 * 2**-24
        if name == "signal_to_curvature":  # a quotient of what vanishes where a student is certain
            continue
        torch.testing.assert_close(value.double(), getattr(exact, name).detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_half_precision_are_rounded_once(dtype, divergence):
    heads, incoming = saturated_pair(dtype), incoming_of(23)
    found = gradients(*heads, incoming.float(), impl="reference", divergence=divergence)
    exact = gradients(
        *(to(head, torch.float64) for head in heads), incoming.float().double(), impl="reference", divergence=divergence
    )
    for value, truth in zip(found, exact, strict=True):
        assert value.dtype == dtype
        half_a_step = truth.abs() * torch.finfo(dtype).eps / 2
        # beside the rounding: what float32 computes, relative to the largest entry, and the smallest float16
        beside = 1e-5 * truth.abs().max() + (2**-25 if dtype == torch.float16 else 0)
        assert bool(((value.double() - truth).abs() <= half_a_step + beside).all())


def test_autocast_around_the_oracle_changes_nothing():
    student, teacher = make_pair(9, 101, torch.float32)
    incoming = incoming_of(9, torch.float32)
    plain = reference(student, teacher, ["reverse_kl"]), gradients(student, teacher, incoming, impl="reference")
    with torch.autocast("cpu", torch.bfloat16):
        under = reference(student, teacher, ["reverse_kl"]), gradients(student, teacher, incoming, impl="reference")
    assert torch.equal(plain[0].reverse_kl, under[0].reverse_kl)
    for one, other in zip(plain[1][:2], under[1][:2], strict=True):
        assert torch.equal(one, other)


def test_a_float64_student_is_compared_with_its_teacher_in_float64():
    student, teacher = make_pair(5, 31)
    teacher = to(teacher, torch.float32)
    found = reference(student, teacher, ["reverse_kl"]).reverse_kl
    assert torch.equal(found, reference(student, to(teacher, torch.float64), ["reverse_kl"]).reverse_kl)


def test_logits_are_those_of_lifted_operands():
    hidden, weight = torch.tensor([[1.0, 2.0**-9]]).bfloat16(), torch.ones(2, 2).bfloat16()
    assert oracle.logits(Head(hidden, weight), 2).tolist() == [[1 + 2**-9] * 2]  # in bfloat16 it is 1


@pytest.mark.parametrize("impl", ["reference", "chunked", "triton"])
def test_a_vocabulary_of_one_token_is_refused(impl):
    head = Head(torch.ones(2, 3), torch.ones(1, 3))
    with pytest.raises(ValueError, match="the student's vocabulary must have at least 2 tokens, got 1"):
        tip.token_scores(head, head, impl=impl)
