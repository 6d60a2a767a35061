"""Attention over packed rows: one function, and the kernels that compute it, chosen by name.

A row holds several items. An item is one run of equal segment ids, and attention never crosses from
one segment to another. Padding is a segment of its own (id 0), so that no row of the softmax is
empty.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from puma_jax.axes import BATCH_AXES, TENSOR_AXIS
from puma_jax.config import ComputeConfig
from puma_jax.errors import AttentionError
from puma_jax.model import kernels
from puma_jax.model.tokamax import tokamax
from puma_jax.typing import Array, Bool, Float, Int


def attention(
    q: Float[Array, "rows length heads dim"],
    k: Float[Array, "rows length kv_heads dim"],
    v: Float[Array, "rows length kv_heads dim"],
    *,
    segment_ids: Int[Array, "rows length"],
    causal: bool,
    implementation: str = "auto",
) -> Float[Array, "rows length heads dim"]:
    """Return softmax attention, scaled by 1/√dim, inside each segment of each row.

    Args:
        q: Queries; `heads` is a multiple of `kv_heads` (grouped-query attention).
        k: Keys.
        v: Values.
        segment_ids: Number of the item at each position; positions of different items do not
            attend to each other. No number comes back after another one in a row.
        causal: Whether a position attends only to itself and earlier positions in the row.
        implementation: A name in `kernels.NAMES`, or "auto": the fastest kernel that computes such
            rows here; see `kernels.choose`.

    Returns:
        The attended values, in the dtype of `q`; the softmax is float32.

    Raises:
        AttentionError: The implementation is unknown or cannot run on this machine. It is never
            replaced by another one silently.
    """
    if implementation != "xla":  # which runs anywhere, also in exports, whose lengths are symbols
        target = kernels.Target(_platform(q), str(q.dtype), q.shape[1], q.shape[3])
        if implementation == "auto":
            implementation = kernels.choose(target)
        kernels.check(implementation, target)
    return IMPLEMENTATIONS[implementation](q, k, v, segment_ids, causal)


def describe(compute: ComputeConfig) -> str:
    """Return one line that names the implementation used on this machine, and why.

    Raises:
        AttentionError: The implementation is unknown or cannot run on this machine.
    """
    return kernels.describe(compute.attention, jax.default_backend(), compute.dtype)


def segment_mask(
    segment_ids: Int[Array, "rows length"], causal: bool
) -> Bool[Array, "rows 1 length length"]:
    """Return True where a query position (third axis) attends to a key position (fourth axis)."""
    mask = segment_ids[:, :, None] == segment_ids[:, None, :]
    if causal:
        length = segment_ids.shape[1]
        mask &= jnp.tril(jnp.ones((length, length), bool))
    return mask[:, None]


def constrain_batch_sharding(
    x: Float[Array, "rows length width"],
) -> Float[Array, "rows length width"]:
    """Return `x`, constrained to be sharded over devices by its rows and by nothing else.

    Weights are spread over the same devices. Without the constraint the compiler may leave them in
    place and gather the rows, which takes several times the memory. One device needs no constraint.
    """
    mesh = _mesh_of(x)
    if mesh is None:
        return x
    spec = PartitionSpec(_row_axes(mesh, x.shape[0]))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def _xla(
    q: Float[Array, "rows length heads dim"],
    k: Float[Array, "rows length kv_heads dim"],
    v: Float[Array, "rows length kv_heads dim"],
    segment_ids: Int[Array, "rows length"],
    causal: bool,
) -> Float[Array, "rows length heads dim"]:
    return jax.nn.dot_product_attention(
        q, k, v, mask=segment_mask(segment_ids, causal), implementation="xla"
    )


def _splash(q: Array, k: Array, v: Array, segment_ids: Array, causal: bool) -> Array:
    from puma_jax.model.splash import splash  # Pallas takes long to import

    return on_each_device(functools.partial(splash, causal=causal), q, k, v, segment_ids)


def _tokamax(kernel: str, q: Array, k: Array, v: Array, segment_ids: Array, causal: bool) -> Array:
    return on_each_device(
        functools.partial(tokamax, causal=causal, kernel=kernel), q, k, v, segment_ids
    )


def _cudnn(q: Array, k: Array, v: Array, segment_ids: Array, causal: bool) -> Array:
    def kernel(q: Array, k: Array, v: Array, segment_ids: Array) -> Array:
        # cuDNN knows lengths and windows but no segments: it adds the mask to the scores.
        mask = segment_mask(segment_ids, causal)
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")

    return on_each_device(kernel, q, k, v, segment_ids)


IMPLEMENTATIONS: dict[str, Callable[..., Array]] = {
    "xla": _xla,
    "splash": _splash,
    "mosaic": functools.partial(_tokamax, "mosaic_gpu"),
    "triton": functools.partial(_tokamax, "triton"),
    "cudnn": _cudnn,
}


def on_each_device(
    kernel: Callable[[Array, Array, Array, Array], Array],
    q: Float[Array, "rows length heads dim"],
    k: Float[Array, "rows length kv_heads dim"],
    v: Float[Array, "rows length kv_heads dim"],
    segment_ids: Int[Array, "rows length"],
) -> Float[Array, "rows length heads dim"]:
    """Return what a kernel computes of each device's own rows and heads.

    XLA cannot partition a kernel. Key heads that do not divide over the devices are repeated until
    they do; the query heads of one key head stay neighbors.

    Raises:
        AttentionError: The query heads do not divide over the devices.
    """
    mesh = _mesh_of(q)
    if mesh is None:
        return kernel(q, k, v, segment_ids)
    rows = _row_axes(mesh, q.shape[0])
    heads, kv_heads, shards = q.shape[2], k.shape[2], mesh.shape.get(TENSOR_AXIS, 1)
    repeats = math.lcm(kv_heads, shards) // kv_heads
    if heads % (kv_heads * repeats):
        raise AttentionError(
            f"{heads} query heads and {kv_heads} key heads do not divide over {shards} devices: "
            f"choose another size of the mesh axis {TENSOR_AXIS}"
        )
    k, v = (jnp.repeat(x, repeats, axis=2) for x in (k, v))
    by_head = PartitionSpec(rows, None, TENSOR_AXIS if shards > 1 else None)
    return jax.shard_map(
        kernel,
        mesh=mesh,
        in_specs=(by_head, by_head, by_head, PartitionSpec(rows)),
        out_specs=by_head,
        check_vma=False,  # a kernel does not declare over which axes its results vary
    )(q, k, v, segment_ids)


# In a compiled function whose arguments live on a mesh, jax knows the mesh of every value, so that
# no caller has to pass it down.


def _mesh_of(x: Array) -> AbstractMesh | None:
    """Return the mesh that a value lives on; None for one device and for meshes of other axes."""
    mesh = jax.typeof(x).sharding.mesh
    known = set(BATCH_AXES) & set(mesh.axis_names)
    if mesh.size <= 1 or not known or set(mesh.axis_types) != {AxisType.Auto}:
        return None
    return mesh


def _row_axes(mesh: AbstractMesh, rows: int) -> tuple[str, ...] | None:
    """Return the mesh axes that this many rows are sharded over; None if they do not divide."""
    axes = tuple(axis for axis in BATCH_AXES if axis in mesh.shape)
    return axes if rows % math.prod(mesh.shape[axis] for axis in axes) == 0 else None


def _platform(x: Array) -> str:
    """Return the platform that a value is compiled for, which need not be this machine's."""
    device = jax.typeof(x).sharding.mesh.abstract_device
    return jax.default_backend() if device is None else device.platform
