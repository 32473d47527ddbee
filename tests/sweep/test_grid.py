"""A grid that could not run is refused before anything does."""

import pytest
import yaml

from tipdistill.sweep import read_grid

PLAIN = {
    "base": "laptop",
    "cells": {"all": 1.0, "soft_or": [0.5, 0.2], "random": [0.2]},
    "learning_rates": [1e-3, "3e-4"],
    "seeds": [1, 2, 3],
    "validation": {"task": "arithmetic[:8]", "seeds": [0, 1]},
    "test": "arithmetic[8:24]",
    "num_samples": 2,
}


def written(tmp_path, **changes):
    path = tmp_path / "grid.yaml"
    asked = {**PLAIN, **changes}
    path.write_text(
        yaml.safe_dump({key: value for key, value in asked.items() if value != "left out"}, sort_keys=False)
    )
    return path


def test_a_grid_says_what_runs(tmp_path):
    grid = read_grid(written(tmp_path))
    assert [row.key for row in grid.rows] == ["all-100", "soft_or-50", "soft_or-20", "random-20"]
    assert grid.learning_rates == (1e-3, 3e-4)
    assert str(grid.output_dir) == "runs/grid"
    first = grid.first_cells(grid.rows[1])
    assert [(cell.learning_rate, cell.seed, cell.tasks) for cell in first] == [
        (1e-3, 0, ("arithmetic[:8]",)),
        (3e-4, 0, ("arithmetic[:8]",)),
        (1e-3, 1, ("arithmetic[:8]", "arithmetic[8:24]")),
        (3e-4, 1, ("arithmetic[:8]", "arithmetic[8:24]")),
    ]
    last = grid.last_cells(grid.rows[1], 3e-4)
    assert [cell.seed for cell in last] == [1, 2, 3]
    assert last[0] in first
    assert [cell.tasks for cell in last[1:]] == [("arithmetic[8:24]",)] * 2
    assert grid.number_of_cells() == 4 * (2 * 2 + 2)


def test_with_one_rate_nothing_is_chosen(tmp_path):
    grid = read_grid(written(tmp_path, learning_rates=1e-3))
    assert grid.number_of_cells() == 4 * 3
    assert all(cell.tasks == ("arithmetic[8:24]",) for cell in grid.first_cells(grid.rows[0]))
    assert grid.first_cells(grid.rows[0]) == grid.last_cells(grid.rows[0], 1e-3)


def test_only_all_tokens_measure_the_student_before(tmp_path):
    grid = read_grid(written(tmp_path))
    for row in grid.rows:
        assert all(cell.on_start == (row.rule == "all") for cell in grid.last_cells(row, 1e-3))
    assert not grid.first_cells(grid.rows[0])[0].on_start  # seed 0 is of the validation alone


def test_a_rule_goes_by_any_name_with_overrides_of_its_own(tmp_path):
    guarded = {"rule": "gradient_norm", "retentions": [0.02], "overrides": {"drift_retention": 0.2}}
    row = read_grid(written(tmp_path, cells={"guarded": guarded})).rows[0]
    assert (row.name, row.rule, row.retention, row.overrides) == (
        "guarded",
        "gradient_norm",
        0.02,
        {"drift_retention": 0.2},
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sed": [1]}, "there is no key 'sed' in a grid. Did you mean 'seeds'"),
        ({"base": "left out"}, "`base` is missing"),
        ({"base": 3}, "base is a recipe's name or file"),
        ({"cells": {}}, "cells maps rules to lists of retentions"),
        ({"cells": {"soft_or": []}}, "soft_or: retentions is empty"),
        ({"cells": {"soft_or": [0.5, 0.5]}}, "holds a number twice"),
        ({"cells": {"soft_or": [1.5]}}, r"a retention is in \(0, 1\], got 1.5"),
        ({"cells": {"soft_or": [0]}}, r"a retention is in \(0, 1\], got 0"),
        ({"cells": {"soft_or": [True]}}, "holds numbers, got True"),
        ({"cells": {"soft_ro": [0.5]}}, "Did you mean '?soft_or"),
        ({"cells": {"q3": {"retention": [0.1]}}}, "no key 'retention'. Did you mean 'retentions'"),
        ({"cells": {"q3": {"retentions": [0.1], "overrides": {"seed": 3}}}}, "seed is set by `seeds`"),
        ({"learning_rates": []}, "learning_rates is empty"),
        ({"learning_rates": [-1e-3]}, "learning_rates are positive"),
        ({"learning_rates": ["fast"]}, "learning_rates holds numbers, got 'fast'"),
        ({"seeds": []}, "seeds is empty"),
        ({"seeds": [0.5]}, "seeds are integers"),
        ({"seeds": [-1]}, "seeds are integers"),
        ({"overrides": {"learning_rate": 1e-3}}, "learning_rate is set by `learning_rates`"),
        ({"overrides": ["max_steps"]}, "overrides maps fields"),
        ({"validation": "left out"}, "2 learning rates, and nothing to choose between them on"),
        ({"validation": {"task": "arithmetic[:8]"}}, "validation: seeds is empty"),
        ({"validation": {"task": "arithmetic[:8]", "sed": [0]}}, "validation has no key 'sed'. Did you mean 'seeds'"),
        ({"validation": {"task": "arithmetic[8:24]", "seeds": [0]}}, "is both validation and test"),
        ({"validation": {"task": "arithmetic[:9]", "seeds": [0]}}, "share the problem"),
        ({"validation": {"task": "arithmetics", "seeds": [0]}}, "there is no task 'arithmetics'.*'arithmetic'"),
        ({"test": []}, "test is empty"),
        ({"test": "arithmetic[300:]"}, "takes none of the 256 problems"),
        ({"num_samples": 0}, "num_samples is an integer ≥ 1"),
        ({"keep_models": "no way"}, "keep_models is true or false"),
    ],
)
def test_what_could_not_run_is_refused_by_name(tmp_path, changes, said):
    with pytest.raises(ValueError, match=said) as caught:
        read_grid(written(tmp_path, **changes))
    assert "grid.yaml" in str(caught.value)


def test_a_file_that_is_no_grid(tmp_path):
    written(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"Did you mean 'grid\.yaml'"):
        read_grid(tmp_path / "gird.yaml")
    (tmp_path / "list.yaml").write_text("- all\n")
    with pytest.raises(ValueError, match="must hold a mapping"):
        read_grid(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="is not valid YAML"):
        read_grid(tmp_path / "broken.yaml")
