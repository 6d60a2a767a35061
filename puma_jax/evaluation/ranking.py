"""Documents that queries found, written as run files that other tools read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from puma_jax.data.lines import FilePath
from puma_jax.typing import Float, Int, ndarray


@dataclass(frozen=True)
class Run:
    """Documents that the queries of a set found in a pool, best first."""

    qids: tuple[str, ...]
    dids: ndarray
    """Ids, `[queries, depth]`; None beyond the end of a small pool."""
    scores: Float[ndarray, "queries depth"]
    rows: Int[ndarray, "queries depth"]
    """Rows of the documents in the selection; -1 beyond the end of a small pool."""

    def write(self, path: FilePath, tag: str = "puma_jax") -> None:
        """Write a run file in TREC format.

        Tools that sort a run again, such as trec_eval, break ties by descending id, not by our
        ranks. Each score is therefore written below the one before it: an equal score is lowered by
        the least step of float32. All tools then rank as we do.

        Raises:
            OSError: The file cannot be written.
        """
        scores = strictly_falling(self.scores).tolist()
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            for qid, dids, of_query in zip(self.qids, self.dids.tolist(), scores, strict=True):
                for rank, (did, score) in enumerate(zip(dids, of_query, strict=True), 1):
                    if did is not None:
                        file.write(f"{qid} Q0 {did} {rank} {score:.9g} {tag}\n")


def strictly_falling(scores: Float[ndarray, "queries depth"]) -> Float[ndarray, "queries depth"]:
    """Return scores of which each lies below the one before it, in float32.

    Args:
        scores: Scores, best first; -inf at the end stays.
    """
    scores = np.array(scores, np.float32)
    for place in range(1, scores.shape[1]):
        before = scores[:, place - 1]
        with np.errstate(invalid="ignore"):  # the spacing at infinity
            # Not the step at 0, which some tools round to 0.
            step = np.maximum(np.spacing(np.abs(before)), np.float32(1e-9))
            below = np.where(np.isfinite(before), before - step, before)
        scores[:, place] = np.minimum(scores[:, place], below)
    return scores
