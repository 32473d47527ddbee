"""A teacher in this process: its backbone gives hidden states, its lm_head projects those that are needed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor
from transformers import AutoProcessor, PreTrainedModel

from ..integrations import _accelerate, _trl
from ..loss import fused_divergence_loss
from ..positions import check_positions, position_limit
from ..score import token_scores
from ..score.agreement import check_model
from ..score.models import head, lm_head_dtype
from ..score.top import top_of_both
from ..types import Head, TokenScores, TopTokens
from ..vocabulary import Names, check_same_tokenizer
from . import Surroundings, TeacherCallback

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HiddenStates:
    """A teacher's answer: last hidden states [n, H] at the positions that predict n tokens."""

    hidden: Tensor

    def __len__(self) -> int:
        return len(self.hidden)

    def map(self, function: Callable[[Tensor], Tensor]) -> HiddenStates:
        """Apply `function` to the hidden states (index, copy, move)."""
        return HiddenStates(function(self.hidden))


@dataclass(frozen=True)
class HeadComparison:
    """Hidden states and lm_head of a teacher, which give every statistic and every divergence exactly."""

    head: Head

    def take(self, kept: Tensor) -> HeadComparison:
        return HeadComparison(replace(self.head, hidden=self.head.hidden[kept]))

    def scores(self, student: Head, fields: Sequence[str], temperature: float, token_ids: Tensor | None) -> TokenScores:
        # a score is no loss: rules read the symmetric Jensen-Shannon divergence (β = ½) whatever is trained on
        return token_scores(
            student, self.head, beta=0.5, temperature=temperature, token_ids=token_ids, fields=fields or None
        ).detach()

    def likeliest(self, student: Head, k: int, temperature: float) -> tuple[TopTokens, TopTokens]:
        return top_of_both(student, self.head, k, temperature)

    def loss(
        self,
        student: Head,
        weight: Tensor | None,
        *,
        divergence: str,
        beta: float,
        temperature: float,
        denominator: Tensor | float | None,
        fields: Sequence[str] = (),
    ) -> tuple[Tensor, TokenScores]:
        options: dict[str, Any] = {"beta": beta, "temperature": temperature, "denominator": denominator}
        if fields:
            return fused_divergence_loss(student, self.head, weight, divergence, fields=fields, **options)
        return fused_divergence_loss(student, self.head, weight, divergence, **options), TokenScores()


class LocalTeacher:
    """A frozen model beside the student, sharded like it; see `Teacher` for its members.

    Args:
        model: a transformers model.
        trainer: what it teaches in.
        offload: keep its backbone on the CPU but while it answers; then it is asked before the loss, once per
            generation batch. Its lm_head stays, since the loss projects the kept rows with it.
    """

    top_k: int | None = None
    callbacks: Sequence[TeacherCallback] = ()
    names: Sequence[str] = ()

    def __init__(self, model: PreTrainedModel, trainer: Surroundings, offload: bool) -> None:
        model.requires_grad_(False).eval()
        self.name = name_of(model)
        # before it is sharded; ZeRO-3 holds partitions from the start, and the configuration still knows
        rows = model.get_output_embeddings().weight.shape[0]
        self.vocabulary: int | None = rows or model.config.get_text_config().vocab_size
        self._limit = position_limit(model.config)
        self.model = _accelerate.prepare_teacher(model, trainer.accelerator)
        self.offload, self.answers_in_loss = offload, not offload
        self._trainer = trainer
        check = partial(
            check_model,
            project=self._head,
            autocast=trainer.accelerator.autocast,
            calling=_accelerate.calling_lm_head,
        )
        with torch.no_grad():
            trainer.redirected(self.model, self._plain, check, self._plain, "teacher")
        if offload:
            self._leave()

    @property
    def _plain(self) -> Any:
        return self._trainer.accelerator.unwrap_model(self.model)

    @torch.no_grad()
    def answer(
        self, batch: dict[str, Any], asked: Tensor, pieces: Sequence[Tensor] | None = None
    ) -> list[HiddenStates]:
        any_asked = asked.any(1)
        if bool(any_asked.any()):
            prompt, completion = (
                int(batch[f"{part}_mask"][any_asked].sum(1).max()) for part in ("prompt", "completion")
            )
            check_positions(
                {"teacher": self._limit}, prompt, completion, "max_completion_length", " or shorten prompts"
            )
        if self.offload:
            self.model.to(self._trainer.accelerator.device)
        plain, answers = self._plain, [HiddenStates(torch.empty(0))] * len(asked)
        everything = torch.arange(len(asked), device=asked.device)
        for rows in [everything] if pieces is None else pieces:
            part = batch if pieces is None else _trl.take_rollouts(batch, rows)
            part = with_known_padding(part, self.vocabulary)
            # through its own wrapper, so that FSDP and DeepSpeed materialise the sharded weights
            hidden = self._trainer.redirected(self.model, plain, self._trainer.hidden_rows, plain, part, asked[rows])
            for row, states in zip(rows.tolist(), hidden.split(asked[rows].sum(1).tolist()), strict=True):
                # a copy, so that dropping the unselected rows later frees the whole piece
                answers[row] = HiddenStates(states if pieces is None else states.clone())
        if self.offload:
            self._leave()
        return answers

    def _leave(self) -> None:
        self.model.to("cpu")
        self._plain.get_output_embeddings().to(self._trainer.accelerator.device)

    @contextmanager
    def _head(self, hidden: Tensor) -> Iterator[Head]:
        plain = self._plain
        layer = plain.get_output_embeddings()
        with _accelerate.reading_lm_head(layer):
            yield head(plain, layer, hidden)

    @contextmanager
    def compare(self, answers: Sequence[HiddenStates]) -> Iterator[HeadComparison]:
        states = [answer.hidden for answer in answers]
        layer = self._plain.get_output_embeddings()
        with self._head(torch.cat(states) if states else no_states(layer, self._trainer.accelerator)) as projected:
            yield HeadComparison(projected)

    def metrics(self) -> dict[str, float]:
        return {}


def no_states(layer: Any, accelerator: Any) -> Tensor:
    """Hidden states [0, H] of a teacher that has no rollout.

    Args:
        layer: its lm_head.
        accelerator: of the run.
    """
    shape = getattr(layer.weight, "ds_shape", layer.weight.shape)  # ZeRO-3 holds partitions
    empty = torch.zeros(0, shape[-1], dtype=layer.weight.dtype, device=accelerator.device)
    with accelerator.autocast():
        return empty.to(lm_head_dtype(empty))


def with_known_padding(batch: dict[str, Any], vocabulary: int | None) -> dict[str, Any]:
    """A batch whose padding is a token that the teacher has an embedding of, where the student's was added to its own.

    Args:
        batch: prompt_ids, prompt_mask, completion_ids, completion_mask, [B, ...] each, and others.
        vocabulary: rows of the teacher's lm_head; None: not known.

    Example:
        >>> ids = {f"{part}_ids": torch.tensor([[9, 3]]) for part in ("prompt", "completion")}
        >>> masks = {f"{part}_mask": torch.tensor([[0, 1]]) for part in ("prompt", "completion")}
        >>> with_known_padding(ids | masks, 8)["prompt_ids"]
        tensor([[7, 3]])
    """
    most = torch.iinfo(torch.int64).max if vocabulary is None else vocabulary - 1
    known = {
        f"{part}_ids": torch.where(
            batch[f"{part}_mask"].bool(), batch[f"{part}_ids"], batch[f"{part}_ids"].clamp(max=most)
        )
        for part in ("prompt", "completion")
    }
    return {**batch, **known}


def check(
    teacher_model: Any, args: Any, processing_class: Any, teacher_processing_class: Any
) -> tuple[Any | None, dict[int, Names]]:
    """Refuse a teacher that cannot be, before its weights are loaded; see `tipdistill.teachers.choose_teacher`.

    Returns:
        Its tokenizer, where there is one, and the reserved tokens that it reads as others.
    """
    differing: dict[int, Names] = {}
    if not isinstance(teacher_model, str) and args.teacher_model_init_kwargs is not None:
        raise ValueError(
            "teacher_model_init_kwargs load a teacher, and teacher_model is loaded already: give its path, or leave "
            "them out."
        )
    teacher_processing_class = teacher_processing_class or load_tokenizer(teacher_model, args, teacher=True)
    if processing_class is not None and teacher_processing_class is not None:
        differing = check_same_tokenizer(processing_class, teacher_processing_class)
    if args.teacher_offload and (args.deepspeed_plugin is not None or args.fsdp_plugin_args is not None):
        raise ValueError(
            "teacher_offload moves a whole teacher; FSDP and DeepSpeed shard it already. Use their own CPU offload "
            "(fsdp_offload_params, offload_param) and leave teacher_offload off."
        )
    return teacher_processing_class, differing


def load(teacher_model: Any, args: Any) -> PreTrainedModel:
    """The model itself, loaded as the configuration says where it is a name."""
    if not isinstance(teacher_model, str):
        return teacher_model
    kwargs: dict[str, Any] = dict(args.teacher_model_init_kwargs or {})
    dtype = kwargs.get("dtype")
    kwargs["dtype"] = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    if args.teacher_model_revision is not None:
        kwargs.setdefault("revision", args.teacher_model_revision)
    if args.distributed_state.distributed_type != DistributedType.NO:
        kwargs["device_map"] = None  # "auto" would spread the teacher of every process over all GPUs
    kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    return _trl.create_model_from_path(teacher_model, **kwargs)


def load_tokenizer(model: Any, args: Any, teacher: bool = False) -> Any | None:
    """The processing class saved with a model; None for an instantiated one that came from nowhere it can be read."""
    name = name_of(model)
    if not name:
        return None
    kwargs = (args.teacher_model_init_kwargs if teacher else args.model_init_kwargs) or {}
    revision = (args.teacher_model_revision if teacher else None) or dict(kwargs).get("revision")
    try:
        return AutoProcessor.from_pretrained(
            name,
            revision=revision,
            truncation_side="left",
            padding_side="left",
            trust_remote_code=args.trust_remote_code,
        )
    except (OSError, ValueError):
        if isinstance(model, str):
            raise
        argument = "teacher_processing_class" if teacher else "processing_class"
        logger.warning(f"There is no tokenizer at {name}, so the two are not compared: pass {argument}.")
        return None


def name_of(model: Any) -> str:
    """The name or directory that a model came from, empty where it has none."""
    return model if isinstance(model, str) else str(getattr(model.config, "_name_or_path", ""))
