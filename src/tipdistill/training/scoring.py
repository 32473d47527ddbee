"""The scoring pass over a generation batch: which rollouts go through a forward together, and what comes back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..integrations._trl import IMAGE_COUNTS, MULTIMODAL_KEYS, TOKEN_KEYS
from ..score import NonFiniteLogitsError
from ..types import TokenScores


def for_models(batch: dict[str, Any]) -> dict[str, Any]:
    """What student and teacher see of a batch: its tokens, images and the like, and the dataset's rows ("examples").

    A teacher that needs more than the tokens, such as a column that names it, finds it in its rollout's row.
    """
    return {key: batch[key] for key in (*TOKEN_KEYS, *MULTIMODAL_KEYS, *IMAGE_COUNTS, "examples") if key in batch}


def loss_mask(batch: dict[str, Any]) -> Tensor:
    """bool [B, T]: the completion tokens that the student itself wrote (no padding, no tool results).

    Args:
        batch: with completion_mask [B, T], and tool_mask [B, T] where tools were called.
    """
    mask = batch["completion_mask"].bool()
    return mask if batch.get("tool_mask") is None else mask & batch["tool_mask"].bool()


def finished_alone(batch: dict[str, Any], ends: Sequence[int], accelerator: Any) -> dict[str, Any]:
    """A batch in which no token of a rollout that did not end is trained on; both models still see all of them.

    Args:
        batch: completion_ids and completion_mask, [B, T] each, and tool_mask [B, T] where tools were called.
        ends: tokens that end a completion.
        accelerator: of the run, whose processes count the tokens that are left.

    Returns:
        The batch with its tool_mask, which `loss_mask` reads, and the number of these tokens over all processes.
    """
    ids, mask = batch["completion_ids"], batch["completion_mask"].bool()
    is_end = torch.isin(ids, torch.tensor(list(ends), device=ids.device, dtype=ids.dtype))
    last = mask.long().cumsum(1).argmax(1)  # where a completion stops
    finished = is_end.gather(1, last[:, None])
    taken = loss_mask(batch) & finished
    total = accelerator.gather(taken.sum()).sum()
    return {**batch, "tool_mask": (taken | ~mask).long(), "num_items_in_batch": total}


def trimmed(batch: dict[str, Any], mask: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Rollouts without what the tokens in `mask` do not depend on.

    That is: rollouts that have none of them, columns of prompts that are padding in all others, and columns of
    completions after the last of them. One token is left where there is none, since a sharded engine runs a forward on
    every process.

    Args:
        batch: `TOKEN_KEYS`, [B, ...] each; prompts are padded on the left, completions on the right.
        mask: bool [B, T], of completion tokens; cut like them.
    """
    rows, columns = mask.any(1), mask.any(0)
    if not bool(rows.any()):
        rows, columns = (torch.arange(len(values), device=mask.device) == 0 for values in (rows, columns))
    if not bool(rows.all()):
        batch, mask = {name: value[rows] for name, value in batch.items()}, mask[rows]
    start = int(batch["prompt_mask"].any(0).int().argmax())
    stop = int(columns.nonzero().max()) + 1
    return {
        name: value[:, start:] if name.startswith("prompt") else value[:, :stop] for name, value in batch.items()
    }, mask[:, :stop]


def scoring_pieces(
    batch: dict[str, Any],
    accelerator: Any,
    rollouts_per_forward: int,
    tokens_per_forward: int = 0,
    fixed_width: bool = False,
) -> list[Tensor]:
    """Rows of each forward of the scoring pass: rollouts of like length together, as many forwards on every process.

    Sharded engines run a forward together, so a process with fewer pieces than another splits its largest ones.

    Args:
        batch: prompt_mask and completion_mask, [B, ...] each.
        accelerator: of the run, to agree on the number of forwards.
        rollouts_per_forward: where no number of tokens is given.
        tokens_per_forward: at most so many tokens, padding included (one rollout at least); 0: no such limit.
        fixed_width: nothing is trimmed, so a rollout is as wide as the batch.

    Returns:
        int64 row numbers, ascending in each piece: the order in which a mask over [B, T] reads.
    """
    widths = list(zip(*(batch[f"{part}_mask"].sum(1).tolist() for part in ("prompt", "completion")), strict=True))
    order = sorted(range(len(widths)), key=lambda row: -sum(widths[row]))
    if tokens_per_forward:
        if fixed_width:
            widths = [(batch["prompt_mask"].shape[1], batch["completion_mask"].shape[1])] * len(widths)
        pieces: list[list[int]] = [[]]
        for row in order:
            # side by side, prompts are as wide as the widest of them, and so are completions
            prompt, completion = (max(parts) for parts in zip(*(widths[i] for i in [*pieces[-1], row]), strict=True))
            if pieces[-1] and (len(pieces[-1]) + 1) * (prompt + completion) > tokens_per_forward:
                pieces.append([])
            pieces[-1].append(row)
    else:
        pieces = [order[first : first + rollouts_per_forward] for first in range(0, len(order), rollouts_per_forward)]
    device = batch["prompt_mask"].device
    count = int(accelerator.gather(torch.tensor([len(pieces)], device=device)).max())
    while len(pieces) < count:
        largest = pieces.pop(max(range(len(pieces)), key=lambda index: len(pieces[index])))
        half = len(largest) // 2  # a single rollout is read twice
        pieces += [largest[:half], largest[half:]] if half else [largest, largest]
    return [torch.tensor(sorted(piece), device=device) for piece in pieces]


def scores_by_position(
    mask: Tensor, pieces: Sequence[Tensor], score: Callable[[Tensor], TokenScores]
) -> dict[str, Tensor]:
    """Statistics of every token in `mask`, scored piece by piece and put where the tokens stand.

    Args:
        mask: bool [B, T].
        pieces: rows of each forward, see `scoring_pieces`.
        score: rows → statistics of their tokens in `mask`, [n] each.

    Returns:
        Statistic → [B, T], 0 where `mask` is false.
    """
    table: dict[str, Tensor] = {}
    for rows in pieces:
        inside = torch.zeros_like(mask)
        inside[rows] = mask[rows]
        for name, value in score(rows).present():
            empty = torch.zeros(mask.shape, dtype=value.dtype, device=mask.device)
            table.setdefault(name, empty).masked_scatter_(inside, value)
    return table


def take_tokens(answer: Any, kept: Tensor) -> Any:
    """An Answer of the kept tokens alone."""
    return None if answer is None else answer.map(lambda value: value[kept.to(value.device)])


def reads_tokens(fields: Sequence[str]) -> bool:
    """Whether statistics are of the sampled tokens; no name stands for the default ones, of which some are.

    Example:
        >>> reads_tokens(["entropy"]), reads_tokens(["entropy", "student_logprob"]), reads_tokens([])
        (False, True, True)
    """
    return not fields or any(name.endswith("logprob") for name in fields)


@contextmanager
def naming_rollouts(mask: Tensor, rollouts: Tensor | None = None) -> Iterator[None]:
    """Let an error about non-finite logits say which rollout and token it was.

    Args:
        mask: bool [R, T]; its true entries are the rows that are computed, in order.
        rollouts: int64 [R], how the rollouts are called; None: 0 to R − 1.
    """
    try:
        yield
    except NonFiniteLogitsError as error:
        row, position = mask.nonzero()[error.token].tolist()
        number = row if rollouts is None else int(rollouts[row])
        where = f"rollout {number} of the batch, token {position}"
        raise NonFiniteLogitsError(error.token, where, error.cause) from None
