"""Which rule and which retention suit a pair: measured on one batch of rollouts, before a GPU-hour is spent.

Half of the prompts play the training batch: each rule chooses there, and the gradient of what it keeps is compared
with the gradient of all tokens. The other half is held out: how fast does its loss fall along that gradient? Then the
halves change places. Random tokens at the same retention are the control.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn

from .advice import recommend, warnings_of
from .score.models import head_of, hidden_states, micro_batches
from .select import DRAWN, resolve_rule, rule_fields, select
from .select.quadrants import DIVERGENCE_THRESHOLD, ENTROPY_THRESHOLD, quadrant_shares, quadrants
from .teachers import Comparison
from .teachers.rollouts import RememberedTeacher, of_rollouts
from .types import Head, Rollout, TokenScores

SCHEMA_VERSION = 1
RULES = ("soft_or", "soft_or_log", "entropy", "q3", "divergence", "gradient_norm", "gradient_norm_sampling")
RETENTIONS = (0.5, 0.2, 0.1, 0.05)
PARAMETERS = ("auto", "all", "last_blocks", "lora")
# What `auto` differentiates in full.
ALL_PARAMETERS_UP_TO = 100_000_000


@dataclass(frozen=True)
class Settings:
    """What a probe compares, and how.

    Args:
        rules: selection rules by name; "random" is added as the control. A rule that weighs every token is probed once,
            as retention 1.
        retentions: shares of the tokens to keep, each in (0, 1).
        scope: "rollout" or "batch", where the budget is spent; None: each rule's own.
        random_seeds: draws of the random control, and of every rule that draws.
        temperature: of the sampling; it divides the logits of both models.
        seed: of the rules that draw, of the bootstrap and of LoRA's projections.
        parameters: whose gradient is taken: "all", "last_blocks", "lora" (rank-8 adapters on every linear layer, a
            random projection of the whole gradient; needs peft), or "auto": all of a small model, lora of a large one.
        last_blocks: how many for "last_blocks".
        bootstrap: resamples of the held-out prompts.
        tokens_per_forward: tokens of a forward, padding included.
        gradient_bytes: of the gradients that are held at a time; more rules are then gone through in turns.
        entropy_threshold, divergence_threshold: borders of the quadrants.

    Raises:
        ValueError: an unknown rule or kind of parameters, or a number out of range.
    """

    rules: Sequence[str] = RULES
    retentions: Sequence[float] = RETENTIONS
    scope: str | None = None
    random_seeds: int = 5
    temperature: float = 1.0
    seed: int = 0
    parameters: str = "auto"
    last_blocks: int = 2
    bootstrap: int = 1000
    tokens_per_forward: int = 16384
    gradient_bytes: int = 4 * 2**30
    entropy_threshold: float = ENTROPY_THRESHOLD
    divergence_threshold: float = DIVERGENCE_THRESHOLD

    def __post_init__(self) -> None:
        for rule in self.rules:
            if resolve_rule(rule).budget == "all":
                raise ValueError(
                    f"{rule!r} keeps everything: it is the yardstick of every probe, and no rule to probe."
                )
        if not self.rules:
            raise ValueError("there is no rule to probe.")
        if not self.retentions or any(not 0 < retention < 1 for retention in self.retentions):
            raise ValueError(f"retentions must lie in (0, 1), got {list(self.retentions)}.")
        if self.parameters not in PARAMETERS:
            raise ValueError(f"parameters must be one of {', '.join(PARAMETERS)}, got {self.parameters!r}.")
        for name in ("random_seeds", "last_blocks", "bootstrap"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")

    def fields(self) -> tuple[str, ...]:
        """Statistics that the probe reads of every token."""
        read = [name for rule in self.rules for name in rule_fields(rule) or ()]
        return tuple(dict.fromkeys(["entropy", "entropy_norm", "reverse_kl", *read]))


@dataclass(frozen=True)
class Kept:
    """One rule at one retention: what it keeps, and with what weight."""

    rule: str
    retention: float
    mask: Tensor
    weight: Tensor


def probe(
    student: Any,
    teacher: Any,
    rollouts: Sequence[Rollout],
    scores: TokenScores,
    settings: Settings | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """What each rule keeps of the tokens, of the divergence and of the learning signal, and which one to take.

    With g_K = ∇ mean_{t ∈ K} KL(P_S ‖ P_T) over the kept tokens of one half and L the loss over all tokens of the
    other: cosine = ⟨g_K, g_all⟩ / (‖g_K‖ ‖g_all‖), and descent = ⟨∇L, g_K⟩ / ‖g_K‖, how fast L falls per unit of a step
    along −g_K (nats). Every prompt is trained on once and held out once. Intervals are 95 % bootstrap intervals over
    the held-out prompts, given the two gradients.

    Args:
        student: a transformers model. Its `requires_grad` flags are left as they were.
        teacher: another on the same device, or a `RolloutTeacher`, which is asked once about each rollout.
        rollouts: of at least four prompts, sampled from the student.
        scores: of their tokens, `settings.fields()` at least, in the order of the rollouts.
        settings: see `Settings`.
        say: takes one line of progress.

    Returns:
        What probe.json holds, of JSON's types: see docs/probe.md.

    Raises:
        ValueError: too few prompts, or a statistic that was not computed.
    """
    settings = settings or Settings()
    halves = _halves(rollouts)
    teacher = RememberedTeacher(of_rollouts(teacher), rollouts)
    lengths = torch.tensor([len(rollout.student_ids) for rollout in rollouts])
    owner = torch.repeat_interleave(torch.arange(len(rollouts)), lengths)
    scores = scores.map(Tensor.cpu)
    batches, chosen, cosines, slopes = [], [], [], []
    with _differentiated(student, settings) as (model, parameters, kind):
        count = sum(parameter.numel() for parameter in parameters)
        for number, (half, other) in enumerate((halves, halves[::-1]), start=1):
            training = [place for prompt in half for place in prompt]
            inside = torch.isin(owner, torch.tensor(training))
            batch = scores.map(lambda value, inside=inside: value[inside])  # type: ignore[misc]
            batches.append(batch)
            chosen.append(list(_choices(batch, owner[inside], settings)))
            say(f"half {number} of 2: {len(chosen[-1]) + 1} gradients of {count:,} parameters ({kind})")
            pair = model, teacher
            cosine, slope = _compare(
                pair, [rollouts[place] for place in training], chosen[-1], rollouts, other, parameters, settings
            )
            cosines.append(cosine)
            slopes.append(slope)
    kept = [
        Kept(
            first.rule, first.retention, torch.cat([first.mask, second.mask]), torch.cat([first.weight, second.weight])
        )
        for first, second in zip(*chosen, strict=True)
    ]
    names = [name for name, _ in batches[0].present()]
    batch = TokenScores(**{name: torch.cat([half.require(name) for half in batches]) for name in names})
    borders = settings.entropy_threshold, settings.divergence_threshold
    quadrant = torch.cat([quadrants(half, *borders) for half in batches])
    prompts = [*halves[1], *halves[0]]  # in the order in which they were held out
    tokens = torch.tensor([float(lengths[places].sum()) for places in prompts], dtype=torch.float64)
    slope = torch.cat(slopes)
    descent = _bootstrap(slope[:, :-1], tokens, settings)
    heaviest = float(slope[:, -1].square().max() / slope[:, -1].square().sum())

    rows = _rows(kept, quadrant, batch, torch.stack(cosines).mean(0), descent)
    shares = quadrant_shares(quadrant)
    warnings = warnings_of(rows, batch, quadrant, rollouts, len(prompts), heaviest, settings.rules)
    return {
        "schema_version": SCHEMA_VERSION,
        "recommendation": recommend(rows, warnings),
        "warnings": [text for _, text in warnings],
        "rows": rows,
        "quadrants": {
            f"q{number}": {"token_share": share, "divergence_share": mass}
            for (number, share), mass in zip(
                shares.items(), quadrant_shares(quadrant, batch.require("reverse_kl")).values(), strict=True
            )
        },
        "parameters": {"kind": kind, "count": count},
        "sample": {"prompts": len(prompts), "rollouts": sum(map(len, prompts)), "tokens": int(tokens.sum())},
        "settings": asdict(settings),
    }


# Which tokens.


def _halves(rollouts: Sequence[Rollout]) -> tuple[list[list[int]], list[list[int]]]:
    """Places of the rollouts, prompt by prompt: every other prompt is of the second half."""
    by_prompt: dict[int, list[int]] = {}
    for place, rollout in enumerate(rollouts):
        if rollout.student_ids:
            by_prompt.setdefault(rollout.prompt_id, []).append(place)
    prompts = list(by_prompt.values())
    if len(prompts) < 4:
        raise ValueError(
            f"a probe needs rollouts of at least 4 prompts, half of them to be held out; got {len(prompts)}."
        )
    return prompts[::2], prompts[1::2]


def _choices(batch: TokenScores, rollout: Tensor, settings: Settings) -> Iterator[Kept]:
    def kept(rule: str, retention: float, draw: int = 0) -> Kept:
        generator = torch.Generator().manual_seed(settings.seed * 1009 + draw)
        chosen = select(batch, rule, retention, rollout, settings.scope, generator)
        return Kept(rule, retention, chosen.mask, chosen.weight)

    weighing = [rule for rule in settings.rules if resolve_rule(rule).budget == "weight"]
    for rule in weighing:
        yield kept(rule, 1.0)
    for retention in settings.retentions:
        for rule in dict.fromkeys([*(rule for rule in settings.rules if rule not in weighing), "random"]):
            for draw in range(settings.random_seeds if resolve_rule(rule).budget in DRAWN else 1):
                yield kept(rule, retention, draw)


# Gradients.


@contextmanager
def _differentiated(student: Any, settings: Settings) -> Iterator[tuple[Any, list[nn.Parameter], str]]:
    """The model to run, the parameters whose gradient is taken, and how to call them."""
    flags = [(parameter, parameter.requires_grad) for parameter in student.parameters()]
    was_training = student.training
    total = sum(parameter.numel() for parameter in student.parameters())
    kind = settings.parameters
    if kind == "auto":
        kind = "all" if total <= ALL_PARAMETERS_UP_TO else "lora" if _has_peft() else "last_blocks"
    student.eval().requires_grad_(False)
    model, adapted = student, None
    try:
        if kind == "all":
            chosen = list(student.parameters())
        elif kind == "last_blocks":
            chosen = _last_blocks(student, settings.last_blocks)
            kind = f"the last {settings.last_blocks} blocks"
        else:
            model = adapted = _with_adapters(student, settings.seed)
            # A ∘ x is a random projection and B is 0, so the gradient of A is 0 and that of B the projected one
            chosen = [parameter for name, parameter in model.named_parameters() if "lora_B" in name]
            model.requires_grad_(False)
        for parameter in chosen:
            parameter.requires_grad_(True)
        yield model, chosen, kind
    finally:
        if adapted is not None:
            adapted.unload()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        student.train(was_training)


def _has_peft() -> bool:
    import importlib.util

    return importlib.util.find_spec("peft") is not None


def _with_adapters(student: Any, seed: int) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError('parameters="lora" needs the package peft: pip install "tipdistill[peft]"') from error
    device = student.get_input_embeddings().weight.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        return get_peft_model(student, LoraConfig(r=8, target_modules="all-linear", lora_dropout=0.0)).eval()


def _last_blocks(student: Any, count: int) -> list[nn.Parameter]:
    backbone = (student.base_model.model if is_peft_model(student) else student).base_model
    blocks = max((module for module in backbone.modules() if isinstance(module, nn.ModuleList)), key=len)
    return [parameter for block in blocks[-count:] for parameter in block.parameters()]


def _turns(kept: Sequence[Kept], size: int, budget: int) -> Iterator[Sequence[Kept]]:
    """The choices in groups whose gradients fit into the budget together with the one of all tokens."""
    step = max(1, budget // (2 * size) - 1)  # twice: as they are and as unit vectors
    for start in range(0, len(kept), step):
        yield kept[start : start + step]


def _compare(
    pair: tuple[Any, Any],
    training: Sequence[Rollout],
    kept: Sequence[Kept],
    rollouts: Sequence[Rollout],
    held_out: Sequence[Sequence[int]],
    parameters: Sequence[nn.Parameter],
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    """Cosine of each choice's gradient with that of all tokens, [K]; slopes of the held-out prompts along each, and
    along that of all tokens in the last column but one, and the norms of their own gradients, [prompts, K + 2]."""
    everything = torch.ones(1, sum(len(rollout.student_ids) for rollout in training))
    whole = _gradients(*pair, training, everything, parameters, settings)
    cosine, slopes = [], []
    for group in _turns(kept, whole.nbytes, settings.gradient_bytes):
        weights = torch.stack([choice.weight for choice in group])
        gradients = torch.cat([_gradients(*pair, training, weights, parameters, settings), whole])
        unit = gradients / gradients.norm(dim=1, keepdim=True).clamp(min=torch.finfo(gradients.dtype).tiny)
        cosine.append((unit[:-1] @ unit[-1]).double().cpu())
        slopes.append(_slopes(*pair, rollouts, held_out, unit, parameters, settings))
    return torch.cat(cosine), torch.cat([*(piece[:, :-2] for piece in slopes), slopes[0][:, -2:]], dim=1)


def _gradients(
    model: Any,
    teacher: Any,
    rollouts: Sequence[Rollout],
    weights: Tensor,
    parameters: Sequence[nn.Parameter],
    settings: Settings,
) -> Tensor:
    """∇ of the weighted mean divergence of each choice, [K, P]. One forward per micro-batch, one backward per choice.

    Args:
        weights: float [K, N], over the tokens of the rollouts; 0 where a token is dropped.
    """
    total: Tensor | None = None
    spans = torch.arange(weights.shape[1]).split([len(rollout.student_ids) for rollout in rollouts])
    for places in micro_batches(rollouts, settings.tokens_per_forward):
        rows = torch.cat([spans[place] for place in places])
        with _compared(model, teacher, [rollouts[place] for place in places]) as (of_student, of_teacher):
            for number, weight in enumerate(weights):
                here = weight[rows].to(of_student.hidden.device)
                kept = here != 0
                if not kept.any():
                    continue
                loss, _ = of_teacher.take(kept).loss(
                    replace(of_student, hidden=of_student.hidden[kept]),
                    here[kept],
                    denominator=float(weight.sum()),
                    **_trained(settings),
                )
                each = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
                gradient = _flat(each, parameters)
                if total is None:
                    total = gradient.new_zeros(len(weights), len(gradient))
                total[number] += gradient
    assert total is not None, "every choice keeps a token, and there are rollouts"
    return total


def _slopes(
    model: Any,
    teacher: Any,
    rollouts: Sequence[Rollout],
    prompts: Sequence[Sequence[int]],
    unit: Tensor,
    parameters: Sequence[nn.Parameter],
    settings: Settings,
) -> Tensor:
    """⟨∇ of the summed divergence of each held-out prompt, each unit gradient⟩, float64 [prompts, K + 1]; the last
    column is the norm of that ∇ itself."""
    rows = []
    for places in prompts:
        of_prompt = unit.new_zeros(unit.shape[1])
        chosen = [rollouts[place] for place in places]
        for batch in micro_batches(chosen, settings.tokens_per_forward):
            with _compared(model, teacher, [chosen[place] for place in batch]) as (of_student, of_teacher):
                loss, _ = of_teacher.loss(of_student, None, denominator=1.0, **_trained(settings))
                of_prompt += _flat(torch.autograd.grad(loss, parameters, allow_unused=True), parameters)
        rows.append(torch.cat([unit @ of_prompt, of_prompt.norm()[None]]).double().cpu())
    return torch.stack(rows)


@contextmanager
def _compared(model: Any, teacher: Any, rollouts: Sequence[Rollout]) -> Iterator[tuple[Head, Comparison]]:
    """The student's head of these tokens, differentiable, and the teacher's side of them."""
    beside = of_rollouts(teacher)
    with beside.compare(beside.answer(rollouts)) as comparison, torch.enable_grad():
        yield head_of(model, hidden_states(model, rollouts)), comparison


def _trained(settings: Settings) -> dict[str, Any]:
    """The divergence whose gradient is looked at."""
    return {"divergence": "reverse_kl", "beta": 0.5, "temperature": settings.temperature}


def _flat(gradients: Iterable[Tensor | None], parameters: Sequence[nn.Parameter]) -> Tensor:
    dtype = torch.promote_types(torch.float32, parameters[0].dtype)
    return torch.cat(
        [
            parameter.new_zeros(parameter.numel(), dtype=dtype) if gradient is None else gradient.flatten().to(dtype)
            for gradient, parameter in zip(gradients, parameters, strict=True)
        ]
    )


# Figures.


def _bootstrap(slope: Tensor, tokens: Tensor, settings: Settings) -> Tensor:
    """Descent per choice, [1 + resamples, K]: as measured, then over prompts drawn with replacement."""
    generator = torch.Generator().manual_seed(settings.seed)
    drawn = torch.randint(len(tokens), (settings.bootstrap, len(tokens)), generator=generator)
    places = torch.cat([torch.arange(len(tokens))[None], drawn])
    return slope[places].sum(1) / tokens[places].sum(1)[:, None]


def _rows(
    kept: Sequence[Kept], quadrant: Tensor, batch: TokenScores, cosine: Tensor, descent: Tensor
) -> list[dict[str, Any]]:
    """One row per rule and retention, the draws of one averaged, and the row of all tokens first."""
    divergence = batch.require("reverse_kl").double()
    q3 = quadrant == 3
    whole = descent[:, -1]
    rows: list[dict[str, Any]] = [
        {
            "rule": "all",
            "retention": 1.0,
            "kept": 1.0,
            "divergence_share": 1.0,
            "q3_share": 1.0,
            "q2_of_kept": float((quadrant == 2).double().mean()),
            "cosine": 1.0,
            "descent": float(whole[0]),
            "descent_interval": _interval(whole[1:]),
            "descent_share": 1.0,
            "descent_share_interval": [1.0, 1.0],
            "over_random": None,
            "over_random_interval": None,
            "jaccard": {},
        }
    ]
    places: dict[tuple[str, float], list[int]] = {}
    for place, choice in enumerate(kept):
        places.setdefault((choice.rule, choice.retention), []).append(place)
    for (rule, retention), drawn in places.items():
        masks = torch.stack([kept[place].mask for place in drawn]).double()
        here = descent[:, drawn].mean(1)
        control = places.get(("random", retention)) if rule != "random" else None
        over = None if control is None else here - descent[:, control].mean(1)
        share = here / whole
        others = {
            other: _overlap([kept[place].mask for place in drawn], [kept[place].mask for place in theirs])
            for (other, at), theirs in places.items()
            if at == retention and other != rule
        }
        rows.append(
            {
                "rule": rule,
                "retention": retention,
                "kept": float(masks.mean()),
                "divergence_share": float((masks @ divergence).mean() / divergence.sum()),
                "q3_share": float((masks @ q3.double()).mean() / q3.sum()) if q3.any() else None,
                "q2_of_kept": float((masks @ (quadrant == 2).double() / masks.sum(1)).mean()),
                "cosine": float(cosine[drawn].mean()),
                "descent": float(here[0]),
                "descent_interval": _interval(here[1:]),
                "descent_share": float(share[0]) if whole[0] > 0 else None,
                "descent_share_interval": _share_interval(here[1:], whole[1:]),
                "over_random": None if over is None else float(over[0]),
                "over_random_interval": None if over is None else _interval(over[1:]),
                "jaccard": others,
            }
        )
    return rows


def _share_interval(here: Tensor, whole: Tensor) -> list[float] | None:
    """None where the descent of all tokens may well be 0 or less, so that nothing can be a share of it."""
    positive = whole > 0
    return _interval(here[positive] / whole[positive]) if float(positive.double().mean()) > 0.99 else None


def _interval(values: Tensor) -> list[float]:
    return torch.quantile(values, torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()


def _overlap(mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Mean |A ∩ B| / |A ∪ B| over all pairs of draws."""
    pairs = [(a & b).sum() / (a | b).sum() for a in mine for b in theirs]
    return float(torch.stack(pairs).mean())
