"""Access to the leaves of a model by name, such as "decoder.layers.attention.query.kernel"."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax

Tree = TypeVar("Tree")


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


def partition(tree: Any, chosen: Callable[[str], bool]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the leaves whose names are chosen, and all others; `assemble` is the inverse."""
    leaves = named_leaves(tree)
    return (
        {name: leaf for name, leaf in leaves.items() if chosen(name)},
        {name: leaf for name, leaf in leaves.items() if not chosen(name)},
    )


def assemble(structure: Tree, leaves: Mapping[str, Any]) -> Tree:
    """Return a tree of this structure with the leaves of these names."""
    return map_named(lambda name, _: leaves[name], structure)
