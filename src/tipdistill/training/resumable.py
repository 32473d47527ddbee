"""A trainer that can be stopped at any time: what it saves is whole or absent, and it goes on as if never stopped.

- **Saves** are staged in `<directory>/.saving` and renamed when every process has written its part.
- **A signal** (SIGTERM, SIGUSR1, Ctrl-C) lets the step end, saves a checkpoint and stops; all processes agree on it.
- **A finished run** that is resumed takes no step.
- **One run** at a time writes to an output directory.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback
from transformers.trainer_utils import rotate_checkpoints
from trl import DistillationTrainer

from ..files import alone, put_in_place, sync_tree
from ..signals import StopRequest, stop
from ..teachers import Teacher, TeacherUnavailableError
from ..teachers.local import name_of
from .ahead import RolloutsAhead, RolloutsUnavailableError
from .card import complete_card
from .checkpoints import STATE, LastWholeStep, checkpoint_to_resume, final_step, finished

logger = logging.getLogger(__name__)

STAGING = ".saving"
_LAST = ("*.index.json", "*.bin", "*.safetensors")  # put in place after the other files, in the reverse of this order


@contextmanager
def alone_in(directory: str | Path) -> Iterator[None]:
    """Hold the output directory of a training run against others: the main process does, and all fail with it.

    Raises:
        ValueError: another process is at work there.
    """
    with ExitStack() as stack:
        from_main(lambda: stack.enter_context(alone(directory, "training run")))
        yield


def from_main(ask: Callable[[], Any]) -> Any:
    """What the main process finds, or the error that it meets, on every process."""
    state = PartialState()
    if state.num_processes == 1:
        return ask()
    said: list[Any] = [None, None]
    if state.is_main_process:
        try:
            said[0] = ask()
        except (ValueError, OSError) as error:
            said[1] = error
    broadcast_object_list(said)
    if said[1] is not None:
        raise said[1]
    return said[0]


class ResumableTrainer(DistillationTrainer):
    """TRL's trainer, stopped and resumed without loss; see the head of this file."""

    _staging: Path | None = None
    _saved_step = -1
    _last_whole_step: LastWholeStep
    teacher: Teacher
    _ahead: RolloutsAhead

    @property
    def stop_request(self) -> StopRequest:
        """What a signal asked for; enter it around what must not be cut off."""
        if not hasattr(self, "_stop_request"):
            self._stop_request = StopRequest("the step is finished and a checkpoint saved first")
            self._stop_request.speaks = self.accelerator.is_main_process
            self.add_callback(_FirstStep(self._stop_request))
        return self._stop_request

    # Train: alone, from where the run stands, to its end or to a signal.

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        with alone_in(self.args.output_dir), self.stop_request:
            checkpoint = from_main(lambda: self._checkpoint(resume_from_checkpoint))
            self._ahead = RolloutsAhead(self)  # what a run that was stopped left is of no other
            try:
                trained = super().train(checkpoint, *args, **kwargs)
            except (TeacherUnavailableError, RolloutsUnavailableError) as error:
                raise type(error)(f"{error}. {self._last_whole_step.save(self)}") from error
            if self.stop_request.is_outermost and (signum := self._asked_to_stop()):
                self._stop(signum, self.model, None)  # it came after the last step
            return trained

    def _checkpoint(self, asked: str | bool | None) -> str | None:
        """The checkpoint to resume from; the final model of a finished run, where no checkpoint is of its last step."""
        done = final_step(self.args.output_dir) if asked in (True, "auto") else None
        if done is not None and done >= self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]:
            newest = checkpoint_to_resume("auto", self.args.output_dir)
            is_last = newest is not None and int(newest.rpartition("-")[2]) >= done
            return newest if is_last else str(self.args.output_dir)
        return checkpoint_to_resume(asked, self.args.output_dir)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            # Trainer looks only after a step whether there is one left
            self.control.should_training_stop = True
            if self.accelerator.is_main_process and final_step(self.args.output_dir) is not None:
                logger.warning(finished(self.args.output_dir, self.state.global_step, self.state.max_steps))
            return
        super()._run_epoch(*args, **kwargs)

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, model: Any, trial: Any, *args: Any, **kw: Any
    ) -> None:
        signum = self._asked_to_stop()
        if signum:
            self.control.should_log = self.control.should_save = True
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kw)
        if signum:
            self._stop(signum, model, trial)

    def _stop(self, signum: int, model: Any, trial: Any) -> NoReturn:
        step, steps = self.state.global_step, self.state.max_steps
        if self._saved_step != step:
            self._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        where = Path(self.args.output_dir) / f"checkpoint-{step}"
        told = f"step {step} of {steps} is saved in {where}: go on with --resume_from_checkpoint true."
        stop(signum, told if self.accelerator.is_main_process else "")

    def _asked_to_stop(self) -> int:
        """The signal that reached any process, the same on all of them; 0 for none."""
        request = self.stop_request
        if self.accelerator.num_processes > 1:
            asked = torch.tensor([request.signum], device=self.accelerator.device)
            request.signum = int(self.accelerator.gather(asked).max())
        return request.signum

    # Save: whole or not at all.

    @contextmanager
    def _staged(self, parent: Path, together: bool = True) -> Iterator[Path]:
        """A directory to write to; what is in it is put into `parent` once the block has ended.

        Args:
            parent: made where it is missing.
            together: every process is here, and may write; otherwise those that save write, each for itself.
        """
        staging, saves = parent / STAGING, self.args.should_save
        wait = self.accelerator.wait_for_everyone if together else lambda: None
        if saves:
            shutil.rmtree(staging, ignore_errors=True)  # of a save that was killed
            staging.mkdir(parents=True)
        wait()
        self._staging = staging
        try:
            yield staging
        except OSError:  # no space: the part that was written need not fill the disk
            if saves:
                shutil.rmtree(staging, ignore_errors=True)
            raise
        finally:
            self._staging = None
        wait()
        if saves:
            self._put_into(parent, staging)
        wait()
        if together and not saves and self.args.local_process_index == 0 and staging.is_dir():
            self._put_into(parent, staging)  # the part of a host without a disk in common with the main process

    def _put_into(self, parent: Path, staging: Path) -> None:
        sync_tree(staging)
        for path in sorted(staging.iterdir(), key=lambda path: [fnmatch(path.name, kind) for kind in _LAST]):
            put_in_place(path, parent / path.name)
        staging.rmdir()

    # What a teacher that follows the student needs to go on, and rollouts that were written ahead, are saved and loaded
    # with the optimizer.

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        for callback in self.teacher.callbacks:
            callback.save(Path(output_dir))
        self._ahead.save(Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or Path(checkpoint) == Path(self.args.output_dir):
            return  # of a finished run, whose last model is no checkpoint
        for callback in self.teacher.callbacks:
            callback.load(Path(checkpoint))
        self._ahead.load(Path(checkpoint))

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        name, run = f"checkpoint-{self.state.global_step}", Path(self._get_output_dir(trial))
        with self._staged(run) as staging:
            only_model = self.args.save_only_model
            # a run that was told to stop has to go on from here
            self.args.save_only_model = only_model and not self.stop_request.signum
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.save_only_model = only_model
            best = self.state.best_model_checkpoint
            if best is not None and Path(best).parent == staging:
                self.state.best_model_checkpoint = str(run / name)
                if self.args.should_save:
                    self.state.save_to_json(str(staging / name / STATE))
        self._saved_step = self.state.global_step
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run / name))
        if self.args.should_save:
            rotate_checkpoints(str(run), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self._staging is not None:
            super().save_model(output_dir, _internal_call=True)
            return
        final = Path(self.args.output_dir if output_dir is None else output_dir)
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        with self._staged(final, together=sharded) as staging:
            if self.args.should_save and (final / "README.md").is_file():
                shutil.copy2(final / "README.md", staging)  # PEFT adds to it
            super().save_model(str(staging), _internal_call=True)
            written = set(os.listdir(staging)) if self.args.should_save else set()
        if written & {"model.safetensors", "model.safetensors.index.json"}:
            for path in final.glob("model*.safetensors*"):  # shards of a model that was there before
                if path.name not in written:
                    path.unlink()
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def save_state(self) -> None:
        """Write the log of the run; with the final model it says that the run is finished."""
        with self._staged(Path(self.args.output_dir), together=False) as staging:
            if self.is_world_process_zero():
                self.state.save_to_json(str(staging / STATE))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        output_dir = self.args.output_dir
        self.args.output_dir = str(self._staging or output_dir)
        try:
            super().create_model_card(*args, **kwargs)
            if self.is_world_process_zero():
                card = Path(self.args.output_dir) / "README.md"
                student, place = name_of(self.plain_student()), self.hub_model_id or str(output_dir)
                complete_card(card, student, self.teacher.name, self.args, self.state.log_history, place)
        finally:
            self.args.output_dir = output_dir


class _FirstStep(TrainerCallback):
    """From the first step on there is something to lose."""

    def __init__(self, request: StopRequest) -> None:
        self.request = request

    def on_step_begin(self, args, state, control, **kwargs):
        self.request.waits = True

    def on_epoch_end(self, args, state, control, **kwargs):
        self.request.waits = True
