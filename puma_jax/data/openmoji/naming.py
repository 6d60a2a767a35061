"""Tasks 0, 1 and 3: names and drawings of the same concept find each other.

A concept has a drawing, an English name and, drawn by lot, a few foreign ones. Training joins them
pair by pair; a test asks for a pair that training left out, although it joined both with others:

- a base in a skin tone that was held out everywhere ("waving hand" in "medium");
- a foreign word that training only translated, and now shall find its drawing;
- a foreign word that training only showed, and now shall find its English name;
- a drawing and its English name, which training joined by way of foreign words only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from puma_jax.data.openmoji.catalogue import Concept, Documents, by_look, color_path
from puma_jax.data.openmoji.drafts import Draft
from puma_jax.data.openmoji.names import spelling
from puma_jax.data.openmoji.signs import country_code
from puma_jax.data.openmoji.split import Split, in_lot_order, shares

_FOREIGN_NAMES = 3
_FOREIGN_NAMES_TONED = 2  # of each of the five skin tones

_Named = list[tuple[str, str]]
"""Languages and names."""


@dataclass(frozen=True)
class _Pairs:
    """The concepts of which a pair is held out, by stem, and its split."""

    word_and_drawing: dict[str, Split]
    """Of the first foreign name."""
    word_and_name: dict[str, Split]
    """Of the first foreign name."""
    name_and_drawing: dict[str, Split]


class _Lexicon:
    """What names mean, and which drawings and English names answer for that."""

    def __init__(self, concepts: Sequence[Concept], documents: Documents):
        self.documents = documents
        self.lookalikes = by_look(concepts)
        self.english = {spelling(concept.names["en"]) for concept in concepts}
        self.spelled: dict[str, dict[str, Concept]] = defaultdict(dict)
        for concept in concepts:
            for name in concept.names.values():
                self.spelled[spelling(name)][concept.stem] = concept

    def meant(self, name: str) -> list[Concept]:
        """Return the concepts that are called so, in whatever language."""
        return list(self.spelled[spelling(name)].values())

    def drawings(self, meant: Sequence[Concept]) -> tuple[str, ...]:
        """Return the ids of the drawings of concepts, and of those that look the same."""
        stems = {same.stem for concept in meant for same in self.lookalikes[concept.look]}
        return tuple(self.documents.drawings[stem].did for stem in sorted(stems))

    def names(self, meant: Sequence[Concept]) -> tuple[str, ...]:
        """Return the ids of the English names of concepts."""
        return tuple(self.documents.names[concept.names["en"]].did for concept in meant)


def naming_tasks(concepts: Sequence[Concept], documents: Documents, seed: int) -> Iterator[Draft]:
    """Yield the queries of tasks 0, 1 and 3."""
    lexicon = _Lexicon(concepts, documents)
    foreign = {concept.stem: _foreign(concept, lexicon, seed) for concept in concepts}
    pairs = _hold_out_pairs(concepts, foreign, lexicon, seed)
    yield from _asked_by_name(concepts, foreign, lexicon, pairs)
    yield from _asked_by_drawing(lexicon, pairs)


def _asked_by_name(
    concepts: Sequence[Concept], foreign: Mapping[str, _Named], lexicon: _Lexicon, pairs: _Pairs
) -> Iterator[Draft]:
    """Yield the queries of task 0, and of task 1 where the name is foreign."""
    asked: set[str] = set()
    for concept in concepts:
        stem = concept.stem
        for place, (language, name) in enumerate([("en", concept.names["en"]), *foreign[stem]]):
            meant = lexicon.meant(name)
            # Another language may have asked by this name; its meanings may be split.
            if spelling(name) in asked or len({one.split for one in meant}) > 1:
                continue
            asked.add(spelling(name))
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


def _asked_by_drawing(lexicon: _Lexicon, pairs: _Pairs) -> Iterator[Draft]:
    """Yield the queries of task 3: one for each look."""
    for look, alike in lexicon.lookalikes.items():
        yield Draft(
            task=3,
            split=pairs.name_and_drawing.get(look, alike[0].split),
            text=None,
            image=color_path(look),
            positives=lexicon.names(alike),
            parts=alike[0].parts("drawing") | alike[0].parts("en"),
        )


def _foreign(concept: Concept, lexicon: _Lexicon, seed: int) -> _Named:
    """Return the foreign names to use, with their languages; the first one may be held out.

    A name that is spelled like an English one is not foreign. The lots are those of the base, so
    that a base is called by the same languages in all its skin tones.
    """
    chosen: dict[str, tuple[str, str]] = {}
    limit = _FOREIGN_NAMES_TONED if concept.sign.traits.tones else _FOREIGN_NAMES
    languages = sorted(set(concept.names) - {"en"})
    for language in in_lot_order(languages, seed, f"languages of {concept.sign.base}"):
        name = concept.names[language]
        if spelling(name) not in lexicon.english and len(chosen) < limit:
            chosen.setdefault(spelling(name), (language, name))
    return list(chosen.values())


def _hold_out_pairs(
    concepts: Sequence[Concept], foreign: Mapping[str, _Named], lexicon: _Lexicon, seed: int
) -> _Pairs:
    """Return which pairs are held out, of concepts that look and are called like no other."""
    # The names of a base are said again with each of its skin tones.
    toned = {concept.sign.base for concept in concepts if concept.sign.traits.tones}
    single = [
        concept.stem
        for concept in concepts
        if concept.sign.base not in toned
        and len(lexicon.lookalikes[concept.look]) == 1
        and foreign[concept.stem]
        and all(len(lexicon.meant(name)) == 1 for _, name in foreign[concept.stem])
    ]
    # The English name of a flag is said again in sentences and on fact sheets.
    linked = [stem for stem in single if not country_code(stem)]
    name_and_drawing = _held(shares(linked, seed, "name and drawing", test=0.16, val=0.08))
    rest = [stem for stem in single if stem not in name_and_drawing]
    word_and_drawing = _held(shares(rest, seed, "word and drawing", test=0.25, val=0.12))
    rest = [stem for stem in rest if stem not in word_and_drawing]
    word_and_name = _held(shares(rest, seed, "word and name", test=0.4, val=0.2))
    return _Pairs(word_and_drawing, word_and_name, name_and_drawing)


def _held(splits: Mapping[str, Split]) -> dict[str, Split]:
    return {stem: split for stem, split in splits.items() if split != "train"}
