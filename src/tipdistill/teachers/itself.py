"""The student as its own teacher: as it was at the start, as it follows itself, or as the model under its adapter.

    frozen        θ_T = θ_S at step 0
    every:n       θ_T ← θ_S after each n-th step
    ema:d         θ_T ← d θ_T + (1 − d) θ_S after each step
    base          θ_T is the model without its adapter (PEFT)

Where all weights are trained, the teacher is a second model beside the student. Where an adapter is trained, there is
one model: the teacher's numbers are put into the adapter's tensors while it answers, and taken out again.

Self-distillation from a prompt that knows more: OPSD (arXiv 2601.18734), SDFT (arXiv 2601.19897).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ..integrations import _accelerate
from ..integrations._trl import take_rollouts
from ..score.forward import evaluating
from ..score.models import head
from . import Surroundings, TeacherCallback
from .local import HeadComparison, HiddenStates, LocalTeacher, no_states
from .named import Update, read_update

_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")


def teacher_of(trainer: Surroundings, args: Any) -> Any:
    """The teacher that is the student of a trainer.

    Args:
        trainer: whose student is loaded and not sharded yet.
        args: the `TIPConfig`, with `teacher_update` and `teacher_offload`.

    Raises:
        ValueError: an update that this student or this engine cannot have.
    """
    update, student = read_update(args.teacher_update), trainer.plain_student()
    engine, adapted = trainer.accelerator.distributed_type, has_adapter(student)
    if update.kind == "base" and not adapted:
        raise ValueError(
            "teacher_update = base is the model under an adapter, and this student has none: train one (use_peft), or "
            "take frozen."
        )
    if adapted and args.teacher_offload:
        raise ValueError(
            "teacher_offload moves a second model, and under an adapter student and teacher are one: leave it off."
        )
    if adapted and args.normalization != "batch" and engine in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            f'a student that teaches itself under an adapter, sharded by {engine.value}, needs normalization="batch": '
            "with the others the teacher is asked in the middle of the student's own forward."
        )
    if adapted and update.kind != "base" and engine in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            f"teacher_update = {args.teacher_update} changes the adapter's tensors while the teacher answers, which "
            f"{engine.value} holds in parts: take base, or train on GPUs without sharding."
        )
    zero_3 = engine == DistributedType.DEEPSPEED and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3
    if not adapted and zero_3:
        raise ValueError(
            "a teacher that is the student is a copy of it, and ZeRO-3 holds the student in parts from the start: use "
            "FSDP2 or ZeRO-2, or give the student's directory as the teacher, which is the same as frozen."
        )
    return AdapterTeacher(trainer, update) if adapted else CopyTeacher(trainer, update, args.teacher_offload)


def has_adapter(model: Any) -> bool:
    """Whether a model is trained through an adapter of PEFT's, as a PeftModel or through `add_adapter`."""
    return hasattr(model, "disable_adapter") or getattr(model, "_hf_peft_config_loaded", False)


class CopyTeacher(LocalTeacher):
    """A copy of the student beside it, sharded like it, whose weights follow as `update` says.

    Args:
        trainer: what it teaches in.
        update: how it follows.
        offload: as for `LocalTeacher`.
    """

    def __init__(self, trainer: Surroundings, update: Update, offload: bool) -> None:
        super().__init__(copy.deepcopy(trainer.plain_student()), trainer, offload)
        self.name = f"self ({_said(update)})"
        if update.kind != "frozen":
            self.callbacks = (Follow(update, trainer, lambda: _weights(self._plain)),)


class AdapterTeacher:
    """The student's own model, with the adapter that the teacher has or with none; see `Teacher` for its members.

    Args:
        trainer: what it teaches in.
        update: how its adapter follows the student's.
    """

    top_k: int | None = None
    model = None
    names: Sequence[str] = ()

    def __init__(self, trainer: Surroundings, update: Update) -> None:
        self._trainer = trainer
        student = trainer.plain_student()
        self.name = f"self ({_said(update)})"
        rows = student.get_output_embeddings().weight.shape[0]
        self.vocabulary: int | None = rows or student.config.get_text_config().vocab_size
        # a sharded model is not called again in the middle of its own forward
        sharded = trainer.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        self.answers_in_loss = not sharded
        self.callbacks: Sequence[TeacherCallback] = ()
        self._adapter: dict[str, Tensor] | None = None
        if update.kind != "base":
            trained = _weights(student, trained=True)
            self._adapter = adapter = {name: value.detach().clone() for name, value in trained.items()}
            # a frozen one too: what a new run draws for its adapter is not what this one drew
            self.callbacks = (Follow(update, trainer, lambda: adapter),)

    @contextmanager
    def _teaching(self, student: Any) -> Iterator[None]:
        """The student's model as the teacher meanwhile; afterwards every number is what it was."""
        with evaluating(student), _without_adapter(student) if self._adapter is None else self._own_adapter(student):
            yield

    @contextmanager
    def _own_adapter(self, student: Any) -> Iterator[None]:
        assert self._adapter is not None
        trained = _weights(student, trained=True)
        own = {name: value.data.clone() for name, value in trained.items()}
        try:
            for name, value in trained.items():
                # through `data`: what a backward has saved of these is put back before it runs
                value.data.copy_(self._adapter[name])
            yield
        finally:
            for name, value in trained.items():
                value.data.copy_(own[name])

    @torch.no_grad()
    def answer(
        self, batch: dict[str, Any], asked: Tensor, pieces: Sequence[Tensor] | None = None
    ) -> list[HiddenStates]:
        trainer, student = self._trainer, self._trainer.plain_student()

        def ask(part: dict[str, Any], inside: Tensor) -> Tensor:
            if self.answers_in_loss:
                return trainer.hidden_rows(student, part, inside)
            return trainer.redirected(trainer.model_wrapped, student, trainer.hidden_rows, student, part, inside)

        answers = [HiddenStates(torch.empty(0))] * len(asked)
        everything = torch.arange(len(asked), device=asked.device)
        with self._teaching(student):
            for rows in [everything] if pieces is None else pieces:
                part = batch if pieces is None else take_rollouts(batch, rows)
                hidden = ask(part, asked[rows])
                for row, states in zip(rows.tolist(), hidden.split(asked[rows].sum(1).tolist()), strict=True):
                    answers[row] = HiddenStates(states if pieces is None else states.clone())
        return answers

    @contextmanager
    def compare(self, answers: Sequence[HiddenStates]) -> Iterator[HeadComparison]:
        trainer, student = self._trainer, self._trainer.plain_student()
        states = [answer.hidden for answer in answers]
        layer = student.get_output_embeddings()
        is_adapted = any(value.requires_grad for value in layer.parameters())
        hidden = torch.cat(states) if states else no_states(layer, trainer.accelerator)
        with _accelerate.reading_lm_head(layer):
            if is_adapted:
                with torch.no_grad(), self._teaching(student):
                    projected = head(student, layer, hidden)
                    # its numbers are about to be put back
                    bias = None if projected.bias is None else projected.bias.clone()
                    projected = replace(projected, weight=projected.weight.clone(), bias=bias)
            else:
                projected = head(student, layer, hidden)
            yield HeadComparison(projected)

    def metrics(self) -> dict[str, float]:
        return {}


class Follow(TeacherCallback):
    """Renews a teacher's weights after the steps that an update names, and keeps them in checkpoints.

    Args:
        update: how they follow.
        trainer: whose student they follow.
        weights: name → the teacher's tensors, changed in place.
    """

    def __init__(self, update: Update, trainer: Surroundings, weights: Callable[[], dict[str, Tensor]]) -> None:
        self._update, self._trainer, self._weights = update, trainer, weights
        # of an average of half-precision weights: a thousandth of a change is less than their rounding
        self._average: dict[str, Tensor] = {}

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        kind, value = self._update.kind, self._update.value
        if kind == "frozen" or (kind == "every" and state.global_step % value):
            return
        student = _weights(self._trainer.plain_student())
        for name, tensor in self._weights().items():
            own, new = _local(tensor), _local(student[name])
            if kind == "every":
                own.copy_(new)
                continue
            average = self._averaged(name, own)
            average.lerp_(new.to(average), 1.0 - value)
            if average is not own:
                own.copy_(average)

    def _averaged(self, name: str, own: Tensor) -> Tensor:
        if own.dtype == torch.float32:
            return own
        if name not in self._average:
            self._average[name] = own.float()
        return self._average[name]

    def save(self, directory: Path) -> None:
        weights = self._weights()
        if not (self._trainer.accelerator.is_main_process or _is_sharded(weights)):
            return
        directory.mkdir(parents=True, exist_ok=True)
        exact = {name: self._average.get(name, _local(tensor)) for name, tensor in weights.items()}
        save_file(
            {name: value.detach().cpu().contiguous() for name, value in exact.items()},
            self._file(directory, weights),
            metadata=self._metadata(),
        )

    def load(self, directory: Path) -> None:
        weights = self._weights()
        path = self._file(directory, weights)
        try:
            with safe_open(path, "pt") as file:
                metadata, names = file.metadata() or {}, set(file.keys())
                if metadata != self._metadata() or names != weights.keys():
                    raise ValueError(
                        f"{path} is the teacher of another run ({metadata}, {len(names)} tensors), and this one is "
                        f"{self._metadata()} with {len(weights)}: resume with the settings that saved it."
                    )
                for name, tensor in weights.items():
                    saved, own = file.get_tensor(name), _local(tensor)
                    if saved.shape != own.shape:
                        raise ValueError(f"{path}: {name} has another shape than here: resume with the same model.")
                    if saved.dtype != own.dtype:
                        self._average[name] = saved.to(own.device)
                    own.copy_(saved)
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{directory} holds no state of the teacher that can be read ({error}), which follows the student "
                f"(teacher_update): resume from a checkpoint that was saved with it."
            ) from error

    def _file(self, directory: Path, weights: dict[str, Tensor]) -> Path:
        rank = self._trainer.accelerator.process_index if _is_sharded(weights) else 0
        return directory / f"teacher-{rank:05d}.safetensors"

    def _metadata(self) -> dict[str, str]:
        processes = self._trainer.accelerator.num_processes if _is_sharded(self._weights()) else 1
        return {"teacher_update": _said(self._update), "processes": str(processes)}


def _said(update: Update) -> str:
    return update.kind if update.kind in ("frozen", "base") else f"{update.kind}:{update.value:g}"


def _weights(model: Any, trained: bool = False) -> dict[str, Tensor]:
    """Name → parameter of a model as it is sharded, names without those of wrappers; those alone that are trained."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # what a forward gathered is no part of it
    weights = {}
    for name, value in model.named_parameters():
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        if value.requires_grad or not trained:
            weights[name] = value
    return weights


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, which shares its memory."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _is_sharded(weights: dict[str, Tensor]) -> bool:
    return any(isinstance(tensor, DTensor) for tensor in weights.values())


@contextmanager
def _without_adapter(model: Any) -> Iterator[None]:
    """The model as if it had no adapter. PEFT freezes adapters meanwhile, and afterwards would train all of them."""
    trained = {name: value.requires_grad for name, value in model.named_parameters()}
    try:
        if hasattr(model, "disable_adapter"):
            with model.disable_adapter():
                yield
        else:
            model.disable_adapters()
            yield
    finally:
        if not hasattr(model, "disable_adapter"):
            model.enable_adapters()
        for name, value in model.named_parameters():
            value.requires_grad_(trained[name])
