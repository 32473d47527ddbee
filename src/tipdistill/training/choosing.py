"""Loss of a micro-batch whose tokens are chosen in it: score, select and loss in one forward.

in one pass     a teacher whose lm_head is at hand: logits are made once, and held until tokens are chosen
in two          other teachers, rules that need none, backward="kept": kept tokens are projected again
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..loss import fused_selected_loss
from ..types import Head, Selection, TokenScores
from .kept import KeptForward
from .scoring import naming_rollouts, reads_tokens


def chosen_loss(
    trainer: Any,
    student: Head,
    teacher: Any,
    choose: Callable[[TokenScores, slice], Selection],
    lengths: Sequence[int],
    asked: Tensor,
    tokens: Tensor,
    forward: KeptForward | None,
    options: dict[str, Any],
) -> tuple[Tensor, TokenScores, Selection]:
    """The loss, the statistics of all N tokens, and which of them it is of.

    Args:
        trainer: a `TIPTrainer`.
        student: hidden states of the N tokens and lm_head.
        teacher: a `Comparison` of the same tokens.
        choose, lengths: as `StepSelection.inside` gives them.
        asked: bool [B, T], the N tokens.
        tokens: int64 [N], their ids.
        forward: the student's, where gradients go through kept positions alone.
        options: of `Comparison.loss`; without a denominator it is that of the choice.
    """
    fields = trainer.fields_now()
    compares = trainer.projects_teacher(fields)
    if compares and forward is None and hasattr(teacher, "head"):
        with naming_rollouts(asked):
            return fused_selected_loss(
                student,
                teacher.head,
                choose,
                lengths,
                fields=fields or None,
                token_ids=tokens if reads_tokens(fields) else None,
                **options,
            )
    with torch.no_grad(), naming_rollouts(asked):
        scores = trainer.scores_of(student, teacher if compares else None, fields, tokens)
        selection = choose(scores, slice(0, len(tokens)))
    kept = selection.mask
    if options["denominator"] is None:
        options = {**options, "denominator": selection.total.clamp(min=1e-20)}
    rows = student.hidden[kept] if forward is None else forward.rows(kept).to(student.hidden.device)
    # back to [B, T], so that an error about a kept row names its place
    with naming_rollouts(asked.masked_scatter(asked, kept)):
        loss, _ = teacher.take(kept).loss(replace(student, hidden=rows), selection.weight[kept], **options)
    return loss, scores, selection
