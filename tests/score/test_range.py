"""Large logits and small ranges: what is finite stays finite and right, by every implementation."""

import math

import pytest
import torch

import tipdistill as tip
from tipdistill.score import NonFiniteLogitsError
from tipdistill.score.top_k_outcomes import lower_bounds
from tipdistill.types import Head

IMPLEMENTATIONS = ["reference", "chunked", "triton"]
FINFO = torch.finfo(torch.float32)


def heads(s, t, dtype=torch.float32):
    """Heads whose logits are given, [N, V] each: the hidden states are the unit vectors."""
    return [Head(torch.eye(len(z), dtype=dtype), torch.tensor(z, dtype=dtype).T.contiguous()) for z in (s, t)]


def of(impl, student, teacher, **options):
    return tip.token_scores(student, teacher, impl=impl, **options)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("size", [9e5, 1.1e6, 3e7, 1e9], ids=str)
def test_a_divergence_of_finite_logits_is_finite_however_large(impl, size):
    student, teacher = heads([[0.0, size, -1.0]], [[0.0, -size, 1.0]])
    ids = torch.tensor([0])
    fields = ["reverse_kl", "forward_kl", "gradient_norm", "student_logprob", "top16_forward_kl"]
    scores = of(impl, student, teacher, fields=fields, token_ids=ids)
    exact = tip.token_scores(
        *heads([[0.0, size, -1.0]], [[0.0, -size, 1.0]], torch.float64), fields=fields, token_ids=ids, impl="reference"
    )
    for name in fields[:2] + fields[3:]:
        torch.testing.assert_close(getattr(scores, name).double(), getattr(exact, name), rtol=1e-6, atol=1e-6)
    assert bool(scores.gradient_norm.isfinite().all())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_what_one_model_forbids_and_the_other_says_stays_infinite(impl):
    student, teacher = heads([[0.0, 5.0, -math.inf]], [[0.0, -math.inf, 1.0]])
    scores = of(impl, student, teacher, fields=["reverse_kl", "forward_kl", "jsd"])
    assert scores.reverse_kl.isinf().all()
    assert scores.forward_kl.isinf().all()
    assert scores.jsd.isfinite().all()


def test_a_bound_of_finite_outcomes_is_finite_however_large():
    log_p, log_q = torch.tensor([[0.0, -3e6]]), torch.tensor([[-2e6, 0.0]])
    bounds = lower_bounds(log_p, log_q, ["reverse_kl", "forward_kl"])
    assert (bounds.reverse_kl.item(), bounds.forward_kl.item()) == (2e6, 3e6)


# signal_to_curvature: gᵀHg is far below g² where the student is certain.


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("size", [1.0, 10.0, 20.0, 40.0, 80.0], ids=str)
def test_signal_to_curvature_of_a_certain_student_is_that_of_float64(impl, size):
    s = [[size, 0.0, 0.0, -1.0], [0.0, -size, -size, -size], [size, size, 0.0, 0.0]]
    t = [[0.0, 1.0, 2.0, 0.5], [0.0, 3.0, 0.0, 1.0], [0.5, 0.0, 1.0, 0.0]]
    scores = of(impl, *heads(s, t), fields=["signal_to_curvature"])
    exact = tip.token_scores(*heads(s, t, torch.float64), fields=["signal_to_curvature"], impl="reference")
    torch.testing.assert_close(scores.signal_to_curvature.double(), exact.signal_to_curvature, rtol=1e-4, atol=1e-6)


def test_signal_to_curvature_in_float64_is_that_of_the_fractions():
    """Two tokens, p and 1 − p against ½ and ½: ‖g‖² = 2 (p − ½)², gᵀHg = p (1 − p) · 4 (p − ½)²."""
    size = 60.0
    student, teacher = heads([[size, 0.0]], [[0.0, 0.0]], torch.float64)
    got = tip.token_scores(student, teacher, fields=["signal_to_curvature"], impl="reference").signal_to_curvature
    rest = math.exp(-size) / (1 + math.exp(-size))
    assert got.item() == pytest.approx(1 / (2 * rest * (1 - rest)), rel=1e-9)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_signal_to_curvature_beyond_float32_is_its_largest_number_and_of_equal_models_0(impl, dtype):
    student, teacher = heads([[99.0, 0.0], [99.0, 0.0]], [[0.0, 0.0], [99.0, 0.0]], dtype)
    beyond, equal = of(impl, student, teacher, fields=["signal_to_curvature"]).signal_to_curvature.tolist()
    assert beyond == pytest.approx(FINFO.max)
    assert equal == 0.0


# Gradients in float16.


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
def test_gradients_are_finite_or_an_error_names_the_token(impl, kind):
    generator = torch.Generator().manual_seed(0)
    for scale in (1.0, 30.0, 100.0):
        for temperature in (0.1, 1.0, 10.0):
            z = [(torch.rand(3, 8, generator=generator) * 2 - 1) * scale for _ in range(2)]
            student, teacher = heads(*(logits.tolist() for logits in z), torch.float16)
            leaves = [student.hidden.requires_grad_(), student.weight.requires_grad_()]
            beta = 0.5 if kind == "jsd" else {"reverse_kl": 1.0, "forward_kl": 0.0}[kind]
            options = {"divergence": kind, "beta": 0.9 if kind == "jsd" else beta, "temperature": temperature}
            of(impl, student, teacher, fields=["divergence"], **options).divergence.sum().backward()
            if impl != "reference":
                tip.fused_divergence_loss(student, teacher, impl=impl, **options).backward()
            assert all(bool(leaf.grad.isfinite().all()) for leaf in leaves)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_gradient_that_float16_cannot_hold_names_its_token(impl):
    """Logits within ±100 of hidden states of 3e4: the lm_head's gradient is their sum over the tokens."""
    hidden = torch.zeros(4, 4, dtype=torch.float16)
    hidden[:, 0] = torch.tensor([1.0, 3e4, 6e4, 5e4])
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).half() * 1e-4
    teacher = Head(hidden.clone(), -8 * weight)
    student = Head(hidden, weight.requires_grad_())
    with pytest.raises(NonFiniteLogitsError, match=r"token 2 of 4: its gradient is beyond ±65504"):
        of(impl, student, teacher, fields=["divergence"]).divergence.sum().backward()
    if impl != "reference":
        with pytest.raises(NonFiniteLogitsError, match=r"token 2 of 4"):
            tip.fused_divergence_loss(student, teacher, denominator=1.0, impl=impl)


@pytest.mark.parametrize("impl", ["chunked", "triton"])
def test_a_loss_that_is_scaled_beyond_float16_has_finite_gradients(impl):
    """A gradient scaler begins at 65,536, which float16 cannot hold."""
    student, teacher = heads([[1.0, 0.0, 0.5]], [[0.0, 0.2, 0.1]], torch.float16)
    gradients = []
    for scale in (1.0, 65536.0):
        own = Head(student.hidden.clone().requires_grad_(), (student.weight * 1.0).requires_grad_())
        (
            tip.fused_divergence_loss(own, teacher, weight=torch.tensor([1e-2]), denominator=1.0, impl=impl) * scale
        ).backward()
        gradients.append((own.hidden.grad.double() / scale, own.weight.grad.double() / scale))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=1e-7)


@pytest.mark.parametrize("impl", ["chunked", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_random_logits_of_any_scale_give_what_float64_gives(impl, dtype):
    fields = ["entropy", "reverse_kl", "forward_kl", "jsd", "teacher_entropy", "hellinger"]
    generator = torch.Generator().manual_seed(7)
    for scale, of_teacher, temperature, beta in (
        (1e-2, 1e4, 0.1, 0.1),
        (1e4, 1e4, 0.1, 0.5),
        (1e4, 1e-2, 10.0, 0.9),
        (1e2, 1e3, 1.0, 0.5),
    ):
        z = [torch.randn(3, 9, generator=generator) * factor for factor in (scale, of_teacher)]
        z[0][1] = z[0][1, 0]  # ties
        z[1][2] = z[0][2]  # equal models
        pair = heads(*(logits.tolist() for logits in z), dtype)
        exact = [Head(head.hidden.double(), head.weight.double()) for head in pair]
        options = {"fields": fields, "beta": beta, "temperature": temperature}
        got, truth = of(impl, *pair, **options), of("reference", *exact, **options)
        for name in fields:
            allowed = 1e-5 + 2e-6 * max(scale, of_teacher) / temperature
            torch.testing.assert_close(getattr(got, name).double(), getattr(truth, name), rtol=1e-4, atol=allowed)
