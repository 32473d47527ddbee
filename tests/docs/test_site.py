"""The documentation as a site: it is built without a warning, and every link on every page leads somewhere."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

import tipdistill
from tipdistill.cli import COMMANDS
from tipdistill.recipes import recipe_names
from tipdistill.recipes.fields import read_fields

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    there = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", there],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert built.returncode == 0, built.stdout + built.stderr  # --strict: a warning is an error
    return there


class Page(HTMLParser):
    """Anchors, links and words of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.anchors |= {value for name, value in attrs if name in ("id", "name") and value}
        if tag in ("a", "link"):
            self.links += [values["href"]] if values.get("href") else []
        if tag in ("img", "script"):
            self.links += [values["src"]] if values.get("src") else []


def test_every_link_leads_to_a_page_a_file_or_an_anchor(site):
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html") if path.name != "404.html"}
    assert len(pages) > 25
    broken = []
    for path, page in pages.items():
        for link in page.links:
            if re.match(r"[a-z]+:", link):
                continue
            file, _, anchor = unquote(link).partition("#")
            target = (path.parent / file).resolve() if file else path
            if target.is_dir():
                target /= "index.html"
            if not target.is_file() or (anchor and target in pages and anchor not in pages[target].anchors):
                broken.append(f"{path.relative_to(site)}: {link}")
    assert broken == []


def test_nothing_is_loaded_from_elsewhere(site):
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img)[^>]*\bsrc="(https?:[^"]+)', text)
        loaded += re.findall(r'<link[^>]*rel="(?:stylesheet|preload|preconnect)"[^>]*href="(https?:[^"]+)', text)
        assert loaded == [], path


def test_the_reference_has_every_command_field_recipe_and_public_name(site):
    def anchors(name: str) -> set[str]:
        return Page((site / "reference" / f"{name}.html").read_text(encoding="utf-8")).anchors

    assert set(COMMANDS) <= anchors("commands")
    assert {name.replace(".", "") for name in recipe_names()} <= anchors("recipes")
    fields = (site / "reference" / "fields.html").read_text(encoding="utf-8")
    assert [name for name in read_fields() if f"<code>{name}</code>" not in fields] == []
    public = {f"tipdistill.{name}" for name in tipdistill.__all__} - {"tipdistill.__version__", "tipdistill.RULES"}
    public = (public - {"tipdistill.select"}) | {"tipdistill.select.select"}  # the function, not the stage of its name
    assert public <= anchors("python")
    text = (site / "reference" / "python.html").read_text(encoding="utf-8")
    assert "Choose the tokens that are trained on" in text


def test_every_table_and_list_of_a_page_becomes_one(site):
    """Python-Markdown wants a blank line before them, where GitHub does not."""
    for path in site.rglob("*.html"):
        text = re.sub(r"<pre.*?</pre>|<code.*?</code>", "", path.read_text(encoding="utf-8"), flags=re.S)
        paragraphs = re.findall(r"<p>(.*?)</p>", text, re.S)
        raw = [piece[:80] for piece in paragraphs if re.search(r"^(?:[-*] |\d+\. |\|.*\|$)", piece, re.M)]
        assert raw == [], path.relative_to(site)
