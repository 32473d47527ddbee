"""The loss of selected tokens: both ways to it, their denominators, and what they refuse."""

import math
import re
from dataclasses import replace

import pytest
import torch
from heads import leaves, make_pair, reference, to
from measure import matmul_flops, peak_bytes

import tipdistill as tip
from tipdistill import Head, Selection, TokenScores
from tipdistill.loss import fused_selected_loss
from tipdistill.score import NonFiniteLogitsError, chunked
from tipdistill.score.checks import scaled_
from tipdistill.select import running_of

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")


def selection_of(weight):
    weight = torch.as_tensor(weight)
    return Selection(mask=weight > 0, weight=weight.float(), score=torch.zeros(len(weight)))


def scores_of(*divergence):
    return TokenScores(divergence=torch.tensor(divergence, requires_grad=True))


def test_the_mean_over_the_selected_tokens():
    assert tip.selected_loss(scores_of(1.0, 5.0, 3.0), selection_of([1.0, 0.0, 1.0])).item() == 2.0


def test_the_weighted_mean():
    assert tip.selected_loss(scores_of(1.0, 5.0, 3.0), selection_of([1.0, 0.0, 3.0])).item() == 2.5


def test_a_denominator_of_the_whole_batch():
    scores = scores_of(1.0, 5.0, 3.0)
    for denominator in (8, 8.0, torch.tensor(8.0)):
        assert tip.selected_loss(scores, selection_of([1.0, 0.0, 1.0]), denominator).item() == 0.5


def test_inverse_probabilities_are_divided_by_the_kept_tokens():
    mask, weight = torch.tensor([True, False, True]), torch.tensor([0.5, 0.0, 4.0])
    scores = TokenScores(divergence=torch.tensor([1.0, 9.0, 3.0]))
    picked = Selection(mask, weight, torch.zeros(3), inverse_probability=True)
    assert tip.selected_loss(scores, picked) == (0.5 * 1 + 4 * 3) / 2
    assert tip.selected_loss(scores, picked, denominator=5.0) == 2.5


def test_two_micro_batches_add_up_to_the_batch():
    whole, picked = scores_of(1.0, 5.0, 3.0, 7.0), selection_of([1.0, 0.0, 1.0, 1.0])
    parts = [
        tip.selected_loss(whole.map(lambda x, s=part: x[s]), selection_of(picked.weight[part]), denominator=3)
        for part in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(sum(parts), tip.selected_loss(whole, picked))


def test_nothing_selected_is_a_loss_of_0_with_a_gradient_of_0():
    scores = scores_of(1.0, 5.0)
    loss = tip.selected_loss(scores, selection_of([0.0, 0.0]))
    loss.backward()
    assert loss.item() == 0.0
    assert scores.divergence.grad.tolist() == [0.0, 0.0]


def test_an_infinite_divergence_that_was_dropped_does_no_harm():
    scores = scores_of(1.0, math.inf, 3.0)
    loss = tip.selected_loss(scores, selection_of([1.0, 0.0, 1.0]))
    loss.backward()
    assert loss.item() == 2.0
    assert scores.divergence.grad.tolist() == [0.5, 0.0, 0.5]


@pytest.mark.parametrize("denominator", [0, -1.0, math.nan, torch.tensor(0.0)])
def test_a_denominator_that_is_not_positive_is_refused(denominator):
    with pytest.raises(ValueError, match="denominator must be positive"):
        tip.selected_loss(scores_of(1.0), selection_of([1.0]), denominator)


def test_a_selection_of_other_tokens_is_refused():
    with pytest.raises(ValueError, match="the selection is of 3 tokens, the scores of 2"):
        tip.selected_loss(scores_of(1.0, 2.0), selection_of([1.0, 1.0, 0.0]))


def test_scores_without_a_divergence_are_refused():
    with pytest.raises(ValueError, match="statistic 'divergence' was not computed"):
        tip.selected_loss(TokenScores(entropy=torch.ones(2)), selection_of([1.0, 1.0]))


# The fused way gives what the other gives.


def fused(student, teacher, weight, **options):
    tensors, student = leaves(student)
    loss = tip.fused_divergence_loss(student, teacher, weight, **options)
    loss.backward()
    return loss.detach(), [None if tensor is None else tensor.grad for tensor in tensors]


def oracle(student, teacher, weight, denominator=None, **options):
    tensors, student = leaves(student)
    scores = tip.token_scores(student, teacher, impl="reference", fields=["divergence"], **options)
    loss = (scores.divergence * weight).sum() / (weight.sum() if denominator is None else denominator)
    loss.backward()
    return loss.detach(), [None if tensor is None else tensor.grad for tensor in tensors]


def oracle_loss(student, teacher, weight, **options):
    scores = tip.token_scores(student, teacher, impl="reference", fields=["divergence"], **options)
    return (scores.divergence * weight).sum() / weight.sum()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("size", [(1, 37), (3, 2), (257, 37), (300, 2111)], ids=str)
@pytest.mark.parametrize("head", [{}, {"bias": True, "softcap": 3.0, "logit_scale": 1.3}], ids=["plain", "softcap"])
def test_fused_is_the_reference_in_float64(size, divergence, head):
    student, teacher = make_pair(*size, **head)
    weight = torch.rand(size[0], generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    options = {"divergence": divergence, "beta": 0.3, "temperature": 0.7, "denominator": 11.0}
    loss, gradients = fused(student, teacher, weight, **options)
    expected_loss, expected = oracle(student, teacher, weight, **options)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-10, atol=1e-14)
    for value, truth in zip(gradients, expected, strict=True):
        assert (value is None) == (truth is None)
        if value is not None:
            torch.testing.assert_close(value, truth, rtol=1e-8, atol=1e-13)


@pytest.fixture
def small_blocks(monkeypatch):
    """Several tiles and blocks of rows, the first of which is held in the weight gradient's memory."""
    monkeypatch.setattr(chunked, "CPU_TILE", (512, 2**12))
    monkeypatch.setattr(chunked, "CPU_WORKSPACE", 2**17)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("trained", [(True, True, True), (True, False, False), (False, True, False)], ids=str)
@pytest.mark.parametrize("width", [24, 23, 2, 1])
@pytest.mark.parametrize("rows", [1, 11, 12, 13, 14, 37])
def test_blocks_held_where_the_weight_gradient_will_be(rows, width, trained):
    student, teacher = make_pair(rows, 1021, bias=True, logit_scale=1.3, teacher_vocabulary=1000)
    student = replace(student, hidden=student.hidden[:, :width], weight=student.weight[:, :width])
    student.bias[5] = teacher.bias[5] = -math.inf
    weight = torch.rand(rows, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    results = []
    for loss in (tip.fused_divergence_loss, oracle_loss):
        tensors, head = leaves(student)
        for tensor, need in zip(tensors, trained, strict=True):
            tensor.requires_grad_(need)
        value = loss(head, teacher, weight, temperature=0.7)
        value.backward()
        results.append([value.detach(), *(tensor.grad for tensor in tensors)])
    for value, truth in zip(*results, strict=True):
        assert (value is None) == (truth is None)
        if value is not None:
            torch.testing.assert_close(value, truth, rtol=1e-8, atol=1e-13)


def test_the_first_block_takes_no_memory_of_its_own(monkeypatch):
    monkeypatch.setattr(chunked, "CPU_TILE", (512, 2**14))
    student, teacher = make_pair(12, 50_000, torch.float32)
    logits = 2 * 12 * 50_000 * 4
    for head, least, most in (
        (leaves(student)[1], student.weight.nbytes, student.weight.nbytes + logits // 4),
        (replace(student, hidden=student.hidden.clone().requires_grad_()), logits, logits + logits // 4),
    ):
        peak = peak_bytes(lambda head=head: tip.fused_divergence_loss(head, teacher).backward())
        assert least <= peak <= most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_fused_is_no_less_exact_than_the_naive_computation(dtype, divergence):
    student, teacher = (to(head, dtype) for head in make_pair(67, 1021, bias=True))
    weight = torch.ones(67)
    _, exact = oracle(to(student, torch.float64), to(teacher, torch.float64), weight.double(), divergence=divergence)
    _, rounded = oracle(student, teacher, weight.to(dtype), divergence=divergence)
    _, gradients = fused(student, teacher, weight, divergence=divergence)
    for value, truth, naive in zip(gradients, exact, rounded, strict=True):
        scale = truth.abs().max()
        # twice: float32 on both sides, in another order; half an epsilon: the rounding of the result itself
        times = 2 if dtype == torch.float32 else 1
        allowed = max(times * ((naive.double() - truth).abs().max() / scale), torch.finfo(dtype).eps / 2)
        assert value.dtype == dtype
        assert (value.double() - truth).abs().max() / scale <= allowed


def test_fused_follows_the_gradient_that_comes_in():
    student, teacher = make_pair(5, 19)
    (hidden, weight, _), head = leaves(student)
    (3 * tip.fused_divergence_loss(head, teacher)).backward()
    _, (expected_hidden, expected_weight, _) = fused(student, teacher, None)
    torch.testing.assert_close(hidden.grad, 3 * expected_hidden)
    torch.testing.assert_close(weight.grad, 3 * expected_weight)


def test_a_float16_gradient_survives_the_scale_of_a_grad_scaler():
    """It starts at 2¹⁶, which float16 cannot hold, and the unscaled gradient of one of 10⁶ tokens vanishes in it."""
    gradients = []
    for dtype in (torch.float32, torch.float16):
        draw = torch.Generator().manual_seed(0)
        hidden, weight, teacher = (torch.randn(size, 16, generator=draw) for size in (9, 37, 9))
        hidden = hidden.half().to(dtype).requires_grad_()
        loss = tip.fused_divergence_loss(Head(hidden, weight), Head(teacher, weight), denominator=1e6)
        (loss * 2.0**16).backward()
        gradients.append(hidden.grad.float())
    # a rounding to float16, subnormal ones too
    torch.testing.assert_close(gradients[1], gradients[0], rtol=2e-3, atol=1e-6)


def test_fused_projects_each_row_once():
    student, teacher = make_pair(40, 301, torch.float32)
    of_student, of_teacher = (2 * 40 * 301 * width for width in (24, 40))
    _, trained = leaves(student)
    frozen = replace(student, hidden=student.hidden.clone().requires_grad_())
    for head, projections in ((trained, 3), (frozen, 2), (student, 1)):

        def run(head=head):
            loss = tip.fused_divergence_loss(head, teacher)
            if loss.requires_grad:
                loss.backward()

        assert matmul_flops(run) == projections * of_student + of_teacher


def test_fused_holds_no_full_logits():
    peaks = {}
    for rows in (512, 2048):
        student, teacher = make_pair(rows, 16384, torch.float32)
        _, head = leaves(student)
        peak = peak_bytes(lambda head=head, teacher=teacher: tip.fused_divergence_loss(head, teacher).backward())
        peaks[rows] = peak - head.weight.nbytes - head.hidden.nbytes
    assert peaks[2048] < 0.6 * 2048 * 16384 * 4
    assert peaks[2048] < 1.2 * peaks[512]


def test_fused_gives_statistics_of_the_same_pass():
    student, teacher = make_pair(7, 53, torch.float32)
    tokens = torch.arange(7)
    fields = [name for name, _ in tip.token_scores(student, teacher, token_ids=tokens).present()]
    fields += ["jsd", "hellinger", "gradient_norm", "signal_to_curvature"]
    _, scores = tip.fused_divergence_loss(student, teacher, fields=fields, token_ids=tokens)
    expected = tip.token_scores(student, teacher, fields=fields, token_ids=tokens)
    assert [name for name, _ in scores.present()] == [name for name, _ in expected.present()]
    for name, value in scores.present():
        torch.testing.assert_close(value, getattr(expected, name).detach(), rtol=1e-4, atol=1e-6)
        assert not value.requires_grad


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_fused_of_no_row_is_0_and_reaches_the_graph(impl):
    student, teacher = make_pair(0, 19, torch.float32)
    (hidden, weight, _), head = leaves(student)
    loss, scores = tip.fused_divergence_loss(head, teacher, fields=["entropy"], denominator=5, impl=impl)
    loss.backward()
    assert loss.item() == 0.0
    assert len(scores.entropy) == 0
    assert hidden.grad.shape == (0, 24)
    assert not weight.grad.any()


def test_a_second_backward_of_the_fused_loss_says_why_not():
    student, teacher = make_pair(3, 9)
    _, head = leaves(student)
    loss = tip.fused_divergence_loss(head, teacher)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="handed out already"):
        loss.backward()


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_an_infinite_loss_names_its_token(impl):
    student = Head(torch.eye(3), torch.randn(5, 3, generator=torch.Generator().manual_seed(0)))
    teacher = replace(student, bias=torch.tensor([0.0, 0.0, -math.inf, 0.0, 0.0]))
    with pytest.raises(NonFiniteLogitsError, match="token 0 of 3: the divergence is infinite"):
        tip.fused_divergence_loss(student, teacher, impl=impl)
    assert math.isfinite(tip.fused_divergence_loss(student, teacher, divergence="jsd", impl=impl))


# Score, select and loss in one pass, against the same choice of the same tokens, projected again.

GROUPS = {"one": [37], "several": [5, 0, 12, 1, 19], "many": [3] * 12 + [1], "long": [1, 30, 6]}


def chosen_by(rule, retention, lengths, **options):
    """How a rule chooses inside each group."""
    group = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))

    def choose(scores, tokens):
        numbers = group[tokens].unique().tolist()
        generators = [torch.Generator().manual_seed(number) for number in numbers]
        return tip.select(scores, rule, retention, rollout=group[tokens], generator=generators, **options)

    return choose


def choosing(weight):
    """How the tokens of a weight above 0 are chosen."""
    return lambda _, tokens: selection_of(weight[tokens])


def chosen(student, teacher, choose, lengths, **options):
    tensors, student = leaves(student)
    loss, scores, selection = fused_selected_loss(student, teacher, choose, lengths, **options)
    loss.backward()
    return loss.detach(), [None if tensor is None else tensor.grad for tensor in tensors], scores, selection


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("rows", [1, 5, 1000], ids="products of {} rows".format)
@pytest.mark.parametrize("head", [{}, {"bias": True, "softcap": 3.0, "logit_scale": 1.3}], ids=["plain", "softcap"])
@pytest.mark.parametrize("lengths", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_one_pass_is_the_two_in_float64(divergence, lengths, head, rows, monkeypatch):
    monkeypatch.setattr(chunked, "CHOSEN_ROWS", rows)
    student, teacher = make_pair(37, 1021, **head)
    options = {"divergence": divergence, "beta": 0.3, "temperature": 0.7}
    fields = ["entropy_norm", "entropy", "reverse_kl", "gradient_norm"]
    expected = reference(student, teacher, fields=fields, temperature=0.7)
    for rule, denominator in (("soft_or", None), ("gradient_norm_sampling", 11.0), ("entropy_sampling", None)):
        choose = chosen_by(rule, 0.4, lengths, running=running_of(expected, rule))
        call = {"fields": fields, "denominator": denominator}
        loss, gradients, scores, selection = chosen(student, teacher, choose, lengths, **call, **options)
        for name in fields:
            torch.testing.assert_close(getattr(scores, name), getattr(expected, name), rtol=1e-9, atol=1e-12)
        of_all = choose(expected, slice(0, 37))
        assert torch.equal(selection.mask, of_all.mask)
        assert 0 < selection.mask.sum() < 37
        torch.testing.assert_close(selection.weight, of_all.weight)
        weight = of_all.weight.double()
        truth, of_truth = oracle(
            student, teacher, weight, denominator=of_all.total if denominator is None else denominator, **options
        )
        torch.testing.assert_close(loss, truth, rtol=1e-6, atol=1e-12)  # weights are float32
        for value, exact in zip(gradients, of_truth, strict=True):
            assert (value is None) == (exact is None)
            if value is not None:
                torch.testing.assert_close(value, exact, rtol=1e-6, atol=1e-12)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("trained", [(True, True, True), (True, False, False), (False, True, False)], ids=str)
@pytest.mark.parametrize("width", [24, 2, 1])
def test_one_pass_of_what_is_trained_and_where_a_weight_is_infinite(width, trained):
    student, teacher = make_pair(37, 1021, bias=True, logit_scale=1.3, teacher_vocabulary=1000)
    student = replace(student, hidden=student.hidden[:, :width], weight=student.weight[:, :width].clone())
    student.weight[5], student.bias[5], teacher.bias[5] = -math.inf, -math.inf, -math.inf
    student = replace(student, hidden=student.hidden.abs())
    results = []
    for impl in ("chunked", "reference"):
        tensors, head = leaves(student)
        for tensor, need in zip(tensors, trained, strict=True):
            tensor.requires_grad_(need)
        choose = chosen_by("divergence", 0.3, GROUPS["several"])
        loss, _, _ = fused_selected_loss(
            head, teacher, choose, GROUPS["several"], fields=["reverse_kl"], denominator=7.0, impl=impl
        )
        loss.backward()
        results.append([loss.detach(), *(tensor.grad for tensor in tensors)])
    for value, truth in zip(*results, strict=True):
        assert (value is None) == (truth is None)
        if value is not None:
            assert value.isfinite().all()
            torch.testing.assert_close(value, truth.nan_to_num(0.0), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("share", [0.5, 0.1, 1.0])
def test_one_pass_projects_all_once_and_differentiates_what_is_kept(share):
    lengths = [20, 20]
    student, teacher = make_pair(40, 301, torch.float32)
    of_student, of_teacher = (2 * 301 * width for width in (24, 40))
    _, head = leaves(student)

    def run(**options):
        choose = chosen_by("divergence", share, lengths)
        fused_selected_loss(head, teacher, choose, lengths, fields=["reverse_kl"], **options)[0].backward()

    kept = round(share * 40)
    assert matmul_flops(run) == 40 * (of_student + of_teacher) + kept * 2 * of_student


def test_groups_that_fit_no_workspace_are_projected_again(monkeypatch):
    lengths = [9, 31]
    student, teacher = make_pair(40, 301, torch.float32)
    choose, call = chosen_by("divergence", 0.5, lengths), {"fields": ["reverse_kl"], "denominator": 3.0}
    loss, gradients, scores, selection = chosen(student, teacher, choose, lengths, **call)
    row = 2 * 301 * 4
    for rows, projected in ((31, 40), (30, 40 + int(selection.mask.sum()))):
        monkeypatch.setattr(chunked, "CPU_CHOICE", rows * row)
        again = []
        flops = matmul_flops(lambda again=again: again.append(chosen(student, teacher, choose, lengths, **call)))
        backward = 2 * int(selection.mask.sum()) * 2 * 301 * 24
        assert flops == projected * 2 * 301 * 64 + backward
        torch.testing.assert_close(again[0][0], loss)
        for value, expected in zip(again[0][1], gradients, strict=True):
            torch.testing.assert_close(value, expected)
        torch.testing.assert_close(again[0][2].reverse_kl, scores.reverse_kl)
        assert torch.equal(again[0][3].mask, selection.mask)


def test_statistics_of_the_likeliest_tokens_come_from_a_pass_of_their_own():
    lengths = GROUPS["several"]
    student, teacher = make_pair(37, 301, torch.float32)
    names, tokens = ["top16_teacher_mass", "argmax_in_top5", "reverse_kl", "teacher_logprob"], torch.arange(37)
    choose = chosen_by("divergence", 0.5, lengths)
    _, _, scores, _ = chosen(student, teacher, choose, lengths, fields=names, token_ids=tokens)
    expected = tip.token_scores(student, teacher, fields=names, token_ids=tokens)
    assert [name for name, _ in scores.present()] == [name for name, _ in expected.present()]
    for name in names:
        torch.testing.assert_close(getattr(scores, name), getattr(expected, name), rtol=1e-4, atol=1e-6)


def test_one_pass_holds_the_logits_of_its_longest_group():
    for lengths in ([40, 40, 40], [8] * 15):
        student, teacher = make_pair(120, 20_000, torch.float32)
        (_, weight, _), head = leaves(student)
        choose = chosen_by("divergence", 0.5, lengths)
        # the first rows lie where the lm_head's gradient will be; 16 MiB hold more than a group of eight
        peak = peak_bytes(
            lambda head=head, teacher=teacher, choose=choose, lengths=lengths: fused_selected_loss(
                head, teacher, choose, lengths, fields=["reverse_kl"], denominator=9.0
            )[0].backward()
        )
        longest = max(max(lengths) * 2 * 20_000 * 4, chunked.CPU_WORKSPACE)
        assert peak <= weight.nbytes + 1.5 * longest


def test_one_pass_over_nothing_is_0_and_reaches_the_graph():
    for rows, lengths, impl in ((0, [], "auto"), (0, [0, 0], "auto"), (3, [3], "auto")):
        student, teacher = make_pair(rows, 19, torch.float32)
        (hidden, weight, _), head = leaves(student)
        loss, scores, selection = fused_selected_loss(
            head, teacher, choosing(torch.zeros(rows)), lengths, fields=["entropy"], impl=impl
        )
        loss.backward()
        assert loss.item() == 0.0
        assert len(scores.entropy) == len(selection.mask) == rows
        assert hidden.grad.shape == (rows, 24)
        assert not hidden.grad.any()
        assert not weight.grad.any()


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("kept", [True, False])
def test_of_an_infinite_divergence_only_a_kept_one_is_refused(kept, impl):
    student, teacher = make_pair(6, 19, bias=True)
    student = replace(student, hidden=torch.eye(6, 24, dtype=torch.float64))
    student.bias[3], teacher.bias[3] = -math.inf, -math.inf
    teacher.weight[3] = 0
    student.bias[3] = 0.0  # the student may say it, the teacher may not: infinite at every token
    call = {"divergence": "forward_kl", "fields": ["entropy"], "impl": impl}
    weight = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0, 0.0])
    pick = choosing(weight)
    (hidden, _, _), head = leaves(student)
    loss, _, _ = fused_selected_loss(head, teacher, pick, [2, 4], **call)
    loss.backward()
    assert loss.isfinite()
    assert hidden.grad.isfinite().all()
    assert (hidden.grad != 0).any(1).tolist() == (weight > 0).tolist()
    if kept:
        with pytest.raises(NonFiniteLogitsError, match="token 1 of 6: the divergence is infinite"):
            fused_selected_loss(head, teacher, pick, [2, 4], **{**call, "divergence": "reverse_kl"})


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_logits_that_are_no_numbers_are_refused_before_a_rule_reads_them(impl):
    student, teacher = make_pair(9, 19)
    student.hidden[6, 0] = math.nan
    with pytest.raises(NonFiniteLogitsError, match="token 6 of"):
        fused_selected_loss(
            student, teacher, chosen_by("divergence", 0.5, [4, 5]), [4, 5], fields=["reverse_kl"], impl=impl
        )


def test_groups_and_choices_that_do_not_fit_are_refused():
    student, teacher = make_pair(9, 19)
    choose = chosen_by("divergence", 0.5, [4, 5])
    for lengths in ([4, 4], [10, -1], []):
        with pytest.raises(ValueError, match=re.escape(f"groups of 9 tokens in all, got {lengths}")):
            fused_selected_loss(student, teacher, choose, lengths, fields=["reverse_kl"])
    with pytest.raises(ValueError, match="the choice is of 2 tokens, and 9 were given"):
        fused_selected_loss(student, teacher, lambda *_: selection_of([1.0, 0.0]), [4, 5], fields=["reverse_kl"])
    with pytest.raises(ValueError, match="denominator must be positive"):
        fused_selected_loss(student, teacher, choose, [4, 5], fields=["reverse_kl"], denominator=0.0)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(2), r"weight must be \[3\], one per token, got \[2\]"),
        (torch.tensor([1.0, -1.0, 1.0]), "finite and ≥ 0"),
        (torch.tensor([1.0, math.nan, 1.0]), "finite and ≥ 0"),
        (torch.tensor([1.0, math.inf, 1.0]), "finite and ≥ 0"),
    ],
)
def test_weights_that_are_none_are_refused(weight, message):
    with pytest.raises(ValueError, match=message):
        tip.fused_divergence_loss(*make_pair(3, 9), weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_incoming_scale_is_not_rounded_to_the_gradients_dtype(dtype):
    """1.003 is 1 in bfloat16: the gradients of a scaled loss would be those of the loss."""
    student, teacher = (to(head, dtype) for head in make_pair(9, 101, bias=True))
    tensors, own = leaves(student)
    (tip.fused_divergence_loss(own, teacher) * 1.003).backward()
    exact, own = leaves(to(student, torch.float64))
    (tip.fused_divergence_loss(own, to(teacher, torch.float64), impl="reference") * 1.003).backward()
    for tensor, truth in zip(tensors, exact, strict=True):
        # rounded once: half a step, and the smallest numbers of float16; float32 computed what is rounded
        allowed = truth.grad.abs() * (torch.finfo(dtype).eps / 2 + 1e-5) + 1e-6 * truth.grad.abs().max() + 2**-25
        assert bool(((tensor.grad.double() - truth.grad).abs() <= allowed).all())


@pytest.mark.parametrize("factor", [1.003, 65536.0, 3e-6, 0.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_gradient_is_scaled_in_place_with_one_rounding(dtype, factor):
    gradient = (torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 1e-2).to(dtype)
    factor = torch.tensor(factor, dtype=torch.promote_types(dtype, torch.float32))
    expected = (gradient.double() * factor.double()).to(dtype)
    found = scaled_(gradient, factor)
    assert found.data_ptr() == gradient.data_ptr()
    # a product that float32 rounds first may fall on the other side of a half
    torch.testing.assert_close(found, expected, rtol=torch.finfo(dtype).eps, atol=0)
    assert (found != expected).float().mean() < 0.02
