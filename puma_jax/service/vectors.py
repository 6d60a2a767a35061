"""Vectors as answers: shortened, quantized, and in base64."""

from __future__ import annotations

import base64
from typing import Literal

import numpy as np

from puma_jax.search.quantize import quantize
from puma_jax.service.request_errors import RequestError
from puma_jax.typing import Float, ndarray

EmbeddingType = Literal["float", "int8", "uint8", "binary", "ubinary", "base64"]


def shortened(
    vectors: Float[ndarray, "n width"], dimensions: int | None
) -> Float[ndarray, "n dimensions"]:
    """Return the first values of unit vectors, scaled to length 1 again.

    Raises:
        RequestError: There are not as many values, or the first ones are all zero.
    """
    width = vectors.shape[1]
    if dimensions is None or dimensions == width:
        return vectors
    if not 1 <= dimensions <= width:
        raise RequestError(
            400,
            "invalid_dimensions",
            f"{dimensions} dimensions are asked for, the model has 1 to {width}",
        )
    first = vectors[:, :dimensions]
    lengths = np.linalg.norm(first, axis=1, keepdims=True)
    if not lengths.all():
        raise RequestError(
            400,
            "invalid_dimensions",
            f"the first {dimensions} values of a vector are zero: ask for more dimensions",
        )
    return first / lengths


def quantized(
    vectors: Float[ndarray, "n width"], kind: EmbeddingType
) -> list[list[float]] | list[list[int]] | list[str]:
    """Return vectors in one of the types of Cohere's API.

    - "int8" is round(127 v / s), where s is the largest magnitude of the vector; "uint8" is 128
      more. Their cosines are those of the vectors, except for rounding; their lengths are not.
    - "ubinary" is one bit for each value, 1 if it is above 0, packed into bytes from the highest
      bit on, the last of them filled with zeros; "binary" is 128 less.
    - "base64" is the little-endian bytes of the float32 values.
    """
    if kind == "base64":
        return [base64_of(vector) for vector in vectors]
    return quantize(vectors, "float32" if kind == "float" else kind).tolist()


def base64_of(vector: Float[ndarray, "width"]) -> str:
    """Return the little-endian bytes of a float32 vector in base64."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
