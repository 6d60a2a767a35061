"""Further fields of items, which are kept beside the vectors and which filters can name."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from puma_jax.errors import DataError
from puma_jax.schema import shown

Scalar = str | bool | int | float
FieldValue = Scalar | list[Scalar]

ITEM_FIELDS = ("id", "text", "image")
"""Fields that say what an item is; all others are further fields."""

_SIMILAR = 0.8
_ABBREVIATIONS = {"img": "image", "pic": "image"}
_INTEGERS = range(-(2**63), 2**63)
_LONGEST_NAME = 200


def read_fields(fields: Mapping[str, Any], missing: Sequence[str]) -> dict[str, FieldValue]:
    """Return further fields of an item: texts, numbers, true or false, and lists of these.

    Fields that are null are left out.

    Args:
        fields: What the item holds besides its id, text and image.
        missing: Names of those three that it lacks.

    Raises:
        DataError: A field holds something else, or its name looks like a misspelling of one that
            is missing.
    """
    for name, value in fields.items():
        meant = _meant(name, tuple(missing))
        if meant is not None and value is not None:
            raise DataError(
                f"field {shown(name)} looks like {meant}, which is missing: name it {meant}, or "
                "otherwise if it is another thing"
            )
        check_field(name, value)
    return {name: value for name, value in fields.items() if value is not None}


@functools.lru_cache(1024)
def _meant(name: str, missing: tuple[str, ...]) -> str | None:
    """Return which of some missing names a field looks like; None if it looks like none."""
    close = get_close_matches(name.lower(), missing, n=1, cutoff=_SIMILAR)
    meant = close[0] if close else _ABBREVIATIONS.get(name.lower())
    return meant if meant in missing else None


def check_field(name: str, value: Any) -> None:
    """Refuse a further field that stores cannot hold.

    Raises:
        DataError: Its name is empty or too long, or its value is of another kind.
    """
    if not 0 < len(name) <= _LONGEST_NAME or not _is_text(name):
        raise DataError(
            f"a field is named {shown(name)}, expected 1 to {_LONGEST_NAME} characters of Unicode"
        )
    values = value if isinstance(value, list) else [value]
    for one in values:
        if (one is None and one is value) or _is_scalar(one):
            continue
        raise DataError(
            f"field {shown(name)} holds {shown(one)}, expected a text, a number of 64 bits, "
            "true or false, or a list of these"
        )


def _is_scalar(value: Any) -> bool:
    if isinstance(value, bool):
        return True
    if isinstance(value, str):
        return _is_text(value)
    if isinstance(value, int):
        return value in _INTEGERS
    return isinstance(value, float) and math.isfinite(value)


def _is_text(value: str) -> bool:
    """Whether a text can be encoded: lone surrogates cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
