"""Heads of awkward sizes and contents, for every test of the engine."""

from dataclasses import fields as dataclass_fields
from dataclasses import replace

import torch

import tipdistill as tip
from tipdistill import Head, TokenScores

FIELDS = tuple(field.name for field in dataclass_fields(TokenScores))
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scaled": {"logit_scale": 0.37, "bias": True},
    "softcap": {"softcap": 3.0, "logit_scale": 1.3, "bias": True},
}


def make_head(rows, vocabulary, width, seed, dtype=torch.float64, bias=False, spread=1.0, **options):
    """A head whose logits have a standard deviation of about 2 · spread."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return Head(
        (draw(rows, width) * spread).to(dtype),
        (draw(vocabulary, width) * 2 / width**0.5).to(dtype),
        (draw(vocabulary) / 2).to(dtype) if bias else None,
        **options,
    )


def make_pair(rows, vocabulary, dtype=torch.float64, seed=0, teacher_vocabulary=None, **options):
    """Student of width 24, teacher of width 40, half of whose logits follow the student's, as after some training."""
    student = make_head(rows, vocabulary, 24, seed, dtype, **options)
    teacher = make_head(rows, teacher_vocabulary or vocabulary, 40, seed + 1, dtype, **options)
    shared = min(vocabulary, teacher.weight.shape[0])
    hidden, weight = teacher.hidden.clone(), teacher.weight.clone()
    hidden[:, :24], weight[:shared, :24] = student.hidden, student.weight[:shared]
    return student, replace(teacher, hidden=hidden, weight=weight)


def leaves(head):
    """The head's own differentiable copies, and the head made of them."""
    tensors = [
        None if value is None else value.detach().clone().requires_grad_()
        for value in (head.hidden, head.weight, head.bias)
    ]
    return tensors, replace(head, hidden=tensors[0], weight=tensors[1], bias=tensors[2])


def to(head, dtype):
    return replace(
        head,
        hidden=head.hidden.to(dtype),
        weight=head.weight.to(dtype),
        bias=None if head.bias is None else head.bias.to(dtype),
    )


def reference(student, teacher, fields=FIELDS, **options):
    return tip.token_scores(student, teacher, fields=fields, impl="reference", **options)


def tokens_of(student, teacher=None):
    shared = min(len(head.weight) for head in (student, teacher) if head is not None)
    return torch.randint(shared, (len(student.hidden),), generator=torch.Generator().manual_seed(9))


def gradients(student, teacher, incoming, **options):
    """Gradients of Σ incoming · divergence in the student's hidden states, weight and bias."""
    tensors, student = leaves(student)
    scores = tip.token_scores(student, teacher, fields=["divergence"], **options)
    (scores.require("divergence") * incoming).sum().backward()
    return [None if tensor is None else tensor.grad for tensor in tensors]


def incoming_of(rows, dtype=torch.float64):
    """A gradient for about half of the rows, of both signs, and 0 for the others."""
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(rows, generator=generator, dtype=torch.float64)
    return (values * (torch.rand(rows, generator=generator) < 0.6)).to(dtype)


def error(found, truth):
    """Largest deviation, relative to the largest entry of the truth."""
    return ((found.double() - truth.double()).abs().max() / truth.double().abs().max().clamp(min=1e-300)).item()
