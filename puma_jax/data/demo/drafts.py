"""Queries without ids, made of named parts, so that the split by combination can be enforced."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import count

from puma_jax.data.demo.split import SPLITS, Split, hash_order
from puma_jax.data.mbeir import TASKS, Query

_MAX_QUERIES: dict[Split, int] = {"val": 500, "test": 1000}


@dataclass(frozen=True, slots=True)
class Draft:
    """A query without an id."""

    task: int
    split: Split
    text: str | None
    image: str | None
    """Path of the image in the benchmark."""
    positives: tuple[str, ...]
    """Ids of its relevant documents."""
    parts: frozenset[str]
    """Parts of the query and its answer, such as "1F44B:es", the waving hand in Spanish."""

    @property
    def combination(self) -> str:
        """All parts, sorted and joined."""
        return " + ".join(sorted(self.parts))


def drop_unanswerable(drafts: Iterable[Draft]) -> list[Draft]:
    """Return the queries without validation and test queries that training cannot answer.

    Every part of a query that stays occurs in a training query of some task; its combination of
    parts occurs in none.
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


def subsample(drafts: Sequence[Draft], seed: int) -> list[Draft]:
    """Return the queries, with at most 500 validation and 1,000 test queries of each task.

    Those that stay are the first in hash order.
    """
    kept = []
    sets: dict[tuple[int, Split], list[Draft]] = defaultdict(list)
    for draft in drafts:
        sets[draft.task, draft.split].append(draft)
    for (task, split), some in sets.items():
        order = hash_order(range(len(some)), seed, f"{split} queries of task {task}")
        kept += [some[place] for place in sorted(order[: _MAX_QUERIES.get(split)])]
    return kept


def with_ids(
    drafts: Sequence[Draft], dataset_id: str, tasks: Collection[int]
) -> dict[Split, list[Query]]:
    """Return the queries of each split, ordered by task and numbered in one sequence."""
    numbers = count(1)
    return {
        split: [
            Query(
                qid=f"{dataset_id}:{next(numbers)}",
                text=draft.text,
                image=draft.image,
                modality=TASKS[task][0],
                positives=draft.positives,
                task=task,
                source=draft.combination,
            )
            for task in tasks
            for draft in drafts
            if draft.task == task and draft.split == split
        ]
        for split in SPLITS
    }
