"""Random choices that are pure functions of a key: no state, and none depends on another.

A key is a seed, a purpose, and the numbers of what the choice is for. The purpose is part of it:
equal numbers must not give equal choices.
"""

from __future__ import annotations

import numpy as np

from puma_jax.data.table import Ragged
from puma_jax.typing import Int, ndarray

ORDER, POSITIVE, PROMPT, NEGATIVE = 1, 2, 3, 4
"""The purposes of choices."""


def shuffle(places: Int[ndarray, "n"], size: int, *key: int) -> Int[ndarray, "n"]:
    """Return the images of these places under a random permutation of `range(size)`.

    A Feistel network over the next power of four is applied until the result is in range. Each
    place is computed on its own, so a permutation of millions takes no memory.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    shift = np.uint64(half)
    out = np.asarray(places, np.uint64)
    walking = np.ones(len(out), bool)
    while walking.any():
        left, right = out[walking] >> shift, out[walking] & mask
        for round_number in range(4):
            left, right = right, left ^ (random_bits(*key, ORDER, round_number, right) & mask)
        out[walking] = (left << shift) | right
        walking = out >= size
    return out.astype(np.int64)


def draw(below: Int[ndarray, "n"], *key: int | ndarray) -> Int[ndarray, "n"]:
    """Return a random integer from 0 to `below - 1`, for each of `below`."""
    return (random_bits(*key) % np.asarray(below, np.uint64)).astype(np.int64)


def sample(lists: Ragged, count: int, *key: int | ndarray) -> Int[ndarray, "lists count"]:
    """Return `count` random values of each list without replacement; −1 where it has fewer.

    Args:
        lists: The values to draw from.
        count: How many to draw of each list.
        key: Key of the choice; an array has a number for each list.
    """
    owner = np.repeat(np.arange(len(lists)), lists.lengths)
    of_values = [part[owner] if isinstance(part, ndarray) else part for part in key]
    place = np.arange(len(owner)) - lists.start[owner]
    order = np.lexsort((random_bits(*of_values, place), owner))
    # The order keeps each list where it is, so the places of its values number them there, too.
    drawn = np.full((len(lists), count), -1, np.int64)
    first = place < count
    drawn[owner[first], place[first]] = lists.values[order[first]]
    return drawn


def random_bits(*key: int | ndarray) -> ndarray:
    """Return 64 well-mixed bits for a key (the finalizer of SplitMix64, once for each part)."""
    state: ndarray = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):
        for part in key:
            state = (state ^ np.asarray(part).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state
