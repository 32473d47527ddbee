"""A teacher that sees more: it reads the same completion after a prompt of its own, from a column of the dataset.

    student   P_S(y_t | x, y_<t)
    teacher   P_T(y_t | x', y_<t)      x' the row's teacher prompt: a reference solution, a hint, a system prompt

The tokens are the student's own; only what stands before them differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..chat import encode_prompts
from ..data import check_prompt
from ..integrations._trl import MULTIMODAL_KEYS
from . import Surroundings, Teacher


class PromptedTeacher:
    """A teacher of any kind, after the prompts of a column; a row without one is read after the student's prompt.

    Args:
        teacher: who answers.
        column: of the dataset's rows.
        tokenizer: whose chat template dresses conversations: the teacher's, or the student's.
        trainer: what it teaches in.
    """

    def __init__(self, teacher: Teacher, column: str, tokenizer: Any, trainer: Surroundings) -> None:
        self._teacher, self._column, self._trainer = teacher, column, trainer
        self._tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        self.name, self.vocabulary, self.model = teacher.name, teacher.vocabulary, teacher.model
        self.answers_in_loss, self.top_k = teacher.answers_in_loss, teacher.top_k
        self.callbacks, self.names = teacher.callbacks, teacher.names

    def answer(self, batch: dict[str, Any], asked: Tensor, pieces: Sequence[Tensor] | None = None) -> list[Any]:
        batch = self._with_own_prompts(batch)
        # every process does the same here: agreeing on pieces takes all of them
        return self._teacher.answer(batch, asked, None if pieces is None else self._trainer.scoring_pieces(batch))

    def compare(self, answers: Sequence[Any]) -> AbstractContextManager[Any]:
        return self._teacher.compare(answers)

    def metrics(self) -> dict[str, float]:
        return self._teacher.metrics()

    def _with_own_prompts(self, batch: dict[str, Any]) -> dict[str, Any]:
        prompts = {
            row: example[self._column]
            for row, example in enumerate(batch.get("examples", ()))
            if example.get(self._column) is not None
        }
        if not prompts:
            return batch
        present = [key for key in MULTIMODAL_KEYS if key in batch]
        if present:
            raise ValueError(
                f"a teacher that reads its own prompts ({self._column}) reads text alone, and the batch has "
                f"{', '.join(present)}: remove the images, or the column."
            )
        for row, prompt in prompts.items():
            check_prompt(prompt, row, f"the column {self._column!r} of the batch")
        encoded = dict(zip(prompts, self._encoded(list(prompts.values()), list(prompts)), strict=True))
        ids = [
            torch.tensor(encoded[row], device=own.device) if row in encoded else own[mask.bool()]
            for row, (own, mask) in enumerate(zip(batch["prompt_ids"], batch["prompt_mask"], strict=True))
        ]
        longest = max(map(len, ids))
        multiple = self._trainer.pad_to_multiple_of or 1
        longest = -(-longest // multiple) * multiple
        pad = self._tokenizer.pad_token_id or 0

        def padded(rows: Sequence[Tensor], value: int) -> Tensor:
            return torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0), value=value) for row in rows])

        return {
            **batch,
            "prompt_ids": padded(ids, pad).to(batch["prompt_ids"].dtype),
            "prompt_mask": padded([torch.ones_like(row) for row in ids], 0).to(batch["prompt_mask"].dtype),
        }

    def _encoded(self, prompts: list[Any], rows: list[int]) -> list[list[int]]:
        trainer = self._trainer
        return encode_prompts(
            prompts, self._tokenizer, trainer.chat_template_kwargs, tools=trainer.tools or None, numbers=rows
        )
