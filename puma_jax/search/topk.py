"""Exact search: the k documents with the highest inner products, in a pool of any size.

The pool is read in tiles, and only the best k scores of each query are kept from one tile to the
next. On accelerators the tiles are distributed over all local devices, which work in parallel. On
a CPU, NumPy is used: its matrix product is faster than XLA's there, and it can select the few
scores that matter, which a compiled program of fixed shapes cannot.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from puma_jax.errors import ConfigError, EvaluationError
from puma_jax.typing import AnyArray, Array, Float, Int, ndarray

# Memory holds the scores of this many queries and one tile.
_QUERIES = 1024
_HOST_TILE = 4096
_FIRST_HOST_TILE = 256
_DEVICE_TILE = 16384
_BLOCK = 64

Best = tuple[AnyArray, AnyArray]
"""Scores and rows of the best documents so far, `[queries, k]` each, best first."""


def top_k(
    queries: Float[AnyArray, "queries width"],
    pool: Float[AnyArray, "documents width"] | Iterable[Float[AnyArray, "_ width"]],
    k: int,
    *,
    devices: Sequence[jax.Device] | None = None,
) -> tuple[Float[ndarray, "queries {k}"], Int[ndarray, "queries {k}"]]:
    """Return the k highest scores of each query and the rows of the pool they belong to.

    Scores are inner products in float32, also for bfloat16 vectors. Equal scores are ordered by
    row, and the lowest rows are kept. In a pool of fewer than k documents, the remaining places
    hold row -1 and score -inf.

    Args:
        queries: Query vectors.
        pool: Document vectors: an array, a `np.memmap`, or an iterable of arrays of any number
            of rows each, which is read once and never held as a whole.
        k: Number of documents to return for each query.
        devices: Devices to compute on; the default is all local accelerators, or NumPy if there
            are none. Every process searches by itself.

    Raises:
        ConfigError: k is below 1, or the vectors of queries and pool have different widths.
        EvaluationError: A score is not a finite number.
    """
    if k < 1:
        raise ConfigError(f"k is {k}, expected at least 1")
    width = queries.shape[1]
    if devices is None and jax.default_backend() != "cpu":
        devices = jax.local_devices()
    if devices is None:
        doubling = (_FIRST_HOST_TILE << n for n in itertools.count())
        sizes = (min(size, _HOST_TILE) for size in doubling)
        return _on_host(np.asarray(queries, np.float32), _tiles(pool, sizes, width), k)
    return _on_devices(queries, _tiles(pool, itertools.repeat(_DEVICE_TILE), width), k, devices)


def _tiles(
    pool: AnyArray | Iterable[AnyArray], sizes: Iterator[int], width: int
) -> Iterator[AnyArray]:
    """Yield the pool in tiles of the given sizes; the last may be smaller."""
    held: list[AnyArray] = []
    count = 0
    size = next(sizes)
    parts: Iterable[AnyArray] = [pool] if hasattr(pool, "shape") else pool
    for part in parts:
        if part.shape[1] != width:
            raise ConfigError(
                f"queries have {width} values and documents {part.shape[1]}: "
                "embed both with the same model"
            )
        held.append(part)
        count += len(part)
        if count < size:
            continue
        joined = held[0] if len(held) == 1 else np.concatenate(held)
        start = 0
        while count >= size:
            yield joined[start : start + size]
            start, count = start + size, count - size
            size = next(sizes)
        held = [joined[start:]]
    if count:
        yield held[0] if len(held) == 1 else np.concatenate(held)


def _not_finite(row: int) -> EvaluationError:
    return EvaluationError(
        f"the score of document {row} is not a finite number: its vector or that of a query holds "
        "NaN or infinity, look at the model's weights and dtype"
    )


def _on_host(queries: Float[ndarray, "queries width"], tiles: Iterator[AnyArray], k: int) -> Best:
    """Search with NumPy."""
    scores = np.full((len(queries), k), -np.inf, np.float32)
    rows = np.full((len(queries), k), -1, np.int64)
    buffer = np.empty(min(len(queries), _QUERIES) * _HOST_TILE, np.float32)
    first = 0
    for tile in tiles:
        documents = np.asarray(tile, np.float32).T
        for start in range(0, len(queries), _QUERIES):
            some = slice(start, start + _QUERIES)
            shape = len(queries[some]), len(tile)
            with np.errstate(invalid="ignore"):  # told below, with the document
                new = np.matmul(
                    queries[some], documents, out=buffer[: shape[0] * shape[1]].reshape(shape)
                )
            _add(scores[some], rows[some], new, first)
        first += len(tile)
    return scores, rows


def _add(
    scores: Float[ndarray, "queries k"],
    rows: Int[ndarray, "queries k"],
    new: Float[ndarray, "queries tile"],
    first: int,
) -> None:
    """Merge the scores of a tile, whose rows start at `first`, into the best so far, in place.

    Few scores exceed a query's k-th best so far (about k if the tile doubles the rows read): only
    those are gathered and sorted. Equal scores of later rows displace nothing and are dropped.
    """
    queries, k = scores.shape
    # Not "new > ...": scores that are not a number must not be passed over.
    flat = np.flatnonzero(~(new <= scores[:, -1:]))
    of_query, column = np.divmod(flat, new.shape[1])
    count = np.bincount(of_query, minlength=queries)
    widest = int(count.max(initial=0))
    if not widest:
        return
    place = k + np.arange(len(flat)) - np.repeat(np.cumsum(count) - count, count)
    all_scores = np.full((queries, k + widest), -np.inf, np.float32)
    all_rows = np.full((queries, k + widest), -1, np.int64)
    all_scores[:, :k], all_rows[:, :k] = scores, rows
    found = new.ravel()[flat]
    if not np.isfinite(found).all():
        raise _not_finite(first + int(column[~np.isfinite(found)][0]))
    all_scores[of_query, place] = found
    all_rows[of_query, place] = first + column
    best = np.argsort(-all_scores, axis=1, kind="stable")[:, :k]
    scores[:] = np.take_along_axis(all_scores, best, 1)
    rows[:] = np.take_along_axis(all_rows, best, 1)


def _on_devices(
    queries: AnyArray, tiles: Iterator[AnyArray], k: int, devices: Sequence[jax.Device]
) -> Best:
    """Search on several devices, which take tiles in turn."""
    starts = range(0, max(1, len(queries)), _QUERIES)
    chunks = [queries[start : start + _QUERIES] for start in starts]
    nothing = [
        (np.full((len(chunk), k), -np.inf, np.float32), np.full((len(chunk), k), -1, np.int32))
        for chunk in chunks
    ]
    queries_on = {device: jax.device_put(chunks, device) for device in devices}
    best: dict[jax.Device, list[Best]] = {
        device: jax.device_put(nothing, device) for device in devices
    }
    started: deque[list[Best]] = deque()
    first = 0
    for tile, device in zip(tiles, itertools.cycle(devices)):
        place = np.array([first, len(tile)], np.int32)
        vectors, place = jax.device_put((tile, place), device)
        whole = _padded(vectors, _DEVICE_TILE)
        best[device] = [
            _better(*of_chunk, chunk, whole, place)
            for of_chunk, chunk in zip(best[device], queries_on[device], strict=True)
        ]
        # At most one tile waits for each device, not the whole pool.
        started.append(best[device])
        if len(started) > 2 * len(devices):
            jax.block_until_ready(started.popleft())
        first += len(tile)
    found = [jax.device_get(of_device) for of_device in best.values()]
    scores = np.concatenate([np.concatenate([s for s, _ in of_one]) for of_one in found], axis=1)
    rows = np.concatenate([np.concatenate([r for _, r in of_one]) for of_one in found], axis=1)
    if np.isposinf(scores).any():
        raise _not_finite(int(rows[np.isposinf(scores)][0]))
    order = np.lexsort((rows, -scores), axis=-1)[:, :k]
    scores = np.take_along_axis(scores, order, 1)
    rows = np.take_along_axis(rows, order, 1).astype(np.int64)
    return scores, np.where(np.isneginf(scores), -1, rows)


@partial(jax.jit, static_argnums=1)
def _padded(tile: Float[Array, "_ width"], rows: int) -> Float[Array, "{rows} width"]:
    """Return a tile padded to full size, so that the last one needs no other program."""
    return jnp.pad(tile, ((0, rows - len(tile)), (0, 0)))


@jax.jit
def _better(
    scores: Float[Array, "queries k"],
    rows: Int[Array, "queries k"],
    queries: Float[Array, "queries width"],
    tile: Float[Array, "tile width"],
    place: Int[Array, "2"],
) -> Best:
    """Return the best scores and rows among those so far and those of a tile.

    `jax.lax.top_k` is slow over wide rows. The best k scores lie in the k blocks with the highest
    maxima: these blocks are found first, and only their scores are sorted.

    Args:
        scores: Best scores so far.
        rows: Rows of these scores, all below those of the tile.
        queries: Query vectors.
        tile: Document vectors.
        place: Row of the first of them in the pool, and how many of them are not padding.
    """
    k = scores.shape[1]
    dtype = jnp.promote_types(queries.dtype, tile.dtype)
    new = jnp.einsum(
        "qd,td->qt",
        queries.astype(dtype),
        tile.astype(dtype),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    # A score that is not a number ends up first, where it is found.
    new = jnp.where(jnp.isnan(new), jnp.inf, new)
    new = jnp.where(jnp.arange(len(tile)) < place[1], new, -jnp.inf)
    blocks = new.reshape(len(queries), len(tile) // _BLOCK, _BLOCK)
    _, chosen = jax.lax.top_k(blocks.max(-1), min(k, blocks.shape[1]))
    # top_k prefers the first of equal scores: rows must ascend.
    chosen = jnp.sort(chosen, axis=1)[:, :, None]
    inside = jnp.take_along_axis(blocks, chosen, axis=1)
    inside_rows = place[0] + chosen * _BLOCK + jnp.arange(_BLOCK)
    wide = len(queries), inside.shape[1] * _BLOCK
    all_scores = jnp.concatenate([scores, inside.reshape(wide)], axis=1)
    all_rows = jnp.concatenate([rows, inside_rows.reshape(wide)], axis=1)
    scores, best = jax.lax.top_k(all_scores, k)
    return scores, jnp.take_along_axis(all_rows, best, axis=1)
