"""Queries before they have ids, made of named parts, so that the split can be held to its word."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from puma_jax.data.openmoji.split import Split, in_lot_order

_MOST_ASKED: dict[Split, int] = {"val": 500, "test": 1000}


@dataclass(frozen=True, slots=True)
class Draft:
    """A query without an id."""

    task: int
    split: Split
    text: str | None
    image: str | None
    """Path of the image in the benchmark."""
    positives: tuple[str, ...]
    """Ids of the documents that answer it."""
    parts: frozenset[str]
    """What query and answer are made of: "1F44B:es", the waving hand in Spanish."""

    @property
    def combination(self) -> str:
        """All parts as one text."""
        return " + ".join(sorted(self.parts))


def keep_promise(drafts: Iterable[Draft]) -> list[Draft]:
    """Return the queries, without those for validation and test that training cannot answer.

    One that stays has every part in a training query, of whatever task, and its combination in
    none.
    """
    drafts = list(drafts)
    train = [draft for draft in drafts if draft.split == "train"]
    seen = {part for draft in train for part in draft.parts}
    combinations = {draft.parts for draft in train}
    return [
        draft
        for draft in drafts
        if draft.split == "train" or (draft.parts <= seen and draft.parts not in combinations)
    ]


def thin_out(drafts: Sequence[Draft], seed: int) -> list[Draft]:
    """Return the queries, of long validation and test sets only some, drawn by lot."""
    kept = []
    sets: dict[tuple[int, Split], list[Draft]] = defaultdict(list)
    for draft in drafts:
        sets[draft.task, draft.split].append(draft)
    for (task, split), some in sets.items():
        order = in_lot_order(range(len(some)), seed, f"{split} queries of task {task}")
        kept += [some[place] for place in sorted(order[: _MOST_ASKED.get(split)])]
    return kept
