"""Rank correlations of a probe and a sweep, on a tiny model in the place of SmolLM2."""

import json

import pytest
from tiny_smollm2 import write_tiny_pair

from benchmarks import measure, probe_order
from benchmarks.table import TABLES

ROWS = [
    ("all", "all", 1.0, {}, "1.0 1.1 0.9"),
    ("soft_or", "soft_or", 0.5, {}, "1.2 1.3 1.1"),
    ("random", "random", 0.5, {}, "1.4 1.5 1.3"),
    ("sampled", "gradient_norm_sampling", 0.2, {"selection_scope": "batch"}, "1.6 1.7 1.5"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_tiny_pair(tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="module")
def sweep(root):
    rows = [
        {
            "name": name,
            "rule": rule,
            "retention": retention,
            "overrides": overrides,
            "tasks": {"kl": {"mean": float(text.split()[0]), "divergence": {"0": text, "1": text}}},
        }
        for name, rule, retention, overrides, text in ROWS
    ]
    path = root / "pruned.json"
    path.write_text(json.dumps({"test": ["kl"], "rows": rows}))
    return path


def test_every_row_is_probed_under_its_own_scope_and_compared(root, sweep):
    result = probe_order.run_probe(sweep, root, prompts=8, tokens=4, probes=2, threads=1, say=lambda line: None)
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == [name for name, *_ in ROWS]
    # so of the figures that are the same in every probe: of all tokens all is kept, of the others as much as asked
    assert [rows[name]["kept"] for name in ("all", "soft_or", "random")] == pytest.approx([1.0, 0.5, 0.5], abs=0.13)
    assert rows["all"]["cosine"] == rows["all"]["divergence_share"] == 1.0
    assert 0 < rows["sampled"]["kept"] < 0.45
    assert rows["random"]["descent"] != rows["soft_or"]["descent"]
    for figure in result["correlation"].values():
        assert len(figure["per_probe"]) == 2
        assert -1 <= figure["interval"][0] <= figure["interval"][1] <= 1
    # more tokens train better in these rows, but for a tie of two of them
    assert result["correlation"]["kept"]["mean"] > 0.9
    table = TABLES["probe_order-smollm2"](result)
    assert "| tokens kept | " in table
    assert "| cosine | " in table


def test_a_figure_that_orders_as_training_does_has_a_correlation_of_one():
    places = [("a", 1.0), ("b", 0.5), ("c", 0.1)]
    outcomes = {place: {0: [level, level], 1: [level, level]} for place, level in zip(places, (1, 2, 3), strict=True)}
    best = dict(zip(places, (3.0, 2.0, 1.0), strict=True))
    figure = probe_order.correlation([best, best], outcomes, draws=50)
    assert figure == {"mean": pytest.approx(1), "interval": pytest.approx([1, 1]), "per_probe": pytest.approx([1, 1])}
    worst = {place: -value for place, value in best.items()}
    assert probe_order.correlation([worst], outcomes, draws=50)["mean"] == pytest.approx(-1)
    same = dict.fromkeys(places, 1.0)
    assert probe_order.correlation([same], outcomes, draws=50)["mean"] == 0


def test_what_the_page_says_of_the_language_model_is_in_its_file():
    result = json.loads((measure.RESULTS / "probe_order-smollm2.json").read_text(encoding="utf-8"))
    assert len(result["rows"]) == 15
    for figure in ("descent", "cosine", "kept"):  # "order the rows as training does"
        assert result["correlation"][figure]["mean"] > 0.9
        assert result["correlation"][figure]["interval"][0] > 0.4
    share, q3_share = (result["correlation"][figure] for figure in ("divergence_share", "q3_share"))
    assert q3_share["mean"] < share["mean"] < result["correlation"]["descent"]["mean"]
    assert q3_share["interval"][0] < 0 < q3_share["interval"][1]  # "next to nothing"
    tenth = [row for row in result["rows"] if row["retention"] == 0.1]
    by_descent = [row["name"] for row in sorted(tenth, key=lambda row: -row["descent"])]
    by_outcome = [row["name"] for row in sorted(tenth, key=lambda row: row["outcome"])]
    assert (by_descent[0], by_descent[-1]) == (by_outcome[0], by_outcome[-1]) == ("gradient_norm_sampling batch", "q3")


def test_what_is_missing_is_named_with_the_command(tmp_path, root):
    with pytest.raises(ValueError, match=r"run `python -m tipdistill\.tasks smollm2` first"):
        probe_order.run_probe(root=tmp_path)
    with pytest.raises(ValueError, match="run the sweep and keep its result"):
        probe_order.run_probe(tmp_path / "absent.json", root)
