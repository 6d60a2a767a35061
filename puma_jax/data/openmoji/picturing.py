"""Tasks 4 and 7: a line drawing finds the drawing, a drawing and an edit find the edited one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from puma_jax.data.openmoji.catalogue import Concept, Documents, by_look, color_path, line_path
from puma_jax.data.openmoji.drafts import Draft
from puma_jax.data.openmoji.signs import edit_between
from puma_jax.data.openmoji.split import connected, shares


def line_task(concepts: Sequence[Concept], documents: Documents, seed: int) -> Iterator[Draft]:
    """Yield the queries of task 4: each different line drawing asks for all that have its lines.

    Held out are line drawings: of a base in all its skin tones, and of all that look like it or
    share lines with it. The drawings in colour were seen, under their names. A training query
    does not list drawings that are held out, which training shall not see at all.
    """
    sharing: dict[str, list[Concept]] = defaultdict(list)
    base_of = {concept.stem: concept.sign.base for concept in concepts}
    links = []
    for concept in concepts:
        links.append((concept.sign.base, base_of[concept.look]))
        if concept.outline:
            sharing[concept.outline].append(concept)
            links.append((concept.sign.base, base_of[concept.outline]))
    family = connected(links)
    families = sorted({family[base_of[outline]] for outline in sharing})
    splits = shares(families, seed, "lines", test=0.2, val=0.1)
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
    """Yield the queries of task 7: a drawing, and the one trait that shall be different.

    A test query asks for a base in a skin tone that was held out; what it edits was seen.
    """
    by_role: dict[str, list[Concept]] = defaultdict(list)
    for concept in concepts:
        by_role[concept.sign.role].append(concept)
    lookalikes = by_look(concepts)
    edits: dict[tuple[str, str], list[tuple[Concept, Concept]]] = defaultdict(list)
    for cast in by_role.values():
        for source in cast:
            for target in cast:
                edit = edit_between(source.sign, target.sign)
                if edit and source.look != target.look:
                    edits[source.look, edit].append((source, target))
    for (look, edit), pairs in edits.items():
        # Sources that look the same are one query; each of their targets answers it.
        sources = {source.split for source, _ in pairs}
        targets = {target.split for _, target in pairs}
        if sources != {"train"} or len(targets) > 1:
            continue
        target = pairs[0][1]
        answers = {same.stem for _, one in pairs for same in lookalikes[one.look]}
        yield Draft(
            task=7,
            split=target.split,
            text=edit,
            image=color_path(look),
            positives=tuple(documents.drawings[stem].did for stem in sorted(answers)),
            parts=target.parts("drawing") | {f"edit:{edit}"},
        )
