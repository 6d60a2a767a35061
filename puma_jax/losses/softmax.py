"""The one masked softmax beneath all contrastive losses: some rows of queries against all keys."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from puma_jax.typing import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Keys:
    """What queries are compared with: the candidates of all pairs, then further negatives."""

    vectors: Float[Array, "m d"]
    modality: Int[Array, "m"]
    document: Int[Array, "m"]
    """Keys with the same number are the same document, and no negatives of each other's query."""
    valid: Bool[Array, "m"]


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
    queries: Float[Array, "r d"], positive: Int[Array, "r"], keys: Keys, rule: Rule
) -> Float[Array, "r"]:
    """Return the cross-entropy of each query's positive among all keys that count; 0 if invalid.

    Args:
        queries: Unit vectors.
        positive: Index of each query's positive among the keys.
        keys: What the queries are compared with.
        rule: How scores become logits, and which keys count.
    """
    # A product of fewer bits than float32 errs by more than a temperature of 0.02 forgives.
    scores = jnp.matmul(
        queries.astype(jnp.float32),
        keys.vectors.astype(jnp.float32).T,
        precision=jax.lax.Precision.HIGHEST,
    )
    is_positive = positive[:, None] == jnp.arange(len(keys.valid))[None]
    same_modality = keys.modality[positive][:, None] == keys.modality[None]
    counts = keys.valid[None]
    if rule.same_modality_only:
        counts &= same_modality
    if rule.documents:
        counts &= keys.document[positive][:, None] != keys.document[None]
    counts |= is_positive
    temperature = jnp.where(same_modality, rule.tau_hard, rule.tau_norm)
    own = jnp.take_along_axis(scores, positive[:, None], axis=1)
    logits = (scores - own if rule.relative else scores) / temperature
    # Finite, so that a row without negatives has a gradient of zero and not of nothing.
    logits = jnp.where(counts, logits, jnp.finfo(jnp.float32).min)
    own = jnp.take_along_axis(logits, positive[:, None], axis=1)[:, 0]
    losses = jax.nn.logsumexp(logits, axis=1) - own
    return jnp.where(keys.valid[positive], losses, 0.0)
