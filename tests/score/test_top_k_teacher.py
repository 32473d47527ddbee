"""A teacher known by log-probabilities: exact with its whole vocabulary, lower bounds with its k likeliest tokens.

Both fronts, from logits and from hidden states, against the oracle on k + 1 outcomes and as bounds of the whole.
"""

import math
from itertools import pairwise

import pytest
import torch
from outcomes import oracle, outcomes
from torch.utils._python_dispatch import TorchDispatchMode

from tipdistill.score import NonFiniteLogitsError, reference, top_k_outcomes, top_k_teacher
from tipdistill.score.top_k_outcomes import LOWER_BOUND, TAIL_FLOOR
from tipdistill.score.top_k_teacher import (
    OF_TOP_K,
    served_divergence_loss,
    served_scores,
    tail_reverse_kl,
    top_k_scores,
    unavailable,
)
from tipdistill.types import Head, TeacherLogprobs

BOUNDS = ("reverse_kl", "forward_kl", "jsd", "hellinger", "teacher_entropy")
FROM_LOGITS = [name for name in OF_TOP_K if not unavailable([name], 16, server=False)]


# The front from logits.


def models(rows=13, vocabulary=37, k=19, scale=3.0, seed=0, dtype=torch.float64):
    """Logits of a student, and a teacher's log-probabilities with its k likeliest tokens in a random order."""
    draw = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(rows, vocabulary, generator=draw, dtype=torch.float64) for _ in range(2))
    teacher = teacher.log_softmax(1)
    ids = teacher.topk(k).indices[:, torch.randperm(k, generator=draw)]
    return student.to(dtype).requires_grad_(), teacher, ids, teacher.gather(1, ids)


@pytest.mark.parametrize(("rows", "vocabulary", "k"), [(13, 37, 19), (1, 5, 1), (7, 300, 16), (6, 24, 23)])
def test_statistics_and_gradient_are_those_of_the_oracle_on_k_plus_one_outcomes(monkeypatch, rows, vocabulary, k):
    monkeypatch.setattr(top_k_teacher, "LOGITS_TILE", 3 * vocabulary)  # chunks of three rows
    monkeypatch.setattr(top_k_outcomes, "TAIL_FLOOR", 1e-300)  # the oracle's tail has none
    logits, teacher, ids, logprobs = models(rows, vocabulary, k)
    scores = top_k_scores(logits, ids, logprobs, BOUNDS)
    divergence, mass = tail_reverse_kl(logits, ids, logprobs)
    expected = oracle(logits, teacher, ids, [*BOUNDS, "divergence"])
    for name in BOUNDS:
        torch.testing.assert_close(getattr(scores, name), getattr(expected, name), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(divergence, scores.reverse_kl, rtol=1e-9, atol=1e-12)
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
    norm = top_k_scores(logits, ids, logprobs, ["gradient_norm"]).gradient_norm
    torch.testing.assert_close(norm, gradient.norm(dim=1), rtol=1e-9, atol=0)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("k", [1, 4, 16])
def test_divergences_are_lower_bounds_that_tighten_with_k_and_the_students_own_are_exact(seed, k):
    logits, teacher, ids, logprobs = models(40, 64, 33, seed=seed)
    unit = torch.eye(64, dtype=torch.float64)
    whole = reference.token_scores(
        Head(logits.detach(), unit), Head(teacher, unit), "reverse_kl", 0.5, 1.0, None, FROM_LOGITS
    )
    best = logprobs.topk(k).indices
    few = top_k_scores(logits, ids.gather(1, best), logprobs.gather(1, best), [*BOUNDS, "entropy", "entropy_norm"])
    more = top_k_scores(logits, ids, logprobs, FROM_LOGITS)
    for name in BOUNDS:
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
    scores = top_k_scores(logits, ids, logprobs, ["entropy", *BOUNDS])
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
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not function._schema.name.startswith("aten::detach"):
            self.made.append(result.numel())
        return result


def test_nothing_of_the_size_of_the_logits_but_their_gradient(monkeypatch):
    rows, vocabulary, k = 50, 400, 8
    monkeypatch.setattr(top_k_teacher, "LOGITS_TILE", 5 * vocabulary)
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
        (["signal_to_curvature"], 19, "'signal_to_curvature' cannot be had"),
        (["top16_overlap"], 15, "16 likeliest tokens, got 15"),
        (["argmax_in_top5"], 4, "5 likeliest tokens, got 4"),
    ],
)
def test_logits_with_too_few_tokens_are_refused(fields, k, message):
    logits, _, ids, logprobs = models()
    with pytest.raises(ValueError, match=message):
        top_k_scores(logits, ids[:, :k], logprobs[:, :k], fields)


def test_logits_and_tokens_of_different_shapes_are_refused():
    logits, _, ids, logprobs = models(k=37)
    with pytest.raises(ValueError, match="tokens leave no tail"):
        top_k_scores(logits, ids, logprobs, ["entropy"])
    with pytest.raises(ValueError, match=r"\[N, k\]"):
        top_k_scores(logits, ids, logprobs[:, :3], ["entropy"])


# The front from hidden states.

N, V, H = 23, 61, 7
DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")
ALL = (
    *("entropy", "entropy_norm", "teacher_entropy", "reverse_kl", "forward_kl", "jsd", "hellinger", "gradient_norm"),
    *("signal_to_curvature", "student_logprob", "teacher_logprob", "top16_forward_kl", "top16_teacher_mass"),
    *("top16_overlap", "argmax_in_top5"),
)


def pair(dtype=torch.float64, vocabulary=V, teacher_vocabulary=V, seed=0, scale=2.0, bias=True):
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    student = Head(normal(N, H), scale * normal(vocabulary, H), normal(vocabulary) if bias else None, 0.9, 15.0)
    teacher = Head(normal(N, H + 2), scale * normal(teacher_vocabulary, H + 2))
    sampled = torch.randint(min(vocabulary, teacher_vocabulary), (N,), generator=draw)
    return student, teacher, sampled


def served_by(teacher, sampled, k=None):
    """What a server would send: all log-probabilities, or the k largest and the sampled token's."""
    log_t = torch.log_softmax(reference.logits(teacher, len(teacher.weight)), -1)
    of_sampled = log_t.gather(1, sampled[:, None])
    if k is None:
        return TeacherLogprobs(log_t, None, of_sampled[:, 0])
    top = log_t.topk(k)
    inside = (top.indices == sampled[:, None]).any(1, keepdim=True)
    ids = torch.cat([top.indices, torch.where(inside, -1, sampled[:, None])], 1)
    values = torch.cat([top.values, torch.where(inside, -math.inf, of_sampled)], 1)
    return TeacherLogprobs(values, ids, of_sampled[:, 0])


def expected(student, teacher, sampled, fields, temperature=1.0, divergence="reverse_kl", beta=0.5):
    return reference.token_scores(student, teacher, divergence, beta, temperature, sampled, fields)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("sizes", [(V, V), (V, V + 5), (V + 5, V)], ids=["equal", "student-shorter", "teacher-shorter"])
def test_the_whole_vocabulary_is_exact(sizes, temperature):
    student, teacher, sampled = pair(vocabulary=sizes[0], teacher_vocabulary=sizes[1])
    wanted = expected(student, teacher, sampled, ALL, temperature)
    scores = served_scores(student, served_by(teacher, sampled), ALL, temperature=temperature, token_ids=sampled)
    for name in ALL:
        torch.testing.assert_close(scores.require(name), wanted.require(name), rtol=1e-9, atol=1e-12, msg=name)


def test_float32_log_probabilities_are_exact_to_float32(monkeypatch):
    monkeypatch.setattr(top_k_teacher, "HEAD_TILE", V * 5)  # tiles of 5 rows
    student, teacher, sampled = pair()
    wanted = expected(student, teacher, sampled, ALL)
    half = Head(*(value.float() for value in (student.hidden, student.weight, student.bias)), 0.9, 15.0)
    given = served_by(teacher, sampled)
    given = TeacherLogprobs(given.logprob.float(), None, given.sampled.float())
    scores = served_scores(half, given, ALL, token_ids=sampled)
    for name in ALL:
        assert scores.require(name).dtype == torch.float32
        # a few units in the last place of the largest logits, squared once in signal_to_curvature
        torch.testing.assert_close(scores.require(name).double(), wanted.require(name), rtol=2e-4, atol=2e-5, msg=name)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("k", [1, 5, 20, V - 1])
def test_likeliest_tokens_bound_from_below_and_leave_the_students_own_exact(k, seed):
    student, teacher, sampled = pair(seed=seed)
    fields = (*BOUNDS, "entropy", "entropy_norm", "student_logprob", "teacher_logprob")
    wanted = expected(student, teacher, sampled, fields)
    scores = served_scores(student, served_by(teacher, sampled, k), fields, token_ids=sampled)
    for name in BOUNDS:
        assert (scores.require(name) <= wanted.require(name) - 2 * TAIL_FLOOR * math.log(TAIL_FLOOR)).all(), name
        assert (scores.require(name) >= 0).all()
    assert (scores.reverse_kl < wanted.reverse_kl - 1e-3).any() or k == V - 1
    for name in set(fields) - set(BOUNDS):
        torch.testing.assert_close(scores.require(name), wanted.require(name), rtol=1e-9, atol=1e-12)


def test_more_tokens_give_a_tighter_bound():
    student, teacher, sampled = pair()
    means = [
        served_scores(student, served_by(teacher, sampled, k), ["reverse_kl"]).reverse_kl for k in (1, 4, 16, 40, V)
    ]
    for looser, tighter in pairwise(means):
        assert (looser <= tighter + 1e-9).all()


@pytest.mark.parametrize("name", BOUNDS)
def test_all_tokens_as_likeliest_ones_are_equal_to_the_whole(name):
    student, teacher, sampled = pair()
    scores = served_scores(student, served_by(teacher, sampled, V), [name])
    torch.testing.assert_close(
        scores.require(name), expected(student, teacher, sampled, [name]).require(name), rtol=1e-9, atol=1e-9
    )


def buckets(student, given):
    """The coarsened distributions one token at a time, as they are defined."""
    log_s = torch.log_softmax(reference.logits(student, len(student.weight)), -1)
    rows = []
    for row in range(len(log_s)):
        ids = [int(i) for i in given.token_ids[row] if 0 <= i < log_s.shape[1]]
        others = [i for i in range(log_s.shape[1]) if i not in ids]
        u = torch.stack([*log_s[row, ids], log_s[row, others].logsumexp(0)])
        logprob = [p for i, p in zip(given.token_ids[row], given.logprob[row], strict=True) if 0 <= i < log_s.shape[1]]
        v = torch.stack(logprob).exp()
        rows.append((u.exp(), torch.cat([v, (1 - v.sum()).reshape(1)])))
    return rows


def plain_divergence(kind, u, v, beta):
    m = (1 - beta) * u + beta * v
    return {
        "reverse_kl": lambda: (u * (u / v).log()).sum(),
        "forward_kl": lambda: (v * (v / u).log()).sum(),
        "jsd": lambda: beta * (v * (v / m).log()).sum() + (1 - beta) * (u * (u / m).log()).sum(),
    }[kind]()


@pytest.mark.parametrize("tile", [5, 1000])
@pytest.mark.parametrize("k", [None, 6])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_loss_and_gradients_are_autograds_in_float64(kind, k, tile, monkeypatch):
    monkeypatch.setattr(top_k_teacher, "HEAD_TILE", V * tile)
    student, teacher, sampled = pair()
    given = served_by(teacher, sampled, k)
    weight = torch.rand(N, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    losses, grads = [], []
    for ours in (True, False):
        leaves = [value.clone().requires_grad_() for value in (student.hidden, student.weight, student.bias)]
        head = Head(*leaves, student.logit_scale, student.softcap)
        if ours:
            loss, _ = served_divergence_loss(head, given, weight, kind, beta=0.3, denominator=9.0)
        elif k is None:
            scores = expected(head, teacher, sampled, ["divergence"], divergence=kind, beta=0.3)
            loss = (scores.divergence * weight).sum() / 9
        else:
            each = [plain_divergence(kind, u, v, 0.3) for u, v in buckets(head, given)]
            loss = (torch.stack(each) * weight).sum() / 9
        loss.backward()
        losses.append(loss.detach())
        grads.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-9, atol=0)
    for ours, autograds in zip(*grads, strict=True):
        torch.testing.assert_close(ours, autograds, rtol=1e-7, atol=1e-10)


def test_statistics_come_with_the_loss():
    student, teacher, sampled = pair()
    given, fields = served_by(teacher, sampled, 8), ("entropy", "reverse_kl")
    _, scores = served_divergence_loss(student, given, torch.ones(N), denominator=1.0, fields=fields)
    apart = served_scores(student, given, fields)
    assert all(torch.equal(scores.require(name), apart.require(name)) for name in fields)


def test_of_no_token_nothing_is_refused():
    """A forward of rollouts in which the student wrote nothing: what kind of teacher it is, no answer tells."""
    nothing = TeacherLogprobs(torch.zeros(0, 1), torch.zeros(0, 1, dtype=torch.int64), torch.zeros(0))
    scores = served_scores(
        Head(torch.zeros(0, 2), torch.randn(4, 2)), nothing, ["signal_to_curvature"], temperature=0.7
    )
    assert scores.signal_to_curvature.shape == (0,)


def test_no_row_is_a_loss_of_0_that_reaches_the_graph():
    head = Head(torch.zeros(0, H, requires_grad=True), torch.randn(V, H, requires_grad=True))
    none = TeacherLogprobs(torch.zeros(0, 4), torch.zeros(0, 4, dtype=torch.int64), torch.zeros(0))
    loss, scores = served_divergence_loss(head, none, torch.zeros(0), denominator=3.0, fields=("entropy",))
    loss.backward()
    assert loss == 0
    assert len(scores.entropy) == 0
    assert not head.weight.grad.any()
    assert len(served_scores(head, none, ["reverse_kl"]).reverse_kl) == 0


def test_ranks_of_likeliest_tokens_are_exact_where_enough_are_known():
    student, teacher, sampled = pair()
    wanted = expected(student, teacher, sampled, ["argmax_in_top5", "top16_overlap"])
    scores = served_scores(student, served_by(teacher, sampled, 16), ["argmax_in_top5", "top16_overlap"])
    assert torch.equal(scores.argmax_in_top5, wanted.argmax_in_top5)
    torch.testing.assert_close(scores.top16_overlap, wanted.top16_overlap)


def test_what_likeliest_tokens_cannot_tell_is_refused():
    student, teacher, sampled = pair()
    given = served_by(teacher, sampled, 8)
    with pytest.raises(ValueError, match="'signal_to_curvature' cannot be had"):
        served_scores(student, given, ["entropy", "signal_to_curvature"])
    with pytest.raises(ValueError, match=r"temperature = 0\.7 needs the teacher's whole vocabulary"):
        served_scores(student, given, ["entropy"], temperature=0.7)
    with pytest.raises(ValueError, match="of 22 tokens, not 23"):
        served_scores(student, given.map(lambda value: value[1:]), ["entropy"])
    assert unavailable(ALL, 5) == [*("signal_to_curvature", "top16_forward_kl", "top16_teacher_mass", "top16_overlap")]
    assert unavailable([name for name in OF_TOP_K if OF_TOP_K[name].gives == LOWER_BOUND], 1) == []


def test_padding_rows_of_the_teacher_count_as_others():
    student, teacher, sampled = pair(vocabulary=40, teacher_vocabulary=V)
    given = served_by(teacher, sampled, V)
    divergence = served_scores(student, given, ["reverse_kl"]).reverse_kl
    assert torch.isfinite(divergence).all()
    assert (divergence >= 0).all()


def test_nan_logits_name_the_token(monkeypatch):
    monkeypatch.setattr(top_k_teacher, "HEAD_TILE", V * 5)
    student, teacher, sampled = pair()
    student.hidden[13, 2] = math.nan
    for given in (served_by(teacher, sampled), served_by(teacher, sampled, 4)):
        with pytest.raises(NonFiniteLogitsError, match="token 13 of 23"):
            served_scores(student, given, ["entropy"])
        with pytest.raises(NonFiniteLogitsError, match="token 13 of 23"):
            served_divergence_loss(student, given, torch.ones(N), denominator=1.0)


# Both fronts.


def of_logits(logits):
    """A head whose hidden states are the logits, so that a gradient at one is a gradient at the other."""
    return Head(logits, torch.eye(logits.shape[1], dtype=logits.dtype))


def with_sampled(ids, logprobs, teacher, sampled=None):
    """A server's answer: the likeliest tokens, the likeliest first, and the sampled one where it is not among them."""
    order = logprobs.argsort(1, descending=True)
    ids, logprobs = ids.gather(1, order), logprobs.gather(1, order)
    sampled = ids[:, 0] if sampled is None else sampled
    inside = (ids == sampled[:, None]).any(1, keepdim=True)
    of_sampled = teacher.gather(1, sampled[:, None])
    return TeacherLogprobs(
        torch.cat([logprobs, torch.where(inside, -math.inf, of_sampled)], 1),
        torch.cat([ids, torch.where(inside, -1, sampled[:, None])], 1),
        of_sampled[:, 0],
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_both_fronts_give_the_same_statistics(dtype):
    logits, teacher, ids, logprobs = models(dtype=dtype)
    teacher, logprobs = teacher.to(dtype), logprobs.to(dtype)
    from_logits = top_k_scores(logits, ids, logprobs, FROM_LOGITS)
    from_hidden = served_scores(of_logits(logits.detach()), with_sampled(ids, logprobs, teacher), FROM_LOGITS)
    tolerance = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-6}
    for name in FROM_LOGITS:
        torch.testing.assert_close(from_hidden.require(name), from_logits.require(name), **tolerance, msg=name)
    divergence, _ = tail_reverse_kl(logits, ids, logprobs)
    head = of_logits(logits.detach().requires_grad_())
    loss, _ = served_divergence_loss(head, with_sampled(ids, logprobs, teacher), torch.ones(13), denominator=1.0)
    loss.backward()
    (gradient,) = torch.autograd.grad(divergence.sum(), logits)
    torch.testing.assert_close(head.hidden.grad, gradient, **tolerance)


@pytest.mark.parametrize("tokens", ["some", "all", "one", "sampled-outside", "teacher-longer"])
def test_gradient_norm_is_that_of_the_served_loss_at_the_logits(tokens):
    k = {"one": 1, "all": 37}.get(tokens, 9)
    logits, teacher, ids, logprobs = models(k=k)
    sampled = teacher.argmin(1) if tokens == "sampled-outside" else None
    given = with_sampled(ids, logprobs, teacher, sampled)
    if tokens == "teacher-longer":  # two of its likeliest tokens are padding rows that the student does not have
        given.token_ids[:, 1:3] += 1000
    head = of_logits(logits.detach().requires_grad_())
    loss, scores = served_divergence_loss(
        head, given, torch.ones(13, dtype=torch.float64), denominator=1.0, fields=("gradient_norm",)
    )
    loss.backward()
    torch.testing.assert_close(scores.gradient_norm, head.hidden.grad.norm(dim=1), rtol=1e-9, atol=1e-12)
    apart = served_scores(head, given, ["gradient_norm"]).gradient_norm
    torch.testing.assert_close(apart, scores.gradient_norm, rtol=0, atol=0)


def test_gradient_norm_bounds_that_of_the_whole_vocabulary_from_neither_side():
    logits, teacher, ids, logprobs = models(rows=200, k=5)
    norm = top_k_scores(logits, ids, logprobs, ["gradient_norm"]).gradient_norm
    heads = of_logits(logits.detach()), of_logits(teacher)
    whole = reference.token_scores(*heads, "reverse_kl", 0.5, 1.0, None, ["gradient_norm"]).gradient_norm
    assert (norm > 1.5 * whole).any()
    assert (whole > 1.5 * norm).any()


def test_an_infinite_divergence_has_an_infinite_gradient():
    logits, teacher, ids, logprobs = models()
    logprobs[2, 3] = -math.inf
    norms = (
        top_k_scores(logits, ids, logprobs, ["gradient_norm"]).gradient_norm,
        served_scores(
            of_logits(logits.detach()), with_sampled(ids, logprobs, teacher), ["gradient_norm"]
        ).gradient_norm,
    )
    for norm in norms:
        assert norm.isinf().tolist() == [row == 2 for row in range(13)]
