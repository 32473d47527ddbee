"""The rollouts of a training run are the student's own: what TRL's `generate` must not take, write or return."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from accelerate.logging import get_logger

from ..chat import is_begun
from ..policy import end_tokens, left_out
from ..vocabulary import check_ids_shared
from .lengths import check_batch

logger = get_logger(__name__)


def state_policy(trainer: Any) -> None:
    """Every end token of the generation ends a completion; what rollouts leave out is said.

    Args:
        trainer: a `TIPTrainer` with both its models.
    """
    asked = trainer.args.generation_kwargs or {}
    stops = list(asked.get("stop_token_ids") or [])  # vLLM's name for them
    trainer.eos_token_ids = list(
        dict.fromkeys([*trainer.eos_token_ids, *end_tokens(trainer.generation_config), *stops])
    )
    if trainer.use_vllm:  # which reads the ends from the directory that it loaded
        given = trainer.vllm_generation.generation_kwargs
        trainer.vllm_generation.generation_kwargs = {**given, "stop_token_ids": list(trainer.eos_token_ids)}
    dropped = left_out(trainer.plain_student().generation_config, trainer.generation_config)
    if dropped:
        settings = ", ".join(f"{name}={value!r:.60}" for name, value in dropped.items())
        logger.warning(
            f"Rollouts leave out what the student's generation_config says of sampling: {settings}. They are drawn "
            f"from the student's own distribution (temperature {trainer.temperature:g}, top_p {trainer.args.top_p:g}); "
            "what you do want is set in generation_kwargs. The saved model keeps its generation_config."
        )


def leave_out_router(model: Any) -> None:
    """Let a mixture of experts not return its router's logits, and say that its auxiliary loss is no part of the run.

    Its own forward adds that loss to one of next tokens, which no step here computes; while it writes, that loss is
    formed of all the same, and of prompts of unequal length it cannot be.

    Args:
        model: a transformers model, whose configuration is changed.
    """
    asked = [config for config in (model.config, model.config.get_text_config()) if _returns_router(config)]
    for config in asked:
        config.output_router_logits = False
    if asked:
        logger.warning(
            "The student is a mixture of experts with output_router_logits: the auxiliary loss of its router, which "
            "balances the experts, is left out. Rollouts and losses go without it; watch reverse_kl, or freeze the "
            "router's weights where the experts must stay as they are."
        )


def _returns_router(config: Any) -> bool:
    return bool(getattr(config, "output_router_logits", False))


def never_sample(trainer: Any, surplus: Sequence[int]) -> None:
    """Keep ids out of all rollouts: those that the teacher has no embedding of, or reads as other tokens.

    Args:
        trainer: a `TIPTrainer`.
        surplus: token ids.
    """
    if surplus and trainer.use_vllm:
        given = trainer.vllm_generation.generation_kwargs
        trainer.vllm_generation.generation_kwargs = {
            **given,
            "logit_bias": {**(given.get("logit_bias") or {}), **dict.fromkeys(surplus, -100.0)},
        }
    elif surplus:
        suppressed = sorted({*(trainer.generation_config.suppress_tokens or []), *surplus})
        trainer.generation_kwargs["suppress_tokens"] = trainer.generation_config.suppress_tokens = suppressed


def for_processor(prompts: Sequence[Any]) -> list[Any]:
    """Conversations as TRL reads them for a model that sees images: each message has a content.

    Args:
        prompts: plain or conversational.

    Raises:
        ValueError: one ends with a turn of the assistant, after which TRL would begin another.

    Example:
        >>> for_processor([[{"role": "assistant", "tool_calls": []}, {"role": "tool", "content": "3"}]])
        [[{'content': None, 'role': 'assistant', 'tool_calls': []}, {'content': '3', 'role': 'tool'}]]
    """
    for prompt in prompts:
        if is_begun(prompt):
            raise ValueError(
                f"a prompt ends with a turn of the assistant ({prompt[-1].get('content')!r:.60}), which a model that "
                "sees images cannot go on with here: end it with the user's turn."
            )
    return [
        prompt if isinstance(prompt, str) else [{"content": None, **message} for message in prompt]
        for prompt in prompts
    ]


def check_asked(trainer: Any, prompt_ids: Sequence[Sequence[int]]) -> None:
    """Refuse prompts that a model cannot hold or reads otherwise, before the student goes on from them.

    Args:
        trainer: a `TIPTrainer`.
        prompt_ids: tokens of each.

    Raises:
        ValueError: which prompt, and what to change.
    """
    check_batch(trainer.limits, prompt_ids, trainer.args.max_completion_length, bool(trainer.tools))
    check_ids_shared(prompt_ids, trainer.differing)


def sync_engine(trainer: Any, prompt_ids: list[list[int]]) -> None:
    """Give vLLM the student's weights, where it has not got them yet; every process calls it.

    Args:
        trainer: a `TIPTrainer` with vLLM.
        prompt_ids: tokens of the prompts that it is asked about then.
    """
    check_asked(trainer, prompt_ids)
    if trainer.state.global_step != trainer._last_loaded_step:
        trainer.vllm_generation.sync_weights()
        trainer._last_loaded_step = trainer.state.global_step
        trainer.engine_check(trainer, prompt_ids[0])
