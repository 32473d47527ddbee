"""Does vLLM hold the student's weights? The check of integrations/weight_sync.py, run by all processes together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..integrations.weight_sync import WeightSyncCheck, WeightSyncError, engine_completion, tolerance_of
from ..score import token_scores
from ..score.forward import evaluating

Tokens = tuple[list[int], list[int]]


class EngineCheck:
    """Compares vLLM and the student after weight syncs, until the student has moved far enough to trust the sync.

    Args:
        tolerance: largest mean difference in nats; 0: no check; None: by dtype.
    """

    def __init__(self, tolerance: float | None) -> None:
        self.tolerance = tolerance
        self._check: WeightSyncCheck | None = None
        self._probe: Tokens | None = None

    @property
    def done(self) -> bool:
        """Whether the sync has been put to the test, or is not to be."""
        return self.tolerance == 0 or (self._check is not None and self._check.done)

    @torch.no_grad()
    def __call__(self, trainer: Any, prompt_ids: list[int]) -> None:
        """Stop the run where vLLM does not hold the student's weights. Every process takes part.

        Args:
            trainer: a `TIPTrainer`, whose vLLM was just synced.
            prompt_ids: tokens of a prompt, which vLLM continues by a few.

        Raises:
            WeightSyncError: the two differ by more than the tolerance, in this process or another.
        """
        if self.done:
            return
        completion, of_engine = engine_completion(trainer.vllm_generation, prompt_ids)
        if self._probe is None:
            self._probe = (prompt_ids, completion)
        of_student, of_probe = student_logprobs(trainer, [(prompt_ids, completion), self._probe])
        if self._check is None:
            self._check = WeightSyncCheck(
                tolerance_of(_computed_in(trainer), trainer.vllm_generation)
                if self.tolerance is None
                else self.tolerance
            )
        error: WeightSyncError | None = None
        try:
            self._check(of_engine, of_student, of_probe, trainer.state.global_step)
        except WeightSyncError as caught:
            error = caught
        # together: a process that went on alone would wait for the others for ever
        accelerator = trainer.accelerator
        flags = torch.tensor([[self._check.done, error is not None]], device=accelerator.device).long()
        done, failed = accelerator.gather(flags).T.bool()
        self._check.done = bool(done.all())
        if bool(failed.any()):
            raise error or WeightSyncError("another process found that vLLM does not hold the student's weights.")


def student_logprobs(trainer: Any, rows: Sequence[Tokens]) -> list[list[float]]:
    """log P_S of each completion's tokens at temperature 1, over the whole of the student's lm_head.

    Args:
        trainer: a `TIPTrainer`.
        rows: (prompt, completion) pairs.
    """
    student, device = trainer.plain_student(), trainer.accelerator.device

    def of_row(prompt_ids: list[int], completion: list[int]) -> list[float]:
        ids = {"prompt_ids": torch.tensor([prompt_ids]), "completion_ids": torch.tensor([completion])}
        masks = {name.replace("ids", "mask"): torch.ones_like(value) for name, value in ids.items()}
        batch = {name: value.to(device) for name, value in {**ids, **masks}.items()}
        hidden = trainer.hidden_rows(student, batch, batch["completion_mask"].bool())
        with trainer.student_head(student, hidden) as head:
            scores = token_scores(head, token_ids=batch["completion_ids"][0], fields=("student_logprob",))
        return scores.require("student_logprob").tolist()

    with evaluating(trainer.model):
        return [trainer.redirected(trainer.model_wrapped, student, of_row, *row) for row in rows]


def _computed_in(trainer: Any) -> torch.dtype:
    """The dtype of the student's forward."""
    if trainer.args.bf16 or trainer.args.fp16:
        return torch.bfloat16 if trainer.args.bf16 else torch.float16
    return next(iter(trainer.plain_student().parameters())).dtype
