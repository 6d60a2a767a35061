"""One attention over packed rows; the kernels that compute it live behind its name.

Rows hold several items. An item is a run of equal segment ids, and attention never crosses from
one segment to another. Padding is a segment like any other (id 0), so that no row of the softmax
is ever empty.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from puma_jax.config import ComputeConfig
from puma_jax.errors import AttentionError
from puma_jax.typing import Array, Bool, Float, Int

TILE = 128
"""Rows of whole tiles are what the splash kernel takes."""
ROW_AXES = ("data", "fsdp")
"""Axes of a mesh that rows are spread over."""
HEAD_AXIS = "tensor"
"""The axis of a mesh that heads are spread over."""


def attention(
    q: Float[Array, "rows length heads dim"],
    k: Float[Array, "rows length kv_heads dim"],
    v: Float[Array, "rows length kv_heads dim"],
    *,
    segments: Int[Array, "rows length"],
    causal: bool,
    implementation: str = "auto",
) -> Float[Array, "rows length heads dim"]:
    """Softmax attention, scaled by 1/√dim, inside each segment of each row.

    Args:
        q: Queries; `heads` is a multiple of `kv_heads` (grouped-query attention).
        k: Keys.
        v: Values.
        segments: Item of each position; positions with different ids do not see each other.
        causal: Whether a position sees only itself and what stands before it in the row.
        implementation: A name in `IMPLEMENTATIONS`, or "auto": "splash" on TPUs for rows that it
            takes, "xla" for all others.

    Returns:
        The attended values, in the dtype of `q`; the softmax is float32.

    Raises:
        AttentionError: The implementation is unknown or cannot run on this machine. It is never
            replaced by another one in silence.
    """
    if implementation == "auto":
        fits = _platform(q) == "tpu" and q.shape[1] % TILE == 0
        implementation = "splash" if fits else "xla"
    _check_name(implementation)
    return IMPLEMENTATIONS[implementation](q, k, v, segments, causal)


def describe(compute: ComputeConfig) -> str:
    """Return a line about the attention that this machine computes.

    Raises:
        AttentionError: The implementation is unknown, or not for this machine.
    """
    name, platform = compute.attention, jax.default_backend()
    if name == "auto":
        if platform == "tpu":
            return f"attention: splash (auto, tpu), xla in rows that are not a multiple of {TILE}"
        return f"attention: xla (auto, {platform})"
    _check_name(name)
    if name == "splash":
        _check_splash(platform, TILE)
    return f"attention: {name} ({platform})"


def segment_mask(
    segments: Int[Array, "rows length"], causal: bool
) -> Bool[Array, "rows 1 length length"]:
    """True where a query position (third axis) may see a key position (fourth axis)."""
    mask = segments[:, :, None] == segments[:, None, :]
    if causal:
        length = segments.shape[1]
        mask &= jnp.tril(jnp.ones((length, length), bool))
    return mask[:, None]


def pin_rows(x: Float[Array, "rows length width"]) -> Float[Array, "rows length width"]:
    """Return `x`, told to the compiler to be spread over devices by its rows and not otherwise.

    Weights are spread over the same devices. Left to itself the compiler may leave them in place
    and gather the rows, which takes several times the memory. On one device nothing is said.
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
    segments: Int[Array, "rows length"],
    causal: bool,
) -> Float[Array, "rows length heads dim"]:
    return jax.nn.dot_product_attention(
        q, k, v, mask=segment_mask(segments, causal), implementation="xla"
    )


def _splash(
    q: Float[Array, "rows length heads dim"],
    k: Float[Array, "rows length kv_heads dim"],
    v: Float[Array, "rows length kv_heads dim"],
    segments: Int[Array, "rows length"],
    causal: bool,
    interpret: bool = False,
) -> Float[Array, "rows length heads dim"]:
    """Run the kernel on every device's own rows and heads: XLA cannot divide a kernel by itself."""
    from puma_jax.model.splash import splash  # Pallas takes long to import

    if not interpret:
        _check_splash(_platform(q), q.shape[1])
    kernel = functools.partial(splash, causal=causal, interpret=interpret)
    mesh = _mesh_of(q)
    if mesh is None:
        return kernel(q, k, v, segments)
    rows = _row_axes(mesh, q.shape[0])
    # Key and value heads that do not divide are repeated until they do. The query heads they
    # belong to stay neighbours.
    (heads, kv_heads), parts = (x.shape[2] for x in (q, k)), mesh.shape.get(HEAD_AXIS, 1)
    repeats = math.lcm(kv_heads, parts) // kv_heads
    if heads % (kv_heads * repeats):
        raise AttentionError(
            f"{heads} query and {kv_heads} key heads do not divide over {parts} devices"
        )
    k, v = (jnp.repeat(x, repeats, axis=2) for x in (k, v))
    by_head = PartitionSpec(rows, None, HEAD_AXIS if parts > 1 else None)
    return jax.shard_map(
        kernel,
        mesh=mesh,
        in_specs=(by_head, by_head, by_head, PartitionSpec(rows)),
        out_specs=by_head,
        check_vma=False,  # a kernel does not say over which axes its results vary
    )(q, k, v, segments)


IMPLEMENTATIONS: dict[str, Callable[..., Array]] = {"xla": _xla, "splash": _splash}
# cuDNN has no entry: `jax.nn.dot_product_attention` (jax 0.10) can tell it where a row ends and how
# wide a window is, not of segments. A mask becomes a bias, whose gradient it computes as well.


def _check_name(implementation: str) -> None:
    if implementation not in IMPLEMENTATIONS:
        known = ", ".join(["auto", *IMPLEMENTATIONS])
        raise AttentionError(f'attention implementation "{implementation}" is not one of {known}')


def _check_splash(platform: str, length: int) -> None:
    if platform != "tpu":
        raise AttentionError(
            f'attention "splash" runs on TPUs and this is {platform}: ask for "auto" or "xla"'
        )
    if length % TILE:
        raise AttentionError(
            f'attention "splash" takes rows of a multiple of {TILE} positions and these have '
            f'{length}: ask for "auto" or "xla"'
        )


# jax tells the mesh of every value in a compiled function whose arguments live on one, so that
# nobody has to hand it down to here.


def _mesh_of(x: Array) -> AbstractMesh | None:
    """Return the mesh that a value lives on; None for one device, or if it is not ours to use."""
    mesh = jax.typeof(x).sharding.mesh
    ours = set(ROW_AXES) & set(mesh.axis_names)
    if mesh.size <= 1 or not ours or set(mesh.axis_types) != {AxisType.Auto}:
        return None
    return mesh


def _row_axes(mesh: AbstractMesh, rows: int) -> tuple[str, ...] | None:
    """Return the axes that this many rows are spread over; None if they do not divide."""
    axes = tuple(axis for axis in ROW_AXES if axis in mesh.shape)
    return axes if rows % math.prod(mesh.shape[axis] for axis in axes) == 0 else None


def _platform(x: Array) -> str:
    """Return the kind of device that a value will live on, which need not be this machine's."""
    device = jax.typeof(x).sharding.mesh.abstract_device
    return jax.default_backend() if device is None else device.platform
