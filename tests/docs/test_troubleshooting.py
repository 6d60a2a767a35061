"""The messages that the page on troubleshooting quotes are those that the code raises."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import puma_jax

ROOT = Path(puma_jax.__file__).parent
PAGE = ROOT.parent / "docs/troubleshooting.md"


def templates() -> Iterator[list[str]]:
    """Yield the texts of the package, each as its pieces between the values it puts in."""
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield [str(part.value) for part in node.values if isinstance(part, ast.Constant)]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield [node.value]


def is_said_by(message: str, pieces: list[str]) -> bool:
    """Whether a template gives a message, or one that begins like it."""
    at, fixed = 0, 0
    for piece in pieces:
        piece = piece if at else piece.lstrip()
        found = message.find(piece, at)
        if found < 0:
            ends = [n for n in range(len(piece), 4, -1) if message.endswith(piece[:n])]
            return bool(ends) and fixed + ends[0] > 9
        at, fixed = found + len(piece), fixed + len(piece)
    return fixed > 9 and len(message[at:].split()) <= 6


def test_quoted_messages_are_raised():
    terms = re.findall(r"^(`.+`)\n:   ", PAGE.read_text("utf-8"), re.MULTILINE)
    messages = [message.strip(". ") for term in terms for message in re.findall("`([^`]+)`", term)]
    known = [pieces for pieces in templates() if pieces]
    said = {message: any(is_said_by(message, pieces) for pieces in known) for message in messages}
    assert len(messages) > 15
    assert not [message for message in messages if not said[message]]
