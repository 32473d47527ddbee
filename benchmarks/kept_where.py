"""Where does the backward through kept positions lose its gradient: at the prompt, near kept tokens, in which layers?

Of rollouts of a real pair: the gradient that flows through some positions alone, beside the full one of the same loss.
The kept positions are always among them. `python -m tipdistill.tasks smollm2` writes the pair first.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, pad

from tipdistill.loss import fused_divergence_loss
from tipdistill.provenance import environment
from tipdistill.rollout import generate
from tipdistill.score.models import head_of, score_rollouts
from tipdistill.select import resolve_rule, rule_fields
from tipdistill.tasks.instructions import as_chat, heldout_prompts
from tipdistill.training.kept import kept_states, read

from . import measure
from .smollm2 import MICRO_BATCH, ROOT, chosen, completion_states, micro_batches, parser, read_pair, whole

# rule, retention, scope; None: the rule's own
ROWS: tuple[tuple[str, float, str | None], ...] = (
    ("gradient_norm_sampling", 0.1, "batch"),
    ("soft_or", 0.2, None),
    ("soft_or", 0.5, None),
)
NEAR = 4  # positions before a kept one
THIRDS = ("first", "middle", "last")


def before(kept: Tensor, count: int) -> Tensor:
    """Kept positions and so many before each, bool [B, L].

    Example:
        >>> before(torch.tensor([[False, False, False, True, False]]), 2).int().tolist()
        [[0, 1, 1, 1, 0]]
    """
    return max_pool1d(pad(kept.float(), (0, count))[:, None], count + 1, stride=1)[:, 0] > 0


# name → (kept positions [B, L], those of completions) → what is differentiated, padding not yet taken out
DIFFERENTIATED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kept positions": lambda kept, completion: kept,
    f"and {NEAR} before each": lambda kept, completion: before(kept, NEAR),
    "and the prompt": lambda kept, completion: kept | ~completion,
    "and the completion": lambda kept, completion: kept | completion,
    "all positions": lambda kept, completion: torch.ones_like(kept),
}


def run_where(
    root: Path = ROOT,
    prompts: int = 16,
    tokens: int = 64,
    threads: int = 2,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Sample a student, select, and compare the gradients of each micro-batch.

    Args:
        root: of `python -m tipdistill.tasks smollm2`.
        prompts: held-out ones, each answered once; eight are a micro-batch, and all of them the generation batch.
        tokens: of an answer, at most.
        threads: of torch.
        say: takes a line of progress.

    Raises:
        ValueError: no models there.
    """
    tokenizer, student, teacher = read_pair(root, threads)
    asked = [as_chat(text) for text in heldout_prompts()[:prompts]]
    (rollouts,) = generate(student, tokenizer, asked, max_new_tokens=tokens, seed=1, batch_size=len(asked))
    fields = list(dict.fromkeys(field for rule, *_ in ROWS for field in rule_fields(rule) or ()))
    scores = score_rollouts(student, teacher, rollouts, fields).scores
    rows = []
    for rule, retention, scope in ROWS:
        scope = scope or resolve_rule(rule).scope
        weight = chosen(scores, rollouts, rule, retention, scope, seed=0).weight
        compared = [of_micro_batch(student, teacher, *batch) for batch in micro_batches(rollouts, weight)]
        for name in DIFFERENTIATED:
            figures = [each[name] for each in compared if each]
            means = {key: fmean(figure[key] for figure in figures) for key in figures[0]}
            rows.append({"rule": rule, "retention": retention, "scope": scope, "differentiated": name, **means})
        say(f"{rule} {retention:g}")
    return {
        "benchmark": "kept_where",
        "preset": "smollm2",
        **environment("cpu", threads),
        "settings": {"prompts": len(asked), "tokens": tokens, "micro_batch": MICRO_BATCH, "near": NEAR},
        "rows": rows,
    }


def of_micro_batch(
    student: Any, teacher: Any, tokens: dict[str, Tensor], weight: Tensor
) -> dict[str, dict[str, float]]:
    """What is differentiated → its share of the positions, and cosine and norm of its gradient beside the full one.

    Cosines are of all parameters, and of those of each third of the layers. Nothing where no token is kept.

    Args:
        student, teacher: transformers models.
        tokens, weight: of `micro_batches`.
    """
    asked = weight > 0
    if not asked.any():
        return {}
    ids, mask = whole(tokens)
    prompt = tokens["prompt_ids"].shape[1]
    kept = pad(asked, (prompt - 1, 1))  # a position predicts the token after it
    written = pad(tokens["completion_mask"].bool(), (prompt - 1, 1))
    with torch.no_grad():
        of_teacher = head_of(teacher, completion_states(teacher, tokens)[asked])

    def gradient(states: Tensor) -> dict[str, Tensor]:
        student.zero_grad()
        fused_divergence_loss(head_of(student, states), of_teacher, weight[asked]).backward()
        return {name: value.grad.flatten() for name, value in student.named_parameters() if value.grad is not None}

    full = gradient(completion_states(student, tokens)[asked])
    figures = {}
    for name, differentiated in DIFFERENTIATED.items():
        through = differentiated(kept, written) & mask.bool()
        own = gradient(kept_states(student, read(student, ids, mask), through)[kept[through]])
        figures[name] = {
            "positions": int(through.sum()) / int(mask.sum()),
            "cosine": cosine(own, full, list(full)),
            "norm": norm(own) / norm(full),
            **{third: cosine(own, full, names) for third, names in thirds(list(full)).items()},
        }
    return figures


def thirds(names: list[str]) -> dict[str, list[str]]:
    """The parameters of the layers by thirds of their depth; embeddings and the last norm are in none.

    Example:
        >>> thirds([f"model.layers.{layer}.mlp" for layer in range(6)] + ["model.norm"])["last"]
        ['model.layers.4.mlp', 'model.layers.5.mlp']
    """
    layers = {name: int(name.split(".layers.")[1].split(".")[0]) for name in names if ".layers." in name}
    count = max(layers.values()) + 1
    return {
        third: [name for name, layer in layers.items() if layer * 3 // count == index]
        for index, third in enumerate(THIRDS)
    }


def cosine(own: dict[str, Tensor], full: dict[str, Tensor], names: list[str]) -> float:
    """⟨own, full⟩ / (‖own‖ ‖full‖) over some parameters."""
    product = sum(float(own[name] @ full[name]) for name in names)
    squares = [sum(float(each[name] @ each[name]) for name in names) for each in (own, full)]
    return float(product / (squares[0] * squares[1]) ** 0.5)


def norm(gradient: dict[str, Tensor]) -> float:
    """‖gradient‖ over all parameters."""
    return sum(float(part @ part) for part in gradient.values()) ** 0.5


def main(argv: list[str] | None = None) -> int:
    """Measure and write benchmarks/results/kept_where-smollm2.json.

    Raises:
        ValueError: no models there.
    """
    return measure.run("kept_where", run_where, parser("kept_where", __doc__), argv)


if __name__ == "__main__":
    measure.end(main)
