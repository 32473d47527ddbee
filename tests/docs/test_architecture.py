"""docs/architecture.md: its tree is what is on the disk, and the files it sends a reader to are there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "tipdistill"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def tree(text: str) -> dict[str, str]:
    """Path → comment of the tree block: each line is 'name  comment', nested by two spaces."""
    block = re.search(r"```text\n(src/tipdistill/\n.*?)```", text, re.S)
    assert block, "docs/architecture.md has no tree"
    comments, parents = {}, []
    for line in filter(str.strip, block[1].splitlines()):
        name, _, comment = line.strip().partition(" ")
        parents[(len(line) - len(line.lstrip())) // 2 :] = [name]
        comments["".join(parents)] = comment.strip()
    return comments


TREE = tree(PAGE)


def test_the_tree_is_read():
    assert tree("```text\nsrc/tipdistill/\n  a/   some\n    b.py  thing\n\nc/  other\n```") == {
        "src/tipdistill/": "",
        "src/tipdistill/a/": "some",
        "src/tipdistill/a/b.py": "thing",
        "c/": "other",
    }


def test_every_path_of_the_tree_exists():
    missing = [path for path in TREE if not ((ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file())]
    assert missing == []


def test_every_path_has_its_comment():
    assert [path for path, comment in TREE.items() if not comment] == ["src/tipdistill/"]


def test_every_source_file_is_in_the_tree():
    """By itself, or by its folder where the tree does not open that."""
    opened = {path.rsplit("/", 1)[0] + "/" for path in TREE if path.endswith(".py")}
    closed = {path for path in TREE if path.endswith("/")} - opened
    files = [path.relative_to(ROOT).as_posix() for path in SOURCE.rglob("*.py") if path.name != "__init__.py"]
    assert [file for file in files if file not in TREE and not any(file.startswith(folder) for folder in closed)] == []


def test_the_folders_of_the_repository_are_in_the_tree():
    generated = {"build", "dist", "runs"}
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith((".", "__"))}
    folders -= generated
    assert {f"{name}/" for name in folders - {"src"}} == {path for path in TREE if not path.startswith("src/")}


def test_where_to_change_what_names_one_or_two_files_that_exist():
    table = re.search(r"^\| I want to add \|.*?\n\n?((?:^\|.*\n?)+)", PAGE, re.M | re.S)
    assert table
    rows = [line.split("|")[2] for line in table[1].splitlines() if line.startswith("| ") and "---" not in line]
    assert len(rows) >= 6
    for row in rows:
        named = re.findall(r"`((?:\w+/)+(?:\w+\.py)?|\w+\.py)`", row)
        pages = re.findall(r"\]\((\w+\.md)\)", row)
        assert [name for name in named if not (SOURCE / name).exists()] == [], row
        assert len(named) <= 2, row
        assert named or pages, row


def test_every_file_that_the_text_names_is_there():
    text = re.sub(r"```.*?```", "", PAGE, flags=re.S)
    named = set(re.findall(r"`((?:\w+/)*\w+\.py)`", text))
    assert len(named) > 8
    assert [name for name in sorted(named) if not (SOURCE / name).is_file()] == []
