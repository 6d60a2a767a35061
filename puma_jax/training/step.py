"""One training step: chunks of rows → vectors of the whole batch → loss → new weights.

Vectors come from a scan over chunks whose backward pass computes each chunk again: the gradient
cache (arXiv 2101.06983) is one `jax.checkpoint`. The loss sees the vectors of the whole global
batch; memory is that of one chunk, whatever the batch.
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
from puma_jax.config import ComputeConfig
from puma_jax.data.pipeline import Batch
from puma_jax.model.dropout import token_keys
from puma_jax.model.encoder import Encoder, encode, unit
from puma_jax.model.tree import assemble
from puma_jax.parallel.mesh import BATCH_AXES, groups
from puma_jax.rows import Rows
from puma_jax.training.config import LossConfig, StageConfig
from puma_jax.training.optimizer import Leaves, global_norm, learning_rate, make_optimizer
from puma_jax.training.teacher import Teach, Teacher
from puma_jax.typing import AnyArray, Array, Float, Int, PRNGKeyArray

Metrics = dict[str, Array]

TEMPERATURE = "log_scale"
"""Name, among trained leaves, of the logarithm of 1 / temperature."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """What a step changes."""

    step: AnyArray
    trained: Leaves
    optimizer: optax.OptState


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Fixed:
    """What no step changes, and what is therefore never copied."""

    frozen: Leaves
    teacher: Teacher | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Targets:
    """States of the teacher for the items of a batch, where they come from a cache.

    The arrays are NumPy's on the host and jax's on devices.
    """

    query: Float[AnyArray, "pairs width"]
    candidate: Float[AnyArray, "pairs width"]


Loss = Callable[[Leaves, Array, Fixed, Batch, Targets | None], tuple[Array, Metrics]]
Step = Callable[[State, Fixed, Batch, Targets | None], tuple[State, Metrics]]


def init_state(config: StageConfig, steps: int, trained: Leaves) -> State:
    """Return the state before the first step.

    Args:
        config: Of the stage.
        steps: Of the stage.
        trained: Leaves that shall be trained, float32.
    """
    if config.loss.learn_temperature:
        trained = {**trained, TEMPERATURE: -jnp.log(jnp.float32(config.loss.temperature))}
    optimizer = make_optimizer(config.optimizer, steps).init(trained)
    return State(jnp.zeros((), jnp.int32), trained, optimizer)


def make_loss(
    config: StageConfig,
    steps: int,
    structure: Encoder,
    compute: ComputeConfig,
    mesh: jax.sharding.Mesh,
    key: PRNGKeyArray,
    teach: Teach | None = None,
) -> Loss:
    """Return the loss of a stage: of trained leaves, the number of the step, and a batch.

    Args:
        config: Of the stage.
        steps: Of the stage.
        structure: The model, whatever its leaves are.
        compute: How to run.
        mesh: Devices that rows, pairs and weights are spread over.
        key: From which dropout is drawn, by step.
        teach: The teacher, where its states do not come from a cache.
    """

    def loss(
        trained: Leaves, step: Array, fixed: Fixed, batch: Batch, targets: Targets | None
    ) -> tuple[Array, Metrics]:
        params = assemble(structure, {**fixed.frozen, **trained})
        dropout = None
        if config.train == "lora" and config.lora.dropout:
            dropout = jax.random.fold_in(key, step)
        states, taught = _states(params, fixed, batch, compute, mesh, dropout, teach)
        taught = taught if targets is None else targets
        return _loss(config, states, taught, batch, step / steps, trained.get(TEMPERATURE), mesh)

    return loss


def make_step(config: StageConfig, steps: int, loss: Loss) -> Step:
    """Return the step of a stage, a pure function to be compiled with its state given away.

    Args:
        config: Of the stage.
        steps: Of the stage.
        loss: From `make_loss`.
    """
    optimizer = make_optimizer(config.optimizer, steps)
    rate = learning_rate(config.optimizer, steps)

    def step(
        state: State, fixed: Fixed, batch: Batch, targets: Targets | None
    ) -> tuple[State, Metrics]:
        gradients, metrics = jax.grad(loss, has_aux=True)(
            state.trained, state.step, fixed, batch, targets
        )
        updates, moments = optimizer.update(gradients, state.optimizer, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        metrics |= {"gradient_norm": global_norm(gradients), "learning_rate": rate(state.step)}
        return State(state.step + 1, trained, moments), metrics

    return step


def _states(
    params: Encoder,
    fixed: Fixed,
    batch: Batch,
    compute: ComputeConfig,
    mesh: jax.sharding.Mesh,
    dropout: PRNGKeyArray | None,
    teach: Teach | None,
) -> tuple[Targets, Targets | None]:
    """Return the states of all items of a batch, and what the teacher makes of them."""
    parts = groups(mesh)
    chunks = batch.rows.tokens.shape[0]
    items = _items_of_slots(batch)

    def one(rows: Rows, items: Array) -> tuple[Array, Array | None]:
        keys = None if dropout is None else token_keys(dropout, rows, items, groups=parts)
        states = encode(params, rows, compute, groups=parts, dropout_keys=keys)
        if teach is None or fixed.teacher is None:
            return states, None
        return states, teach(fixed.teacher, fixed.frozen, rows)

    if chunks == 1:
        # Nothing is gained by computing the only chunk twice.
        states, taught = one(jax.tree.map(lambda leaf: leaf[0], batch.rows), items[0])
    else:
        # Inside a scan the compiler cannot undo the recomputation, so no barrier is needed.
        chunk = jax.checkpoint(one, prevent_cse=False)
        _, (states, taught) = jax.lax.scan(
            lambda _, of_chunk: (None, chunk(*of_chunk)), None, (batch.rows, items)
        )

    def pick(states: Array | None) -> Targets | None:
        if states is None:
            return None
        states = states.reshape(-1, states.shape[-1])
        return Targets(
            *(
                _over_devices(jnp.take(states, slots, axis=0, mode="clip"), mesh)
                for slots in (batch.query_slot, batch.candidate_slot)
            )
        )

    picked = pick(states)
    assert picked is not None
    return picked, pick(taught)


def _items_of_slots(batch: Batch) -> Int[Array, "chunks slots"]:
    """Return the number of the item in each slot, the same however the batch is packed; or −1."""
    chunks, slots = batch.rows.ret.shape
    pairs = jnp.arange(len(batch.query_slot), dtype=jnp.int32)
    items = jnp.full(chunks * slots, -1, jnp.int32)
    # Pairs that only fill up the batch point behind the last slot.
    items = items.at[batch.query_slot].set(2 * pairs, mode="drop")
    items = items.at[batch.candidate_slot].set(2 * pairs + 1, mode="drop")
    return items.reshape(chunks, slots)


def _loss(
    config: StageConfig,
    states: Targets,
    taught: Targets | None,
    batch: Batch,
    progress: Array,
    log_scale: Array | None,
    mesh: jax.sharding.Mesh,
) -> tuple[Array, Metrics]:
    """Return the loss of a batch, and what it is made of."""
    contrastive, temperature = _contrastive(
        config.loss, states, batch, progress, log_scale, _layout(config.loss, mesh)
    )
    metrics = {"contrastive": contrastive, "temperature": jnp.asarray(temperature)}
    loss = contrastive
    if taught is not None:
        start, end = config.distill.weight
        weight = start + (end - start) * progress
        distillation = config.distill.scale * (
            losses.distill_loss(states.query, taught.query, valid=batch.valid)
            + losses.distill_loss(states.candidate, taught.candidate, valid=batch.valid)
        )
        loss = (1 - weight) * contrastive + weight * distillation
        metrics["distillation"] = distillation
    return loss, {"loss": loss, **metrics}


def _contrastive(
    config: LossConfig,
    states: Targets,
    batch: Batch,
    progress: Array,
    log_scale: Array | None,
    layout: losses.Layout,
) -> tuple[Array, Array | float]:
    """Return the contrastive loss and the temperature of the positives."""
    temperature = (
        config.temperature if log_scale is None else losses.learnable_temperature(log_scale)
    )
    queries, candidates = unit(states.query), unit(states.candidate)
    shared: dict[str, Any] = {
        "valid": batch.valid,
        "document": batch.candidate if config.mask_same_document else None,
        "layout": layout,
    }
    if config.kind == "info_nce":
        return losses.info_nce(queries, candidates, temperature=temperature, **shared), temperature
    if config.kind == "mamcl":
        loss = losses.mamcl_loss(
            queries, candidates, batch.modality, temperature=temperature, **shared
        )
        return loss, temperature
    hard = losses.hard_temperature(progress, temperature, config.decay)
    loss = losses.mac_loss(
        queries,
        candidates,
        batch.modality,
        tau_norm=temperature,
        tau_hard=hard,
        relative=config.relative,
        **shared,
    )
    return loss, hard


def _layout(config: LossConfig, mesh: jax.sharding.Mesh) -> losses.Layout:
    return losses.Layout(
        config.rows, mesh if mesh.size > 1 else None, BATCH_AXES, config.over_devices
    )


def _over_devices(vectors: Array, mesh: jax.sharding.Mesh) -> Array:
    """Spread the vectors of pairs over the devices that share the loss."""
    if mesh.size == 1:
        return vectors
    return jax.lax.with_sharding_constraint(vectors, NamedSharding(mesh, PartitionSpec(BATCH_AXES)))
