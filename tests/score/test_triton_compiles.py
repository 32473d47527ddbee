"""The Triton kernels through the whole compiler, down to machine code for real GPUs: this needs the wheel and no GPU.

What the interpreter lets pass and a GPU does not (types, layouts, shapes), and what costs time without being wrong
(registers that spill to memory, loads that are not vectors), shows here.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is built for Linux")

from benchmarks import kernels
from tipdistill.score import triton as engine


@pytest.mark.slow
def test_kernels_compile_for_ampere_and_hopper_without_spills(tmp_path):
    # of its own, since this process has imported triton as an interpreter
    command = [sys.executable, "-m", "benchmarks.kernels", "--output", str(tmp_path / "kernels.json")]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    entries = json.loads((tmp_path / "kernels.json").read_text())["kernels"]
    assert len(entries) == sum(2 * len(kernels.shapes(kernel, engine)) for kernel, *_ in kernels.forms())
    for entry in entries:
        assert entry["spilled_bytes"] == 0, entry
        # of 64 k on a multiprocessor: for sixteen warps at least, for eight where all statistics are asked for at once
        everything = entry["role"] in ("everything, with bias and softcap", "one column")
        assert entry["registers"] <= (255 if everything else 128), entry
        assert entry["vector_loads"] or entry["role"] == "one column", entry
        if entry["kernel"] == "_online_kernel" and entry["warps"] == 1:
            assert entry["barriers"] == 0, entry


def test_an_interpreter_compiles_nothing(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="unset it"):
        kernels.run_kernels()
