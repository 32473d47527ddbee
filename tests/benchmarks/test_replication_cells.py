"""A long sweep's finished cells, in the tree and back."""

from benchmarks.replication import cells


def test_saved_cells_are_finished_in_a_new_directory(tmp_path):
    runs, kept, again = tmp_path / "runs", tmp_path / "kept", tmp_path / "again"
    for grid, cell in (("pruned", "all-100"), ("pruned", "random-10"), ("closer", "all-100")):
        (runs / grid / "cells" / cell).mkdir(parents=True)
        (runs / grid / "cells" / cell / "cell.json").write_text(f'{{"{grid}": "{cell}"}}\n')
    (runs / "pruned" / "cells" / "unfinished").mkdir()
    assert len(cells.save(runs, kept)) == 3
    assert cells.save(runs, kept) == []
    (runs / "closer" / "cells" / "all-100" / "cell.json").write_text("{}\n")  # run again
    assert [path.parent.name for path in cells.save(runs, kept)] == ["closer"]
    assert len(cells.restore(kept, again)) == 3
    restored = sorted(path.relative_to(again) for path in again.rglob("cell.json"))
    assert restored == sorted(path.relative_to(runs) for path in runs.rglob("cell.json"))
    assert (again / "pruned/cells/random-10/cell.json").read_text() == '{"pruned": "random-10"}\n'
    assert cells.restore(kept, again) == []
