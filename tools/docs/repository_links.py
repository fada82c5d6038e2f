"""A hook of mkdocs: files outside of docs/ that a page links to are part of the site, and README.md is its first page.

A page's links are those of the repository, so that they work wherever its files are shown. The site has the same tree,
but docs/ is its root.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
FRONT, INDEX = "README.md", "index.md"
PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/REPORT.md")
# Code, in which brackets are no links; or a link's target without its anchor.
_CODE_OR_LINK = re.compile(r"^```.*?^```|`[^`\n]+`|(?<=\]\()(?P<target>[^)\s#]+)(?=[#)])", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config) -> Files:
    """Add the first page, PAGES and whatever these and the pages of docs/ link to."""
    docs = Path(config.docs_dir)
    unread = [FRONT, *PAGES, *(path.relative_to(ROOT).as_posix() for path in docs.rglob("*.md"))]
    seen = set(unread)
    while unread:
        name = unread.pop()
        if files.get_file_from_path(_site_path(name)) is None:
            files.append(File.generated(config, _site_path(name), abs_src_path=str(ROOT / name)))
        if name.endswith(".md"):
            found = {_resolved(name, target) for target in _targets((ROOT / name).read_text())}
            new = {other for other in found if (ROOT / other).is_file()} - seen
            unread += sorted(new)
            seen |= new
    return files


def on_page_markdown(markdown: str, page, **others) -> str:
    """Turn the repository's links into those of the site. What is not there stays as it is, for mkdocs to complain."""
    site = page.file.src_uri
    name = FRONT if site == INDEX else site if (ROOT / site).is_file() else f"docs/{site}"

    def moved(target: str) -> str:
        resolved = _resolved(name, target)
        if not (ROOT / resolved).exists():
            return target
        return posixpath.relpath(_site_path(resolved), posixpath.dirname(site) or ".")

    return _replaced(markdown, moved)


def _site_path(name: str) -> str:
    return INDEX if name == FRONT else name.removeprefix("docs/")


def _resolved(name: str, target: str) -> str:
    return os.path.normpath(os.path.join(os.path.dirname(name), target))


def _targets(text: str) -> list[str]:
    found = []
    _replaced(text, lambda target: found.append(target) or target)
    return found


def _replaced(text: str, change: Callable[[str], str]) -> str:
    """The text with the target of each link to a file changed."""

    def one(match: re.Match) -> str:
        target = match["target"]
        return match[0] if target is None or "://" in target else change(target)

    return _CODE_OR_LINK.sub(one, text)
