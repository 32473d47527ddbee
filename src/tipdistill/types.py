"""What travels between the stages: Rollout → Head → TokenScores → Selection.

Shape legend, used in every docstring of the project:

    N  tokens (completion tokens of all rollouts, flattened; no padding, no prompt)
    V  vocabulary (rows of an lm_head)
    H  hidden width (the student's and the teacher's may differ)
    B  rollouts in a batch
    T  completion length in tokens, padded
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace

from torch import Tensor

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")


# What came of a call of a tool; everything but "ok" is a failure, and in each case the student reads a message.
OUTCOMES = ("ok", "unknown tool", "malformed", "bad arguments", "raised", "timed out", "too many calls")
# How an episode ended: with a turn that calls nothing, at the token limit (in a turn of the student's, or before a
# result that had no room), or with a call after the last one that was allowed.
ENDINGS = ("answered", "cut", "no room", "too many calls")


@dataclass(frozen=True)
class ToolResult:
    """One call of a tool and what the student read of its result.

    Attributes:
        name: of the tool, as the student wrote it; "" where a call could not be read.
        arguments: as the student wrote them, JSON; "" where they could not be read.
        outcome: one of `OUTCOMES`.
        text: the result, or the message about the failure, cut where it was too long.
    """

    name: str
    arguments: str
    outcome: str
    text: str


@dataclass(frozen=True)
class Turn:
    """A stretch of a completion that was written at a time, by the student or by its tools.

    Attributes:
        role: "student" or "tool".
        first: place of its first token in the completion.
        tokens: how many it has, those of the chat template around a result included.
        text: what they are, decoded.
        results: of a turn of the tools: one for each call of the student's turn before it.
    """

    role: str
    first: int
    tokens: int
    text: str
    results: tuple[ToolResult, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """What an environment says of an episode once it is over.

    Attributes:
        correct: whether the student did what it was asked to.
        parts: constraint → whether it holds; what a page shows beside the answer.
        figures: name → a number that an evaluation takes the mean of, such as the share of the constraints that hold.
    """

    correct: bool
    parts: Mapping[str, bool] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Rollout:
    """A completion that the student wrote, as tokens.

    One in which tools answered is an episode: its completion has turns, and what the tools wrote stands in it too. Only
    the student's own tokens are scored, selected and trained on.

    Attributes:
        prompt_id: row of the prompt in its dataset.
        prompt: its text as fed, chat template and special tokens included.
        prompt_ids: its tokens.
        completion_ids: the tokens written, the end-of-sequence token included where there is one.
        finished: whether it ended by itself, and not at the length limit.
        turns: of an episode, in order; they cover the completion. Empty: the student wrote all of it.
        ending: of an episode, one of `ENDINGS`; "" for others.
        verdict: what the environment says of an episode, if it says anything.

    Example:
        >>> turns = Turn("student", 0, 1, "a"), Turn("tool", 1, 2, "bc"), Turn("student", 3, 1, "d")
        >>> Rollout(0, "", (9,), (4, 5, 6, 7), True, turns).written
        (True, False, False, True)
    """

    prompt_id: int
    prompt: str
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    finished: bool
    turns: tuple[Turn, ...] = ()
    ending: str = ""
    verdict: Verdict | None = field(default=None, hash=False)  # mappings have no hash

    @property
    def written(self) -> tuple[bool, ...]:
        """Of each token of the completion, whether the student wrote it (TRL's `tool_mask`)."""
        if not self.turns:
            return (True,) * len(self.completion_ids)
        return tuple(turn.role == "student" for turn in self.turns for _ in range(turn.tokens))

    @property
    def student_ids(self) -> tuple[int, ...]:
        """The tokens of the completion that the student wrote: those that are scored and trained on."""
        if not self.turns:
            return self.completion_ids
        return tuple(itertools.compress(self.completion_ids, self.written))


@dataclass(frozen=True)
class Head:
    """Last hidden states and the lm_head that turns them into logits.

    logits = softcap · tanh(logit_scale · (hidden @ weight.T + bias) / softcap), without the tanh where softcap is None.

    Args:
        hidden: [N, H] last hidden states, any floating dtype.
        weight: [V, H] lm_head weight (tied or not).
        bias: [V] lm_head bias, or None.
        logit_scale: multiplier of the logits (Cohere's `logit_scale`, Granite's 1 / `logits_scaling`).
        softcap: Gemma's `final_logit_softcapping`, or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class TopTokens:
    """The k likeliest tokens of a model at each of N tokens, the likeliest first.

    Attributes:
        token_ids: int64 [N, k]; −1 where a teacher told of fewer than k.
        probability: float [N, k].
    """

    token_ids: Tensor
    probability: Tensor


@dataclass(frozen=True)
class TeacherLogprobs:
    """What a teacher behind a server says of N tokens: log P_T of the whole vocabulary, or of its likeliest tokens.

    Attributes:
        logprob: float32 [N, V] where `token_ids` is None, else [N, k] with −∞ where token_ids is −1.
        token_ids: int64 [N, k], the tokens that `logprob` is of, the likeliest first; −1 for none. None: all of them.
        sampled: float32 [N], log P_T of the tokens that the student wrote.
    """

    logprob: Tensor
    token_ids: Tensor | None
    sampled: Tensor

    def __len__(self) -> int:
        return len(self.sampled)

    def map(self, function: Callable[[Tensor], Tensor]) -> TeacherLogprobs:
        """Apply `function` to every tensor (index, move)."""
        ids = None if self.token_ids is None else function(self.token_ids)
        return TeacherLogprobs(function(self.logprob), ids, function(self.sampled))


@dataclass(frozen=True)
class TokenScores:
    """Per-token statistics, each float32 [N] or None where it was not asked for.

    Entropies and divergences are in nats, over the whole (shared) vocabulary. Only `divergence` is differentiable.

    Attributes:
        entropy: H(P_S).
        entropy_norm: H(P_S) / log V, in [0, 1] (paper Eq. 2).
        teacher_entropy: H(P_T).
        reverse_kl: KL(P_S ‖ P_T) (paper Eq. 3).
        forward_kl: KL(P_T ‖ P_S).
        divergence: the divergence that is trained on, differentiable in the student.
        student_logprob: log P_S of the sampled token.
        teacher_logprob: log P_T of the sampled token.
        jsd: generalised Jensen-Shannon divergence at the given beta.
        hellinger: ‖√P_S − √P_T‖₂ / √2, in [0, 1].
        gradient_norm: ‖P_S ∘ (log P_S/P_T − KL)‖₂, the norm of the reverse-KL gradient at the logits.
        signal_to_curvature: ‖g‖² / gᵀHg with g = P_S − P_T, H = diag(P_S) − P_S P_Sᵀ (paper Eq. 6).
        top16_forward_kl: KL(P_T ‖ P_S) on the union of both models' 16 likeliest tokens, renormalised there.
        top16_teacher_mass: P_T of the student's 16 likeliest tokens together, in [0, 1].
        top16_overlap: share of the student's 16 likeliest tokens that are among the teacher's 16, in [0, 1].
        argmax_in_top5: 1 where the student's likeliest token is among the teacher's 5 likeliest, else 0.
    """

    entropy: Tensor | None = None
    entropy_norm: Tensor | None = None
    teacher_entropy: Tensor | None = None
    reverse_kl: Tensor | None = None
    forward_kl: Tensor | None = None
    divergence: Tensor | None = None
    student_logprob: Tensor | None = None
    teacher_logprob: Tensor | None = None
    jsd: Tensor | None = None
    hellinger: Tensor | None = None
    gradient_norm: Tensor | None = None
    signal_to_curvature: Tensor | None = None
    top16_forward_kl: Tensor | None = None
    top16_teacher_mass: Tensor | None = None
    top16_overlap: Tensor | None = None
    argmax_in_top5: Tensor | None = None

    def present(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) for every statistic that was computed."""
        for statistic in fields(self):
            value = getattr(self, statistic.name)
            if value is not None:
                yield statistic.name, value

    def require(self, name: str) -> Tensor:
        """Return statistic `name`; ValueError when it was not computed."""
        value = getattr(self, name, None)
        if value is None:
            have = ", ".join(present for present, _ in self.present()) or "none"
            raise ValueError(
                f"statistic '{name}' was not computed (computed: {have}). "
                "Ask for it: token_scores(..., rule=...) computes what a rule and the loss read, "
                f"token_scores(..., fields=[..., '{name}']) what you name. A rule of your own names what it reads in "
                "its attribute `fields`."
            )
        return value

    def map(self, function: Callable[[Tensor], Tensor]) -> TokenScores:
        """Apply `function` to every statistic that was computed (index, detach, move)."""
        return replace(self, **{name: function(value) for name, value in self.present()})

    def detach(self) -> TokenScores:
        return self.map(lambda value: value.detach())

    def __len__(self) -> int:
        for _, value in self.present():
            return value.shape[0]
        return 0


STATISTICS = tuple(field.name for field in fields(TokenScores))
# what is known without a teacher
OF_STUDENT = frozenset({"entropy", "entropy_norm", "student_logprob"})


@dataclass(frozen=True)
class Scored:
    """What both models say of N tokens.

    Attributes:
        scores: statistics, float [N] each.
        student_top, teacher_top: the likeliest tokens of both, [N, k].
    """

    scores: TokenScores
    student_top: TopTokens
    teacher_top: TopTokens

    def map(self, function: Callable[[Tensor], Tensor]) -> Scored:
        """Apply `function` to every tensor (index, move)."""
        tops = [
            TopTokens(function(top.token_ids), function(top.probability))
            for top in (self.student_top, self.teacher_top)
        ]
        return Scored(self.scores.map(function), tops[0], tops[1])


@dataclass(frozen=True)
class Selection:
    """Which tokens are trained on, and with what weight: what `select` makes of TokenScores by a rule.

    A rule of your own is a function TokenScores → float [N], and `select(scores, rule=it)` takes it as it is; see
    `Rule`.

    Attributes:
        mask: bool [N], True for the kept tokens.
        weight: float32 [N], the token's weight in the loss, ≥ 0 and 0 where the token is dropped.
        score: float32 [N], what the rule ranked or drew by.
        inverse_probability: the weights are ρ / π, π a token's probability of being kept, and not the rule's own.
    """

    mask: Tensor
    weight: Tensor
    score: Tensor
    inverse_probability: bool = False

    @property
    def total(self) -> Tensor:
        """What the loss divides by: Σ w, or the number of kept tokens where weights are inverse probabilities.

        Inverse probabilities add up to that number in expectation only. Their sum at one draw would put the draw into
        the denominator, and the loss would not be that of all tokens in expectation.

        Example:
            >>> import torch
            >>> mask = torch.tensor([True, False, True])
            >>> Selection(mask, torch.tensor([0.5, 0.0, 4.0]), torch.zeros(3), inverse_probability=True).total
            tensor(2.)
        """
        return self.mask.sum().to(self.weight.dtype) if self.inverse_probability else self.weight.sum()
