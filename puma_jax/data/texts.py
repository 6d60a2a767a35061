"""The text of an item as the model reads it, with nothing but the standard library."""

from __future__ import annotations


def normalize_text(text: str | None) -> str:
    """Return a text trimmed and capitalized, with a full stop at its end.

    >>> normalize_text(' "a red bicycle" ')
    'A red bicycle.'
    """
    text = (text or "").replace("\r", "").strip().strip('"')
    if not text:
        return ""
    text = text[0].upper() + text[1:]
    return text if text.endswith((".", "?", "!")) else text + "."


def is_blank(text: str | None) -> bool:
    """Return whether a text holds nothing but white space and double quotes.

    >>> is_blank(' "" ')
    True
    """
    return all(sign == '"' or sign.isspace() for sign in text or "")
