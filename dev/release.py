"""A release: `python dev/release.py --repository https://github.com/OWNER/tipdistill` writes dist/.

It is built from a copy of what is committed. Its metadata have the project's addresses, and a README whose links are
absolute, so that an index can show it; README.md itself stays as it is. Nothing is uploaded.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tarfile
import tempfile
from io import BytesIO
from pathlib import Path

ROOT = Path(__file__).parents[1]
_IMAGES = (".png", ".svg")
_SHOWN = "dev/README-absolute.md"  # what an index shows


def main() -> None:
    """Check the version, copy, rewrite, build."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", required=True, help="its address, such as https://github.com/OWNER/tipdistill")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "dist", help="where sdist and wheel go")
    options = parser.parse_args()
    repository = options.repository.rstrip("/")
    if not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", repository):
        parser.error(f"--repository must be https://github.com/OWNER/NAME, got {options.repository}")
    version = check_version(
        (ROOT / "pyproject.toml").read_text(encoding="utf-8"),
        (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
        (ROOT / "CITATION.cff").read_text(encoding="utf-8"),
    )
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / "tipdistill"
        archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, check=True, capture_output=True).stdout
        with tarfile.open(fileobj=BytesIO(archive)) as files:
            files.extractall(copy, filter="data")
        shown = absolute((copy / "README.md").read_text(encoding="utf-8"), repository, f"v{version}")
        (copy / _SHOWN).write_text(shown, encoding="utf-8")
        project = copy / "pyproject.toml"
        project.write_text(with_urls(project.read_text(encoding="utf-8"), repository, version), encoding="utf-8")
        build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(options.output_dir.absolute()), copy]
        subprocess.run(build, check=True)


def check_version(project: str, changelog: str, citation: str) -> str:
    """The version that pyproject.toml, CITATION.cff and the newest, dated heading of CHANGELOG.md agree on.

    Raises:
        ValueError: they do not, or the heading has no date.
    """
    versions = {
        "pyproject.toml": _first(r'^version = "(.+)"$', project),
        "CITATION.cff": _first(r"^version: (.+)$", citation),
        "CHANGELOG.md": _first(r"^## (\S+) \(\d{4}-\d\d-\d\d\)$", changelog),
    }
    newest = _first(r"^## (.+)$", changelog)
    if len(set(versions.values())) > 1 or not newest.startswith(f"{versions['CHANGELOG.md']} ("):
        raise ValueError(f"a release has one version and a dated heading: {versions}, newest heading {newest!r}")
    return versions["pyproject.toml"]


def absolute(readme: str, repository: str, tag: str) -> str:
    """README with its relative links made absolute: to the files of a tag, images to their bytes."""

    def led(match: re.Match[str]) -> str:
        before, address, after = (part for part in match.groups() if part is not None)
        if re.match(r"[a-z]+:|#", address):
            return match[0]
        base = repository.replace("//github.com", "//raw.githubusercontent.com") if _is_image(address) else repository
        kind = "" if _is_image(address) else "/blob"
        return f"{before}{base}{kind}/{tag}/{address}{after}"

    return re.sub(r"(\]\()([^)\s]+)(\))|((?:src|href)=\")([^\"]+)(\")", led, readme)


def with_urls(project: str, repository: str, version: str) -> str:
    """pyproject.toml with the project's addresses beside the paper's, and the README that an index shows."""
    table, readme = "[project.urls]\n", 'readme = "README.md"\n'
    assert table in project
    assert readme in project
    project = project.replace(readme, f'readme = "{_SHOWN}"\n')
    urls = {
        "Repository": repository,
        "Issues": f"{repository}/issues",
        "Changelog": f"{repository}/blob/v{version}/CHANGELOG.md",
    }
    return project.replace(table, table + "".join(f'{name} = "{url}"\n' for name, url in urls.items()))


def _is_image(address: str) -> bool:
    return address.endswith(_IMAGES)


def _first(pattern: str, text: str) -> str:
    match = re.search(pattern, text, re.M)
    return match[1] if match else ""


if __name__ == "__main__":
    main()
