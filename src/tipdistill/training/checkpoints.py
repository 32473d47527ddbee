"""Checkpoints beyond Trainer's own: the newest complete one, and one that is saved when a teacher stays away."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from transformers import TrainerCallback

logger = get_logger(__name__)


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint whose last file was written in full, or None; a killed save leaves others behind.

    Args:
        output_dir: the run's directory.

    Example:
        >>> last_complete_checkpoint("no/such/run") is None
        True
    """
    directory = Path(output_dir)
    checkpoints = [path for path in directory.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(checkpoints, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))  # Trainer writes it last
        except (OSError, ValueError):
            logger.warning(f"{path} was left incomplete by an interrupted save; skipping it.")
            continue
        return str(path)
    return None


class LastWholeStep(TrainerCallback):
    """What a checkpoint would have saved right after the last whole step, for one that is saved later.

    The weights stay as that step left them while the next rollouts are written and scored; the random state does not,
    so it is kept here.
    """

    def __init__(self) -> None:
        self.first_step = 0
        self.random_state: tuple[Any, ...] | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.first_step, self.random_state = state.global_step, None

    def on_step_end(self, args, state, control, **kwargs):
        self.random_state = _random_state()

    def on_evaluate(self, args, state, control, **kwargs):
        self.random_state = _random_state()

    def save(self, trainer: Any) -> str:
        """Save a checkpoint of that step, every process together; returns what became of it, in words.

        Args:
            trainer: in the middle of `train`.
        """
        step, accelerator = trainer.state.global_step, trainer.accelerator
        directory = Path(trainer.args.output_dir) / f"checkpoint-{step}"
        if step == self.first_step:
            return "No step was taken since the start, so nothing is lost: start again once the server is back."
        # asked of all processes before any of them acts on it
        here = torch.tensor([(directory / "trainer_state.json").is_file()], device=accelerator.device).long()
        if bool(accelerator.gather(here).all()):
            return f"Step {step} is in {directory}: go on with resume_from_checkpoint."
        if self.random_state is not None:
            _set_random_state(self.random_state)
        trainer._save_checkpoint(trainer.model, trial=None)
        if trainer.args.save_only_model:
            return f"The weights of step {step} are in {directory}; save_only_model left out what resuming needs."
        return f"Step {step} was saved to {directory}: go on with resume_from_checkpoint."


def _random_state() -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def _set_random_state(state: tuple[Any, ...]) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
    if state[3]:
        torch.cuda.set_rng_state_all(state[3])
