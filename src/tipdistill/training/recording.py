"""What a few rollouts of a training step looked like, on disk as token records."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..environments import Episode
from ..integrations._trl import take_rollouts
from ..records import About, Choice, RecordsWriter
from ..score.forward import evaluating
from ..score.models import joined
from ..teachers.local import name_of
from ..teachers.rollouts import bounds_of, score_comparison
from ..types import Rollout, Scored
from .scoring import loss_mask
from .selection import StepSelection
from .trackers import show_records

logger = logging.getLogger(__name__)


def sampled_rows(count: int, rollouts: int, device: Any) -> Tensor:
    """Rows of `count` rollouts, evenly over the batch: neighbours share a prompt.

    Example:
        >>> sampled_rows(3, 8, "cpu")
        tensor([0, 2, 5])
    """
    count = min(count, rollouts)
    return (torch.arange(count, device=device) * rollouts) // count


def choice_of_rows(choice: Choice, mask: Tensor, rows: Tensor) -> Choice:
    """What a step chose of some of this process's rollouts, which come first in the choice over all processes.

    Args:
        choice: of all tokens, this process's first.
        mask: bool [B, T], this process's tokens.
        rows: int64, ascending.
    """
    inside = torch.zeros_like(mask)
    inside[rows] = mask[rows]
    inside = inside[mask]
    return Choice(*(value[: len(inside)][inside] for value in (choice.quadrant, choice.kept, choice.score)))


def rollout_of_row(
    batch: dict[str, Any],
    mask: Tensor,
    row: int,
    tokenizer: Any,
    num_generations: int,
    ends: Sequence[int],
    episodes: Sequence[Episode] | None = None,
) -> Rollout:
    """A rollout of the batch, as tokens and text.

    Args:
        batch: prompt_ids, prompt_mask, completion_ids.
        mask: bool [B, T], the tokens that the student wrote.
        row: which.
        tokenizer: decodes the prompt.
        num_generations: rollouts per prompt.
        ends: token ids that end a completion.
        episodes: of all rows, where the student calls tools.
    """
    episode = None if episodes is None or not mask[row].any() else episodes[row]
    prompt_ids = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist()
    taken = mask if episode is None else batch["completion_mask"].bool()
    completion_ids = batch["completion_ids"][row][taken[row]].tolist()
    return Rollout(
        prompt_id=row // num_generations,
        prompt=tokenizer.decode(prompt_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False),
        prompt_ids=tuple(prompt_ids),
        completion_ids=tuple(completion_ids),
        finished=bool(completion_ids) and completion_ids[-1] in ends,
        turns=() if episode is None else tuple(episode.turns),
        ending="" if episode is None else episode.ending,
        verdict=None if episode is None else episode.verdict,
    )


@torch.no_grad()
def record_step(
    trainer: Any,
    batch: dict[str, Any],
    selection: StepSelection,
    answers: Sequence[Any] | None = None,
    episodes: Sequence[Episode] | None = None,
) -> None:
    """Write records/step-<n> with the tokens of `record_rollouts` rollouts. Changes nothing of the training.

    Every process takes part, since sharded engines need all of them for a forward; the main one writes. A directory
    that cannot be written costs a warning, not the run. A teacher that is elsewhere is not asked again what it has
    answered.

    Args:
        trainer: a `TIPTrainer` in a step.
        batch: its generation batch.
        selection: of the step; its choice where it was made ahead of the loss. Where the tokens of a micro-batch are
            chosen among each other, the records choose among theirs.
        answers: the teacher's of every token of each rollout, where it was asked about them.
        episodes: of all rows, where the student calls tools.
    """
    args, student, teacher, mask = trainer.args, trainer.plain_student(), trainer.teacher, loss_mask(batch)
    sample = sampled_rows(args.record_rollouts, len(mask), mask.device)
    about = About(
        student=name_of(student),
        teacher=teacher.name,
        vocabulary=trainer.vocabulary,
        rules=(args.selection_rule,),
        retention=trainer.retention,
        scope=args.selection_scope,
        seed=args.seed,
        temperature=trainer.temperature,
        step=trainer.state.global_step,
        settings={"normalization": args.normalization, "num_generations": args.num_generations, **bounds_of(teacher)},
    )

    def score(rows: Tensor) -> Scored:
        part, inside = take_rollouts(batch, rows), mask[rows]
        if answers is None or teacher.model is not None:
            said = teacher.answer(part, inside)
        else:
            said = [answers[row] for row in rows.tolist()]

        def compare(part: dict[str, Tensor], inside: Tensor) -> Scored:
            hidden = trainer.hidden_rows(student, part, inside)
            with trainer.student_head(student, hidden) as of_student, teacher.compare(said) as comparison:
                tokens = part["completion_ids"][inside]
                return score_comparison(of_student, comparison, tokens, about.fields(), trainer.temperature)

        return trainer.redirected(trainer.model_wrapped, student, compare, part, inside)

    with evaluating(trainer.model):
        scored = [score(rows) for rows in sample.split(args.per_device_train_batch_size)]
    if not trainer.accelerator.is_main_process or not mask[sample].any():
        return
    every = joined(scored)
    if selection.choice is not None:
        choice: Choice | None = choice_of_rows(selection.choice, mask, sample)
    else:
        choice = selection.of_rows(every.scores, mask, sample)
    tokenizer, directory = trainer._tokenizer, Path(args.output_dir) / "records" / f"step-{about.step}"
    try:
        shutil.rmtree(directory, ignore_errors=True)  # of a run that was resumed from before this step
        with RecordsWriter(directory, tokenizer, about) as writer:
            writer.write(
                [
                    rollout_of_row(batch, mask, row, tokenizer, args.num_generations, trainer.eos_token_ids, episodes)
                    for row in sample.tolist()
                ],
                every,
                choice,
            )
        show_records(trainer.callback_handler.callbacks, directory, about.step or 0)
    except (OSError, ValueError) as error:
        logger.warning(f"Step {about.step}: no token records were written to {directory}: {error}")
