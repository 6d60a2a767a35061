"""Queries of tasks 0, 1 and 3: names and drawings of the same concept find each other.

A concept has a drawing, an English name and a few foreign names, chosen at random. Training pairs
them with each other; a test query is a pair that training lacks, although it has both in others:

- a base in a skin tone that is held out everywhere ("waving hand" in "medium");
- a foreign word that training only translates, and its drawing;
- a foreign word that training only pairs with its drawing, and its English name;
- a drawing and its English name, which training connects through foreign words only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from puma_jax.data.demo.drafts import Draft
from puma_jax.data.demo.split import Split, hash_order, split_by_fraction
from puma_jax.data.openmoji.catalogue import Concept, Documents, by_appearance, color_path
from puma_jax.data.openmoji.emoji_codes import country_code
from puma_jax.data.openmoji.names import spelling

_FOREIGN_NAMES = 3
_FOREIGN_NAMES_TONED = 2  # for each of the five skin tones

_Named = list[tuple[str, str]]
"""Pairs of language and name."""


@dataclass(frozen=True)
class _Pairs:
    """The split of each held-out pair, by the stem of its concept."""

    word_and_drawing: dict[str, Split]
    """Pairs of the first foreign name and the drawing."""
    word_and_name: dict[str, Split]
    """Pairs of the first foreign name and the English name."""
    name_and_drawing: dict[str, Split]


class _Lexicon:
    """The concepts of each name, and the drawings and English names that answer it."""

    def __init__(self, concepts: Sequence[Concept], documents: Documents):
        self.documents = documents
        self.lookalikes = by_appearance(concepts)
        self.english = {spelling(concept.names["en"]) for concept in concepts}
        self.spelled: dict[str, dict[str, Concept]] = defaultdict(dict)
        for concept in concepts:
            for name in concept.names.values():
                self.spelled[spelling(name)][concept.stem] = concept

    def meant(self, name: str) -> list[Concept]:
        """Return the concepts with this name in any language."""
        return list(self.spelled[spelling(name)].values())

    def drawings(self, meant: Sequence[Concept]) -> tuple[str, ...]:
        """Return the ids of the drawings of concepts and of all drawings that look the same."""
        stems = {same.stem for concept in meant for same in self.lookalikes[concept.appearance]}
        return tuple(self.documents.drawings[stem].did for stem in sorted(stems))

    def names(self, meant: Sequence[Concept]) -> tuple[str, ...]:
        """Return the ids of the English names of concepts."""
        return tuple(self.documents.names[concept.names["en"]].did for concept in meant)


def naming_tasks(concepts: Sequence[Concept], documents: Documents, seed: int) -> Iterator[Draft]:
    """Yield the queries of tasks 0, 1 and 3."""
    lexicon = _Lexicon(concepts, documents)
    foreign = {concept.stem: _foreign(concept, lexicon, seed) for concept in concepts}
    pairs = _hold_out_pairs(concepts, foreign, lexicon, seed)
    yield from _name_queries(concepts, foreign, lexicon, pairs)
    yield from _drawing_queries(lexicon, pairs)


def _name_queries(
    concepts: Sequence[Concept], foreign: Mapping[str, _Named], lexicon: _Lexicon, pairs: _Pairs
) -> Iterator[Draft]:
    """Yield the queries of task 0, and those of task 1 for foreign names."""
    used: set[str] = set()
    for concept in concepts:
        stem = concept.stem
        for place, (language, name) in enumerate([("en", concept.names["en"]), *foreign[stem]]):
            meant = lexicon.meant(name)
            # Another language may have used this name, or its meanings may be in different splits.
            if spelling(name) in used or len({one.split for one in meant}) > 1:
                continue
            used.add(spelling(name))
            held = {0: pairs.name_and_drawing, 1: pairs.word_and_drawing}.get(place, {})
            yield Draft(
                task=0,
                split=held.get(stem, concept.split),
                text=name,
                image=None,
                positives=lexicon.drawings(meant),
                parts=concept.parts(language) | concept.parts("drawing"),
            )
            if place == 0:
                continue
            held = pairs.word_and_name if place == 1 else {}
            yield Draft(
                task=1,
                split=held.get(stem, concept.split),
                text=name,
                image=None,
                positives=lexicon.names(meant),
                parts=concept.parts(language) | concept.parts("en"),
            )


def _drawing_queries(lexicon: _Lexicon, pairs: _Pairs) -> Iterator[Draft]:
    """Yield the queries of task 3, one for each appearance."""
    for appearance, alike in lexicon.lookalikes.items():
        yield Draft(
            task=3,
            split=pairs.name_and_drawing.get(appearance, alike[0].split),
            text=None,
            image=color_path(appearance),
            positives=lexicon.names(alike),
            parts=alike[0].parts("drawing") | alike[0].parts("en"),
        )


def _foreign(concept: Concept, lexicon: _Lexicon, seed: int) -> _Named:
    """Return the foreign names to use, with their languages; the first one may be held out.

    A name that is spelled like an English one is not foreign. The choice depends on the base, so
    that a base has names in the same languages in all its skin tones.
    """
    chosen: dict[str, tuple[str, str]] = {}
    limit = _FOREIGN_NAMES_TONED if concept.code.traits.tones else _FOREIGN_NAMES
    languages = sorted(set(concept.names) - {"en"})
    for language in hash_order(languages, seed, f"languages of {concept.code.base}"):
        name = concept.names[language]
        if spelling(name) not in lexicon.english and len(chosen) < limit:
            chosen.setdefault(spelling(name), (language, name))
    return list(chosen.values())


def _hold_out_pairs(
    concepts: Sequence[Concept], foreign: Mapping[str, _Named], lexicon: _Lexicon, seed: int
) -> _Pairs:
    """Return the held-out pairs, all from concepts with unique appearances and names."""
    # The names of a base occur again with each of its skin tones.
    toned = {concept.code.base for concept in concepts if concept.code.traits.tones}
    single = [
        concept.stem
        for concept in concepts
        if concept.code.base not in toned
        and len(lexicon.lookalikes[concept.appearance]) == 1
        and foreign[concept.stem]
        and all(len(lexicon.meant(name)) == 1 for _, name in foreign[concept.stem])
    ]
    # The English name of a flag occurs again in sentences and on fact sheets.
    linked = [stem for stem in single if not country_code(stem)]
    name_and_drawing = _held(
        split_by_fraction(linked, seed, "name and drawing", test=0.16, val=0.08)
    )
    rest = [stem for stem in single if stem not in name_and_drawing]
    word_and_drawing = _held(split_by_fraction(rest, seed, "word and drawing", test=0.25, val=0.12))
    rest = [stem for stem in rest if stem not in word_and_drawing]
    word_and_name = _held(split_by_fraction(rest, seed, "word and name", test=0.4, val=0.2))
    return _Pairs(word_and_drawing, word_and_name, name_and_drawing)


def _held(splits: Mapping[str, Split]) -> dict[str, Split]:
    return {stem: split for stem, split in splits.items() if split != "train"}
