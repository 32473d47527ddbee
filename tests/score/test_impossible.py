"""Tokens that a model cannot say: a logit of −∞ in both heads is no token, and in one what is finite stays right."""

import math
from dataclasses import replace

import pytest
import torch
from heads import FIELDS, leaves, make_pair, to

import tipdistill as tip
from tipdistill import Head, select
from tipdistill.score import NonFiniteLogitsError, chunked, top_k_teacher
from tipdistill.types import TeacherLogprobs

IMPLEMENTATIONS = ["reference", "chunked", "triton"]
# what each computes in at most
WIDEST = {"reference": torch.float64, "chunked": torch.float64, "triton": torch.float32}
CLOSE = {torch.float64: {"rtol": 1e-9, "atol": 1e-12}, torch.float32: {"rtol": 1e-4, "atol": 2e-6}}
DIVERGENCES = ["reverse_kl", "forward_kl", "jsd"]
# rows of the lm_head: first, last, and two in the middle
FORBIDDEN = [0, 7, 8, 40]
KEPT = [row for row in range(41) if row not in FORBIDDEN]


def forbid(head, rows):
    bias = head.bias.clone()
    bias[rows] = -math.inf
    return replace(head, bias=bias)


def without(head, rows):
    return replace(head, weight=head.weight[rows], bias=head.bias[rows])


def scored(student, teacher, impl, divergence):
    """All statistics and the gradients of Σ D of the scored and of the fused loss."""
    ids = torch.tensor([3, 20, 39])
    options = {"impl": impl, "divergence": divergence, "beta": 0.3, "temperature": 0.7}
    tensors, own = leaves(student)
    scores = tip.token_scores(own, teacher, token_ids=ids.clamp(max=len(student.weight) - 1), fields=FIELDS, **options)
    scores.divergence.sum().backward()
    fused_tensors, own = leaves(student)
    tip.fused_divergence_loss(own, teacher, denominator=1.0, **options).backward()
    return scores.detach(), [[tensor.grad for tensor in each] for each in (tensors, fused_tensors)]


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_what_both_forbid_is_no_token_in_any_statistic_or_gradient(impl, divergence):
    pair, close = make_pair(3, 41, WIDEST[impl], bias=True), CLOSE[WIDEST[impl]]
    found, gradients = scored(*(forbid(head, FORBIDDEN) for head in pair), impl, divergence)
    exact, truths = scored(*(without(head, KEPT) for head in pair), "reference", divergence)
    for name in FIELDS:
        if name.endswith("logprob"):  # of other token ids
            continue
        value, truth = getattr(found, name), getattr(exact, name)
        if name == "entropy_norm":  # relative to the vocabulary, which is the lm_head's
            truth = truth * math.log(len(KEPT)) / math.log(41)
        torch.testing.assert_close(value, truth, **close, msg=lambda message, name=name: f"{name}: {message}")
    for (hidden, weight, bias), (of_hidden, of_weight, of_bias) in zip(gradients, truths, strict=True):
        torch.testing.assert_close(hidden, of_hidden, **close)
        torch.testing.assert_close(weight[KEPT], of_weight, **close)
        torch.testing.assert_close(bias[KEPT], of_bias, **close)
        assert not weight[FORBIDDEN].any()
        assert not bias[FORBIDDEN].any()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("rows", [12, 20], ids=["fewer than 16", "more than 16"])
def test_the_likeliest_tokens_are_tokens_that_can_be_said(impl, rows):
    fields = ["top16_forward_kl", "top16_teacher_mass", "top16_overlap", "argmax_in_top5"]
    pair = make_pair(6, 41, WIDEST[impl], bias=True)
    rest = list(range(rows, 41))
    found = tip.token_scores(*(forbid(head, rest) for head in pair), fields=fields, impl=impl)
    exact = tip.token_scores(*(without(head, list(range(rows))) for head in pair), fields=fields, impl="reference")
    for name in fields:
        torch.testing.assert_close(getattr(found, name), getattr(exact, name), **CLOSE[WIDEST[impl]])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_what_one_forbids_is_infinite_however_unlikely_the_other_finds_it(impl, dtype):
    """A probability of e⁻⁶⁰ times ∞ is ∞, and no sum that is merely large; of e⁻²⁰⁰⁰ too, which is 0 as a number."""
    if dtype.itemsize > WIDEST[impl].itemsize:
        pytest.skip("triton has no float64")
    for low in (-5.0, -30.0, -60.0, -2000.0):
        logits = torch.tensor([[1.0], [0.5], [low]], dtype=dtype)
        says = Head(torch.ones(1, 1, dtype=dtype), logits, torch.zeros(3, dtype=dtype))
        cannot = replace(says, bias=torch.tensor([0.0, 0.0, -math.inf], dtype=dtype))
        fields = ["reverse_kl", "forward_kl", "gradient_norm", "jsd", "hellinger", "teacher_entropy"]
        for student, teacher, infinite in (
            (says, cannot, {"reverse_kl", "gradient_norm"}),
            (cannot, says, {"forward_kl"}),
        ):
            scores = tip.token_scores(student, teacher, fields=fields, impl=impl)
            assert {name for name, value in scores.present() if bool(value.isinf())} == infinite
            assert not any(bool(value.isnan()) for _, value in scores.present())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_what_both_forbid_leaves_a_large_divergence_finite(impl):
    student = Head(torch.ones(1, 1), torch.tensor([[3e6], [-3e6], [-math.inf]]))
    teacher = Head(torch.ones(1, 1), torch.tensor([[-3e6], [3e6], [-math.inf]]))
    assert tip.token_scores(student, teacher, fields=["reverse_kl"], impl=impl).reverse_kl.item() == 6e6


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_weights_of_minus_infinity_leave_the_gradients_finite(impl, divergence):
    """0 · ∞ of the product that carries a gradient to the hidden states is NaN."""
    draw = torch.Generator().manual_seed(0)
    hidden = [torch.rand(4, 3, generator=draw) + 0.1 for _ in range(2)]
    weight = [torch.randn(9, 3, generator=draw) for _ in range(2)]
    forbidden = [value.clone().index_fill_(0, torch.tensor([2]), -math.inf) for value in weight]
    kept = [0, 1, 3, 4, 5, 6, 7, 8]
    found = scored_alike(hidden, forbidden, impl, divergence)
    exact = scored_alike(hidden, [value[kept] for value in weight], impl, divergence)
    for (of_hidden, of_weight), (hidden_truth, weight_truth) in zip(found, exact, strict=True):
        torch.testing.assert_close(of_hidden, hidden_truth, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(of_weight[kept], weight_truth, rtol=1e-5, atol=1e-6)
        assert not of_weight[2].any()


def scored_alike(hidden, weight, impl, divergence):
    gradients = []
    for fused in (False, True):
        student = Head(hidden[0].clone().requires_grad_(), weight[0].clone().requires_grad_())
        teacher, options = Head(hidden[1], weight[1]), {"impl": impl, "divergence": divergence}
        if fused:
            tip.fused_divergence_loss(student, teacher, denominator=1.0, **options).backward()
        else:
            tip.token_scores(student, teacher, fields=["divergence"], **options).divergence.sum().backward()
        gradients.append((student.hidden.grad, student.weight.grad))
    return gradients


def test_a_first_tile_of_forbidden_tokens_alone_is_no_token(monkeypatch):
    monkeypatch.setattr(chunked, "CPU_TILE", (4, 4 * 1024))
    pair = make_pair(3, 2100, torch.float32, bias=True)
    rest = list(range(1500, 2100))
    exact = tip.token_scores(
        *(to(without(head, rest), torch.float64) for head in pair), fields=["gradient_norm"], impl="reference"
    )
    found = tip.token_scores(*(forbid(head, slice(0, 1500)) for head in pair), fields=["gradient_norm"])
    torch.testing.assert_close(found.gradient_norm.double(), exact.gradient_norm, rtol=1e-5, atol=1e-6)
    one = tip.token_scores(forbid(pair[0], slice(0, 1500)), pair[1], fields=["gradient_norm", "reverse_kl"])
    assert bool(one.gradient_norm.isfinite().all())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_masks_of_the_lowest_float_count_as_minus_infinity_and_as_high_is_refused(impl):
    lowest = torch.finfo(torch.float32).min
    student, teacher = (Head(torch.ones(2, 1), torch.tensor([[1.0], [x], [lowest]])) for x in (0.0, 2.0))
    scores = tip.token_scores(student, teacher, fields=["reverse_kl", "forward_kl"], impl=impl)
    exact = tip.token_scores(
        *(replace(head, weight=head.weight[:2]) for head in (student, teacher)),
        fields=["reverse_kl", "forward_kl"],
        impl=impl,
    )
    torch.testing.assert_close(scores.reverse_kl, exact.reverse_kl)
    torch.testing.assert_close(scores.forward_kl, exact.forward_kl)
    with pytest.raises(NonFiniteLogitsError, match=r"token 0 of 2: the logits are NaN or infinite \(1e18 or more\)"):
        tip.token_scores(replace(student, weight=torch.tensor([[3e38], [-3e38], [0.0]])), teacher, impl=impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("size", [100.0, 400.0, 900.0], ids=str)
def test_gradient_norm_of_logits_in_the_hundreds(impl, size):
    """Of a student that is certain it is far below the log ratios that it is summed from."""
    s = torch.tensor([[size, size - 4, 0.0, 1.0], [0.0, size, size - 9, 3.0], [size, size, 0.0, size]])
    t = torch.tensor([[1.0, 5.0, size, 0.0], [size, 2.0, 1.0, 0.0], [1.0, size, 0.0, 7.0]])
    heads = [Head(torch.eye(3), z.T.contiguous()) for z in (s, t)]
    found = tip.token_scores(*heads, fields=["gradient_norm"], impl=impl).gradient_norm
    exact = tip.token_scores(*(to(head, torch.float64) for head in heads), fields=["gradient_norm"], impl="reference")
    # 2⁻²⁴ a rounding of a logit
    torch.testing.assert_close(found.double(), exact.gradient_norm, rtol=1e-5, atol=8 * size * 2**-24)


# The error's advice, followed to the letter.

RULES = ["all", "entropy", "entropy_sampling", "soft_or", "soft_or_log", "q3", "divergence"]
RULES += ["gradient_norm", "gradient_norm_sampling"]


def trained(student, teacher, rule, divergence, impl):
    """score → select → loss, as the README does it."""
    scores = tip.token_scores(student, teacher, divergence, rule=rule, impl=impl)
    kept = select(scores.detach(), rule, retention=0.5, generator=torch.Generator().manual_seed(0))
    rows = kept.mask.nonzero()[:, 0]
    heads = [replace(head, hidden=head.hidden[rows]) for head in (student, teacher)]
    loss = tip.fused_divergence_loss(*heads, kept.weight[rows], divergence, impl=impl)
    loss.backward()
    assert math.isfinite(loss.item())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("whose", ["student", "teacher"])
@pytest.mark.parametrize("rule", RULES)
def test_the_advice_works_for_the_rule_in_use(rule, whose, impl):
    student, teacher = make_pair(8, 41, torch.float32, bias=True)
    student = replace(student, hidden=student.hidden.requires_grad_())
    one = (forbid(student, FORBIDDEN), teacher) if whose == "student" else (student, forbid(teacher, FORBIDDEN))
    divergence = "forward_kl" if whose == "student" else "reverse_kl"
    with pytest.raises(ValueError, match="probability 0 to what the other can say") as refused:
        trained(*one, rule, divergence, impl)
    assert "Forbid these tokens to both (−∞ in the same rows of both lm_heads), or" in str(refused.value)
    trained(forbid(student, FORBIDDEN), forbid(teacher, FORBIDDEN), rule, divergence, impl)
    assert "the Jensen-Shannon divergence (divergence='jsd', in a TIPConfig beta=0.5)" in str(refused.value)
    assert "a rule selects by what stays finite, such as 'entropy'" in str(refused.value)
    trained(*one, "entropy", "jsd", impl)


def test_a_served_teacher_that_forbids_an_unsampled_token_is_told_as_a_local_one_is():
    student, teacher = make_pair(3, 41, torch.float32, bias=True)
    local = forbid(teacher, [5])
    z = local.hidden @ local.weight.T + local.bias
    ids = torch.tensor([1, 2, 3])
    logprob = z.log_softmax(-1)
    served = TeacherLogprobs(logprob, None, logprob.gather(1, ids[:, None])[:, 0])
    fields = ["reverse_kl", "forward_kl", "jsd", "hellinger", "gradient_norm"]
    found = top_k_teacher.served_scores(student, served, fields)
    exact = tip.token_scores(student, local, fields=fields, impl="reference")
    for name in fields:
        torch.testing.assert_close(getattr(found, name), getattr(exact, name), rtol=1e-4, atol=1e-6)
    loss = top_k_teacher.served_divergence_loss
    with pytest.raises(NonFiniteLogitsError, match=r"token 0 of 3: the divergence is infinite.*Jensen-Shannon"):
        loss(student, served, torch.ones(3), denominator=3.0)
    assert math.isfinite(loss(student, served, torch.ones(3), "jsd", denominator=3.0)[0])
