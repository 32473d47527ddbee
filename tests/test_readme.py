"""What README.md says of the tree is what is on the disk."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def tree_of_readme() -> list[str]:
    """Paths of the tree block: each line is 'name  comment', nested by two spaces."""
    block = re.search(r"```text\n(src/tipdistill/\n.*?)```", README, re.S)
    assert block, "README.md has no file tree"
    paths, parents = [], []
    for line in block.group(1).splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        parents[depth:] = [name]
        paths.append("".join(parents))
    return paths


def test_every_path_of_the_tree_exists():
    missing = [path for path in tree_of_readme() if not (ROOT / path).exists()]
    assert missing == []


def test_every_source_file_is_in_the_tree():
    shown = set(tree_of_readme())
    source = ROOT / "src" / "tipdistill"
    files = [path.relative_to(ROOT).as_posix() for path in source.rglob("*.py") if path.name != "__init__.py"]
    absent = [path for path in files if path not in shown and f"{path.rsplit('/', 1)[0]}/" not in shown]
    assert absent == []
    # a folder stands for its files only where the tree does not open it
    opened = {path.rsplit("/", 1)[0] + "/" for path in shown if path.endswith(".py")}
    assert [path for path in files if path not in shown and f"{path.rsplit('/', 1)[0]}/" in opened] == []


def test_links_lead_somewhere():
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", README) + re.findall(r'src="(?!https?:)([^"]+)"', README)
    assert len(targets) > 5
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_the_result_table_is_the_one_the_demo_wrote():
    written = (ROOT / "docs" / "demo" / "results.md").read_text(encoding="utf-8").strip()
    assert len(written.splitlines()) > 6
    assert written in README
