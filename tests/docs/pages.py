"""The pages of the documentation, and the fenced blocks in them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "launch/README.md")
]
PAGES += sorted((ROOT / "docs").rglob("*.md"))


def name_of(page: Path) -> str:
    """The page's path, as a test's name."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    return [code for fence, code in _fenced(page) if fence == language]


def languages(page: Path) -> set[str]:
    """The names of all fences of a page."""
    return {fence for fence, _ in _fenced(page)}


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


def _fenced(page: Path) -> list[tuple[str, str]]:
    found = re.findall(
        r"^```([^\n]*)\n(.*?)^```$", page.read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    return [(fence.strip(), code) for fence, code in found]
