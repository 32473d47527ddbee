"""Selection inside verl's on-policy distillation (verl 0.9, FSDP workers); docs/verl.md says how to launch it.

Three Hydra overrides put it in force, without a fork:

    distillation.distillation_loss._target_=tipdistill.integrations.verl.SelectedLossConfig
    distillation.distillation_loss.loss_mode=tip_reverse_kl_topk
    +distillation.distillation_loss.retention=0.5

verl instantiates the configuration in every worker before it resolves the name of the loss, and so imports this module,
which registers its losses. verl computes what needs the student's logits in `compute_topk_loss`, which knows one
divergence only; here that name is bound to a function which computes ours where the configuration is ours, and calls
verl's own where it is not. Every private name of verl that we touch is listed in `TOUCHED`.

What a teacher behind verl tells is its `topk` likeliest tokens (the modes `…_topk`) or the sampled token's
log-probability (the others), so the student's entropy is exact and every divergence a lower bound or an estimate:
`partial_teacher.GIVEN` has the list.
"""

from __future__ import annotations

import functools
import math
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..score.top_k_outcomes import TAIL_FLOOR
from ..score.top_k_teacher import tail_reverse_kl, top_k_scores
from ..select import DRAWN, resolve_rule, rule_fields
from ..text import nearest
from ..types import TokenScores
from .partial_teacher import check_rule, check_scope, loss_weights, seed_of, select_over_ranks, select_rollouts
from .verl_refusals import (
    check_entropy,
    check_fused,
    check_sequence_parallel,
    check_strategy,
    check_temperature,
    check_trl,
)

try:
    from verl.trainer.distillation import losses as verl_losses
    from verl.utils import tensordict_utils
    from verl.utils.metric import AggregationType, Metric
    from verl.workers.config import DistillationLossConfig
    from verl.workers.utils.padding import no_padding_2_padding
except ImportError as error:
    raise ImportError(
        f"tipdistill.integrations.verl needs verl 0.9 in this environment ({error}): pip install 'verl>=0.9.1,<0.10'; "
        "see docs/verl.md."
    ) from error

__all__ = ["MODES", "TOUCHED", "SelectedLossConfig", "check_launch", "selected_loss", "topk_loss"]

# What each loss mode asks the teacher for.
MODES = {
    "tip_reverse_kl_topk": "top_k",
    "tip_forward_kl_topk": "top_k",
    **{f"tip_{name}": "sampled" for name in ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3")},
}
TARGET = "tipdistill.integrations.verl.SelectedLossConfig"
# In verl's `module:name`, with the parameters that we rely on; tests/contract/test_verl.py compares them.
TOUCHED = {
    "verl.trainer.distillation.losses:compute_topk_loss": (
        "config",
        "distillation_config",
        "data",
        "student_logits",
        "data_format",
    ),
    "verl.trainer.distillation.losses:compute_distillation_loss_range": ("distillation_losses", "response_mask"),
    "verl.trainer.distillation.losses:compute_forward_kl_topk": (
        "config",
        "distillation_config",
        "model_output",
        "data",
    ),
    "verl.trainer.distillation.losses:compute_distillation_loss_reverse_kl_estimator": (
        "config",
        "distillation_config",
        "model_output",
        "data",
    ),
    "verl.trainer.distillation.losses:register_distillation_loss": ("loss_settings",),
    "verl.workers.utils.padding:no_padding_2_padding": ("tensor", "data"),
    "verl.workers.engine_workers:TrainingWorker.set_loss_fn": ("self", "loss_fn"),
    "verl.workers.engine.base:BaseEngine.train_batch": ("self", "data", "loss_function"),
    "verl.workers.engine.base:BaseEngine.infer_batch": ("self", "data", "loss_function"),
}
# Keys of verl's model output and batch that are ours.
STATISTIC, WEIGHT = "tip_", "tip_weight"
_OF_NO_TOKEN = {
    "top_k": [f"distillation/{model}_mass_{end}" for model in ("student", "teacher") for end in ("min", "max")],
    "sampled": ["distillation/abs_loss"],
}
_SHOWN = ("entropy", "reverse_kl")  # logged whatever the rule reads


@dataclass
class SelectedLossConfig(DistillationLossConfig):
    """verl's DistillationLossConfig, and which tokens are trained on; the `_target_` of `distillation_loss`.

    Args:
        loss_mode: "tip_reverse_kl_topk", the reverse KL on the teacher's topk tokens and a tail for all others;
            "tip_forward_kl_topk", verl's own forward KL on the topk tokens; or verl's estimators from the sampled
            token, "tip_k1", "tip_k3" and so on.
        selection_rule: a name in `tipdistill.RULES`, "complement:<name>", or a dotted path.
        retention: share of the response tokens that is trained on, in (0, 1].
        selection_scope: "rollout" spends the budget inside each rollout (paper Eq. 8), "batch" over the mini-batch.
        normalization: "batch" scores the mini-batch (of one optimiser step, over all ranks) before its first
            micro-batch: percentiles, min-max and the mean over the kept tokens are the paper's, for one more forward of
            the student. "rollout" needs no such forward: percentiles and min-max run over each rollout alone, and each
            rollout counts as much as in verl's loss on all tokens. Either is the same for every micro-batch size.
        selection_seed: of rules that draw; a rollout's draw depends on it and on the rollout's tokens.
        loss_max_clamp: as in verl, of a token's loss before it is weighed.

    Raises:
        ValueError: a field is out of range, or a name is unknown (the nearest is given), or what the teacher tells does
            not give what the rule reads.
    """

    _mutable_fields: ClassVar[set[str]] = DistillationLossConfig._mutable_fields | {
        "loss_max_clamp",
        "loss_settings",
        "token_clamp",
    }

    loss_mode: str = "tip_reverse_kl_topk"
    selection_rule: str = "soft_or"
    retention: float = 0.5
    selection_scope: str = "rollout"
    normalization: str = "batch"
    selection_seed: int = 0
    loss_max_clamp: float | None = None
    token_clamp: float | None = None  # loss_max_clamp, kept here: verl would clamp what is already weighed

    def __post_init__(self) -> None:
        if self.loss_mode not in MODES:
            raise ValueError(
                f"loss_mode={self.loss_mode!r} would train on all tokens: with "
                f"distillation_loss._target_={TARGET} it is one of {', '.join(MODES)}.{nearest(self.loss_mode, MODES)}"
            )
        super().__post_init__()
        rule = check_rule(self.selection_rule, self.given, self.topk)
        check_scope(self.selection_scope, self.normalization, rule)
        share = isinstance(self.retention, int | float) and not isinstance(self.retention, bool)
        if not share or not 0 < self.retention <= 1:
            raise ValueError(f"retention is the share of the tokens that is kept, in (0, 1], got {self.retention!r}.")
        if isinstance(self.selection_seed, bool) or not isinstance(self.selection_seed, int):
            raise ValueError(f"selection_seed must be an integer, got {self.selection_seed!r}.")
        if self.loss_mode in ("tip_k1", "tip_kl") and not self.use_policy_gradient:
            raise ValueError(
                f"the gradient of loss_mode={self.loss_mode} does not depend on the teacher unless it is a reward: set "
                "use_policy_gradient=True, or loss_mode=tip_reverse_kl_topk."
            )
        if self.loss_mode == "tip_reverse_kl_topk":
            if self.use_policy_gradient:
                raise ValueError(
                    "loss_mode=tip_reverse_kl_topk is differentiated itself, and as a reward only the sampled token's "
                    "share of it would arrive: set use_policy_gradient=False, or loss_mode=tip_k1."
                )
            if self.log_prob_min_clamp is not None:
                raise ValueError(
                    f"loss_mode=tip_reverse_kl_topk has a tail that is never below {TAIL_FLOOR} instead of "
                    f"log_prob_min_clamp, got {self.log_prob_min_clamp!r}: set log_prob_min_clamp=null."
                )
        self.token_clamp = self.loss_max_clamp
        self.loss_max_clamp = None
        _bind()

    @property
    def given(self) -> str:
        """What the teacher is asked for: "top_k" or "sampled"."""
        return MODES[self.loss_mode]

    @property
    def statistics(self) -> tuple[str, ...]:
        """Statistics to compute: those the rule reads, and those that are logged."""
        return tuple(dict.fromkeys((*_SHOWN, *(rule_fields(self.selection_rule) or ()))))


def check_launch(config: Any) -> SelectedLossConfig:
    """Refuse a whole configuration of verl (`ppo_trainer`) under which our loss would be wrong, or not in force.

    The same is checked at the first step of a run; here it costs no GPU. `python -m tipdistill.integrations.verl_check`
    composes verl's configuration from the overrides of a launch and calls this.

    Args:
        config: the composed DictConfig.

    Returns:
        The instantiated `distillation_loss`.

    Raises:
        ValueError: what is not supported, and what to set instead; or what verl itself refuses, in its words.
    """
    from hydra.errors import InstantiationException
    from verl.utils.config import omega_conf_to_dataclass

    if not config.distillation.enabled:
        raise ValueError("distillation.enabled=False: nothing is distilled. Set distillation.enabled=True.")
    given = config.distillation.distillation_loss
    if given._target_ != TARGET:
        raise ValueError(
            f"distillation.distillation_loss._target_ is {given._target_}, so every token would be trained on: set it "
            f"to {TARGET}."
        )
    known = [field.name for field in fields(SelectedLossConfig)]
    for name in given:
        if name not in known:
            raise ValueError(f"distillation.distillation_loss has no field {name!r}.{nearest(name, known)}")
    try:
        loss = omega_conf_to_dataclass(config.distillation).distillation_loss
    except InstantiationException as error:  # Hydra's, around the one that says why
        raise ValueError(str(error.__cause__ or error)) from error
    check_trl()
    actor, rollout, model = (config.actor_rollout_ref[name] for name in ("actor", "rollout", "model"))
    check_strategy(actor.strategy)
    check_temperature(rollout.temperature)
    check_fused(bool(model.get("use_fused_kernels", False)), loss)
    check_sequence_parallel(
        max(actor.get("ulysses_sequence_parallel_size", 1), actor.fsdp_config.get("ulysses_sequence_parallel_size", 1))
    )
    check_entropy(bool(actor.calculate_entropy) or actor.entropy_coeff != 0, loss)
    return loss


# The loss and the statistics of logits, inside the forward of a micro-batch.


def topk_loss(
    config: Any, distillation_config: Any, data: Any, student_logits: Tensor, data_format: str
) -> dict[str, Tensor]:
    """Bound to `verl.trainer.distillation.losses.compute_topk_loss`: per-token losses and statistics of packed logits.

    Args:
        config: verl's ActorConfig.
        distillation_config: verl's DistillationConfig; verl's own function is called unless its loss is ours.
        data: the micro-batch.
        student_logits: [1, N, V], the packed sequences'.
        data_format: verl's.

    Returns:
        Tensors [1, N]: distillation_losses (differentiable), student_mass, teacher_mass, and our statistics, 0 where a
        row predicts no token of a response.
    """
    loss_config = distillation_config.distillation_loss
    if not isinstance(loss_config, SelectedLossConfig):
        return _verl_topk_loss(config, distillation_config, data, student_logits, data_format)
    _check_run(config, data, loss_config)
    statistics = {} if WEIGHT in data else _statistics_of_logits(loss_config, data, student_logits)
    if loss_config.loss_mode == "tip_forward_kl_topk":
        return statistics | _verl_topk_loss(config, distillation_config, data, student_logits, data_format)
    logits, token_ids, logprobs, rows = _packed(data, student_logits)
    # verl's cross-entropy of the sampled tokens may write its gradient over the logits, unseen by autograd
    overwritten = not tensordict_utils.get_non_tensor_data(data, "distillation_only", False)
    divergence, mass = tail_reverse_kl(logits, token_ids, logprobs, rows, overwritten)
    of_teacher = logprobs[rows].float().exp().sum(1)
    named = {"distillation_losses": divergence, "student_mass": mass, "teacher_mass": of_teacher}
    return statistics | {name: _spread(values, rows, len(logits))[None] for name, values in named.items()}


def _statistics_of_logits(loss_config: SelectedLossConfig, data: Any, student_logits: Tensor) -> dict[str, Tensor]:
    logits, token_ids, logprobs, rows = _packed(data, student_logits)
    scores = top_k_scores(logits, token_ids, logprobs, loss_config.statistics, rows)
    return {f"{STATISTIC}{name}": _spread(values, rows, len(logits))[None] for name, values in scores.present()}


def _packed(data: Any, student_logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = student_logits.squeeze(0)
    token_ids, logprobs = data["teacher_ids"].values().long(), data["teacher_logprobs"].values()
    assert len(token_ids) == len(logits), f"{len(token_ids)} rows of the teacher beside {len(logits)} of the student"
    return logits, token_ids, logprobs, _response_rows(data)[0].to(logits.device)


def _spread(values: Tensor, rows: Tensor, length: int) -> Tensor:
    return values.new_zeros(length).index_put((rows,), values)


def _response_rows(data: Any) -> tuple[Tensor, Tensor]:
    """Rows of the packed sequences that predict a trained response token, int64 [n], and whose sequence it is [n].

    The slices of verl's `no_padding_2_padding`: the row before a token predicts it.
    """
    mask, responses = data["response_mask"], data["responses"]
    if responses.is_nested:
        lengths = responses.offsets().diff()
    else:
        lengths = data["attention_mask"][:, data["prompts"].shape[1] :].sum(1)
    if mask.is_nested:
        mask = mask.to_padded_tensor(0)
    ends = data["input_ids"].offsets()[1:]
    position = torch.arange(mask.shape[1], device=mask.device)
    trained = mask.bool() & (position < lengths[:, None])
    rows = (ends - lengths - 1)[:, None] + position
    return rows[trained], trained.nonzero()[:, 0]


# Scores, and the loss that verl averages.


def _scores(config: Any, loss_config: SelectedLossConfig, model_output: Any, data: Any, rows: Tensor) -> TokenScores:
    """What the rule reads, and what is logged, of the trained tokens of a (micro-)batch."""
    if loss_config.given == "top_k":
        return TokenScores(
            **{name: model_output[f"{STATISTIC}{name}"].values()[rows].detach() for name in loss_config.statistics}
        )
    student, teacher = (
        values.values().reshape(-1)[rows].detach().float()
        for values in (model_output["log_probs"], data["teacher_logprobs"])
    )
    difference = teacher.to(student.device) - student
    # an estimate from one token that is never negative and right on average (k3), cut where verl cuts it
    statistics = {
        "student_logprob": student,
        "teacher_logprob": teacher.to(student.device),
        "reverse_kl": difference.clamp(max=20).expm1() - difference.clamp(max=20),
    }
    if "entropy" in model_output:
        statistics["entropy"] = model_output["entropy"].values()[rows].detach().float()
    if "entropy_norm" in loss_config.statistics:
        check_entropy("entropy" in model_output, loss_config)
        vocabulary = config.model_config.hf_config.get_text_config().vocab_size
        statistics["entropy_norm"] = statistics["entropy"] / math.log(vocabulary)
    return TokenScores(**statistics)


def _seeds(data: Any, loss_config: SelectedLossConfig) -> list[int]:
    return [seed_of(tokens, loss_config.selection_seed) for tokens in data["input_ids"].unbind()]


def _figures(scores: TokenScores, mask: Tensor) -> dict[str, Tensor]:
    """Sums over tokens of what is logged, in nats and tokens."""
    figures = {"selection/kept_fraction": mask.sum()}
    for name in _SHOWN:
        if getattr(scores, name) is not None:
            figures[f"selection/{name}"] = scores.require(name).sum()
    if scores.reverse_kl is not None:
        figures["selection/kept_reverse_kl"] = scores.reverse_kl[mask].sum()
    return figures


def selected_loss(config: Any, distillation_config: Any, model_output: Any, data: Any) -> tuple[Tensor, dict[str, Any]]:
    """verl's distillation loss of each token, weighed so that verl's mean over all tokens is that over the kept ones.

    Registered with verl under each name in `MODES`; the arguments are those of its DistillationLossFn.

    Returns:
        (losses [B, T], metrics).
    """
    loss_config = distillation_config.distillation_loss
    if not isinstance(loss_config, SelectedLossConfig):
        raise ValueError(
            f"loss_mode={loss_config.loss_mode} selects tokens and has no retention: set "
            f"distillation.distillation_loss._target_={TARGET} and +distillation.distillation_loss.retention=0.5."
        )
    _check_run(config, data, loss_config)
    losses, metrics = _of_every_token(config, distillation_config, model_output, data)
    if loss_config.normalization == "batch":
        if WEIGHT not in data:
            raise RuntimeError(
                "the mini-batch was not scored before its first micro-batch, so normalization=batch cannot be exact: "
                "verl's TrainingWorker was not ours to prepare. Set normalization=rollout, and report how it was "
                "started."
            )
        weight = data[WEIGHT]
    else:
        rows, rollout = _response_rows(data)
        scores = _scores(config, loss_config, model_output, data, rows)
        weights, mask = torch.zeros(len(rows), device=losses.device), rollout.new_zeros(len(rows), dtype=torch.bool)
        if len(rows):
            draws = resolve_rule(loss_config.selection_rule).budget in DRAWN
            seeds = _seeds(data, loss_config) if draws else [0] * len(data["input_ids"].offsets().diff())
            picked = select_rollouts(
                scores,
                rollout,
                seeds,
                loss_config.selection_rule,
                loss_config.retention,
                loss_config.selection_scope,
                loss_config.normalization,
            )
            weights, mask = loss_weights(picked, rollout, "rollout"), picked.mask
        weight = _nested_like(data["input_ids"], _spread(weights, rows, len(data["input_ids"].values())))
        share = data["dp_size"] / data["batch_num_tokens"]
        metrics |= {
            name: Metric(AggregationType.SUM, value.float() * share) for name, value in _figures(scores, mask).items()
        }
    weight = no_padding_2_padding(weight, data).to(losses.dtype)
    if loss_config.token_clamp is not None:
        losses = losses.clamp(-loss_config.token_clamp, loss_config.token_clamp)
    # a dropped token's loss may be infinite, and 0 · ∞ is NaN
    return torch.where(weight > 0, losses, 0.0) * weight, metrics


def _of_every_token(
    config: Any, distillation_config: Any, model_output: Any, data: Any
) -> tuple[Tensor, dict[str, Any]]:
    """verl's own final loss function: losses [B, T] of all tokens, and its metrics."""
    loss_config = distillation_config.distillation_loss
    if not len(_response_rows(data)[0]):
        # a micro-batch of verl's padding samples, where its metrics would stop the run
        computed = model_output["distillation_losses" if loss_config.given == "top_k" else "log_probs"]
        return no_padding_2_padding(computed, data) * 0, _neutral(_OF_NO_TOKEN[loss_config.given])
    if loss_config.given == "top_k":  # computed from the logits, by `topk_loss`
        return verl_losses.compute_forward_kl_topk(config, distillation_config, model_output, data)
    as_in_verl = types.SimpleNamespace(loss_mode=loss_config.loss_mode.removeprefix("tip_"))
    return verl_losses.compute_distillation_loss_reverse_kl_estimator(
        config, types.SimpleNamespace(distillation_loss=as_in_verl), model_output, data
    )


def _neutral(names: Sequence[str]) -> dict[str, Metric]:
    """verl's metrics of no token; as many as of any other micro-batch, because verl stacks the ranks'."""
    values = {"min": (AggregationType.MIN, math.inf), "max": (AggregationType.MAX, -math.inf)}
    return {name: Metric(*values.get(name.rpartition("_")[2], (AggregationType.MEAN, 0.0))) for name in names}


def loss_range(distillation_losses: Tensor, response_mask: Tensor) -> dict[str, Metric]:
    """Bound to verl's `compute_distillation_loss_range`, which is called unless there is no token."""
    mask = response_mask.values() if response_mask.is_nested else response_mask
    if bool(mask.any()):
        return _verl_loss_range(distillation_losses, response_mask)
    return _neutral(("distillation/loss_min", "distillation/loss_max"))


# A mini-batch scored as a whole, before its first micro-batch.


def _nested_like(nested: Any, values: Tensor) -> Tensor:
    return torch.nested.nested_tensor_from_jagged(values, nested.offsets())


def _train_batch(engine: Any, data: Any, loss_function: functools.partial) -> Any:
    """`engine.train_batch` of one optimiser step, after all its tokens (of all ranks) are scored and selected."""
    config, distillation_config = (loss_function.keywords[name] for name in ("config", "distillation_config"))
    loss_config = distillation_config.distillation_loss

    # verl calls the loss one micro-batch after the other, and a rule's percentiles and the mean over kept tokens are of
    # them all. So one forward over all of them first, whose "loss" hands back statistics; then the weights travel as a
    # column of the batch to where `selected_loss` reads them.
    def only_score(model_output=None, data=None, dp_group=None, student_logits=None, data_format="thd"):
        if student_logits is not None:
            _check_run(config, data, loss_config)
            return _statistics_of_logits(loss_config, data, student_logits)
        return torch.zeros(()), {}

    engine.module.eval()  # scores describe the student that wrote the rollouts; dropout would add noise
    try:
        output = engine.infer_batch(data, loss_function=only_score)["model_output"]
    finally:
        engine.module.train()
    rows, rollout = _response_rows(data)
    scores = _scores(config, loss_config, output, data, rows)
    over = "batch" if config.loss_agg_mode in ("token-mean", "token-sum") else "rollout"
    weights, all_scores, kept = select_over_ranks(
        scores,
        rollout,
        _seeds(data, loss_config),
        loss_config.selection_rule,
        loss_config.retention,
        loss_config.selection_scope,
        over,
        engine.get_data_parallel_group(),
    )
    input_ids = data["input_ids"]
    data[WEIGHT] = _nested_like(input_ids, _spread(weights.to(input_ids.device), rows, len(input_ids.values())))
    trained = type(engine).train_batch(engine, data, loss_function=loss_function)
    if engine.is_mp_src_rank_with_outputs():
        tokens = len(kept)
        sums = _figures(all_scores, kept) if tokens else {}
        trained["metrics"] |= {name: [float(value) / tokens] for name, value in sums.items()}
    return trained


def _check_run(config: Any, data: Any, loss_config: SelectedLossConfig) -> None:
    """What `check_launch` checks, from inside a step; and that our function is the one in force."""
    check_strategy(config.strategy)
    check_temperature(data.get("temperature", 1.0))
    check_fused(bool(tensordict_utils.get_non_tensor_data(data, "use_fused_kernels", False)), loss_config)
    check_sequence_parallel(tensordict_utils.get_non_tensor_data(data, "sp_size", 1))
    if verl_losses.compute_topk_loss is not topk_loss:
        raise RuntimeError(
            "verl.trainer.distillation.losses.compute_topk_loss was bound to another function after tipdistill's, so "
            "the loss in force would not be ours: look for another plugin that patches verl."
        )


# Our functions in verl's places.


def _loss_config_of(loss_function: Any) -> SelectedLossConfig | None:
    distillation_config = getattr(loss_function, "keywords", {}).get("distillation_config")
    loss_config = getattr(distillation_config, "distillation_loss", None)
    return loss_config if isinstance(loss_config, SelectedLossConfig) else None


def _bind() -> None:
    """Put our functions where verl looks its own up; as often as one likes.

    Nothing is imported for it: a process that trains has imported verl's workers before it builds a configuration.
    """
    verl_losses.compute_topk_loss = topk_loss
    verl_losses.compute_distillation_loss_range = loss_range
    worker = getattr(sys.modules.get("verl.workers.engine_workers"), "TrainingWorker", None)
    if worker is None or hasattr(worker.set_loss_fn, "scores_first"):
        return
    of_verl = worker.set_loss_fn

    @functools.wraps(of_verl)
    def set_loss_fn(self, loss_fn):
        of_verl(self, loss_fn)
        vars(self.engine).pop("train_batch", None)
        loss_config = _loss_config_of(loss_fn)
        if loss_config is not None and loss_config.normalization == "batch":
            self.engine.train_batch = functools.partial(_train_batch, self.engine)

    set_loss_fn.scores_first = True  # type: ignore[attr-defined]
    worker.set_loss_fn = set_loss_fn


_verl_topk_loss = verl_losses.compute_topk_loss
_verl_loss_range = verl_losses.compute_distillation_loss_range
for _given in ("top_k", "sampled"):
    verl_losses.register_distillation_loss(
        verl_losses.DistillationLossSettings(
            names=[_name for _name in MODES if MODES[_name] == _given],
            use_topk=_given == "top_k",
            use_estimator=_given == "sampled",
        )
    )(selected_loss)
_bind()
