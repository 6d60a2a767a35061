"""Contrastive losses over in-batch negatives. Query i looks for candidate i.

All are the mean over pairs of a cross-entropy from query to candidate: the softmax of cosines, each
divided by a temperature. They differ in which negatives count and at which temperature.

Arguments they share:
    queries, candidates: Unit vectors, pair by pair.
    valid: Which pairs count. One that does not is nobody's negative either.
    document: A number for the document of each candidate. Candidates with the number of a query's
        own are left out of its negatives; by default all are negatives of all others.
    negatives: Further candidates that are nobody's positive, such as hard negatives.
    layout: How the work is spread over memory and devices; the result does not depend on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from puma_jax.errors import ConfigError
from puma_jax.losses.sharded import DENSE, Layout, mean_loss
from puma_jax.losses.softmax import Keys, Labels, Rule
from puma_jax.typing import Array, Bool, Float, Int

Temperature = Float[Array, ""] | float


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Negatives:
    """Candidates that are no query's positive."""

    vectors: Float[Array, "h d"]
    modality: Int[Array, "h"] | None = None
    document: Int[Array, "h"] | None = None
    valid: Bool[Array, "h"] | None = None


def info_nce(
    queries: Float[Array, "n d"],
    candidates: Float[Array, "n d"],
    *,
    temperature: Temperature,
    valid: Bool[Array, "n"] | None = None,
    document: Int[Array, "n"] | None = None,
    negatives: Negatives | None = None,
    layout: Layout = DENSE,
) -> Float[Array, ""]:
    """InfoNCE (arXiv 1807.03748): every other candidate is a negative at one temperature."""
    rule = Rule(temperature, temperature, documents=document is not None)
    return _loss(queries, candidates, None, valid, document, negatives, rule, layout)


def mac_loss(
    queries: Float[Array, "n d"],
    candidates: Float[Array, "n d"],
    modality: Int[Array, "n"],
    *,
    tau_norm: Temperature,
    tau_hard: Temperature,
    relative: bool = False,
    valid: Bool[Array, "n"] | None = None,
    document: Int[Array, "n"] | None = None,
    negatives: Negatives | None = None,
    layout: Layout = DENSE,
) -> Float[Array, ""]:
    """Modality-adaptive contrastive loss (MAC-Loss, arXiv 2507.08064).

    Negatives of the modality of the query's own target, and the positive, are divided by
    `tau_hard`, all others by `tau_norm`.

    In the paper's form a negative of another modality that is as similar as the positive has a
    logit of s/tau_norm beside s/tau_hard, and hardly any gradient. With `relative` the temperatures
    divide s_ij − s_ii in place of s_ij: such a negative then weighs as much as one of the target's
    modality. Equal temperatures make both forms InfoNCE.

    Args:
        queries: See above.
        candidates: See above.
        modality: Code of each candidate's modality.
        tau_norm: Temperature of inter-modality negatives.
        tau_hard: Temperature of intra-modality negatives and positives; see `hard_temperature`.
        relative: Whether temperatures divide differences to the positive's score.
        valid: See above.
        document: See above.
        negatives: See above; with a modality.
        layout: See above.

    Raises:
        ConfigError: The negatives have no modality.
    """
    rule = Rule(tau_norm, tau_hard, relative=relative, documents=document is not None)
    return _loss(queries, candidates, modality, valid, document, negatives, rule, layout)


def mamcl_loss(
    queries: Float[Array, "n d"],
    candidates: Float[Array, "n d"],
    modality: Int[Array, "n"],
    *,
    temperature: Temperature,
    valid: Bool[Array, "n"] | None = None,
    document: Int[Array, "n"] | None = None,
    negatives: Negatives | None = None,
    layout: Layout = DENSE,
) -> Float[Array, ""]:
    """Modality-aware masked contrastive loss (MAMCL of UNITE, arXiv 2505.19650).

    Negatives of another modality than that of the query's target are left out.
    """
    rule = Rule(temperature, temperature, same_modality_only=True, documents=document is not None)
    return _loss(queries, candidates, modality, valid, document, negatives, rule, layout)


def hard_temperature(
    progress: Float[Array, ""] | float, tau_norm: Temperature, decay: float
) -> Float[Array, ""]:
    """Temperature of intra-modality pairs: tau_norm · exp(−decay · 2 · min(½, progress)).

    It falls until half time and stays there (arXiv 2507.08064). The released code rounds to three
    decimals, this does not.

    Args:
        progress: Fraction of training done.
        tau_norm: Where it starts.
        decay: 0.5 makes 0.030 end at 0.018.
    """
    return tau_norm * jnp.exp(-2 * decay * jnp.minimum(0.5, progress))


def learnable_temperature(
    log_scale: Float[Array, ""], *, coldest: float = 0.01
) -> Float[Array, ""]:
    """Temperature exp(−log_scale), for a scale that is trained (arXiv 2103.00020, section 2.3).

    Args:
        log_scale: The parameter; start it at log(1 / temperature).
        coldest: The temperature never falls below this, for stability.
    """
    return jnp.maximum(jnp.exp(-log_scale), coldest)


def _loss(
    queries: Array,
    candidates: Array,
    modality: Array | None,
    valid: Array | None,
    document: Array | None,
    negatives: Negatives | None,
    rule: Rule,
    layout: Layout,
) -> Float[Array, ""]:
    n = len(queries)
    keys = _keys(candidates, jnp.arange(n), modality, valid, document)
    further = None
    if negatives is not None:
        if modality is not None and negatives.modality is None:
            raise ConfigError("negatives have no modality, which this loss needs: give theirs too")
        h = len(negatives.vectors)
        of_document = negatives.document
        if document is not None and of_document is None:
            # Of unknown documents: a number that no candidate has.
            of_document = jnp.full(h, jnp.iinfo(jnp.int32).min)
        further = _keys(
            negatives.vectors,
            jnp.arange(n, n + h),
            None if modality is None else negatives.modality,
            negatives.valid,
            of_document,
        )
    return mean_loss(queries, keys, further, rule, layout)


def _keys(
    vectors: Array,
    index: Array,
    modality: Array | None,
    valid: Array | None,
    document: Array | None,
) -> Keys:
    n = len(vectors)
    labels = Labels(
        index=index,
        modality=jnp.zeros(n, jnp.int32) if modality is None else jnp.asarray(modality, jnp.int32),
        document=jnp.zeros(n, jnp.int32) if document is None else jnp.asarray(document, jnp.int32),
        valid=jnp.ones(n, bool) if valid is None else jnp.asarray(valid),
    )
    return Keys(vectors, labels)
