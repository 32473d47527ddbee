"""TIPTrainer: TRL's DistillationTrainer, trained on the selected tokens only.

Generation, PEFT, sharding, logging and checkpoints are TRL's. What is ours, in the order of a step:

    rollout   _generate_and_score_completions   the student writes (TRL), now or a step ahead (training/ahead.py)
    score     _score                            statistics of every token, once per generation batch
    select    training/selection.py             which tokens are trained on, over the rollouts of all processes
    loss      _compute_loss                     student forward, then the divergence of the kept rows alone
    log       _log_step                         what the step did with its tokens

Where the tokens can be selected inside the loss, scoring is a part of it and one student forward is saved. A step does
not know where its teacher lives: that is the business of `teachers/`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from .arrow import as_written
from .chat import check_chat_template_kwargs, encode_prompts, is_conversational
from .config import TIPConfig
from .environments import read_environment
from .evaluate.task import Task
from .integrations import _accelerate, _trl
from .integrations._trl import TOKEN_KEYS, take_rollouts, without_false_counts
from .policy import sampled_with
from .score import token_scores
from .score.forward import evaluating, last_hidden_states
from .score.models import head, lm_head_dtype
from .select import needs_teacher, resolve_rule, rule_fields
from .teachers import Comparison, Teacher, choose_teacher
from .teachers.local import load_tokenizer, name_of
from .training.ahead import RolloutsAhead
from .training.card import PAPER, TAGS
from .training.checkpoints import LastWholeStep, last_complete_checkpoint
from .training.checks import check_arguments, teacher_prompt_column, used_columns
from .training.choosing import chosen_loss
from .training.engine_check import EngineCheck
from .training.episodes import as_played, read_tools
from .training.evaluation import TaskEvaluation, evaluate_tasks, load_tasks
from .training.images import prepared, text_alone, with_images
from .training.kept import KeptForward
from .training.lengths import check_batch, check_completions, check_problems_fit, check_prompts_fit, position_limits
from .training.monitor import (
    ALL_FIELDS,
    LOGGED_FIELDS,
    TALLIED,
    WATCHED,
    StepClock,
    StepEnd,
    TrainingMonitor,
    metrics,
)
from .training.progress import MetricsFile
from .training.recording import record_step
from .training.resumable import ResumableTrainer
from .training.rollouts import check_asked, for_processor, leave_out_router, state_policy
from .training.scoring import (
    finished_alone,
    for_models,
    loss_mask,
    naming_rollouts,
    reads_tokens,
    scores_by_position,
    scoring_pieces,
    take_tokens,
    trimmed,
)
from .training.selection import StepSelection
from .training.shared_tokens import check_problems_shared, check_prompts_shared, share_tokens
from .training.student_check import StudentCheck
from .types import Head, TokenScores

logger = get_logger(__name__)

__all__ = ["TIPTrainer", "last_complete_checkpoint"]


class TIPTrainer(ResumableTrainer):
    """Distil a student on its own rollouts, on the tokens that a selection rule keeps.

    L = (1 / |K|) Σ_{t ∈ K} D(P_S(·|c_t) ‖ P_T(·|c_t)), K the kept tokens of the whole generation batch (paper Eq. 9).

    A drop-in for `trl.DistillationTrainer`: same arguments, and a `TIPConfig` for a `DistillationConfig`. Unlike TRL it
    takes heads whose vocabularies are padded to different sizes, checks that the tokenizers agree before it loads
    weights, and resumes exactly in any epoch.

    Args:
        model: student, a model, a PEFT model, a path or a hub id.
        teacher_model: teacher, a model, a path, a hub id or "self"; or several, name → any of these or a server's URL
            (docs/teachers.md); that of `args` where None.
        args: the configuration.
        train_dataset: rows with a `prompt` column, plain or conversational.
        eval_dataset: the same; its loss is the divergence over all tokens, whatever the rule.
        processing_class: the student's tokenizer; loaded from the student's path where None.
        teacher_processing_class: the teacher's tokenizer, to compare; loaded from the teacher's path where None.
        callbacks, optimizers, quantization_config, peft_config, tools: as in TRL.
        environment_factory: as in TRL's GRPOTrainer: makes the object that a rollout acts on, whose public methods are
            tools; `args.environment` names one by its path.

    Raises:
        ValueError: no teacher, an empty dataset or one without a prompt column, tokenizers that differ.
        TypeError: `args` is no TIPConfig.

    Example:
        >>> trainer = TIPTrainer(  # doctest: +SKIP
        ...     model="student", teacher_model="teacher", args=TIPConfig("run", retention=0.2), train_dataset=dataset
        ... )
        >>> trainer.train()  # doctest: +SKIP
    """

    _tag_names = TAGS
    _name = "TIP"
    _paper = PAPER

    def __init__(
        self,
        model: Any,
        teacher_model: str | PreTrainedModel | dict[str, Any] | None = None,
        args: TIPConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: Any | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: Any | None = None,
        peft_config: Any | None = None,
        tools: list[Callable] | None = None,
        environment_factory: Callable[[], Any] | None = None,
        teacher_processing_class: Any | None = None,
    ) -> None:
        # what can be refused before weights are loaded
        if args is None:
            args = TIPConfig(f"{name_of(model).split('/')[-1]}-TIP")
        if not isinstance(args, TIPConfig):
            raise TypeError(f"args must be a TIPConfig, got {type(args).__name__}.")
        if teacher_model is None:
            teacher_model = args.teacher_model_name_or_path
        check_arguments(model, teacher_model, args, train_dataset, eval_dataset)
        tasks = load_tasks(args.task_names(), args)
        train_dataset, eval_dataset = as_written(train_dataset), as_written(eval_dataset)
        processing_class = processing_class or load_tokenizer(model, args)
        check_chat_template_kwargs(args.chat_template_kwargs, processing_class)
        self.text_alone = text_alone(teacher_model, args, processing_class)
        train_dataset = prepared(train_dataset, "train_dataset", args, processing_class, self.text_alone)
        eval_dataset = prepared(eval_dataset, "eval_dataset", args, processing_class, self.text_alone)
        environment = args.environment if environment_factory is None else environment_factory
        factory = None if environment is None else read_environment(environment)
        self._run_tools = read_tools(args, processing_class, tools, factory, train_dataset, eval_dataset)
        teacher_prompts = teacher_prompt_column(teacher_model, args, train_dataset, eval_dataset)
        limits = position_limits(model, teacher_model, args)
        told = args if self._run_tools is None else self._run_tools.telling(args)
        check_prompts_fit(limits, train_dataset, processing_class, told)
        check_prompts_fit(limits, eval_dataset, processing_class, told, "eval_dataset")
        check_problems_fit(limits, tasks, processing_class, args)
        teacher_of = choose_teacher(teacher_model, args, processing_class, teacher_processing_class, teacher_prompts)
        check_prompts_shared(teacher_of.differing, train_dataset, processing_class, args, "train_dataset")
        check_prompts_shared(teacher_of.differing, eval_dataset, processing_class, args, "eval_dataset")
        check_problems_shared(teacher_of.differing, tasks, processing_class, args)

        last_whole_step = LastWholeStep()
        monitor = TrainingMonitor(args.drift_factor, args.retention, args.drift_retention)
        super().__init__(
            model=model,
            teacher_model=None,  # TRL refuses a teacher whose vocabulary is padded differently, so it is prepared here
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=[monitor, MetricsFile(), *(callbacks or [])],
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            tools=tools if self._run_tools is None else None,
        )
        if self._run_tools is not None:
            self.tools, self.chat_template = self._run_tools.schemas, self._run_tools.dialect.chat_template
            self._tool_dict = {tool.__name__: tool for tool in self.tools}
        self._signature_columns = used_columns(args)
        leave_out_router(self.plain_student())
        _accelerate.check_sharding(self.accelerator)
        _accelerate.keep_output_dtype(self.accelerator)
        self.teacher: Teacher = teacher_of(self)
        self.teacher_model = self.teacher.model
        state_policy(self)
        self.differing = teacher_of.differing  # tokens that mean something else to the teacher
        self.vocabulary = share_tokens(self, teacher_of, is_conversational(train_dataset))

        self._rule_fields = rule_fields(args.selection_rule)
        self._reads_teacher = needs_teacher(args.selection_rule)
        self._keeps_all = resolve_rule(args.selection_rule).budget == "all"
        self._divergence = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(self.beta, "jsd")
        self._clock = StepClock()
        self._selection = StepSelection(self)
        self._ahead = RolloutsAhead(self)
        self._micro_batches = 0  # of the step so far
        self.engine_check = EngineCheck(args.vllm_sync_tolerance)
        # of several teachers, or where they read prompts of their own, each looks at what it reads
        alone = teacher_prompts is None and not self.teacher.names
        self.limits = limits if alone else {"student": limits["student"]}
        self._student_check = StudentCheck()
        self._last_whole_step = last_whole_step
        self.add_callback(StepEnd(self._clock, self._log_step))
        for callback in (last_whole_step, *self.teacher.callbacks):
            self.add_callback(callback)
        if tasks:
            self.add_callback(TaskEvaluation(lambda: self._evaluate_tasks(tasks), args.eval_tasks_on_start))

    @property
    def retention(self) -> float:
        """Share of the tokens that is trained on at this step; the drift guard may have raised it."""
        return self.monitor.retention

    @property
    def monitor(self) -> TrainingMonitor:
        """What survives a resume."""
        # restore_callback_states_from_checkpoint puts another in the place of the one that was passed
        return next(callback for callback in self.callback_handler.callbacks if isinstance(callback, TrainingMonitor))

    # Rollout: TRL's, in an order that a resumed run repeats, by an engine that holds the student's weights.

    def _get_train_sampler(self, dataset: Dataset | None = None) -> _trl.EpochSampler:
        every = self.args.gradient_accumulation_steps
        generation_batch = self.args.per_device_train_batch_size * self.accelerator.num_processes * every
        return _trl.EpochSampler(
            data_source=self.train_dataset if dataset is None else dataset,
            mini_repeat_count=self.args.num_generations,
            batch_size=generation_batch // self.args.num_generations,
            repeat_count=every,
            shuffle=self.shuffle_dataset,
            seed=self.args.seed,
        )

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], Any, dict[str, Any]]:
        if self._is_vlm:
            ids, images, fields = super()._tokenize_prompts(for_processor(prompts))
            # of a row without images beside rows with some TRL says None here, which processors do not take
            return ids, images and [of_row or [] for of_row in images], fields
        ids = encode_prompts(prompts, self.processing_class, self.chat_template_kwargs, self.tools, self.chat_template)
        return ids, None, {}

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        return self._ahead.batches(super().get_batch_samples, epoch_iterator, num_batches, device)

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, has_tool_images=False):
        written = self._ahead.take(prompt_ids)
        return self.write(prompt_ids, images, multimodal_fields, has_tool_images) if written is None else written

    def write(self, prompt_ids: list[list[int]], images: Any = None, *seen: Any) -> list[list[int]]:
        """Completions of prompts, by the engine of the run with the student as it is now."""
        check_asked(self, prompt_ids)
        images = images and [of_row or None for of_row in images]  # as vLLM takes them
        synced = self.use_vllm and self.state.global_step != self._last_loaded_step
        with sampled_with(self.plain_student(), self.generation_config):
            completion_ids = super()._generate_single_turn(prompt_ids, images, *(seen or ({},)))
        if synced and not self._is_vlm:
            self.engine_check(self, prompt_ids[0])
        check_completions(prompt_ids, completion_ids)
        return completion_ids

    def _tool_call_loop(self, prompts, prompt_ids, completion_ids, completions, images, multimodal_fields):
        if self._run_tools is None:
            return super()._tool_call_loop(prompts, prompt_ids, completion_ids, completions, images, multimodal_fields)
        check_batch(self.limits, prompt_ids, self.args.max_completion_length, in_turns=False)  # with what was observed
        masks, ids, calls, failures = as_played(self._run_tools.play(self, prompt_ids, completion_ids))
        return masks, completions, ids, calls, failures, [[] for _ in ids]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._student_check(self)
        inputs = with_images(inputs, self.text_alone)
        if self._run_tools is not None:
            inputs = self._run_tools.begin(inputs)
        if not self.model.training:  # an evaluation is no part of a step's time
            batch = without_false_counts(super()._generate_and_score_completions(inputs))
            batch["examples"] = inputs
            if not self.teacher.answers_in_loss:
                batch["teacher_answers"] = self.teacher.answer(for_models(batch), loss_mask(batch))
            return batch
        recorded = bool(self.args.record_rollouts) and self._is_full_step()
        self._selection.begin(recorded)
        batch = self._generate_and_select(inputs)
        answers = batch.pop("every_answer", None)
        if recorded:
            with self._clock.part("record"):
                episodes = None if self._run_tools is None else self._run_tools.episodes
                record_step(self, batch, self._selection, answers, episodes)
        self._selection.choice = None
        return batch

    def _generate_and_select(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Rollout, score and select a generation batch, which TRL then splits into micro-batches.

        Beside TRL's entries the batch holds the rows of the dataset, the tokens' weights and entropies [B, T], and what
        the teacher said of the kept tokens of each rollout, where it was asked before the loss (of every token, for the
        records, until they are written).
        """
        with self._clock.part("rollout"):
            with self._ahead.due():
                batch = without_false_counts(super()._generate_and_score_completions(inputs))
            self._ahead.mark(batch)
            self._ahead.begin()
        if self.args.mask_truncated_completions:
            batch = finished_alone(batch, self.eos_token_ids, self.accelerator)
        batch["examples"] = inputs
        if self._selection.is_inside or (self._keeps_all and self.teacher.answers_in_loss):
            self._selection.number_rollouts(batch)
            return batch
        mask, fields = loss_mask(batch), self.fields_now()
        seen = for_models(batch)
        pieces = self.scoring_pieces(seen)
        # a rule that reads the divergence needs the teacher's word on every token; for others, and from a teacher that
        # answers before the loss, what is trained on is enough
        answers = None
        if self.projects_teacher(fields):
            with self._clock.part("teacher"):
                answers = self.teacher.answer(seen, mask, pieces)
        with self._clock.part("score"):
            scores = self._score(seen, mask, pieces, fields, answers)
        if self._ahead.is_compared:
            self._ahead.compare(scores["student_logprob"][mask], batch["writer_logprob"][mask])
        with self._clock.part("select"):
            weight = self._selection.ahead(scores, mask, batch)
        kept, batch["every_answer"] = weight > 0, answers
        if answers is not None:
            inside = [row_kept[row_mask] for row_kept, row_mask in zip(kept, mask, strict=True)]
            answers = [take_tokens(answer, picked) for answer, picked in zip(answers, inside, strict=True)]
        elif not self.teacher.answers_in_loss:
            with self._clock.part("teacher"):
                answers = self.teacher.answer(seen, kept, pieces)
        batch["selection_weight"], batch["token_entropy"] = weight, scores["entropy"]
        if answers is not None:
            batch["teacher_answers"] = answers
        return batch

    # Score: one student forward over the generation batch.

    def scoring_pieces(self, batch: dict[str, Any]) -> list[Tensor]:
        """Rows of each forward of a scoring pass."""
        most, tokens = self.args.per_device_train_batch_size, self.args.scoring_tokens
        fixed = self.pad_to_multiple_of is not None or any(key in batch for key in _trl.MULTIMODAL_KEYS)
        return scoring_pieces(batch, self.accelerator, most, tokens, fixed_width=fixed)

    def _is_full_step(self) -> bool:
        every = self.args.score_logging_steps
        return every > 0 and self.state.global_step % every == 0

    def fields_now(self) -> tuple[str, ...]:
        """Statistics to compute at this step: the rule's own, and the logged ones where they cost no projection."""
        if self._rule_fields is None:
            return ()
        reads = self._reads_teacher or self._is_full_step()
        logged = self._logged_fields() if reads else ("entropy", "entropy_norm")
        compared = ("student_logprob",) if self._ahead.is_compared else ()
        return tuple(dict.fromkeys((*self._rule_fields, *logged, *compared)))

    def _logged_fields(self) -> tuple[str, ...]:
        return ALL_FIELDS if self._is_full_step() else LOGGED_FIELDS

    def projects_teacher(self, fields: tuple[str, ...]) -> bool:
        return not fields or self._reads_teacher or "reverse_kl" in fields

    @torch.no_grad()
    def _score(
        self,
        batch: dict[str, Any],
        mask: Tensor,
        pieces: Sequence[Tensor],
        fields: tuple[str, ...],
        answers: list[Any] | None,
    ) -> dict[str, Tensor]:
        """Statistics of every completion token, each [B, T] (0 where masked)."""
        student = self.plain_student()

        def score(rows: Tensor) -> TokenScores:
            part = take_rollouts({key: value for key, value in batch.items() if key != "examples"}, rows)
            said = None if answers is None else [answers[row] for row in rows.tolist()]
            return self.redirected(
                self.model_wrapped, student, self._score_rows, student, part, mask[rows], rows, fields, said
            )

        with evaluating(self.model):
            return scores_by_position(mask, pieces, score)

    def _score_rows(
        self,
        student: Any,
        batch: dict[str, Tensor],
        mask: Tensor,
        rows: Tensor,
        fields: tuple[str, ...],
        answers: list[Any] | None,
    ) -> TokenScores:
        hidden = self.hidden_rows(student, batch, mask)
        with (
            self.student_head(student, hidden) as of_student,
            self._comparison(answers) as teacher,
            naming_rollouts(mask, rows),
        ):
            return self.scores_of(of_student, teacher, fields, batch["completion_ids"][mask])

    def scores_of(
        self, student: Head, teacher: Comparison | None, fields: tuple[str, ...], tokens: Tensor
    ) -> TokenScores:
        token_ids = tokens if reads_tokens(fields) else None
        if teacher is not None:
            return teacher.scores(student, fields, self.temperature, token_ids)
        return token_scores(student, temperature=self.temperature, token_ids=token_ids, fields=fields or None).detach()

    # Select: ahead of the loss, or inside it.

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        regenerates = self.model.training and (
            self._step % self.args.gradient_accumulation_steps == 0 or self._buffered_inputs is None
        )
        inputs = super()._prepare_inputs(generation_batch)
        if regenerates and self._selection.is_inside and not (self._selection.is_whole or self._keeps_all):
            self._selection.count_ahead(self._buffered_inputs)
        return inputs

    # Loss: of one micro-batch, over the kept tokens.

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        self._micro_batch = inputs
        self._micro_batches += self.model.training
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _compute_loss(
        self, unwrapped_student: Any, inputs: dict[str, Any], num_items_in_batch: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of a micro-batch, the sum of its tokens' entropies and their number.

        There are three cases, and in each the rows that are trained on are projected once for the loss.

        1. The tokens were selected before, with the whole generation batch: the kept rows go into the loss.
        2. They are selected here (training/selection.py, choosing.py): all are scored, the kept ones differentiated.
        3. Nothing is selected, in an evaluation or where the rule keeps all: one pass gives loss and statistics.

        With backward="kept" the first forward is without gradient, and the kept rows go through a second one with it.

        Numbers are read from `exact`, the batch as it was before the forward that this is a part of: under FSDP2 mixed
        precision rounds what passes a forward, the number of tokens and their weights too.
        """
        exact = self._micro_batch
        if self.model.training and exact.get("num_items_in_batch") is not None:
            # where no token weighs anything the loss is 0 and not 0 / 0
            num_items_in_batch = exact["num_items_in_batch"].clamp(min=1e-20) / self.accelerator.num_processes
        mask, weight = loss_mask(inputs), exact.get("selection_weight")
        asked = mask if weight is None else weight > 0  # bool [B, T], the tokens whose rows are at hand below
        seen = for_models(inputs)
        forward = None
        if self.model.training and self.args.backward == "kept":
            forward = KeptForward(self, unwrapped_student, seen, asked)
            hidden = forward.states if weight is None else forward.rows()
        else:
            hidden = self.hidden_rows(unwrapped_student, seen, asked)
        answers = inputs.get("teacher_answers")
        if answers is None:
            answers = self.teacher.answer(seen, asked)
        options: dict[str, Any] = {
            "divergence": self._divergence,
            "beta": self.beta,
            "temperature": self.temperature,
            "denominator": num_items_in_batch,
        }
        with self.student_head(unwrapped_student, hidden) as student, self.teacher.compare(answers) as teacher:
            if weight is not None:
                with naming_rollouts(asked):
                    loss, _ = teacher.loss(student, weight[asked], **options)
                return loss, exact["token_entropy"][mask].sum(), mask.sum()
            selection = None
            # a micro-batch may hold nothing but what tools wrote
            if self.model.training and not self._keeps_all and len(student.hidden):
                if self._selection.is_whole:
                    options["denominator"] = None  # what is kept
                choose, lengths = self._selection.inside(asked, exact["rollout_number"])
                tokens = inputs["completion_ids"][asked]
                loss, scores, selection = chosen_loss(
                    self, student, teacher, choose, lengths, asked, tokens, forward, options
                )
            else:
                if forward is not None:  # nothing to select from, and an engine waits for a backward all the same
                    student = replace(student, hidden=forward.rows().to(student.hidden.device))
                with naming_rollouts(asked):
                    loss, scores = teacher.loss(student, None, fields=self._logged_fields(), **options)
            if self.model.training and self._ahead.is_compared:
                now = scores.student_logprob
                if now is None:  # the loss of all tokens does not give it
                    now = self._logprobs_here(student, inputs["completion_ids"][asked])
                self._ahead.compare(now, exact["writer_logprob"][asked])
        if self.model.training:
            self._selection.add(scores, selection, asked, exact)
        return loss, scores.require("entropy").sum(), mask.sum()

    @torch.no_grad()
    def _logprobs_here(self, student: Head, tokens: Tensor) -> Tensor:
        return self.scores_of(student, None, ("student_logprob",), tokens).require("student_logprob")

    # Hidden states and lm_heads, for all stages; teachers see `hidden_rows` and `redirected` (`teachers.Surroundings`).

    def hidden_rows(self, model: Any, batch: dict[str, Any], mask: Tensor) -> Tensor:
        """Hidden states [N, H] of a model that predict the completion tokens in `mask`, bool [B, T]."""
        # no model takes the images of rollouts that have none
        multimodal = {key: batch[key] for key in _trl.MULTIMODAL_KEYS if key in batch and len(batch[key])}
        tokens = {key: batch[key] for key in TOKEN_KEYS}
        if not multimodal and self.pad_to_multiple_of is None:
            tokens, mask = trimmed(tokens, mask)
        with self.accelerator.autocast():
            hidden = self._get_last_hidden_state(
                model,
                torch.cat([tokens["prompt_ids"], tokens["completion_ids"]], dim=1),
                torch.cat([tokens["prompt_mask"], tokens["completion_mask"]], dim=1),
                tokens["completion_ids"].shape[1],
                **multimodal,
            )[mask]
            # the lm_head is multiplied outside: in the dtype that autocast would take there
            return hidden.to(lm_head_dtype(hidden))

    def _get_last_hidden_state(self, unwrapped_model, input_ids, attention_mask, logits_to_keep, **multimodal):
        states = last_hidden_states(unwrapped_model, input_ids, attention_mask, **multimodal)
        return states[:, :-1][:, -logits_to_keep:]

    def redirected(self, wrapped: Any, model: Any, method: Callable[..., Any], *arguments: Any) -> Any:
        """`method(*arguments)` run as the forward of `wrapped`, which makes the sharded weights of `model` whole."""
        return self._forward_redirection(wrapped, model, method, *arguments)

    def plain_student(self) -> Any:
        """The student without the wrappers of an engine."""
        return self.accelerator.unwrap_model(self.model)

    @contextmanager
    def student_head(self, student: Any, hidden: Tensor) -> Iterator[Head]:
        """The student's lm_head with the rows that it projects, sharded weights gathered once."""
        layer = student.get_output_embeddings()
        with _accelerate.reading_lm_head(layer):
            yield head(student, layer, hidden)

    @contextmanager
    def _comparison(self, answers: list[Any] | None) -> Iterator[Comparison | None]:
        if answers is None:
            yield None
        else:
            with self.teacher.compare(answers) as comparison:
                yield comparison

    # Log: what the step did with its tokens.

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        with self._clock.part("loss"):
            return super().training_step(model, inputs, num_items_in_batch)

    def _log_step(self) -> None:
        sums = self._selection.take()
        totals = dict(zip(TALLIED, sums.tolist(), strict=True))
        self.monitor.trained_tokens += round(totals["kept"])
        figures = metrics(sums) | self._clock.take(totals["tokens"])
        figures |= self._selection.take_by_teacher() | self.teacher.metrics() | self._ahead.figures()
        logged = self._metrics["train"]
        if "entropy" in figures:  # TRL took the mean of each micro-batch, whose means depend on the split
            del logged["entropy"][-self._micro_batches :]
        self._micro_batches = 0
        for name, value in figures.items():
            logged[name].append(value)
        # TRL logs the mean of what it finds here, and of these the last is meant
        self._metrics["train"] |= {name: [value] for name, value in self.monitor.standing().items()}
        if "selection/dropped_divergence" in figures:
            self._warn(self.monitor.observe(figures["selection/dropped_divergence"]))
        self._warn(self.monitor.observe_lengths(*(logged[f"completions/{name}"][-1] for name in WATCHED)))
        if "rollout/log_ratio" in figures:
            self._warn(self.monitor.observe_staleness(figures["rollout/log_ratio"]))
        self._selection.look_ahead()

    def _warn(self, warning: str | None) -> None:
        if warning:
            logger.warning(f"Step {self.state.global_step}: {warning}")

    def _evaluate_tasks(self, tasks: list[Task]) -> None:
        figures = evaluate_tasks(self, tasks, self.args.eval_num_samples)
        with evaluating(self.model):  # in training mode TRL would add the figures of the step, and forget them
            self.log(figures)
