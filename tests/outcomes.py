"""The oracle on k + 1 outcomes: the teacher's k likeliest tokens, and all the others together."""

import math

import torch

from tipdistill.score import reference
from tipdistill.types import Head


def outcomes(logits, ids):
    """Log-probabilities of the k tokens and of all others together, by autograd's own operations."""
    log_p = logits.log_softmax(1)
    others = torch.ones_like(log_p, dtype=torch.bool).scatter(1, ids, False)
    tail = log_p.masked_fill(~others, -math.inf).logsumexp(1, keepdim=True)
    return torch.cat([log_p.gather(1, ids), tail], 1)


def oracle(logits, teacher, ids, fields):
    """The reference on distributions over the k + 1 outcomes, whose log-probabilities are its logits."""
    student, of_teacher = outcomes(logits, ids), outcomes(teacher, ids).detach()
    unit = torch.eye(student.shape[1], dtype=student.dtype)
    heads = Head(student, unit), Head(of_teacher, unit)
    return reference.token_scores(*heads, "reverse_kl", 0.5, 1.0, None, fields)
