"""The tables and verdicts of docs/replication.md, from the results of `tipdistill sweep`.

    python benchmarks/replicate.py --collect runs/replication    # keeps each sweep's result, then writes the document
    python benchmarks/replicate.py                               # writes the document from what is kept

Whatever stands between `<!-- sweep:NAME -->` and `<!-- /sweep -->` is written here and nowhere else: a verdict is a
function of an interval, and no one's opinion.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tipdistill.sweep.result import compared, counts_of, csv_text, markdown

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "replication"
DOCUMENT = ROOT / "docs" / "replication.md"
PROBE = ROOT / "docs" / "probe-modular.json"
DRIFT = ROOT / "docs" / "drift.json"
SCREENING = RESULTS / "screening" / "candidates.json"
BEFORE = RESULTS / "tokens" / "before.json"
TEACHER = "teacher"  # folder of the grids that select by the teacher's entropy
RATES = "rates"  # folder of the grids that try the rows at a higher rate
PATTERNS = ("*", f"{TEACHER}/*", f"{RATES}/*")
HEAD, STEP = (ROOT / "benchmarks" / "results" / name for name in ("head-cpu.json", "step-tiny.json"))
NOT_RUN = "not run"
# grids, in the order of the tables, and what the document calls their tasks
TASKS = {"planted": "addition", "modular": "modular", "machine": "machine"}
# Accuracies closer than this are called equal, and at most this far below counts as "nearly".
TIE, NEARLY, MUCH = 0.02, 0.05, 0.10
OF_THE_GAIN = 0.95
# A mean normalised entropy below this is "almost none" (the paper's teachers: 0.031), and a fall of the memory below
# this is none.
ALMOST_NONE, A_FALL = 0.05, 0.05
GUARDED = "q3 guarded"  # begins at its retention and does not stay there
PAPERS = (
    *("all", "entropy", "entropy_sampling", "soft_or", "q3", "divergence", "complement:soft_or", "random"),
    "signal_to_curvature",  # Eq. 6, there a weight and no budget
)
NAMES = {
    "all": "all tokens",
    "entropy_sampling": "entropy, sampled",
    "soft_or": "Soft-OR",
    "soft_or_log": "Soft-OR (log)",
    "q3": "Q3",
    "complement:soft_or": "bottom half",
    "gradient_norm": "gradient norm",
    "gradient_norm_sampling": "gradient norm, sampled",
    GUARDED: "Q3, raised by the drift guard",
    "signal_to_curvature": "signal to curvature",
}
_BLOCK = re.compile(r"(<!-- sweep:([\w-]+) -->\n).*?(<!-- /sweep -->)", re.S)

Results = Mapping[str, Mapping[str, Any]]
At = tuple[str, float]  # the name of a row, and its retention


@dataclass(frozen=True)
class Comparison:
    """A claim as a difference of two rows.

    Attributes:
        claim: which of the paper's, and what it says of these two rows.
        first, second: rows.
        kind: "above": first − second > margin; "matches": first − second ≥ −margin;
            "level": |first − second| < margin;
            "below": first < margin.
        margin: see there.
        grids: the folder of the grids that have these rows.
    """

    claim: str
    first: At
    second: At
    kind: str = "above"
    margin: float = 0.0
    grids: str = ""


CLAIMS = (
    Comparison(
        "1. Entropy sampling at 50 % matches or beats all tokens",
        ("entropy_sampling", 0.5),
        ("all", 1.0),
        "matches",
        TIE,
    ),
    Comparison("1. … and drops at 20 %", ("entropy_sampling", 0.5), ("entropy_sampling", 0.2)),
    Comparison("1. … and at 10 %", ("entropy_sampling", 0.5), ("entropy_sampling", 0.1)),
    Comparison("2. Soft-OR beats entropy at 50 %", ("soft_or", 0.5), ("entropy_sampling", 0.5)),
    Comparison("2. … and at 20 %", ("soft_or", 0.2), ("entropy_sampling", 0.2)),
    Comparison("3. Q3 at 10 % nearly matches all tokens", ("q3", 0.1), ("all", 1.0), "matches", NEARLY),
    Comparison("3. Q3 at 20 % beats all tokens (there: agentic planning)", ("q3", 0.2), ("all", 1.0)),
    Comparison(
        "4. The top half by Soft-OR is much better than the bottom half",
        ("soft_or", 0.5),
        ("complement:soft_or", 0.5),
        margin=MUCH,
    ),
    Comparison("5. Q3 at 10 % is better than divergence alone at 10 %", ("q3", 0.1), ("divergence", 0.1)),
)
TEACHERS_ENTROPY = tuple(
    Comparison(
        f"The {which} {100 * share:.0f} % by the teacher's entropy do as well as random tokens",
        (f"{which} teacher entropy", share),
        ("random", share),
        "level",
        TIE,
        TEACHER,
    )
    for share in (0.5, 0.1)
    for which in ("highest", "lowest")
)
CONTROLS = (
    Comparison("Soft-OR at 50 % beats random tokens", ("soft_or", 0.5), ("random", 0.5)),
    Comparison("Soft-OR at 20 % beats random tokens", ("soft_or", 0.2), ("random", 0.2)),
    Comparison("Entropy sampling at 10 % beats random tokens", ("entropy_sampling", 0.1), ("random", 0.1)),
    Comparison("Q3 at 10 % beats random tokens", ("q3", 0.1), ("random", 0.1)),
    Comparison("Soft-OR at 10 % beats random tokens", ("soft_or", 0.1), ("random", 0.1)),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Collect results where that is asked for, and write the document; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--collect", type=Path, help="directory whose NAME/sweep.json are kept as the results")
    options = parser.parse_args(argv)
    if options.collect is not None:
        for path in collect(options.collect, RESULTS):
            print(f"kept {path.relative_to(ROOT)}")
    text = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(rendered(text, load(RESULTS)), encoding="utf-8")
    return 0


def collect(source: Path, results: Path) -> list[Path]:
    """Keep every sweep's result, numbers to six digits; returns what was written.

    Args:
        source: a folder with a folder for each sweep; the screening's is found beside it.
        results: where they are kept.
    """
    paths = [path for pattern in PATTERNS for path in sorted(source.glob(f"{pattern}/sweep.json"))]
    found = {results / path.parent.relative_to(source): path for path in paths}
    screened = source.parent / "screening" / "candidates" / "sweep.json"
    if screened.exists():
        found[results / "screening" / "candidates"] = screened
    written = []
    for name, path in found.items():
        result = _rounded(json.loads(path.read_text(encoding="utf-8")))
        name.parent.mkdir(parents=True, exist_ok=True)
        for suffix, text in ((".json", json.dumps(result, indent=1) + "\n"), (".csv", csv_text(result))):
            partial = name.with_name(f".{name.name}{suffix}")
            partial.write_text(text, encoding="utf-8")
            written.append(partial.replace(name.with_suffix(suffix)))
    return written


def load(results: Path) -> dict[str, dict[str, Any]]:
    """Name of a grid, after its folder where it has one → its result, as far as there are any."""
    paths = [path for pattern in PATTERNS for path in sorted(results.glob(f"{pattern}.json"))]
    return {
        path.relative_to(results).with_suffix("").as_posix(): json.loads(path.read_text(encoding="utf-8"))
        for path in paths
    }


def rendered(text: str, results: Results) -> str:
    """The document with every marked block as the results give it.

    Raises:
        ValueError: a marker that names no block.
    """

    def block(match: re.Match[str]) -> str:
        if match[2] not in BLOCKS:
            raise ValueError(f"there is no block {match[2]!r}; there are {', '.join(BLOCKS)}.")
        return f"{match[1]}{BLOCKS[match[2]](results)}\n{match[3]}"

    return _BLOCK.sub(block, text)


# Verdicts.


def verdict(low: float, high: float, kind: str, margin: float) -> str:
    """What the interval of a difference says of a claim.

    Args:
        low, high: the 95 % interval of first − second.
        kind, margin: see `Comparison`.

    Returns:
        "holds", "does not hold" or "undecided". A claim of "above" does not hold where the lead is below a tie for
        certain, although it may not be zero. One of "level" does not hold where the interval excludes zero and reaches
        beyond the margin.
    """
    if kind == "level":
        return "holds" if -margin < low and high < margin else "does not hold" if low > 0 or high < 0 else "undecided"
    if kind == "below":
        return "holds" if high < margin else "does not hold" if low >= margin else "undecided"
    if kind == "matches":
        return "holds" if low >= -margin else "does not hold" if high < -margin else "undecided"
    assert kind == "above", kind
    return "holds" if low > margin else "does not hold" if high < max(margin, TIE) else "undecided"


def overall(verdicts: Sequence[str]) -> str:
    """One verdict of several tasks: theirs where they agree, else how many of them say what."""
    said = [one for one in verdicts if one != NOT_RUN]
    if not said:
        return NOT_RUN
    if len(set(said)) == 1 and len(said) == len(verdicts):
        return f"**{said[0]}**"
    return ", ".join(f"{one}: {said.count(one)}" for one in ("holds", "does not hold", "undecided") if one in said)


def row_of(result: Mapping[str, Any], at: At) -> Mapping[str, Any] | None:
    """The row of that name and retention, None where there is none or all its cells failed."""
    for row in result["rows"]:
        if (row["name"], row["retention"]) == at and row["tasks"]:
            return row
    return None


def figure_of(result: Mapping[str, Any], at: At) -> Mapping[str, Any] | None:
    """Its figures on the first test task."""
    row = row_of(result, at)
    return None if row is None else row["tasks"].get(result["test"][0])


def difference(result: Mapping[str, Any], first: At, second: At) -> dict[str, Any] | None:
    """The paired difference of two rows with its interval, None where one is missing."""
    figures = [figure_of(result, at) for at in (first, second)]
    if any(figure is None for figure in figures):
        return None
    one, other = (counts_of(figure) for figure in figures if figure is not None)
    return compared(one, other, result["num_samples"]) if set(one) & set(other) else None


def verdicts(results: Results, comparisons: Sequence[Comparison]) -> str:
    """A table of comparisons: per task the verdict, the difference and its interval."""
    lines = []
    for one in comparisons:
        cells, said = [], []
        for name in TASKS:
            grid = f"{one.grids}/{name}".lstrip("/")
            found = difference(results[grid], one.first, one.second) if grid in results else None
            if found is None:
                said.append(NOT_RUN)
                cells.append(NOT_RUN)
                continue
            said.append(verdict(*found["interval"], one.kind, one.margin))
            cells.append(f"{said[-1]}: {_signed(found)}")
        lines.append([one.claim, *cells, overall(said)])
    return _table(["claim", *TASKS.values(), "in all"], lines)


# Tables.


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
            accuracy = [title, _interval(start) if start else ""]
            delta = ["− all tokens", ""]
            for at in columns:
                figure = figure_of(result, at)
                accuracy.append(_interval(figure) if figure else "")
                found = None if at[0] == "all" else difference(result, at, ("all", 1.0))
                delta.append(_signed(found) if found else "")
            lines += [accuracy, delta]
        return _table(["", "before", *(f"{_name(name)} {_percent(retention)}" for name, retention in columns)], lines)

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
                gained = f"; {_percent(share['mean'])} {_brackets(share, _percent)} of the gain" if share else ""
                cells.append(f"{_interval(figure)}{gained}" if figure else "")
            lines.append([_name(rule), *cells])
        parts.append(f"**{title}**\n\n" + _table(["", *map(_percent, retentions)], lines))
    return "\n\n".join(parts)


def of_the_gain(results: Results) -> str:
    """Does a row at 20 % and less keep 95 % of the gain?"""
    rows = [
        (row["name"], row["retention"])
        for name in TASKS
        if name in results
        for row in results[name]["rows"]
        if row["retention"] <= 0.2 and row["name"] != GUARDED
    ]
    lines = []
    for at in sorted(dict.fromkeys(rows), key=lambda at: at[1]):  # stable: the grids' order inside a retention
        cells, said = [], []
        for name in TASKS:
            figure = figure_of(results[name], at) if name in results else None
            share = figure["gain_share"] if figure else None
            if share is None:
                said.append(NOT_RUN)
                cells.append(NOT_RUN if figure is None else "no share: all tokens do not gain for certain")
                continue
            low, high = share["interval"]
            said.append("holds" if low >= OF_THE_GAIN else "does not hold" if high < OF_THE_GAIN else "undecided")
            cells.append(f"{said[-1]}: {_percent(share['mean'])} {_brackets(share, _percent)}")
        lines.append([f"{_name(at[0])}, {_percent(at[1])}", *cells, overall(said)])
    return _table(["", *TASKS.values(), "in all"], lines) if lines else NOT_RUN


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
                lines.append(
                    [title, f"{_name(at[0])}, {_percent(at[1])}", _interval(figure), f"{row['trained_tokens']:,.0f}"]
                )
    return _table(["task", "", "accuracy", "tokens trained on"], lines) if lines else NOT_RUN


def ours(results: Results) -> str:
    """Does a rule that is not the paper's beat Soft-OR and Q3 at 10 %, each in both scopes?"""
    comparisons = []
    for rule in _small_rows(results, 0.1):
        plain = rule.removesuffix(" batch")
        if plain in PAPERS:
            continue
        comparisons += [
            Comparison(f"{_name(rule)} − {_name(other)}", (rule, 0.1), (other, 0.1))
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
    return _table(header, lines)


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
            found = higher.get((row["name"], row["retention"]))
            lines.append(
                [
                    *(title, _name(row["name"]), _percent(row["retention"]), "" if rate is None else f"{rate:g}"),
                    ", ".join(f"{one}: {mean}" for one, mean in tried.items()),
                    "" if found is None else f"{_higher_rate(results, name)}: {found:.3f}",
                ]
            )
    header = ["task", "rule", "retention", "rate", "accuracy on validation", "at a higher rate"]
    return _table(header, lines) if lines else NOT_RUN


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
        most = sorted(better.items(), key=lambda found: -found[1])[:3]
        lines.append(
            [
                *(title, _higher_rate(results, name), f"{len(higher)}", f"{len(better)}"),
                *(_plus(median), _plus(gains["all", 1.0])),
                "; ".join(f"{_name(at[0])} {_percent(at[1])} {_plus(gain)}" for at, gain in most),
            ]
        )
    header = ["task", "tried at", "rows", "better there", "median change", "all tokens", "most of all"]
    return _table(header, lines)


def _at_higher_rates(results: Results, name: str) -> dict[At, float | None]:
    """Row → its accuracy on the validation problems at the rate of the `RATES` grid, None where the run failed."""
    found = results.get(f"{RATES}/{name}")
    if found is None or name not in results:
        return {}
    return {
        (row["name"], row["retention"]): row["tasks"].get(found["test"][0], {}).get("mean") for row in found["rows"]
    }


def _higher_rate(results: Results, name: str) -> str:
    return ", ".join(f"{rate:g}" for rate in results[f"{RATES}/{name}"]["learning_rates"])


def probe(results: Results) -> str:
    """How far each rule's gradient is that of all tokens, from what `tipdistill probe` wrote."""
    rows = json.loads(PROBE.read_text(encoding="utf-8"))["rows"]
    cosine = {(row["rule"], row["retention"]): row["cosine"] for row in rows if row["rule"] != "all"}
    retentions = sorted({retention for _, retention in cosine}, reverse=True)
    return _table(
        ["", *map(_percent, retentions)],
        [
            [_name(rule), *(f"{cosine[rule, retention]:.2f}" for retention in retentions)]
            for rule in dict.fromkeys(rule for rule, _ in cosine)
        ],
    )


def teachers_entropy(results: Results) -> str:
    """Claim 7: how much entropy the teacher has, how it ranks with the divergence, and what selecting by it does."""
    before = json.loads(BEFORE.read_text(encoding="utf-8"))["tasks"] if BEFORE.exists() else {}
    amounts, said, ranks = [], [], []
    for name in TASKS:
        if name not in before:
            for cells in (amounts, said, ranks):
                cells.append(NOT_RUN)
            continue
        of_teacher, of_student = (before[name][f"{whose}_entropy_norm"] for whose in ("teacher", "student"))
        rank = before[name]["rank_correlation_with_reverse_kl"]
        said.append(verdict(*of_teacher["interval"], "below", ALMOST_NONE))
        amounts.append(f"{said[-1]}: {_interval(of_teacher)} (student's {of_student['mean']:.3f})")
        ranks.append(f"{rank['teacher_entropy']:.2f} (student's {rank['student_entropy']:.2f})".replace("-", "−"))
    header, rule, *lines = verdicts(results, TEACHERS_ENTROPY).splitlines()
    amount = [f"Its normalised mean is below {ALMOST_NONE}", *amounts, overall(said)]
    told = ["Its rank correlation with the divergence", *ranks, ""]
    return "\n".join([header, rule, *_table(amount, [told]).splitlines()[::2], *lines])


def tokens_before(results: Results) -> str:
    """What the tokens are like before distillation."""
    if not BEFORE.exists():
        return NOT_RUN
    found = json.loads(BEFORE.read_text(encoding="utf-8"))["tasks"]
    lines = []
    for name, title in TASKS.items():
        if name not in found:
            continue
        one, rank = found[name], found[name]["rank_correlation_with_reverse_kl"]
        quadrants = [
            f"{100 * share['token_share']:.1f} ({100 * share['divergence_share']:.1f})"
            for share in (one["quadrants"][f"q{number}"] for number in (1, 2, 3, 4))
        ]
        figures = [one[key] for key in ("reverse_kl", "student_entropy_norm", "teacher_entropy_norm")]
        ranks = [f"{rank[key]:.2f}".replace("-", "−") for key in ("student_entropy", "teacher_entropy")]
        accuracy = one["teacher_accuracy"]
        solved = f"{accuracy['mean_at_k']:.3f} ± {accuracy['standard_error']:.3f}"
        lines.append([title, solved, *quadrants, *map(_interval, figures), *ranks])
    header = [
        "task",
        "teacher's accuracy",
        "Q1",
        "Q2",
        "Q3",
        "Q4",
        "divergence, nats",
        "student's entropy",
        "teacher's entropy",
    ]
    return _table([*header, "rank with divergence: student's", "teacher's"], lines)


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
        said = "holds" if fall > A_FALL else "does not hold"
        lines.append([f"Soft-OR at {_percent(share)}", said, *(_percent(-one) for one in falls)])
    header = [
        "",
        "peak memory falls",
        "a whole step",
        "the head's stage",
        "step, against plain",
        "stage, against plain",
    ]
    return _table(header, lines)


def first_steps(results: Results) -> str:
    """What the first step of each drift run kept."""
    found = json.loads(DRIFT.read_text(encoding="utf-8"))
    lines = []
    for task, runs_of_task in found.items():
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
    header = [
        "task",
        "rule",
        "gradient norm",
        "kept of the recorded",
        "their median p_S",
        "their median divergence, nats",
    ]
    return _table([*header, "accuracy at the end"], lines)


def _drift_name(name: str) -> str:
    rule, _, rest = name.partition("-batch-")
    share, _, guarded = rest.partition("-guard-")
    return f"{_name(rule)}, {share} %" + (f", raised to {guarded} % by the drift guard" if guarded else "")


def screening(results: Results) -> str:
    """The candidates for small budgets, on validation problems."""
    if not SCREENING.exists():
        return NOT_RUN
    return markdown(json.loads(SCREENING.read_text(encoding="utf-8"))).strip()


def whole(name: str) -> Callable[[Results], str]:
    """The whole table of a grid."""
    return lambda results: markdown(results[name]).strip() if name in results else NOT_RUN


BLOCKS: dict[str, Callable[[Results], str]] = {
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
    "claims": lambda results: verdicts(results, CLAIMS),
    "controls": lambda results: verdicts(results, CONTROLS),
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


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *lines])


def _name(name: str) -> str:
    plain = name.removesuffix(" batch")
    return NAMES.get(plain, plain.replace("_", " ")) + (", over the batch" if plain != name else "")


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %".replace("-", "−")


def _brackets(found: Mapping[str, Any], text: Callable[[float], str]) -> str:
    return f"[{', '.join(text(value) for value in found['interval'])}]"


def _interval(found: Mapping[str, Any]) -> str:
    return f"{found['mean']:.3f} {_brackets(found, '{:.3f}'.format)}"


def _signed(found: Mapping[str, Any]) -> str:
    return f"{found['mean']:+.3f} {_brackets(found, '{:+.3f}'.format)}".replace("-", "−")


def _plus(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(inside) for key, inside in value.items()}
    if isinstance(value, list):
        return [_rounded(inside) for inside in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


if __name__ == "__main__":
    raise SystemExit(main())
