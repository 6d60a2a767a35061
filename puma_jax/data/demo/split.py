"""Random choices that depend on a seed alone, and the split by combination.

A test query of OpenMoji's benchmark is a new combination of parts that training shows one by one:
this waving hand in this skin tone, this concept in this language, this flag with this question.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from typing import Any, Literal, TypeVar

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")

_Item = TypeVar("_Item")
_Key = TypeVar("_Key", bound=Hashable)
_Node = TypeVar("_Node", bound=Any)  # anything that can be hashed and compared


def hash_order(items: Iterable[_Item], seed: int, purpose: str) -> list[_Item]:
    """Return items in the order of a hash of the seed, the purpose and the item as text.

    The hash of an item depends neither on the other items nor on the Python version.
    """

    def digest(item: _Item) -> bytes:
        return hashlib.sha256(f"{seed}|{purpose}|{item}".encode()).digest()

    return sorted(items, key=digest)


def split_by_fraction(
    items: Iterable[_Item], seed: int, purpose: str, *, test: float, val: float
) -> dict[_Item, Split]:
    """Return the split of each item; the fractions held out are rounded down to whole items."""
    order = hash_order(items, seed, purpose)
    tests, vals = int(test * len(order)), int(val * len(order))
    return {
        item: "test" if place < tests else "val" if place < tests + vals else "train"
        for place, item in enumerate(order)
    }


def hold_out(
    parts: Mapping[_Key, Iterable[str]], seed: int, purpose: str, *, test: float, val: float
) -> dict[_Key, Split]:
    """Return the split of each combination, with every part of it left in training.

    Args:
        parts: The parts of each combination.
        seed: Seed of the choice.
        purpose: Name that makes this choice independent of others with the same seed.
        test: Fraction of the combinations to hold out for the test. A combination stays in training
            if one of its parts would otherwise be in no training combination.
        val: Fraction to hold out for validation, likewise.
    """
    left = Counter(part for combination in parts.values() for part in combination)
    splits: dict[_Key, Split] = dict.fromkeys(parts, "train")
    for key, split in split_by_fraction(parts, seed, purpose, test=test, val=val).items():
        if split != "train" and all(left[part] > 1 for part in parts[key]):
            splits[key] = split
            left.subtract(parts[key])
    return splits


def connected(links: Iterable[tuple[_Node, _Node]]) -> dict[_Node, _Node]:
    """Return the smallest node in the connected component of each linked node."""
    parent: dict[_Node, _Node] = {}

    def root(node: _Node) -> _Node:
        parent.setdefault(node, node)
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for a, b in links:
        first, second = sorted((root(a), root(b)))
        parent[second] = first
    return {node: root(node) for node in list(parent)}
