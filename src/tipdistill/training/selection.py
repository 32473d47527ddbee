"""Select in a training step: which tokens, over the rollouts of all processes, and where in the step it is known.

    ahead    a scoring pass over the generation batch, then one choice among the tokens of all processes
    inside   each micro-batch's tokens are chosen in the forward of its loss, so the student runs once

Inside the loss a choice is that of the whole batch where one micro-batch is the whole (`whole`), nearly that with the
percentiles, minima, maxima and thresholds of the step before (normalization="running"), and one of the micro-batch
alone with normalization="micro_batch".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..records import Choice
from ..select import Running, kept_counts, quadrants, resolve_rule, running_of, select
from ..types import Selection, TokenScores
from .monitor import ByTeacher, tally
from .scoring import loss_mask


class StepSelection:
    """Selects for a trainer, and puts down what a step did with its tokens.

    Args:
        trainer: a `TIPTrainer`.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._budget = resolve_rule(trainer.args.selection_rule).budget
        self._normalization = trainer.args.normalization
        self.is_inside = self.is_whole = False
        self.choice: Choice | None = None
        self._sums: Tensor | None = None
        self._sums_are_global = False
        # of each micro-batch of a step whose tokens tell the next: statistics, mask, weight and rollout of its tokens
        self._scored: list[Tensor] = []
        self._names: tuple[str, ...] = ()  # of the statistics; a process may have no token, and must still know them
        self._seen: tuple[TokenScores, Tensor] | None = None
        self._by_teacher = ByTeacher(trainer)

    def begin(self, recorded: bool) -> None:
        """Decide where the tokens of the next generation batch are selected.

        Args:
            recorded: token records are written of it before its loss.
        """
        trainer = self._trainer
        alone = trainer.accelerator.num_processes == trainer.args.gradient_accumulation_steps == 1
        self.is_whole = (
            self._normalization == "batch"
            and self._budget != "all"
            and alone
            and not recorded
            and trainer.teacher.answers_in_loss
            and (trainer.args.backward == "kept" or not has_dropout(trainer.model))  # which is scored without dropout
        )
        known = self._normalization == "running" and (self._running is not None or self._budget == "all")
        self.is_inside = self.is_whole or known or self._normalization == "micro_batch"
        self._names = trainer.fields_now()  # which change with the step, and the step ends before its tokens are read

    @property
    def _running(self) -> Running | None:
        state = self._trainer.monitor.running
        return None if state is None else Running.of_state(state)

    # Ahead of the loss: once per generation batch over all processes.

    def ahead(self, scores: dict[str, Tensor], mask: Tensor, batch: dict[str, Any]) -> Tensor:
        """Select over the rollouts of all ranks; returns this rank's weights [B, T]. Sets the loss denominator.

        Args:
            scores: statistic → [B, T] of this rank.
            mask: bool [B, T], the tokens that they are of.
            batch: of this rank.
        """
        gathered = {name: self._gather(value) for name, value in scores.items()}
        # as numbers: accelerate pads a bool tensor to int64, on the ranks with shorter completions alone
        everywhere = self._gather(mask.long()).bool()
        flat = TokenScores(**{name: value[everywhere] for name, value in gathered.items()})
        rollout = torch.arange(len(everywhere), device=mask.device)[:, None].expand_as(everywhere)[everywhere]
        if len(flat):
            selection = self._select(flat, rollout, self._generator(rollout.device))
        else:  # nothing but results of tools, on every rank
            nothing = torch.zeros(0, device=mask.device)
            selection = Selection(nothing.bool(), nothing, nothing)
        weight = torch.zeros(everywhere.shape, device=mask.device)
        weight[everywhere] = selection.weight
        batch["num_items_in_batch"] = selection.total
        self._sums, self._sums_are_global = tally(flat, selection), True
        if flat.reverse_kl is not None:
            self.choice = Choice(quadrants(flat), selection.mask, selection.score)
        if self._normalization == "running":
            self._seen = flat, rollout
        first = self._trainer.accelerator.process_index * len(mask)
        weight = weight[first : first + len(mask), : mask.shape[1]]
        own = TokenScores(**{name: value[mask] for name, value in scores.items()})
        self._by_teacher.add(own, weight[mask] > 0, mask, batch["examples"])
        return weight

    def _gather(self, value: Tensor) -> Tensor:
        accelerator = self._trainer.accelerator
        return accelerator.gather(accelerator.pad_across_processes(value, dim=1))

    # Inside the loss: of one micro-batch.

    def number_rollouts(self, batch: dict[str, Any]) -> None:
        """Give each rollout its number among those of all processes, which its draws depend on."""
        count = len(batch["completion_ids"])
        first = self._trainer.accelerator.process_index * count
        batch["rollout_number"] = torch.arange(first, first + count, device=batch["completion_ids"].device)

    def inside(self, mask: Tensor, numbers: Tensor) -> tuple[Callable[[TokenScores, slice], Selection], Sequence[int]]:
        """How to select among the tokens of a micro-batch: those of some groups of it at a time.

        Args:
            mask: bool [B, T], the tokens, at least one.
            numbers: int64 [B], see `number_rollouts`.

        Returns:
            (scores of groups, which of the tokens they are) → the Selection of these; and the tokens of each group. A
            group is a rollout where its choice depends on no other, else it is all tokens.
        """
        rollout = _rollouts(mask)

        def choose(scores: TokenScores, tokens: slice) -> Selection:
            return self._choose(scores, rollout[tokens], numbers)

        lengths = mask.sum(1) if self._normalization == "running" else mask.sum()[None]
        return choose, lengths.tolist()

    def _choose(self, scores: TokenScores, rollout: Tensor, numbers: Tensor) -> Selection:
        trainer, device = self._trainer, rollout.device
        if self.is_whole:
            # TRL has shuffled the rollouts since; draws and ties go by the order of the batch
            order = numbers[rollout].argsort(stable=True)
            selection = self._select(
                scores.map(lambda value: value[order]), numbers[rollout][order], self._generator(device)
            )
            back = order.argsort()
            parts = {name: getattr(selection, name)[back] for name in ("mask", "weight", "score")}
            return replace(selection, **parts)
        if self._normalization == "running":
            generators = [self._generator(device, number) for number in numbers[rollout.unique()].tolist()]
            return self._select(scores, rollout, generators, self._running)
        micro_batch = trainer._step % trainer.args.gradient_accumulation_steps
        seed = (self._seed() * 1_009 + micro_batch) * 10_007 + trainer.accelerator.process_index
        selection = self._select(scores, rollout, torch.Generator(device=device).manual_seed(seed % 2**63))
        if self._budget == "weight":
            # the global sum of weights is not known ahead, so each micro-batch's is made its number of tokens
            scale = len(selection.weight) / selection.weight.sum().clamp(min=torch.finfo(torch.float32).tiny)
            selection = replace(selection, weight=selection.weight * scale)
        return selection

    def of_rows(self, scores: TokenScores, mask: Tensor, rows: Tensor) -> Choice | None:
        """What the loss will keep of some rollouts, for their records; None where it hangs on the others too.

        Args:
            scores: of their tokens.
            mask: bool [B, T], the tokens of this process's rollouts, which come first of all.
            rows: int64, ascending; which rollouts.
        """
        if self._normalization != "running" or not self.is_inside or self._budget == "all":
            return None
        selection = self._choose(scores, _rollouts(mask[rows]), rows)
        return Choice(quadrants(scores), selection.mask, selection.score)

    def count_ahead(self, micro_batches: list[dict[str, Any]]) -> None:
        """Set the loss denominator: the global number of kept tokens, known from the lengths before any is scored."""
        args, kept, tokens = self._trainer.args, 0, 0
        for micro_batch in micro_batches:
            lengths = loss_mask(micro_batch).sum(1)
            tokens += int(lengths.sum())
            kept += int(kept_counts(lengths, self._trainer.retention, args.selection_rule, args.selection_scope).sum())
        accelerator = self._trainer.accelerator
        counted = accelerator.gather(torch.tensor([[kept, tokens]], device=accelerator.device)).sum(0)
        total = counted[0]
        if self._normalization == "running" and (self._budget == "importance" or args.selection_scope == "batch"):
            # Weights are ρ/π, and the expected number of kept tokens is ρ of all: their quotient is 1/π of all. Of a
            # budget over the batch the counts above are those of micro-batches, which a threshold knows nothing of.
            total = counted[1] * (1.0 if self._budget == "weight" else self._trainer.retention)
        for micro_batch in micro_batches:
            micro_batch["num_items_in_batch"] = total

    # Both.

    def _select(
        self, scores: TokenScores, rollout: Tensor, generator: Any, running: Running | None = None
    ) -> Selection:
        args = self._trainer.args
        return select(
            scores,
            rule=args.selection_rule,
            retention=self._trainer.retention,
            rollout=rollout,
            scope=args.selection_scope,
            generator=generator,
            running=running,
        )

    def _seed(self) -> int:
        # A function of (seed, step) alone, so that a resumed run draws what the uninterrupted one would have; of the
        # micro-batch and the rank, or of the rollout, too where each of them draws for itself.
        return self._trainer.args.seed * 1_000_003 + self._trainer.state.global_step

    def _generator(self, device: Any, number: int | None = None) -> torch.Generator:
        seed = self._seed() if number is None else self._seed() * 1_000_003 + number
        return torch.Generator(device=device).manual_seed(seed % 2**63)

    # What the step did.

    def add(self, scores: TokenScores, selection: Selection | None, mask: Tensor, batch: dict[str, Any]) -> None:
        """Put down what a micro-batch's loss did with its tokens.

        Args:
            scores: of the tokens in `mask`.
            selection: of them; None: it kept all.
            mask: bool [B, T].
            batch: with `examples`, the B rows of the dataset, where they are read, and the rollouts' numbers.
        """
        if selection is not None and self._normalization == "running":
            self._remember(scores, selection, batch["rollout_number"][_rollouts(mask)])
        sums = tally(scores, selection)
        self._sums = sums if self._sums is None else self._sums + sums
        self._by_teacher.add(scores, None if selection is None else selection.mask, mask, batch.get("examples", ()))

    def take(self) -> Tensor:
        """The sums of the step's tokens over all processes (`tally`), and start the next."""
        accelerator = self._trainer.accelerator
        if self._normalization == "running" and self.is_inside and self._budget != "all":
            sums = self._take_scored()
        else:
            assert self._sums is not None, "a training step tallies its tokens before it ends"
            sums = self._sums if self._sums_are_global else accelerator.gather(self._sums[None]).sum(0)
        self._sums, self._sums_are_global = None, False
        return sums

    def take_by_teacher(self) -> dict[str, float]:
        """The figures of each of several teachers since the last call; see `ByTeacher`."""
        return self._by_teacher.take()

    def _remember(self, scores: TokenScores, selection: Selection, number: Tensor) -> None:
        statistics = [scores.require(name) for name in self._names]
        columns = [*statistics, selection.mask, selection.weight, number]
        self._scored.append(torch.stack([column.double() for column in columns], 1))

    def _take_scored(self) -> Tensor:
        accelerator, names = self._trainer.accelerator, self._names
        own = torch.cat(self._scored) if self._scored else torch.zeros(0, len(names) + 3, dtype=torch.float64)
        own = own.to(accelerator.device)
        self._scored = []
        if accelerator.num_processes > 1:
            padded = torch.cat([own, torch.ones_like(own[:, :1])], 1)  # rows that are padding have 0 there
            everyone = accelerator.gather(accelerator.pad_across_processes(padded, dim=0))
            own = everyone[everyone[:, -1] > 0][:, :-1]
        own = own[own[:, -1].argsort(stable=True)]
        flat = TokenScores(**{name: own[:, index].float() for index, name in enumerate(names)})
        mask, weight, number = own[:, -3] > 0, own[:, -2].float(), own[:, -1].long()
        self._seen = flat, number
        return tally(flat, Selection(mask, weight, weight))

    def look_ahead(self) -> None:
        """Let the tokens of this step tell the next, once the retention of the next is known."""
        if self._seen is None:
            return
        (scores, rollout), self._seen = self._seen, None
        if len(scores):
            args = self._trainer.args
            running = running_of(scores, args.selection_rule, self._trainer.retention, rollout, args.selection_scope)
            self._trainer.monitor.running = running.state()


def _rollouts(mask: Tensor) -> Tensor:
    """Which row of `mask`, bool [B, T], each of its true entries is in."""
    return torch.arange(len(mask), device=mask.device)[:, None].expand_as(mask)[mask]


def has_dropout(model: Any) -> bool:
    """Whether a model in training mode gives other hidden states than in eval mode.

    Example:
        >>> has_dropout(torch.nn.Sequential(torch.nn.Dropout(0.0))), has_dropout(torch.nn.Dropout(0.1))
        (False, True)
    """
    for module in model.modules():
        for name, value in vars(module).items():
            if ("drop" in name or "jitter" in name) and isinstance(value, (int, float)) and value > 0:
                return True
        if isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.p > 0:
            return True
    return False
