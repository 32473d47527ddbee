"""Score: the last hidden states and lm_heads of both models → TokenScores, never an [N, V] tensor.

Here it is decided what is computed and by whom. reference.py reads like the equations; chunked.py computes the same in
tiles (tiles.py makes one, sums.py adds it up), triton.py with kernels, top.py for the likeliest tokens. What is refused
is in checks.py.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..text import check_known
from ..types import OF_STUDENT, STATISTICS, Head, TokenScores
from . import chunked, reference
from .checks import IMPLEMENTATIONS, NonFiniteLogitsError, check_inputs, check_rows
from .tiles import NEGATIVE
from .top import OF_LIKELIEST, top_statistics

if TYPE_CHECKING:
    from ..select import Rule

__all__ = ["IMPLEMENTATIONS", "NonFiniteLogitsError", "fused_rows", "selected_rows", "token_scores"]

_DEFAULT = (
    "entropy",
    "entropy_norm",
    "teacher_entropy",
    "reverse_kl",
    "forward_kl",
    "divergence",
    "student_logprob",
    "teacher_logprob",
)
_OF_TOKENS = ("student_logprob", "teacher_logprob")
_OF_TRITON = {torch.float32, torch.bfloat16, torch.float16}
# torch.mm of half-precision operands with a float32 result
_MIXED_MATMUL = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)


def token_scores(
    student: Head,
    teacher: Head | None = None,
    divergence: str = "reverse_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    token_ids: Tensor | None = None,
    fields: Sequence[str] | None = None,
    impl: str = "auto",
    *,
    rule: str | Callable[[TokenScores], Tensor] | Rule | None = None,
) -> TokenScores:
    """Entropies and divergences of N tokens from hidden states and lm_heads (paper Eq. 1 to 3).

    entropy = H(P_S), reverse_kl = KL(P_S ‖ P_T), forward_kl = KL(P_T ‖ P_S), all in nats over the shared vocabulary;
    jsd = β KL(P_T ‖ M) + (1 − β) KL(P_S ‖ M) with M = (1 − β) P_S + β P_T, as in TRL. `divergence` is the one asked for
    and differentiable in the student: its backward projects again the tokens whose incoming gradient is not zero,
    and no others.

    Args:
        student: hidden states [N, H_S] and lm_head [V_S, H_S].
        teacher: hidden states [N, H_T] and lm_head [V_T, H_T]; None: the student's entropies alone. Where V_S and V_T
            differ by padding, the first min(V_S, V_T) rows are compared.
        divergence: "reverse_kl", "forward_kl" or "jsd".
        beta: β of the Jensen-Shannon divergence, in (0, 1).
        temperature: divides both models' logits, > 0.
        token_ids: int64 [N], the sampled tokens, for student_logprob and teacher_logprob.
        fields: names of the statistics wanted, see `TokenScores`; None: those that `rule` asks for, and without one
            those of the paper, that is all but jsd, hellinger, gradient_norm, signal_to_curvature and those of the
            likeliest tokens. Nothing else is computed.
        impl: "chunked" (tiles, any device), "triton" (CUDA, float32 and half precision), "reference" (full logits, any
            dtype up to float64) or "auto": triton where it can be had, and chunked elsewhere.
        rule: as in `select`: computes what `select(scores, rule)` reads and, with a teacher, the `divergence` that
            `selected_loss` reads; what `fields` names comes on top. A rule that does not say what it reads gets the
            statistics of the paper. Without a teacher a rule that reads the student alone is scored at its cost alone;
            `fused_divergence_loss` then projects the teacher for the rows that were kept.

    Returns:
        TokenScores, each statistic float32 [N] (float64 where the hidden states are float64).

    Raises:
        ValueError: shapes, devices, names or ranges that do not fit; statistics that lack a teacher or token_ids.
        NonFiniteLogitsError: a ValueError that names the first token with NaN or infinite logits.

    Example:
        >>> student, teacher = (Head(torch.eye(3), torch.randn(50, 3), logit_scale=2.0) for _ in range(2))
        >>> scores = token_scores(student, teacher)
        >>> scores.entropy.shape, bool((scores.reverse_kl >= 0).all())
        (torch.Size([3]), True)
        >>> token_scores(student).entropy_norm.max() <= 1
        tensor(True)
        >>> [name for name, _ in token_scores(student, teacher, rule="soft_or").present()]
        ['entropy_norm', 'reverse_kl', 'divergence']
    """
    vocabulary = check_inputs(student, teacher, divergence, beta, temperature, token_ids, impl)
    engine = _engine(impl, student, teacher)
    wanted = _wanted(fields, rule, teacher, token_ids, beta)
    if OF_STUDENT.issuperset(wanted):
        teacher = None  # nobody asked for it, so it is not projected
    if impl == "reference":
        for head in (student, teacher):
            if head is not None:
                highest = reference.logits(head, vocabulary, temperature).detach().amax(-1)
                check_rows(highest.masked_fill(highest.abs() >= -NEGATIVE, math.nan), vocabulary, token_ids)
        return reference.token_scores(student, teacher, divergence, beta, temperature, token_ids, wanted)
    # the engine sums what is over the whole vocabulary; what is of the likeliest tokens comes from a pass of its own
    likeliest = tuple(name for name in wanted if name in OF_LIKELIEST)
    computed = tuple(divergence if name == "divergence" else name for name in wanted if name not in likeliest)
    if "entropy_norm" in wanted:
        computed += ("entropy",)
    with torch.no_grad(), torch.autocast(student.hidden.device.type, enabled=False):
        statistics = engine.statistics(student, teacher, computed, beta, temperature, token_ids, vocabulary)
    normaliser = statistics["s_log"] if teacher is None else statistics["s_log"] + statistics["t_log"]
    check_rows(normaliser, vocabulary, token_ids)
    values = {name: statistics[name] for name in wanted if name in statistics}
    if "entropy_norm" in wanted:
        values["entropy_norm"] = statistics["entropy"] / math.log(vocabulary)
    if likeliest:
        assert teacher is not None
        values |= top_statistics(student, teacher, likeliest, temperature, vocabulary)
    if "divergence" in wanted:
        # its value was computed above; what is added is a backward, which starts from the normalisers
        assert teacher is not None
        values["divergence"] = engine.TokenDivergence.apply(
            student.hidden,
            student.weight,
            student.bias,
            divergence,
            beta,
            chunked.Projection.of(student, vocabulary, temperature),
            chunked.Projection.of(teacher, vocabulary, temperature),
            teacher.hidden.detach(),
            statistics,
        )
    return TokenScores(**values)


def fused_rows(
    student: Head,
    teacher: Head,
    factor: Tensor,
    divergence: str,
    beta: float,
    temperature: float,
    fields: Sequence[str],
    token_ids: Tensor | None,
    impl: str,
) -> tuple[Tensor, TokenScores]:
    """Σ factor · divergence over N rows, each projected once, and the asked statistics of the same pass.

    What `tipdistill.fused_divergence_loss` is made of; the arguments are those of `token_scores`, and `factor` [N].

    Example:
        >>> head = Head(torch.zeros(2, 3, requires_grad=True), torch.randn(9, 3))
        >>> fused_rows(head, head, torch.ones(2), "reverse_kl", 0.5, 1.0, (), None, "auto")[0].item()
        0.0
    """
    vocabulary = check_inputs(student, teacher, divergence, beta, temperature, token_ids, impl)
    engine = _engine(impl, student, teacher)
    wanted = _wanted(fields, None, teacher, token_ids, beta)
    if impl == "reference":
        scores = token_scores(
            student, teacher, divergence, beta, temperature, token_ids, tuple({*wanted, "divergence"}), impl
        )
        divergences = scores.require("divergence").detach()
        check_rows(torch.zeros_like(divergences), vocabulary, divergence=divergences, factor=factor)
        loss = (scores.require("divergence") * factor).sum()
        return loss, TokenScores(**{name: getattr(scores, name).detach() for name in wanted})
    computed = _computed(wanted, divergence)
    loss, of_rows, normaliser, *values = engine.FusedLoss.apply(
        student.hidden,
        student.weight,
        student.bias,
        divergence,
        beta,
        chunked.Projection.of(student, vocabulary, temperature),
        chunked.Projection.of(teacher, vocabulary, temperature),
        teacher.hidden.detach(),
        factor.detach(),
        computed,
        token_ids,
    )
    check_rows(normaliser, vocabulary, token_ids, of_rows, factor)
    statistics = dict(zip(computed, values, strict=True))
    likeliest = tuple(name for name in wanted if name in OF_LIKELIEST)
    if likeliest:
        statistics |= top_statistics(student, teacher, likeliest, temperature, vocabulary)
    return loss, _named(statistics, wanted, divergence, vocabulary)


def selected_rows(
    student: Head,
    teacher: Head,
    factors: Callable[[TokenScores, slice], Tensor],
    lengths: Sequence[int],
    divergence: str,
    beta: float,
    temperature: float,
    fields: Sequence[str] | None,
    token_ids: Tensor | None,
    impl: str,
) -> tuple[Tensor, TokenScores] | None:
    """As `fused_rows`, of rows that are chosen when they are scored; None where that cannot be in one pass.

    What `tipdistill.loss.fused_selected_loss` is made of.

    Args:
        factors: (statistics `fields` of some groups, which of the N rows they are) → their factors, [R], 0 for a row
            that is not wanted.
        lengths: rows of each group, N in all.

    Returns:
        The loss and the statistics of all N rows, detached.

    Example:
        >>> head = Head(torch.zeros(2, 3, requires_grad=True), torch.randn(9, 3))
        >>> loss, scores = selected_rows(
        ...     head, head, lambda scores, rows: scores.entropy, [2], "reverse_kl", 0.5, 1.0, ["entropy"], None, "auto")
        >>> loss.item(), scores.entropy.shape
        (0.0, torch.Size([2]))
    """
    vocabulary = check_inputs(student, teacher, divergence, beta, temperature, token_ids, impl)
    engine = _engine(impl, student, teacher)
    wanted = _wanted(fields, None, teacher, token_ids, 0.5)
    # rules read the symmetric Jensen-Shannon divergence, and one pass has one β
    one_beta = "jsd" not in wanted or divergence != "jsd" or beta == 0.5
    fits = max(lengths, default=0) <= engine.choice_rows(student.hidden, vocabulary)
    if impl == "reference" or not one_beta or not fits:
        return None
    computed, likeliest = _computed(wanted, "reverse_kl"), tuple(name for name in wanted if name in OF_LIKELIEST)
    normalisers: list[Tensor] = []
    scored: list[TokenScores] = []
    given: list[Tensor] = []

    def factors_of(of_rows: dict[str, Tensor], first: int, end: int) -> Tensor:
        # numbers that are none are refused as the logits that they are, before a rule reads them
        normalisers.append(of_rows["s_log"] + of_rows["t_log"])
        check_rows(torch.cat(normalisers), vocabulary, None if token_ids is None else token_ids[:end])
        statistics = {name: of_rows[name] for name in computed}
        if likeliest:  # a pass of their own
            own, its = (replace(head, hidden=head.hidden[first:end].detach()) for head in (student, teacher))
            statistics |= top_statistics(own, its, likeliest, temperature, vocabulary)
        scored.append(_named(statistics, wanted, "reverse_kl", vocabulary))
        given.append(factors(scored[-1], slice(first, end)))
        return given[-1]

    loss, of_rows, normaliser, *_ = engine.FusedLoss.apply(
        student.hidden,
        student.weight,
        student.bias,
        divergence,
        beta if divergence == "jsd" else 0.5,
        chunked.Projection.of(student, vocabulary, temperature),
        chunked.Projection.of(teacher, vocabulary, temperature),
        teacher.hidden.detach(),
        factors_of,
        computed,
        token_ids,
        lengths,
    )
    if not given:
        return loss, TokenScores(**dict.fromkeys(wanted, torch.zeros_like(normaliser)))
    factor = torch.cat(given)
    check_rows(normaliser, vocabulary, None, torch.where(factor == 0, 0.0, of_rows), factor)
    names = [name for name, _ in scored[0].present()]
    return loss, TokenScores(**{name: torch.cat([part.require(name) for part in scored]) for name in names})


def _computed(wanted: Sequence[str], divergence: str) -> tuple[str, ...]:
    """What the engine sums for these statistics, each once."""
    names = {"divergence": divergence, "entropy_norm": "entropy"}
    return tuple(dict.fromkeys(names.get(name, name) for name in wanted if name not in OF_LIKELIEST))


def _named(statistics: dict[str, Tensor], wanted: Sequence[str], divergence: str, vocabulary: int) -> TokenScores:
    """The statistics that were asked for, from those that were summed."""
    if "divergence" in wanted:
        statistics["divergence"] = statistics[divergence]
    if "entropy" in statistics:
        statistics["entropy_norm"] = statistics["entropy"] / math.log(vocabulary)
    return TokenScores(**{name: statistics[name] for name in wanted})


def _engine(impl: str, student: Head, teacher: Head | None) -> ModuleType:
    """The module that computes: `triton` where it was asked for or is the fastest, else `chunked`."""
    if impl == "triton" or (impl == "auto" and student.hidden.is_cuda):
        obstacle = _triton_obstacle(student, teacher)
        if obstacle is None:
            from . import triton  # imported where it is used: the package is not everywhere

            return triton
        if impl == "triton":
            raise ValueError(f"impl='triton' {obstacle} Or ask for impl='auto', which takes it where it can be had.")
    return chunked


def _triton_obstacle(student: Head, teacher: Head | None) -> str | None:
    """Why the Triton kernels cannot take these inputs, and what to do; None where they can."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and not student.hidden.is_cuda
    if not (student.hidden.is_cuda or interpreted):
        return f"needs a CUDA device, and the tensors are on {student.hidden.device}: move them to one."
    if torch.version.hip is not None:
        return "is written and measured for CUDA, not for ROCm: use impl='chunked'."
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton: pip install triton."
    dtypes = {tensor.dtype for head in (student, teacher) if head is not None for tensor in (head.hidden, head.weight)}
    if not dtypes <= _OF_TRITON:
        return "takes float32, bfloat16 and float16: use impl='chunked' for other dtypes."
    half = student.hidden.dtype != torch.float32 or (teacher is not None and teacher.hidden.dtype != torch.float32)
    if half and not interpreted and not _MIXED_MATMUL:
        return "needs torch 2.8 or newer for half precision: pip install -U torch."
    if not interpreted and torch.cuda.get_device_capability(student.hidden.device) < (8, 0):
        return "needs a GPU of compute capability 8.0 (Ampere) or newer: use impl='chunked'."
    return None


def _wanted(
    fields: Sequence[str] | None,
    rule: str | Callable[[TokenScores], Tensor] | Rule | None,
    teacher: Head | None,
    token_ids: Tensor | None,
    beta: float,
) -> tuple[str, ...]:
    """Names of the statistics to compute, each once; refuses those that cannot be had."""
    if isinstance(fields, str):
        raise ValueError(f"fields must be a list of names, got the string {fields!r}: write [{fields!r}].")
    named = tuple(fields or ())
    if rule is not None:
        named = (*_read_by(rule, teacher, token_ids), *named)
        if not named:
            raise ValueError(
                f"the rule {rule!r} reads no statistic, and without a teacher there is no divergence to train on: "
                "pass teacher=Head(...), or name what you want in fields."
            )
    elif fields is None:
        named = _default(teacher, token_ids)
    for name in named:
        check_known("statistic", name, STATISTICS)
        if teacher is None and name not in OF_STUDENT:
            raise ValueError(f"'{name}' compares with a teacher: pass teacher=Head(...).")
        if name == "jsd" and not 0 < beta < 1:
            raise ValueError(f"'jsd' is a statistic at β in (0, 1), got beta = {beta!r}: 0 and 1 are the KLs.")
        if token_ids is None and name in _OF_TOKENS:
            raise ValueError(f"'{name}' is of the sampled tokens: pass token_ids, int64 [N].")
    return tuple(dict.fromkeys(named))


def _default(teacher: Head | None, token_ids: Tensor | None) -> tuple[str, ...]:
    """The paper's statistics, as far as these inputs give them."""
    return tuple(
        name
        for name in _DEFAULT
        if (teacher is not None or name in OF_STUDENT) and (token_ids is not None or name not in _OF_TOKENS)
    )


def _read_by(
    rule: str | Callable[[TokenScores], Tensor] | Rule, teacher: Head | None, token_ids: Tensor | None
) -> tuple[str, ...]:
    """What `select(scores, rule)` reads, and what `selected_loss` does where there is a teacher."""
    # The one look ahead in the order of the stages: which statistics are computed depends on who will read them. The
    # registry itself knows TokenScores alone, and nothing of select imports score.
    from ..select import rule_fields

    read = rule_fields(rule)
    if read is None:
        return _default(teacher, token_ids)
    return read if teacher is None else (*read, "divergence")
