"""The forward pass: preprocessed items are packed into rows and encoded to unit vectors."""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import jax
import numpy as np
from jax.sharding import Mesh

from puma_jax.axes import TILE
from puma_jax.config import ComputeConfig, VisionConfig
from puma_jax.data.items import Item
from puma_jax.data.packing import Packing, fill, place
from puma_jax.data.shapes import fitting_shape
from puma_jax.errors import EvaluationError, PackingError
from puma_jax.model import encoder
from puma_jax.model.encoder import Encoder
from puma_jax.parallel import multihost
from puma_jax.parallel.mesh import batch_sharding, data_shards
from puma_jax.rows import PackedBatch, PackedShape
from puma_jax.typing import Array, Float, ndarray

# How many times the room that items need their rows may have, to save a compilation: items of one
# chunk when there are fewer than two programs, of one chunk later, and of up to eight chunks. The
# first two programs are tight, and nearly all calls of few items then take one of them.
_WASTE = (3, 8, 3)


Compiled = Callable[[Encoder, PackedBatch, ComputeConfig, int], Array]


@functools.cache
def vectors_of_rows() -> Compiled:
    """Return the compiled function from rows to the unit vectors of all slots."""
    return _compiled(encoder.l2_normalize)


@functools.cache
def states_of_rows() -> Compiled:
    """Return the compiled function from rows to the states of all slots, float32."""
    return _compiled(lambda states: states)


def _compiled(finish: Callable[[Array], Array]) -> Compiled:
    """Return the compiled function from rows to what `finish` makes of the pooled states."""
    # Most CPUs multiply bfloat16 in float32. By default XLA widens the weights of all layers ahead
    # of the loop over them, in every chunk: two more times the memory of the weights.
    by_layer = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
    return jax.jit(
        lambda params, rows, compute, data_shards: finish(
            encoder.encode(params, rows, compute, data_shards=data_shards)
        ),
        static_argnames=("compute", "data_shards"),
        compiler_options=by_layer if jax.default_backend() == "cpu" else None,
    )


def map_chunks(
    function: Callable[[PackedBatch], Array], batch: PackedBatch, mesh: Mesh | None
) -> list[Array]:
    """Start a compiled function on every chunk of a packed batch, and return its results.

    The results may still be under computation when this returns.

    Args:
        function: Compiled function of one chunk.
        batch: Packed items on the host, with a leading axis of chunks.
        mesh: Devices over which the rows of a chunk are sharded; None for a single device.
    """
    sharding = None if mesh is None else batch_sharding(mesh)
    results = []
    for number in range(len(batch.pool_index)):
        chunk = jax.tree.map(operator.itemgetter(number), batch)
        if sharding is not None:
            chunk = jax.tree.map(lambda part: multihost.put(part, sharding), chunk)
        results.append(function(chunk))
    return results


def shape_for(items: Sequence[Item], tokens: int, mesh: Mesh | None) -> PackedShape:
    """Return the shape of a chunk that items like these fill well.

    Args:
        items: Sample of the items to encode.
        tokens: About how many tokens a device reads in one forward pass.
        mesh: Devices that share a chunk; None for a single device.
    """
    shape = fitting_shape(*_sizes(items), tokens)
    return shape.with_data_shards(1 if mesh is None else data_shards(mesh))


@dataclass(frozen=True)
class Running:
    """Chunks that the devices are encoding."""

    packing: Packing
    vectors: list[Array]

    def finish(self, done: Callable[[int], object]) -> Float[ndarray, "n width"]:
        """Wait for the chunks, and return their vectors in the order of the items.

        Args:
            done: Called after each chunk with its number of items.
        """
        items = len(self.packing.chunk)
        out = np.empty((items, self.vectors[0].shape[-1]), np.float32)
        for chunk, vectors in enumerate(self.vectors):
            here = np.flatnonzero(self.packing.chunk == chunk)
            out[here] = np.asarray(multihost.gather_to_host(vectors))[self.packing.slot[here]]
            done(len(here))
        return out


@dataclass(frozen=True)
class Forward:
    """The forward pass of one model: its weights, how to run, and on which devices."""

    params: Encoder
    vision: VisionConfig
    compute: ComputeConfig
    mesh: Mesh | None
    """Devices that share the rows of a chunk; None runs on the device of the weights."""
    known_shapes: list[PackedShape] = field(default_factory=list)
    """Shapes of earlier calls, whose programs are compiled. New ones are added."""
    normalize: bool = True
    """Whether vectors are scaled to length 1."""

    def start(
        self, items: Sequence[Item], shape: PackedShape | None, tokens: int
    ) -> tuple[PackedShape, Running]:
        """Start to encode some items, in rows of a given shape if all of them fit into it.

        Args:
            items: Items to encode, in as many chunks as they need.
            shape: Shape of the call before; None for the first call.
            tokens: About how many tokens a device reads at a time; used for a new shape.

        Returns:
            The shape to pass to the next call, and the running chunks.
        """
        lengths, patches = _sizes(items)
        packing = None
        if shape is not None:
            # Items that are larger than the shape allows need a new one.
            with contextlib.suppress(PackingError):
                packing = place(lengths, patches, shape)
        if shape is None or packing is None:
            filled = shape = self._shape(lengths, patches, tokens)
            packing = place(lengths, patches, shape)
        else:
            # A window of texts alone among others is encoded without the vision tower.
            filled = shape if patches.any() else replace(shape, patch_rows=0)
        batch = fill(items, packing, filled, self.vision)
        encode = vectors_of_rows() if self.normalize else states_of_rows()
        shards = shape.data_shards
        vectors = map_chunks(
            lambda chunk: encode(self.params, chunk, self.compute, shards), batch, self.mesh
        )
        return shape, Running(packing, vectors)

    def _shape(self, lengths: ndarray, patches: ndarray, tokens: int) -> PackedShape:
        """Return the shape of an earlier call that wastes little on these items, or a new one.

        Calls of a few items each differ in all their sizes: with a shape for each, nearly every
        call would compile a program. Few items may waste some room, many may not; see `_WASTE`.
        """
        shards = 1 if self.mesh is None else data_shards(self.mesh)
        new = fitting_shape(lengths, patches, tokens).with_data_shards(shards)
        if not patches.any():
            new = replace(new, patch_rows=0)

        chunks = place(lengths, patches, new).chunks
        if chunks == 1:
            new = _rounded_up(new)
            waste = _WASTE[0] if len(self.known_shapes) < 2 else _WASTE[1]
        else:
            waste = _WASTE[2] if chunks <= 8 else 1
        limit = _cost(new, chunks) * waste
        # A few texts alone may take a program with a vision tower, too.
        shapes = self.known_shapes if chunks == 1 else _alike(self.known_shapes, patches)
        needed = _chunks_needed(lengths, patches, shapes)
        costs = {
            known: _cost(known, count) for known, count in needed.items() if count <= 4 * chunks
        }
        best = min(costs, key=lambda shape: costs[shape], default=None)
        if best is not None and costs[best] <= limit:
            return best
        self.known_shapes.append(new)
        return new


def cheapest_shape(items: Sequence[Item], costs: Mapping[PackedShape, float]) -> PackedShape:
    """Return the shape, out of some, in which some items are encoded soonest.

    Args:
        items: Items to encode together, in as many chunks as they need.
        costs: Shapes whose programs are compiled, and what a chunk of each costs, such as seconds.
            Texts alone take those without patch rows.

    Raises:
        PackingError: An item is larger than all shapes allow.
    """
    lengths, patches = _sizes(items)
    needed = _chunks_needed(lengths, patches, _alike(costs, patches))
    if not needed:
        raise PackingError(
            f"items of up to {lengths.max()} tokens and {patches.max()} patches fit none of "
            f"{len(costs)} shapes: use shapes with larger rows"
        )
    return min(needed, key=lambda shape: needed[shape] * costs[shape])


def _alike(shapes: Iterable[PackedShape], patches: ndarray) -> list[PackedShape]:
    """Return the shapes with a vision tower, or for texts alone those without one."""
    return [shape for shape in shapes if bool(shape.patch_rows) == bool(patches.any())]


def _chunks_needed(
    lengths: ndarray, patches: ndarray, shapes: Iterable[PackedShape]
) -> dict[PackedShape, int]:
    """Return how many chunks items take in each of the shapes that hold them."""
    needed = {}
    for shape in shapes:
        with contextlib.suppress(PackingError):
            needed[shape] = place(lengths, patches, shape).chunks
    return needed


def _cost(shape: PackedShape, chunks: int) -> int:
    """Return the tokens and patches, with padding, that chunks of a shape hold."""
    return chunks * (shape.rows * shape.length + shape.patch_rows * shape.patch_length)


def _rounded_up(shape: PackedShape) -> PackedShape:
    """Return a shape with room for a little more than it was made for."""
    rows, patch_rows = (
        shards * (1 << (size // shards - 1).bit_length()) if size else 0
        for shards in [shape.data_shards]
        for size in (shape.rows, shape.patch_rows)
    )
    patch_length = max(TILE, shape.patch_length)
    return replace(shape, rows=rows, patch_rows=patch_rows, patch_length=patch_length)


def check_vectors(vectors: Float[ndarray, "n width"], name: Callable[[int], str]) -> None:
    """Check that vectors are of finite numbers, and not zero.

    Args:
        vectors: One vector for each item.
        name: Returns what a message calls the item of a number.

    Raises:
        EvaluationError: A vector has a value that is not finite, or is zero.
    """
    finite = np.isfinite(vectors).all(1)
    for bad, what in ((~finite, "not finite"), (finite & ~vectors.any(1), "zero")):
        if bad.any():
            raise EvaluationError(
                f"{bad.sum():,} of {len(vectors):,} vectors are {what}, the first that of "
                f"{name(int(bad.argmax()))}: look at the model's weights and dtype"
            )


def first_values(
    vectors: Float[ndarray, "n width"], dimensions: int, name: Callable[[int], str]
) -> Float[ndarray, "n {dimensions}"]:
    """Return the first values of each unit vector, scaled to length 1.

    Args:
        vectors: One vector for each item.
        dimensions: Number of values, at most the width.
        name: Returns what a message calls the item of a number.

    Raises:
        EvaluationError: All of the first values of a vector are zero.
    """
    if dimensions == vectors.shape[1]:
        return vectors
    first = vectors[:, :dimensions]
    check_vectors(first, name)
    return first / np.linalg.norm(first, axis=1, keepdims=True)


def _sizes(items: Sequence[Item]) -> tuple[ndarray, ndarray]:
    """Return the number of tokens and the number of patches of each item."""
    return (
        np.array([len(item.tokens) for item in items]),
        np.array([len(item.patches) for item in items]),
    )
