"""The backward through kept positions at equal seconds: what docs/scaling.md shows of the sweep that judged it."""

from statistics import fmean

from sweeps import result_and_grid

from benchmarks.table import TABLES

RESULT, GRID = result_and_grid("kept", "modular")
ROWS = {row["name"]: row for row in RESULT["rows"]}


def test_the_result_is_that_of_the_grid():
    for name, row in ROWS.items():
        assert row["overrides"]["max_steps"] == int(name.split(", ")[2].split()[0])
        assert row["overrides"].get("backward", "full") == name.split(", ")[1]
        assert row["seeds"] == GRID["seeds"]


def test_a_difference_is_paired_by_seed_with_the_longest_run_on_random_tokens():
    lines = TABLES["kept-modular"](RESULT).splitlines()[3:]
    beside = ROWS["random, full, 80 steps"]["tasks"]["modular[64:]"]["by_seed"]
    for line, (name, row) in zip(lines, ROWS.items(), strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        by_seed = row["tasks"]["modular[64:]"]["by_seed"]
        mean = fmean(by_seed[seed] - beside[seed] for seed in beside)
        expected = "" if name == "random, full, 80 steps" else f"{mean:+.3f}".replace("-", "−")
        assert cells[-1].partition(" ±")[0] == expected
        assert cells[-2] == f"{row['seconds']:.0f}"
