"""A teacher known by log-probabilities: exact with the whole vocabulary, a lower bound with its likeliest tokens."""

import math
from itertools import pairwise

import pytest
import torch

from tipdistill.score import NonFiniteLogitsError, reference, served
from tipdistill.score.bounds import TAIL_FLOOR
from tipdistill.score.served import BOUNDS, served_divergence_loss, served_scores, unavailable
from tipdistill.types import Head, TeacherLogprobs

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
    found = served_scores(student, served_by(teacher, sampled), ALL, temperature=temperature, token_ids=sampled)
    for name in ALL:
        torch.testing.assert_close(found.require(name), wanted.require(name), rtol=1e-9, atol=1e-12, msg=name)


def test_float32_log_probabilities_are_exact_to_float32(monkeypatch):
    monkeypatch.setattr(served, "TILE", 4 * V * 5)  # tiles of 5 rows
    student, teacher, sampled = pair()
    wanted = expected(student, teacher, sampled, ALL)
    half = Head(*(value.float() for value in (student.hidden, student.weight, student.bias)), 0.9, 15.0)
    given = served_by(teacher, sampled)
    given = TeacherLogprobs(given.logprob.float(), None, given.sampled.float())
    found = served_scores(half, given, ALL, token_ids=sampled)
    for name in ALL:
        assert found.require(name).dtype == torch.float32
        # a few units in the last place of the largest logits, squared once in signal_to_curvature
        torch.testing.assert_close(found.require(name).double(), wanted.require(name), rtol=2e-4, atol=2e-5, msg=name)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("k", [1, 5, 20, V - 1])
def test_likeliest_tokens_bound_from_below_and_leave_the_students_own_exact(k, seed):
    student, teacher, sampled = pair(seed=seed)
    names = (*DIVERGENCES, "hellinger", "teacher_entropy")
    fields = (*names, "entropy", "entropy_norm", "student_logprob", "teacher_logprob")
    wanted = expected(student, teacher, sampled, fields)
    found = served_scores(student, served_by(teacher, sampled, k), fields, token_ids=sampled)
    for name in names:
        assert (found.require(name) <= wanted.require(name) - 2 * TAIL_FLOOR * math.log(TAIL_FLOOR)).all(), name
        assert (found.require(name) >= 0).all()
    assert (found.reverse_kl < wanted.reverse_kl - 1e-3).any() or k == V - 1
    for name in set(fields) - set(names):
        torch.testing.assert_close(found.require(name), wanted.require(name), rtol=1e-9, atol=1e-12)


def test_more_tokens_give_a_tighter_bound():
    student, teacher, sampled = pair()
    means = [
        served_scores(student, served_by(teacher, sampled, k), ["reverse_kl"]).reverse_kl for k in (1, 4, 16, 40, V)
    ]
    for looser, tighter in pairwise(means):
        assert (looser <= tighter + 1e-9).all()


@pytest.mark.parametrize("name", [*DIVERGENCES, "hellinger", "teacher_entropy"])
def test_all_tokens_as_likeliest_ones_are_equal_to_the_whole(name):
    student, teacher, sampled = pair()
    found = served_scores(student, served_by(teacher, sampled, V), [name])
    torch.testing.assert_close(
        found.require(name), expected(student, teacher, sampled, [name]).require(name), rtol=1e-9, atol=1e-9
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
    monkeypatch.setattr(served, "TILE", 4 * V * tile)
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
    for found, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-10)


def test_statistics_come_with_the_loss():
    student, teacher, sampled = pair()
    given, fields = served_by(teacher, sampled, 8), ("entropy", "reverse_kl")
    _, scores = served_divergence_loss(student, given, torch.ones(N), denominator=1.0, fields=fields)
    apart = served_scores(student, given, fields)
    assert all(torch.equal(scores.require(name), apart.require(name)) for name in fields)


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
    found = served_scores(student, served_by(teacher, sampled, 16), ["argmax_in_top5", "top16_overlap"])
    assert torch.equal(found.argmax_in_top5, wanted.argmax_in_top5)
    torch.testing.assert_close(found.top16_overlap, wanted.top16_overlap)


def test_what_likeliest_tokens_cannot_tell_is_refused():
    student, teacher, sampled = pair()
    given = served_by(teacher, sampled, 8)
    with pytest.raises(ValueError, match="gradient_norm cannot be had"):
        served_scores(student, given, ["entropy", "gradient_norm"])
    with pytest.raises(ValueError, match=r"temperature = 0\.7 needs the teacher's whole vocabulary"):
        served_scores(student, given, ["entropy"], temperature=0.7)
    with pytest.raises(ValueError, match="of 22 tokens, not 23"):
        served_scores(student, given.map(lambda value: value[1:]), ["entropy"])
    assert unavailable(ALL, 5) == [
        *("gradient_norm", "signal_to_curvature", "top16_forward_kl", "top16_teacher_mass", "top16_overlap")
    ]
    assert unavailable([*BOUNDS], 1) == []


def test_padding_rows_of_the_teacher_count_as_others():
    student, teacher, sampled = pair(vocabulary=40, teacher_vocabulary=V)
    given = served_by(teacher, sampled, V)
    found = served_scores(student, given, ["reverse_kl"]).reverse_kl
    assert torch.isfinite(found).all()
    assert (found >= 0).all()


def test_nan_logits_name_the_token(monkeypatch):
    monkeypatch.setattr(served, "TILE", 4 * V * 5)
    student, teacher, sampled = pair()
    student.hidden[13, 2] = math.nan
    for given in (served_by(teacher, sampled), served_by(teacher, sampled, 4)):
        with pytest.raises(NonFiniteLogitsError, match="token 13 of 23"):
            served_scores(student, given, ["entropy"])
        with pytest.raises(NonFiniteLogitsError, match="token 13 of 23"):
            served_divergence_loss(student, given, torch.ones(N), denominator=1.0)
