"""FLOPs and collectives of a compiled program, loop bodies counted as often as they run.

XLA's own `cost_analysis` counts the body of a loop once.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np


@dataclass
class Program:
    """The work of one chip in a step, read from XLA's text of the program."""

    flops: float
    """FLOPs of all matrix products."""
    moved: Counter[str]
    """Kind of collective → bytes of its results."""
    collectives: Counter[str]
    """Kind of collective → number of runs."""
    kernels: int
    """Runs of Pallas kernels."""


Instructions = list[tuple[str, str, str, str]]
"""Name, shape, opcode and the rest of each line of a computation; the last is its result."""

_OPCODE = re.compile(r"^\s+(?:ROOT )?%(\S+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$")
_SHAPE = re.compile(r"([a-z]+)(\d*)\[([\d,]*)\]")
_COLLECTIVE = re.compile(
    r"(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-done)?$"
)


def read_program(text: str) -> Program:
    """Return the sums over a compiled program; the body of a loop counts as often as it runs."""
    bodies: dict[str, Instructions] = {}
    entry = ""
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")) and line.endswith("{"):
            name = line.removeprefix("ENTRY ").split(" ")[0][1:]
            bodies[name], entry = [], name if line.startswith("ENTRY") else entry
        elif found := _OPCODE.match(line):
            bodies[name].append(found.groups())  # type: ignore[arg-type]
    program = Program(0.0, Counter(), Counter(), 0)

    def add(name: str, times: int) -> None:
        results = {result: shape for result, shape, _, _ in bodies[name]}
        for _, shape, opcode, rest in bodies[name]:
            if opcode == "convolution":
                program.flops += times * _product_flops(shape, rest, results)
            elif opcode == "custom-call":
                program.kernels += times * ('"tpu_custom_call"' in rest)
            elif found := _COLLECTIVE.match(opcode):
                program.moved[found[1]] += times * _bytes(shape)
                program.collectives[found[1]] += times
            elif opcode == "while":
                condition, body = re.findall(r"(?:condition|body)=%([^,\s]+)", rest)
                add(body, times * _trip_count(bodies[condition], bodies[body]))
            elif opcode in ("fusion", "call", "async-start"):
                called = re.search(r"(?:calls|to_apply)=%([^,\s]+)", rest)
                assert called is not None
                add(called[1], times)

    add(entry, 1)
    return program


def _trip_count(condition: Instructions, body: Instructions) -> int:
    """Return the trip count of a loop whose counter goes from 0 to a constant; 1 for any other."""
    known = {result: (opcode, rest) for result, _, opcode, rest in [*condition, *body]}
    limit, step, counter = None, 0, None
    for _, _, opcode, rest in condition:
        if opcode == "compare":
            for name in _operands(rest):
                if known[name][0] == "constant":
                    limit = _number(known[name][1])
                elif known[name][0] == "get-tuple-element":
                    counter = re.search(r"index=(\d+)", known[name][1])
    if limit is None or counter is None:
        return 1
    # The body updates its counter by a chain of additions.
    name = _operands(body[-1][3])[int(counter[1])]
    while known[name][0] == "add":
        one, other = _operands(known[name][1])
        number, name = (one, other) if known[one][0] == "constant" else (other, one)
        step += _number(known[number][1])
    return -(-limit // max(step, 1))


def _operands(rest: str) -> list[str]:
    return re.findall(r"%([^,\s)]+)", rest.split("), ")[0])


def _number(rest: str) -> int:
    return int(rest.split(")")[0])


def _dimensions(shape: str) -> list[int]:
    found = _SHAPE.search(shape)
    assert found is not None
    return [int(size) for size in found[3].split(",") if size]


def _bytes(shape: str) -> int:
    """Return the bytes of a result, of all its parts if it has several."""
    return sum(
        int(np.prod([int(size) for size in sizes.split(",") if size])) * (int(bits or 8) // 8)
        for _, bits, sizes in _SHAPE.findall(shape)
    )


def _product_flops(shape: str, rest: str, results: dict[str, str]) -> float:
    """Return the FLOPs of a convolution, 2 per multiplication; TPUs compute matmuls as such."""
    left, right = (_dimensions(results[name]) for name in _operands(rest))
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", rest)
    assert labels is not None
    sizes = [
        dict(zip(of, dims, strict=True))
        for of, dims in zip(labels.groups(), (left, right, _dimensions(shape)), strict=True)
    ]
    flops = 2.0 * sizes[2]["b"] * sizes[2]["f"] * sizes[1]["i"]
    window = dict(
        re.findall(r"(\w+)=([\dx_-]+)", (re.search(r"window=\{([^}]*)", rest) or [""])[0])
    )

    def of(field: str, axis: int, default: str) -> str:
        return window[field].split("x")[axis] if field in window else default

    for axis in range(len(sizes[2]) - 2):
        stride, spread, apart = (
            int(of(field, axis, "1")) for field in ("stride", "lhs_dilate", "rhs_dilate")
        )
        before = int(of("pad", axis, "0_0").split("_")[0])
        at = np.arange(sizes[2][str(axis)])[:, None] * stride - before
        at = at + np.arange(int(of("size", axis, "1"))) * apart
        # Padding is not multiplied.
        flops *= ((at >= 0) & (at <= (sizes[0][str(axis)] - 1) * spread) & (at % spread == 0)).sum()
    return flops
