"""Prepared items to unit vectors: packed into rows, chunk by chunk, over the devices of a mesh."""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np
from jax.sharding import Mesh

from puma_jax.config import ComputeConfig, VisionConfig
from puma_jax.data.items import Item
from puma_jax.data.packing import Placement, fill, place
from puma_jax.data.shapes import fitting_shape
from puma_jax.errors import PackingError
from puma_jax.model import encoder
from puma_jax.model.encoder import Encoder
from puma_jax.parallel import multihost
from puma_jax.parallel.mesh import batch_sharding, groups
from puma_jax.rows import Rows, RowShape
from puma_jax.typing import Array, Float, ndarray


@functools.cache
def vectors_of_rows() -> Callable[[Encoder, Rows, ComputeConfig, int], Array]:
    """Return the compiled function from rows to the unit vectors of all slots."""
    # XLA for CPUs multiplies bfloat16 in float32. Left to itself it widens the weights of all
    # layers before the loop over them: twice their memory more, for every chunk anew.
    by_layer = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
    return jax.jit(
        lambda params, rows, compute, groups: encoder.unit(
            encoder.encode(params, rows, compute, groups=groups)
        ),
        static_argnames=("compute", "groups"),
        compiler_options=by_layer if jax.default_backend() == "cpu" else None,
    )


def shape_for(items: Sequence[Item], tokens: int, mesh: Mesh | None) -> RowShape:
    """Return the shape of a chunk that items like these fill well.

    Args:
        items: Some of them.
        tokens: About how many tokens a device shall read at a time.
        mesh: Whose devices share a chunk; None for a single one.
    """
    shape = fitting_shape(*_sizes(items), tokens)
    parts = 1 if mesh is None else groups(mesh)
    return RowShape(
        rows=shape.rows * parts,
        length=shape.length,
        patch_rows=shape.patch_rows * parts,
        patch_length=shape.patch_length,
        slots=shape.slots * parts,
        groups=parts,
    )


@dataclass(frozen=True)
class Running:
    """Chunks that the devices are working on."""

    placement: Placement
    vectors: list[Array]

    def finish(self, done: Callable[[int], object]) -> Float[ndarray, "n width"]:
        """Wait for the chunks and return their vectors in the order of the items.

        Args:
            done: Is told of every chunk how many items it had.
        """
        items = len(self.placement.chunk)
        out = np.empty((items, self.vectors[0].shape[-1]), np.float32)
        for chunk, vectors in enumerate(self.vectors):
            here = np.flatnonzero(self.placement.chunk == chunk)
            out[here] = np.asarray(multihost.on_host(vectors))[self.placement.slot[here]]
            done(len(here))
        return out


@dataclass(frozen=True)
class Forward:
    """How items become vectors: the weights, and where and how the work is done."""

    params: Encoder
    vision: VisionConfig
    compute: ComputeConfig
    mesh: Mesh | None
    """Whose devices share the rows of a chunk; None leaves everything where the weights are."""

    def start(
        self, items: Sequence[Item], shape: RowShape | None, tokens: int
    ) -> tuple[RowShape, Running]:
        """Start on some items, in rows of a shape used before if they fit.

        Args:
            items: All of them go into as many chunks as they need.
            shape: Used before; None if there is none.
            tokens: See `shape_for`, which is asked for a shape if there is none that fits.

        Returns:
            The shape to use next, and the work that was started.
        """
        lengths, patches = _sizes(items)
        placement = None
        if shape is not None:
            # Items larger than those the shape was made for ask for another one.
            with contextlib.suppress(PackingError):
                placement = place(lengths, patches, shape)
        if shape is None or placement is None:
            shape = shape_for(items, tokens, self.mesh)
            placement = place(lengths, patches, shape)
        # Texts alone need no tower: a second program, without it, reads them.
        filled = shape if patches.any() else replace(shape, patch_rows=0)
        rows = fill(items, placement, filled, self.vision)
        chunks = [
            vectors_of_rows()(
                self.params,
                self._put(jax.tree.map(operator.itemgetter(chunk), rows)),
                self.compute,
                shape.groups,
            )
            for chunk in range(placement.chunks)
        ]
        return shape, Running(placement, chunks)

    def _put(self, rows: Rows) -> Rows:
        if self.mesh is None:
            return rows
        where = batch_sharding(self.mesh)
        return jax.tree.map(lambda part: multihost.put(part, where), rows)


def _sizes(items: Sequence[Item]) -> tuple[ndarray, ndarray]:
    """Return how many tokens and how many patches each item has."""
    return (
        np.array([len(item.tokens) for item in items]),
        np.array([len(item.patches) for item in items]),
    )
