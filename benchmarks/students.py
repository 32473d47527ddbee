"""What kinds of tokens several students of SmolLM2 write: pruned heavily and lightly, rounded to 4 bits, healed.

`python -m tipdistill.tasks smollm2` writes the teacher first.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tipdistill.provenance import environment
from tipdistill.prune import drop_layers, least_influential
from tipdistill.rollout import generate
from tipdistill.score.models import score_rollouts
from tipdistill.select.quadrants import DIVERGENCE_THRESHOLD, ENTROPY_THRESHOLD, quadrant_shares, quadrants
from tipdistill.tasks.instructions import as_chat, heldout_prompts
from tipdistill.types import TokenScores

from . import measure
from .smollm2 import ROOT, read_pair

LAYERS = (2, 4, 6)
# ours, and those at which a lightly pruned student has the paper's shares
THRESHOLDS = ((ENTROPY_THRESHOLD, DIVERGENCE_THRESHOLD), (0.4, 0.3), (0.6, 0.5), (0.6, 1.0))
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


def rounded_to_bits(model: Any, bits: int = 4) -> Any:
    """The model with the weights of its linear layers rounded, in place: w ← s · round(w / s), one s for each row.

    Args:
        model: a transformers model; embeddings and a tied lm_head stay as they are.
        bits: of a weight, its sign included.

    Example:
        >>> layer = nn.Sequential(nn.Linear(2, 1, bias=False))
        >>> _ = layer[0].weight.data.copy_(torch.tensor([[0.7, 0.26]]))
        >>> rounded_to_bits(layer, bits=4)[0].weight.data
        tensor([[0.7000, 0.3000]])
    """
    most = 2 ** (bits - 1) - 1
    embeddings = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not embeddings:
            scale = module.weight.data.abs().amax(1, keepdim=True) / most
            module.weight.data = (module.weight.data / scale).round().clamp(-most - 1, most) * scale
    return model


def run_students(
    root: Path = ROOT,
    prompts: int = 70,
    tokens: int = 32,
    healed: Path | None = None,
    threads: int = 2,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Sample each student, score its tokens, and say what kinds they are.

    Args:
        root: of `python -m tipdistill.tasks smollm2`.
        prompts: held-out ones, each answered once.
        tokens: of an answer, at most.
        healed: a trained student's directory; None: left out.
        threads: of torch.
        say: takes a line of progress.

    Raises:
        ValueError: no teacher there.
    """
    from transformers import AutoModelForCausalLM

    tokenizer, _, teacher = read_pair(root, threads)
    influence = json.loads((root / "models" / "student" / "prune.json").read_text(encoding="utf-8"))["influence"]
    students: dict[str, Callable[[], Any]] = {"the teacher itself": lambda: teacher}
    for layers in LAYERS:
        numbers = least_influential(influence, layers)
        students[f"without {layers} layers"] = partial(_without, teacher, numbers)
    students["rounded to 4 bits"] = lambda: rounded_to_bits(copy.deepcopy(teacher))
    if healed is not None:
        students["healed"] = lambda: AutoModelForCausalLM.from_pretrained(healed).eval().requires_grad_(False)
    asked, entries = [as_chat(text) for text in heldout_prompts()[:prompts]], {}
    for name, build in students.items():
        student = build()
        (rollouts,) = generate(student, tokenizer, asked, max_new_tokens=tokens, seed=1, batch_size=len(asked))
        entries[name] = _kinds(score_rollouts(student, teacher, rollouts).scores)
        entries[name]["example"] = tokenizer.decode(rollouts[1].completion_ids, skip_special_tokens=True)
        say(f"{name}: reverse KL {entries[name]['reverse_kl']:.3f} nats")
    return {
        "benchmark": "students",
        "preset": "smollm2",
        **environment("cpu", threads),
        "settings": {"prompts": len(asked), "tokens": tokens, "temperature": 1.0, "healed": str(healed or "")},
        "students": entries,
    }


def _without(teacher: Any, numbers: Sequence[int]) -> Any:
    return drop_layers(copy.deepcopy(teacher), numbers)


def _kinds(scores: TokenScores) -> dict[str, Any]:
    divergence, entropy = scores.require("reverse_kl"), scores.require("entropy")
    points = torch.tensor(QUANTILES)
    return {
        "tokens": len(divergence),
        **{
            name: float(scores.require(name).mean())
            for name in ("reverse_kl", "forward_kl", "entropy", "teacher_entropy")
        },
        "reverse_kl_quantiles": divergence.quantile(points).tolist(),
        "entropy_quantiles": entropy.quantile(points).tolist(),
        "quadrants": [
            {
                "entropy_threshold": first,
                "divergence_threshold": second,
                "shares": [share for _, share in sorted(quadrant_shares(quadrants(scores, first, second)).items())],
            }
            for first, second in THRESHOLDS
        ],
    }


def main(argv: list[str] | None = None) -> int:
    """Measure and write benchmarks/results/students-smollm2.json.

    Raises:
        ValueError: no teacher there.
    """
    parser = measure.parser("students", __doc__)
    parser.add_argument("--root", type=Path, help="of `python -m tipdistill.tasks smollm2` (default runs/smollm2)")
    parser.add_argument("--healed", type=Path, help="a trained student's directory, such as one of make demo-lm")
    parser.add_argument("--prompts", type=int, help="held-out ones, each answered once")
    parser.add_argument("--threads", type=int, help="of torch (default 2)")
    return measure.run("students", run_students, parser, argv)


if __name__ == "__main__":
    measure.end(main)
