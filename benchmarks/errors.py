"""How far the Triton engine's gradients are from float64 near agreement, on a CPU: its kernels are interpreted.

The sizes are those that an interpreter can bear; `python -m benchmarks.gpu_lease --only errors` has a real head's.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tipdistill.provenance import environment

from . import measure
from .interpreter import round_to_bfloat16

TOKENS, VOCABULARY, WIDTH = 16, 4000, 64


def run_errors(
    tokens: int = TOKENS, vocabulary: int = VOCABULARY, width: int = WIDTH, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Relative errors of the gradients, as `gpu_stages.errors` has them.

    Args:
        tokens, vocabulary, width: N, V and H of both heads.
        say: takes one line of progress.

    Raises:
        ValueError: Triton is not told to interpret, before it is imported.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("the kernels are interpreted here: set TRITON_INTERPRET=1 before the command.")
    round_to_bfloat16()
    from . import gpu_stages

    sizes = replace(gpu_stages.sizes_of(dry_run=True), errors=(tokens, vocabulary, width))
    measured = gpu_stages.errors(sizes, lambda so_far: say(f"{len(so_far['cases'])} of 12"))
    return {"benchmark": "errors", "preset": "interpreted", **environment("cpu", 1), **measured}


def main(argv: list[str] | None = None) -> int:
    """Measure the errors and write the JSON.

    Raises:
        ValueError: as `run_errors`.
    """
    parser = measure.parser("errors", __doc__)
    for name in ("tokens", "vocabulary", "width"):
        parser.add_argument(f"--{name}", type=int)
    return measure.run("errors", run_errors, parser, argv)


if __name__ == "__main__":
    measure.end(main)
