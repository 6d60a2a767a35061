"""Contrastive losses over in-batch negatives. Query i looks for candidate i.

With s_ij the cosine of query i and candidate j, every loss here is a cross-entropy, the mean over
the valid pairs i of

    −log( exp(l_ii) / Σ_j exp(l_ij) ),

and the losses differ in how the logit l_ij follows from s_ij and in which negatives j count. Each
function below states its logits; `losses.sharded.mean_cross_entropy` computes the rest.

Arguments they share:
    queries, candidates: Unit vectors, pair by pair.
    valid: Which pairs count; a pair that does not is no negative of other queries either. None
        counts all pairs.
    document: Number of the document of each candidate. Candidates with the same number as a
        query's own are left out of its negatives. None makes every other candidate a negative.
    negatives: Further candidates that are no query's positive, such as hard negatives.
    mask_margin: Negatives whose cosine exceeds that of the query's positive by more are left out,
        as likely answers; None keeps all. Qwen3-Embedding takes 0.1 (arXiv 2506.05176).
    layout: How the work is spread over memory and devices; the result does not depend on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from puma_jax.errors import ConfigError
from puma_jax.losses.sharded import DENSE, Layout, mean_cross_entropy
from puma_jax.losses.softmax import Candidates, LogitRule, Logits, Metadata, Temperature
from puma_jax.typing import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Negatives:
    """Candidates that are no query's positive."""

    vectors: Float[Array, "h d"]
    modality: Int[Array, "h"] | None = None
    document: Int[Array, "h"] | None = None
    valid: Bool[Array, "h"] | None = None


def _mac_logits(
    scores: Array,
    positive: Array,
    same_modality: Array,
    tau_norm: Temperature,
    tau_hard: Temperature,
) -> Logits:
    """Return the logits s_ij / τ_ij and, of the positives, s_ii / tau_hard."""
    temperature = jnp.where(same_modality, tau_hard, tau_norm)
    return scores / temperature, positive / tau_hard


def _relative_mac_logits(
    scores: Array,
    positive: Array,
    same_modality: Array,
    tau_norm: Temperature,
    tau_hard: Temperature,
) -> Logits:
    """Return the logits (s_ij − s_ii) / τ_ij and, of the positives, 0."""
    temperature = jnp.where(same_modality, tau_hard, tau_norm)
    return (scores - positive) / temperature, jnp.zeros_like(positive)


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
    mask_margin: float | None = None,
    layout: Layout = DENSE,
) -> Float[Array, ""]:
    """Return the modality-adaptive contrastive loss (MAC-Loss, arXiv 2507.08064).

    The logit is l_ij = s_ij / τ_ij. The temperature τ_ij is `tau_hard` where candidate j has the
    modality of the query's own target, as the positive has, and `tau_norm` elsewhere.

    In the paper's form a negative of another modality that is as similar as the positive has a
    logit of s/tau_norm beside s/tau_hard, and hardly any gradient. With `relative` the logit is
    l_ij = (s_ij − s_ii) / τ_ij: such a negative then weighs as much as one of the target's
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
        mask_margin: See above.
        layout: See above.

    Raises:
        ConfigError: The negatives have no modality.
    """
    logits = _relative_mac_logits if relative else _mac_logits
    rule = LogitRule(
        (tau_norm, tau_hard),
        logits,
        mask_documents=document is not None,
        mask_margin=mask_margin,
    )
    positives, further = _with_metadata(candidates, modality, valid, document, negatives)
    return mean_cross_entropy(queries, positives, further, rule, layout)


def info_nce(
    queries: Float[Array, "n d"],
    candidates: Float[Array, "n d"],
    *,
    temperature: Temperature,
    valid: Bool[Array, "n"] | None = None,
    document: Int[Array, "n"] | None = None,
    negatives: Negatives | None = None,
    mask_margin: float | None = None,
    layout: Layout = DENSE,
) -> Float[Array, ""]:
    """Return InfoNCE (arXiv 1807.03748): all negatives count, at one temperature.

    The logit is l_ij = s_ij / temperature: MAC-Loss with equal temperatures.
    """
    rule = LogitRule(
        (temperature, temperature),
        _mac_logits,
        mask_documents=document is not None,
        mask_margin=mask_margin,
    )
    positives, further = _with_metadata(candidates, None, valid, document, negatives)
    return mean_cross_entropy(queries, positives, further, rule, layout)


def mamcl_loss(
    queries: Float[Array, "n d"],
    candidates: Float[Array, "n d"],
    modality: Int[Array, "n"],
    *,
    temperature: Temperature,
    valid: Bool[Array, "n"] | None = None,
    document: Int[Array, "n"] | None = None,
    negatives: Negatives | None = None,
    mask_margin: float | None = None,
    layout: Layout = DENSE,
) -> Float[Array, ""]:
    """Return the modality-aware masked contrastive loss (MAMCL of UNITE, arXiv 2505.19650).

    The logit is l_ij = s_ij / temperature, and negatives of another modality than the query's
    target are left out.

    Raises:
        ConfigError: The negatives have no modality.
    """
    rule = LogitRule(
        (temperature, temperature),
        _mac_logits,
        same_modality_only=True,
        mask_documents=document is not None,
        mask_margin=mask_margin,
    )
    positives, further = _with_metadata(candidates, modality, valid, document, negatives)
    return mean_cross_entropy(queries, positives, further, rule, layout)


def hard_temperature(
    progress: Float[Array, ""] | float, tau_norm: Temperature, decay: float
) -> Float[Array, ""]:
    """Return the intra-modality temperature, tau_norm · exp(−decay · 2 · min(½, progress)).

    It falls until half of the training is done and stays there (arXiv 2507.08064). The released
    code rounds it to three decimals; this function does not.

    Args:
        progress: Fraction of training done, 0 to 1.
        tau_norm: Temperature at the start.
        decay: Rate of the decay; 0.5 makes 0.030 end at 0.018.
    """
    return tau_norm * jnp.exp(-2 * decay * jnp.minimum(0.5, progress))


def learnable_temperature(
    log_scale: Float[Array, ""], *, minimum: float = 0.01
) -> Float[Array, ""]:
    """Return the temperature exp(−log_scale) of a trained scale (arXiv 2103.00020, section 2.3).

    Args:
        log_scale: The parameter; start it at log(1 / temperature).
        minimum: The lowest temperature returned, for stability.
    """
    return jnp.maximum(jnp.exp(-log_scale), minimum)


def _with_metadata(
    candidates: Array,
    modality: Array | None,
    valid: Array | None,
    document: Array | None,
    negatives: Negatives | None,
) -> tuple[Candidates, Candidates | None]:
    """Return the positives and the further negatives, numbered through; see `mac_loss`.

    Raises:
        ConfigError: The loss uses modalities and the negatives have none.
    """
    n = len(candidates)
    positives = _candidates(candidates, jnp.arange(n), modality, valid, document)
    if negatives is None:
        return positives, None
    if modality is not None and negatives.modality is None:
        raise ConfigError("negatives have no modality, which this loss needs: give theirs too")
    h = len(negatives.vectors)
    documents = negatives.document
    if document is not None and documents is None:
        # Negatives of unknown documents get a number that no candidate has.
        documents = jnp.full(h, jnp.iinfo(jnp.int32).min)
    further = _candidates(
        negatives.vectors,
        jnp.arange(n, n + h),
        None if modality is None else negatives.modality,
        negatives.valid,
        documents,
    )
    return positives, further


def _candidates(
    vectors: Array,
    index: Array,
    modality: Array | None,
    valid: Array | None,
    document: Array | None,
) -> Candidates:
    n = len(vectors)
    metadata = Metadata(
        index=index,
        modality=jnp.zeros(n, jnp.int32) if modality is None else jnp.asarray(modality, jnp.int32),
        document=jnp.zeros(n, jnp.int32) if document is None else jnp.asarray(document, jnp.int32),
        valid=jnp.ones(n, bool) if valid is None else jnp.asarray(valid),
    )
    return Candidates(vectors, metadata)
