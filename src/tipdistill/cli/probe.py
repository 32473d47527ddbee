"""tipdistill probe: which selection rule and which retention suit a pair, before anything is trained."""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.table import Table

from ..extras import require
from ..files import alone, write_text
from ..pair import Pair, PairConfig, about_of, load_models, read_pair, sampled
from ..probe import PARAMETERS, RETENTIONS, RULES, Settings
from ..records import About, RecordsWriter
from ..terminal import PlainConsole, say
from .flags import Parser, pair_of, pair_parser

PROBE_FILE = "probe.json"
_WIDTH = 126


def main(argv: list[str]) -> int:
    """Probe as the flags say; returns the exit code.

    Raises:
        ValueError, FileNotFoundError, ImportError: anything that can be refused before weights are loaded.
    """
    options = parser().read(argv)
    directory = Path(options.output_dir)
    with alone(directory, "probe"):
        return _probe(options, directory)


def _probe(options: argparse.Namespace, directory: Path) -> int:
    if (directory / PROBE_FILE).exists() and not options.overwrite_output_dir:
        raise ValueError(
            f"{directory} already holds a probe: choose another --output_dir, or replace it (--overwrite_output_dir)."
        )
    settings = _settings(options)
    config = pair_of(options)
    _about(config, settings, None)
    if settings.parameters == "lora":
        require("peft", "--parameters lora", 'pip install "tipdistill[peft]"')
    pair = read_pair(config, settings.rules)
    if len(pair.prompts) < 4:
        raise ValueError(f"a probe needs at least 4 prompts, half of them to be held out; got {len(pair.prompts)}.")
    say("\n".join(f"# {label:<10}{text}" for label, text in pair.described.items()))
    result = _run(config, pair, settings, directory)
    write_text(directory / PROBE_FILE, json.dumps(result, indent=2) + "\n")
    show(result)
    say(f"Look at it: tipdistill report {directory} · all figures: {directory / PROBE_FILE}")
    return 0


def parser() -> Parser:
    """The flags of `tipdistill probe`."""
    parser = pair_parser("probe", __doc__, max_prompts=64, max_new_tokens=1024)
    add = parser.add_argument_group("probe").add_argument
    add("--rules", default=",".join(RULES), help="selection rules, separated by commas; random is the control")
    add("--retentions", default=",".join(map(str, RETENTIONS)), help="shares of the tokens to keep, each in (0, 1)")
    add("--scope", help="where the budget is spent: rollout, or batch (all tokens); default: as the rule has it")
    add("--parameters", choices=PARAMETERS, default="auto", help="whose gradient; auto: all, or lora of a large model")
    add("--last_blocks", type=int, default=2, help="blocks for --parameters last_blocks")
    add("--random_seeds", type=int, default=5, help="draws of the random control")
    add("--bootstrap", type=int, default=1000, help="resamples of the held-out prompts, for the intervals")
    add("--gradient_gib", type=float, default=4.0, help="memory for gradients that are held at a time, GiB")
    add("--entropy_threshold", type=float, default=Settings.entropy_threshold, help="border of the quadrants, in ĥ")
    add("--divergence_threshold", type=float, default=Settings.divergence_threshold, help="the other, in nats")
    add("--overwrite_output_dir", action="store_true", help="replace the probe and the records that are there")
    return parser


def _settings(options: argparse.Namespace) -> Settings:
    try:
        retentions = tuple(float(text) for text in options.retentions.split(","))
    except ValueError:
        raise ValueError(f"--retentions takes numbers separated by commas, got {options.retentions!r}.") from None
    if not options.gradient_gib > 0:
        raise ValueError(f"--gradient_gib must be positive, got {options.gradient_gib}.")
    return Settings(
        rules=tuple(rule for rule in options.rules.split(",") if rule != "random"),
        retentions=retentions,
        scope=options.scope,
        random_seeds=options.random_seeds,
        temperature=options.temperature,
        seed=options.seed,
        parameters=options.parameters,
        last_blocks=options.last_blocks,
        bootstrap=options.bootstrap,
        tokens_per_forward=options.tokens_per_forward,
        gradient_bytes=int(options.gradient_gib * 2**30),
        entropy_threshold=options.entropy_threshold,
        divergence_threshold=options.divergence_threshold,
    )


def _about(config: PairConfig, settings: Settings, pair: Pair | None) -> About:
    borders = settings.entropy_threshold, settings.divergence_threshold
    return about_of(config, settings.rules, pair, max(settings.retentions), settings.scope, *borders)


def _run(config: PairConfig, pair: Pair, settings: Settings, directory: Path) -> dict[str, Any]:
    from ..probe import probe
    from ..teachers.rollouts import RememberedTeacher, said_of_bounds, score_with

    def note(line: str) -> None:
        say(f"# {line}")

    student, teacher = load_models(config, pair)
    started = time.perf_counter()
    rollouts = [rollout for batch in sampled(config, pair, student) for rollout in batch]
    about = _about(config, settings, pair)
    remembered = RememberedTeacher(teacher, rollouts)
    scored = score_with(
        student,
        remembered,
        rollouts,
        tuple(dict.fromkeys([*about.fields(), *settings.fields()])),
        temperature=config.temperature,
        tokens_per_forward=config.tokens_per_forward,
    )
    seconds = time.perf_counter() - started
    note(f"{len(scored.scores):,} tokens of {len(rollouts):,} rollouts sampled and scored in {seconds:.0f} s")
    with RecordsWriter(directory, pair.tokenizer, about) as writer:
        writer.write(rollouts, scored)
    result = probe(student, remembered, rollouts, scored.scores, settings, note)
    bounds = said_of_bounds(about.settings)
    return {
        "student": about.student,
        "teacher": about.teacher,
        **result,
        "warnings": [*result["warnings"], *filter(None, [bounds])],
        "seconds": time.perf_counter() - started,
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }


def show(result: dict[str, Any]) -> None:
    """What a probe recommends, its warnings, and its rows as a table."""
    console = PlainConsole()
    if console.width < _WIDTH:
        console = PlainConsole(width=_WIDTH)  # a table that is cut off is no use; a terminal wraps it
    best = result["recommendation"]
    console.print(
        f"Take {best['rule']} at a retention of {best['retention']:g}: {best['reason']}", style="bold", soft_wrap=True
    )
    for warning in result["warnings"]:
        console.print(f"! {warning}", soft_wrap=True)
    table = Table(
        *("rule", "kept", "divergence", "Q3", "cosine", "descent / all", "over random"),
        title=f"{result['student']} from {result['teacher']}",
    )
    for row in result["rows"]:
        chosen = (row["rule"], row["retention"]) == (best["rule"], best["retention"])
        table.add_row(
            f"{row['rule']} {row['retention']:.0%}",
            f"{row['kept']:.1%}",
            f"{row['divergence_share']:.1%}",
            _or_dash(row["q3_share"], "{:.1%}"),
            f"{row['cosine']:.3f}",
            _or_dash(row["descent_share"], "{:.3f}") + _spread(row["descent_share_interval"], "{:.3f}"),
            _or_dash(row["over_random"], "{:+.3g}") + _spread(row["over_random_interval"], "{:+.3g}"),
            style="bold" if chosen else None,
        )
    console.print(table)


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _spread(interval: list[float] | None, form: str) -> str:
    return "" if interval is None else f" ({form.format(interval[0])} … {form.format(interval[1])})"
