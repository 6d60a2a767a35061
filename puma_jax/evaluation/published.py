"""Published results on the test sets of M-BEIR, for comparison with an evaluation."""

from __future__ import annotations

from puma_jax.evaluation.report import Evaluation, markdown

_SETS = (
    ("visualnews", 0), ("mscoco", 0), ("fashion200k", 0), ("webqa", 1),
    ("visualnews", 3), ("mscoco", 3), ("fashion200k", 3), ("nights", 4),
    ("edis", 2), ("webqa", 2), ("oven", 6), ("infoseek", 6),
    ("fashioniq", 7), ("cirr", 7), ("oven", 8), ("infoseek", 8),
)  # fmt: skip

LOCAL: dict[str, tuple[float, ...]] = {
    "CLIP_SF (UniIR)": (
        42.6, 81.1, 18.0, 84.7, 43.1, 92.3, 18.3, 32.0,
        59.4, 78.7, 45.5, 27.9, 24.4, 44.6, 67.6, 48.9,
    ),
    "LamRA-Ret-2B": (
        30.8, 78.8, 25.1, 82.5, 31.2, 88.9, 27.1, 28.7,
        54.3, 77.8, 51.1, 44.2, 28.9, 47.7, 72.3, 60.8,
    ),
    "PUMA (12 layers)": (
        35.7, 79.5, 25.8, 86.2, 35.2, 90.1, 29.0, 31.4,
        58.2, 78.4, 52.7, 48.3, 30.6, 49.9, 74.0, 65.2,
    ),
    "LamRA-Ret-7B": (
        41.6, 81.5, 28.7, 86.0, 39.6, 90.6, 30.4, 32.1,
        62.6, 81.2, 54.1, 52.1, 33.2, 53.1, 76.2, 63.3,
    ),
}  # fmt: skip
"""Headline hit rates on local pools, in per cent, in the order of `_SETS` (arXiv 2507.08064)."""


def compare_with(evaluation: Evaluation, name: str) -> str | None:
    """Return a table of an evaluation and published results for the same sets, on local pools.

    Args:
        evaluation: Evaluation on whole pools; others are not comparable.
        name: Name of the evaluated model, the header of its column.

    Returns:
        The table, or None if nothing is published for any of the sets.
    """
    known = {key: place for place, key in enumerate(_SETS)}
    sets = [found for found in evaluation.sets if (found.name, found.task) in known]
    if not sets:
        return None
    columns = [[100 * found.hits["local"][found.k] for found in sets]]
    columns += [
        [of_model[known[found.name, found.task]] for found in sets] for of_model in LOCAL.values()
    ]
    rows = [
        [found.title, *cells] for found, *cells in zip(sets, *map(_shown, columns), strict=True)
    ]
    rows.append([f"mean of {len(sets)}", *_shown([sum(column) / len(sets) for column in columns])])
    return markdown(["set, local @k", name, *LOCAL], rows)


def _shown(rates: list[float]) -> list[str]:
    return [f"{rate:.1f}" for rate in rates]
