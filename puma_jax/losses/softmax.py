"""The one masked softmax beneath all contrastive losses: some rows of queries against some keys."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from puma_jax.typing import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Labels:
    """What is known of each key beside its vector. Keys in chunks have another axis before."""

    index: Int[Array, "*chunks m"]
    """Its number in the global batch, by which a query tells its positive."""
    modality: Int[Array, "*chunks m"]
    document: Int[Array, "*chunks m"]
    """Keys with the same number are the same document, and no negatives of each other's query."""
    valid: Bool[Array, "*chunks m"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Keys:
    """What queries are compared with: candidates of pairs, and further negatives."""

    vectors: Float[Array, "*chunks m d"]
    labels: Labels


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rule:
    """How a score becomes a logit."""

    tau_norm: Float[Array, ""] | float
    """Temperature of keys whose modality is not that of the query's target."""
    tau_hard: Float[Array, ""] | float
    """Temperature of keys whose modality is, the positive among them."""
    relative: bool = jax.tree.static(default=False)
    """Divide the difference to the positive's score, rather than the score."""
    same_modality_only: bool = jax.tree.static(default=False)
    """Leave keys of other modalities out."""
    documents: bool = jax.tree.static(default=False)
    """Leave out keys that are the same document as the positive."""


def row_losses(
    queries: Float[Array, "r d"], positives: Keys, keys: Keys, rule: Rule
) -> Float[Array, "r"]:
    """Return the cross-entropy of each query's positive among all keys that count; 0 if invalid.

    Args:
        queries: Unit vectors.
        positives: The key that each query looks for, in the same order.
        keys: What the queries are compared with, the positives among them.
        rule: How scores become logits, and which keys count.
    """
    own = own_scores(queries, positives.vectors)
    margins = negative_margins(queries, own, positives.labels, keys, rule)
    # −log(exp(own) / Σ exp(logit)) = log(1 + Σ exp(margin)), and never below 0 by rounding.
    losses = jax.nn.softplus(jax.nn.logsumexp(margins, axis=1))
    return jnp.where(positives.labels.valid, losses, 0.0)


def own_scores(queries: Float[Array, "r d"], positives: Float[Array, "r d"]) -> Float[Array, "r"]:
    """Return the score of each query with its positive."""
    return jnp.sum(queries.astype(jnp.float32) * positives.astype(jnp.float32), axis=1)


def negative_margins(
    queries: Float[Array, "r d"],
    own: Float[Array, "r"],
    positives: Labels,
    keys: Keys,
    rule: Rule,
) -> Float[Array, "r m"]:
    """Return by how much the logit of each negative exceeds that of the query's positive.

    Keys that are no negative of a query, its positive among them, get the lowest finite number:
    infinity would make the gradient of a row without negatives nothing rather than zero.

    Args:
        queries: Unit vectors.
        own: Score of each query with its positive.
        positives: Labels of the key that each query looks for.
        keys: What the queries are compared with.
        rule: How scores become logits, and which keys count.
    """
    # A product of fewer bits than float32 errs by more than a temperature of 0.02 forgives.
    scores = jnp.matmul(
        queries.astype(jnp.float32),
        keys.vectors.astype(jnp.float32).T,
        precision=jax.lax.Precision.HIGHEST,
    )
    labels = keys.labels
    same_modality = positives.modality[:, None] == labels.modality[None]
    counts = labels.valid[None] & (positives.index[:, None] != labels.index[None])
    if rule.same_modality_only:
        counts &= same_modality
    if rule.documents:
        counts &= positives.document[:, None] != labels.document[None]
    temperature = jnp.where(same_modality, rule.tau_hard, rule.tau_norm)
    own = own[:, None]
    if rule.relative:
        margins = (scores - own) / temperature
    else:
        margins = scores / temperature - own / rule.tau_hard
    return jnp.where(counts, margins, jnp.finfo(jnp.float32).min)
