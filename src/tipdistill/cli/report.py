"""tipdistill report: one page of token records and runs."""

from __future__ import annotations

import time
from pathlib import Path

from ..terminal import say
from .flags import Parser


def main(argv: list[str]) -> int:
    """Write the page; returns the exit code.

    Args:
        argv: the arguments after `tipdistill report`.

    Raises:
        ValueError, OSError: nothing to report, or records that cannot be read.
    """
    from ..report.page import write_report

    options = parser().read(argv)
    started = time.monotonic()
    page = write_report(
        options.paths,
        options.output,
        rule=options.rule,
        retention=options.retention,
        max_tokens=options.max_tokens,
        seed=options.seed,
        figures=not options.no_figures,
    )
    figures = "" if options.no_figures else f" · figures: {page.with_name(f'{page.stem}-figures')}"
    say(f"{page} ({page.stat().st_size / 1e6:.1f} MB, {time.monotonic() - started:.1f} s){figures}")
    return 0


def parser() -> Parser:
    """The flags of `tipdistill report`."""
    from ..report.page import MAX_TOKENS

    parser = Parser(
        "report",
        "Write one self-contained page (TIP map, token view, confusions, training curves) and its figures.",
        defaults=False,
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="RUN_OR_RECORDS", help="several are shown side by side")
    parser.add_argument("--output", type=Path, help="the page (default: report.html in the first directory)")
    parser.add_argument("--rule", help="shown first (default: the recorded one)")
    parser.add_argument("--retention", type=float, help="shown first, in (0, 1] (default: the recorded one)")
    parser.add_argument(
        "--max_tokens", type=int, default=MAX_TOKENS, help=f"tokens shown as text (default: {MAX_TOKENS:,})"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the rollouts drawn, and of the rules that draw")
    parser.add_argument("--no_figures", action="store_true", help="write the page alone, no PNG and SVG files")
    return parser
