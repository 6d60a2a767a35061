"""All that is known of the drawings before any query is made, and the documents of the pools."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from puma_jax.data.mbeir import Candidate
from puma_jax.data.openmoji.countries import FACTS, Country
from puma_jax.data.openmoji.drawings import has_ink, look_alikes
from puma_jax.data.openmoji.names import Names
from puma_jax.data.openmoji.signs import Sign, country_code, read_sign
from puma_jax.data.openmoji.split import Split, connected, shares
from puma_jax.typing import UInt8, ndarray

DATASET = "openmoji"
DATASET_ID = "10"  # M-BEIR's own are 0 to 9


@dataclass(frozen=True, slots=True)
class Concept:
    """An emoji: what it shows, what it is called, what its drawing looks like."""

    sign: Sign
    names: Names
    look: str
    """Stem of the first drawing that looks the same; its own, where none does."""
    outline: str | None
    """Stem of the first drawing with the same lines; None if these lines tell nothing."""
    split: Split
    """Whether this base in this skin tone is held out."""

    @property
    def stem(self) -> str:
        """The name of its drawing."""
        return self.sign.stem

    def parts(self, medium: str) -> frozenset[str]:
        """Return what the concept is made of in a medium: a language, or "drawing".

        Tones carry their place: light beside dark is not dark beside light.
        """
        tones = (f"{tone}/{place}" for place, tone in enumerate(self.sign.traits.tones, 1))
        return frozenset(f"{part}:{medium}" for part in (self.sign.base, *tones))


@dataclass(frozen=True)
class Documents:
    """The documents of all pools. What two pools have in common is one document in both."""

    drawings: Mapping[str, Candidate]
    """By stem."""
    names: Mapping[str, Candidate]
    """English names, by themselves."""
    sentences: Mapping[tuple[str, str], Candidate]
    """By country and kind of fact."""
    sheets: Mapping[str, Candidate]
    """A flag with the facts of its country, by country."""

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
    """Return where the drawing lies in the benchmark."""
    return f"mbeir_images/{DATASET}/color/{stem}.png"


def line_path(stem: str) -> str:
    """Return where the line drawing lies in the benchmark."""
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
        names: What they are called.
        colors: The drawings in colour.
        lines: The same as line drawings.
        seed: Of the lots that hold out skin tones.
    """
    signs = [read_sign(stem) for stem in stems]
    looks = [stems[first] for first in look_alikes(colors)]
    outlines = [stems[first] for first in look_alikes(lines)]
    # The frame of a flag, a patch of skin: nobody could say whose lines they are.
    mute = {
        outline
        for sign, outline, line in zip(signs, outlines, lines, strict=True)
        if country_code(sign.stem) or sign.is_component or not has_ink(line)
    }
    splits = _split_tones(signs, looks, seed)
    return [
        Concept(
            sign=sign,
            names=names[sign.stem],
            look=look,
            outline=None if outline in mute else outline,
            split=split,
        )
        for sign, look, outline, split in zip(signs, looks, outlines, splits, strict=True)
    ]


def by_look(concepts: Iterable[Concept]) -> dict[str, list[Concept]]:
    """Return the concepts whose drawings look the same, under each look."""
    alike: dict[str, list[Concept]] = defaultdict(list)
    for concept in concepts:
        alike[concept.look].append(concept)
    return alike


def _split_tones(signs: Sequence[Sign], looks: Sequence[str], seed: int) -> list[Split]:
    """Return for each drawing its split: of each base's skin tones, one in five is for the test.

    One more is for validation. Bases of which any drawings look alike (in most professions, man
    and person) hold out the same tones, or one would be seen in the other.
    """
    base_of = {sign.stem: sign.base for sign in signs}
    family = connected((sign.base, base_of[look]) for sign, look in zip(signs, looks, strict=True))
    # Two people have five choices of one tone and twenty of two; each kind gives its share.
    choices: dict[tuple[str, int], set[tuple[str, ...]]] = defaultdict(set)
    for sign in signs:
        if tones := sign.traits.tones:
            choices[family[sign.base], len(tones)].add(tones)
    splits: dict[tuple[str, tuple[str, ...]], Split] = {}
    for (base, number), some in choices.items():
        lots = shares(sorted(some), seed, f"{number} tones of {base}", test=0.2, val=0.2)
        splits |= {(base, tones): split for tones, split in lots.items()}
    drawn = [splits.get((family[sign.base], sign.traits.tones), "train") for sign in signs]
    split_of = dict(zip(looks, drawn, strict=True))
    # Some are drawn without the skin tones of their names: what looks the same cannot be split.
    mixed = {look for look, split in zip(looks, drawn, strict=True) if split != split_of[look]}
    return ["train" if look in mixed else split for look, split in zip(looks, drawn, strict=True)]


def make_documents(concepts: Iterable[Concept], countries: Mapping[str, Country]) -> Documents:
    """Return the documents that can be found, with ids in one sequence."""
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
