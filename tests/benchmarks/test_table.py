"""Tables come from the results, and those in the documents are up to date."""

import json
from pathlib import Path

import pytest

import benchmarks.table
from benchmarks.table import NOT_MEASURED, OF_GPUS, TABLES, rendered, table, update

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
    of_gpus = {path.stem for path in RESULTS.glob("gpu-*.json")}  # each in all tables of OF_GPUS
    assert {path.stem for path in RESULTS.glob("*.json")} - of_kills - of_gpus <= set(TABLES)


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


def test_the_lines_of_a_cpu_stand_beside_what_was_measured(results):
    result = json.loads((results / "head-cpu.json").read_text())
    result["variants"]["chunked soft_or 0.5"]["ratio"]["trl"] = spread(0.4)
    (results / "head-cpu.json").write_text(json.dumps(result))
    lines = table("targets-cpu", results, results).splitlines()
    assert "| Soft-OR 0.5 | 0.78 | 0.25 | 0.44 | 0.40 |" in lines
    assert "| entropy 0.1 | 0.25 | not measured | 0.14 | not measured |" in lines
    assert "(head-cpu.json)" in lines[-1]


@pytest.mark.parametrize("name", OF_GPUS)
def test_without_a_gpu_its_tables_say_so(name, results):
    text = table(name, results, results)
    assert text == NOT_MEASURED if name != "gpu" else f"| 0.65 | {NOT_MEASURED} |" in text


@pytest.fixture
def of_gpu(results):
    """A result as the lease writes it, on two cards: one that has all stages, one that was stopped in the first."""
    head = {"engine": "triton", "rule": "all", "retention": 1.0, "seconds": spread(0.05), "over_floor": spread(1.2)}
    head |= {"ratio": {"trl": spread(0.6)}, "extra_bytes": 3 * 2**20, "gradient_bytes": 2**20}
    held = head | {"switches": [["TILE", [8, 4, 2, 1]]]}
    step = {"step_seconds": spread(2.0), "training_seconds": spread(1.9), "split": {"loss": 1.0}}
    step |= {"peak_bytes": 50 * 2**30, "above_bytes": 10 * 2**30, "above_ratio": {"plain": 0.31}}
    errors = {"hidden": 1e-3, "weight": 2e-3, "worst row": 1e-2}
    kernel = {"name": "_online_kernel", "calls": 3, "seconds": 0.02, "share": 0.5}
    profile = {"seconds": 0.05, "busy_seconds": 0.04, "split": {"matmul": 0.7}, "longest": [kernel]}
    micro = {"matmul": {"a": {"seconds": 1.0, "flops_per_second": 7.2e14}, "b": {"refused": "no such product"}}}
    micro |= {"copy": {"c": {"seconds": 1.0, "bytes_per_second": 2.8e12}}}
    of_kernel = {"calls": 3, "seconds": 0.004, "bytes_per_second": 2.5e12}
    micro["kernels"] = {"fused loss": {"seconds": 0.05, "kernels": {"_online_kernel": of_kernel}}}
    of_value = {"seconds": 0.05, "over_first": 0.9, "extra_bytes": 2**30}
    stages = {
        "head": {"variants": {"triton": head, "triton, TILE=8 x 4 x 2 x 1": held}},
        "step": {"variants": {"tip soft_or 0.5": step, "plain": {"refused": "out of memory"}}},
        "errors": {"cases": {"bfloat16, peaky, log-ratio 0.1": {"fused loss": errors, "trl": errors}}},
        "memory": {
            "settings": {"vocabularies": [10, 1000]},
            "cases": {"triton": {"extra_bytes": {"10": 2**20, "1000": 2**21}, "growth": 2.0}},
        },
        "profile": {"cases": {"triton": profile, "trl": {"refused": "out of memory"}}},
        "micro": micro,
        "switches": {"cases": {"held": {"rules": {"triton": {"0.025": of_value}}}}, "left_out": {"slim": "no SLIM"}},
    }
    result = {
        "hardware": {"cpu": "CPU", "cpu_capability": "AVX512", "threads": 1, "gpu": "NVIDIA H100"},
        "versions": {"torch": "2.13.0"},
        "commit": "abc",
        "measured": "2026-11-28",
        "stages": {name: {"state": "done", "result": stage} for name, stage in stages.items()},
        "lines": [{"line": "time / TRL, all tokens", "at_most": 0.65, "measured": 0.6, "holds": True}],
    }
    (results / "gpu-h100.json").write_text(json.dumps(result))
    result["stages"] = {"head": {"state": "killed", "reason": "its limit of 90 s", "result": stages["head"]}}
    (results / "gpu-h200.json").write_text(json.dumps(result))
    return results


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("gpu", "| time / TRL, all tokens | 0.65 | 0.6 | holds |"),
        (
            "gpu-head",
            "| `triton`, all tokens, TILE = 8 x 4 x 2 x 1 | 50.0 |  | 0.60 | 1.20 | 2 |  |",
        ),
        ("gpu-step", "| tip soft_or 0.5 | 2 | 1.9 |  |  | 1 |  | 51200 | 10240 | 0.31 |"),
        ("gpu-errors", "| bfloat16, peaky, log-ratio 0.1 | 2.0e-03 | 2.0e-03 |"),
        ("gpu-memory", "| `triton` | 1 | 2 | 2.00 |"),
        ("gpu-profile", "| `triton` | 50.0 | 80% | 70% | _online_kernel 50% |"),
        ("gpu-micro", "| `_online_kernel`, fused loss: 4.00 ms | 2.5 | TB/s |"),
        ("gpu-switches", "| held | `triton` | 0.025 | 50.0 | 0.90 | 1024 |"),
    ],
)
def test_the_tables_of_a_gpu_are_filled_from_its_result(name, line, of_gpu):
    text = table(name, of_gpu, of_gpu)
    assert line in text.splitlines()
    assert text.index("(gpu-h100.json)") < text.index("(gpu-h200.json)")
    if name == "gpu-head":
        assert "Stopped before its end: its limit of 90 s." in text
    elif name != "gpu":
        assert "not measured: it was not asked for" in text
