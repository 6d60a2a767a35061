"""Queries of tasks 0 and 3: words find pictures, pictures find their names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from puma_jax.data.demo.drafts import Draft
from puma_jax.data.openclipart.catalogue import Catalogue, image_path, words
from puma_jax.data.openclipart.metadata import Clip

PROMPTS = {
    0: (
        "Find the picture of this.",
        "Show the clip art that this describes.",
        "Which picture shows this?",
        "Find a drawing of this.",
    ),
    3: (
        "Find the name of this picture.",
        "What does this picture show?",
        "Name what is drawn here.",
        "Say what this clip art is of.",
    ),
}
"""Instructions of each task."""
_MAX_ANSWERS = 5  # keywords that more pictures share are too vague a query


def name_queries(catalogue: Catalogue) -> Iterator[Draft]:
    """Yield the queries of task 0 by name: a name finds all of its pictures."""
    called: dict[str, list[Clip]] = defaultdict(list)
    for clip in catalogue.clips:
        called[clip.name].append(clip)
    for name, clips in sorted(called.items()):
        yield Draft(
            task=0,
            split=catalogue.splits[name],
            text=name,
            image=None,
            positives=catalogue.showing(clips),
            parts=_parts(f"name: {name}", name, catalogue),
        )


def keyword_queries(catalogue: Catalogue) -> Iterator[Draft]:
    """Yield the queries of task 0 by keywords: folders and keywords find what has all of them.

    The pictures that answer a query are all of the same split.
    """
    by_folder: dict[str, list[Clip]] = defaultdict(list)
    for clip in catalogue.clips:
        by_folder[clip.folder].append(clip)
    for folder, clips in sorted(by_folder.items()):
        for keywords in sorted({tuple(sorted(clip.keywords)) for clip in clips} - {()}):
            found = [clip for clip in clips if clip.keywords.issuperset(keywords)]
            splits = {catalogue.splits[clip.name] for clip in found}
            positives = catalogue.showing(found)
            if len(splits) > 1 or len(positives) > _MAX_ANSWERS:
                continue
            text = f"{folder}: {', '.join(keywords)}"
            yield Draft(
                task=0,
                split=splits.pop(),
                text=text,
                image=None,
                positives=positives,
                parts=_parts(f"keywords: {text}", text, catalogue),
            )


def picture_queries(catalogue: Catalogue) -> Iterator[Draft]:
    """Yield the queries of task 3, one for each appearance: a picture finds its names."""
    for path, clips in catalogue.alike.items():
        names = sorted({clip.name for clip in clips})
        yield Draft(
            task=3,
            split=catalogue.splits[names[0]],
            text=None,
            image=image_path(path),
            positives=tuple(catalogue.names[name].did for name in names),
            parts=_parts(f"picture: {path}", " ".join(names), catalogue),
        )


def _parts(kind: str, text: str, catalogue: Catalogue) -> frozenset[str]:
    """Return what a query is, and which words of it, or of its answer, training does not show."""
    return frozenset(
        {kind, *(f"new word: {word}" for word in words(text) if word not in catalogue.known)}
    )
