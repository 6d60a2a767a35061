"""What the code points of an emoji say: whom it shows, in which skin, facing where.

A drawing is named by the code points of its emoji, "1F44B-1F3FD" for the waving hand in medium
skin tone. What remains without the skin tone is its base; tone and base are what the benchmark
combines anew in its test queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

TONES = {
    "1F3FB": "light",
    "1F3FC": "medium-light",
    "1F3FD": "medium",
    "1F3FE": "medium-dark",
    "1F3FF": "dark",
}

_PERSONS = {"1F468": "man", "1F469": "woman", "1F9D1": "person"}
_GENDER_MARKS = {"-200D-2642": "man", "-200D-2640": "woman"}
_HAIR = {"1F9B0": "red hair", "1F9B1": "curly hair", "1F9B2": "bald", "1F9B3": "white hair"}
_FACING_RIGHT = "-200D-27A1"
_REGIONAL_A = 0x1F1E6


class Traits(NamedTuple):
    """What an edit may change of a drawing; None or empty where nothing is said."""

    tones: tuple[str, ...]
    gender: str
    hair: str | None
    facing: str


@dataclass(frozen=True, slots=True)
class Sign:
    """An emoji, taken apart."""

    stem: str
    """Its code points in hexadecimal, joined by "-": the name of its drawing's file."""
    base: str
    """Without skin tones."""
    role: str
    """Without anything that `traits` holds."""
    traits: Traits

    @property
    def is_component(self) -> bool:
        """Whether it is no emoji of its own, but a swatch of skin or hair."""
        return self.stem in TONES or self.stem in _HAIR


def read_sign(stem: str) -> Sign:
    """Return what the code points of a drawing say.

    >>> read_sign("1F469-1F3FD-200D-1F373").base
    '1F469-200D-1F373'
    """
    # FE0F asks for colour; whether it is written depends on the presence of a skin tone.
    points = [point for point in stem.split("-") if point != "FE0F"]
    plain = [point for point in points if point not in TONES]
    if not plain:
        return Sign(stem, stem, stem, Traits((), "person", None, "left"))
    tones = tuple(point for point in points if point in TONES)
    # Two people in the same tone are named, and drawn, like two of whom one tone is given.
    tones = tones[:1] if len(set(tones)) == 1 else tones
    base = role = "-".join(plain)
    facing, gender, hair = "left", "person", None
    if role.endswith(_FACING_RIGHT):
        facing, role = "right", role.removesuffix(_FACING_RIGHT)
    for mark, marked in _GENDER_MARKS.items():
        if role.endswith(mark):
            gender, role = marked, role.removesuffix(mark)
    # Of two people, an edit could not say which one it means.
    if plain[0] in _PERSONS and sum(point in _PERSONS for point in plain) == 1:
        gender, role = _PERSONS[plain[0]], role.replace(plain[0], "1F9D1", 1)
        head, _, last = role.rpartition("-200D-")
        if last in _HAIR and head:
            hair, role = _HAIR[last], head
    return Sign(stem, base, role, Traits(tones, gender, hair, facing))


def edit_between(source: Sign, target: Sign) -> str | None:
    """Return the words that ask for the target, given the source.

    None unless the two show the same role, differ in exactly one trait, and that trait can be
    asked for: one skin tone, a gender, a hair, a direction.

    >>> edit_between(read_sign("1F44B"), read_sign("1F44B-1F3FD"))
    'medium skin tone'
    """
    if source.role != target.role or max(len(source.traits.tones), len(target.traits.tones)) > 1:
        return None
    changed = [
        name
        for name in Traits._fields
        if getattr(source.traits, name) != getattr(target.traits, name)
    ]
    if len(changed) != 1:
        return None
    tones, gender, hair, facing = target.traits
    return {
        "tones": f"{TONES[tones[0]]} skin tone" if tones else None,
        "gender": gender,
        "hair": hair,
        "facing": f"facing {facing}",
    }[changed[0]]


def country_code(stem: str) -> str | None:
    """Return the two letters that a flag's code points spell, None if it is no such flag.

    >>> country_code("1F1EB-1F1F7")
    'FR'
    """
    letters = [int(point, 16) - _REGIONAL_A for point in stem.split("-")]
    if len(letters) != 2 or not all(0 <= letter < 26 for letter in letters):
        return None
    return "".join(chr(ord("A") + letter) for letter in letters)
