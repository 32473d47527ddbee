"""Statistics and loss of a student's head against a teacher that is known by log-probabilities, as a server gives them.

Where the whole vocabulary was given, everything is exact. Where only the teacher's k likeliest tokens were (and the
sampled one), both distributions are coarsened to these tokens and one bucket for all others: P ↦ (P(i))_{i ∈ top-k},
1 − Σ P(i). By the data-processing inequality each f-divergence of the coarsened distributions is a lower bound of the
true one, and equal to it where the ratio P_S / P_T is constant inside the bucket.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..types import Head, TeacherLogprobs, TokenScores
from . import reference
from .bounds import log_tail
from .tiles import NEGATIVE
from .tokens import NonFiniteLogitsError

# what the teacher's likeliest tokens tell: each statistic and how
EXACT = {"entropy", "entropy_norm", "student_logprob", "teacher_logprob"}
BOUNDS = {"reverse_kl", "forward_kl", "jsd", "hellinger", "teacher_entropy", "divergence"}
NEEDS_LIKELIEST = {"argmax_in_top5": 5, "top16_overlap": 16}  # exact from this many of the teacher's likeliest tokens
# Bytes of one tile of float32 logits [rows, V]; the statistics hold several of that size.
TILE = 32 * 2**20
# the statistics of `token_scores` by default
DEFAULT_FIELDS = (
    *("entropy", "entropy_norm", "teacher_entropy", "reverse_kl", "forward_kl"),
    *("student_logprob", "teacher_logprob"),
)


def unavailable(fields: Sequence[str], top_k: int) -> list[str]:
    """The statistics among `fields` that a teacher's k likeliest tokens do not tell, not even as bounds.

    Args:
        fields: names of `TokenScores`.
        top_k: k, how many of the teacher's likeliest tokens are known.

    Example:
        >>> unavailable(["entropy", "reverse_kl", "gradient_norm", "top16_overlap"], top_k=8)
        ['gradient_norm', 'top16_overlap']
    """
    return [
        name
        for name in fields
        if name not in EXACT | BOUNDS and (name not in NEEDS_LIKELIEST or NEEDS_LIKELIEST[name] > top_k)
    ]


def served_scores(
    student: Head,
    teacher: TeacherLogprobs,
    fields: Sequence[str] = DEFAULT_FIELDS,
    beta: float = 0.5,
    temperature: float = 1.0,
    token_ids: Tensor | None = None,
) -> TokenScores:
    """Statistics of N tokens against a served teacher, without gradients.

    Args:
        student: hidden states [N, H] and lm_head [V, H].
        teacher: of the same N tokens, on the student's device.
        fields: names of statistics, see `TokenScores`.
        beta: β of the Jensen-Shannon divergence.
        temperature: divides both models' logits; 1 where only the teacher's likeliest tokens are known.
        token_ids: int64 [N], the sampled tokens, where student_logprob is among the fields.

    Returns:
        TokenScores, float32 [N] each (float64 where the hidden states are float64). Of a teacher that is known by its
        likeliest tokens reverse_kl, forward_kl, jsd, hellinger and teacher_entropy are lower bounds.

    Raises:
        ValueError: lengths that differ, a temperature or a statistic that the teacher's likeliest tokens do not allow.

    Example:
        >>> student = Head(torch.zeros(1, 2), torch.randn(4, 2))
        >>> teacher = TeacherLogprobs(torch.tensor([[0.5]]).log(), torch.tensor([[3]]), torch.tensor([0.5]).log())
        >>> round(served_scores(student, teacher, ["reverse_kl"]).reverse_kl.item(), 4)  # ¼ and ¾ against ½ and ½
        0.1308
    """
    _check(student, teacher, fields, temperature)
    with torch.no_grad(), torch.autocast(student.hidden.device.type, enabled=False):
        pieces = []
        for span in _spans(student):
            ids = None if token_ids is None else token_ids[slice(*span)]
            with _naming(span[0], len(teacher)):
                pieces.append(
                    _scores(*_rows(student, teacher, span), "reverse_kl", fields, beta, temperature, ids).detach()
                )
    if not pieces:
        empty = student.hidden.new_zeros(0, dtype=_dtype(student))
        return TokenScores(**dict.fromkeys(fields, empty))
    return TokenScores(**{name: torch.cat([piece.require(name) for piece in pieces]) for name in fields})


def served_divergence_loss(
    student: Head,
    teacher: TeacherLogprobs,
    weight: Tensor,
    divergence: str = "reverse_kl",
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    denominator: Tensor | float,
    fields: Sequence[str] = (),
) -> tuple[Tensor, TokenScores]:
    """Σ_t w_t D_t / denominator over N selected rows (paper Eq. 9), D of the coarsened distributions where k < V.

    Autograd's gradient in the student's hidden states and lm_head; logits exist one tile of rows at a time and are
    projected again in the backward.

    Args:
        student, teacher, beta, temperature: as in `served_scores`.
        weight: float [N], the tokens' weights.
        divergence: "reverse_kl", "forward_kl" or "jsd".
        denominator: divides the sum, for instance the kept tokens of all micro-batches and ranks.
        fields: statistics to return from the same pass.

    Returns:
        The loss and the TokenScores of the N rows, detached. N = 0 gives 0 with zero gradients.

    Raises:
        ValueError: as `served_scores`.

    Example:
        >>> student = Head(torch.zeros(2, 3, requires_grad=True), torch.randn(4, 3))
        >>> even = TeacherLogprobs(torch.full((2, 4), 0.25).log(), None, torch.full((2,), 0.25).log())
        >>> loss, _ = served_divergence_loss(student, even, torch.ones(2), denominator=2.0)
        >>> abs(loss.item()) < 1e-6
        True
    """
    _check(student, teacher, (divergence, *fields), temperature)
    weight = weight.to(_dtype(student))
    total, pieces = weight.new_zeros(()), []
    if not len(weight):  # a rank without a kept token: a loss of 0 that still reaches the graph
        given = (student.hidden, student.weight, student.bias)
        total = torch.stack([value.sum().to(weight.dtype) * 0 for value in given if value is not None]).sum()
    with torch.autocast(student.hidden.device.type, enabled=False):
        for span in _spans(student):
            head, rows = _rows(student, teacher, span)
            run = partial(_tile_loss, head, rows, weight[slice(*span)], divergence, beta, temperature, tuple(fields))
            # its arguments are what is differentiated; the head's other tensors are constants
            with _naming(span[0], len(weight)):
                loss, *values = checkpoint(run, head.hidden, head.weight, head.bias, use_reentrant=False)
            total = total + loss
            pieces.append([value.detach() for value in values])
    columns = zip(*pieces, strict=True) if pieces else [[weight.new_zeros(0)] for _ in fields]
    scores = TokenScores(**{name: torch.cat(list(column)) for name, column in zip(fields, columns, strict=True)})
    return total / denominator, scores


def _tile_loss(
    head: Head,
    teacher: TeacherLogprobs,
    weight: Tensor,
    divergence: str,
    beta: float,
    temperature: float,
    fields: tuple[str, ...],
    hidden: Tensor,
    lm_head: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, ...]:
    head = Head(hidden, lm_head, bias, head.logit_scale, head.softcap)
    wanted = tuple(dict.fromkeys(("divergence", *fields)))
    scores = _scores(head, teacher, divergence, wanted, beta, temperature, None)
    return (scores.require("divergence") * weight).sum(), *(scores.require(name) for name in fields)


def _scores(
    student: Head,
    teacher: TeacherLogprobs,
    divergence: str,
    fields: Sequence[str],
    beta: float,
    temperature: float,
    token_ids: Tensor | None,
) -> TokenScores:
    """Statistics of one tile, from full logits of the student."""
    dtype = _dtype(student)
    head = Head(student.hidden.to(dtype), student.weight.to(dtype), student.bias, student.logit_scale, student.softcap)
    rows = len(student.weight)
    logits = reference.logits(head, rows, temperature)
    finite = torch.isfinite(logits.detach().amax(-1))
    if not bool(finite.all()):
        raise NonFiniteLogitsError(int((~finite).nonzero()[0, 0]), "")
    if teacher.token_ids is None:
        vocabulary = min(rows, teacher.logprob.shape[1])
        log_s = torch.log_softmax(logits[:, :vocabulary], -1)
        # over the vocabulary that both have, at the temperature: log-probabilities are logits
        log_t = torch.log_softmax(teacher.logprob[:, :vocabulary].to(dtype) / temperature, -1)
        wanted = [name for name in fields if name != "teacher_logprob"]
        scores = reference.of_logprobs(log_s, log_t, divergence, beta, token_ids, wanted)
        found = dict(scores.present())
        if "teacher_logprob" in fields:
            given = teacher.sampled.to(dtype)
            found["teacher_logprob"] = given if token_ids is None else log_t.gather(1, token_ids[:, None])[:, 0]
        return TokenScores(**found)
    log_s = torch.log_softmax(logits, -1)
    own = [name for name in fields if name in ("entropy", "entropy_norm", "student_logprob")]
    found = dict(reference.of_logprobs(log_s, None, divergence, beta, token_ids, own).present())
    of_buckets = [name for name in fields if name in BOUNDS]
    log_u, log_v = _coarsened(log_s, teacher.token_ids, teacher.logprob)
    found |= dict(reference.of_logprobs(log_u, log_v, divergence, beta, None, of_buckets).present())
    if "teacher_logprob" in fields:
        found["teacher_logprob"] = teacher.sampled.to(dtype)
    if "argmax_in_top5" in fields:
        likeliest = log_s.argmax(-1, keepdim=True)
        found["argmax_in_top5"] = (teacher.token_ids[:, :5] == likeliest).any(-1).to(dtype)
    if "top16_overlap" in fields:
        k = min(16, rows)
        of_student = log_s.topk(k).indices
        both = (of_student[:, :, None] == teacher.token_ids[:, None, :k]).any(-1)
        found["top16_overlap"] = both.sum(-1).to(dtype) / k
    return TokenScores(**found)


def _coarsened(log_s: Tensor, token_ids: Tensor, logprob: Tensor) -> tuple[Tensor, Tensor]:
    """log-probabilities [N, k + 1] of student and teacher: the known tokens, and all others together."""
    vocabulary = log_s.shape[1]
    known = (token_ids >= 0) & (token_ids < vocabulary)  # the teacher's padding rows count as "others"
    absent = torch.where(known, 0.0, NEGATIVE).to(log_s.dtype)
    index = torch.where(known, token_ids, 0)
    log_u = log_s.gather(1, index) + absent
    # where nothing is known of a column, it repeats a token that is; a row without any has the whole rest
    first = torch.where(known, token_ids, vocabulary).amin(1, keepdim=True)
    some = first < vocabulary
    masked = log_s.scatter(1, torch.where(known, token_ids, first.clamp(max=vocabulary - 1)), NEGATIVE)
    rest = torch.where(some, masked, log_s).logsumexp(1, keepdim=True)
    log_v = torch.where(known, logprob.to(log_s.dtype), NEGATIVE)
    # all tokens are known: there are no others
    tail = torch.where(known.sum(1, keepdim=True) >= vocabulary, NEGATIVE, log_tail(log_v))
    return torch.cat([log_u, rest], 1), torch.cat([log_v, tail], 1)


def _check(student: Head, teacher: TeacherLogprobs, fields: Sequence[str], temperature: float) -> None:
    if len(student.hidden) != len(teacher):
        raise ValueError(f"the teacher's log-probabilities are of {len(teacher)} tokens, not {len(student.hidden)}.")
    if teacher.token_ids is None:
        return
    if temperature != 1:
        raise ValueError(
            f"temperature = {temperature:g} needs the teacher's whole vocabulary: of its likeliest tokens alone the "
            "rest cannot be brought to another temperature. Set temperature = 1, or let the server give all of them."
        )
    missing = unavailable(fields, teacher.token_ids.shape[1] - 1)  # the last column is the sampled token's
    if missing:
        raise ValueError(f"{', '.join(missing)} cannot be had, nor bounded, from the teacher's likeliest tokens.")


def _dtype(student: Head) -> torch.dtype:
    return torch.float64 if student.hidden.dtype == torch.float64 else torch.float32


def _spans(student: Head) -> list[tuple[int, int]]:
    step = max(1, TILE // (len(student.weight) * 4))
    return [(start, min(start + step, len(student.hidden))) for start in range(0, len(student.hidden), step)]


def _rows(student: Head, teacher: TeacherLogprobs, span: tuple[int, int]) -> tuple[Head, TeacherLogprobs]:
    rows = slice(*span)
    head = Head(student.hidden[rows], student.weight, student.bias, student.logit_scale, student.softcap)
    return head, teacher.map(lambda value: value[rows])


@contextmanager
def _naming(start: int, tokens: int) -> Iterator[None]:
    try:
        yield
    except NonFiniteLogitsError as error:
        token = start + error.token
        raise NonFiniteLogitsError(token, f"token {token} of {tokens}", error.cause) from None
