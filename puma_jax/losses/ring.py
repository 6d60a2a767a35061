"""The same loss in memory that does not grow with the number of devices: a ring of candidates.

Every device keeps its queries. Its candidates travel from device to device until all queries have
met all candidates; a running log-sum-exp (as in Ring Attention, arXiv 2310.01889) is all that is
kept of the scores. The backward pass sends the candidates round once more, computes each tile of
scores again, and sends the gradients of candidates along: after the last hop they are back on the
device that owns them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from puma_jax.losses.softmax import (
    Candidates,
    LogitRule,
    Metadata,
    negative_margins,
    positive_scores,
)
from puma_jax.typing import Array, Float

Tree = Any
Ring = tuple[tuple[str, ...], int | None, Any]
"""Axes of the mesh, the longest edge of a tile, and the structure of the rule."""


def ring_cross_entropy(
    queries: Float[Array, "n d"],
    positives: Candidates,
    candidates: Candidates,
    rule: LogitRule,
    *,
    axes: tuple[str, ...],
    tile: int | None,
) -> Float[Array, "n"]:
    """Return `softmax.cross_entropy` of this device's queries against all devices' candidates.

    It runs under `jax.shard_map`. Its gradient is that of reverse mode, and of first order.

    Args:
        queries: Unit vectors of this device.
        positives: The candidate that each query looks for, in the same order.
        candidates: This device's candidates, the positives among them; as many on every device.
        rule: How scores become logits, and which candidates count; the same on every device.
        axes: Axes of the mesh whose devices form the ring.
        tile: The most queries, and candidates, whose scores are held at a time; None for all.
    """
    # As values that differ by device, temperatures get each device's gradient, and the transpose
    # of this cast adds them up.
    rule = jax.tree.map(
        lambda tau: jax.lax.pcast(jnp.asarray(tau, jnp.float32), axes, to="varying"), rule
    )
    # Tuples, as custom_vjp fills its trees with placeholders that our dataclasses refuse.
    taus, form = jax.tree.flatten(rule)
    metadata = tuple(tuple(jax.tree.leaves(of.metadata)) for of in (positives, candidates))
    positive = positive_scores(queries, positives.vectors)
    ring = (axes, tile, form)
    losses = _losses(ring, queries, positive, candidates.vectors, tuple(taus), metadata)
    return jnp.where(positives.metadata.valid, losses, 0.0)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses(
    ring: Ring, queries: Array, positive: Array, vectors: Array, taus: Tree, metadata: Tree
) -> Float[Array, "n"]:
    """Return log(1 + Σ exp(margin)) of each query, over its negatives on all devices."""
    return _forward(ring, queries, positive, vectors, taus, metadata)[0]


def _forward(
    ring: Ring, queries: Array, positive: Array, vectors: Array, taus: Tree, metadata: Tree
) -> tuple[Array, Tree]:
    """Return the losses, and what the backward pass needs of this one."""
    axes, tile, form = ring
    rows = _tiled((queries, positive, metadata[0]), tile)

    def hop(carry: Tree, _: None) -> tuple[Tree, None]:
        candidates, sums = carry
        # Nothing here waits for what arrives, so that it can arrive meanwhile.
        arriving = _sent_on(candidates, axes)

        def meet(given: Tree) -> Tree:
            row, sums = given
            return jax.lax.scan(partial(add, row), sums, candidates)[0]

        return (arriving, jax.lax.map(meet, (rows, sums))), None

    def add(row: Tree, sums: Tree, candidates: Tree) -> tuple[Tree, None]:
        queries, positive, of_positives = row
        vectors, of_candidates = candidates
        margins = _margins(form, queries, positive, vectors, taus, (of_positives, of_candidates))
        largest, total = sums
        larger = jnp.maximum(largest, margins.max(axis=1))
        total = total * jnp.exp(largest - larger) + jnp.exp(margins - larger[:, None]).sum(axis=1)
        return (larger, total), None

    # The largest starts at the positive's own margin, which is 0: with −∞, a row without negatives
    # in its first tile would add exp(∞ − ∞).
    start = _zeros((rows[1], rows[1]))
    carry = _tiled((vectors, metadata[1]), tile), start
    (_, (largest, total)), _ = jax.lax.scan(hop, carry, length=jax.lax.axis_size(axes))
    largest, total = (_joined(tiles, len(queries)) for tiles in (largest, total))
    # log(exp(−largest) + total) + largest, in such a way that a small total is not lost beside 1.
    losses = largest + jnp.log1p(total + jnp.expm1(-largest))
    return losses, (queries, positive, vectors, taus, metadata, largest, total)


def _backward(ring: Ring, saved: Tree, cotangents: Array) -> tuple[Array, Array, Array, Tree, None]:
    """Return the gradients of queries, positives' scores, candidates and temperatures."""
    axes, tile, form = ring
    queries, positive, vectors, taus, metadata, largest, total = saved
    # The slope of log(1 + Σ exp(margin)) is exp(margin) / (1 + Σ exp(margin)), here both times
    # exp(−largest): the exponential of margin − loss would err by the rounding of a large loss.
    weights = cotangents / (jnp.exp(-largest) + total)
    rows = _tiled((queries, positive, metadata[0], largest, weights), tile)
    candidates = _tiled((vectors, metadata[1]), tile)

    def hop(carry: Tree, _: None) -> tuple[Tree, None]:
        candidates, to_candidates, to_rows, to_taus = carry
        arriving = _sent_on(candidates, axes)

        def meet(sums: Tree, given: Tree) -> tuple[Tree, Tree]:
            to_candidates, to_taus = sums
            row, to_row = given
            (to_row, to_taus), to_candidates = jax.lax.scan(
                partial(add, row), (to_row, to_taus), (candidates, to_candidates)
            )
            return (to_candidates, to_taus), to_row

        (to_candidates, to_taus), to_rows = jax.lax.scan(
            meet, (to_candidates, to_taus), (rows, to_rows)
        )
        return (arriving, _sent_on(to_candidates, axes), to_rows, to_taus), None

    def add(row: Tree, sums: Tree, given: Tree) -> tuple[Tree, Array]:
        queries, positive, of_positives, largest, weights = row
        (vectors, of_candidates), to_candidates = given

        def margins_of(queries: Array, positive: Array, vectors: Array, taus: Tree) -> Array:
            return _margins(form, queries, positive, vectors, taus, (of_positives, of_candidates))

        margins, gradient = jax.vjp(margins_of, *_float32((queries, positive, vectors)), taus)
        slopes = weights[:, None] * jnp.exp(margins - largest[:, None])
        of_queries, of_positive, of_vectors, of_taus = gradient(slopes)
        sums = jax.tree.map(jnp.add, sums, ((of_queries, of_positive), of_taus))
        return sums, to_candidates + of_vectors

    carry = candidates, _zeros(candidates[0]), _zeros(rows[:2]), _zeros(taus)
    (_, to_candidates, to_rows, to_taus), _ = jax.lax.scan(
        hop, carry, length=jax.lax.axis_size(axes)
    )
    to_queries, to_positive = (_joined(tiles, len(queries)) for tiles in to_rows)
    to_vectors = _joined(to_candidates, len(vectors)).astype(vectors.dtype)
    return to_queries.astype(queries.dtype), to_positive, to_vectors, to_taus, None


_losses.defvjp(_forward, _backward)


def _margins(
    form: Any, queries: Array, positive: Array, vectors: Array, taus: Tree, metadata: Tree
) -> Float[Array, "r m"]:
    of_positives, of_candidates = metadata
    candidates = Candidates(vectors, Metadata(*of_candidates))
    return negative_margins(
        queries, positive, Metadata(*of_positives), candidates, form.unflatten(taus)
    )


def _sent_on(tree: Tree, axes: tuple[str, ...]) -> Tree:
    """Return what the previous device of the ring holds; what this one holds goes to the next."""
    size = jax.lax.axis_size(axes)
    return jax.lax.ppermute(tree, axes, [(i, (i + 1) % size) for i in range(size)])


def _tiled(tree: Tree, tile: int | None) -> Tree:
    """Cut every leaf into tiles of equal length; zeros fill up the last one.

    Zeros are invalid candidates.
    """
    n = len(jax.tree.leaves(tree)[0])
    tiles = 1 if tile is None else -(-n // tile)
    length = -(-n // tiles)

    def cut(leaf: Array) -> Array:
        filled = jnp.pad(leaf, [(0, tiles * length - n)] + [(0, 0)] * (leaf.ndim - 1))
        return filled.reshape(tiles, length, *leaf.shape[1:])

    return jax.tree.map(cut, tree)


def _joined(tiles: Array, n: int) -> Array:
    """Return the first n entries of tiles, one tile after the other."""
    return tiles.reshape(-1, *tiles.shape[2:])[:n]


def _float32(tree: Tree) -> Tree:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)


def _zeros(tree: Tree) -> Tree:
    """Return float32 sums to start from, which vary over devices as the leaves do."""
    return jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.float32), tree)
