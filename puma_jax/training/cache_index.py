"""The items whose states a teacher computes before training, and their numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from puma_jax.data.plan import Plan
from puma_jax.typing import Int, ndarray


@dataclass(frozen=True)
class Index:
    """Numbers of all items that a step may draw: queries with each prompt, then candidates.

    Queries have no numbers if the student learns the states of candidates alone.
    """

    start: Int[ndarray, "rows_and_end"]
    """Number of the first item of each query, then of each candidate; last, the item count."""
    queries: int
    """Number of rows in the table of queries."""

    @classmethod
    def of(cls, plan: Plan, items: Literal["pairs", "candidates"]) -> Index:
        """Return the index of a plan's queries and of their positives, or of these alone."""
        queries = len(plan.table.query_key)
        drawn = np.zeros(queries, bool)
        if items == "pairs":
            drawn[plan.queries()] = True
        wordings = np.where(drawn, np.maximum(plan.prompts(np.arange(queries)), 1), 0)
        counts = np.concatenate([[0], wordings, plan.candidates()])
        return cls(np.cumsum(counts, dtype=np.int64), queries)

    def __len__(self) -> int:
        return int(self.start[-1])

    @property
    def has_queries(self) -> bool:
        """Whether queries have numbers."""
        return bool(self.start[self.queries])

    def query(self, row: Int[ndarray, "n"], prompt: Int[ndarray, "n"]) -> Int[ndarray, "n"]:
        """Return the item numbers of queries with these prompts; prompt −1 is none."""
        return self.start[row] + np.maximum(prompt, 0)

    def candidate(self, row: Int[ndarray, "n"]) -> Int[ndarray, "n"]:
        """Return the item numbers of candidates."""
        return self.start[self.queries + row]

    def rows(
        self, plan: Plan
    ) -> tuple[Int[ndarray, "queries"], Int[ndarray, "queries"], Int[ndarray, "candidates"]]:
        """Return the rows of queries, their prompts, and the rows of candidates, in order.

        A query has a row for each of its prompts; prompt −1 is none.
        """
        counts = np.diff(self.start)
        query = np.repeat(np.arange(self.queries), counts[: self.queries])
        prompt = np.arange(len(query)) - self.start[query]
        prompt = np.where(plan.prompts(query) > 0, prompt, -1)
        return query, prompt, np.flatnonzero(counts[self.queries :])

    def sizes(self, plan: Plan) -> tuple[Int[ndarray, "items"], Int[ndarray, "items"]]:
        """Return the tokens and the patches of all items."""
        query, prompt, candidate = self.rows(plan)
        sizes = plan.query_sizes(query, prompt), plan.candidate_sizes(candidate)
        lengths, patches = (np.concatenate(both) for both in zip(*sizes, strict=True))
        return lengths, patches
