"""Data moves forward only, and so do the imports."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "tipdistill"
# A module may import from its own row and from the rows above it.
ORDER = [
    {
        "types",
        "vocabulary",
        "positions",
        "arrow",
        "chat",
        "data",
        "files",
        "parquet",
        "text",
        "provenance",
        "http",
        "extras",
    }
    | {"documents", "dotted", "columns", "kinds", "redact", "replies", "signals", "supervise", "terminal"},
    {"conventions", "environments", "policy"},
    {"rollout"},
    {"score", "divergence"},
    {"select"},
    {"loss"},
    {"records"},
    {"config", "integrations", "teachers"},
    {"model_files", "pair", "prune"},
    {"evaluate"},
    {"tasks"},
    {"training"},
    {"trainer"},
    {"recipes"},
    {"report"},
    {"plan"},
    {"advice"},
    {"probe"},
    {"sweep"},
    {"demo", "demo_lm"},
    {"cli"},
    {"__main__"},
]
# The two looks ahead: `token_scores(rule=...)` asks the registry which statistics a rule reads, and trackers are shown
# the report's map while a run is under way.
AHEAD = {"score/tokens.py": {"select"}, "training/trackers.py": {"report"}}
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
FILES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


def imported(path: Path) -> set[str]:
    """Top-level names of this package that a file imports, absolute or relative."""
    package = path.relative_to(SOURCE).parts[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found |= {parts[1] for parts in names if parts[0] == "tipdistill" and len(parts) > 1}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = (*package[: len(package) - node.level + 1], *(node.module or "").split("."))
                base = tuple(part for part in base if part)
            elif (node.module or "").split(".")[0] == "tipdistill":
                base = tuple((node.module or "").split(".")[1:])
            else:
                continue
            found |= {base[0]} if base else {alias.name for alias in node.names}
    return {name for name in found if name in RANK or (SOURCE / name).exists() or (SOURCE / f"{name}.py").exists()}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_forward_only(path):
    own = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    assert own in RANK, f"{own} has no place in the house yet: add it to ORDER"
    backward = {name for name in imported(path) if name != own and RANK.get(name, -1) > RANK[own]}
    backward -= AHEAD.get(path.relative_to(SOURCE).as_posix(), set())
    assert not backward, f"{path.name} ({own}) imports {sorted(backward)}, which come after it"


def test_what_is_asked_ahead_never_asks_back():
    asked = {name for names in AHEAD.values() for name in names}
    asking = {path.split("/")[0] for path in AHEAD}
    paths = [path for path in FILES if path.relative_to(SOURCE).parts[0] in asked]
    assert paths
    assert not [path for path in paths if imported(path) & asking]


def test_the_check_sees_a_backward_import(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "SOURCE", tmp_path)
    (tmp_path / "select").mkdir()
    (tmp_path / "trainer.py").touch()
    bad = tmp_path / "select" / "rules.py"
    bad.write_text("from ..trainer import TIPTrainer\n")
    assert imported(bad) == {"trainer"}
