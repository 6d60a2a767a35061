"""Queries of tasks 4 and 7: lines find the drawing, a drawing and an edit the edited one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from puma_jax.data.demo.drafts import Draft
from puma_jax.data.demo.split import connected, split_by_fraction
from puma_jax.data.openmoji.catalogue import (
    Concept,
    Documents,
    by_appearance,
    color_path,
    line_path,
)
from puma_jax.data.openmoji.emoji_codes import edit_between


def line_task(concepts: Sequence[Concept], documents: Documents, seed: int) -> Iterator[Draft]:
    """Yield the queries of task 4: each distinct line drawing finds all drawings with its lines.

    The line drawings of a base are held out in all its skin tones, together with those of bases
    that look like it or share its lines. Training shows the drawings in color, under their names.
    A training query does not list held-out drawings, which training never shows.
    """
    sharing: dict[str, list[Concept]] = defaultdict(list)
    base_of = {concept.stem: concept.code.base for concept in concepts}
    links = []
    for concept in concepts:
        links.append((concept.code.base, base_of[concept.appearance]))
        if concept.outline:
            sharing[concept.outline].append(concept)
            links.append((concept.code.base, base_of[concept.outline]))
    family = connected(links)
    families = sorted({family[base_of[outline]] for outline in sharing})
    splits = split_by_fraction(families, seed, "lines", test=0.2, val=0.1)
    for outline, alike in sharing.items():
        split = splits[family[base_of[outline]]]
        shown = [one for one in alike if split != "train" or one.split == "train"]
        if shown:
            yield Draft(
                task=4,
                split=split,
                text=None,
                image=line_path(outline),
                positives=tuple(documents.drawings[one.stem].did for one in shown),
                parts=shown[0].parts("drawing") | {"lines"},
            )


def edit_task(concepts: Sequence[Concept], documents: Documents) -> Iterator[Draft]:
    """Yield the queries of task 7: a drawing, and the one trait to change.

    A test query asks for a base in a held-out skin tone and starts from a drawing of training.
    """
    by_role: dict[str, list[Concept]] = defaultdict(list)
    for concept in concepts:
        by_role[concept.code.role].append(concept)
    lookalikes = by_appearance(concepts)
    edits: dict[tuple[str, str], list[tuple[Concept, Concept]]] = defaultdict(list)
    for cast in by_role.values():
        for source in cast:
            for target in cast:
                edit = edit_between(source.code, target.code)
                if edit and source.appearance != target.appearance:
                    edits[source.appearance, edit].append((source, target))
    for (appearance, edit), pairs in edits.items():
        # Sources that look the same are one query; each of their targets answers it.
        sources = {source.split for source, _ in pairs}
        targets = {target.split for _, target in pairs}
        if sources != {"train"} or len(targets) > 1:
            continue
        target = pairs[0][1]
        answers = {same.stem for _, one in pairs for same in lookalikes[one.appearance]}
        yield Draft(
            task=7,
            split=target.split,
            text=edit,
            image=color_path(appearance),
            positives=tuple(documents.drawings[stem].did for stem in sorted(answers)),
            parts=target.parts("drawing") | {f"edit:{edit}"},
        )
