"""What a probe advises: warnings of what is known to fail, and one rule at one retention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .select.normalize import min_max
from .select.quadrants import quadrant_shares
from .types import Rollout, TokenScores

# A step is called as good as one on all tokens where its descent is at least this share of theirs.
ENOUGH = 0.9
# The least retention that is recommended: below it rules were seen to collapse in training that look well at its start.
LEAST_RETENTION = 0.1
_FEW_PROMPTS = 32
_TURNS_AWAY = ("q3", "divergence", "hellinger", "signal_to_curvature")
_BY_ENTROPY = ("soft_or", "soft_or_log", "entropy")


def warnings_of(
    rows: Sequence[dict[str, Any]],
    batch: TokenScores,
    quadrant: Tensor,
    rollouts: Sequence[Rollout],
    prompts: int,
    heaviest: float,
    rules: Sequence[str],
) -> list[tuple[tuple[tuple[str, float], ...], str]]:
    """What is known to fail, of what a probe saw; each thing once.

    Args:
        rows: of the probe, that of all tokens first.
        batch: `reverse_kl` of every token, [N].
        quadrant: int8 [N].
        rollouts: that were probed.
        prompts: how many were held out.
        heaviest: largest share that one prompt has of the squared norms of the prompts' gradients.
        rules: that were probed.

    Returns:
        (the rules and retentions that it speaks against, which may be none; what to know) of each.
    """
    shares = quadrant_shares(quadrant)
    uncertain = shares[1] + shares[2]
    spent, turned, alike = [], [], []
    for row in rows[1:]:
        place, interval = (row["rule"], row["retention"]), row["over_random_interval"]
        if place[0] in _BY_ENTROPY and row["kept"] < uncertain and row["q2_of_kept"] > 0.5:
            spent.append((place, row["q2_of_kept"]))
        if place[0] in _TURNS_AWAY and place[1] < LEAST_RETENTION:
            turned.append(place)
        if interval is not None and interval[0] <= 0:
            alike.append(place)
    warnings: list[tuple[tuple[tuple[str, float], ...], str]] = []
    if spent:
        most = max(share for _, share in spent)
        warnings.append(
            (
                tuple(place for place, _ in spent),
                f"{uncertain:.1%} of the tokens are uncertain. {_listed([place for place, _ in spent])} keeps fewer, "
                f"and spends up to {most:.0%} of them on tokens both models agree on (Q2): a known failure of rules "
                "that follow the entropy. Take a larger retention, or gradient_norm_sampling.",
            )
        )
    if turned:
        warnings.append(
            (
                tuple(turned),
                f"{_listed(turned)} may collapse in training although it looks well here: tokens that are never "
                "trained drift, and it does not call them back (seen on the addition task at 5 %, docs/rules.md).",
            )
        )
    if alike:
        warnings.append((tuple(alike), f"{_listed(alike)} is not told apart from random tokens here, or is worse."))
    delta = batch.require("reverse_kl")
    confident = quadrant == 3
    if "soft_or" in rules and confident.any():
        typical = float(min_max(delta)[confident].median())
        if typical < 0.05:
            warnings.append(
                (
                    (),
                    f"the largest divergence ({float(delta.max()):.3g} nats) dwarfs the others: the typical confident "
                    f"mistake scores {typical:.2f} after min-max, so soft_or ranks by entropy. soft_or_log does not.",
                )
            )
    if rows[0]["descent_interval"][0] <= 0:
        warnings.append(
            (
                (),
                "the gradient of all tokens does not reliably lower the held-out loss: these rollouts are too few or "
                "too unlike to tell rules apart. Probe with more prompts.",
            )
        )
    if heaviest > 0.5:
        warnings.append(
            (
                (),
                f"one prompt makes up {heaviest:.0%} of the squared gradient norms: whatever keeps or drops its tokens "
                "decides the figures, and training would clip it. Probe with more prompts.",
            )
        )
    if prompts < _FEW_PROMPTS:
        warnings.append(((), f"{prompts} prompts are few: the intervals are rough. Probe with more."))
    cut = sum(not rollout.finished for rollout in rollouts) / len(rollouts)
    if cut > 0.5:
        warnings.append(
            (
                (),
                f"{cut:.0%} of the rollouts were cut at the length limit: what comes later in a completion was not "
                "probed. Let them be as long as in training.",
            )
        )
    return warnings


def _listed(places: Sequence[tuple[str, float]]) -> str:
    """Rules with their retentions, each rule once.

    Example:
        >>> _listed([("q3", 0.1), ("entropy", 0.1), ("q3", 0.05)])
        'q3 at 0.1 and 0.05, entropy at 0.1'
    """
    at: dict[str, list[str]] = {}
    for rule, retention in places:
        at.setdefault(rule, []).append(f"{retention:g}")
    return ", ".join(f"{rule} at {' and '.join(retentions)}" for rule, retentions in at.items())


def recommend(
    rows: Sequence[dict[str, Any]], warnings: Sequence[tuple[tuple[tuple[str, float], ...], str]]
) -> dict[str, Any]:
    """The smallest retention at which a rule keeps the signal, and the rule that keeps most of it there.

    Args:
        rows: as in `warnings_of`.
        warnings: what it returned.

    Returns:
        rule, retention and reason, as probe.json has them.
    """
    against = {place for places, _ in warnings for place in places}
    fit = [
        row
        for row in rows[1:]
        if row["rule"] != "random"
        and LEAST_RETENTION <= row["retention"] < 1
        and (row["rule"], row["retention"]) not in against
        and row["descent_share_interval"] is not None
        and row["descent_share_interval"][0] >= ENOUGH
    ]
    if not fit:
        return {
            "rule": "all",
            "retention": 1.0,
            "reason": f"no rule at a retention of {LEAST_RETENTION:g} or more keeps {ENOUGH:.0%} of the held-out "
            "descent of all tokens with confidence and beats random tokens. Train on all tokens, or probe with more "
            "prompts.",
        }
    least = min(row["retention"] for row in fit)
    best = max((row for row in fit if row["retention"] == least), key=lambda row: row["descent"])
    random = next(row for row in rows if row["rule"] == "random" and row["retention"] == least)
    low, high = best["descent_share_interval"]
    return {
        "rule": best["rule"],
        "retention": least,
        "reason": f"it keeps {best['kept']:.1%} of the tokens, {best['divergence_share']:.0%} of the divergence, and "
        f"a step along its gradient lowers the held-out loss {best['descent_share']:.2f} times as fast as one on all "
        f"tokens ({low:.2f} to {high:.2f}; random tokens: {random['descent_share']:.2f}). {least:g} is the smallest "
        f"retention probed, from {LEAST_RETENTION:g} up, at which a rule keeps {ENOUGH:.0%} with confidence and beats "
        "random. This speaks of the first steps of a run: watch selection/dropped_divergence in the later ones.",
    }
