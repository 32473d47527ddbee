"""top_tokens against torch.topk of the oracle's logits, at sizes that fit no tile."""

from dataclasses import replace

import pytest
import torch
from heads import make_head, to
from measure import peak_bytes

from tipdistill.score import chunked, reference, top_tokens
from tipdistill.score.top import top_of_both, top_of_served
from tipdistill.types import TeacherLogprobs


@pytest.mark.parametrize("vocabulary", [5, 7, 2047, 2049, 4100])
@pytest.mark.parametrize(
    ("temperature", "options"), [(1.0, {}), (0.7, {"bias": True, "softcap": 5.0, "logit_scale": 0.5})]
)
def test_as_topk_of_the_logits(vocabulary, temperature, options):
    head = make_head(300, vocabulary, 24, seed=1, **options)
    expected = torch.softmax(reference.logits(head, vocabulary, temperature), -1).topk(5)
    top = top_tokens(head, 5, temperature)
    assert torch.equal(top.token_ids, expected.indices)
    torch.testing.assert_close(top.probability, expected.values)


def test_in_half_precision_the_logits_are_those_of_float32():
    head = to(make_head(70, 3000, 24, seed=2), torch.bfloat16)
    exact = reference.logits(replace(head, hidden=head.hidden.float(), weight=head.weight.float()), 3000)
    top = top_tokens(head)
    assert top.probability.dtype == torch.float32
    torch.testing.assert_close(top.probability, torch.softmax(exact, -1).topk(5).values, rtol=1e-5, atol=1e-7)


def test_rows_beyond_the_shared_vocabulary_are_left_out():
    head = make_head(50, 2500, 24, seed=3)
    cut = replace(head, weight=head.weight[:2100])
    for name in ("token_ids", "probability"):
        assert torch.equal(getattr(top_tokens(head, vocabulary=2100), name), getattr(top_tokens(cut), name))


def test_impossible_tokens_have_probability_0_and_come_last():
    head = replace(make_head(3, 6, 24, seed=4), bias=torch.tensor([0.0, -torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]))
    top = top_tokens(head, 5)
    assert (top.probability[:, 3:] == 0).all()
    torch.testing.assert_close(top.probability.sum(1), torch.ones(3, dtype=torch.float64))


def test_no_token():
    head = make_head(0, 50, 24, seed=5)
    assert top_tokens(head).token_ids.shape == (0, 5)


def test_the_logits_are_never_held_at_once():
    rows, vocabulary = 512, 40_000
    head = make_head(rows, vocabulary, 24, seed=6, dtype=torch.float32)
    tile = 4 * chunked.CPU_TILE[1]
    # the tile, its exponentials, and [N, k] of results
    assert peak_bytes(lambda: top_tokens(head)) < 4 * tile < 0.2 * 4 * rows * vocabulary


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k must be between 1 and the vocabulary"),
        ({"k": 51}, "k must be between 1 and the vocabulary"),
        ({"vocabulary": 51}, "vocabulary must be between 1 and the 50 rows"),
        ({"temperature": 0}, "temperature must be a positive number"),
    ],
    ids=str,
)
def test_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        top_tokens(make_head(2, 50, 24, seed=7), **options)


@pytest.mark.parametrize(("rows", "temperature"), [(70, 1.0), (50, 0.7), (4, 1.0)])
def test_of_a_whole_vocabulary_over_the_wire_as_of_both_heads(rows, temperature, monkeypatch):
    monkeypatch.setattr("tipdistill.score.top._GATHERED", 3 * rows)  # tiles of a few tokens
    student, teacher = make_head(20, 60, 24, seed=8), make_head(20, rows, 16, seed=9)
    logprob = torch.log_softmax(reference.logits(teacher, rows), -1)
    served = TeacherLogprobs(logprob, None, logprob[:, 0])
    for found, wanted in zip(
        top_of_served(student, served, 5, temperature), top_of_both(student, teacher, 5, temperature), strict=True
    ):
        assert torch.equal(found.token_ids, wanted.token_ids)
        torch.testing.assert_close(found.probability, wanted.probability)


def test_of_known_tokens_those_that_the_student_has_as_they_stand():
    student = make_head(3, 8, 24, seed=10)
    logprob = torch.tensor([[0.4, 0.3, 0.2, 0.05], [0.5, 0.3, 0.1, 0.0], [0.3, 0.3, 0.3, 0.1]]).log()
    # the last column is the token that was written, where it is none of the likeliest; 8 and 9 pad the teacher's
    ids = torch.tensor([[2, 8, 7, 1], [5, 0, 3, -1], [9, 8, -1, 4]])
    of_student, of_teacher = top_of_served(student, TeacherLogprobs(logprob, ids, logprob[:, 0]), 5)
    assert of_teacher.token_ids.tolist() == [[2, 7, -1, -1, -1], [5, 0, 3, -1, -1], [-1] * 5]
    expected = torch.tensor([[0.4, 0.2, 0.0, 0.0, 0.0], [0.5, 0.3, 0.1, 0.0, 0.0], [0.0] * 5])
    torch.testing.assert_close(of_teacher.probability, expected)
    assert torch.equal(of_student.token_ids, top_tokens(student, 5).token_ids)


@pytest.mark.parametrize("columns", [None, 1, 3])
def test_no_token_over_the_wire(columns):
    ids = None if columns is None else torch.zeros(0, columns, dtype=torch.int64)
    nothing = TeacherLogprobs(torch.zeros(0, columns or 50), ids, torch.zeros(0))
    for top in top_of_served(make_head(0, 50, 24, seed=5), nothing):
        assert top.token_ids.shape == top.probability.shape == (0, 5)
