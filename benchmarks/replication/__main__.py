"""Write the tables and verdicts of docs/replication.md, docs/smollm2.md and their long form in results/."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tipdistill.files import write_text

from .. import measure
from .results import RESULTS, collect, load
from .tables import rendered

DOCUMENTS = (
    measure.ROOT / "docs" / "replication.md",
    measure.RESULTS / "replication.md",
    measure.ROOT / "docs" / "smollm2.md",
    measure.ROOT / "docs" / "trip.md",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Collect results where that is asked for, and write the documents.

    Raises:
        ValueError: a mark in a document that names no block.
    """
    parser = measure.parser("replication", __doc__)
    parser.add_argument("--collect", type=Path, help="directory whose NAME/sweep.json are kept as the results")
    options = parser.parse_args(argv)
    if options.collect is not None:
        for path in collect(options.collect, RESULTS):
            print(f"kept {path.relative_to(RESULTS)}")
    results = load(RESULTS)
    for document in DOCUMENTS:
        write_text(document, rendered(document.read_text(encoding="utf-8"), results))
    return 0


if __name__ == "__main__":
    measure.end(main)
