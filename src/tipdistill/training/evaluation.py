"""Tasks measured while a student trains, with the engine that writes its rollouts and the teacher of the run."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch.nn.utils.rnn import pad_sequence
from transformers import TrainerCallback

from ..chat import encode_prompts
from ..environments import Acting, play_prompts
from ..environments.play import Dialect, read_dialect
from ..evaluate.engines import Completion, Sampling, as_fed, of_episode
from ..evaluate.episodes import acting_of
from ..evaluate.run import check_names, run, write_metrics
from ..evaluate.task import Task
from ..score.forward import evaluating
from ..tasks import load_task
from .episodes import in_step, no_longer_than, write_turns

_LOGGED = ("mean_at_k", "mean", "standard_error", "maj_at_k", "mean_tokens", "truncated")


class TaskEvaluation(TrainerCallback):
    """Calls back before the first step, after every `eval_steps` steps, and after the last.

    Args:
        evaluate: what to call.
        on_start: call it before the first step.
    """

    def __init__(self, evaluate: Callable[[], None], on_start: bool = True) -> None:
        self.evaluate = evaluate
        self.on_start = on_start
        self.step: int | None = None

    def _at(self, step: int, control: Any) -> None:
        if step != self.step:
            self.step = step
            should_log = control.should_log
            self.evaluate()
            control.should_log = should_log  # logging what was measured must not cost the step its own entry

    def on_train_begin(self, args, state, control, **kwargs):
        # a run that goes on from a step that was measured before its checkpoint was saved
        measured = [entry["step"] for entry in state.log_history if any(map(_is_of_task, entry))]
        self.step = state.global_step if state.global_step in measured else None
        if state.global_step == 0 and self.on_start:
            self._at(0, control)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % state.eval_steps == 0:
            self._at(state.global_step, control)

    def on_train_end(self, args, state, control, **kwargs):
        self._at(state.global_step, control)


def _is_of_task(metric: str) -> bool:
    return metric.startswith("eval_") and metric.endswith("/standard_error")


def load_tasks(names: Sequence[str], args: Any) -> list[Task]:
    """The tasks by their names, whose samples go into files of their own.

    Args:
        names: as `load_task` takes them.
        args: the `TIPConfig`, which says where the teacher is.

    Raises:
        ValueError: an unknown task, two with one file, or a divergence from a teacher that cannot tell it: one that a
            server holds, or several of which the task's problems name none.
    """
    tasks = [load_task(name) for name in names]
    if tasks:
        check_names([task.name for task in tasks])
    for task in tasks:
        if task.divergence is not None and args.teachers is not None:
            raise ValueError(
                f"eval_tasks: {task.name} is a divergence from one teacher, and its problems name none of `teachers`: "
                "leave the task out; eval_dataset may have the column that names them."
            )
        if task.divergence is not None and not args.teacher_tells_everything:
            raise ValueError(
                f"eval_tasks: {task.name} needs the teacher's whole distribution, and the server of teacher_url gives "
                "a part of it: leave the task out, or give the model that it serves as teacher_lm_head."
            )
    return tasks


def evaluate_tasks(trainer: Any, tasks: Sequence[Task], num_samples: int) -> dict[str, float]:
    """Measure a `TIPTrainer`'s student on tasks; every process calls it, each writes its share of the completions.

    Sampling is the run's own (`temperature`, `top_p`, `max_completion_length` or the task's `max_new_tokens` where that
    is less, vLLM where it is used), from random numbers of its own, so that training goes on as if it had not been
    measured. The samples are kept in `<output_dir>/eval/step-<n>`.

    Args:
        trainer: in the middle of `train`.
        tasks: what to measure.
        num_samples: k, completions per problem.

    Returns:
        {"eval_<task>/mean_at_<k>": ..., "eval_<task>/standard_error": ..., ...}, the same on every process; of a
        divergence "eval_<task>/mean", nats.
    """
    args, step = trainer.args, trainer.state.global_step
    root = Path(args.output_dir) / "eval" / f"step-{step}"
    written = {}
    device = trainer.accelerator.device
    with evaluating(trainer.model), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed((args.seed * 1_000_003 + step) * 10_007 + trainer.accelerator.process_index)
        for task in tasks:
            written[task.name] = _completions(trainer, task, num_samples)
    figures: list[Any] = [None]
    if trainer.accelerator.is_main_process:
        shutil.rmtree(root, ignore_errors=True)  # of a run that was killed here, and resumed from before
        metrics: dict[str, Any] = {"tasks": {}}
        for task in tasks:
            measured = run(
                [task],
                lambda task=task: _Written(written[task.name]),  # type: ignore[misc]
                root,
                num_samples,
                Sampling(args.temperature, args.top_p, args.max_completion_length),
                args.seed,
                settings={"step": step},
                resume=True,
            )
            # each run writes its own task's figures alone
            metrics = measured | {"tasks": metrics["tasks"] | measured["tasks"]}
        write_metrics(root, metrics)
        figures = [
            {
                f"eval_{name}/{logged.replace('mean_at_k', f'mean_at_{num_samples}')}": numbers[logged]
                for name, numbers in metrics["tasks"].items()
                for logged in _LOGGED
                if logged in numbers
            }
        ]
    return broadcast_object_list(figures)[0]


def _completions(trainer: Any, task: Task, num_samples: int) -> list[Completion]:
    """Those of every problem and sample, in the order of (problem, sample), on every process."""
    accelerator, tokenizer = trainer.accelerator, trainer._tokenizer
    fed = [as_fed(tokenizer, task.prompt_of(problem), task.chat) for problem in task.problems]
    total = len(fed) * num_samples
    own = range(accelerator.process_index, total, accelerator.num_processes)
    # as many batches of the same size on every process: sharded engines generate together
    size = trainer.args.per_device_eval_batch_size
    most = -(-total // accelerator.num_processes)
    completions = []
    acting = acting_of(task, [problem.row for problem in task.problems])
    dialect = None if acting is None else read_dialect(tokenizer, trainer.chat_template_kwargs)
    for first in range(0, most, size):
        rows = [own[index] if index < len(own) else total - 1 for index in range(first, min(first + size, most))]
        problems = [row // num_samples for row in rows]
        asked = [fed[problem] for problem in problems]
        if acting is not None and dialect is not None:
            completions += _played(trainer, task, acting, dialect, rows, problems, asked)
            continue
        encoded = encode_prompts(asked, tokenizer, trainer.chat_template_kwargs)
        with no_longer_than(trainer, task.max_new_tokens):
            written = trainer._generate_single_turn(encoded, None, {})
        divergences: list[float] | list[None] = [None] * len(rows)
        if task.divergence is not None:
            divergences = _divergences(trainer, encoded, written, task.divergence)
        completions += [
            Completion(
                row,
                tokenizer.decode(ids, skip_special_tokens=not task.special_tokens),
                len(ids),
                ids[-1] in trainer.eos_token_ids,
                divergence,
            )
            for row, ids, divergence in zip(rows, written, divergences, strict=True)
        ]
    every = {completion.index: completion for completion in gather_object(completions)}
    return [every[index] for index in range(total)]


def _played(
    trainer: Any,
    task: Task,
    acting: Acting,
    dialect: Dialect,
    rows: Sequence[int],
    problems: Sequence[int],
    asked: Sequence[Any],
) -> list[Completion]:
    """Episodes of a task; the rows of the completions, and the problem of each with its prompt."""
    _, episodes = play_prompts(
        lambda contexts, rooms: write_turns(trainer, contexts, rooms),
        dialect,
        asked,
        problems,
        acting,
        min(task.max_new_tokens or sys.maxsize, trainer.args.max_completion_length),
        lambda active: in_step(trainer, active),
    )
    return [of_episode(row, episode, dialect.tokenizer) for row, episode in zip(rows, episodes, strict=True)]


def _divergences(
    trainer: Any, prompts: Sequence[Sequence[int]], written: Sequence[Sequence[int]], name: str
) -> list[float]:
    """The mean divergence of each rollout over its tokens, nats.

    Args:
        trainer: in the middle of `train`, with a teacher that gives hidden states.
        prompts, written: token ids of each rollout.
        name: "reverse_kl" or "forward_kl".
    """
    device = trainer.accelerator.device
    batch = _padded("prompt", prompts, device, side="left") | _padded("completion", written, device)
    mask, pieces = batch["completion_mask"].bool(), trainer.scoring_pieces(batch)
    answers = trainer.teacher.answer(batch, mask, pieces)
    scores = trainer._score(batch, mask, pieces, (name,), answers)[name]
    return (scores.double().sum(1) / mask.sum(1)).tolist()


def _padded(name: str, rows: Sequence[Sequence[int]], device: Any, side: str = "right") -> dict[str, torch.Tensor]:
    """<name>_ids and <name>_mask, int64 [B, longest]; padding is 0, and masked."""
    ids = [torch.tensor(row, device=device) for row in rows]
    return {
        f"{name}_{kind}": pad_sequence(values, batch_first=True, padding_side=side)
        for kind, values in (("ids", ids), ("mask", list(map(torch.ones_like, ids))))
    }


class _Written:
    """An engine of completions that are written already."""

    def __init__(self, completions: list[Completion]) -> None:
        self.completions = completions

    def generate(
        self,
        prompts: Sequence[Any],
        seeds: Sequence[int],
        sampling: Sampling,
        chat: bool | None = None,
        special_tokens: bool = False,
        acting: Acting | None = None,
    ) -> Iterator[list[Completion]]:
        yield self.completions
