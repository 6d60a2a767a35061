"""Vectors in fewer bytes: int8, and one bit for each value.

Names are those of Sentence Transformers. "uint8" is "int8" plus 128, and "binary" is "ubinary" less
128: the same information, as signed or unsigned bytes.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from puma_jax.typing import AnyArray, Float, Int, UInt8, ndarray

Precision = Literal["float32", "int8", "uint8", "binary", "ubinary"]


def to_int8(
    vectors: Float[ndarray, "n width"], scale: float | None = None
) -> tuple[Int[ndarray, "n width"], Float[ndarray, "n"]]:
    """Return `round(127 v / s)` as int8, and the scale s of each vector.

    Cosines are those of the vectors, except for rounding.

    Args:
        vectors: The vectors.
        scale: One scale for all; by default, a vector's scale is its own largest magnitude.
    """
    if scale is None:
        largest = np.abs(vectors).max(1, initial=0)
        scales = np.where(largest > 0, largest, 1).astype(np.float32)
    else:
        scales = np.full(len(vectors), scale, np.float32)
    return np.rint(vectors * (127 / scales[:, None])).astype(np.int8), scales


def from_int8(
    steps: Int[ndarray, "n width"], scales: Float[ndarray, "n"]
) -> Float[ndarray, "n width"]:
    """Return the float32 vectors that int8 values and their scales stand for."""
    return steps.astype(np.float32) * (scales[:, None] / 127)


def to_bits(vectors: Float[ndarray, "n width"]) -> UInt8[ndarray, "n bytes"]:
    """Return a bit for each value, 1 if it is above 0, from the highest of a byte on.

    Bits that fill the last byte are 0.
    """
    return np.packbits(vectors > 0, axis=1)


def from_bits(bits: UInt8[ndarray, "n bytes"], width: int) -> Float[ndarray, "n {width}"]:
    """Return the unit vectors that bits stand for: 1/√width where a bit is 1, -1/√width elsewhere.

    Their inner products are 1 - 2h / width, where h is the Hamming distance of the bits.
    """
    value = np.float32(width**-0.5)
    return np.where(np.unpackbits(bits, axis=1, count=width), value, -value)


def quantize(vectors: Float[ndarray, "n width"], precision: Precision) -> AnyArray:
    """Return vectors in a precision, as bytes or float32."""
    if precision == "float32":
        return vectors
    if precision in ("int8", "uint8"):
        steps = to_int8(vectors)[0]
        return steps if precision == "int8" else (steps.astype(np.int16) + 128).astype(np.uint8)
    bits = to_bits(vectors)
    return bits if precision == "ubinary" else (bits.astype(np.int16) - 128).astype(np.int8)


def bytes_per_vector(precision: Precision, width: int) -> int:
    """Return the bytes of a vector in a precision, the scale of int8 included."""
    sizes = {"float32": 4 * width, "int8": width + 4, "uint8": width + 4}
    return sizes.get(precision, -(-width // 8))
