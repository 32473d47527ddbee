"""Loss: a Selection → a scalar. Only selected tokens are projected and differentiated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import overload

import torch
from torch import Tensor

from .score import NonFiniteLogitsError, fused_rows, selected_rows, token_scores
from .types import Head, Selection, TokenScores


def selected_loss(scores: TokenScores, selection: Selection, denominator: Tensor | float | None = None) -> Tensor:
    """Weighted mean of the divergence over the selected tokens (paper Eq. 9).

    L = Σ_t w_t D_t / Σ_t w_t over the kept tokens; with weights of 1 this is the mean over the selected tokens. Weights
    that are inverse probabilities are divided by the number of kept tokens instead, see `Selection.total`.

    Args:
        scores: statistics with `divergence`, [N] and differentiable, as `token_scores(..., rule=...)` gives them.
        selection: the kept tokens and their weights, [N].
        denominator: divides the sum instead of `selection.total`, for instance the kept tokens of all micro-batches
            and ranks.

    Returns:
        A scalar. Its backward costs what was selected: a token of weight 0 is never projected again.

    Raises:
        ValueError: the divergence was not computed, lengths differ, or the denominator is not positive.

    Example:
        >>> scores = TokenScores(divergence=torch.tensor([1.0, 5.0, 3.0]))
        >>> mask = torch.tensor([True, False, True])
        >>> selected_loss(scores, Selection(mask, mask.float(), torch.zeros(3)))
        tensor(2.)
    """
    divergence = scores.require("divergence")
    if selection.weight.shape != divergence.shape:
        raise ValueError(f"the selection is of {len(selection.weight)} tokens, the scores of {len(divergence)}.")
    weight = selection.weight.to(divergence.dtype)
    # an infinite divergence that was dropped must not turn the sum into NaN
    total = torch.where(weight > 0, divergence, 0.0).mul(weight).sum()
    return total / _denominator(selection.total.to(divergence.dtype), denominator)


@overload
def fused_divergence_loss(
    student: Head,
    teacher: Head,
    weight: Tensor | None = None,
    divergence: str = "reverse_kl",
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    denominator: Tensor | float | None = None,
    token_ids: None = None,
    impl: str = "auto",
) -> Tensor: ...


@overload
def fused_divergence_loss(
    student: Head,
    teacher: Head,
    weight: Tensor | None = None,
    divergence: str = "reverse_kl",
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    denominator: Tensor | float | None = None,
    fields: Sequence[str],
    token_ids: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, TokenScores]: ...


def fused_divergence_loss(
    student: Head,
    teacher: Head,
    weight: Tensor | None = None,
    divergence: str = "reverse_kl",
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    denominator: Tensor | float | None = None,
    fields: Sequence[str] = (),
    token_ids: Tensor | None = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, TokenScores]:
    """Weighted mean divergence of rows that are already selected, each projected once (paper Eq. 9).

    L = Σ_t w_t D_t / Σ_t w_t. The gradient is formed in the forward, while the logits of the row are at hand, so that a
    second projection is never made; what the backward does is hand it out, once.

    Args:
        student: hidden states [N, H_S] of the selected tokens and lm_head [V_S, H_S].
        teacher: hidden states [N, H_T] of the same tokens and lm_head [V_T, H_T].
        weight: float [N], the tokens' weights ≥ 0; None: all 1.
        divergence: "reverse_kl", "forward_kl" or "jsd".
        beta: β of the Jensen-Shannon divergence, in (0, 1); see `token_scores`.
        temperature: divides both models' logits.
        denominator: divides the sum instead of Σ w, for instance the kept tokens of all micro-batches and ranks.
        fields: statistics to return from the same pass, see `TokenScores`.
        token_ids: int64 [N], the sampled tokens, where their logprobs are among the fields.
        impl: as in `token_scores`.

    Returns:
        The loss; with `fields`, (loss, TokenScores of the N rows, detached). N = 0 gives 0 with zero gradients.

    Raises:
        ValueError: as `token_scores`; or weights that are negative, not finite or of another length.

    Example:
        >>> student = Head(torch.randn(4, 3, requires_grad=True), torch.randn(50, 3))
        >>> loss = fused_divergence_loss(student, Head(torch.randn(4, 8), torch.randn(50, 8)))
        >>> loss.backward()
        >>> student.hidden.grad.shape
        torch.Size([4, 3])
    """
    rows = student.hidden.shape[0]
    if weight is None:
        weight = torch.ones(rows, device=student.hidden.device)
    elif weight.shape != (rows,):
        raise ValueError(f"weight must be [{rows}], one per token, got {list(weight.shape)}.")
    elif not weight.is_cuda and not bool(((weight >= 0) & torch.isfinite(weight)).all()):
        raise ValueError("weights must be finite and ≥ 0.")
    dtype = torch.promote_types(torch.float32, student.hidden.dtype)
    weight = weight.to(dtype)
    # numbers on a GPU are looked at in fused_rows, together with the logits, so that the host waits once
    if isinstance(denominator, Tensor) and denominator.is_cuda:
        factor = weight / denominator
    else:
        factor = weight / _denominator(weight.sum(), denominator)
    loss, scores = fused_rows(student, teacher, factor, divergence, beta, temperature, fields, token_ids, impl)
    return (loss, scores) if fields else loss


def fused_selected_loss(
    student: Head,
    teacher: Head,
    choose: Callable[[TokenScores, slice], Selection],
    lengths: Sequence[int],
    divergence: str = "reverse_kl",
    *,
    fields: Sequence[str] | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    denominator: Tensor | float | None = None,
    token_ids: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, TokenScores, Selection]:
    """Score, select and loss of N tokens in one pass over both lm_heads (paper Eq. 9).

    L = Σ_t w_t D_t / Σ_t w_t over the tokens that `choose` keeps. Tokens come in groups, each of which can be chosen
    from without the others, as rollouts can. The logits of a group are made once: they are there until its tokens are
    chosen, and the gradient is formed from those of the kept tokens. So a share ρ costs 2 + 2ρ products with an
    lm_head a token; scored first and projected again it is 2 + 4ρ, and 4 for all tokens.

    Where a group's logits do not fit into the workspace of a pass (256 MiB on a CPU, a 24th of a GPU's memory), and for
    what one pass cannot give (float16 on a GPU, a Jensen-Shannon divergence read at one β and trained on at another),
    all tokens are scored first and what was kept is projected again, with the same result.

    Args:
        student: hidden states [N, H_S] of all tokens and lm_head [V_S, H_S].
        teacher: hidden states [N, H_T] of the same tokens and lm_head [V_T, H_T].
        choose: (statistics of the tokens of one or more groups, which of the N they are) → the Selection of these; what
            it says of a group depends on no other.
        lengths: tokens of each group, one after the other, N in all.
        divergence: "reverse_kl", "forward_kl" or "jsd".
        fields: statistics that `choose` is given, and that are returned, see `TokenScores`; None: those of the paper.
            Of these jsd is at β = ½, and divergence the reverse KL, whatever is trained on.
        beta: β of a loss that is the Jensen-Shannon divergence, in (0, 1).
        temperature: divides both models' logits.
        denominator: divides the sum instead of `Selection.total`, for instance the kept tokens of all micro-batches and
            ranks.
        token_ids: int64 [N], the sampled tokens, where their logprobs are among the fields.
        impl: as in `token_scores`.

    Returns:
        (loss, statistics of the N tokens, detached, and what was chosen of all of them). N = 0 gives 0 with zero
        gradients.

    Raises:
        ValueError: as `token_scores`; groups that are not N tokens in all; a choice that is not of the tokens given.

    Example:
        >>> from tipdistill import select
        >>> student = Head(torch.randn(6, 3, requires_grad=True), torch.randn(50, 3))
        >>> rollout = torch.tensor([0, 0, 1, 1, 1, 1])
        >>> loss, scores, selection = fused_selected_loss(
        ...     student,
        ...     Head(torch.randn(6, 8), torch.randn(50, 8)),
        ...     lambda scores, tokens: select(scores, "entropy", retention=0.5, rollout=rollout[tokens]),
        ...     [2, 4],
        ...     fields=["entropy_norm", "reverse_kl"],
        ... )
        >>> loss.backward()
        >>> int(selection.mask.sum()), int((student.hidden.grad != 0).any(1).sum())
        (3, 3)
    """
    count = len(student.hidden)
    if sum(lengths) != count or min(lengths, default=0) < 0:
        raise ValueError(f"lengths must be those of groups of {count} tokens in all, got {list(lengths)}.")
    device, dtype = student.hidden.device, torch.promote_types(torch.float32, student.hidden.dtype)
    on_gpu = isinstance(denominator, Tensor) and denominator.is_cuda  # is looked at with the logits
    given = denominator if denominator is None or on_gpu else _denominator(torch.zeros(()), denominator)
    selections: list[Selection] = []

    def factors(scores: TokenScores, tokens: slice) -> Tensor:
        selection = choose(scores, tokens)
        if selection.weight.shape != (tokens.stop - tokens.start,):
            raise ValueError(
                f"the choice is of {len(selection.weight)} tokens, and {tokens.stop - tokens.start} were given."
            )
        selections.append(selection)
        weight = torch.where(selection.mask, selection.weight, 0.0).to(dtype)
        return weight if given is None else weight / given

    common = (divergence, beta, temperature)
    in_one = selected_rows(student, teacher, factors, lengths, *common, fields, token_ids, impl)
    if in_one is not None:
        loss, scores = in_one
        nothing = torch.zeros(0, device=device)
        chosen = _joined(selections) if selections else Selection(nothing.bool(), nothing, nothing)
        return loss if given is not None else loss / _denominator(chosen.total.to(dtype), None), scores, chosen
    scores = token_scores(
        student, teacher, temperature=temperature, token_ids=token_ids, fields=fields, impl=impl
    ).detach()
    factors(scores, slice(0, count))
    (chosen,) = selections
    kept = chosen.mask
    try:
        loss = fused_divergence_loss(
            replace(student, hidden=student.hidden[kept]),
            replace(teacher, hidden=teacher.hidden[kept]),
            chosen.weight[kept],
            divergence,
            beta=beta,
            temperature=temperature,
            denominator=_denominator(chosen.total.to(dtype), None) if denominator is None else denominator,
            impl=impl,
        )
    except NonFiniteLogitsError as error:
        token = int(kept.nonzero()[error.token, 0])
        raise NonFiniteLogitsError(token, f"token {token} of {count}", error.cause) from None
    return loss, scores, chosen


def _joined(selections: Sequence[Selection]) -> Selection:
    """Choices of some tokens each, as one of all of them."""
    mask, weight, score = (
        torch.cat([getattr(one, name) for one in selections]) for name in ("mask", "weight", "score")
    )
    return Selection(mask, weight, score, selections[0].inverse_probability)


def _denominator(total: Tensor, given: Tensor | float | None) -> Tensor | float:
    if given is None:
        return torch.where(total > 0, total, 1.0)  # nothing selected: a loss of 0, not 0 / 0
    if not given > 0:
        raise ValueError(f"the denominator must be positive, got {float(given)}.")
    return given
