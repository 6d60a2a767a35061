"""The same loss in memory that does not grow with the number of devices: keys go round in a ring.

Every device keeps its queries. Its keys travel to the next device, and on, until all queries have
met all keys; a running log-sum-exp (as in Ring Attention, arXiv 2310.01889) is all that is kept of
the scores. The backward pass sends the keys round once more, computes each tile of scores again,
and lets the gradients of keys travel with them: after the last hop they are home.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from puma_jax.losses.softmax import Keys, Labels, Rule, negative_margins, own_scores
from puma_jax.typing import Array, Float

Tree = Any
Ring = tuple[tuple[str, ...], int | None, Any]
"""Axes of the mesh, the longest edge of a tile, and the structure of the rule."""


def ring_losses(
    queries: Float[Array, "n d"],
    positives: Keys,
    keys: Keys,
    rule: Rule,
    *,
    axes: tuple[str, ...],
    tile: int | None,
) -> Float[Array, "n"]:
    """Return `row_losses` of this device's queries against the keys of all devices.

    To be called under `jax.shard_map`. Its gradient is that of reverse mode, and of first order.

    Args:
        queries: Unit vectors, those of this device.
        positives: The key that each query looks for, in the same order.
        keys: This device's keys, the positives among them; as many on every device.
        rule: How scores become logits, and which keys count; the same on every device.
        axes: Axes of the mesh whose devices form the ring.
        tile: The most queries, and keys, whose scores are held at a time; None for all.
    """
    # As values that differ by device, temperatures get each device's gradient, and the transpose
    # of this cast adds them up.
    rule = jax.tree.map(
        lambda tau: jax.lax.pcast(jnp.asarray(tau, jnp.float32), axes, to="varying"), rule
    )
    # Tuples, as custom_vjp fills its trees with placeholders that our dataclasses refuse.
    taus, form = jax.tree.flatten(rule)
    labels = tuple(tuple(jax.tree.leaves(of.labels)) for of in (positives, keys))
    own = own_scores(queries, positives.vectors)
    losses = _losses((axes, tile, form), queries, own, keys.vectors, tuple(taus), labels)
    return jnp.where(positives.labels.valid, losses, 0.0)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses(
    ring: Ring, queries: Array, own: Array, vectors: Array, taus: Tree, labels: Tree
) -> Float[Array, "n"]:
    """Return log(1 + Σ exp(margin)) of each query, over its negatives on all devices."""
    return _forward(ring, queries, own, vectors, taus, labels)[0]


def _forward(
    ring: Ring, queries: Array, own: Array, vectors: Array, taus: Tree, labels: Tree
) -> tuple[Array, Tree]:
    """Return the losses, and what the backward pass needs of this one."""
    axes, tile, form = ring
    rows = _tiled((queries, own, labels[0]), tile)

    def hop(carry: Tree, _: None) -> tuple[Tree, None]:
        keys, sums = carry
        # Nothing here waits for what arrives, so that it can arrive meanwhile.
        arriving = _sent_on(keys, axes)

        def meet(given: Tree) -> Tree:
            row, sums = given
            return jax.lax.scan(partial(add, row), sums, keys)[0]

        return (arriving, jax.lax.map(meet, (rows, sums))), None

    def add(row: Tree, sums: Tree, keys: Tree) -> tuple[Tree, None]:
        queries, own, of_positives = row
        vectors, of_keys = keys
        margins = _margins(form, queries, own, vectors, taus, (of_positives, of_keys))
        largest, total = sums
        larger = jnp.maximum(largest, margins.max(axis=1))
        total = total * jnp.exp(largest - larger) + jnp.exp(margins - larger[:, None]).sum(axis=1)
        return (larger, total), None

    # The largest starts at the positive's own margin, which is 0: with −∞, a row without negatives
    # in its first tile would add exp(∞ − ∞).
    start = _zeros((rows[1], rows[1]))
    carry = _tiled((vectors, labels[1]), tile), start
    (_, (largest, total)), _ = jax.lax.scan(hop, carry, length=jax.lax.axis_size(axes))
    largest, total = (_joined(tiles, len(queries)) for tiles in (largest, total))
    # log(exp(−largest) + total) + largest, in such a way that a small total is not lost beside 1.
    losses = largest + jnp.log1p(total + jnp.expm1(-largest))
    return losses, (queries, own, vectors, taus, labels, largest, total)


def _backward(ring: Ring, saved: Tree, cotangents: Array) -> tuple[Array, Array, Array, Tree, None]:
    """Return gradients of queries, of their own scores, of keys and of temperatures."""
    axes, tile, form = ring
    queries, own, vectors, taus, labels, largest, total = saved
    # The slope of log(1 + Σ exp(margin)) is exp(margin) / (1 + Σ exp(margin)), here both times
    # exp(−largest): the exponential of margin − loss would err by the rounding of a large loss.
    weights = cotangents / (jnp.exp(-largest) + total)
    rows = _tiled((queries, own, labels[0], largest, weights), tile)
    keys = _tiled((vectors, labels[1]), tile)

    def hop(carry: Tree, _: None) -> tuple[Tree, None]:
        keys, to_keys, to_rows, to_taus = carry
        arriving = _sent_on(keys, axes)

        def meet(sums: Tree, given: Tree) -> tuple[Tree, Tree]:
            to_keys, to_taus = sums
            row, to_row = given
            (to_row, to_taus), to_keys = jax.lax.scan(
                partial(add, row), (to_row, to_taus), (keys, to_keys)
            )
            return (to_keys, to_taus), to_row

        (to_keys, to_taus), to_rows = jax.lax.scan(meet, (to_keys, to_taus), (rows, to_rows))
        return (arriving, _sent_on(to_keys, axes), to_rows, to_taus), None

    def add(row: Tree, sums: Tree, given: Tree) -> tuple[Tree, Array]:
        queries, own, of_positives, largest, weights = row
        (vectors, of_keys), to_keys = given

        def margins_of(queries: Array, own: Array, vectors: Array, taus: Tree) -> Array:
            return _margins(form, queries, own, vectors, taus, (of_positives, of_keys))

        margins, gradient = jax.vjp(margins_of, *_float32((queries, own, vectors)), taus)
        slopes = weights[:, None] * jnp.exp(margins - largest[:, None])
        of_queries, of_own, of_vectors, of_taus = gradient(slopes)
        sums = jax.tree.map(jnp.add, sums, ((of_queries, of_own), of_taus))
        return sums, to_keys + of_vectors

    carry = keys, _zeros(keys[0]), _zeros(rows[:2]), _zeros(taus)
    (_, to_keys, to_rows, to_taus), _ = jax.lax.scan(hop, carry, length=jax.lax.axis_size(axes))
    to_queries, to_own = (_joined(tiles, len(queries)) for tiles in to_rows)
    to_vectors = _joined(to_keys, len(vectors)).astype(vectors.dtype)
    return to_queries.astype(queries.dtype), to_own, to_vectors, to_taus, None


_losses.defvjp(_forward, _backward)


def _margins(
    form: Any, queries: Array, own: Array, vectors: Array, taus: Tree, labels: Tree
) -> Float[Array, "r m"]:
    of_positives, of_keys = labels
    keys = Keys(vectors, Labels(*of_keys))
    return negative_margins(queries, own, Labels(*of_positives), keys, form.unflatten(taus))


def _sent_on(tree: Tree, axes: tuple[str, ...]) -> Tree:
    """Return what the previous device of the ring holds; what this one holds goes to the next."""
    size = jax.lax.axis_size(axes)
    return jax.lax.ppermute(tree, axes, [(i, (i + 1) % size) for i in range(size)])


def _tiled(tree: Tree, tile: int | None) -> Tree:
    """Cut every leaf into tiles of equal length; zeros fill up the last one, as invalid keys."""
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
