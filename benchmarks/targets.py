"""The lines that the engine must reach, for the script that measures, the tests and the tables of docs/engine.md."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

RULES = ("all", "soft_or 0.5", "soft_or 0.1", "entropy 0.1")
# On a CPU: time over that of plain PyTorch and of TRL's loss, which both train on all tokens (benchmarks/head.py).
ON_CPU = {
    "plain": dict(zip(RULES, (0.75, 0.78, 0.50, 0.25), strict=True)),
    "trl": dict(zip(RULES, (0.45, 0.44, 0.28, 0.14), strict=True)),
}
# On a GPU: time over that of TRL's Triton loss, and over the arithmetic floor.
OVER_TRL = dict(zip(RULES, (0.65, 0.65, 0.42, 0.24), strict=True))
OVER_FLOOR = 1.25
# The most extra memory over the least, among vocabularies of which the largest is four times the smallest.
FLAT = 1.25
# A step's peak above weights, gradients, optimiser and teacher, Soft-OR 0.5 over plain PyTorch.
ABOVE_PLAIN = 0.4


def variant_of(engine: str, rule: str) -> str:
    """The name of a variant in a result of `benchmarks.head`.

    Example:
        >>> variant_of("triton", "all"), variant_of("chunked", "entropy 0.1")
        ('triton', 'chunked entropy 0.1')
    """
    return engine if rule == "all" else f"{engine} {rule}"


def label(rule: str) -> str:
    """How a rule and a retention are called in a table.

    Example:
        >>> label("all"), label("soft_or 0.5")
        ('all tokens', 'Soft-OR 0.5')
    """
    return {"all": "all tokens"}.get(rule, rule).replace("soft_or", "Soft-OR")


def lines(stages: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Each line of a GPU with what was measured: `holds` is None where it was not.

    Args:
        stages: name → result, as benchmarks/gpu_lease.py writes them; any may be missing, or be there in part.

    Example:
        >>> stages = {"head": {"variants": {"triton": {"over_floor": {"median": 1.2}}}}}
        >>> [line for line in lines(stages) if line["holds"] is not None]
        [{'line': 'time / floor, all tokens', 'at_most': 1.25, 'measured': 1.2, 'holds': True}]
    """
    return [
        {"line": name, "at_most": at_most, "measured": value, "holds": None if value is None else value <= at_most}
        for name, at_most, value in _measured(stages)
    ]


def _measured(stages: dict[str, dict[str, Any]]) -> Iterator[tuple[str, float, float | None]]:
    tests = stages.get("tests", {})
    complete = bool(tests.get("complete"))
    yield "tests that fail", 0, len(tests.get("failed", ())) if complete or tests.get("failed") else None
    variants = stages.get("head", {}).get("variants", {})
    for rule in RULES:
        entry = variants.get(variant_of("triton", rule), {})
        yield f"time / TRL, {label(rule)}", OVER_TRL[rule], entry.get("ratio", {}).get("trl", {}).get("median")
    for rule in RULES:
        entry = variants.get(variant_of("triton", rule), {})
        yield f"time / floor, {label(rule)}", OVER_FLOOR, entry.get("over_floor", {}).get("median")
    for name, entry in stages.get("memory", {}).get("cases", {"all of it": {}}).items():
        yield f"extra memory at growing vocabularies, most / least, {name}", FLAT, entry.get("growth")
    step = stages.get("step", {}).get("variants", {}).get("tip soft_or 0.5", {})
    yield (
        "memory of a step above what it must hold, Soft-OR 0.5 / plain",
        ABOVE_PLAIN,
        step.get("above_ratio", {}).get("plain"),
    )
