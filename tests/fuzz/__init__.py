"""Damaged copies of files, and a check that readers refuse them with declared errors only.

A test of a format takes a few hundred copies; `python -m tests.fuzz` takes thousands of every
format in `tests.fuzz.formats`, within bounds on time and memory.
"""

from __future__ import annotations

import collections
import copy
import json
import random
import struct
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from puma_jax.errors import PumaError

_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 0.5, -0.0, 1.5, 1e-300, 1e308, -1e308),
    *(2**31, -(2**31), 2**53 + 1, 2**63, 10**9, -(10**9), 10**18, 10**40, 10**5000),
    *(float("nan"), float("inf"), float("-inf")),
    *(
        "",
        " ",
        "x",
        "0",
        "1",
        "null",
        "../x",
        "/etc/passwd",
        "a\0b",
        "\x1b[31m",
        "\u202e",
        "\ud800",
    ),
    *("x" * 5000, "漢" * 300, "bfloat16", "int64"),
    *([], {}, [[]], [None], [1, 2, 3], [-1, 10**18], {"a": 1}, {"": None}, ["x"] * 1000),
)
_PIECES = (
    *(b"\0", b"\n", b"\r", b"\xff", b"\xc3", b"\xef\xbb\xbf", b"\xed\xa0\x80", b'"', b"\\", b","),
    *(b"{", b"}", b"[", b"]", b":", b"-", b"NaN", b"1e999", b"\\ud800", b"\x1b[0m", b"\x7f"),
)
_LONGEST_MESSAGE = 5000  # those that list what is wrong name 20 of it
_HEADER = struct.Struct("<Q")


def mutations(content: bytes, seed: int, count: int) -> Iterator[bytes]:
    """Yield damaged copies of a file's content; the same for the same seed.

    JSON, JSON lines and the headers of safetensors files are mostly changed as values (other types
    and numbers, keys dropped, renamed, given twice, deep nesting), everything else as bytes.
    """
    rng = random.Random(f"{seed}-{len(content)}")
    for _ in range(count):
        structured = _damage_structure(content, rng) if rng.random() < 0.7 else None
        yield damage_bytes(content, rng) if structured is None else structured


@dataclass
class Outcome:
    """Counts of damaged files: refused with a declared error, accepted, or anything else."""

    declared: int = 0
    accepted: int = 0
    others: collections.Counter[str] = field(default_factory=collections.Counter)
    """Anything else, by class and message, and how often."""

    @property
    def count(self) -> int:
        """Number of files read."""
        return self.declared + self.accepted + self.others.total()


@dataclass(frozen=True)
class Target:
    """A sound file, and what reads it."""

    path: Path
    read: Callable[[], object]
    """Called after each change of the file; makes no use of what an earlier call has read."""
    declared: type[Exception] = PumaError


def read_damaged(target: Target, content: bytes) -> str:
    """Return "declared" or "accepted" for damaged content, or else what came of it, in one line."""
    target.path.write_bytes(content)
    try:
        with warnings.catch_warnings():  # a warning refuses nothing
            warnings.simplefilter("ignore")
            target.read()
    except target.declared as error:
        return _fault_of(str(error)) or "declared"
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:160]
    return "accepted"


def check_only_declared_errors(target: Target, *, seed: int = 0, count: int = 200) -> Outcome:
    """Return the outcome for damaged copies of a file, which is put back at the end.

    Args:
        target: The file; reading it as it is must succeed.
        seed: Seed of the damage.
        count: Number of copies.

    Raises:
        AssertionError: An error is not of the declared class, or its message is not one line.
    """
    content = target.path.read_bytes()
    target.read()
    outcome = Outcome()
    try:
        for damaged in mutations(content, seed, count):
            add(outcome, read_damaged(target, damaged))
    finally:
        target.path.write_bytes(content)
    assert not outcome.others, f"{target.path.name}: {outcome.others.most_common(5)}"
    return outcome


def add(outcome: Outcome, result: str) -> None:
    """Count a result of `read_damaged`."""
    if result in ("declared", "accepted"):
        setattr(outcome, result, getattr(outcome, result) + 1)
    else:
        outcome.others[result] += 1


def damage_bytes(content: bytes, rng: random.Random) -> bytes:
    """Return content with bytes cut, repeated, overwritten, flipped or inserted."""
    damaged = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        # Half of all changes are near the start, where headers are.
        near = rng.random() < 0.5
        start = rng.randrange((min(len(damaged), 256) if near else len(damaged)) + 1)
        end = min(len(damaged), start + rng.randint(1, 9))
        kind = rng.randrange(6)
        if kind == 0:
            del damaged[start:end]
        elif kind == 1:
            damaged[start:start] = damaged[start:end]
        elif kind == 2:
            damaged[start:end] = rng.randbytes(end - start)
        elif kind == 3:
            damaged[start:start] = rng.choice(_PIECES)
        elif kind == 4 and start < end:
            damaged[start] ^= 1 << rng.randrange(8)
        else:
            del damaged[start:]
    return bytes(damaged)


def _damage_structure(content: bytes, rng: random.Random) -> bytes | None:
    """Return content changed as JSON, or None if it holds none."""
    value = _parsed(content)
    if value is not None:
        return _damaged_json(value, rng)
    lines = content.splitlines()
    if len(lines) > 1 and _parsed(lines[0]) is not None:
        number = rng.randrange(len(lines))
        value = _parsed(lines[number])
        if value is not None:
            lines[number] = _damaged_json(value, rng)
            return b"\n".join(lines) + b"\n"
    if len(content) > _HEADER.size:
        end = _HEADER.size + _HEADER.unpack_from(content)[0]
        value = _parsed(content[_HEADER.size : end]) if end <= len(content) else None
        if value is not None:
            header = _damaged_json(value, rng)
            return _HEADER.pack(len(header)) + header + content[end:]
    return None


def _parsed(content: bytes) -> Any:
    """Return the object or list that content holds as JSON, or None."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict | list) else None


def _damaged_json(value: Any, rng: random.Random) -> bytes:
    """Return JSON text of a value with one or two changes; some are no longer JSON."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 2)):
        places = list(_places(value))
        if not places:
            break
        holder, key = rng.choice(places)
        kind = rng.randrange(8)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[rng.choice([f"{key}x", "", "__class__", "another"])] = holder.pop(key)
        elif kind == 2:
            holder[key] = [holder[key]]
        elif kind == 3 and isinstance(holder[key], int | float):
            holder[key] = _other_number(holder[key], rng)
        elif kind == 4 and len(places) > 1:
            other, place = rng.choice(places)
            holder[key] = copy.deepcopy(other[place])
        else:
            holder[key] = copy.deepcopy(rng.choice(_VALUES))
    text = _dumped(value)
    change = rng.random()
    if change < 0.05 and isinstance(value, dict) and value:
        key = rng.choice(list(value))
        text = f"{{{_dumped(key)}: {_dumped(rng.choice(_VALUES))}, {text[1:]}"
    elif change < 0.1 and isinstance(value, dict):
        deep = rng.choice(["[", '{"a":']) * rng.choice([30, 900, 1100, 50_000])
        text = f'{text[:-1]}, "deep": {deep}}}'
    elif change < 0.15 and isinstance(value, dict):
        text = f'{text[:-1]}, "long": {"7" * 6000}}}'
    return text.encode("utf-8", "surrogatepass")


def _dumped(value: Any) -> str:
    # Python makes a text of a number of thousands of digits only when told that it may.
    if isinstance(value, dict):
        entries = (f"{json.dumps(key)}: {_dumped(entry)}" for key, entry in value.items())
        return f"{{{', '.join(entries)}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_dumped, value))}]"
    if type(value) is int and abs(value) > 10**1000:
        return f"{'-' if value < 0 else ''}1{'0' * 5000}"
    return json.dumps(value)


def _other_number(number: float, rng: random.Random) -> Any:
    if abs(number) > 1e300:  # further arithmetic could overflow
        return -1
    return rng.choice(
        [-number, number + 1, number - 1, number * 2, number * 10**9, number / 3, 0, str(number)]
    )


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every (holder, key or index) in a value, at most 5,000, however large a list is."""
    waiting, seen = [value], 0
    while waiting:
        holder = waiting.pop()
        keys = list(holder) if isinstance(holder, dict) else range(min(len(holder), 100))
        for key in keys:
            if (seen := seen + 1) > 5000:
                return
            yield holder, key
            if isinstance(holder[key], dict | list):
                waiting.append(holder[key])


def _fault_of(message: str) -> str | None:
    """Return what is wrong with an error's message, or None if it is a line that can be shown."""
    if not message.isprintable():
        return f"not one printable line: {message!r}"[:160]
    if len(message) > _LONGEST_MESSAGE:
        return f"a message of {len(message)} characters: {message[:100]}"
    return None
