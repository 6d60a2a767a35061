"""The concepts behind the drawings, with their splits, and the documents of the pools."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from puma_jax.data.demo.pictures import look_alikes
from puma_jax.data.demo.split import Split, connected, split_by_fraction
from puma_jax.data.mbeir import Candidate
from puma_jax.data.openmoji.countries import FACTS, Country
from puma_jax.data.openmoji.drawings import has_ink
from puma_jax.data.openmoji.emoji_codes import EmojiCode, country_code, parse_emoji_code
from puma_jax.data.openmoji.names import Names
from puma_jax.typing import UInt8, ndarray

DATASET = "openmoji"
DATASET_ID = "10"  # M-BEIR's own are 0 to 9


@dataclass(frozen=True, slots=True)
class Concept:
    """An emoji: its code points, its names, and what its drawing looks like."""

    code: EmojiCode
    names: Names
    appearance: str
    """Stem of the first drawing that looks the same; its own if it is the first."""
    outline: str | None
    """Stem of the first drawing with the same lines; None if these lines are ambiguous."""
    split: Split
    """Split of this base in this skin tone."""

    @property
    def stem(self) -> str:
        """The name of its drawing."""
        return self.code.stem

    def parts(self, medium: str) -> frozenset[str]:
        """Return the parts of the concept in a medium: a language, or "drawing".

        Tones carry their position: light beside dark is not dark beside light.
        """
        tones = (f"{tone}/{place}" for place, tone in enumerate(self.code.traits.tones, 1))
        return frozenset(f"{part}:{medium}" for part in (self.code.base, *tones))


@dataclass(frozen=True)
class Documents:
    """The documents of all pools. A document that two pools share has one id in both."""

    drawings: Mapping[str, Candidate]
    """Drawings, by stem."""
    names: Mapping[str, Candidate]
    """English names, by name."""
    sentences: Mapping[tuple[str, str], Candidate]
    """Sentences, by country code and kind of fact."""
    sheets: Mapping[str, Candidate]
    """Flags with the facts of their countries, by country code."""

    def pool(self, task: int) -> list[Candidate]:
        """Return the local pool of a task."""
        kinds: dict[int, Mapping] = {
            0: self.drawings,
            1: self.names,
            2: self.sheets,
            3: self.names,
            4: self.drawings,
            6: self.sentences,
            7: self.drawings,
            8: self.sheets,
        }
        return list(kinds[task].values())

    def union(self) -> list[Candidate]:
        """Return every document once: the global pool."""
        kinds: Sequence[Mapping] = (self.drawings, self.names, self.sentences, self.sheets)
        return [document for kind in kinds for document in kind.values()]


def color_path(stem: str) -> str:
    """Return the path of a drawing in the benchmark."""
    return f"mbeir_images/{DATASET}/color/{stem}.png"


def line_path(stem: str) -> str:
    """Return the path of a line drawing in the benchmark."""
    return f"mbeir_images/{DATASET}/line/{stem}.png"


def make_concepts(
    stems: Sequence[str],
    names: Mapping[str, Names],
    colors: UInt8[ndarray, "drawings size size 3"],
    lines: UInt8[ndarray, "drawings size size 3"],
    seed: int,
) -> list[Concept]:
    """Return the concepts of drawings, in the same order.

    Args:
        stems: Names of the drawings, sorted.
        names: Names of the drawings, by stem and language.
        colors: The drawings in color.
        lines: The same drawings without their colors.
        seed: Seed of the choice of held-out skin tones.
    """
    codes = [parse_emoji_code(stem) for stem in stems]
    appearances = [stems[first] for first in look_alikes(colors)]
    outlines = [stems[first] for first in look_alikes(lines)]
    # The frame of a flag or a patch of skin identifies no single drawing.
    ambiguous = {
        outline
        for code, outline, line in zip(codes, outlines, lines, strict=True)
        if country_code(code.stem) or code.is_component or not has_ink(line)
    }
    splits = _split_tones(codes, appearances, seed)
    return [
        Concept(
            code=code,
            names=names[code.stem],
            appearance=appearance,
            outline=None if outline in ambiguous else outline,
            split=split,
        )
        for code, appearance, outline, split in zip(
            codes, appearances, outlines, splits, strict=True
        )
    ]


def by_appearance(concepts: Iterable[Concept]) -> dict[str, list[Concept]]:
    """Return the concepts grouped by the appearance of their drawings."""
    alike: dict[str, list[Concept]] = defaultdict(list)
    for concept in concepts:
        alike[concept.appearance].append(concept)
    return alike


def _split_tones(codes: Sequence[EmojiCode], appearances: Sequence[str], seed: int) -> list[Split]:
    """Return the split of each drawing: one in five skin tones of each base is for the test.

    One more is for validation. Bases with drawings that look alike (in most professions, man and
    person) hold out the same tones, or training would show one through the other.
    """
    base_of = {code.stem: code.base for code in codes}
    family = connected(
        (code.base, base_of[appearance])
        for code, appearance in zip(codes, appearances, strict=True)
    )
    # Two people have five choices of one tone and twenty of two; each kind is split by itself.
    choices: dict[tuple[str, int], set[tuple[str, ...]]] = defaultdict(set)
    for code in codes:
        if tones := code.traits.tones:
            choices[family[code.base], len(tones)].add(tones)
    splits: dict[tuple[str, tuple[str, ...]], Split] = {}
    for (base, number), some in choices.items():
        drawn = split_by_fraction(
            sorted(some), seed, f"{number} tones of {base}", test=0.2, val=0.2
        )
        splits |= {(base, tones): split for tones, split in drawn.items()}
    chosen = [splits.get((family[code.base], code.traits.tones), "train") for code in codes]
    split_of = dict(zip(appearances, chosen, strict=True))
    # Some drawings lack the skin tones of their names, so that several tones look the same. They
    # cannot be split and stay in training.
    pairs = list(zip(appearances, chosen, strict=True))
    mixed = {appearance for appearance, split in pairs if split != split_of[appearance]}
    return ["train" if appearance in mixed else split for appearance, split in pairs]


def make_documents(concepts: Iterable[Concept], countries: Mapping[str, Country]) -> Documents:
    """Return the documents of all pools, numbered in one sequence."""
    number = 0

    def document(text: str | None, stem: str | None, source: str) -> Candidate:
        nonlocal number
        number += 1
        return Candidate(
            did=f"{DATASET_ID}:{number}",
            text=text,
            image=color_path(stem) if stem else None,
            modality="image,text" if text and stem else "image" if stem else "text",
            source=source,
        )

    concepts = list(concepts)
    spoken = [(country, fact) for country in countries.values() for fact in FACTS]
    return Documents(
        drawings={c.stem: document(None, c.stem, c.stem) for c in concepts},
        names={c.names["en"]: document(c.names["en"], None, c.stem) for c in concepts},
        sentences={
            (country.code, fact.kind): document(country.sentence(fact), None, country.code)
            for country, fact in spoken
            if fact.kind in country.facts
        },
        sheets={
            code: document(country.sheet, country.stem, code) for code, country in countries.items()
        },
    )
