"""Damaged files: whatever a file holds, only declared errors may come out of reading it."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from puma_jax.errors import PumaError

VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 10**9, 2**63, 10**400, -0.5, 0.5, 1e300, "", "x", "\0", "..",
    "1", "é\ud800", [], [[]], [1, "a"], {}, {"": 0}, {"a": {"b": []}},
)  # fmt: skip


def mutations(content: bytes, seed: int, count: int) -> Iterator[bytes]:
    """Yield `count` damaged copies of a JSON file: values replaced or removed, bytes changed."""
    rng = random.Random(seed)
    value = json.loads(content)
    places = list(_places(value))
    for number in range(count):
        if number % 4 == 3 or not places:
            yield _damaged_bytes(content, rng)
        else:
            yield _damaged_value(value, rng.choice(places), rng)


def check_only_declared_errors(
    function: Callable[[bytes], object], contents: Iterable[bytes]
) -> int:
    """Return how many contents a function refuses.

    Raises:
        AssertionError: It raises something other than a PumaError of one line.
    """
    refused = 0
    for content in contents:
        try:
            function(content)
        except BaseException as error:
            lines = str(error).splitlines()
            if not isinstance(error, PumaError) or len(lines) != 1:
                raise AssertionError(f"{error!r} for {content[:2000]!r}") from error
            refused += 1
    return refused


def _places(value: Any) -> Iterator[tuple[Any, ...]]:
    """Yield the path to every value, few of those in long lists and large objects."""
    if isinstance(value, dict):
        inside = list(value)[:40]
    elif isinstance(value, list):
        inside = list(range(min(3, len(value))))
    else:
        return
    for key in inside:
        yield (key,)
        yield from ((key, *rest) for rest in _places(value[key]))


def _damaged_value(value: Any, place: tuple[Any, ...], rng: random.Random) -> bytes:
    damaged = copy.deepcopy(value)
    parent = damaged
    for key in place[:-1]:
        parent = parent[key]
    kind = rng.randrange(6)
    if kind == 0:
        del parent[place[-1]]
    elif kind == 1 and isinstance(parent[place[-1]], int | float):
        parent[place[-1]] *= rng.choice((-1, 2, 0.5, 10**6))
    else:
        parent[place[-1]] = rng.choice(VALUES)
    return json.dumps(damaged).encode("utf-8", "surrogatepass")


def _damaged_bytes(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content) + 1)
    kind = rng.randrange(4)
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]
    if kind == 2:
        return content[:at] + content[at + rng.randrange(1, 40) :]
    return content[:at] + rng.choice((b"[" * 100_000, b"NaN", b"1e999", b"\xff\xfe", b"9" * 5000))
