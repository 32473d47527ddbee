"""A release: one version, a dated changelog, a README that an index can show, and a whole source distribution."""

import importlib.util
import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REPOSITORY = "https://github.com/someone/tipdistill"


@pytest.fixture(scope="module")
def release():
    spec = importlib.util.spec_from_file_location("release", ROOT / "dev" / "release.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_version_and_date_are_one(release):
    version = release.check_version(read("pyproject.toml"), read("CHANGELOG.md"), read("CITATION.cff"))
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)


@pytest.mark.parametrize(
    ("changelog", "citation"),
    [
        ("## Unreleased\n\n## 1.2.0 (2026-01-02)\n", "version: 1.2.0\n"),
        ("## 1.2.0\n", "version: 1.2.0\n"),
        ("## 1.2.0 (2026-01-02)\n", "version: 1.1.0\n"),
    ],
)
def test_what_is_not_ready_is_refused(release, changelog, citation):
    with pytest.raises(ValueError, match="one version and a dated heading"):
        release.check_version('version = "1.2.0"\n', changelog, citation)


def test_links_become_absolute(release):
    text = '[a](docs/a.md#b) [w](https://x.org) [c](#here) ![p](docs/p.png) <img src="docs/q.svg" alt="q">'
    assert release.absolute(text, REPOSITORY, "v1.2.0") == (
        "[a](https://github.com/someone/tipdistill/blob/v1.2.0/docs/a.md#b) [w](https://x.org) [c](#here) "
        "![p](https://raw.githubusercontent.com/someone/tipdistill/v1.2.0/docs/p.png) "
        '<img src="https://raw.githubusercontent.com/someone/tipdistill/v1.2.0/docs/q.svg" alt="q">'
    )


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="a release is built from a checkout")
def test_what_is_built_is_whole_and_its_readme_leads_somewhere(tmp_path):
    command = [sys.executable, ROOT / "dev" / "release.py", "--repository", REPOSITORY, "--output_dir", tmp_path]
    built = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    (sdist,), (wheel,) = tmp_path.glob("*.tar.gz"), tmp_path.glob("*.whl")
    with tarfile.open(sdist) as files:
        inside = {name.partition("/")[2] for name in files.getnames()}
        (readme,) = (name for name in files.getnames() if name.count("/") == 1 and name.endswith("/README.md"))
        assert files.extractfile(readme).read() == (ROOT / "README.md").read_bytes()
    committed = subprocess.run(
        ["git", "ls-tree", "-r", "--name-only", "-z", "HEAD"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert set(committed.stdout.strip("\0").split("\0")) - inside == set()
    with zipfile.ZipFile(wheel) as files:
        (name,) = (name for name in files.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = message_from_bytes(files.read(name))
        modules = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src").rglob("*.py")}
        assert modules - set(files.namelist()) == set()
    urls = dict(value.split(", ") for value in metadata.get_all("Project-URL"))
    assert {"Paper", "Repository", "Issues", "Changelog"} <= set(urls)
    assert metadata["Author"] == "The tipdistill contributors"
    text = metadata.get_payload()
    addresses = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    assert len(addresses) > 20
    assert [address for address in addresses if not address.startswith("https://")] == []
