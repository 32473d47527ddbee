"""Token records: what writing and showing them takes beyond the models, from thousands to millions of tokens."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from tipdistill.provenance import environment
from tipdistill.records import PART_TOKENS, About, RecordsWriter, open_records
from tipdistill.types import Rollout, Scored, TokenScores, TopTokens

from . import measure

SIZES = (128_000, 2_048_000)
ROLLOUT_LENGTH = 1000
BATCH = 32
VOCABULARY = 151_936


def run_records(
    say: Callable[[str], None] = print,
    sizes: Sequence[int] = SIZES,
    vocabulary: int = VOCABULARY,
    threads: int = 1,
) -> dict[str, Any]:
    """Seconds to write records of rollouts of a thousand tokens, in batches of 32, with three rules; then the report's.

    Statistics and tokens are drawn at random, so that nothing is gained by repetition; drawing them is not timed.
    Memory is how far the process's peak resident set rose while a size was written: what grows with the number of
    tokens is the statistics that the rules choose by. `tipdistill report` runs as a process of its own; random tokens
    are the worst case for the page's compression.

    Args:
        say: takes one line of progress.
        sizes: numbers of tokens, rising.
        vocabulary: of the tokenizer.
        threads: of torch.

    Example:
        >>> result = run_records(say=lambda line: None, sizes=(2000,), vocabulary=300)
        >>> result["sizes"]["2000"]["tokens_read_back"]
        2000
    """
    torch.set_num_threads(threads)
    tokenizer = _tokenizer(vocabulary)
    about = About("student", "teacher", vocabulary, rules=("soft_or", "q3", "gradient_norm"))
    entries = {}
    for size in sizes:
        before = _peak_gib()
        with tempfile.TemporaryDirectory() as folder:
            begun = time.perf_counter()
            writer = RecordsWriter(folder, tokenizer, about)
            starting, writing = time.perf_counter() - begun, 0.0
            generator = torch.Generator().manual_seed(size)
            for _ in range(max(1, size // (BATCH * ROLLOUT_LENGTH))):
                batch = _batch(about, min(size, BATCH * ROLLOUT_LENGTH), vocabulary, generator)
                begun = time.perf_counter()
                writer.write(*batch)
                writing += time.perf_counter() - begun
            begun = time.perf_counter()
            writer.close()
            closing = time.perf_counter() - begun
            records = open_records(folder)
            entries[str(size)] = {
                "seconds": {
                    "start": starting,
                    "write": writing,
                    "close": closing,
                    "total": starting + writing + closing,
                },
                "peak_memory_rise_gib": _peak_gib() - before,
                "bytes_per_token": (Path(folder) / "tokens.parquet").stat().st_size / records.tokens.metadata.num_rows,
                "tokens_read_back": records.tokens.metadata.num_rows,
                "report": _report(Path(folder), threads),
            }
        entry = entries[str(size)]
        say(f"{size} tokens: written in {entry['seconds']['total']:.1f} s, shown in {entry['report']['seconds']:.1f} s")
    return {
        "benchmark": "records",
        "preset": "cpu",
        **environment("cpu", threads),
        "settings": {"rollout_length": ROLLOUT_LENGTH, "batch": BATCH, "vocabulary": vocabulary, "part": PART_TOKENS},
        "sizes": entries,
    }


def _report(folder: Path, threads: int) -> dict[str, float]:
    command = [sys.executable, "-m", "tipdistill.cli", "report", str(folder)]
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}.")
    return {
        "seconds": time.perf_counter() - begun,
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "peak_memory_gib": usage.ru_maxrss / 2**20,  # KiB on Linux
        "page_bytes": (folder / "report.html").stat().st_size,
    }


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


def _tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({f" t{index}": index for index in range(vocabulary)}, unk_token=" t0"))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def _batch(about: About, count: int, vocabulary: int, generator: torch.Generator) -> tuple[list[Rollout], Scored]:
    ids = torch.randint(vocabulary, (count,), generator=generator)
    rollouts = [
        Rollout(number, "a prompt of some length " * 8, (1, 2), tuple(piece.tolist()), True)
        for number, piece in enumerate(ids.split(ROLLOUT_LENGTH))
    ]
    scores = {name: torch.rand(count, generator=generator) ** 4 for name in about.fields()}
    tops = [
        TopTokens(
            torch.randint(vocabulary, (count, 5), generator=generator),
            torch.rand(count, 5, generator=generator).sort(descending=True).values,
        )
        for _ in range(2)
    ]
    return rollouts, Scored(TokenScores(**scores), *tops)


def main(argv: list[str] | None = None) -> int:
    """Time writing and showing token records, and write the JSON."""
    parser = measure.parser("records", __doc__)
    parser.add_argument("--sizes", type=int, nargs="+", help="numbers of tokens")
    parser.add_argument("--vocabulary", type=int)
    parser.add_argument("--threads", type=int)
    return measure.run("records", run_records, parser, argv)


if __name__ == "__main__":
    measure.end(main)
