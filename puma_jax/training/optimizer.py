"""AdamW or Muon over named leaves: warm-up, cosine, and a scaled rate for the first layer."""

from __future__ import annotations

import math
from typing import Any

import jax
import optax
from optax import contrib

from puma_jax.training.config import OptimizerConfig
from puma_jax.typing import AnyArray

Leaves = dict[str, AnyArray]
"""Arrays by name; `puma_jax.model.tree` names them."""

_NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5
"""Coefficients of each iteration (https://kellerjordan.github.io/posts/muon). Given one by one,
they are looped over, which compiles in a fraction of the time that five copies take."""


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Return the schedule: a linear warm-up to the peak, then half a cosine down to 0."""
    warmup = round(config.warmup_ratio * steps)
    return optax.warmup_cosine_decay_schedule(
        init_value=config.learning_rate / (warmup + 1),  # not 0: the first step counts, too
        peak_value=config.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(steps, warmup + 1),
    )


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Return AdamW (arXiv 1711.05101) or Muon (arXiv 2502.16982) for leaves by name.

    Args:
        config: Config of the optimizer.
        steps: Number of steps of the stage, over which the rate falls to 0.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        _scale(config),
        optax.add_decayed_weights(config.weight_decay, mask=_decays),
        optax.stateless(
            lambda updates, _: _with_slower_first_layer(updates, config.first_layer_lr_scale)
        ),
        optax.scale_by_learning_rate(learning_rate(config, steps)),
    )


def _scale(config: OptimizerConfig) -> optax.GradientTransformation:
    """Return what turns gradients into updates, before decay and the learning rate."""
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.eps)
    if config.kind == "adamw":
        return adam
    muon = optax.chain(
        contrib.scale_by_muon(
            ns_coeffs=_NEWTON_SCHULZ, beta=config.momentum, weight_dimension_numbers=_matrices
        ),
        optax.stateless(lambda updates, _: jax.tree.map(_with_rms_of_adam, updates)),
    )
    return optax.partition({"muon": muon, "adam": adam}, _kinds)


def _kinds(leaves: Leaves) -> dict[str, str]:
    """Return by which method each leaf is updated."""
    return {name: "muon" if name.endswith(".kernel") else "adam" for name in leaves}


def _matrices(kernels: Any) -> Any:
    """Return which axes of each kernel are its matrix; layers are matrices of their own."""
    return jax.tree.map(lambda _: contrib.MuonDimensionNumbers(-2, -1), kernels)


def _with_rms_of_adam(update: AnyArray) -> AnyArray:
    """Return a matrix whose singular values are about 1 with AdamW's root mean square, 0.2."""
    return 0.2 * math.sqrt(max(update.shape[-2:])) * update


def _decays(leaves: Leaves) -> dict[str, bool]:
    return {name: name.endswith((".kernel", ".table", ".lora_a", ".lora_b")) for name in leaves}


def _with_slower_first_layer(updates: Leaves, factor: float) -> Leaves:
    """Return the updates, with those of the first decoder layer multiplied by a factor."""
    if factor == 1.0:
        return updates
    return {
        name: update.at[0].multiply(factor) if name.startswith("decoder.layers.") else update
        for name, update in updates.items()
    }
