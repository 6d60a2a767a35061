"""Layers of both towers. Parameters are `nnx.Param` leaves without metadata."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from puma_jax.model.dropout import TokenKeys, dropout
from puma_jax.typing import Array, Float

_kernel_init = jax.nn.initializers.lecun_normal()
_embedding_init = jax.nn.initializers.normal(0.02)


@jax.custom_vjp
def matmul(
    x: Float[Array, "*batch inputs"], kernel: Float[Array, "inputs outputs"]
) -> Float[Array, "*batch outputs"]:
    """Return x @ kernel, of float32 in all of its bits.

    The backward pass is written out: jax's own computes the transpose of the kernel's gradient, for
    which XLA on CPUs computes everything before it column by column, which is far slower. It is
    traced where `jax.default_matmul_precision` of the forward pass is over, as the whole function
    is under a scan: the precision is given here.
    """
    return jnp.matmul(x, kernel, precision=_precision(x))


def _precision(x: Array) -> jax.lax.Precision | None:
    """Return the precision of products with x: accelerators round float32 to fewer bits if let."""
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def _matmul_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return matmul(x, kernel), (x, kernel)


def _matmul_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = saved
    flat_x, flat_gradient = (values.reshape(-1, values.shape[-1]) for values in (x, gradient))
    precision = _precision(x)
    of_kernel = jax.lax.dot_general(
        flat_x, flat_gradient, (((0,), (0,)), ((), ())), precision=precision
    )
    return jnp.matmul(gradient, kernel.T, precision=precision), of_kernel


matmul.defvjp(_matmul_forward, _matmul_backward)


class Linear(nnx.Module):
    """y = xW + b, and + s·(xA)B once `lora.add_lora` has given it the leaves A and B.

    The low-rank product is never added to W in training: that would ask the backward pass for
    the gradient of the whole of W.
    """

    bias: nnx.Param | None
    lora_a: nnx.LoRAParam | None
    lora_b: nnx.LoRAParam | None

    def __init__(self, inputs: int, outputs: int, *, bias: bool, rngs: nnx.Rngs):
        self.kernel = nnx.Param(_kernel_init(rngs.params(), (inputs, outputs)))
        self.bias = nnx.data(nnx.Param(jnp.zeros(outputs)) if bias else None)
        self.lora_a = nnx.data(None)
        self.lora_b = nnx.data(None)
        self.lora_scale = 0.0
        self.lora_dropout = 0.0

    def __call__(
        self, x: Float[Array, "*batch inputs"], dropout_keys: TokenKeys | None = None
    ) -> Float[Array, "*batch outputs"]:
        """Return the outputs in the dtype of `x`; without `dropout_keys` LoRA dropout is off."""
        y = matmul(x, self.kernel[...].astype(x.dtype))
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype)
        if self.lora_a is not None and self.lora_b is not None:
            if dropout_keys is not None and self.lora_dropout:
                x = dropout(x, dropout_keys, self.lora_dropout)
            low_rank = x @ self.lora_a[...].astype(x.dtype)
            y = y + self.lora_scale * (low_rank @ self.lora_b[...].astype(x.dtype))
        return y


class Embedding(nnx.Module):
    """A table with one row of weights for each token."""

    def __init__(self, rows: int, width: int, *, rngs: nnx.Rngs):
        self.table = nnx.Param(_embedding_init(rngs.params(), (rows, width)))


class RMSNorm(nnx.Module):
    """x / rms(x) · scale, in float32 inside."""

    def __init__(self, width: int, eps: float):
        self.scale = nnx.Param(jnp.ones(width))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """Return the normalized values in the dtype of `x`."""
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + self.eps)
        return (wide * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x − mean) / deviation · scale + bias, in float32 inside."""

    def __init__(self, width: int, eps: float):
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """Return the normalized values in the dtype of `x`."""
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, -1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + self.eps)
        scale, bias = (leaf[...].astype(jnp.float32) for leaf in (self.scale, self.bias))
        return (wide * scale + bias).astype(x.dtype)


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return x · sigmoid(1.702 x), the activation of CLIP's and Qwen2-VL's vision towers."""
    return x * jax.nn.sigmoid(1.702 * x)
