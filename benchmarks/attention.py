"""Compare attention kernels on packed rows: errors against float32, and times, by shape.

    python benchmarks/attention.py

Every kernel that runs here computes the same rows of many short items, forward and backward, in
turns. Errors are relative to XLA's result in float32 with products of all bits, as norms.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from machine import alone, describe, write_json

from puma_jax.errors import AttentionError
from puma_jax.model import kernels
from puma_jax.model.attention import attention

# Rows, length, query heads, key heads, width of a head, causal; of the decoder of 2B and of 7B, and
# of the tower.
SHAPES = {
    "decoder 2B": (8, 2048, 12, 2, 128, True),
    "decoder 7B": (16, 1024, 28, 4, 128, True),
    "tower": (16, 2048, 16, 16, 80, False),
}
TOY = {"decoder": (1, 128, 2, 1, 16, True), "tower": (1, 128, 2, 2, 16, False)}


def packed_segments(rows: int, length: int) -> np.ndarray:
    """Return segment ids of rows full of items of many lengths, with a little padding behind."""
    rng = np.random.default_rng(0)
    segments = np.zeros((rows, length), np.int32)
    for row in segments:
        ends = np.cumsum(np.exp(rng.normal(3.5, 0.9, length)).astype(int) + 8)
        ends = ends[ends <= length]  # the first is far shorter than a row
        row[: ends[-1]] = np.repeat(np.arange(1, len(ends) + 1), np.diff(ends, prepend=0))
    return segments


def runnable(target: kernels.Target) -> dict[str, str | None]:
    """Return each kernel with what keeps it from running here, None if nothing does."""
    reasons: dict[str, str | None] = {}
    for name in kernels.NAMES:
        try:
            kernels.check(name, target)
            reasons[name] = None
        except AttentionError as error:
            reasons[name] = str(error)
    return reasons


def compare(shape: tuple[int, int, int, int, int, bool], dtype: str, repeats: int) -> list[dict]:
    """Return, for each kernel that runs, its errors and times on a shape."""
    rows, length, heads, kv_heads, dim, causal = shape
    rng = np.random.default_rng(0)
    wide = [
        jnp.asarray(rng.normal(size=(rows, length, count, dim)), jnp.float32)
        for count in (heads, kv_heads, kv_heads, heads)
    ]
    segments = jnp.asarray(packed_segments(rows, length))

    def functions(name: str) -> tuple[object, object]:
        attend = functools.partial(
            attention, segment_ids=segments, causal=causal, implementation=name
        )

        def both(q, k, v, cotangent):
            out, pull = jax.vjp(attend, q, k, v)
            return out, *pull(cotangent)

        return jax.jit(attend), jax.jit(both)

    with jax.default_matmul_precision("highest"):
        expected = [np.asarray(part) for part in functions("xla")[1](*wide)]
    narrow = [values.astype(dtype) for values in wide]
    found, runs = {}, {}
    for name, reason in runnable(kernels.Target(jax.default_backend(), dtype, length, dim)).items():
        if reason is not None:
            found[name] = {"kernel": name, "skipped": reason}
            continue
        forward, both = functions(name)
        try:
            parts = [np.asarray(part, np.float32) for part in both(*narrow)]
        except Exception as error:  # a kernel that fails says so in its row, and the others go on
            found[name] = {"kernel": name, "failed": f"{type(error).__name__}: {error}"}
            continue
        errors = [
            float(np.linalg.norm(part - of) / np.linalg.norm(of))
            for part, of in zip(parts, expected, strict=True)
        ]
        found[name] = {"kernel": name, "error": errors[0], "error_of_gradients": max(errors[1:])}
        forward(*narrow[:3])
        runs[name] = forward, both
    for name, times in in_turns(runs, narrow, repeats).items():
        found[name] |= {"forward_ms": times[0] * 1e3, "both_ms": times[1] * 1e3}
    return list(found.values())


def in_turns(
    runs: dict[str, tuple[object, object]], arrays: list[jax.Array], repeats: int
) -> dict[str, tuple[float, float]]:
    """Return the median seconds of the forward pass, and with the backward pass, of each kernel."""
    seconds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in runs}
    with alone():
        for _ in range(repeats):
            for name, (forward, both) in runs.items():
                for run, given, times in (
                    (forward, arrays[:3], seconds[name][0]),
                    (both, arrays, seconds[name][1]),
                ):
                    start = time.perf_counter()
                    jax.block_until_ready([run(*given) for _ in range(10)])
                    times.append((time.perf_counter() - start) / 10)
    return {name: tuple(map(statistics.median, times)) for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--toy", action="store_true", help="small shapes, for any machine")
    parser.add_argument("--json", type=Path, help="file to write the results to as well")
    arguments = parser.parse_args()
    print(f"{describe()}, {arguments.dtype}, medians of {arguments.repeats}")
    print("\n| rows | kernel | forward, ms | with backward, ms | error | of gradients |")
    print("|---|---|--:|--:|--:|--:|")
    results = []
    wrong = []
    for name, shape in (TOY if arguments.toy else SHAPES).items():
        for row in compare(shape, arguments.dtype, arguments.repeats):
            results.append({"rows": name, "shape": shape, **row})
            if reason := row.get("skipped") or row.get("failed"):
                print(f"| {name} | {row['kernel']} | {reason.splitlines()[0]} | | | |")
                wrong += [f"{row['kernel']} on {name}"] * ("failed" in row)
                continue
            print(
                f"| {name} | {row['kernel']} | {row['forward_ms']:.3f} | {row['both_ms']:.3f} | "
                f"{row['error']:.1e} | {row['error_of_gradients']:.1e} |"
            )
            if not max(row["error"], row["error_of_gradients"]) < 1e-2:
                wrong.append(f"{row['kernel']} on {name}")
    if arguments.json:
        write_json(arguments.json, results)
    if wrong:
        parser.exit(1, f"failed, or wrong by more than rounding to bfloat16: {', '.join(wrong)}\n")


if __name__ == "__main__":
    main()
