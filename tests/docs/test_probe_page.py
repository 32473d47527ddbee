"""What docs/probe.md says of its table is what the file says."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = " ".join((ROOT / "docs" / "probe.md").read_text(encoding="utf-8").split())
RESULT = json.loads((ROOT / "benchmarks" / "results" / "probe-agreement.json").read_text(encoding="utf-8"))


def test_what_the_descent_tells_apart():
    cells = RESULT["prompts"]["256"]["cells"]
    everything = next(cell for cell in cells if cell["rule"] == "all")
    shares = {(cell["rule"], cell["retention"]): cell["descent"] / everything["descent"] for cell in cells}
    trained = {(cell["rule"], cell["retention"]): cell["trained_accuracy"] for cell in cells}
    assert len(cells) == 18
    fails = [key for key in shares if trained[key] < 0.5]
    assert len(fails) == 3
    learns = [share for key, share in shares.items() if key not in fails]
    assert f"have a descent of {max(shares[key] for key in fails):.2f} of that of all tokens, or less" in PAGE
    assert f"All others have {min(learns):.2f} or more" in PAGE
    random = ("random", 0.2)
    assert f"20 % have {shares[random]:.2f} of the descent and end at an accuracy of {trained[random]:.3f}" in PAGE


def test_its_recommendations_held():
    advice = [best for figures in RESULT["prompts"].values() for best in figures["recommendations"]]
    assert len(advice) == 8
    assert {(best["rule"], best["retention"]) for best in advice} == {("divergence", 0.1), ("q3", 0.1)}
    cells = {(cell["rule"], cell["retention"]): cell for cell in RESULT["prompts"]["256"]["cells"]}
    everything = cells["all", 1.0]["trained_accuracy"]
    furthest = max(abs(cells[best["rule"], best["retention"]]["trained_accuracy"] - everything) for best in advice)
    assert f"what all tokens reach, within {furthest:.3f}" in PAGE
