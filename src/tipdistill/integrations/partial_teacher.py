"""Selection beside a teacher that tells its k likeliest tokens, or the sampled one, and never its whole vocabulary.

Nothing here knows an engine: which rules can be had from what a teacher tells, what each token weighs in a loss that an
engine averages by itself, and draws that do not depend on how it splits its batch.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..score.top_k_teacher import OF_TOP_K, unavailable
from ..select import RULES, SCOPES, Rule, resolve_rule, select
from ..text import check_known
from ..types import Selection, TokenScores

NORMALIZATIONS = ("batch", "rollout")
# Of which statistic the log-probabilities of the sampled tokens give what.
OF_SAMPLED = {
    "entropy": "exact",
    "entropy_norm": "exact",
    "student_logprob": "exact",
    "teacher_logprob": "exact",
    "reverse_kl": "one-sample estimate",
}
GIVEN = {
    "top_k": {name: told.gives for name, told in OF_TOP_K.items() if not unavailable([name], None, server=False)},
    "sampled": OF_SAMPLED,
}


def check_rule(rule: str, given: str, k: int | None = None) -> Rule:
    """The rule behind a name, refused where what the teacher tells does not give what it reads.

    Args:
        rule: as in `tipdistill.select`.
        given: "top_k", the teacher's k likeliest tokens, or "sampled", the sampled token's log-probability.
        k: how many likeliest tokens.

    Raises:
        ValueError: no such rule (the nearest names are given), or a rule that cannot be had, and which can.

    Example:
        >>> check_rule("soft_or", "top_k", 32).fields
        ('entropy_norm', 'reverse_kl')
        >>> check_rule("q3", "sampled")
        Traceback (most recent call last):
        ValueError: selection_rule='q3' reads 'forward_kl', which the teacher's sampled token does not give. Rules ...
    """
    resolved = resolve_rule(rule)
    told = "the teacher's likeliest tokens do" if given == "top_k" else "the teacher's sampled token does"
    if resolved.fields is None:
        raise ValueError(
            f"selection_rule={rule!r} does not say what it reads, and {told} not give everything: name the statistics "
            "in its attribute `fields`."
        )
    missing = [name for name in resolved.fields if name not in GIVEN[given]]
    if missing:
        reasons = [OF_TOP_K[name].why_not for name in missing if given == "top_k"]
        why = "; ".join(dict.fromkeys(reason for reason in reasons if reason))
        raise ValueError(
            f"selection_rule={rule!r} reads {', '.join(map(repr, missing))}, which {told} not give"
            f"{f' ({why})' if why else ''}. Rules that can be had: {', '.join(available_rules(given, k))}."
        )
    if too_few := _not_given(resolved, given, k):
        raise ValueError(
            f"selection_rule={rule!r} reads '{too_few[0]}', which needs the teacher's {OF_TOP_K[too_few[0]].least} "
            f"likeliest tokens: topk={k} is too few."
        )
    return resolved


def available_rules(given: str, k: int | None = None) -> list[str]:
    """Names in `tipdistill.RULES` that `check_rule` lets pass.

    Args:
        given, k: as in `check_rule`.

    Example:
        >>> "soft_or" in available_rules("sampled"), "q3" in available_rules("sampled")
        (True, False)
    """
    return [name for name, rule in RULES.items() if not _not_given(rule, given, k)]


def _not_given(rule: Rule, given: str, k: int | None) -> list[str]:
    if given == "top_k":
        return unavailable(rule.fields or (), k, server=False)
    return [name for name in rule.fields or () if name not in OF_SAMPLED]


def check_scope(scope: str, normalization: str, rule: Rule) -> None:
    """Refuse a budget that cannot be spent exactly, and unknown names.

    Raises:
        ValueError: unknown names (the nearest is given); a budget over the batch, normalised inside each rollout.

    Example:
        >>> check_scope("rollout", "batch", RULES["soft_or"])
    """
    check_known("selection_scope", scope, SCOPES)
    check_known("normalization", normalization, NORMALIZATIONS)
    if scope == "batch" and normalization == "rollout" and rule.budget != "all":
        raise ValueError(
            "selection_scope='batch' spends one budget over all tokens of an optimiser step, so every token must be "
            "scored before the first micro-batch is trained on: set normalization=batch."
        )


def select_rollouts(
    scores: TokenScores,
    rollout: Tensor,
    seeds: Sequence[int],
    rule: str,
    retention: float,
    scope: str = "rollout",
    normalization: str = "batch",
) -> Selection:
    """`tipdistill.select` over whole rollouts, the same however they are split into micro-batches and over ranks.

    normalization "batch" needs all tokens of the optimiser step: percentiles, minima and maxima run over them, as in
    the paper. "rollout" runs them over each rollout alone, which is another rule where a rule has them (Soft-OR, Q3,
    FiRe-OPD), and needs that rollout's tokens only. Draws come from the rollouts' seeds.

    Args:
        scores: statistics of N tokens.
        rollout: int64 [N], which rollout each belongs to, in [0, len(seeds)).
        seeds: one number per rollout, see `seed_of`.
        rule, retention, scope: as in `tipdistill.select`.
        normalization: "batch" or "rollout".

    Returns:
        Selection of the N tokens.

    Example:
        >>> scores = TokenScores(entropy_norm=torch.tensor([0.9, 0.1, 0.5, 0.2]))
        >>> select_rollouts(scores, torch.tensor([0, 0, 1, 1]), [7, 8], "entropy", 0.5).mask.tolist()
        [True, False, True, False]
    """
    if normalization == "batch":
        generator = torch.Generator().manual_seed(sum(seeds) % 2**63)
        return select(scores, rule, retention, rollout, scope, generator)
    first = next(value for _, value in scores.present())
    mask = torch.zeros_like(rollout, dtype=torch.bool)
    weight, score = (torch.zeros(len(rollout), device=first.device) for _ in range(2))
    for number, seed in enumerate(seeds):
        own = (rollout == number).nonzero()[:, 0]
        if len(own):
            generator = torch.Generator().manual_seed(seed)
            picked = select(_rows(scores, own), rule, retention, None, scope, generator)
            mask[own], weight[own], score[own] = picked.mask, picked.weight, picked.score
    return Selection(mask, weight, score, resolve_rule(rule).budget == "importance")


def _rows(scores: TokenScores, rows: Tensor) -> TokenScores:
    return scores.map(lambda values: values[rows])


def loss_weights(selection: Selection, rollout: Tensor, over: str) -> Tensor:
    """What each token's loss is multiplied by, so that an engine's mean over *all* tokens is the mean over the kept.

    An engine that divides by the number of tokens m cannot be told the number of kept ones without knowing those of
    its other micro-batches. w · m / Σ w makes the mean right: over "batch", Σ w and m are those of the whole optimiser
    step and the mean is the paper's (Eq. 9); over "rollout", they are those of the token's rollout, so that each
    rollout counts as much as in the engine's loss on all tokens and its kept tokens share that. Where weights are
    inverse probabilities the number of kept tokens takes the place of Σ w, as in `Selection.total`.

    Args:
        selection: of N tokens.
        rollout: int64 [N], which rollout each token belongs to.
        over: "batch" or "rollout".

    Returns:
        float [N]; 0 where Σ w is 0.

    Example:
        >>> weight = torch.tensor([1.0, 0.0, 0.0, 1.0])
        >>> selection, rollout = Selection(weight > 0, weight, weight), torch.tensor([0, 0, 0, 1])
        >>> loss_weights(selection, rollout, "rollout").tolist()
        [3.0, 0.0, 0.0, 1.0]
        >>> loss_weights(selection, rollout, "batch").tolist()
        [2.0, 0.0, 0.0, 2.0]
    """
    weight = selection.weight
    divided_by = selection.mask if selection.inverse_probability else weight
    group = torch.zeros_like(rollout) if over == "batch" else rollout
    _, group, tokens = group.unique(return_inverse=True, return_counts=True)
    total = torch.zeros(len(tokens), dtype=torch.float64, device=weight.device).index_add_(
        0, group, divided_by.double()
    )
    factor = torch.where(total > 0, tokens / total.clamp(min=1e-300), 0.0)
    return (weight.double() * factor[group]).to(weight.dtype)


def select_over_ranks(
    scores: TokenScores,
    rollout: Tensor,
    seeds: Sequence[int],
    rule: str,
    retention: float,
    scope: str,
    over: str,
    group: Any = None,
) -> tuple[Tensor, TokenScores, Tensor]:
    """A selection over the tokens of all ranks of an optimiser step, and this rank's `loss_weights`.

    Rollouts are put in the order of their seeds, so that neither the number of ranks nor the engine's balancing of
    their load decides which of two equal tokens is kept, or what is drawn.

    Args:
        scores, rollout, seeds, rule, retention, scope: of this rank, as in `select_rollouts`.
        over: as in `loss_weights`.
        group: the ranks, a process group of torch.distributed.

    Returns:
        float [N], the weights of this rank's tokens; then of all ranks' tokens, in one order on every rank, the scores
        and the mask of the kept.

    Example:
        >>> scores = TokenScores(entropy_norm=torch.tensor([0.9, 0.1, 0.5, 0.2]))
        >>> arguments = torch.tensor([0, 0, 1, 1]), [7, 8], "entropy", 0.5, "rollout", "batch"
        >>> select_over_ranks(scores, *arguments)[0].tolist()
        [2.0, 0.0, 2.0, 0.0]
    """
    names = [name for name, _ in scores.present()]
    device = scores.require(names[0]).device
    own = (torch.stack([scores.require(name).float() for name in names], 1).cpu(), rollout.cpu(), list(seeds))
    rank, ranks = 0, 1
    if torch.distributed.is_initialized():
        rank, ranks = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    of_ranks: list[Any] = [own]
    if ranks > 1:
        of_ranks = [None] * ranks
        torch.distributed.all_gather_object(of_ranks, own, group=group)
    values, numbers, rank_seeds = zip(*of_ranks, strict=True)
    all_seeds = [seed for of_rank in rank_seeds for seed in of_rank]
    # a rollout's number among all: the place of its seed
    place = torch.empty(len(all_seeds), dtype=torch.int64)
    place[sorted(range(len(all_seeds)), key=all_seeds.__getitem__)] = torch.arange(len(all_seeds))
    first = [0, *itertools.accumulate(len(of_rank) for of_rank in rank_seeds)]
    number = torch.cat([place[of_rank + start] for of_rank, start in zip(numbers, first, strict=False)])
    order = number.argsort(stable=True)
    number = number[order].to(device)
    if not len(number):
        return torch.zeros(0, device=device), scores, torch.zeros(0, dtype=torch.bool, device=device)
    columns = torch.cat(values)[order].to(device).unbind(1)
    of_all = TokenScores(**dict(zip(names, columns, strict=True)))
    picked = select_rollouts(of_all, number, sorted(all_seeds), rule, retention, scope)
    weights = torch.empty(len(number), device=device)
    weights[order.to(device)] = loss_weights(picked, number, over).float()
    start = sum(len(of_rank) for of_rank in values[:rank])
    return weights[start : start + len(rollout)], of_all, picked.mask


def seed_of(token_ids: Tensor, seed: int = 0) -> int:
    """A seed in [0, 2⁶²) from the tokens of a prompt and its rollout: the same wherever the rollout is processed.

    Example:
        >>> seed_of(torch.tensor([1, 2])) == seed_of(torch.tensor([1, 2], dtype=torch.int32))
        True
        >>> seed_of(torch.tensor([1, 2])) == seed_of(torch.tensor([1, 2]), seed=1)
        False
    """
    text = token_ids.to("cpu", torch.int64).numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8, key=str(seed).encode()).digest(), "big") >> 2
