"""What travels from a teacher's server: the page shows what was measured, and the command takes a real server."""

import json
from pathlib import Path

from benchmarks.table import TABLES

ROOT = Path(__file__).parents[2]
RESULT = json.loads((ROOT / "benchmarks" / "results" / "wire-smollm2.json").read_text(encoding="utf-8"))
PAGE = (ROOT / "docs" / "vllm.md").read_text(encoding="utf-8")


def test_the_page_has_the_measured_bytes():
    assert TABLES["wire-smollm2"](RESULT) in PAGE
    assert f"({RESULT['model']['vocabulary']:,} tokens, width {RESULT['model']['width']})" in PAGE
    assert f"commit {RESULT['commit']}" in PAGE
    assert f"vLLM {RESULT['vllm'].removesuffix('.0')}" in PAGE


def test_hidden_states_take_what_their_numbers_take():
    """No packaging: the width times the dtype's bytes, to the byte."""
    width, answers = RESULT["model"]["width"], RESULT["answers"]
    assert answers["hidden_states_float32"]["bytes_per_token"] == 4 * width
    assert answers["hidden_states_bfloat16"]["bytes_per_token"] == 2 * width
    assert answers["whole_vocabulary"]["bytes_per_token"] > 1000 * answers["hidden_states_bfloat16"]["bytes_per_token"]
