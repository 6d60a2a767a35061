"""What a model learns from a teacher: the states of the whole model, or scores of documents."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from puma_jax.losses.softmax import Temperature
from puma_jax.typing import Array, Bool, Float


def distill_loss(
    student: Float[Array, "n d"],
    teacher: Float[Array, "n d"],
    *,
    valid: Bool[Array, "n"] | None = None,
) -> Float[Array, ""]:
    """Return the mean squared error over items and width (arXiv 2507.08064, section 3.2).

    The states are those at [RET] after the final norm, **not** normalized to unit length. The paper
    adds the losses of queries and of candidates, with a weight of 0.05 in the released code. No
    gradient reaches the teacher.

    Args:
        student: States of the pruned model.
        teacher: States of the whole model for the same items.
        valid: Which items count; None counts all.
    """
    error = student.astype(jnp.float32) - jax.lax.stop_gradient(teacher).astype(jnp.float32)
    squared = jnp.mean(error**2, axis=-1)
    if valid is None:
        return jnp.mean(squared)
    return jnp.sum(jnp.where(valid, squared, 0.0)) / jnp.maximum(valid.sum(), 1)


def score_distill_loss(
    queries: Float[Array, "n d"],
    documents: Float[Array, "n m d"],
    teacher: Float[Array, "n m"],
    *,
    temperature: Temperature,
    teacher_temperature: Temperature,
    valid: Bool[Array, "n m"] | None = None,
) -> Float[Array, ""]:
    """Return the cross-entropy between a teacher's and the model's softmax over documents.

    With s_ij the cosine of query i and its document j, the positive (j = 0) or one of its own hard
    negatives, and t_ij the teacher's score of the two, it is the mean over queries i of

        −Σ_j softmax_j(t_ij / teacher_temperature) · log softmax_j(s_ij / temperature),

    as in the last stage of Qwen3-VL-Embedding (arXiv 2601.04720). Documents that do not count are
    in neither softmax. The mean is over the queries whose positive counts, and at least one
    negative; it is 0 if there are none. No gradient reaches the teacher.

    Args:
        queries: Unit vectors.
        documents: Unit vectors of the documents of each query, its positive first.
        teacher: Their scores; a document whose score is NaN does not count.
        temperature: Temperature of the model's scores.
        teacher_temperature: Temperature of the teacher's.
        valid: Which documents count; None counts all.
    """
    counts = jnp.isfinite(teacher) if valid is None else jnp.isfinite(teacher) & valid
    queries, documents = queries.astype(jnp.float32), documents.astype(jnp.float32)
    scores = jnp.einsum("nd,nmd->nm", queries, documents, precision=jax.lax.Precision.HIGHEST)
    # Infinity would turn the gradient of a query without documents into NaN.
    lowest = jnp.finfo(jnp.float32).min
    target = jax.nn.softmax(jnp.where(counts, teacher / teacher_temperature, lowest))
    found = jax.nn.log_softmax(jnp.where(counts, scores / temperature, lowest))
    terms = jnp.where(counts, jax.lax.stop_gradient(target) * found, 0.0)
    used = counts[:, 0] & counts[:, 1:].any(axis=1)
    return -jnp.sum(jnp.where(used, terms.sum(axis=1), 0.0)) / jnp.maximum(used.sum(), 1)
