"""The language model's demo in miniature: SmolLM2's tokenizer and chat template, and a tiny model in its place."""

import json
from pathlib import Path

import forks
import pytest
import yaml
from tiny_smollm2 import write_tiny_teacher

from tipdistill import demo_lm
from tipdistill.cli.demo import show_language_model
from tipdistill.sweep import workers
from tipdistill.tasks import smollm2


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """What the demo returned, its directory, and what it said."""
    root = tmp_path_factory.mktemp("demo") / "lm"
    with pytest.MonkeyPatch.context() as patch:
        grids = root.parent / "grids"
        grids.mkdir()
        for name in ("demo-lm", "demo-lm-quick"):
            grid = yaml.safe_load((demo_lm.GRIDS / f"{name}.yaml").read_text(encoding="utf-8"))
            grid["overrides"] |= {"max_steps": 2, "warmup_steps": 0, "per_device_train_batch_size": 2}
            grid["overrides"] |= {"max_completion_length": 6}
            grid["cells"] = dict(list(grid["cells"].items())[:2])
            grid["test"][0] = f"{grid['test'][0].partition('[')[0]}[:16]"
            (grids / f"{name}.yaml").write_text(yaml.safe_dump(grid, sort_keys=False))
        patch.setattr(demo_lm, "GRIDS", grids)
        patch.setattr(demo_lm, "_MAP_PROMPTS", 4)
        patch.setattr(smollm2, "_write_teacher", write_tiny_teacher)
        grid = demo_lm.demo_grid("demo-lm", root)
        smollm2.prepare(root, 6, say=lambda line: None)
        patch.setattr(workers, "START_METHOD", forks.context().get_start_method())
        said = []
        return demo_lm.run(grid, threads=1, say=said.append, layers=6), root, said


@pytest.mark.slow
def test_it_writes_a_table_answers_a_map_and_the_report(finished, capsys):
    result, root, said = finished
    assert said == ["the teacher is there; the student is there"]
    assert json.loads((root / "results.json").read_text()) == result
    assert [row["name"] for row in result["rows"]] == ["all tokens", "Soft-OR"]
    assert result["measured"] == ["reverse_kl", "use_word", "capitals"]
    whole, half = result["rows"]
    assert whole["trained_tokens"] > half["trained_tokens"] > 0
    for row in (result["before"], whole, half):
        low, high = row["reverse_kl"]["interval"]
        assert 0 < low < row["reverse_kl"]["mean"] < high
        assert 0 <= row["capitals"]["mean"] <= 1
    assert set(result["teacher_accuracy"]) == {"use_word", "capitals"}
    assert sum(quadrant["token_share"] for quadrant in result["quadrants"].values()) == pytest.approx(1)
    assert [set(row) for row in result["answers"]] == [{"prompt", "teacher", "before", "all tokens", "Soft-OR"}] * 3
    assert (root / "tip_map.png").read_bytes()[:4] == b"\x89PNG"
    page = (root / "report.html").read_text(encoding="utf-8")
    assert "<html" in page
    text = (root / "results.md").read_text(encoding="utf-8")
    assert text.count("\n| ") >= 7
    show_language_model(result, root, 12.0)
    shown = capsys.readouterr().out
    assert "before healing" in shown
    assert "report.html" in shown


def test_the_results_in_the_documents_are_those_of_one_full_run():
    root = Path(__file__).parents[1] / "docs" / "demo" / "lm"
    result = json.loads((root / "results.json").read_text(encoding="utf-8"))
    grid = yaml.safe_load((demo_lm.GRIDS / "demo-lm.yaml").read_text(encoding="utf-8"))
    assert result["settings"]["max_steps"] == grid["overrides"]["max_steps"]
    assert result["settings"]["learning_rate"] == float(grid["learning_rates"])
    assert len(result["dropped"]) == demo_lm.LAYERS
    assert [row["name"] for row in result["rows"]] == list(grid["cells"])
    assert (root / "results.md").read_text(encoding="utf-8") == demo_lm.as_markdown(result)
    page = (root.parents[1] / "smollm2.md").read_text(encoding="utf-8")
    table, note, answers = demo_lm.as_markdown(result).strip().split("\n\n")
    assert table in page
    assert answers in page
    assert note in " ".join(page.split())
    assert max(row["peak_memory_gib"] for row in result["rows"]) < 6
    assert result["machine"]["commit"]


def test_the_grid_reads_what_its_directory_holds(tmp_path):
    grid = demo_lm.demo_grid("demo-lm", tmp_path / "here", seed=3)
    assert grid.seeds == (3,)
    assert grid.test[0] == f"reverse_kl={tmp_path}/here/heldout.jsonl"
    assert grid.overrides["dataset_name"] == f"{tmp_path}/here/prompts.jsonl"
    assert [row.key for row in grid.rows] == [
        "all-tokens-100",
        "Soft-OR-50",
        "gradient_norm_sampling-10",
        "random-10",
    ]
    assert (tmp_path / "here" / "grid.yaml").is_file()
    assert demo_lm.demo_grid("demo-lm-quick", tmp_path / "quick").output_dir == tmp_path / "quick"
