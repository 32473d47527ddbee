"""Markdown tables from the results, between marks in the documents, so that no number is typed by hand.

<!-- bench:head-cpu -->
(the table)
<!-- /bench -->
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from tipdistill.files import write_text
from tipdistill.sweep.result import is_divergence
from tipdistill.text import check_known, markdown_table, replace_blocks

from . import measure, targets
from .head import shown
from .replication.results import LANGUAGE_MODEL

NOT_MEASURED = "not measured"
DOCUMENTS = (
    *("docs/engine.md", "docs/probe.md", "docs/report.md", "docs/rules.md", "docs/scaling.md"),
    *("docs/smollm2.md", "docs/trip.md", "docs/vllm.md"),
    *("benchmarks/results/engine.md", "benchmarks/results/plan.md"),
)
WHOLE = ".whole"  # behind a result's name: every column of it


def update(document: Path, results: Path) -> bool:
    """Rewrite every marked table of a document; whether anything changed.

    Args:
        document: a Markdown file.
        results: the folder of the JSON files.

    Raises:
        ValueError: a mark names no table; the nearest is given.
    """
    before = document.read_text(encoding="utf-8")
    after = rendered(before, results, document.parent)
    if after != before:
        write_text(document, after)
    return after != before


def rendered(text: str, results: Path, folder: Path) -> str:
    """The text of a document with its tables as the results give them.

    Args:
        text: Markdown.
        results: the folder of the JSON files.
        folder: that of the document, from which links start.

    Example:
        >>> print(rendered("<!-- bench:select-cpu -->\\n<!-- /bench -->", Path("no/such/folder"), Path()))
        <!-- bench:select-cpu -->
        not measured
        <!-- /bench -->
    """
    return replace_blocks(text, "bench", partial(table, results=results, folder=folder))


def table(name: str, results: Path, folder: Path) -> str:
    """One table by name, "not measured" where there is no result.

    Args:
        name: a key of TABLES, that is the name of the result's file, and `WHOLE` behind it for every column; or of
            OF_GPUS, a table for each gpu-CARD.json.
        results, folder: as in `rendered`.

    Raises:
        ValueError: an unknown name; the nearest is given.
    """
    check_known("table", name, {**TABLES, **OF_GPUS})
    if name in OF_GPUS:
        paths, render = sorted(results.glob("gpu-*.json")), OF_GPUS[name]
    else:
        paths, render = [results / f"{FILES.get(name, name.removesuffix(WHOLE))}.json"], TABLES[name]
    parts = []
    for path in paths:
        if path.is_file():
            result = json.loads(path.read_text(encoding="utf-8"))
            parts.append(render(result) + "\n\n" + _footnote(result, path.name, os.path.relpath(path, folder)))
    return "\n\n".join(parts) or (render({}) if render is _gpu_lines else NOT_MEASURED)


def _footnote(result: dict[str, Any], name: str, link: str) -> str:
    hardware, versions = result["hardware"], result["versions"]
    machine = hardware["gpu"] or f"{hardware['cpu']} ({hardware['cpu_capability']}), {hardware['threads']} thread(s)"
    packages = ", ".join(f"{package} {versions[package]}" for package in ("torch", "trl") if package in versions)
    commit = f", commit {result['commit']}" if result["commit"] else ""
    return f"*{machine}; {packages}{commit}, {result['measured']}; [{name}]({link})*"


_LABELS = {
    "plain": "plain PyTorch, all tokens",
    "trl": "TRL, all tokens",
    "liger": "Liger, all tokens",
}


def _label(entry: dict[str, Any]) -> str:
    if entry["engine"] in _LABELS:
        return _LABELS[entry["engine"]]
    rule = {"all": "all tokens", "soft_or": "Soft-OR"}.get(entry["rule"], entry["rule"])
    label = f"`{entry['engine']}`, {rule}" + ("" if entry["rule"] == "all" else f" {entry['retention']:g}")
    label += ", one pass" if entry.get("one_pass") else ""
    return label + "".join(f", {attribute} = {shown(value)}" for attribute, value in entry.get("switches", ()))


def _head(result: dict[str, Any]) -> str:
    """What a reader asks first: time and memory, beside plain PyTorch and TRL."""
    rows = []
    for entry in result["variants"].values():
        if "seconds" not in entry:
            rows.append([_label(entry), f"refused: {entry['refused']}", *[""] * 4])
            continue
        rows.append([_label(entry), *_times(entry), f"{entry['extra_bytes'] / 2**20:.0f}", _memory_ratio(entry)])
    return markdown_table(["", "seconds", "time / plain", "time / TRL", "memory (MiB)", "memory / plain"], rows)


def _whole_head(result: dict[str, Any]) -> str:
    rows = []
    for entry in result["variants"].values():
        if "seconds" not in entry:
            rows.append([_label(entry), f"refused: {entry['refused']}", *[""] * 6])
            continue
        rows.append(
            [
                _label(entry),
                *_times(entry),
                f"{entry['extra_bytes'] / 2**20:.0f}",
                f"{(entry['extra_bytes'] - entry['gradient_bytes']) / 2**20:.0f}",
                _memory_ratio(entry),
                f"{entry['over_floor']['median']:.2f}",
            ]
        )
    memories = ["memory (MiB)", "without the gradients (MiB)", "memory / plain"]
    return markdown_table(["", "seconds", "time / plain", "time / TRL", *memories, "time / floor"], rows)


def _times(entry: dict[str, Any]) -> list[str]:
    ratio = entry.get("ratio", {})
    ratios = [f"{ratio[peer]['median']:.2f}" if peer in ratio else "" for peer in ("plain", "trl")]
    return [f"{entry['seconds']['median']:.3g}", *ratios]


def _memory_ratio(entry: dict[str, Any]) -> str:
    ratio = entry.get("memory_ratio", {})
    return f"{ratio['plain']:.2f}" if "plain" in ratio else ""


def _scaling(result: dict[str, Any]) -> str:
    rows = []
    for point in result["points"]:
        entries = point["variants"]
        rows.append(
            [
                f"{'N' if point['axis'] == 'tokens' else 'V'} = {point['size']}",
                *(
                    cell
                    for entry in entries.values()
                    for cell in (
                        f"{entry['processor_seconds']['median']:.3g}",
                        f"{(entry['extra_bytes'] - entry['gradient_bytes']) / 2**20:.0f}",
                    )
                ),
            ]
        )
    names = [_label(entry) for entry in result["points"][0]["variants"].values()]
    return markdown_table(
        ["", *(cell for name in names for cell in (f"{name}: processor s", "MiB without the gradients"))], rows
    )


def _kernels(result: dict[str, Any]) -> str:
    rows = [
        [
            f"`{entry['kernel'].strip('_')}`, {entry['role']}",
            f"{entry['columns']} / {entry['warps']}",
            str(entry["registers"]),
            f"{entry['instructions_of_an_element']:.0f}",
            str(entry["barriers_of_a_block"]),
        ]
        for entry in result["kernels"]
        if entry["capability"] == 90 and entry["role"] != "one column"
    ]
    return markdown_table(["", "columns / warps", "registers", "instructions an element", "barriers a block"], rows)


def _select(result: dict[str, Any]) -> str:
    sizes = result["settings"]["sizes"]
    rows = [
        [
            f"`{rule}`",
            *(f"{entry['seconds_per_million'][str(size)]:.3f}" for size in sizes),
            "" if entry["growth"] is None else f"{entry['growth']:.2f}",
        ]
        for rule, entry in result["rules"].items()
    ]
    return markdown_table(
        ["seconds per million tokens", *(f"N = {size:,}" for size in sizes), "grows as N to the"], rows
    )


def _step(result: dict[str, Any]) -> str:
    rows = []
    above = any("above_bytes" in entry for entry in result["variants"].values())
    for name, entry in result["variants"].items():
        if "refused" in entry:
            rows.append([name, f"refused: {entry['refused']}", *[""] * 9])
            continue
        if "split" not in entry:
            continue  # of a run that was stopped
        split = entry["split"]
        rows.append(
            [
                name,
                f"{entry['step_seconds']['median']:.3g}",
                f"{entry['training_seconds']['median']:.3g}",
                f"{entry['ratio']['trl']['median']:.2f}" if "trl" in entry.get("ratio", {}) else "",
                *(f"{split[part]:.3g}" if part in split else "" for part in ("score", "loss", "optimizer")),
                f"{entry['peak_bytes'] / 2**20:.0f}",
                f"{entry['above_bytes'] / 2**20:.0f}" if "above_bytes" in entry else "",
                f"{entry['above_ratio']['plain']:.2f}" if "plain" in entry.get("above_ratio", {}) else "",
                f"{entry['stored_bytes'] / 2**20:.0f}" if "stored_bytes" in entry else "",
            ]
        )
    header = ["", "step (s)", "without rollout (s)", "without rollout / TRL", "score", "forward, loss, backward"]
    header += ["optimizer", "peak memory (MiB)", "of it above (MiB)", "above / plain", "stored for backward (MiB)"]
    stored = any("stored_bytes" in entry for entry in result["variants"].values())
    width = len(header) - (not stored) - 2 * (not above)  # an older result does not say what lies above, or is stored
    return markdown_table(header[:width], [row[:width] for row in rows])


def _records(result: dict[str, Any]) -> str:
    rows = [
        [
            f"{int(size):,}",
            f"{entry['seconds']['total']:.1f}",
            f"{entry['bytes_per_token']:.0f}",
            f"{entry['report']['seconds']:.1f}",
            f"{entry['report']['processor_seconds']:.1f}",
            f"{entry['report']['peak_memory_gib']:.2f}",
            f"{entry['report']['page_bytes'] / 1e6:.1f}",
        ]
        for size, entry in result["sizes"].items()
    ]
    header = ["tokens", "written in (s)", "bytes per token", "report (s)", "its processor time (s)", "its memory (GiB)"]
    return markdown_table([*header, "the page (MB)"], rows)


def _plan(result: dict[str, Any]) -> str:
    rows = [
        [
            name,
            f"{entry['predicted'] / 2**20:.0f}",
            entry["phase"],
            f"{entry['measured'] / 2**20:.0f}",
            f"{entry['ratio']:.2f}",
        ]
        for name, entry in result["cases"].items()
    ]
    return markdown_table(["", "expected (MiB)", "in the phase", "measured (MiB)", "expected / measured"], rows)


_OF_PROBE = {
    "descent": "descent",
    "cosine": "cosine",
    "divergence_share": "share of the divergence",
    "q3_share": "share of Q3",
    "kept": "tokens kept",
}


def _order(result: dict[str, Any]) -> str:
    rows = [
        [
            label,
            f"{_hundredths(figure['mean'])} [{', '.join(map(_hundredths, figure['interval']))}]",
            " ".join(map(_hundredths, figure["per_probe"])),
        ]
        for name, label in {**_OF_PROBE, "q2_of_kept": "share of Q2 in what is kept"}.items()
        for figure in (result["correlation"][name],)
    ]
    return markdown_table(["figure of the probe", "rank correlation", "each probe"], rows)


def _hundredths(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


def _agreement(result: dict[str, Any]) -> str:
    by_prompts = {count: agreement["spearman_with_trained_accuracy"] for count, agreement in result["prompts"].items()}
    rows = [
        [
            label,
            *(
                cell
                for correlation in by_prompts.values()
                for cell in (
                    f"{correlation[name]['of_the_mean_over_probes']:.2f}",
                    " ".join(f"{value:.2f}" for value in correlation[name]["per_probe"]),
                )
            ),
        ]
        for name, label in _OF_PROBE.items()
    ]
    header = [cell for count in by_prompts for cell in (f"{count} prompts", "each")]
    return markdown_table(["figure of the probe", *header], rows)


def _cpu_targets(result: dict[str, Any]) -> str:
    """The lines of a CPU beside what the head stage took."""
    rows = []
    for rule, how in product(targets.RULES, ("", ", one pass")):
        name = targets.variant_of("chunked", rule) + how
        if how and name not in result["variants"]:
            continue
        ratio = result["variants"].get(name, {}).get("ratio", {})
        measured = [f"{ratio[peer]['median']:.2f}" if peer in ratio else NOT_MEASURED for peer in targets.ON_CPU]
        most = [f"{lines[rule]:.2f}" for lines in targets.ON_CPU.values()]
        rows.append([targets.label(rule) + how, *(cell for pair in zip(most, measured, strict=True) for cell in pair)])
    return markdown_table(["", "time / plain, at most", "measured", "time / TRL, at most", "measured"], rows)


def _gpu_lines(result: dict[str, Any]) -> str:
    """The lines of a GPU beside what was measured; of no result, the lines."""
    words = {True: "holds", False: "does not hold", None: ""}
    rows = [
        [
            line["line"],
            f"{line['at_most']:g}",
            NOT_MEASURED if line["measured"] is None else f"{line['measured']:.3g}",
            words[line["holds"]],
        ]
        for line in result.get("lines") or targets.lines({})
    ]
    return markdown_table(["", "at most", "measured", ""], rows)


def _stage(name: str, render: Callable[[dict[str, Any]], str], result: dict[str, Any]) -> str:
    """A table of one stage, or why there is none; what was stopped says so."""
    entry = result["stages"].get(name, {"state": "skipped", "reason": "it was not asked for"})
    inside = entry.get("result", {})
    if "left_out" in inside and not (inside.get("variants") or inside.get("cases")):
        return f"{NOT_MEASURED}: {inside['left_out']}"
    if not inside:
        return f"{NOT_MEASURED}: {entry.get('reason', entry['state'])}"
    stopped = "" if entry["state"] == "done" else f"\n\nStopped before its end: {entry['reason']}."
    return render(inside) + stopped


_SENT = {
    "top_20": "its 20 likeliest tokens, as JSON",
    "whole_vocabulary": "its whole vocabulary, as JSON",
    "hidden_states_float32": "hidden states of a server in float32",
    "hidden_states_bfloat16": "hidden states of a server in bfloat16",
}


def _wire(result: dict[str, Any]) -> str:
    rows = [[name, f"{result['answers'][form]['bytes_per_token']:,.0f}"] for form, name in _SENT.items()]
    return markdown_table(["what the teacher sends", "bytes per token"], rows)


def _running(result: dict[str, Any]) -> str:
    """A row for each way to normalise; the last column is paired with "batch" by seed."""
    (task,) = result["test"]
    by_seed = {row["name"]: row["tasks"][task]["by_seed"] for row in result["rows"]}
    rows = []
    for row in result["rows"]:
        outcome = row["tasks"][task]
        rule, _, normalization = row["name"].partition(", ")
        paired = ""
        if normalization == "running":
            paired = _paired(outcome["by_seed"], by_seed[f"{rule}, batch"])
        rows.append(
            [
                f"`{row['rule']}`",
                f"{row['retention']:.0%}".replace("%", " %"),
                f"`{normalization}`" if normalization else "",
                _outcome(outcome),
                paired,
            ]
        )
    return markdown_table(["rule", "kept", "`normalization`", _measure(result), "against `batch`"], rows)


def _ahead(result: dict[str, Any]) -> str:
    """A row for each rule with its rollouts of now and of the step before; the last column is paired by seed."""
    (task,) = result["test"]
    by_seed = {row["name"]: row["tasks"][task]["by_seed"] for row in result["rows"]}
    rows = [["the student before", "", "", "", _outcome(result["before"][task]), ""]]
    for row in result["rows"]:
        outcome, (rule, _, written) = row["tasks"][task], row["name"].partition(", ")
        cells = [f"`{row['rule']}`", f"{row['retention']:.0%}".replace("%", " %"), "0" if written == "now" else "1"]
        paired = "" if written == "now" else _paired(outcome["by_seed"], by_seed[f"{rule}, now"])
        rows.append([*cells, f"{row['learning_rate']:g}", _outcome(outcome), paired])
    return markdown_table(["rule", "kept", "`rollout_ahead`", "rate", _measure(result), "against 0"], rows)


def _paired(by_seed: dict[str, float], beside: dict[str, float]) -> str:
    """Mean difference over the seeds of both, with its standard error."""
    differences = [value - beside[seed] for seed, value in by_seed.items() if seed in beside]
    error = stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else 0.0
    return f"{fmean(differences):+.3f} ± {error:.3f}".replace("-", "−")


def _kept(result: dict[str, Any]) -> str:
    """A row for each way and length; the last column is paired by seed with the longest run on random tokens."""
    (task,) = result["test"]
    control = [row for row in result["rows"] if row["rule"] == "random"][-1]
    beside = control["tasks"][task]["by_seed"]
    rows = [["the student before", "", "", "", _outcome(result["before"][task]), "", ""]]
    for row in result["rows"]:
        outcome = row["tasks"][task]
        rows.append(
            [
                f"`{row['rule']}`",
                f"`{row['overrides'].get('backward', 'full')}`",
                str(row["overrides"]["max_steps"]),
                f"{row['learning_rate']:g}",
                _outcome(outcome),
                f"{row['seconds']:.0f}",
                "" if row is control else _paired(outcome["by_seed"], beside),
            ]
        )
    against = f"against random, {control['overrides']['max_steps']} steps"
    return markdown_table(["rule", "`backward`", "steps", "rate", _measure(result), "seconds", against], rows)


def _kept_where(result: dict[str, Any]) -> str:
    """A row for each set of positions, the cosine of its gradient with the full one, and by thirds of the layers."""
    rows = [
        [
            f"`{row['rule']}`",
            f"{row['retention']:.0%}".replace("%", " %"),
            row["differentiated"],
            *(f"{row[name]:.2f}" for name in ("positions", "norm", "cosine", "first", "middle", "last")),
        ]
        for row in result["rows"]
    ]
    header = ["rule", "kept", "differentiated", "of all positions", "norm", "cosine", "first third of the layers"]
    return markdown_table([*header, "middle", "last"], rows)


def _measure(result: dict[str, Any]) -> str:
    """What the outcome of a sweep is called over its column: an accuracy, or a divergence, of which less is better."""
    (task,) = result["test"]
    return "reverse KL, nats" if is_divergence(result["rows"][0]["tasks"][task]) else "accuracy"


def _outcome(outcome: dict[str, Any]) -> str:
    return f"{outcome['mean']:.3f} [{', '.join(f'{bound:.3f}' for bound in outcome['interval'])}]"


def _positions(result: dict[str, Any]) -> str:
    rows = [
        [
            f"`{entry['rule']}`",
            f"{entry['retention']:.0%}".replace("%", " %"),
            entry["scope"],
            *(f"{entry[name]:.2f}" for name in ("without_rollouts", "without_columns_too", "time")),
        ]
        for entry in result["rules"].values()
    ]
    header = ["rule", "kept", "of each", "rollouts with a kept token", "up to the last of them", "time"]
    return markdown_table(header, rows)


def _gpu_head(result: dict[str, Any]) -> str:
    rows = []
    for entry in result["variants"].values():
        if "seconds" not in entry:
            rows.append([_label(entry), f"refused: {entry['refused']}" if "refused" in entry else "", *[""] * 5])
            continue
        ratio, extra = entry.get("ratio", {}), entry["extra_bytes"] - entry["gradient_bytes"]
        rows.append(
            [
                _label(entry),
                f"{1e3 * entry['seconds']['median']:.1f}",
                *(f"{ratio[peer]['median']:.2f}" if peer in ratio else "" for peer in ("plain", "trl")),
                f"{entry['over_floor']['median']:.2f}",
                f"{extra / 2**20:.0f}",
                _memory_ratio(entry),
            ]
        )
    ratios = ["time / plain", "time / TRL", "time / floor"]
    return markdown_table(["", "ms", *ratios, "without the gradients (MiB)", "memory / plain"], rows)


def _errors(result: dict[str, Any]) -> str:
    ways = list(dict.fromkeys(way for case in result["cases"].values() for way in case if way != "refused"))
    rows = [
        [name, *(f"{case[way]['weight']:.1e}" if way in case else case.get("refused", "") for way in ways)]
        for name, case in result["cases"].items()
    ]
    return markdown_table(["error of the weight's gradient", *ways], rows)


def _gpu_memory(result: dict[str, Any]) -> str:
    vocabularies = result["settings"]["vocabularies"]
    rows = []
    for name, case in result["cases"].items():
        peaks = [case["extra_bytes"].get(str(vocabulary)) for vocabulary in vocabularies]
        growth = "" if case["growth"] is None else f"{case['growth']:.2f}"
        rows.append([f"`{name}`", *("" if peak is None else f"{peak / 2**20:.0f}" for peak in peaks), growth])
    header = [f"V = {vocabulary:,} (MiB)" for vocabulary in vocabularies]
    return markdown_table(["", *header, "most / least"], rows)


def _gpu_profile(result: dict[str, Any]) -> str:
    rows = []
    for name, case in result["cases"].items():
        if "refused" in case:
            rows.append([f"`{name}`", f"refused: {case['refused']}", *[""] * 3])
            continue
        longest = ", ".join(f"{kernel['name'][:40]} {kernel['share']:.0%}" for kernel in case["longest"][:3])
        busy = case["busy_seconds"] / case["seconds"]
        milliseconds = [f"{1e3 * case['seconds']:.1f}", f"{busy:.0%}"]
        rows.append([f"`{name}`", *milliseconds, f"{case['split']['matmul']:.0%}", longest.replace("|", "/")])
    return markdown_table(["", "ms", "kernels run", "of it matmuls", "longest"], rows)


def _gpu_micro(result: dict[str, Any]) -> str:
    rows = [
        [name, *([entry["refused"], ""] if "refused" in entry else _rate(entry["flops_per_second"], "Tflop/s"))]
        for name, entry in result["matmul"].items()
    ]
    rows += [[name, *_rate(entry["bytes_per_second"], "TB/s")] for name, entry in result["copy"].items()]
    for case, entry in result["kernels"].items():
        for kernel, its in entry.get("kernels", {}).items():
            rate = ["", ""] if its["bytes_per_second"] is None else _rate(its["bytes_per_second"], "TB/s")
            rows.append([f"`{kernel}`, {case}: {1e3 * its['seconds']:.2f} ms", *rate])
    return markdown_table(["", "rate", ""], rows)


def _rate(value: float, unit: str) -> list[str]:
    return [f"{value / 1e12:.3g}", unit]


def _gpu_switches(result: dict[str, Any]) -> str:
    rows = [
        [name, f"`{rule}`", value, *_switch(entry)]
        for name, case in result["cases"].items()
        for rule, values in case["rules"].items()
        for value, entry in values.items()
    ]
    rows += [[name, reason, *[""] * 4] for name, reason in result["left_out"].items()]
    return markdown_table(["", "", "value", "ms", "/ the first", "memory (MiB)"], rows)


def _switch(entry: dict[str, Any]) -> list[str]:
    if "seconds" not in entry:
        return [f"refused: {entry['refused']}", "", ""]
    over = "" if entry["over_first"] is None else f"{entry['over_first']:.2f}"
    return [f"{1e3 * entry['seconds']:.1f}", over, f"{entry['extra_bytes'] / 2**20:.0f}"]


def _students(result: dict[str, Any]) -> str:
    """Kinds of students down; of each its means, and its quadrants at each pair of thresholds."""
    entries = result["students"]
    borders = [
        f"ĥ ≥ {quadrant['entropy_threshold']:g}, δ ≥ {quadrant['divergence_threshold']:g}"
        for quadrant in next(iter(entries.values()))["quadrants"]
    ]
    rows = [
        [
            name,
            f"{entry['reverse_kl']:.2f}",
            f"{entry['entropy']:.2f}",
            *(" / ".join(f"{100 * share:.0f}" for share in quadrant["shares"]) for quadrant in entry["quadrants"]),
        ]
        for name, entry in entries.items()
    ]
    rows.append(["the paper's three pairs", "", "", "Q1+Q2 40–52, Q3 3–15, Q4 40–47", *[""] * (len(borders) - 1)])
    return markdown_table(["student", "reverse KL", "entropy", *borders], rows)


def _signals(result: dict[str, Any]) -> str:
    """Kinds of tokens and turns down; of each its tokens, means, quadrants, and the share that each rule keeps."""
    groups = result["groups"]
    rules = list(groups["all"]["kept"])
    rows = [
        [
            group,
            f"{entry['share']:.0%}".replace("%", " %"),
            f"{entry['entropy']:.2f}",
            f"{entry['reverse_kl']:.2f}",
            " / ".join(f"{100 * share:.0f}" for share in entry["quadrants"]),
            *(f"{entry['kept'][rule]:.0%}".replace("%", " %") for rule in rules),
        ]
        for group, entry in groups.items()
    ]
    heading = ["", "of the tokens", "entropy", "reverse KL", "Q1 / Q2 / Q3 / Q4, %"]
    table = markdown_table([*heading, *(f"`{rule}` keeps" for rule in rules)], rows)
    if not result["evaluated"]:
        return table
    scores = [
        [
            name,
            f"{entry['mean_at_k']:.3f} ± {entry['standard_error']:.3f}",
            str(entry["problems"]),
            str(entry["num_samples"]),
        ]
        for name, entry in result["evaluated"].items()
    ]
    return table + "\n\n" + markdown_table(["model", "hard score", "problems", "samples of each"], scores)


# Of each benchmarks/results/gpu-CARD.json, as benchmarks/gpu_lease.py writes it.
OF_GPUS: dict[str, Callable[[dict[str, Any]], str]] = {
    "gpu": _gpu_lines,
    "gpu-head": partial(_stage, "head", _gpu_head),
    "gpu-step": partial(_stage, "step", _step),
    "gpu-errors": partial(_stage, "errors", _errors),
    "gpu-memory": partial(_stage, "memory", _gpu_memory),
    "gpu-profile": partial(_stage, "profile", _gpu_profile),
    "gpu-micro": partial(_stage, "micro", _gpu_micro),
    "gpu-switches": partial(_stage, "switches", _gpu_switches),
}
# table → the file, where that has another name
FILES = {
    "targets-cpu": "head-cpu",
    **{f"{kind}-{LANGUAGE_MODEL}": f"replication/{LANGUAGE_MODEL}/{kind}" for kind in ("running", "ahead", "kept")},
}
HEADS = ("head-cpu", "head-qwen3-4k", "head-qwen3-8k", "head-qwen3-16k", "head-qwen3-32k")
TASKS = ("addition", "modular", "machine")
TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    **dict.fromkeys(HEADS, _head),
    **{f"{name}{WHOLE}": _whole_head for name in HEADS},
    "head-scaling": _scaling,
    "errors-interpreted": _errors,
    "kernels-compiled": _kernels,
    "plan-cpu": _plan,
    "probe-agreement": _agreement,
    "probe_order-smollm2": _order,
    "records-cpu": _records,
    "select-cpu": _select,
    "select-cuda": _select,
    "targets-cpu": _cpu_targets,
    "positions-smollm2": _positions,
    **{f"running-{task}": _running for task in (*TASKS, LANGUAGE_MODEL)},
    **{f"ahead-{task}": _ahead for task in (*TASKS, LANGUAGE_MODEL)},
    **{f"kept-{task}": _kept for task in ("modular", LANGUAGE_MODEL)},
    "kept_where-smollm2": _kept_where,
    "wire-smollm2": _wire,
    "signals-trip": _signals,
    "students-smollm2": _students,
    "step-tiny": _step,
    "step-smollm2": _step,
    "step-qwen3-1.7b-0.6b": _step,
    "step-qwen3-8b-4b": _step,
}


def main(argv: list[str] | None = None) -> int:
    """Rewrite the marked tables of documents.

    Raises:
        ValueError: a mark names no table; the nearest is given.
    """
    parser = measure.parser("table", __doc__)
    parser.add_argument("documents", nargs="*", help=f"Markdown files (default {', '.join(DOCUMENTS)})")
    parser.add_argument("--results", type=Path, default=measure.RESULTS, help="folder of the JSON files")
    options = parser.parse_args(argv)
    for document in options.documents or [measure.ROOT / name for name in DOCUMENTS]:
        changed = update(Path(document), options.results)
        print(f"{document}: {'rewritten' if changed else 'as the results have it'}")
    return 0


if __name__ == "__main__":
    measure.end(main)
