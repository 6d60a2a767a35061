"""Array types that carry shapes: `Float[Array, "rows length width"]`.

jaxtyping is a test dependency: tests check every shape at run time. Without it, each name below
is the array type itself and costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jax import Array
from numpy import ndarray

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, PRNGKeyArray, UInt8
else:
    try:
        from jaxtyping import Bool, Float, Int, PRNGKeyArray, UInt8
    except ImportError:

        class _Unchecked:
            """Replaces a jaxtyping type; `_Unchecked[Array, "shape"]` is the array type itself."""

            def __class_getitem__(cls, item: tuple[type, str]) -> Any:
                return item[0]

        Bool = Float = Int = UInt8 = _Unchecked
        PRNGKeyArray = Array

AnyArray = Any
"""A NumPy array or a jax array."""

__all__ = [
    "AnyArray",
    "Array",
    "Bool",
    "Float",
    "Int",
    "PRNGKeyArray",
    "UInt8",
    "ndarray",
]
