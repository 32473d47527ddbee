"""How the documents read: lines, lengths, links, and the commands that they show."""

import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from tipdistill.cli import COMMANDS, main

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
# written by a command, or a diary: their links must lead somewhere, their style is their own
OTHERS = sorted([*(ROOT / "dev").glob("*.md"), *(ROOT / "benchmarks").rglob("*.md"), *(ROOT / "docs").glob("*/*.md")])
LINE = 100
NUMBERS = 3
LENGTHS = {"README.md": 120, "architecture.md": 150, "replication.md": 150}
# a builder's words, which tell a reader nothing; and names of variables that say nothing of what they hold
OWN_WORDS = re.compile(r"\b(?:the|this) house\b", re.IGNORECASE)
CATCH_ALLS = re.compile(r"^\s*(?:for )?(?:found|one|held)\b\s*(?:=[^=]|in\b)", re.M)
_FENCE = re.compile(r"^```.*?^```$", re.M | re.S)


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def text_of(path):
    return path.read_text(encoding="utf-8")


def prose(text: str) -> str:
    """The text without code, tables and what a command wrote under these; as many lines as before."""

    def blank(match):
        return "\n" * match[0].count("\n")

    lines = _FENCE.sub(blank, re.sub(r"<!--.*?-->", blank, text, flags=re.S)).split("\n")
    lines = ["" if re.match(r"\*.*\.json\]\(.*\)\*$", line) else line for line in lines]
    return "\n".join("" if line.startswith(("    ", "|")) and not _in_a_list(line) else line for line in lines)


def _in_a_list(line: str) -> bool:
    return bool(re.match(r" {4,}([-*]|\d+\.) ", line))


def without_targets(line: str) -> str:
    return re.sub(r"\]\([^)]*\)", "]()", line)


def paragraphs(text: str) -> list[str]:
    """Paragraphs and list items of the prose, each in one line."""
    pieces = re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )|\n(?=#)", prose(text))
    return [" ".join(piece.split()) for piece in pieces if piece.strip()]


def numbers(paragraph: str) -> list[str]:
    """What a reader has to take in as a figure.

    Not code, names (Q3, bf16, "Soft-OR at 50 %"), versions, references, list numbers, nor the numbers of a formula.
    """
    plain = re.sub(r"`[^`]*`|<[^>]*>", "", re.sub(r"\]\([^)]*\)", "]", re.sub(r"^\d+\. ", "", paragraph)))
    versions = (
        r"(?:Python|TRL|transformers|torch|vLLM|verl|Chrome|Firefox|Safari|arXiv|Tables?|[Cc]laims?|Eq\.|AIME|ZeRO) ?"
    )
    plain = re.sub(rf"{versions}[\d.]+(?:(?: to | and |, )\d[\d.]*)*", "", plain)
    plain = re.sub(
        r"[\[(]0, 1[\])]|(?<= at )\d+ %(?= (?:beats|nearly|matches|than|is)|;|\.|,)|than at \d+ %", "", plain
    )
    plain = re.sub(r"\d[\d.]*(?= ?[−+·=/⌋]| likeliest)|(?<=[−+·=⌊])\s?\d[\d.]*|(?<=max\()\d", "", plain)
    return re.findall(r"(?<![\w.\-])\d[\d,.]*\d|(?<![\w.\-])\d(?![\w\-])", plain)


def test_figures_are_counted_and_names_are_not():
    assert numbers("It took 34 s, 39 s at first, 12 % more and 0.47 of the time") == ["34", "39", "12", "0.47"]
    assert numbers("Soft-OR at 50 % beats it; scaled to [0, 1], torch 2.13 keeps max(1, ⌊ρ·m⌋) of 1 − ρ") == []


def headings(text: str) -> set[str]:
    """Anchors of a page, as GitHub makes them."""
    anchors: list[str] = []
    for title in re.findall(r"^#+ (.+?)\s*$", _FENCE.sub("", text), re.M):
        title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        anchors.append(re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-"))
    return set(anchors)


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_lines_are_wrapped(path):
    """But for tables, code, HTML, and what a link's address adds."""
    long = [
        f"{number}: {line[:60]}…"
        for number, line in enumerate(prose(text_of(path)).split("\n"), start=1)
        if len(without_targets(line)) > LINE and not line.lstrip().startswith(("<", "!["))
    ]
    assert long == []


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_no_paragraph_has_more_than_three_numbers(path):
    crowded = {piece[:60]: numbers(piece) for piece in paragraphs(text_of(path)) if len(numbers(piece)) > NUMBERS}
    assert crowded == {}


def test_code_tables_and_what_is_written_under_them_are_no_prose():
    page = "text\n\n    code\n\n```python\ncode\n```\n\n| a | b |\n\n*torch 2; [a.json](../a.json)*\n  - item"
    assert prose(page).split() == ["text", "-", "item"]
    assert prose(page).count("\n") == page.count("\n")
    assert headings("# A `b` c!\n\n```\n# no\n```\n## Q1 to [Q4](x.md)\n") == {"a-b-c", "q1-to-q4"}


def test_numbers_are_told_from_names():
    assert numbers("With TRL 1.16 and `k=5`, Q3 at 10 % has 0.87 (arXiv 2604.14084)") == ["10", "0.87"]
    assert paragraphs("one\ntwo\n\n- three\n  four\n- five\n\n    code 1\n") == ["one two", "- three four", "- five"]


@pytest.mark.parametrize("path", [path for path in PAGES if path.name in LENGTHS], ids=name_of)
def test_no_page_is_longer_than_it_may_be(path):
    assert len(text_of(path).splitlines()) <= LENGTHS[path.name]


@pytest.mark.parametrize("path", [*PAGES, *OTHERS], ids=name_of)
def test_links_lead_somewhere(path):
    text = re.sub(r"`[^`\n]*`", "", _FENCE.sub("", text_of(path)))
    addresses = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    broken = []
    for address in addresses:
        if re.match(r"[a-z]+:", address):
            continue
        file, _, anchor = address.partition("#")
        target = path.parent / file if file else path
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in headings(text_of(target))):
            broken.append(address)
    assert broken == []


def test_every_page_of_docs_is_linked_from_readme():
    linked = set(re.findall(r"\]\((docs/\w+\.md)", text_of(ROOT / "README.md")))
    assert {name_of(path) for path in (ROOT / "docs").glob("*.md")} == linked


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_words_and_names_are_a_readers(path):
    text = text_of(path)
    assert OWN_WORDS.findall(prose(text)) == []
    assert CATCH_ALLS.findall("".join(_FENCE.findall(text))) == []


# The commands.


def commands(text: str) -> list[list[str]]:
    """Each `tipdistill COMMAND ...` of code blocks and of inline code, as words."""
    fences = [block.partition("\n") for block in _FENCE.findall(text)]
    blocks = [body for info, _, body in fences if info.removeprefix("```") in ("", "sh", "bash", "console", "text")]
    blocks.append("\n".join(line for line in _FENCE.sub("", text).split("\n") if line.startswith("    ")))
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", _FENCE.sub("", text))]
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", " ", block).split("\n")]
    started = re.compile(r"(?:^|\s)(?:tipdistill|-m tipdistill\.cli) (?=[a-z])(.*)")
    inline = re.compile(r"^(?:python )?(?:tipdistill|-m tipdistill\.cli) (?=[a-z])(.*)")
    matches = [*map(started.search, lines), *map(inline.search, spans)]
    return [shlex.split(match[1], comments=True) for match in matches if match]


@cache
def help_of(command: str) -> str:
    import io
    from contextlib import redirect_stdout, suppress

    said = io.StringIO()
    with redirect_stdout(said), suppress(SystemExit):
        main([command, "--help", *(["all"] if command == "train" else [])])
    return said.getvalue()


def flags_of(command: str) -> set[str]:
    takes_fields = ("train",) if command in ("train", "plan") else ()
    return {flag for name in (command, *takes_fields) for flag in re.findall(r"--[\w-]+", help_of(name))}


def test_the_commands_of_a_text_are_read():
    text = (
        "`tipdistill report D`\n\n    tipdistill score --model S \\\n        --dataset D   # all\n\n"
        "```sh\ntorchrun -m tipdistill.cli train --config laptop\n```\n"
        "```python\nimport tipdistill as tip\n```\n\nno `import tipdistill as tip`\n"
    )
    assert sorted(words[0] for words in commands(text)) == ["report", "score", "train"]
    assert ["score", "--model", "S", "--dataset", "D"] in commands(text)
    assert {"--dataset", "--max_prompts"} <= flags_of("score")
    assert {"--retention", "--gpus"} <= flags_of("plan")


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_command_that_is_shown_exists_with_its_flags(path):
    if path.name == "CHANGELOG.md":  # which tells of commands that are gone
        pytest.skip("a changelog names what was removed")
    wrong = []
    for words in commands(text_of(path)):
        if words[0] not in COMMANDS:
            wrong.append(f"tipdistill {words[0]}")
            continue
        flags = [word.partition("=")[0] for word in words[1:] if word.startswith("--")]
        # of fsdp2|zero2 and the like the flag alone matters
        wrong += [f"{words[0]} {flag}" for flag in flags if flag not in flags_of(words[0])]
    assert wrong == []


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_module_and_make_target_that_is_shown_exists(path):
    text = text_of(path)
    modules = set(re.findall(r"python -m ((?:benchmarks|tipdistill)[\w.]*)", text))
    missing = []
    for module in modules:
        place = ROOT / ("src" if module.startswith("tipdistill") else "") / module.replace(".", "/")
        if not (place.with_suffix(".py").is_file() or (place / "__main__.py").is_file()):
            missing.append(module)
    targets = set(re.findall(r"^([\w-]+):", text_of(ROOT / "Makefile"), re.M))
    shown = set(re.findall(r"`make ([\w-]+)", text)) | set(re.findall(r"^    make ([\w-]+)", text, re.M))
    assert missing + sorted(shown - targets) == []
