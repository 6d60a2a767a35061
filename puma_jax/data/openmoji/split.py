"""Lots that depend on a seed and nothing else, and the split by combination.

A test query of this benchmark is a new combination of parts that were all seen in training: this
waving hand in this skin tone, this concept in this language, this flag with this question.
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


def in_lot_order(items: Iterable[_Item], seed: int, purpose: str) -> list[_Item]:
    """Return items in an order drawn by lot.

    Each item's lot is a hash of the seed, the purpose and the item as text, so that it depends
    neither on the other items nor on the Python that draws it.
    """

    def lot(item: _Item) -> bytes:
        return hashlib.sha256(f"{seed}|{purpose}|{item}".encode()).digest()

    return sorted(items, key=lot)


def shares(
    items: Iterable[_Item], seed: int, purpose: str, *, test: float, val: float
) -> dict[_Item, Split]:
    """Return a split of items of which these shares are held out, rounded down."""
    order = in_lot_order(items, seed, purpose)
    tests, vals = int(test * len(order)), int(val * len(order))
    return {
        item: "test" if place < tests else "val" if place < tests + vals else "train"
        for place, item in enumerate(order)
    }


def hold_out(
    parts: Mapping[_Key, Iterable[str]], seed: int, purpose: str, *, test: float, val: float
) -> dict[_Key, Split]:
    """Return a split of combinations that leaves each of their parts in training.

    Args:
        parts: What each combination is made of.
        seed: Of the lots.
        purpose: Tells the lots of one use from those of another.
        test: Share of the combinations to hold out for the test. A combination is passed over
            where one of its parts would be left in no training combination.
        val: Share to hold out for validation, likewise.
    """
    left = Counter(part for combination in parts.values() for part in combination)
    splits: dict[_Key, Split] = dict.fromkeys(parts, "train")
    for key, split in shares(parts, seed, purpose, test=test, val=val).items():
        if split != "train" and all(left[part] > 1 for part in parts[key]):
            splits[key] = split
            left.subtract(parts[key])
    return splits


def connected(links: Iterable[tuple[_Node, _Node]]) -> dict[_Node, _Node]:
    """Return for every linked node the smallest one that it is connected with, directly or not."""
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
