"""What a stage leaves unused of its data: hard negatives, and a teacher's scores."""

from __future__ import annotations

import numpy as np

from puma_jax.data.plan import Plan
from puma_jax.errors import ConfigError
from puma_jax.training.config import StageConfig


def notes(name: str, config: StageConfig, plan: Plan) -> list[str]:
    """Return what to tell a user at the start of a stage, in a line each.

    Raises:
        ConfigError: The stage distills scores, and no training query has any.
    """
    return [note for note in (_negatives_note(plan), _scores_note(name, config, plan)) if note]


def _negatives_note(plan: Plan) -> str | None:
    """Return what to tell a user whose hard negatives are not used, or are too few; or None."""
    table, count = plan.table, plan.config.hard_negatives
    queries = plan.queries()
    has = table.negative_start[queries + 1] - table.negative_start[queries]
    if not count and has.any():
        return (
            f"neg_cand_list of {np.count_nonzero(has):,} queries, {has.sum():,} ids, is not used: "
            "plan.hard_negatives is 0"
        )
    if (few := np.count_nonzero(has < count)) > 0:
        return (
            f"neg_cand_list of {few:,} of {len(queries):,} queries has fewer ids than "
            f"plan.hard_negatives {count}: these queries take those they have"
        )
    return None


def _scores_note(name: str, config: StageConfig, plan: Plan) -> str | None:
    """Return what to tell a user whose scores of a teacher are not used or too few; or None.

    Raises:
        ConfigError: The stage distills scores, and no training query has any.
    """
    table, weight = plan.table, config.score_distill.weight
    if table.positive_score is None or table.negative_score is None:
        if weight:
            raise ConfigError(
                f"stage {name}: score_distill.weight is {weight}, but no training query has "
                "cand_scores: write them with python -m puma_jax.score, or set it to 0"
            )
        return None
    lacking = np.zeros(len(table.query_tokens), bool)
    for start, scores in (
        (table.positive_start, table.positive_score),
        (table.negative_start, table.negative_score),
    ):
        missing = np.concatenate([[0], np.cumsum(np.isnan(scores))])
        lacking |= missing[start[1:]] > missing[start[:-1]]
    if not weight:
        return "cand_scores of the training queries are not used: score_distill.weight is 0"
    if (few := np.count_nonzero(lacking[plan.queries()])) > 0:
        return (
            f"cand_scores of {few:,} of {len(plan.queries()):,} queries lack documents of theirs: "
            "these documents are left out of the distillation of scores"
        )
    return None
