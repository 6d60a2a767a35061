"""Leaves of a model by name: "decoder.layers.attention.query.kernel"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def leaf_name(path: tuple[Any, ...]) -> str:
    """Return the dotted name of a key path, without the `value` that `nnx.Param` adds."""
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def named_leaves(tree: Any) -> dict[str, Any]:
    """Return every leaf under its name, in the order of the tree."""
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def map_named(function: Callable[[str, Any], Any], tree: Any) -> Any:
    """Return the tree of `function(name, leaf)`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(leaf_name(path), leaf), tree
    )
