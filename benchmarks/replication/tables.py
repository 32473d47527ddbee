"""Every table of docs/replication.md and benchmarks/results/replication.md, by the name of its mark.

Whatever stands between `<!-- sweep:NAME -->` and `<!-- /sweep -->` is written here and nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from textwrap import fill
from typing import Any

from tipdistill.sweep.result import markdown
from tipdistill.text import check_known, markdown_table, replace_blocks, with_error

from .. import measure
from .claims import (
    CLAIMS,
    CONTROLS,
    NOT_RUN,
    TEACHERS_ENTROPY,
    Comparison,
    judged,
    overall,
    verdict,
    verdict_row,
    verdict_table,
)
from .language_model import BLOCKS as OF_LANGUAGE_MODEL
from .language_model import told as of_language_model
from .planning import BLOCKS as OF_PLANNING
from .results import RATES, RESULTS, TASKS, TEACHER, At, Results, difference, figure_of, row_of
from .wording import brackets, percent, row_name, signed, signed_with_interval, with_interval

PROBE = measure.ROOT / "docs" / "probe-modular.json"
DRIFT = measure.ROOT / "docs" / "drift.json"
SCREENING = RESULTS / "screening" / "candidates.json"
BEFORE = RESULTS / "tokens" / "before.json"
HEAD, STEP = measure.RESULTS / "head-cpu.json", measure.RESULTS / "step-tiny.json"
OF_THE_GAIN = 0.95
# A mean normalised entropy below this is "almost none" (the paper's teachers: 0.031), and a fall of the memory below
# this is none.
ALMOST_NONE, A_FALL = 0.05, 0.05
GUARDED = "q3 guarded"  # begins at its retention and does not stay there
# What docs/replication.md shows of `of_the_gain`.
IN_SHORT: tuple[At, ...] = (
    *((f"{rule} batch", share) for rule in ("gradient_norm_sampling", "gradient_norm") for share in (0.02, 0.1)),
    *[("q3 batch", 0.02), ("random batch", 0.02)],
)
PAPERS = (
    *("all", "entropy", "entropy_sampling", "soft_or", "q3", "divergence", "complement:soft_or", "random"),
    "signal_to_curvature",  # Eq. 6, there a weight and no budget
)


def rendered(text: str, results: Results) -> str:
    """A document with every marked block as the results give it.

    Raises:
        ValueError: a mark that names no block; the nearest is given.
    """

    def block(name: str) -> str:
        check_known("block", name, BLOCKS)
        return BLOCKS[name](results)

    return replace_blocks(text, "sweep", block)


def verdicts(results: Results, comparisons: Sequence[Comparison]) -> str:
    """A table of comparisons: the verdict of the small tasks, each one's with its difference, a language model's."""
    rows = [
        [
            *verdict_row(f"{claim.number}. {claim.claim}" if claim.number else claim.claim, *judged(results, claim)),
            of_language_model(results, claim),
        ]
        for claim in comparisons
    ]
    return markdown_table(["claim", "in all", *TASKS.values(), "SmolLM2, of the gain"], rows)


def in_short(results: Results) -> str:
    """The claims and controls by their verdict over all tasks; what is mixed or undecided comes last."""
    by_verdict: dict[str, list[str]] = {f"**{answer}**": [] for answer in ("holds", "does not hold")}
    others: list[str] = []
    for comparison in (*CLAIMS, *CONTROLS):
        answer = overall(judged(results, comparison)[0])
        by_verdict.get(answer, others).append(comparison.claim)
    told = {"Holds on all three tasks": "**holds**", "Holds on none": "**does not hold**"}
    lines = [f"**{title}**: {'; '.join(by_verdict[answer]) or 'nothing'}." for title, answer in told.items()]
    lines.append(f"**The tasks differ, or are undecided**: {'; '.join(others) or 'nothing'}.")
    # a number is not parted from its %
    wrapped = [fill(f"- {line}".replace(" %", "\0%"), 100, subsequent_indent="  ") for line in lines]
    return "\n".join(wrapped).replace("\0", " ")


def of_the_paper(*columns: At) -> Callable[[Results], str]:
    """Tasks down, retentions across: accuracy, and under it the difference to all tokens."""

    def write(results: Results) -> str:
        lines = []
        for name, title in TASKS.items():
            if name not in results:
                lines.append([title, NOT_RUN, *[""] * len(columns)])
                continue
            result = results[name]
            start = result["before"].get(result["test"][0])
            accuracy = [title, with_interval(start) if start else ""]
            delta = ["− all tokens", ""]
            for at in columns:
                figure = figure_of(result, at)
                accuracy.append(with_interval(figure) if figure else "")
                to_all = None if at[0] == "all" else difference(result, at, ("all", 1.0))
                delta.append(signed_with_interval(to_all) if to_all else "")
            lines += [accuracy, delta]
        header = ["", "before", *(f"{row_name(name)} {percent(retention)}" for name, retention in columns)]
        return markdown_table(header, lines)

    return write


def small_budgets(results: Results) -> str:
    """Every rule at 10 % and less: accuracy, and the share of what all tokens gain."""
    parts = []
    for name, title in TASKS.items():
        if name not in results:
            parts.append(f"**{title}**: {NOT_RUN}")
            continue
        result = results[name]
        retentions = sorted({row["retention"] for row in result["rows"] if row["retention"] <= 0.1}, reverse=True)
        names = [name for name in dict.fromkeys(row["name"] for row in result["rows"]) if name != GUARDED]
        names = [name for name in names if any(figure_of(result, (name, share)) for share in retentions)]
        lines = []
        for rule in names:
            cells = []
            for retention in retentions:
                figure = figure_of(result, (rule, retention))
                share = figure["gain_share"] if figure else None
                gained = f"; {percent(share['mean'])} {brackets(share, percent)} of the gain" if share else ""
                cells.append(f"{with_interval(figure)}{gained}" if figure else "")
            lines.append([row_name(rule), *cells])
        parts.append(f"**{title}**\n\n" + markdown_table(["", *map(percent, retentions)], lines))
    return "\n\n".join(parts)


def of_the_gain(results: Results, rows: Sequence[At] | None = None) -> str:
    """Does a row keep 95 % of what all tokens gain? Rows: all at 20 % and less where none are given."""
    rows = _rows_up_to(results, 0.2) if rows is None else rows
    lines = []
    for at in rows:
        verdicts, shares = [], []
        for name in TASKS:
            figure = figure_of(results[name], at) if name in results else None
            share = figure["gain_share"] if figure else None
            if share is None:
                verdicts.append(NOT_RUN)
                shares.append("" if figure is None else "all tokens do not gain for certain")
                continue
            low, high = share["interval"]
            verdicts.append("holds" if low >= OF_THE_GAIN else "does not hold" if high < OF_THE_GAIN else "undecided")
            shares.append(f"{percent(share['mean'])} {brackets(share, percent)}")
        lines.append(verdict_row(f"{row_name(at[0])}, {percent(at[1])}", verdicts, shares))
    return verdict_table(lines, "row") if lines else NOT_RUN


def _rows_up_to(results: Results, retention: float) -> list[At]:
    rows = [
        (row["name"], row["retention"])
        for name in TASKS
        if name in results
        for row in results[name]["rows"]
        if row["retention"] <= retention and row["name"] != GUARDED
    ]
    return sorted(dict.fromkeys(rows), key=lambda at: at[1])  # stable: the grids' order inside a retention


def guard(results: Results) -> str:
    """What raising the retention costs, and what it saves."""
    rows: list[At] = [
        ("all", 1.0),
        ("q3 batch", 0.02),
        (GUARDED, 0.02),
        ("q3", 0.2),
        ("gradient_norm_sampling batch", 0.02),
    ]
    lines = []
    for name, title in TASKS.items():
        if name not in results or row_of(results[name], (GUARDED, 0.02)) is None:
            continue
        for at in rows:
            row, figure = row_of(results[name], at), figure_of(results[name], at)
            if row is not None and figure is not None:
                what = f"{row_name(at[0])}, {percent(at[1])}"
                lines.append([title, what, with_interval(figure), f"{row['trained_tokens']:,.0f}"])
    return markdown_table(["task", "", "accuracy", "tokens trained on"], lines) if lines else NOT_RUN


def ours(results: Results) -> str:
    """Does a rule that is not the paper's beat Soft-OR and Q3 at 10 %, each in both scopes?"""
    comparisons = []
    for rule in _small_rows(results, 0.1):
        plain = rule.removesuffix(" batch")
        if plain in PAPERS:
            continue
        comparisons += [
            Comparison(f"{row_name(rule)} − {row_name(other)}", (rule, 0.1), (other, 0.1))
            for other in ("soft_or", "soft_or batch", "q3", "q3 batch")
        ]
    return verdicts(results, comparisons) if comparisons else NOT_RUN


def _small_rows(results: Results, retention: float) -> list[str]:
    rows = (row for name in TASKS if name in results for row in results[name]["rows"])
    return list(dict.fromkeys(row["name"] for row in rows if row["retention"] == retention))


def runs(results: Results) -> str:
    """What was run, where, and how long it took."""
    lines = []
    grids = dict(TASKS)
    for folder, what in ((TEACHER, "teacher's entropy"), (RATES, "a higher rate")):
        grids |= {f"{folder}/{name}": f"{title}, {what}" for name, title in TASKS.items()}
    for name, title in grids.items():
        if name not in results:
            lines.append([title, NOT_RUN, *[""] * 7])
            continue
        result = results[name]
        hardware, versions = result["hardware"], result["versions"]
        made = result.get("runs") or [result]  # older results know of their last run alone
        seconds = [row["seconds"] for row in result["rows"] if row["seconds"]]
        lines.append(
            [
                title,
                f"{len(result['rows'])}",
                ", ".join(map(str, result["seeds"])),
                ", ".join(f"{rate:g}" for rate in result["learning_rates"]),
                f"mean@{result['num_samples']} on `{result['test'][0]}`",
                f"{sum(seconds) / len(seconds):.0f} s",
                f"{hardware['cpu']}, {_each(made, 'workers')} × {hardware['threads']} threads",
                f"torch {versions['torch']}, trl {versions['trl']}",
                f"{_each(made, 'commit')}, {_each(made, 'measured')}",
            ]
        )
    header = ["", "rows", "seeds", "rates", "figure", "steps of a run", "machine", "versions", "commit"]
    return markdown_table(header, lines)


def _each(made: Sequence[Mapping[str, Any]], key: str) -> str:
    return " and ".join(dict.fromkeys(str(run.get(key) or "unknown") for run in made))


def rates(results: Results) -> str:
    """The rate that validation chose for each row, how far the others were behind, and what a higher one had given."""
    lines = []
    for name, title in TASKS.items():
        if name not in results:
            continue
        higher = _at_higher_rates(results, name)
        for row in results[name]["rows"]:
            rate, tried = row["learning_rate"], {rate: f"{mean:.3f}" for rate, mean in row["validation"].items()}
            mean_there = higher.get((row["name"], row["retention"]))
            lines.append(
                [
                    *(title, row_name(row["name"]), percent(row["retention"]), "" if rate is None else f"{rate:g}"),
                    ", ".join(f"{offered}: {mean}" for offered, mean in tried.items()),
                    "" if mean_there is None else f"{_higher_rate(results, name)}: {mean_there:.3f}",
                ]
            )
    header = ["task", "rule", "retention", "rate", "accuracy on validation", "at a higher rate"]
    return markdown_table(header, lines) if lines else NOT_RUN


def higher_rates(results: Results) -> str:
    """How many rows would have chosen a higher rate, had it been offered to them."""
    lines = []
    for name, title in TASKS.items():
        higher = _at_higher_rates(results, name)
        if not higher:
            lines.append([title, NOT_RUN, *[""] * 5])
            continue
        rows = {(row["name"], row["retention"]): row for row in results[name]["rows"]}
        # a run that failed at that rate is no better there
        gains = {at: (mean or 0.0) - max(rows[at]["validation"].values()) for at, mean in higher.items()}
        better = {at: gain for at, gain in gains.items() if gain > 0}
        ordered = sorted(gains.values())
        median = (ordered[len(ordered) // 2] + ordered[(len(ordered) - 1) // 2]) / 2
        most = sorted(better.items(), key=lambda row_and_gain: -row_and_gain[1])[:3]
        lines.append(
            [
                *(title, _higher_rate(results, name), f"{len(higher)}", f"{len(better)}"),
                *(signed(median), signed(gains["all", 1.0])),
                "; ".join(f"{row_name(at[0])} {percent(at[1])} {signed(gain)}" for at, gain in most),
            ]
        )
    header = ["task", "tried at", "rows", "better there", "median change", "all tokens", "most of all"]
    return markdown_table(header, lines)


def _at_higher_rates(results: Results, name: str) -> dict[At, float | None]:
    """Row → its accuracy on the validation problems at the rate of the `RATES` grid, None where the run failed."""
    higher = results.get(f"{RATES}/{name}")
    if higher is None or name not in results:
        return {}
    task = higher["test"][0]
    return {(row["name"], row["retention"]): row["tasks"].get(task, {}).get("mean") for row in higher["rows"]}


def _higher_rate(results: Results, name: str) -> str:
    return ", ".join(f"{rate:g}" for rate in results[f"{RATES}/{name}"]["learning_rates"])


def probe(results: Results) -> str:
    """How far each rule's gradient is that of all tokens, from what `tipdistill probe` wrote."""
    rows = json.loads(PROBE.read_text(encoding="utf-8"))["rows"]
    cosine = {(row["rule"], row["retention"]): row["cosine"] for row in rows if row["rule"] != "all"}
    retentions = sorted({retention for _, retention in cosine}, reverse=True)
    return markdown_table(
        ["", *map(percent, retentions)],
        [
            [row_name(rule), *(f"{cosine[rule, retention]:.2f}" for retention in retentions)]
            for rule in dict.fromkeys(rule for rule, _ in cosine)
        ],
    )


def teachers_entropy(results: Results) -> str:
    """Claim 7: how much entropy the teacher has, how it ranks with the divergence, and what selecting by it does."""
    tokens = json.loads(BEFORE.read_text(encoding="utf-8"))["tasks"] if BEFORE.exists() else {}
    amounts, verdicts, ranks = [], [], []
    for name in TASKS:
        if name not in tokens:
            verdicts.append(NOT_RUN)
            amounts.append("")
            ranks.append(NOT_RUN)
            continue
        of_teacher, of_student = (tokens[name][f"{whose}_entropy_norm"] for whose in ("teacher", "student"))
        rank = tokens[name]["rank_correlation_with_reverse_kl"]
        low, high = of_teacher["interval"]
        verdicts.append(verdict(low, high, "below", ALMOST_NONE))
        amounts.append(f"{with_interval(of_teacher)} (student's {of_student['mean']:.3f})")
        ranks.append(f"{rank['teacher_entropy']:.2f} (student's {rank['student_entropy']:.2f})".replace("-", "−"))
    return verdict_table(
        [
            verdict_row(f"Its normalised mean is below {ALMOST_NONE}", verdicts, amounts),
            ["Its rank correlation with the divergence", "", *ranks],
            *(verdict_row(claim.claim, *judged(results, claim)) for claim in TEACHERS_ENTROPY),
        ]
    )


def tokens_before(results: Results) -> str:
    """What the tokens are like before distillation."""
    if not BEFORE.exists():
        return NOT_RUN
    by_task = json.loads(BEFORE.read_text(encoding="utf-8"))["tasks"]
    lines = []
    for name, title in TASKS.items():
        if name not in by_task:
            continue
        tokens, rank = by_task[name], by_task[name]["rank_correlation_with_reverse_kl"]
        quadrants = [
            f"{100 * share['token_share']:.1f} ({100 * share['divergence_share']:.1f})"
            for share in (tokens["quadrants"][f"q{number}"] for number in (1, 2, 3, 4))
        ]
        figures = [tokens[key] for key in ("reverse_kl", "student_entropy_norm", "teacher_entropy_norm")]
        ranks = [f"{rank[key]:.2f}".replace("-", "−") for key in ("student_entropy", "teacher_entropy")]
        accuracy = tokens["teacher_accuracy"]
        solved = with_error(accuracy["mean_at_k"], accuracy["standard_error"])
        lines.append([title, solved, *quadrants, *map(with_interval, figures), *ranks])
    header = [
        *("task", "teacher's accuracy", "Q1", "Q2", "Q3", "Q4", "divergence, nats"),
        *("student's entropy", "teacher's entropy", "rank with divergence: student's", "teacher's"),
    ]
    return markdown_table(header, lines)


def memory(results: Results) -> str:
    """Claim 6: peak memory of the engine's benchmarks, as a change against all tokens; a whole step is end to end."""
    head, step = (json.loads(path.read_text(encoding="utf-8"))["variants"] for path in (HEAD, STEP))
    lines = []
    for share in (0.5, 0.2, 0.1):
        stage = head[f"chunked soft_or {share}"]["extra_bytes"]
        end_to_end = step[f"tip soft_or {share}"]["peak_bytes"]
        fall = 1 - end_to_end / step["tip all"]["peak_bytes"]
        falls = [
            fall,
            1 - stage / head["chunked"]["extra_bytes"],
            1 - end_to_end / step["plain"]["peak_bytes"],
            1 - stage / head["plain"]["extra_bytes"],
        ]
        answer = "holds" if fall > A_FALL else "does not hold"
        lines.append([f"Soft-OR at {percent(share)}", answer, *(percent(-part) for part in falls)])
    header = ["", "peak memory falls", "a whole step", "the head's stage"]
    return markdown_table([*header, "step, against plain", "stage, against plain"], lines)


def first_steps(results: Results) -> str:
    """What the first step of each drift run kept."""
    lines = []
    for task, runs_of_task in json.loads(DRIFT.read_text(encoding="utf-8")).items():
        for name, run in runs_of_task.items():
            first = run["first_step"]
            figures = [
                f"{first['gradient_norm']:.2f}",
                f"{first['kept']}",
                f"{first['student_probability']:.4f}",
                f"{first['reverse_kl']:.3f}",
                f"{run['accuracy']:.2f}",
            ]
            lines.append([TASKS.get(task, "addition"), _drift_name(name), *figures])
    header = ["task", "rule", "gradient norm", "kept of the recorded", "their median p_S"]
    return markdown_table([*header, "their median divergence, nats", "accuracy at the end"], lines)


def _drift_name(name: str) -> str:
    rule, _, rest = name.partition("-batch-")
    share, _, guarded = rest.partition("-guard-")
    return f"{row_name(rule)}, {share} %" + (f", raised to {guarded} % by the drift guard" if guarded else "")


def screening(results: Results) -> str:
    """The candidates for small budgets, on validation problems."""
    if not SCREENING.exists():
        return NOT_RUN
    return markdown(json.loads(SCREENING.read_text(encoding="utf-8"))).strip()


def whole(name: str) -> Callable[[Results], str]:
    """The whole table of a grid."""
    return lambda results: markdown(results[name]).strip() if name in results else NOT_RUN


BLOCKS: dict[str, Callable[[Results], str]] = {
    **OF_LANGUAGE_MODEL,
    **OF_PLANNING,
    "runs": runs,
    "table3": of_the_paper(
        *[("all", 1.0), *(("entropy_sampling", share) for share in (0.5, 0.2, 0.1))],
        *[("random", share) for share in (0.5, 0.2, 0.1)],
    ),
    "table4": of_the_paper(("all", 1.0), ("q3", 0.2), ("q3", 0.1), ("random", 0.2), ("random", 0.1)),
    "table5": of_the_paper(
        ("all", 1.0), ("entropy_sampling", 0.5), ("soft_or", 0.5), ("entropy_sampling", 0.2), ("soft_or", 0.2)
    ),
    "table6": of_the_paper(("all", 1.0), ("soft_or", 0.5), ("complement:soft_or", 0.5), ("random", 0.5)),
    "table8": of_the_paper(("all", 1.0), ("divergence", 0.5), ("divergence", 0.1), ("q3", 0.1), ("random", 0.1)),
    "claims": partial(verdicts, comparisons=CLAIMS),
    "controls": partial(verdicts, comparisons=CONTROLS),
    "in-short": in_short,
    "of-the-gain-in-short": partial(of_the_gain, rows=IN_SHORT),
    "teachers-entropy": teachers_entropy,
    "memory": memory,
    "before": tokens_before,
    "first-steps": first_steps,
    "small-budgets": small_budgets,
    "of-the-gain": of_the_gain,
    "guard": guard,
    "ours": ours,
    "rates": rates,
    "higher-rates": higher_rates,
    "probe": probe,
    "screening": screening,
    **{name: whole(name) for name in TASKS},
    **{f"{TEACHER}-{name}": whole(f"{TEACHER}/{name}") for name in TASKS},
}
