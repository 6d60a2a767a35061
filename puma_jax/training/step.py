"""One training step: chunks of rows → vectors of the whole batch → loss → new weights.

Vectors come from a scan over chunks whose backward pass recomputes each chunk: the gradient cache
(arXiv 2101.06983) is one `jax.checkpoint`. The loss sees the vectors of the whole global batch;
activations take the memory of one chunk, whatever the size of the batch. A vision tower that is not
trained runs once: its tokens are kept, which take about the memory of the patches that come in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec

from puma_jax.axes import BATCH_AXES
from puma_jax.config import ComputeConfig
from puma_jax.data.pipeline import Batch
from puma_jax.model.dropout import token_keys
from puma_jax.model.encoder import Encoder, encode, encode_exits, visual_tokens
from puma_jax.model.tree import assemble
from puma_jax.parallel.mesh import data_shards
from puma_jax.rows import PackedBatch
from puma_jax.training.config import StageConfig
from puma_jax.training.objective import Metrics, PairStates, TeacherStates, stage_loss
from puma_jax.training.optimizer import Leaves, learning_rate, make_optimizer
from puma_jax.training.teacher import Teacher, TeacherFn
from puma_jax.typing import AnyArray, Array, Int, PRNGKeyArray

_KEPT = "visual_tokens"
"""Name of what the gradient cache keeps of a chunk, in place of computing it twice."""
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


Loss = Callable[[Leaves, Array, FrozenParams, Batch, TeacherStates | None], tuple[Array, Metrics]]
Step = Callable[[TrainState, FrozenParams, Batch, TeacherStates | None], tuple[TrainState, Metrics]]


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
        teacher_states: TeacherStates | None,
    ) -> tuple[Array, Metrics]:
        params = assemble(structure, {**frozen_params.student, **trained})
        dropout = None
        if config.trainable == "lora" and config.lora.dropout:
            dropout = jax.random.fold_in(key, step)
        states, computed = _pair_states(
            params,
            frozen_params,
            batch,
            config,
            compute,
            mesh,
            dropout,
            teacher_fn,
        )
        if teacher_states is None:
            teacher_states = computed
        log_scale = trained.get(TEMPERATURE)
        return stage_loss(config, states, teacher_states, batch, step / steps, log_scale, mesh)

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
        teacher_states: TeacherStates | None,
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
    config: StageConfig,
    compute: ComputeConfig,
    mesh: jax.sharding.Mesh,
    dropout: PRNGKeyArray | None,
    teacher_fn: TeacherFn | None,
) -> tuple[PairStates, TeacherStates | None]:
    """Return the student's states of a batch, and the teacher's if `teacher_fn` computes them."""
    shards = data_shards(mesh)
    chunks = batch.rows.tokens.shape[0]
    items = _items_of_slots(batch)

    def encode_chunk(rows: PackedBatch, items: Array) -> tuple[Array, Array | None]:
        keys = None if dropout is None else token_keys(dropout, rows, items, data_shards=shards)
        visual = None
        if not config.train_vision:
            # One run of a frozen tower does for student, teacher and backward pass.
            visual = checkpoint_name(visual_tokens(params, rows, compute), _KEPT)
        how: dict[str, Any] = {"data_shards": shards, "dropout_keys": keys, "visual": visual}
        if config.loss.exit_layers:
            states = encode_exits(params, rows, compute, config.loss.exit_layers, **how)
        else:
            states = encode(params, rows, compute, **how)
        if teacher_fn is None or frozen_params.teacher is None:
            return states, None
        return states, teacher_fn(frozen_params.teacher, frozen_params.student, rows, visual)

    if chunks == 1:
        # Recomputing the only chunk would save no memory.
        only = jax.tree.map(lambda leaf: leaf[0], batch.rows)
        states, teacher_states = jax.tree.map(lambda of: of[None], encode_chunk(only, items[0]))
    else:
        # Inside a scan the compiler cannot undo the recomputation, so no barrier is needed.
        recomputed = jax.checkpoint(
            encode_chunk,
            prevent_cse=False,
            policy=jax.checkpoint_policies.save_only_these_names(_KEPT),
        )
        _, (states, teacher_states) = jax.lax.scan(
            lambda _, chunk: (None, recomputed(*chunk)), None, (batch.rows, items)
        )

    def gather(states: Array, slots: Array) -> Array:
        # [chunks, *exits, slots, width] → [*exits, chunks · slots, width]
        states = jnp.moveaxis(states, 0, -3)
        states = states.reshape(*states.shape[:-3], -1, states.shape[-1])
        return _shard_pairs(jnp.take(states, slots, axis=-2, mode="clip"), mesh)

    negatives = batch.negatives
    student = PairStates(
        gather(states, batch.query_slot),
        gather(states, batch.candidate_slot),
        None if negatives is None else gather(states, negatives.slot.reshape(-1)),
    )
    if teacher_states is None:
        return student, None
    return student, TeacherStates(
        gather(teacher_states, batch.query_slot) if config.distill.items == "pairs" else None,
        gather(teacher_states, batch.candidate_slot),
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


def _shard_pairs(vectors: Array, mesh: jax.sharding.Mesh) -> Array:
    """Shard the vectors of pairs over the devices that compute the loss."""
    if mesh.size == 1:
        return vectors
    spec = PartitionSpec(*[None] * (vectors.ndim - 2), BATCH_AXES)
    return jax.lax.with_sharding_constraint(vectors, NamedSharding(mesh, spec))
