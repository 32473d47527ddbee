"""Tables come from the results, and those in the documents are up to date."""

import json
from pathlib import Path

import pytest

import benchmarks.table
from benchmarks.table import NOT_MEASURED, TABLES, rendered, table, update

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = [*ROOT.glob("README.md"), *(ROOT / "docs").glob("*.md"), *RESULTS.glob("*.md")]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_tables_of_the_documents_are_what_the_results_give(path):
    text = path.read_text(encoding="utf-8")
    assert rendered(text, RESULTS, path.parent) == text, "run: python -m benchmarks.table"


def test_the_command_rewrites_every_document_with_a_table():
    marked = {path for path in DOCUMENTS if "<!-- bench:" in path.read_text(encoding="utf-8")}
    assert marked == {ROOT / name for name in benchmarks.table.DOCUMENTS}


def test_every_result_has_its_table():
    of_kills = {"crash-cpu"}  # of `make crash`, which measures no time
    assert {path.stem for path in RESULTS.glob("*.json")} - of_kills <= set(TABLES)


def spread(value):
    return {"median": value, "low": value, "high": value, "runs": 3}


@pytest.fixture
def results(tmp_path):
    plain = {"engine": "plain", "rule": "all", "retention": 1.0, "seconds": spread(4.0), "over_floor": spread(1.5)}
    ours = {"engine": "chunked", "rule": "soft_or", "retention": 0.5, "seconds": spread(1.0), "over_floor": spread(1.1)}
    ours |= {"ratio": {"plain": spread(0.25)}, "memory_ratio": {"plain": 0.0625}}
    refused = {"engine": "trl", "rule": "all", "retention": 1.0, "refused": "it does not agree"}
    variants = {"plain": plain, "chunked soft_or 0.5": ours, "trl": refused}
    for entry in (plain, ours):
        entry["extra_bytes"], entry["gradient_bytes"] = 32 * 2**20, 20 * 2**20
    result = {
        "variants": variants,
        "hardware": {"cpu": "Some CPU", "cpu_capability": "AVX512", "threads": 1, "gpu": None},
        "versions": {"torch": "2.13.0"},
        "commit": "abc",
        "measured": "2026-11-24",
    }
    (tmp_path / "head-cpu.json").write_text(json.dumps(result))
    return tmp_path


def test_a_table_shows_the_ratios_of_the_result(results):
    lines = table("head-cpu", results, results).splitlines()
    assert "| plain PyTorch, all tokens | 4 |  |  | 32 |  |" in lines
    assert "| `chunked`, Soft-OR 0.5 | 1 | 0.25 |  | 32 | 0.06 |" in lines
    assert any(line.startswith("| TRL, all tokens | refused: it does not agree |") for line in lines)
    assert "commit abc" in lines[-1]
    assert "(head-cpu.json)" in lines[-1]


def test_a_whole_table_has_the_floor_and_the_memory_without_gradients(results):
    lines = table("head-cpu.whole", results, results).splitlines()
    assert "| plain PyTorch, all tokens | 4 |  |  | 32 | 12 |  | 1.50 |" in lines
    assert "| `chunked`, Soft-OR 0.5 | 1 | 0.25 |  | 32 | 12 | 0.06 | 1.10 |" in lines
    assert any(line.startswith("| TRL, all tokens | refused: it does not agree |") for line in lines)
    assert "(head-cpu.json)" in lines[-1]


def test_a_document_is_rewritten_between_its_markers_only(results, tmp_path):
    document = tmp_path / "d.md"
    document.write_text(
        "before\n<!-- bench:head-cpu -->\nold\n<!-- /bench -->\nbetween\n"
        "<!-- bench:head-qwen3-8k -->\n<!-- /bench -->\nafter\n"
    )
    assert update(document, results)
    text = document.read_text()
    assert "old" not in text
    assert text.startswith("before\n<!-- bench:head-cpu -->\n| ")
    assert text.endswith(f"between\n<!-- bench:head-qwen3-8k -->\n{NOT_MEASURED}\n<!-- /bench -->\nafter\n")
    assert not update(document, results)


def test_an_unknown_table_names_the_nearest(results):
    with pytest.raises(ValueError, match=r"table must be one of .*, got 'head-cpus'. Did you mean 'head-cpu'"):
        rendered("<!-- bench:head-cpus -->\n<!-- /bench -->", results, results)
