"""Parse the code points of an emoji: base, skin tones, gender, hair and direction.

A drawing is named by the code points of its emoji, "1F44B-1F3FD" for the waving hand in medium
skin tone. The base is what remains without the skin tones; test queries of the benchmark combine
bases and tones in new ways.
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
    """Traits of a drawing that an edit may change; None or empty if the code does not say."""

    tones: tuple[str, ...]
    gender: str
    hair: str | None
    facing: str


@dataclass(frozen=True, slots=True)
class EmojiCode:
    """The parts of an emoji's code points."""

    stem: str
    """Code points in hexadecimal, joined by "-": the name of the drawing's file."""
    base: str
    """Code points without skin tones."""
    role: str
    """Code points without anything that `traits` holds."""
    traits: Traits

    @property
    def is_component(self) -> bool:
        """Whether it is a swatch of skin or hair, not an emoji of its own."""
        return self.stem in TONES or self.stem in _HAIR


def parse_emoji_code(stem: str) -> EmojiCode:
    """Return the parsed code points of a drawing.

    >>> parse_emoji_code("1F469-1F3FD-200D-1F373").base
    '1F469-200D-1F373'
    """
    # FE0F requests color; whether it is written depends on the presence of a skin tone.
    points = [point for point in stem.split("-") if point != "FE0F"]
    plain = [point for point in points if point not in TONES]
    if not plain:
        return EmojiCode(stem, stem, stem, Traits((), "person", None, "left"))
    tones = tuple(point for point in points if point in TONES)
    # Two people in the same tone have the name and drawing of two people with one tone given.
    tones = tones[:1] if len(set(tones)) == 1 else tones
    base = role = "-".join(plain)
    facing, gender, hair = "left", "person", None
    if role.endswith(_FACING_RIGHT):
        facing, role = "right", role.removesuffix(_FACING_RIGHT)
    for mark, marked in _GENDER_MARKS.items():
        if role.endswith(mark):
            gender, role = marked, role.removesuffix(mark)
    # With two people, an edit could not say which one it means.
    if plain[0] in _PERSONS and sum(point in _PERSONS for point in plain) == 1:
        gender, role = _PERSONS[plain[0]], role.replace(plain[0], "1F9D1", 1)
        head, _, last = role.rpartition("-200D-")
        if last in _HAIR and head:
            hair, role = _HAIR[last], head
    return EmojiCode(stem, base, role, Traits(tones, gender, hair, facing))


def edit_between(source: EmojiCode, target: EmojiCode) -> str | None:
    """Return the words that request the target, given the source.

    Returns None unless both have the same role, differ in exactly one trait, and words exist for
    it: one skin tone, a gender, a kind of hair, a direction.

    >>> edit_between(parse_emoji_code("1F44B"), parse_emoji_code("1F44B-1F3FD"))
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
    """Return the two letters that a flag's code points spell, None if it is not such a flag.

    >>> country_code("1F1EB-1F1F7")
    'FR'
    """
    letters = [int(point, 16) - _REGIONAL_A for point in stem.split("-")]
    if len(letters) != 2 or not all(0 <= letter < 26 for letter in letters):
        return None
    return "".join(chr(ord("A") + letter) for letter in letters)
