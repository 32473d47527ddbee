"""Is the student's loss that of its own logits? Tried once per run, before its first rollout."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ..integrations._accelerate import calling_lm_head
from ..score.agreement import check_model
from ..score.forward import called
from ..score.models import unread_adapters
from .kept import check_forward


class StudentCheck:
    """Called with the trainer before it samples; see `check_model`, and `kept.check_forward` with backward="kept".

    Raises:
        ValueError: a student whose logits are not those of its hidden states and lm_head, or whose kept positions do
            not go forward alone.
    """

    def __init__(self) -> None:
        self._done = False

    def __call__(self, trainer: Any) -> None:
        if self._done:
            return
        student = trainer.plain_student()
        _check_adapters(student)
        check = partial(
            check_model,
            project=partial(trainer.student_head, student),
            autocast=trainer.accelerator.autocast,
            calling=calling_lm_head,
        )
        with torch.no_grad():
            trainer.redirected(trainer.model_wrapped, student, check, student, "student")
            if trainer.args.backward == "kept":
                kept = partial(check_forward, autocast=trainer.accelerator.autocast)
                trainer.redirected(trainer.model_wrapped, student, kept, student)
        self._done = True


def _check_adapters(student: Any) -> None:
    """Refuse adapters on the lm_head that the loss, which reads weights, would leave out, or their dropout.

    Fresh ones change nothing, so the logits do not tell.
    """
    for name in unread_adapters(student.get_output_embeddings()):
        kind = type(student.peft_config[name]).__name__
        raise ValueError(
            f"the adapter {name} ({kind}) on the lm_head of {called(student)} is no sum of A and B with the weight, "
            "so the loss would leave it out: use plain LoRA there, without lora_bias and use_dora, or take the lm_head "
            "out of target_modules."
        )
    for name, dropout in getattr(student.get_output_embeddings(), "lora_dropout", {}).items():
        if getattr(dropout, "p", 0) > 0:
            raise ValueError(
                f"the adapter {name} on the lm_head of {called(student)} has lora_dropout = {dropout.p}, which the "
                "loss would leave out: set lora_dropout to 0, or take the lm_head out of target_modules."
            )
