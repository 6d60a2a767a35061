"""Rematerialization: what the backward pass keeps of a layer and what it computes again."""

from __future__ import annotations

from collections.abc import Callable

import jax

from puma_jax.config import Remat


def rematerialize(body: Callable, remat: Remat) -> Callable:
    """Return the body of a scan over layers, wrapped in `jax.checkpoint` as `remat` asks.

    "none" keeps every intermediate value, "dots" keeps the results of matrix products with
    weights, "full" keeps only what flows from layer to layer.
    """
    if remat == "none":
        return body
    policies = jax.checkpoint_policies
    policy = policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
    # Inside a scan the compiler cannot undo the recomputation, so no barrier is needed.
    return jax.checkpoint(body, policy=policy, prevent_cse=False)
