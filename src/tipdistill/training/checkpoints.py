"""Checkpoints beyond Trainer's own: which is whole and goes on, and one that is saved when a teacher stays away."""

from __future__ import annotations

import json
import logging
import random
import zipfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from ..text import nearest

logger = logging.getLogger(__name__)  # accelerate's speaks only once there is a trainer

STATE = "trainer_state.json"
_WEIGHTS = (
    "model*.safetensors",
    "pytorch_model*.bin",
    "adapter_model.*",
    "pytorch_model_fsdp_*/*",
    "global_step*/*",
)
_OPTIMIZER = ("optimizer.pt", "optimizer.bin", "optimizer_*/*", "global_step*/*")


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint that is whole and can be resumed from, or None; others are named in a warning.

    A save that was killed, or that met a full disk, leaves a checkpoint that is not whole (`incomplete`).

    Args:
        output_dir: the run's directory.

    Example:
        >>> last_complete_checkpoint("no/such/run") is None
        True
    """
    directory = Path(output_dir)
    numbered = {path: step for path in directory.glob("checkpoint-*") if (step := _number(path)) is not None}
    for path in sorted(numbered, key=lambda path: numbered[path], reverse=True):
        why = incomplete(path)
        if why is None:
            return str(path)
        logger.warning(f"{path} is passed over: {why}.")
    return None


def checkpoint_to_resume(asked: str | bool | None, output_dir: str | Path) -> str | None:
    """The checkpoint that `resume_from_checkpoint` means, None for a run from the start.

    Args:
        asked: true for the newest complete checkpoint, "auto" for the same where there is one, the path of one, or
            null, false or "none".
        output_dir: the run's directory.

    Raises:
        ValueError: there is none, or it is not whole.
        FileNotFoundError: there is nothing at that path.

    Example:
        >>> checkpoint_to_resume("auto", "no/such/run") is None
        True
    """
    if asked is None or str(asked).lower() in ("false", "none", "null", ""):
        return None
    if str(asked).lower() in ("true", "auto"):
        checkpoint = last_complete_checkpoint(output_dir)
        if checkpoint is None and str(asked).lower() == "true":
            raise ValueError(
                f"there is no complete checkpoint in {output_dir} to resume from: start afresh without "
                "resume_from_checkpoint, or name the directory of one."
            )
        return checkpoint
    path = Path(str(asked))
    if not (path / STATE).is_file():
        siblings = [sibling.name for sibling in path.parent.glob("checkpoint-*")]
        raise FileNotFoundError(
            f"--resume_from_checkpoint {asked}: no checkpoint there ({STATE} is missing).{nearest(path.name, siblings)}"
        )
    if (why := incomplete(path)) is not None:
        raise ValueError(f"--resume_from_checkpoint {asked} cannot be resumed from: {why}.")
    return str(path)


def incomplete(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be resumed from, None where it can.

    Each file says itself how long it is: the header of safetensors, the directory at the end of torch's archives. So a
    file that was cut off, or never written, is found without reading weights.

    Args:
        checkpoint: its directory.
    """
    try:
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return f"an interrupted save left {STATE} {'out' if isinstance(error, OSError) else 'unfinished'}"
    step, number = _step_of(state), _number(checkpoint)
    if step is None:
        return f"{STATE} does not say which step it is of (global_step)"
    if number is not None and step != number:
        return f"{STATE} is of another step (global_step is {step:,})"
    try:
        files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
        cut = next((path for path in files if not _is_whole(path)), None)
    except OSError as error:
        return f"it cannot be read ({error})"
    if cut is not None:
        return f"{cut.relative_to(checkpoint)} was not written to its end"
    names = {path.relative_to(checkpoint).as_posix() for path in files}
    if not any(_matches(name, _WEIGHTS) for name in names):
        return "it holds no weights"
    if not any(_matches(name, _OPTIMIZER) for name in names):
        return "it holds no state of the optimizer (save_only_model leaves it out)"
    # DeepSpeed keeps its schedule among its own states
    if "scheduler.pt" not in names and not any(_matches(name, ("global_step*/*",)) for name in names):
        return "it holds no state of the learning rate's schedule (scheduler.pt), which would start again"
    ranks = {name for name in names if _matches(name, ("rng_state*.pth",))}
    if "rng_state.pth" not in ranks and ranks != {f"rng_state_{rank}.pth" for rank in range(max(1, len(ranks)))}:
        return "the random state of a process is missing (rng_state)"
    return None


def final_step(output_dir: str | Path) -> int | None:
    """The step that a finished run's model is of; None where a directory holds no finished run.

    Args:
        output_dir: the run's directory; trainer_state.json in it is what a finished run writes last.

    Example:
        >>> final_step("no/such/run") is None
        True
    """
    directory = Path(output_dir)
    try:
        step = _step_of(json.loads((directory / STATE).read_text(encoding="utf-8")))
        files = [path for path in directory.iterdir() if path.is_file() and _matches(path.name, _WEIGHTS)]
        return step if files and all(map(_is_whole, files)) else None
    except (OSError, ValueError, RecursionError):
        return None


def finished(output_dir: str | Path, step: int, steps: int) -> str:
    """What is said where a finished run is resumed."""
    return (
        f"{output_dir} is finished (step {step} of {steps}): no step was taken, and its model is as it was. To train "
        "on, raise max_steps or num_train_epochs; to train again, choose another output_dir."
    )


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _number(checkpoint: Path) -> int | None:
    digits = checkpoint.name.removeprefix("checkpoint-")
    named = digits != checkpoint.name and digits.isascii() and digits.isdecimal()
    return int(digits) if named else None


def _step_of(state: Any) -> int | None:
    step = state.get("global_step") if isinstance(state, dict) else None
    return step if isinstance(step, int) and not isinstance(step, bool) and step >= 0 else None


def _is_whole(path: Path) -> bool:
    """Whether a file of a checkpoint was written to its end, as far as its kind tells."""
    try:
        return _ends_where_it_says(path)
    except OSError:
        raise
    except Exception:  # damaged bytes raise anything (JSON nested too deeply, a name that is a list)
        return False


def _ends_where_it_says(path: Path) -> bool:
    size = path.stat().st_size
    if path.suffix == ".json":
        content = json.loads(path.read_text(encoding="utf-8"))
        shards = content.get("weight_map") if isinstance(content, dict) and path.name.endswith(".index.json") else None
        return shards is None or all((path.parent / name).is_file() for name in set(shards.values()))
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            length = int.from_bytes(file.read(8), "little")
            if size < 8 + length:
                return False
            header = json.loads(file.read(length))
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
            return size == 8 + length + max(ends, default=0)
        if path.suffix in (".pt", ".pth", ".bin"):
            if file.read(1) == b"\x80":  # pickled, by a torch of old
                return True
            try:
                return bool(zipfile.ZipFile(file).namelist())
            except (zipfile.BadZipFile, OSError):
                return False
    if path.suffix == ".distcp":
        return size > 0 and (path.parent / ".metadata").is_file()
    if path.name == "latest":  # DeepSpeed's, with the name of the folder of states
        return any((path.parent / path.read_text(encoding="utf-8").strip()).glob("*.pt"))
    return True


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
        here = torch.tensor([(directory / STATE).is_file()], device=accelerator.device).long()
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
