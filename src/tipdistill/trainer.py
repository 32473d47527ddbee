"""TIPTrainer: TRL's DistillationTrainer, trained on the selected tokens only.

Generation, PEFT, sharding, logging and checkpoints are TRL's. What is ours, in the order of a step:

    _generate_and_score_completions   rollout (TRL), then score and select the whole generation batch
    _compute_loss                     student forward, then the divergence of the kept rows alone
    training_step                     what the step did with its tokens, logged
"""

from __future__ import annotations

import difflib
import json
import random
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from accelerate.utils import DistributedType
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import AutoProcessor, PreTrainedModel, TrainerCallback
from trl import DistillationTrainer

from .config import TIPConfig
from .evaluate.task import Task
from .integrations import _accelerate, _trl
from .integrations.weight_sync import WeightSyncCheck, WeightSyncError, engine_completion, tolerance_of
from .loss import fused_divergence_loss
from .records import About, Choice, RecordsWriter
from .score import NonFiniteLogitsError, token_scores
from .score.models import head as head_with
from .score.models import joined, score_heads
from .score.top_k_teacher import DEFAULT_FIELDS, served_divergence_loss, served_scores
from .select import kept_counts, needs_teacher, resolve_rule, rule_fields, select
from .select.quadrants import quadrants
from .tasks import load_task
from .teachers.served import Question, TeacherUnavailableError, Traffic, open_teacher
from .training.evaluation import TaskEvaluation, evaluate_tasks
from .training.monitor import TALLIED, TrainingMonitor, metrics, peak_memory_gib, tally
from .types import Head, Rollout, Scored, Selection, TeacherLogprobs, TokenScores
from .vocabulary import check_same_tokenizer, shared_vocabulary

logger = get_logger(__name__)

_LOGGED_FIELDS = ("entropy", "entropy_norm", "reverse_kl", "forward_kl")
_PREPARATION = ("rollout", "score", "select", "record", "teacher")


class TIPTrainer(DistillationTrainer):
    """Distil a student on its own rollouts, on the tokens that a selection rule keeps.

    L = (1 / |K|) Σ_{t ∈ K} D(P_S(·|c_t) ‖ P_T(·|c_t)), K the kept tokens of the whole generation batch (paper Eq. 9).

    A drop-in for `trl.DistillationTrainer`: same arguments, and a `TIPConfig` for a `DistillationConfig`. Unlike TRL it
    takes heads whose vocabularies are padded to different sizes, checks that the tokenizers agree before it loads
    weights, and resumes exactly in any epoch.

    Args:
        model: student, a model, a PEFT model, a path or a hub id.
        teacher_model: teacher, a model, a path or a hub id.
        args: the configuration.
        train_dataset: rows with a `prompt` column, plain or conversational.
        eval_dataset: the same; its loss is the divergence over all tokens, whatever the rule.
        processing_class: the student's tokenizer; loaded from the student's path where None.
        teacher_processing_class: the teacher's tokenizer, to compare; loaded from the teacher's path where None.
        callbacks, optimizers, quantization_config, peft_config, tools: as in TRL.

    Raises:
        ValueError: no teacher, an empty dataset or one without a prompt column, tokenizers that differ.
        TypeError: `args` is no TIPConfig.

    Example:
        >>> trainer = TIPTrainer(  # doctest: +SKIP
        ...     model="student", teacher_model="teacher", args=TIPConfig("run", retention=0.2), train_dataset=dataset
        ... )
        >>> trainer.train()  # doctest: +SKIP
    """

    _tag_names = ["trl", "distillation", "tipdistill"]  # noqa: RUF012 - a class attribute of TRL's
    _name = "TIP"
    _paper = {  # noqa: RUF012 - a class attribute of TRL's
        "title": "TIP: Token Importance in On-Policy Distillation",
        "id": "2604.14084",
        "citation": (
            "@article{tip2026,\n    title   = {{TIP: Token Importance in On-Policy Distillation}},\n"
            "    year    = 2026,\n    eprint  = {arXiv:2604.14084}\n}"
        ),
    }

    def __init__(
        self,
        model: Any,
        teacher_model: str | PreTrainedModel | None = None,
        args: TIPConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: Any | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (
            None,
            None,
        ),
        quantization_config: Any | None = None,
        peft_config: Any | None = None,
        tools: list[Callable] | None = None,
        teacher_processing_class: Any | None = None,
    ) -> None:
        if args is None:
            args = TIPConfig(f"{_name_of(model).split('/')[-1]}-TIP")
        if not isinstance(args, TIPConfig):
            raise TypeError(f"args must be a TIPConfig, got {type(args).__name__}.")
        if args.teacher_url is not None and teacher_model is not None:
            raise ValueError(f"teacher_url = {args.teacher_url} and teacher_model name two teachers: give one of them.")
        if teacher_model is None and args.teacher_url is None:
            raise ValueError(
                "a teacher is needed: pass teacher_model, a model, a directory or a hub id, or set teacher_url."
            )
        if not isinstance(teacher_model, str) and args.teacher_model_init_kwargs is not None:
            raise ValueError(
                "teacher_model_init_kwargs load a teacher, and teacher_model is loaded already: give its path, or "
                "leave them out."
            )
        for name, dataset in (("train_dataset", train_dataset), *_named(eval_dataset)):
            _check_prompts(name, dataset)
        tasks = [load_task(name) for name in args.task_names()]
        processing_class = processing_class or _load_tokenizer(model, args)
        if teacher_model is not None:
            teacher_processing_class = teacher_processing_class or _load_tokenizer(teacher_model, args, teacher=True)
        if processing_class is not None and teacher_processing_class is not None:
            check_same_tokenizer(processing_class, teacher_processing_class)

        _check_fills_a_batch(train_dataset, args)
        if isinstance(train_dataset, IterableDataset) and args.num_generations > 1:
            raise ValueError(
                f"num_generations = {args.num_generations} repeats prompts, which a stream does not: give a Dataset or "
                "num_generations = 1."
            )
        if args.teacher_offload and (args.deepspeed_plugin is not None or args.fsdp_plugin_args is not None):
            raise ValueError(
                "teacher_offload moves a whole teacher; FSDP and DeepSpeed shard it already. Use their own CPU offload "
                "(fsdp_offload_params, offload_param) and leave teacher_offload off."
            )

        server = None if args.teacher_url is None else open_teacher(args, processing_class)
        monitor = TrainingMonitor(args.drift_factor, args.retention, args.drift_retention)
        super().__init__(
            model=model,
            teacher_model=None,  # TRL refuses a teacher whose vocabulary is padded differently, so it is prepared here
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=[monitor, *(callbacks or [])],
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            tools=tools,
        )
        _accelerate.check_sharding(self.accelerator)
        _accelerate.keep_output_dtype(self.accelerator)
        self._server = server
        teacher = _load_teacher(teacher_model, args) if isinstance(teacher_model, str) else teacher_model
        self._share_vocabulary(teacher)
        if teacher is None:
            self.teacher_model = None
        else:
            teacher.requires_grad_(False).eval()
            self.teacher_model = _accelerate.prepare_teacher(teacher, self.accelerator)

        self._rule_fields = rule_fields(args.selection_rule)
        self._keeps_all = args.selection_rule == "all"
        self._reads_teacher = needs_teacher(args.selection_rule)
        self._weighs = resolve_rule(args.selection_rule).budget == "weight"
        self._divergence = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(self.beta, "jsd")
        self._seconds: dict[str, float] = defaultdict(float)
        self._sums: Tensor | None = None
        self._sums_are_global = False
        self._choice: Choice | None = None
        self._sync_check: WeightSyncCheck | None = None
        self._sync_probe: tuple[list[int], list[int]] | None = None
        self.add_callback(_StepEnd(self._seconds, self._log_step))
        self._first_step = 0
        self._random_state: tuple[Any, ...] | None = None
        if server is not None:
            self.add_callback(_Remember(self))
        if tasks:
            self.add_callback(TaskEvaluation(lambda: self._evaluate_tasks(tasks), args.eval_tasks_on_start))

    def _share_vocabulary(self, teacher: PreTrainedModel | None) -> None:
        if teacher is None:
            self._share_served_vocabulary()
            return
        models = (self._plain_student(), teacher)
        rows, teacher_rows = (model.get_output_embeddings().weight.shape[0] for model in models)
        if 0 in (rows, teacher_rows):  # ZeRO-3 holds partitions; the configuration still knows
            rows, teacher_rows = (model.config.get_text_config().vocab_size for model in models)
        self._vocabulary = shared_vocabulary(rows, teacher_rows, num_tokens=len(self._tokenizer))
        if rows != teacher_rows:
            logger.info(
                f"The lm_heads are padded to different sizes (student {rows}, teacher {teacher_rows} rows); the "
                f"divergence runs over the {self._vocabulary} rows they share."
            )
        self._never_sample(list(range(self._vocabulary, rows)))

    def _share_served_vocabulary(self) -> None:
        assert self._server is not None
        student = self._plain_student()
        rows = student.get_output_embeddings().weight.shape[0] or student.config.get_text_config().vocab_size
        tokens = len(self._tokenizer)
        self._vocabulary = shared_vocabulary(rows, self._server.vocabulary or rows, num_tokens=tokens)
        # a server that gives its likeliest tokens does not tell how many rows of padding its teacher has
        self._never_sample(list(range(self._server.vocabulary or tokens, rows)))

    def _never_sample(self, surplus: list[int]) -> None:
        if surplus and self.use_vllm:
            given = self.vllm_generation.generation_kwargs
            self.vllm_generation.generation_kwargs = {
                **given,
                "logit_bias": {**(given.get("logit_bias") or {}), **dict.fromkeys(surplus, -100.0)},
            }
        elif surplus:  # the teacher has no embedding for these rows, so the student must not sample them
            suppressed = sorted({*(self.generation_config.suppress_tokens or []), *surplus})
            self.generation_kwargs["suppress_tokens"] = self.generation_config.suppress_tokens = suppressed

    @property
    def _monitor(self) -> TrainingMonitor:
        # restore_callback_states_from_checkpoint puts another in the place of the one that was passed
        return next(callback for callback in self.callback_handler.callbacks if isinstance(callback, TrainingMonitor))

    def _plain_student(self) -> Any:
        return self.accelerator.unwrap_model(self.model)

    def _get_train_sampler(self, dataset: Dataset | None = None) -> _trl.EpochSampler:
        generation_batch = (
            self.args.per_device_train_batch_size
            * self.accelerator.num_processes
            * self.args.gradient_accumulation_steps
        )
        return _trl.EpochSampler(
            data_source=self.train_dataset if dataset is None else dataset,
            mini_repeat_count=self.args.num_generations,
            batch_size=generation_batch // self.args.num_generations,
            repeat_count=self.args.gradient_accumulation_steps,
            shuffle=self.shuffle_dataset,
            seed=self.args.seed,
        )

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, has_tool_images=False):
        synced = self.use_vllm and self.state.global_step != self._last_loaded_step
        completion_ids = super()._generate_single_turn(prompt_ids, images, multimodal_fields, has_tool_images)
        if synced and not self._is_vlm:
            self._check_weight_sync(prompt_ids[0])
        for row, ids in enumerate(completion_ids):
            if len(ids) == 0:
                raise ValueError(
                    f"rollout {row} of the batch has a completion of length 0 (its prompt has {len(prompt_ids[row])} "
                    "tokens): there is no token to distil. Check the engine's length limits and stop tokens."
                )
        return completion_ids

    @torch.no_grad()
    def _check_weight_sync(self, prompt_ids: list[int]) -> None:
        """Stop where vLLM does not hold the student's weights, see `WeightSyncCheck`. Every process takes part."""
        if self.args.vllm_sync_tolerance == 0 or (self._sync_check is not None and self._sync_check.done):
            return
        completion, engine = engine_completion(self.vllm_generation, prompt_ids)
        if self._sync_probe is None:
            self._sync_probe = (prompt_ids, completion)
        student = self._plain_student()
        was_training = self.model.training
        self.model.eval()
        try:
            logprobs = self._forward_redirection(
                self.model_wrapped,
                student,
                self._student_logprobs,
                student,
                [(prompt_ids, completion), self._sync_probe],
            )
        finally:
            self.model.train(was_training)
        if self._sync_check is None:
            dtype = next(iter(student.parameters())).dtype
            if self.args.bf16 or self.args.fp16:
                dtype = torch.bfloat16 if self.args.bf16 else torch.float16
            given = self.args.vllm_sync_tolerance
            self._sync_check = WeightSyncCheck(tolerance_of(dtype, self.vllm_generation) if given is None else given)
        error: WeightSyncError | None = None
        try:
            self._sync_check(engine, logprobs[0], logprobs[1], self.state.global_step)
        except WeightSyncError as found:
            error = found
        # together: a process that went on alone would wait for the others for ever
        flags = torch.tensor([[self._sync_check.done, error is not None]], device=self.accelerator.device).long()
        done, failed = self.accelerator.gather(flags).T.bool()
        self._sync_check.done = bool(done.all())
        if bool(failed.any()):
            raise error or WeightSyncError("another process found that vLLM does not hold the student's weights.")

    def _student_logprobs(self, student: Any, rows: list[tuple[list[int], list[int]]]) -> list[list[float]]:
        """log P_S of each completion's tokens at temperature 1, over the whole of the student's lm_head."""
        device = self.accelerator.device
        found = []
        for prompt_ids, completion in rows:
            ids = {"prompt_ids": torch.tensor([prompt_ids]), "completion_ids": torch.tensor([completion])}
            masks = {name.replace("ids", "mask"): torch.ones_like(value) for name, value in ids.items()}
            batch = {name: value.to(device) for name, value in {**ids, **masks}.items()}
            with self.accelerator.autocast():
                hidden = self._hidden(student, batch)[0]
            with self._heads(student, hidden, None) as (head, _):
                scores = token_scores(head, token_ids=batch["completion_ids"][0], fields=("student_logprob",))
            found.append(scores.require("student_logprob").tolist())
        return found

    # Score and select, once per generation batch.

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.model.training:  # an evaluation is no part of a step's time
            batch = super()._generate_and_score_completions(inputs)
            if self._server is not None:
                batch["teacher_logprobs"] = self._ask_teacher(batch, _loss_mask(batch))
            return batch
        batch = self._generate_and_select(inputs)
        # records show both models' likeliest tokens at any token, of which a server is not asked
        if self.args.record_rollouts and self._is_full_step() and self._server is None:
            with self._clock("record"):
                self._record(batch)
        return batch

    def _generate_and_select(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        with self._clock("rollout"):
            batch = super()._generate_and_score_completions(inputs)
        if self.args.normalization == "micro_batch":
            return batch
        if self._keeps_all and not self.args.teacher_offload and self._server is None:
            return batch
        present = [key for key in _trl.MULTIMODAL_KEYS if key in batch]
        if present:
            raise ValueError(
                f'normalization="batch" does not score multimodal inputs yet (the batch has {", ".join(present)}). '
                'Use normalization="micro_batch", which scores inside the loss.'
            )
        mask = _loss_mask(batch)
        served: list[TeacherLogprobs | None] | None = None
        if self._server is not None and self._projects_teacher(self._fields_now()):
            with self._clock("teacher"):
                served = self._ask_teacher(batch, mask)
        with self._clock("score"):
            scores, teacher_hidden = self._score_rollouts(batch, mask, served)
        with self._clock("select"):
            weight = self._select_globally(scores, mask, batch)
        if self._server is not None:
            with self._clock("teacher"):
                batch["teacher_logprobs"] = self._of_kept(batch, mask, weight > 0, served)
        batch["selection_weight"] = weight
        batch["token_entropy"] = scores["entropy"]
        if teacher_hidden is not None:
            batch["teacher_hidden"] = [
                rows[row_weight[row_mask] > 0]
                for rows, row_weight, row_mask in zip(teacher_hidden, weight, mask, strict=True)
            ]
        return batch

    # A teacher on a server.

    def _ask_teacher(self, batch: dict[str, Any], asked: Tensor) -> list[TeacherLogprobs | None]:
        """The served teacher's log-probabilities of the tokens in `asked` [B, T], a rollout each; None for none."""
        assert self._server is not None
        columns = (batch["prompt_ids"], batch["prompt_mask"], batch["completion_ids"], batch["completion_mask"], asked)
        questions = [
            Question(
                prompt[prompt_mask.bool()].tolist(), completion[mask.bool()].tolist(), row.nonzero()[:, 0].tolist()
            )
            for prompt, prompt_mask, completion, mask, row in zip(*(value.cpu() for value in columns), strict=True)
        ]
        found: list[TeacherLogprobs | None] = []
        error: TeacherUnavailableError | ValueError | None = None
        try:
            found = self._server.ask(questions)
        except (TeacherUnavailableError, ValueError) as caught:
            error = caught
        # together: a process that stopped alone would leave the others waiting, and saving a checkpoint takes all
        flags = torch.tensor([[error is not None, isinstance(error, ValueError)]], device=asked.device).long()
        failed, refused = self.accelerator.gather(flags).any(0).tolist()
        if refused:
            raise error if isinstance(error, ValueError) else ValueError("another process was refused by the teacher.")
        if failed:
            raise error or TeacherUnavailableError("another process had no answer from the teacher")
        return found

    def _of_kept(
        self, batch: dict[str, Any], mask: Tensor, kept: Tensor, served: list[TeacherLogprobs | None] | None
    ) -> list[TeacherLogprobs | None]:
        """The second round: only what is trained on is asked about, unless everything was already."""
        if served is None:
            return self._ask_teacher(batch, kept)
        inside = [row_kept[row_mask].cpu() for row_kept, row_mask in zip(kept, mask, strict=True)]
        return [None if rows is None else _take_rows(rows, picked) for rows, picked in zip(served, inside, strict=True)]

    def _save_after_outage(self, error: TeacherUnavailableError) -> TeacherUnavailableError:
        """A checkpoint of the last whole step, as if it had been saved right after it; returns what to raise."""
        step = self.state.global_step
        directory = Path(self.args.output_dir) / f"checkpoint-{step}"
        if step == self._first_step:
            done = "No step was taken since the start, so nothing is lost: start again once the server is back."
        elif self._everywhere((directory / "trainer_state.json").is_file()):
            done = f"Step {step} is in {directory}: go on with resume_from_checkpoint."
        else:
            if self._random_state is not None:
                _set_random_state(self._random_state)
            self._save_checkpoint(self.model, trial=None)
            done = f"Step {step} was saved to {directory}: go on with resume_from_checkpoint."
            if self.args.save_only_model:
                done = f"The weights of step {step} are in {directory}; save_only_model left out what resuming needs."
        return TeacherUnavailableError(f"{error}. {done}")

    def _everywhere(self, here: bool) -> bool:
        """Whether it is so in all processes, asked before any of them acts on it."""
        return bool(self.accelerator.gather(torch.tensor([here], device=self.accelerator.device).long()).all())

    def _is_full_step(self) -> bool:
        every = self.args.score_logging_steps
        return every > 0 and self.state.global_step % every == 0

    def _fields_now(self) -> tuple[str, ...]:
        """Statistics to compute at this step: the rule's own, and the logged ones where they cost no projection."""
        if self._rule_fields is None:
            return ()
        if self._reads_teacher or self._is_full_step():
            return tuple(dict.fromkeys((*self._rule_fields, *_LOGGED_FIELDS)))
        return tuple(dict.fromkeys((*self._rule_fields, "entropy", "entropy_norm")))

    def _projects_teacher(self, fields: tuple[str, ...]) -> bool:
        return not fields or self._reads_teacher or "reverse_kl" in fields

    @torch.no_grad()
    def _score_rollouts(
        self, batch: dict[str, Any], mask: Tensor, served: list[TeacherLogprobs | None] | None = None
    ) -> tuple[dict[str, Tensor], list[Tensor] | None]:
        """Statistics of every completion token, each [B, T] (0 where masked), and the teacher's hidden rows."""
        fields = self._fields_now()
        with_teacher = self._projects_teacher(fields) and self._server is None
        keep_teacher = with_teacher or self.args.teacher_offload
        student = self._plain_student()
        was_training = self.model.training
        self.model.eval()  # no dropout: the scores are the student's that generated
        table: dict[str, Tensor] = {}
        teacher_hidden: list[Tensor] | None = [None] * len(mask) if keep_teacher else None  # type: ignore[list-item]
        try:
            for rows in self._scoring_rows(batch):
                scores, hidden = self._forward_redirection(
                    self.model_wrapped,
                    student,
                    self._score_rows,
                    student,
                    {
                        key: batch[key][rows]
                        for key in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
                    },
                    mask[rows],
                    rows,
                    fields,
                    with_teacher,
                    keep_teacher,
                    None if served is None else _joined_rows([served[row] for row in rows.tolist()]),
                )
                inside = torch.zeros_like(mask)
                inside[rows] = mask[rows]
                for name, value in scores.present():
                    table.setdefault(name, torch.zeros(mask.shape, device=mask.device)).masked_scatter_(inside, value)
                if teacher_hidden is not None:
                    lengths = mask[rows].sum(1).tolist()
                    for row, piece in zip(rows.tolist(), hidden.split(lengths), strict=True):
                        # a copy, so that dropping the unselected rows later frees the scoring batch
                        teacher_hidden[row] = piece.clone()
        finally:
            self.model.train(was_training)
            if self.args.teacher_offload:
                self._offload_teacher()
        return table, teacher_hidden

    def _scoring_rows(self, batch: dict[str, Any]) -> Iterator[Tensor]:
        """Row indices of each scoring forward, the same number of forwards on every rank (sharded engines need it)."""
        widths = list(zip(*(batch[f"{part}_mask"].sum(1).tolist() for part in ("prompt", "completion")), strict=True))
        order = sorted(range(len(widths)), key=lambda row: -sum(widths[row]))
        if self.args.scoring_tokens:
            if self.pad_to_multiple_of is not None:  # nothing is trimmed
                widths = [(batch["prompt_mask"].shape[1], batch["completion_mask"].shape[1])] * len(widths)
            pieces: list[list[int]] = [[]]
            for row in order:
                # side by side, prompts are as wide as the widest of them, and so are completions
                prompt, completion = (
                    max(parts) for parts in zip(*(widths[i] for i in [*pieces[-1], row]), strict=True)
                )
                if pieces[-1] and (len(pieces[-1]) + 1) * (prompt + completion) > self.args.scoring_tokens:
                    pieces.append([])
                pieces[-1].append(row)
        else:
            size = self.args.per_device_train_batch_size
            pieces = [order[first : first + size] for first in range(0, len(order), size)]
        device = batch["prompt_mask"].device
        count = int(self.accelerator.gather(torch.tensor([len(pieces)], device=device)).max())
        while len(pieces) < count:
            largest = pieces.pop(max(range(len(pieces)), key=lambda index: len(pieces[index])))
            pieces += [largest[: len(largest) // 2], largest[len(largest) // 2 :]]
        for piece in pieces:
            yield torch.tensor(sorted(piece), device=device)  # ascending, the order in which a mask over [B, T] reads

    def _score_rows(
        self,
        student: Any,
        batch: dict[str, Tensor],
        mask: Tensor,
        rows: Tensor,
        fields: tuple[str, ...],
        with_teacher: bool,
        keep_teacher: bool,
        served: TeacherLogprobs | None = None,
    ) -> tuple[TokenScores, Tensor | None]:
        batch, mask = self._trimmed(batch, mask)
        with self.accelerator.autocast():
            student_hidden = self._hidden(student, batch)[mask]
            teacher_hidden = self._teacher_hidden(batch)[mask] if keep_teacher else None
        with (
            self._heads(student, student_hidden, teacher_hidden if with_teacher else None) as (head, teacher_head),
            _naming_rollouts(mask, rows),
        ):
            tokens = batch["completion_ids"][mask]
            if served is None:
                return self._scores(head, teacher_head, fields, tokens), teacher_hidden
            served = served.map(lambda value: value.to(head.hidden.device))
            named = fields or DEFAULT_FIELDS
            return served_scores(head, served, named, temperature=self.temperature, token_ids=tokens), None

    def _scores(self, student: Head, teacher: Head | None, fields: tuple[str, ...], tokens: Tensor) -> TokenScores:
        reads_tokens = not fields or any(name.endswith("logprob") for name in fields)
        return token_scores(
            student,
            teacher,
            beta=0.5,  # a score is no loss: rules read the symmetric Jensen-Shannon divergence whatever is trained on
            temperature=self.temperature,
            token_ids=tokens if reads_tokens else None,
            fields=fields or None,
        ).detach()

    def _select_globally(self, scores: dict[str, Tensor], mask: Tensor, batch: dict[str, Any]) -> Tensor:
        """Select over the rollouts of all ranks; returns this rank's weights [B, T]. Sets the loss denominator."""
        gathered = {name: self._gather_rollouts(value) for name, value in scores.items()}
        # as numbers: accelerate pads a bool tensor to int64, on the ranks with shorter completions alone
        everywhere = self._gather_rollouts(mask.long()).bool()
        flat = TokenScores(**{name: value[everywhere] for name, value in gathered.items()})
        rollout = torch.arange(len(everywhere), device=mask.device)[:, None].expand_as(everywhere)[everywhere]
        if len(flat):
            selection = self._select(flat, rollout)
        else:  # nothing but results of tools, on every rank
            nothing = torch.zeros(0, device=mask.device)
            selection = Selection(nothing.bool(), nothing, nothing)
        weight = torch.zeros(everywhere.shape, device=mask.device)
        weight[everywhere] = selection.weight
        batch["num_items_in_batch"] = selection.total
        self._sums, self._sums_are_global = tally(flat, selection), True
        if flat.reverse_kl is not None:
            self._choice = Choice(quadrants(flat), selection.mask, selection.score)
        first = self.accelerator.process_index * len(mask)
        return weight[first : first + len(mask), : mask.shape[1]]

    def _gather_rollouts(self, value: Tensor) -> Tensor:
        return self.accelerator.gather(self.accelerator.pad_across_processes(value, dim=1))

    def _select(self, scores: TokenScores, rollout: Tensor) -> Selection:
        device = rollout.device
        # A function of (seed, step) alone, so that a resumed run draws what the uninterrupted one would have; of the
        # micro-batch and the rank too where each of them draws for itself.
        seed = self.args.seed * 1_000_003 + self.state.global_step
        if self.args.normalization == "micro_batch":
            micro_batch = self._step % self.args.gradient_accumulation_steps
            seed = (seed * 1_009 + micro_batch) * 10_007 + self.accelerator.process_index
        selection = select(
            scores,
            rule=self.args.selection_rule,
            retention=self._monitor.retention,
            rollout=rollout,
            scope=self.args.selection_scope,
            generator=torch.Generator(device=device).manual_seed(seed % 2**63),
        )
        if self._weighs and self.args.normalization == "micro_batch":
            # the global sum of weights is not known ahead, so each micro-batch's is made its number of tokens
            scale = len(selection.weight) / selection.weight.sum().clamp(min=torch.finfo(torch.float32).tiny)
            selection = replace(selection, weight=selection.weight * scale)
        return selection

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        regenerates = self.model.training and (
            self._step % self.args.gradient_accumulation_steps == 0 or self._buffered_inputs is None
        )
        inputs = super()._prepare_inputs(generation_batch)
        if regenerates and self.args.normalization == "micro_batch" and not self._keeps_all:
            self._count_kept_ahead()
        return inputs

    def _count_kept_ahead(self) -> None:
        """The global number of kept tokens, known from the lengths before any token is scored."""
        kept = 0
        for micro_batch in self._buffered_inputs:
            counts = kept_counts(
                _loss_mask(micro_batch).sum(1),
                self._monitor.retention,
                self.args.selection_rule,
                self.args.selection_scope,
            )
            kept += int(counts.sum())
        total = self.accelerator.gather(torch.tensor([kept], device=self.accelerator.device)).sum()
        for micro_batch in self._buffered_inputs:
            micro_batch["num_items_in_batch"] = total

    # What a few rollouts looked like, on disk.

    @torch.no_grad()
    def _record(self, batch: dict[str, Any]) -> None:
        """Write token records of `record_rollouts` rollouts of the main process. Changes nothing of the training."""
        choice, self._choice = self._choice, None
        if any(key in batch for key in _trl.MULTIMODAL_KEYS):
            return
        mask = _loss_mask(batch)
        count = min(self.args.record_rollouts, len(mask))
        sample = (torch.arange(count, device=mask.device) * len(mask)) // count  # evenly: neighbours share a prompt
        about = About(
            student=_name_of(self._plain_student()),
            teacher=_name_of(self.accelerator.unwrap_model(self.teacher_model)),
            vocabulary=self._vocabulary,
            rules=(self.args.selection_rule,),
            retention=self._monitor.retention,
            scope=self.args.selection_scope,
            seed=self.args.seed,
            temperature=self.temperature,
            step=self.state.global_step,
            settings={"normalization": self.args.normalization, "num_generations": self.args.num_generations},
        )
        student = self._plain_student()
        self.model.eval()
        try:
            # every rank takes part, since sharded engines need all of them for a forward
            pieces = [
                self._forward_redirection(
                    self.model_wrapped, student, self._score_sample, student, batch, mask, rows, about.fields()
                )
                for rows in sample.split(self.args.per_device_train_batch_size)
            ]
        finally:
            self.model.train()
            if self.args.teacher_offload:
                self._offload_teacher()
        if not self.accelerator.is_main_process:
            return
        if choice is not None:  # this rank's rollouts come first in the global choice
            inside = torch.zeros_like(mask)
            inside[sample] = mask[sample]
            inside = inside[mask]
            choice = Choice(*(value[: len(inside)][inside] for value in (choice.quadrant, choice.kept, choice.score)))
        directory = Path(self.args.output_dir) / "records" / f"step-{self.state.global_step}"
        try:
            shutil.rmtree(directory, ignore_errors=True)  # of a run that was resumed from before this step
            with RecordsWriter(directory, self._tokenizer, about) as writer:
                writer.write([self._rollout(batch, mask, row) for row in sample.tolist()], joined(pieces), choice)
        except (OSError, ValueError) as error:
            logger.warning(f"Step {self.state.global_step}: no token records were written to {directory}: {error}")

    def _score_sample(
        self, student: Any, batch: dict[str, Any], mask: Tensor, rows: Tensor, fields: tuple[str, ...]
    ) -> Scored:
        keys = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
        piece, mask = self._trimmed({key: batch[key][rows] for key in keys}, mask[rows])
        with self.accelerator.autocast():
            student_hidden, teacher_hidden = self._hidden(student, piece)[mask], self._teacher_hidden(piece)[mask]
        with self._heads(student, student_hidden, teacher_hidden) as (head, teacher_head):
            assert teacher_head is not None
            return score_heads(head, teacher_head, piece["completion_ids"][mask], fields, self.temperature)

    def _rollout(self, batch: dict[str, Any], mask: Tensor, row: int) -> Rollout:
        prompt_ids = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist()
        completion_ids = batch["completion_ids"][row][mask[row]].tolist()
        return Rollout(
            prompt_id=row // self.args.num_generations,
            prompt=self._tokenizer.decode(prompt_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False),
            prompt_ids=tuple(prompt_ids),
            completion_ids=tuple(completion_ids),
            finished=completion_ids[-1:] == [self._tokenizer.eos_token_id],
        )

    # The loss of one micro-batch.

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        self._micro_batch = inputs
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _compute_loss(
        self, unwrapped_student: Any, inputs: dict[str, Any], num_items_in_batch: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        exact = self._micro_batch  # mixed precision under FSDP2 rounds what passes a forward, the number of tokens too
        if self.model.training and exact.get("num_items_in_batch") is not None:
            num_items_in_batch = exact["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        keys = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
        multimodal = {key: inputs[key] for key in _trl.MULTIMODAL_KEYS if key in inputs}
        batch, mask = {key: inputs[key] for key in keys}, _loss_mask(inputs)
        weight = exact.get("selection_weight")
        if not multimodal:
            batch, mask = self._trimmed(batch, mask)
            weight = None if weight is None else weight[:, : mask.shape[1]]
        if self._server is not None:
            return self._served_loss(unwrapped_student, batch, mask, weight, inputs, num_items_in_batch)
        with self.accelerator.autocast():
            hidden = self._hidden(unwrapped_student, batch, multimodal)
            rows = mask if weight is None else weight > 0
            if inputs.get("teacher_hidden") is not None:
                teacher_hidden = torch.cat(inputs["teacher_hidden"])
            else:
                with torch.no_grad():
                    teacher_hidden = self._teacher_hidden(batch, multimodal)[rows]
        options: dict[str, Any] = {
            "divergence": self._divergence,
            "beta": self.beta,
            "temperature": self.temperature,
            "denominator": num_items_in_batch,
        }
        rollouts = torch.arange(len(rows))
        with self._heads(unwrapped_student, hidden[rows], teacher_hidden) as (student, teacher):
            assert teacher is not None
            if weight is not None:  # selected already, over the whole generation batch
                with _naming_rollouts(rows, rollouts):
                    loss = fused_divergence_loss(student, teacher, weight[rows], **options)
                entropy = exact["token_entropy"][:, : mask.shape[1]][mask]
                return loss, entropy.sum(), mask.sum()
            selection = None
            # a micro-batch may hold nothing but what tools wrote
            if self.model.training and not self._keeps_all and len(student.hidden):
                with _naming_rollouts(rows, rollouts):
                    scores, selection = self._score_and_select(student, teacher, rows, batch["completion_ids"][rows])
                kept = selection.mask
                with _naming_rollouts(rows.masked_scatter(rows, kept), rollouts):
                    loss = fused_divergence_loss(
                        _take(student, kept), _take(teacher, kept), selection.weight[kept], **options
                    )
            else:  # every token: one pass gives the loss and the statistics
                with _naming_rollouts(rows, rollouts):
                    loss, scores = fused_divergence_loss(student, teacher, fields=_LOGGED_FIELDS, **options)
        if self.model.training:
            sums = tally(scores, selection)
            self._sums = sums if self._sums is None else self._sums + sums
        return loss, scores.require("entropy").sum(), mask.sum()

    def _served_loss(
        self,
        student: Any,
        batch: dict[str, Tensor],
        mask: Tensor,
        weight: Tensor | None,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with self.accelerator.autocast():
            hidden = self._hidden(student, batch)
        rows = mask if weight is None else weight > 0
        given = (mask.float() if weight is None else weight)[rows]
        teacher = _joined_rows(inputs["teacher_logprobs"]).map(lambda value: value.to(hidden.device))
        with self._heads(student, hidden[rows], None) as (head, _), _naming_rollouts(rows, torch.arange(len(rows))):
            loss, scores = served_divergence_loss(
                head,
                teacher,
                given,
                self._divergence,
                beta=self.beta,
                temperature=self.temperature,
                denominator=given.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch,
                fields=_LOGGED_FIELDS if weight is None else (),
            )
        if weight is None:
            return loss, scores.require("entropy").sum(), mask.sum()
        return loss, inputs["token_entropy"][:, : mask.shape[1]][mask].sum(), mask.sum()

    def _score_and_select(
        self, student: Head, teacher: Head, rows: Tensor, tokens: Tensor
    ) -> tuple[TokenScores, Selection]:
        rollout = torch.arange(len(rows), device=rows.device)[:, None].expand_as(rows)[rows]
        fields = self._fields_now()
        with torch.no_grad():
            scores = self._scores(student, teacher if self._projects_teacher(fields) else None, fields, tokens)
            return scores, self._select(scores, rollout)

    # Hidden states and heads.

    def _trimmed(self, batch: dict[str, Tensor], mask: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The rows without the columns that are padding in all of them (where shapes need not stay fixed)."""
        if self.pad_to_multiple_of is not None:
            return batch, mask
        start = int(batch["prompt_mask"].any(0).int().argmax())
        stop = int(batch["completion_mask"].sum(1).max())
        return {
            name: value[:, start:] if name.startswith("prompt") else value[:, :stop] for name, value in batch.items()
        }, mask[:, :stop]

    def _hidden(self, model: Any, batch: dict[str, Tensor], multimodal: dict[str, Any] | None = None) -> Tensor:
        return self._get_last_hidden_state(
            model,
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
            torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
            batch["completion_ids"].shape[1],
            **(multimodal or {}),
        )

    def _teacher_hidden(self, batch: dict[str, Tensor], multimodal: dict[str, Any] | None = None) -> Tensor:
        if self.args.teacher_offload:
            assert self.teacher_model is not None
            self.teacher_model.to(self.accelerator.device)
        teacher = self.accelerator.unwrap_model(self.teacher_model)
        # through its own wrapper, so that FSDP and DeepSpeed materialise the sharded weights
        return self._forward_redirection(self.teacher_model, teacher, self._hidden, teacher, batch, multimodal)

    @contextmanager
    def _heads(
        self, student: Any, student_hidden: Tensor, teacher_hidden: Tensor | None
    ) -> Iterator[tuple[Head, Head | None]]:
        """Both lm_heads with the hidden states they project, sharded weights gathered once."""
        if self.teacher_model is None:  # it is on a server
            layer = student.get_output_embeddings()
            with _trl.maybe_gather_lm_head_ctx(layer.weight, layer.bias):
                yield head_with(student, layer, student_hidden), None
            return
        teacher = self.accelerator.unwrap_model(self.teacher_model)
        layers = [student.get_output_embeddings(), teacher.get_output_embeddings()]
        with (
            _trl.maybe_gather_lm_head_ctx(layers[0].weight, layers[0].bias),
            _trl.maybe_gather_lm_head_ctx(layers[1].weight, layers[1].bias),
        ):
            heads: list[Head | None] = [
                None if hidden is None else head_with(model, layer, hidden)
                for model, layer, hidden in zip(
                    (student, teacher), layers, (student_hidden, teacher_hidden), strict=True
                )
            ]
            assert heads[0] is not None
            yield heads[0], heads[1]

    def _offload_teacher(self) -> None:
        """Send the teacher to the CPU, but for its lm_head, which the loss still projects the kept rows with."""
        assert self.teacher_model is not None
        self.teacher_model.to("cpu")
        self.accelerator.unwrap_model(self.teacher_model).get_output_embeddings().to(self.accelerator.device)

    # What the step did, logged.

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        started, before = (
            time.perf_counter(),
            sum(self._seconds[name] for name in _PREPARATION),
        )
        loss = super().training_step(model, inputs, num_items_in_batch)
        prepared = sum(self._seconds[name] for name in _PREPARATION) - before
        self._seconds["loss"] += time.perf_counter() - started - prepared
        return loss

    def _log_step(self) -> None:
        assert self._sums is not None, "a training step tallies its tokens before it ends"
        sums = self._sums
        if not self._sums_are_global:
            sums = self.accelerator.gather(sums[None]).sum(0)
        self._sums, self._sums_are_global = None, False
        figures = metrics(sums)
        totals = dict(zip(TALLIED, sums.tolist(), strict=True))
        self._monitor.trained_tokens += round(totals["kept"])
        figures |= {f"time/{name}": seconds for name, seconds in self._seconds.items()}
        figures["tokens_per_second"] = totals["tokens"] / max(sum(self._seconds.values()), 1e-9)
        self._seconds.clear()
        if self._server is not None:
            figures |= self._teacher_traffic()
        for name, value in figures.items():
            self._metrics["train"][name].append(value)
        # TRL logs the mean of what it finds here, and of these the last is meant
        self._metrics["train"]["selection/trained_tokens"] = [self._monitor.trained_tokens]
        self._metrics["train"]["memory/peak_gib"] = [peak_memory_gib()]
        if "selection/dropped_divergence" in figures:
            warning = self._monitor.observe(figures["selection/dropped_divergence"])
            if warning:
                logger.warning(f"Step {self.state.global_step}: {warning}")

    def _teacher_traffic(self) -> dict[str, float]:
        """What asking the teacher took since the last step, over all processes."""
        assert self._server is not None
        traffic, self._server.traffic = self._server.traffic, Traffic()
        names = ("sent", "received", "saved", "asked")
        counts = torch.tensor([[float(getattr(traffic, name)) for name in names]], device=self.accelerator.device)
        totals = self.accelerator.gather(counts).sum(0).tolist()
        return {
            f"teacher/{'tokens_asked' if name == 'asked' else f'bytes_{name}'}": total
            for name, total in zip(names, totals, strict=True)
        }

    def _evaluate_tasks(self, tasks: list[Task]) -> None:
        figures = evaluate_tasks(self, tasks, self.args.eval_num_samples)
        was_training = self.model.training
        self.model.eval()  # in training mode TRL would add the figures of the step, and forget them
        self.log(figures)
        self.model.train(was_training)

    @contextmanager
    def _clock(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - started

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"there is no complete checkpoint in {self.args.output_dir} to resume from: start afresh without "
                    "resume_from_checkpoint, or name the directory of one."
                )
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        except TeacherUnavailableError as error:
            raise self._save_after_outage(error) from error


class _StepEnd(TrainerCallback):
    """Times the optimiser and calls back when the whole step is done, before Trainer logs it."""

    def __init__(self, seconds: dict[str, float], on_step_done: Callable[[], None]) -> None:
        self.seconds = seconds
        self.on_step_done = on_step_done
        self.started = 0.0

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.seconds["optimizer"] += time.perf_counter() - self.started

    def on_step_end(self, args, state, control, **kwargs):
        self.on_step_done()


class _Remember(TrainerCallback):
    """The random state where a checkpoint would save it: after each step and what is measured then."""

    def __init__(self, trainer: TIPTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._first_step, self.trainer._random_state = state.global_step, None

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer._random_state = _random_state()

    def on_evaluate(self, args, state, control, **kwargs):
        self.trainer._random_state = _random_state()


def _random_state() -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def _set_random_state(state: tuple[Any, ...]) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
    if state[3]:
        torch.cuda.set_rng_state_all(state[3])


def _take_rows(rows: TeacherLogprobs, inside: Tensor) -> TeacherLogprobs:
    return rows.map(lambda value: value[inside])


def _joined_rows(pieces: list[TeacherLogprobs | None]) -> TeacherLogprobs:
    """Of several rollouts, one after the other."""
    some = [piece for piece in pieces if piece is not None]
    if not some:
        return TeacherLogprobs(torch.zeros(0, 1), torch.zeros(0, 1, dtype=torch.int64), torch.zeros(0))
    ids = None if some[0].token_ids is None else torch.cat([piece.token_ids for piece in some])  # type: ignore[misc]
    return TeacherLogprobs(torch.cat([p.logprob for p in some]), ids, torch.cat([p.sampled for p in some]))


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


def _loss_mask(batch: dict[str, Any]) -> Tensor:
    """bool [B, T]: the completion tokens that the student itself wrote (no padding, no tool results)."""
    mask = batch["completion_mask"].bool()
    return mask if batch.get("tool_mask") is None else mask & batch["tool_mask"].bool()


@contextmanager
def _naming_rollouts(mask: Tensor, rollouts: Tensor) -> Iterator[None]:
    """Say which rollout and token it was, where the rows are those of mask [R, T] and its first axis is `rollouts`."""
    try:
        yield
    except NonFiniteLogitsError as error:
        row, position = mask.nonzero()[error.token].tolist()
        where = f"rollout {int(rollouts[row])} of the batch, token {position}"
        raise NonFiniteLogitsError(error.token, where, error.cause) from None


def _take(head: Head, mask: Tensor) -> Head:
    return replace(head, hidden=head.hidden[mask])


def _name_of(model: Any) -> str:
    return model if isinstance(model, str) else str(getattr(model.config, "_name_or_path", ""))


def _named(dataset: Any) -> list[tuple[str, Any]]:
    if isinstance(dataset, dict):
        return [(f"eval_dataset[{name!r}]", part) for name, part in dataset.items()]
    return [("eval_dataset", dataset)]


def _check_prompts(name: str, dataset: Any) -> None:
    if dataset is None:
        return
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError(f"{name} is empty: at least one row with a 'prompt' is needed.")
    columns = getattr(dataset, "column_names", None)
    if columns is not None and "prompt" not in columns:
        near = difflib.get_close_matches("prompt", columns, n=1, cutoff=0.4)
        hint = f" Rename '{near[0]}': dataset.rename_column('{near[0]}', 'prompt')." if near else ""
        raise ValueError(f"{name} has no 'prompt' column, its columns are {', '.join(columns)}.{hint}")


def _check_fills_a_batch(dataset: Any, args: TIPConfig) -> None:
    rollouts = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    prompts = rollouts // args.num_generations
    if isinstance(dataset, Dataset) and len(dataset) < prompts:
        raise ValueError(
            f"train_dataset has {len(dataset)} prompts, fewer than the {prompts} of one generation batch ({rollouts} "
            f"rollouts / {args.num_generations} per prompt), so no step would be taken: lower "
            "per_device_train_batch_size or gradient_accumulation_steps, or add prompts."
        )


def _load_tokenizer(model: Any, args: TIPConfig, teacher: bool = False) -> Any | None:
    """The processing class saved with a model; None for an instantiated one that came from nowhere it can be read."""
    name = _name_of(model)
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


def _load_teacher(name: str, args: TIPConfig) -> PreTrainedModel:
    kwargs: dict[str, Any] = dict(args.teacher_model_init_kwargs or {})
    dtype = kwargs.get("dtype")
    kwargs["dtype"] = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    if args.teacher_model_revision is not None:
        kwargs.setdefault("revision", args.teacher_model_revision)
    if args.distributed_state.distributed_type != DistributedType.NO:
        kwargs["device_map"] = None  # "auto" would spread the teacher of every process over all GPUs
    kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    return _trl.create_model_from_path(name, **kwargs)
