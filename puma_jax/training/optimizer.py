"""AdamW over named leaves, a cosine with a warm-up, a rate of its own for the first layer."""

from __future__ import annotations

import jax.numpy as jnp
import optax

from puma_jax.training.config import OptimizerConfig
from puma_jax.typing import AnyArray, Array

Leaves = dict[str, AnyArray]
"""Arrays by the names of `puma_jax.model.tree`."""


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Return the rate of each step: from 0 to its peak and by half a cosine back to 0."""
    warmup = round(config.warmup * steps)
    return optax.warmup_cosine_decay_schedule(
        init_value=config.learning_rate / (warmup + 1),  # a first step of nothing is wasted
        peak_value=config.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(steps, warmup + 1),
    )


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Return AdamW for leaves by name (arXiv 1711.05101).

    Args:
        config: How to step.
        steps: Of the whole stage, over which the rate falls to 0.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.scale_by_adam(config.beta1, config.beta2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=_decays),
        optax.stateless(lambda updates, _: _with_slower_first_layer(updates, config.first_layer)),
        optax.scale_by_learning_rate(learning_rate(config, steps)),
    )


def _decays(leaves: Leaves) -> dict[str, bool]:
    return {name: name.endswith((".kernel", ".table", ".lora_a", ".lora_b")) for name in leaves}


def _with_slower_first_layer(updates: Leaves, factor: float) -> Leaves:
    """Return the updates, those of the first decoder layer multiplied by a factor."""
    if factor == 1.0:
        return updates
    return {
        name: update.at[0].multiply(factor) if name.startswith("decoder.layers.") else update
        for name, update in updates.items()
    }


def global_norm(leaves: Leaves) -> Array:
    """Return the Euclidean norm of all leaves together, float32."""
    return jnp.sqrt(sum(jnp.sum(leaf.astype(jnp.float32) ** 2) for leaf in leaves.values()))
