"""One training step: chunks of rows → vectors of the whole batch → loss → new weights.

Vectors come from a scan over chunks whose backward pass recomputes each chunk: the gradient cache
(arXiv 2101.06983) is one `jax.checkpoint`. The loss sees the vectors of the whole global batch;
activations take the memory of one chunk, whatever the size of the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from puma_jax import losses
from puma_jax.axes import BATCH_AXES
from puma_jax.config import ComputeConfig
from puma_jax.data.pipeline import Batch
from puma_jax.model.dropout import token_keys
from puma_jax.model.encoder import Encoder, encode, l2_normalize
from puma_jax.model.tree import assemble
from puma_jax.parallel.mesh import data_shards
from puma_jax.rows import PackedBatch
from puma_jax.training.config import LossConfig, StageConfig
from puma_jax.training.optimizer import Leaves, learning_rate, make_optimizer
from puma_jax.training.teacher import Teacher, TeacherFn
from puma_jax.typing import AnyArray, Array, Float, Int, PRNGKeyArray

Metrics = dict[str, Array]

TEMPERATURE = "log_scale"
"""Name of the trained leaf that holds the logarithm of 1 / temperature."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a step updates, and a checkpoint holds."""

    step: AnyArray
    trained: Leaves
    optimizer: optax.OptState


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FrozenParams:
    """Parameters that no step updates; they are never copied."""

    student: Leaves
    """Leaves of the student that it does not train; the teacher reads them, too."""
    teacher: Teacher | None = None
    """Leaves that only the teacher has; None if steps compute no teacher's states."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PairStates:
    """Pooled states of the queries and the candidates of a batch, of student or teacher.

    The arrays are NumPy's on the host and JAX's on devices.
    """

    query: Float[AnyArray, "pairs width"]
    candidate: Float[AnyArray, "pairs width"]
    negative: Float[AnyArray, "negatives width"] | None = None
    """Of the student alone: distillation is over pairs. Those of one pair come together."""


Loss = Callable[[Leaves, Array, FrozenParams, Batch, PairStates | None], tuple[Array, Metrics]]
Step = Callable[[TrainState, FrozenParams, Batch, PairStates | None], tuple[TrainState, Metrics]]


def init_state(config: StageConfig, steps: int, trained: Leaves) -> TrainState:
    """Return the state before the first step.

    Args:
        config: Config of the stage.
        steps: Number of steps of the stage.
        trained: Leaves to train, float32.
    """
    if config.loss.learn_temperature:
        trained = {**trained, TEMPERATURE: -jnp.log(jnp.float32(config.loss.temperature))}
    optimizer = make_optimizer(config.optimizer, steps).init(trained)
    return TrainState(jnp.zeros((), jnp.int32), trained, optimizer)


def make_loss(
    config: StageConfig,
    steps: int,
    structure: Encoder,
    compute: ComputeConfig,
    mesh: jax.sharding.Mesh,
    key: PRNGKeyArray,
    teacher_fn: TeacherFn | None = None,
) -> Loss:
    """Return the loss of a stage, a function of trained leaves, step number and batch.

    Args:
        config: Config of the stage.
        steps: Number of steps of the stage.
        structure: The student; only its structure is used, not its leaves.
        compute: How to run.
        mesh: Devices over which rows, pairs and weights are sharded.
        key: Key from which dropout masks are drawn, by step.
        teacher_fn: Computes the teacher's states in every step; None if they come with the batch.
    """

    def loss(
        trained: Leaves,
        step: Array,
        frozen_params: FrozenParams,
        batch: Batch,
        teacher_states: PairStates | None,
    ) -> tuple[Array, Metrics]:
        params = assemble(structure, {**frozen_params.student, **trained})
        dropout = None
        if config.trainable == "lora" and config.lora.dropout:
            dropout = jax.random.fold_in(key, step)
        states, computed = _pair_states(
            params, frozen_params, batch, compute, mesh, dropout, teacher_fn
        )
        if teacher_states is None:
            teacher_states = computed
        log_scale = trained.get(TEMPERATURE)
        return _loss(config, states, teacher_states, batch, step / steps, log_scale, mesh)

    return loss


def make_step(config: StageConfig, steps: int, loss: Loss) -> Step:
    """Return the step of a stage, a pure function; compile it with its state donated.

    Args:
        config: Config of the stage.
        steps: Number of steps of the stage.
        loss: Loss function from `make_loss`.
    """
    optimizer = make_optimizer(config.optimizer, steps)
    rate = learning_rate(config.optimizer, steps)

    def step(
        state: TrainState,
        frozen_params: FrozenParams,
        batch: Batch,
        teacher_states: PairStates | None,
    ) -> tuple[TrainState, Metrics]:
        gradients, metrics = jax.grad(loss, has_aux=True)(
            state.trained, state.step, frozen_params, batch, teacher_states
        )
        updates, moments = optimizer.update(gradients, state.optimizer, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        metrics |= {"gradient_norm": optax.tree.norm(gradients), "learning_rate": rate(state.step)}
        return TrainState(state.step + 1, trained, moments), metrics

    return step


def _pair_states(
    params: Encoder,
    frozen_params: FrozenParams,
    batch: Batch,
    compute: ComputeConfig,
    mesh: jax.sharding.Mesh,
    dropout: PRNGKeyArray | None,
    teacher_fn: TeacherFn | None,
) -> tuple[PairStates, PairStates | None]:
    """Return the student's states of a batch, and the teacher's if `teacher_fn` computes them."""
    shards = data_shards(mesh)
    chunks = batch.rows.tokens.shape[0]
    items = _items_of_slots(batch)

    def encode_chunk(rows: PackedBatch, items: Array) -> tuple[Array, Array | None]:
        keys = None if dropout is None else token_keys(dropout, rows, items, data_shards=shards)
        states = encode(params, rows, compute, data_shards=shards, dropout_keys=keys)
        if teacher_fn is None or frozen_params.teacher is None:
            return states, None
        return states, teacher_fn(frozen_params.teacher, frozen_params.student, rows)

    if chunks == 1:
        # Recomputing the only chunk would save no memory.
        only = jax.tree.map(lambda leaf: leaf[0], batch.rows)
        states, teacher_states = encode_chunk(only, items[0])
    else:
        # Inside a scan the compiler cannot undo the recomputation, so no barrier is needed.
        recomputed = jax.checkpoint(encode_chunk, prevent_cse=False)
        _, (states, teacher_states) = jax.lax.scan(
            lambda _, chunk: (None, recomputed(*chunk)), None, (batch.rows, items)
        )

    pair_slots = batch.query_slot, batch.candidate_slot
    slots: tuple[Array, ...] = pair_slots
    if batch.negatives is not None:
        slots = (*pair_slots, batch.negatives.slot.reshape(-1))

    def gather(states: Array, slots: tuple[Array, ...]) -> PairStates:
        states = states.reshape(-1, states.shape[-1])
        taken = (jnp.take(states, places, axis=0, mode="clip") for places in slots)
        return PairStates(*(_shard_pairs(vectors, mesh) for vectors in taken))

    return gather(states, slots), (
        None if teacher_states is None else gather(teacher_states, pair_slots)
    )


def _items_of_slots(batch: Batch) -> Int[Array, "chunks slots"]:
    """Return the number of the item in each slot, or −1; it does not depend on the packing."""
    chunks, slots = batch.rows.pool_index.shape
    pairs = jnp.arange(len(batch.query_slot), dtype=jnp.int32)
    items = jnp.full(chunks * slots, -1, jnp.int32)
    # The slots of padding pairs are out of range.
    items = items.at[batch.query_slot].set(2 * pairs, mode="drop")
    items = items.at[batch.candidate_slot].set(2 * pairs + 1, mode="drop")
    if batch.negatives is not None:
        # Counted down from the largest number, because padding changes the number of pairs.
        slot = batch.negatives.slot.reshape(-1)
        numbers = jnp.iinfo(jnp.int32).max - jnp.arange(len(slot), dtype=jnp.int32)
        items = items.at[slot].set(numbers, mode="drop")
    return items.reshape(chunks, slots)


def _loss(
    config: StageConfig,
    states: PairStates,
    teacher_states: PairStates | None,
    batch: Batch,
    progress: Array,
    log_scale: Array | None,
    mesh: jax.sharding.Mesh,
) -> tuple[Array, Metrics]:
    """Return the loss of a batch, and its terms as metrics."""
    temperature: losses.Temperature = config.loss.temperature
    if log_scale is not None:
        temperature = losses.learnable_temperature(log_scale)
    hard = temperature
    if config.loss.kind == "mac":
        hard = losses.hard_temperature(progress, temperature, config.loss.decay)
    vectors = [l2_normalize(states.query), l2_normalize(states.candidate)]
    if states.negative is not None:
        vectors.append(l2_normalize(states.negative))
    contrastive, narrow = losses.matryoshka(
        _contrastive(config.loss, batch, temperature, hard, _layout(config.loss, mesh)),
        vectors,
        config.loss.widths,
    )
    metrics = {"contrastive": contrastive, "temperature": jnp.asarray(hard)}
    metrics |= {f"contrastive_{width}": value for width, value in narrow.items()}
    loss = contrastive
    if teacher_states is not None:
        start, end = config.distill.weight
        weight = start + (end - start) * progress
        distillation = config.distill.scale * (
            losses.distill_loss(states.query, teacher_states.query, valid=batch.valid)
            + losses.distill_loss(states.candidate, teacher_states.candidate, valid=batch.valid)
        )
        loss = (1 - weight) * contrastive + weight * distillation
        metrics["distillation"] = distillation
    return loss, {"loss": loss, **metrics}


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


def _shard_pairs(vectors: Array, mesh: jax.sharding.Mesh) -> Array:
    """Shard the vectors of pairs over the devices that compute the loss."""
    if mesh.size == 1:
        return vectors
    return jax.lax.with_sharding_constraint(vectors, NamedSharding(mesh, PartitionSpec(BATCH_AXES)))
