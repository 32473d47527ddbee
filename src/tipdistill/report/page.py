"""The report: one HTML file that holds everything it shows and asks nothing of any network."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..documents import read_json
from ..files import replacing
from ..records import TOKENS_FILE, open_records
from .dataset import Dataset, load_dataset
from .figures import draw_figures, draw_training
from .pack import Pack, script_json
from .payload import dataset_payload
from .sources import Sources, find_sources

MAX_TOKENS = 100_000
SCRIPTS = ("core.js", "map.js", "tokens.js", "episodes.js", "charts.js", "sweep.js", "main.js")
# what the paper reports over its pairs (Table 1's quadrants)
PAPER_SHARES = {"q4": (0.40, 0.47), "q1+q2": (0.40, 0.52), "q3": (0.03, 0.15)}


def write_report(
    paths: Sequence[str | Path],
    output: str | Path | None = None,
    *,
    rule: str | None = None,
    retention: float | None = None,
    max_tokens: int = MAX_TOKENS,
    seed: int = 0,
    figures: bool = True,
) -> Path:
    """Write one self-contained HTML page of token records and training histories, and each figure as PNG and SVG.

    Args:
        paths: directories of token records, of runs, of a demo, of a sweep; several are shown beside each other.
        output: the page; None: report.html in the first directory. Figures go into a folder beside it that is called
            after it ("report-figures").
        rule: shown first; None: the recorded one.
        retention: shown first, in (0, 1]; None: the recorded one.
        max_tokens: of the token view, over all records; map, shares and confusions are always of all tokens.
        seed: of the rollouts drawn for the token view, and of the rules that draw.
        figures: write the PNG and SVG files too.

    Returns:
        The page's path; it is written in full or not at all.

    Raises:
        ValueError: nothing to report, records that are empty or cut off, statistics that are not finite, a rule that
            they do not suffice for.
        FileNotFoundError: a path is not there.

    Example:
        >>> write_report(["runs/qwen3"])  # doctest: +SKIP
        PosixPath('runs/qwen3/report.html')
    """
    if retention is not None and not 0 < retention <= 1:
        raise ValueError(f"retention is the share of the tokens that is kept, a number in (0, 1], got {retention!r}.")
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}.")
    sources = find_sources(paths)
    output = Path(output) if output is not None else _home(Path(paths[0])) / "report.html"
    if output.is_dir():
        raise ValueError(f"{output} is a directory; name the page's file, for example {output / 'report.html'}.")
    probes = [{"name": name, "probe": _json(path, "tipdistill probe")} for name, path in sources.probes.items()]
    sweeps = [
        {"name": name, "sweep": _without_counts(path, _json(path, "tipdistill sweep"))}
        for name, path in sources.sweeps.items()
    ]
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = output.with_name(f"{output.stem}-figures")
    pack, sets = Pack(), []
    share = max_tokens // max(1, len(sources.records))
    for name, directory in sources.records.items():
        dataset = load_dataset(open_records(directory), rule, retention, seed)
        sets.append({"name": name, **dataset_payload(dataset, pack, max(1, share), seed)})
        if figures:
            draw_figures(
                folder, name if len(sources.records) > 1 else "", sets[-1], dataset, *_first(dataset, retention)
            )
    if figures and sources.runs:
        draw_training(folder, sources.runs)
    data = {
        "sets": sets,
        "runs": [{"name": run.name, "series": run.series} for run in sources.runs],
        "probes": probes,
        "sweeps": sweeps,
        "retention": retention,
        "paper": PAPER_SHARES,
        "blob": pack.text(),
    }
    with replacing(output, durable=False) as partial:
        partial.write_text(_render(sources, data), encoding="utf-8")
    return output


def _home(path: Path) -> Path:
    return path.parent if path.name == TOKENS_FILE else path


def _first(dataset: Dataset, retention: float | None) -> tuple[str, float]:
    """The rule and the retention that are shown first."""
    wanted = retention if retention is not None else dataset.records.sidecar.get("retention", 0.5)
    return dataset.rules[0].name, min(dataset.retentions, key=lambda offered: abs(offered - float(wanted)))


def _json(path: Path, command: str) -> Any:
    try:
        # what could not be computed is left out
        value = read_json(path, parse_constant=lambda _: None)
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error} Run `{command}` again, or remove it.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, and no result. Run `{command}` again, or remove it.")
    return value


def _without_counts(path: Path, sweep: dict[str, Any]) -> dict[str, Any]:
    """A sweep as the page shows it: the figures of every problem are the file's alone."""
    kept = ("num_samples", "test", "seeds", "validation", "learning_rates", "interval", "before", "rows", "failed")
    try:
        figures = [*sweep["before"].values(), *(figure for row in sweep["rows"] for figure in row["tasks"].values())]
        for figure in figures:
            figure.pop("correct", None)
            if "divergence" in figure:
                figure["divergence"] = True
        return {name: sweep[name] for name in kept}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no result of a sweep ({error!r:.80}). Run `tipdistill sweep` again, or remove it."
        ) from error


def _render(sources: Sources, data: dict[str, Any]) -> str:
    from jinja2 import Environment
    from markupsafe import Markup

    from tipdistill import __version__

    folder = files("tipdistill") / "report" / "page"
    scripts = [(folder / name).read_text(encoding="utf-8") for name in SCRIPTS]
    style = (folder / "style.css").read_text(encoding="utf-8")
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        (folder / "report.html.j2").read_text(encoding="utf-8")
    )
    # nothing but our own scripts runs, whatever a rollout holds, and nothing at all is fetched
    policy = "; ".join(
        [
            "default-src 'none'",
            f"script-src {' '.join(map(_hash, scripts))}",
            f"style-src {_hash(style)}",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    return template.render(
        title=", ".join(sources.names),
        policy=policy,
        style=Markup(style),
        scripts=[Markup(script) for script in scripts],
        data=Markup(script_json(data)),
        left_out=sources.left_out,
        version=__version__,
        sets=data["sets"],
        episodes=any(shown["episodes"] for shown in data["sets"]),
        runs=data["runs"],
        probes=data["probes"],
        sweeps=data["sweeps"],
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}'"
