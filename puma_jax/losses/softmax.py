"""The masked cross-entropy beneath all contrastive losses: some queries against some candidates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from puma_jax.typing import Array, Bool, Float, Int

Temperature = Float[Array, ""] | float

Logits = tuple[Float[Array, "r m"], Float[Array, "r 1"]]
"""Logit of each query with each candidate, and of each query with its positive."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Metadata:
    """Metadata of each candidate beside its vector; chunks add a leading axis."""

    index: Int[Array, "*chunks m"]
    """Number of the candidate in the global batch, by which a query recognizes its positive."""
    modality: Int[Array, "*chunks m"]
    document: Int[Array, "*chunks m"]
    """Candidates with the same number are the same document."""
    valid: Bool[Array, "*chunks m"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Candidates:
    """Vectors that queries are compared with, positives and further negatives, with metadata."""

    vectors: Float[Array, "*chunks m d"]
    metadata: Metadata


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LogitRule:
    """How scores become logits, and which candidates count as negatives."""

    temperatures: tuple[Temperature, ...]
    """Arguments of `logits` that may be trained."""
    logits: Callable[..., Logits] = jax.tree.static()
    """`logits(scores [r m], positive's score [r 1], same modality [r m], *temperatures)`."""
    same_modality_only: bool = jax.tree.static(default=False)
    """Whether to leave out candidates of another modality than the positive's."""
    mask_documents: bool = jax.tree.static(default=False)
    """Whether to leave out candidates that are the same document as the positive."""
    mask_margin: float | None = jax.tree.static(default=None)
    """Leave out candidates whose score exceeds the positive's by more; None keeps all."""


def cross_entropy(
    queries: Float[Array, "r d"], positives: Candidates, candidates: Candidates, rule: LogitRule
) -> Float[Array, "r"]:
    """Return the cross-entropy of each query's positive among all that count; 0 if invalid.

    Args:
        queries: Unit vectors.
        positives: The candidate that each query looks for, in the same order.
        candidates: Vectors that the queries are compared with, the positives among them.
        rule: How scores become logits, and which candidates count.
    """
    positive = positive_scores(queries, positives.vectors)
    margins = negative_margins(queries, positive, positives.metadata, candidates, rule)
    # −log(exp(l_ii) / Σ_j exp(l_ij)) = log(1 + Σ exp(margin)), and never below 0 by rounding.
    losses = jax.nn.softplus(jax.nn.logsumexp(margins, axis=1))
    return jnp.where(positives.metadata.valid, losses, 0.0)


def positive_scores(
    queries: Float[Array, "r d"], positives: Float[Array, "r d"]
) -> Float[Array, "r"]:
    """Return the score of each query with its positive."""
    return jnp.sum(queries.astype(jnp.float32) * positives.astype(jnp.float32), axis=1)


def negative_margins(
    queries: Float[Array, "r d"],
    positive: Float[Array, "r"],
    of_positives: Metadata,
    candidates: Candidates,
    rule: LogitRule,
) -> Float[Array, "r m"]:
    """Return by how much the logit of each negative exceeds that of the query's positive.

    Candidates that are no negative of a query, its positive among them, get the lowest finite
    number: infinity would turn the gradient of a query without negatives into NaN.

    Args:
        queries: Unit vectors.
        positive: Score of each query with its positive.
        of_positives: Metadata of the candidate that each query looks for.
        candidates: Vectors that the queries are compared with.
        rule: How scores become logits, and which candidates count.
    """
    # A product of fewer bits than float32 errs by more than a temperature of 0.02 forgives.
    scores = jnp.matmul(
        queries.astype(jnp.float32),
        candidates.vectors.astype(jnp.float32).T,
        precision=jax.lax.Precision.HIGHEST,
    )
    metadata = candidates.metadata
    same_modality = of_positives.modality[:, None] == metadata.modality[None]
    counts = metadata.valid[None] & (of_positives.index[:, None] != metadata.index[None])
    if rule.same_modality_only:
        counts &= same_modality
    if rule.mask_documents:
        counts &= of_positives.document[:, None] != metadata.document[None]
    if rule.mask_margin is not None:
        counts &= scores <= positive[:, None] + rule.mask_margin
    logits, of_positive = rule.logits(scores, positive[:, None], same_modality, *rule.temperatures)
    return jnp.where(counts, logits - of_positive, jnp.finfo(jnp.float32).min)
