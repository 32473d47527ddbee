"""Statistics from a teacher's likeliest tokens: against the oracle on k + 1 outcomes, and as bounds of the whole."""

import math

import pytest
import torch
from outcomes import oracle, outcomes
from torch.utils._python_dispatch import TorchDispatchMode

from tipdistill.score import bounds, reference
from tipdistill.score.bounds import OF_TOP_K, tail_reverse_kl, top_k_scores
from tipdistill.types import Head

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "hellinger", "teacher_entropy")


def models(rows=13, vocabulary=37, k=19, scale=3.0, seed=0, dtype=torch.float64):
    """Logits of a student, and a teacher's log-probabilities with its k likeliest tokens in a random order."""
    draw = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(rows, vocabulary, generator=draw, dtype=torch.float64) for _ in range(2))
    teacher = teacher.log_softmax(1)
    ids = teacher.topk(k).indices[:, torch.randperm(k, generator=draw)]
    return student.to(dtype).requires_grad_(), teacher, ids, teacher.gather(1, ids)


@pytest.mark.parametrize(("rows", "vocabulary", "k"), [(13, 37, 19), (1, 5, 1), (7, 300, 16), (6, 24, 23)])
def test_statistics_and_gradient_are_those_of_the_oracle_on_k_plus_one_outcomes(monkeypatch, rows, vocabulary, k):
    monkeypatch.setattr(bounds, "_ENTRIES", 3 * vocabulary)  # chunks of three rows
    monkeypatch.setattr(bounds, "TAIL_FLOOR", 1e-300)  # the oracle's tail has none
    logits, teacher, ids, logprobs = models(rows, vocabulary, k)
    found = top_k_scores(logits, ids, logprobs, DIVERGENCES)
    divergence, mass = tail_reverse_kl(logits, ids, logprobs)
    expected = oracle(logits, teacher, ids, [*DIVERGENCES, "divergence"])
    for name in DIVERGENCES:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(divergence, found.reverse_kl, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(mass, outcomes(logits, ids)[:, :-1].exp().sum(1), rtol=1e-9, atol=1e-12)
    weight = torch.rand(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weight[::2] = 0
    (gradient,) = torch.autograd.grad((divergence * weight).sum(), logits)
    (of_oracle,) = torch.autograd.grad((expected.divergence * weight).sum(), logits)
    torch.testing.assert_close(gradient, of_oracle, rtol=1e-9, atol=1e-12)
    assert gradient[::2].abs().max() == 0


def test_gradient_norm_is_the_norm_of_the_gradient():
    logits, _, ids, logprobs = models()
    (gradient,) = torch.autograd.grad(tail_reverse_kl(logits, ids, logprobs)[0].sum(), logits)
    found = top_k_scores(logits, ids, logprobs, ["gradient_norm"]).gradient_norm
    torch.testing.assert_close(found, gradient.norm(dim=1), rtol=1e-9, atol=0)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("k", [1, 4, 16])
def test_divergences_are_lower_bounds_that_tighten_with_k_and_the_students_own_are_exact(seed, k):
    logits, teacher, ids, logprobs = models(40, 64, 33, seed=seed)
    unit = torch.eye(64, dtype=torch.float64)
    whole = reference.token_scores(
        Head(logits.detach(), unit), Head(teacher, unit), "reverse_kl", 0.5, 1.0, None, list(OF_TOP_K)
    )
    best = logprobs.topk(k).indices
    few = top_k_scores(logits, ids.gather(1, best), logprobs.gather(1, best), [*DIVERGENCES, "entropy", "entropy_norm"])
    more = top_k_scores(logits, ids, logprobs, list(OF_TOP_K))
    for name in DIVERGENCES:
        assert (getattr(few, name) <= getattr(more, name) + 1e-12).all()
        assert (getattr(more, name) <= getattr(whole, name) + 1e-12).all()
    for name in ("entropy", "entropy_norm"):
        torch.testing.assert_close(getattr(few, name), getattr(whole, name), rtol=1e-12, atol=1e-12)
    for name in ("top16_overlap", "argmax_in_top5"):
        assert torch.equal(getattr(more, name), getattr(whole, name))


def test_a_confident_teacher_leaves_a_lower_bound_and_finite_gradients():
    """Float32 sums of the top k reach 1 and beyond; the tail must not become 0 or negative."""
    logits, teacher, ids, logprobs = models(scale=30.0, dtype=torch.float32)
    assert (logprobs.float().exp().sum(1) >= 1 - 1e-7).any()
    scores = top_k_scores(logits, ids, logprobs.float(), ["reverse_kl", "gradient_norm"])
    exact = oracle(logits.detach().double(), teacher, ids, ["reverse_kl"]).reverse_kl
    assert (scores.reverse_kl <= exact * (1 + 1e-5) + 1e-5).all()
    (gradient,) = torch.autograd.grad(tail_reverse_kl(logits, ids, logprobs.float())[0].sum(), logits)
    assert torch.isfinite(gradient).all()
    assert torch.isfinite(scores.gradient_norm).all()


def test_tokens_that_are_forbidden():
    """To both: as if they were not there. To the student alone an infinite forward KL, to the teacher a reverse one."""
    logits, _, ids, logprobs = models()
    with torch.no_grad():
        logits[0, ids[0, 3]], logprobs[0, 3] = -math.inf, -math.inf
        logits[1, ids[1, 3]] = -math.inf
        logprobs[2, 3] = -math.inf
        logits[3, 5] = -math.inf  # in the tail, or not
    scores = top_k_scores(logits, ids, logprobs, ["entropy", *DIVERGENCES])
    assert scores.reverse_kl.isinf().tolist() == [row == 2 for row in range(13)]
    assert scores.forward_kl.isinf()[[0, 1, 2]].tolist() == [False, True, False]
    for name in ("entropy", "jsd", "hellinger", "teacher_entropy"):
        assert torch.isfinite(getattr(scores, name)).all()
    divergence, _ = tail_reverse_kl(logits, ids, logprobs)
    (gradient,) = torch.autograd.grad(divergence[[0, 1, 3]].sum(), logits)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("keep_copy", [False, True])
def test_rows_that_are_not_asked_for_are_not_touched(keep_copy):
    """Prompts carry padding: a teacher's rows there may be anything, even one token k times."""
    logits, _, ids, logprobs = models()
    rows = torch.tensor([2, 3, 11])
    ids[[0, 12]], logprobs[[0, 12]] = 0, 0.0
    with torch.no_grad():
        logits[0] = math.nan
    asked = ids[rows], logprobs[rows], ["entropy"]
    entropy = top_k_scores(logits, ids, logprobs, ["entropy"], rows).entropy
    torch.testing.assert_close(entropy, top_k_scores(logits.detach()[rows], *asked).entropy)
    divergence, _ = tail_reverse_kl(logits, ids, logprobs, rows, keep_copy)
    torch.testing.assert_close(divergence, tail_reverse_kl(logits[rows], *asked[:2])[0])
    (gradient,) = torch.autograd.grad(divergence.sum(), logits)
    others = [row for row in range(13) if row not in rows.tolist()]
    assert gradient[others].abs().max() == 0
    assert (gradient[rows].norm(dim=1) > 0).all()


def test_a_copy_survives_what_overwrites_the_logits():
    logits, _, ids, logprobs = models()
    expected = torch.autograd.grad(tail_reverse_kl(logits, ids, logprobs)[0].sum(), logits)[0]
    divergence, _ = tail_reverse_kl(logits, ids, logprobs, keep_copy=True)
    logits.data.zero_()  # as an in-place cross-entropy does, unseen by autograd
    torch.testing.assert_close(torch.autograd.grad(divergence.sum(), logits)[0], expected)


class Largest(TorchDispatchMode):
    """Elements of every tensor that an operation made, the largest first."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and not function._schema.name.startswith("aten::detach"):
            self.made.append(found.numel())
        return found


def test_nothing_of_the_size_of_the_logits_but_their_gradient(monkeypatch):
    rows, vocabulary, k = 50, 400, 8
    monkeypatch.setattr(bounds, "_ENTRIES", 5 * vocabulary)
    logits, _, ids, logprobs = models(rows, vocabulary, k)
    with Largest() as largest:
        top_k_scores(logits, ids, logprobs, ["entropy", "reverse_kl", "gradient_norm"])
        divergence, _ = tail_reverse_kl(logits, ids, logprobs)
    assert max(largest.made) == 5 * vocabulary
    with Largest() as largest:
        torch.autograd.grad(divergence.sum(), logits)
    whole = [elements for elements in largest.made if elements > 5 * vocabulary]
    # the gradient, and what assigning chunks to it returns, which is the gradient again
    assert set(whole) == {rows * vocabulary}
    assert len(whole) <= 1 + rows // 5


def test_half_precision_logits_are_computed_with_in_float32():
    logits, _, ids, logprobs = models()
    half = logits.detach().bfloat16().requires_grad_()
    scores = top_k_scores(half, ids, logprobs.float(), ["reverse_kl"])
    same = top_k_scores(half.detach().float(), ids, logprobs.float(), ["reverse_kl"])
    assert scores.reverse_kl.dtype == torch.float32
    torch.testing.assert_close(scores.reverse_kl, same.reverse_kl, rtol=1e-6, atol=1e-6)
    divergence, _ = tail_reverse_kl(half, ids, logprobs.float())
    assert torch.autograd.grad(divergence.sum(), half)[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("fields", "k", "message"),
    [
        (["signal_to_curvature"], 19, "do not give 'signal_to_curvature'"),
        (["top16_overlap"], 15, "16 likeliest tokens, got 15"),
        (["argmax_in_top5"], 4, "5 likeliest tokens, got 4"),
    ],
)
def test_refusals(fields, k, message):
    logits, _, ids, logprobs = models()
    with pytest.raises(ValueError, match=message):
        top_k_scores(logits, ids[:, :k], logprobs[:, :k], fields)


def test_shapes_that_do_not_fit():
    logits, _, ids, logprobs = models(k=37)
    with pytest.raises(ValueError, match="tokens leave no tail"):
        top_k_scores(logits, ids, logprobs, ["entropy"])
    with pytest.raises(ValueError, match=r"\[N, k\]"):
        top_k_scores(logits, ids, logprobs[:, :3], ["entropy"])
