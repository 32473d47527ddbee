"""mkdocs's hook: adds to docs/ what the site shows besides, and leads links there.

- README, CONTRIBUTING, CHANGELOG, SECURITY, the log and the tables of the benchmarks, which lie outside docs/;
- files that a page links to, such as a benchmark's JSON or a source file, as downloads;
- the reference, written from the code: commands (`--help`), fields of a recipe (schema.json), recipes, public names.
"""

from __future__ import annotations

import io
import os
import re
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# a page outside docs/ → its place in the site
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "reporting.md",
    "dev/LOG.md": "log.md",
    "benchmarks/results/engine.md": "results/engine.md",
    "benchmarks/results/plan.md": "results/plan.md",
    "benchmarks/results/replication.md": "results/replication.md",
}
_CODE = re.compile(r"^```[\s\S]*?^```$|^(?: {4}|\t).*$|`[^`\n]*`", re.M)
_LINK = re.compile(r"(\]\()([^)\s]+)(\))|((?:src|href)=\")([^\"]+)(\")")


class Examples(griffe.Extension):
    """Our docstrings say `Example:`, and griffe knows doctests under `Examples:` alone."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename the section of one docstring."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.M)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages outside docs/, the files that any page links to, and the reference."""
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")} | PAGES.keys()
    for source in PAGES:
        files.append(File.generated(config, PAGES[source], content=(ROOT / source).read_text(encoding="utf-8")))
    downloads: set[Path] = set()
    for source in sorted(_linked(sources) - sources):
        path = ROOT / source
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
            lines = [f"- [{file.relative_to(path).as_posix()}]({file.relative_to(path).as_posix()})" for file in inside]
            listing = f"# {source}\n\n" + "\n".join(lines) + "\n"
            files.append(File.generated(config, _place(source), content=listing))
            downloads |= set(inside)
        elif not source.startswith("docs/"):
            downloads.add(path)
    for path in sorted(downloads):
        files.append(File.generated(config, _place(path.relative_to(ROOT).as_posix()), abs_src_path=str(path)))
    for name, text in reference().items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Lead each link to where its target lies in the site."""
    place = page.file.src_uri
    source = next((path for path, there in PAGES.items() if there == place), f"docs/{place}")
    if not (ROOT / source).is_file():  # a listing, or a page of the reference
        return markdown
    code: list[str] = []

    def aside(match: re.Match[str]) -> str:
        code.append(match[0])
        return f"\0{len(code) - 1}\0"

    def led(match: re.Match[str]) -> str:
        before, address, after = (part for part in match.groups() if part is not None)
        target, anchor = _target(source, address)
        if target is None:
            return match[0]
        there = os.path.relpath(_place(target), Path(place).parent)
        return f"{before}{Path(there).as_posix()}{anchor}{after}"

    text = _LINK.sub(led, _CODE.sub(aside, markdown))
    return re.sub(r"\0(\d+)\0", lambda match: code[int(match[1])], text)


def reference() -> dict[str, str]:
    """The pages that are written from the code: name → Markdown."""
    return {"commands": _commands(), "fields": _fields(), "recipes": _recipes(), "python": _python()}


def _linked(sources: set[str]) -> set[str]:
    """What the pages link to inside the project, as paths from its root."""
    linked = set()
    for source in sources:
        text = _CODE.sub("", (ROOT / source).read_text(encoding="utf-8"))
        targets = (_target(source, match[2] or match[5])[0] for match in _LINK.finditer(text))
        linked |= {target for target in targets if target}
    return linked


def _target(source: str, address: str) -> tuple[str | None, str]:
    """Where a link of a page leads, from the project's root, and its #anchor; None for an address on the web."""
    file, mark, anchor = address.partition("#")
    if not file or re.match(r"[a-z]+:", address):
        return None, ""
    return os.path.normpath(Path(source).parent / file), mark + anchor


def _place(target: str) -> str:
    """The place in the site of a path of the project."""
    if target in PAGES:
        return PAGES[target]
    if (ROOT / target).is_dir():
        return f"files/{target}/index.md"
    return target.removeprefix("docs/") if target.startswith("docs/") else f"files/{target}"


def _commands() -> str:
    from tipdistill.cli import COMMANDS, main

    parts = ["# Commands\n\nWhat `tipdistill COMMAND --help` prints.\n"]
    for command, (_, summary) in COMMANDS.items():
        said = io.StringIO()
        with redirect_stdout(said), suppress(SystemExit):
            main([command, "--help"])
        text = re.sub(r"\x1b\[[\d;]*m", "", said.getvalue())
        parts.append(f"## {command}\n\n{summary[:1].upper()}{summary[1:]}.\n\n```text\n{text.rstrip()}\n```\n")
    return "\n".join(parts)


def _fields() -> str:
    from tipdistill.recipes.fields import SECTIONS, read_fields

    fields = read_fields()
    shown = {name for names in SECTIONS.values() for name in names}
    rest = tuple(name for name in sorted(fields) if name not in shown)
    parts = [
        "# Fields of a recipe\n\nEach stands in a recipe as `field: value`, and on the command line as "
        "`--field value`. They are the fields of `TIPConfig`, and of the script that `tipdistill train` runs.\n"
    ]
    for title, names in {**SECTIONS, "further fields of TRL's and Trainer's": rest}.items():
        rows = [f"| `{name}` | {_cell(fields[name])} | {_in_cell(fields[name]['description'])} |" for name in names]
        heading = title[:1].upper() + title[1:]
        parts.append(f"## {heading}\n\n| field | default | |\n| --- | --- | --- |\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def _cell(field: dict[str, Any]) -> str:
    default = field.get("default")
    return "" if default in (None, "") else f"`{default}`"


def _in_cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _recipes() -> str:
    from tipdistill.recipes import recipe_head, recipe_names, recipe_path

    parts = ["# Recipes\n\n`tipdistill train --config NAME` runs one; any field can be overridden by a flag.\n"]
    for name in recipe_names():
        summary, _ = recipe_head(recipe_path(name))
        text = recipe_path(name).read_text(encoding="utf-8").rstrip()
        parts.append(f"## {name}\n\n{summary}\n\n```yaml\n{text}\n```\n")
    return "\n".join(parts)


def _python() -> str:
    import tipdistill

    names = [name for name in tipdistill.__all__ if name not in ("__version__", "RULES", "evaluate", "tasks")]
    rules = ", ".join(f"`{name}`" for name in tipdistill.RULES)
    parts = [
        "# Python\n\nThe public names, in the order of their use: score, select, loss, then what is built on them.\n",
        # the function, and not the stage of its name
        *(f"::: tipdistill.{_PATHS.get(name, name)}\n" for name in sorted(names, key=_ORDER.index)),
        f"## RULES\n\nThe names of the rules: {rules}. [What each does](../rules.md).\n",
        "::: tipdistill.evaluate\n    options: {members: true, show_submodules: false}\n",
        "::: tipdistill.tasks\n    options: {members: true, show_submodules: false}\n",
    ]
    return "\n".join(parts)


_PATHS = {"select": "select.select"}
_ORDER = (
    *("Head", "token_scores", "TokenScores", "select", "Selection", "selected_loss", "fused_divergence_loss"),
    *("quadrants", "tip_map", "TIPConfig", "TIPTrainer"),
)
