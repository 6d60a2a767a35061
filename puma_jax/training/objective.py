"""The loss of a stage over the states of a batch, at every width and depth that it trains."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from puma_jax import losses
from puma_jax.axes import BATCH_AXES
from puma_jax.data.pipeline import Batch
from puma_jax.model.encoder import l2_normalize
from puma_jax.training.config import DistillConfig, LossConfig, ScoreDistillConfig, StageConfig
from puma_jax.typing import AnyArray, Array, Float

Metrics = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PairStates:
    """Pooled states of the queries and the candidates of a batch.

    Those of a model that is trained for several depths have a leading axis of depths, all layers
    last.
    """

    query: Float[Array, "*exits pairs width"]
    candidate: Float[Array, "*exits pairs width"]
    negative: Float[Array, "*exits negatives width"] | None = None
    """Hard negatives; those of one pair come together."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TeacherStates:
    """Pooled states that the teacher has of the pairs of a batch.

    The arrays are NumPy's on the host and JAX's on devices.
    """

    query: Float[AnyArray, "pairs width"] | None
    """None if the student learns the states of candidates alone."""
    candidate: Float[AnyArray, "pairs width"]


def stage_loss(
    config: StageConfig,
    states: PairStates,
    teacher_states: TeacherStates | None,
    batch: Batch,
    progress: Array,
    log_scale: Array | None,
    mesh: jax.sharding.Mesh,
) -> tuple[Array, Metrics]:
    """Return the loss of a batch, and its terms as metrics.

    With several depths it is the weighted sum of the losses that the model has at each of them,
    contrastive and distilled alike; the terms are those of all layers.

    Args:
        config: Config of the stage.
        states: The student's states.
        teacher_states: The teacher's states of the pairs; None if the stage does not distill.
        batch: Metadata of the pairs and of hard negatives.
        progress: Fraction of training done, 0 to 1.
        log_scale: Logarithm of 1 / temperature if it is trained; None if it is fixed.
        mesh: Devices over which the pairs are sharded.
    """

    def at_one_depth(states: PairStates) -> tuple[Array, Metrics]:
        return _loss(config, states, teacher_states, batch, progress, log_scale, mesh)

    exits = config.loss.exit_layers
    if not exits:
        return at_one_depth(states)
    # One program for all depths, and the scores of one at a time.
    of_depths, terms = jax.lax.map(at_one_depth, states)
    weights = jnp.array([*(config.loss.exit_weights or [1.0] * len(exits)), 1.0])
    metrics = {name: values[-1] for name, values in terms.items()}
    metrics |= {f"loss_{layers}_layers": of_depths[i] for i, layers in enumerate(exits)}
    loss = jnp.sum(weights * of_depths)
    return loss, metrics | {"loss": loss}


def _loss(
    config: StageConfig,
    states: PairStates,
    teacher_states: TeacherStates | None,
    batch: Batch,
    progress: Array,
    log_scale: Array | None,
    mesh: jax.sharding.Mesh,
) -> tuple[Array, Metrics]:
    """Return the loss of a batch at one depth, and its terms; see `stage_loss`."""
    temperature: losses.Temperature = config.loss.temperature
    if log_scale is not None:
        temperature = losses.learnable_temperature(log_scale)
    hard = temperature
    if config.loss.kind == "mac":
        hard = losses.hard_temperature(progress, temperature, config.loss.decay)
    vectors = [l2_normalize(states.query), l2_normalize(states.candidate)]
    if states.negative is not None:
        vectors.append(l2_normalize(states.negative))
    layout = _layout(config.loss, mesh)
    contrastive, narrow = losses.matryoshka(
        _contrastive(config.loss, batch, temperature, hard, layout),
        vectors,
        config.loss.widths,
        config.loss.width_weights,
    )
    metrics = {"contrastive": contrastive, "temperature": jnp.asarray(hard)}
    metrics |= {f"contrastive_{width}": value for width, value in narrow.items()}
    loss = contrastive
    if teacher_states is not None:
        start, end = config.distill.weight
        weight = start + (end - start) * progress
        distillation = _distillation(config.distill, states, teacher_states, batch, layout)
        loss = (1 - weight) * contrastive + weight * distillation
        metrics["distillation"] = distillation
    if config.score_distill.weight:
        scores = functools.partial(_score_loss, config.score_distill, batch)
        distilled, _ = losses.matryoshka(
            scores, vectors, config.loss.widths, config.loss.width_weights
        )
        loss = loss + config.score_distill.weight * distilled
        metrics["score_distillation"] = distilled
    return loss, {"loss": loss, **metrics}


def _distillation(
    config: DistillConfig,
    student: PairStates,
    teacher: TeacherStates,
    batch: Batch,
    layout: losses.Layout,
) -> Array:
    """Return what the student has not learned of the teacher, scaled."""
    if config.target == "states":
        error = losses.distill_loss(student.candidate, teacher.candidate, valid=batch.valid)
        if teacher.query is not None:
            error += losses.distill_loss(student.query, teacher.query, valid=batch.valid)
        return config.scale * error
    assert teacher.query is not None  # the config refuses similarities without queries
    return config.scale * losses.similarity_distill_loss(
        (l2_normalize(student.query), l2_normalize(teacher.query)),
        (l2_normalize(student.candidate), l2_normalize(teacher.candidate)),
        temperature=config.temperature,
        valid=batch.valid,
        layout=layout,
    )


def _contrastive(
    config: LossConfig,
    batch: Batch,
    temperature: losses.Temperature,
    hard: losses.Temperature,
    layout: losses.Layout,
) -> Callable[..., Array]:
    """Return the contrastive loss of a batch, a function of its unit vectors.

    Args:
        config: Config of the loss.
        batch: Metadata of the pairs and of hard negatives.
        temperature: Temperature; in MAC-Loss, tau_norm.
        hard: tau_hard of MAC-Loss; not used by other losses.
        layout: How the work is spread.
    """
    document = batch.document if config.mask_same_document else None

    def loss(queries: Array, candidates: Array, negatives: Array | None = None) -> Array:
        shared: dict[str, Any] = {
            "valid": batch.valid,
            "document": document,
            "negatives": None if negatives is None else _negatives(config, negatives, batch),
            "mask_margin": config.mask_margin,
            "layout": layout,
        }
        if config.kind == "info_nce":
            return losses.info_nce(queries, candidates, temperature=temperature, **shared)
        if config.kind == "mamcl":
            return losses.mamcl_loss(
                queries, candidates, batch.modality, temperature=temperature, **shared
            )
        return losses.mac_loss(
            queries,
            candidates,
            batch.modality,
            tau_norm=temperature,
            tau_hard=hard,
            relative=config.relative,
            **shared,
        )

    return loss


def _score_loss(
    config: ScoreDistillConfig, batch: Batch, queries: Array, candidates: Array, negatives: Array
) -> Array:
    """Return what a teacher's scores of each query's own documents add to the loss."""
    assert batch.scores is not None and batch.negatives is not None  # noqa: PT018 (checked before)
    of_query = negatives.reshape(len(queries), -1, queries.shape[-1])
    valid = batch.valid[:, None] & jnp.pad(
        batch.negatives.valid, ((0, 0), (1, 0)), constant_values=True
    )
    return losses.score_distill_loss(
        queries,
        jnp.concatenate([candidates[:, None], of_query], axis=1),
        jnp.concatenate([batch.scores.positive[:, None], batch.scores.negative], axis=1),
        temperature=config.temperature,
        teacher_temperature=config.teacher_temperature,
        valid=valid,
    )


def _negatives(config: LossConfig, vectors: Array, batch: Batch) -> losses.Negatives:
    """Return the hard negatives of a batch, each a negative of all of its queries."""
    assert batch.negatives is not None  # their vectors come from it
    modality, document, valid = (
        column.reshape(-1)
        for column in (batch.negatives.modality, batch.negatives.document, batch.negatives.valid)
    )
    return losses.Negatives(
        vectors, modality, document if config.mask_same_document else None, valid
    )


def _layout(config: LossConfig, mesh: jax.sharding.Mesh) -> losses.Layout:
    return losses.Layout(
        config.chunk_size, mesh if mesh.size > 1 else None, BATCH_AXES, config.cross_device
    )
