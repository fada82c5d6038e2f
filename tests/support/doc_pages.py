"""What README.md and docs/ say, cut into what a test can check: links, headings, blocks of code."""

import re
from pathlib import Path
from typing import NamedTuple

from launching import REPOSITORY

# In front of a block that is not run, with the reason.
_MARK = re.compile(r"<!-- not run: (.*) -->")
_LINK = re.compile(r"\]\(([^)\s]+)\)")


class Block(NamedTuple):
    """language: of the fence. skipped: why it is not run, None where it is."""

    language: str
    text: str
    skipped: str | None


def pages() -> list[Path]:
    """README.md, the pages of docs/, and the README of an example, in which code is run."""
    return [
        REPOSITORY / "README.md",
        *sorted((REPOSITORY / "docs").glob("*.md")),
        REPOSITORY / "examples/plugging_in/README.md",
    ]


def blocks(page: Path, language: str) -> list[Block]:
    found, before = [], ""
    lines = iter(page.read_text().splitlines())
    for line in lines:
        if line.startswith("```"):
            inside = []
            for inner in lines:
                if inner == "```":
                    break
                inside.append(inner)
            mark = _MARK.fullmatch(before)
            found.append(Block(line[3:].strip(), "\n".join(inside) + "\n", mark and mark[1]))
        before = line
    return [block for block in found if block.language == language]


def links(page: Path) -> list[str]:
    """Targets of the links outside of code."""
    return _LINK.findall(_without_code(page.read_text()))


def anchors(page: Path) -> set[str]:
    """Those that GitHub and mkdocs both make of the page's headings."""
    headings = re.findall(r"^#+ (.*)$", _without_code(page.read_text(), inline=False), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def _without_code(text: str, *, inline: bool = True) -> str:
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]+`", "", text) if inline else text
