"""Count the FLOPs of a step that trains several depths and widths, and of steps for each alone.

python benchmarks/depth_width.py --compile

The step is that of stage "mac" of configs/puma.py on the first layers of Qwen2-VL-2B: adapters,
MAC-Loss, a gradient cache. Nothing is computed and no weights are needed: the matrix products of
the traced program are counted, and the body of a loop as often as it runs, recomputation included.
(XLA's own `cost_analysis` counts the body of a loop once.)
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import qwen2_vl_2b
from machine import describe

from puma_jax.config import ComputeConfig, ModelConfig
from puma_jax.data.pipeline import Batch
from puma_jax.model import encoder
from puma_jax.parallel.mesh import MeshConfig, make_mesh
from puma_jax.rows import PackedBatch
from puma_jax.train import load_config
from puma_jax.training.config import StageConfig
from puma_jax.training.stages import build_step, build_student
from puma_jax.training.step import init_state

COMPUTE = ComputeConfig(dtype="bfloat16", remat="full", attention="xla")
STEPS = 1000


def flops(jaxpr: Any) -> float:
    """Return the FLOPs of all matrix products of a traced program, 2 for a multiplication."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            inner = math.prod(left[axis] for axis in contracted)
            total += 2.0 * inner * math.prod(equation.outvars[0].aval.shape)
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += times * sum(map(flops, _bodies(equation.params)))
    return total


def _bodies(params: dict[str, Any]) -> Iterator[Any]:
    """Yield the programs that an equation runs."""
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else [value]:
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                yield part


def abstract_batch(model: ModelConfig, pairs: int, chunks: int, tokens: int, images: int) -> Batch:
    """Return the shapes of a batch: two items a pair, half of them images of `images` tokens."""

    def ints(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    items = 2 * pairs // chunks
    rows, patch_rows = items * tokens // 1024, items * images * model.patches_per_token // 2 // 1024
    token, patch = (chunks, rows, 1024), (chunks, patch_rows, 1024)
    packed = PackedBatch(
        tokens=ints(*token),
        segment_ids=ints(*token),
        positions=ints(*token, 3),
        image_token_index=ints(*token),
        patches=jax.ShapeDtypeStruct((*patch, model.vision.patch_values), jnp.uint8),
        patch_segment_ids=ints(*patch),
        patch_positions=ints(*patch, 2),
        pool_index=ints(chunks, items),
    )
    valid = jax.ShapeDtypeStruct((pairs,), jnp.bool_)
    return Batch(packed, *[ints(pairs)] * 7, valid=valid)


def lower(stage: StageConfig, model: ModelConfig, batch: Batch) -> tuple[float, Any]:
    """Return the FLOPs of a stage's step, and the step lowered."""
    mesh, key = make_mesh(MeshConfig(), jax.devices()[:1]), jax.random.key(0)

    def init() -> tuple[Any, Any, Any]:
        params = encoder.init(model, key, COMPUTE.dtype)
        student, trained, frozen_params = build_student(stage, COMPUTE, model, params, key)
        return student, init_state(stage, STEPS, trained), frozen_params

    structure, state, frozen_params = jax.eval_shape(init)
    shardings = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), state)
    step = build_step(
        stage,
        STEPS,
        structure,
        shardings,
        compute=COMPUTE,
        mesh=mesh,
        dropout_key=key,
        teacher_fn=None,
    )
    traced = step.trace(state, frozen_params, batch, None)
    return flops(traced.jaxpr.jaxpr), traced.lower()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--exit-layers", type=int, nargs="*", default=[4, 8])
    parser.add_argument("--widths", type=int, nargs="*", default=[256, 768])
    parser.add_argument("--pairs", type=int, default=600)
    parser.add_argument("--chunks", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=100, help="tokens of an item, about")
    parser.add_argument("--images", type=int, default=100, help="visual tokens of an image")
    parser.add_argument("--compile", action="store_true", help="compile the steps, too")
    arguments = parser.parse_args()
    puma = load_config(Path(__file__).parents[1] / "configs/puma.py")()
    mac = dataclasses.replace(puma.stages["mac"], grad_cache_chunks=arguments.chunks)
    numbers = arguments.pairs, arguments.chunks, arguments.tokens, arguments.images

    def cost(layers: int, exits: list[int], widths: list[int]) -> tuple[float, float]:
        """Return the FLOPs of a step, and the seconds to compile it."""
        loss = dataclasses.replace(mac.loss, exit_layers=tuple(exits), widths=tuple(widths))
        model = qwen2_vl_2b.config(layers)
        batch = abstract_batch(model, *numbers)
        found, lowered = lower(dataclasses.replace(mac, loss=loss), model, batch)
        began = time.perf_counter()
        if arguments.compile:
            lowered.compile()
        return found, time.perf_counter() - began

    depths = [*arguments.exit_layers, arguments.layers]
    alone = {layers: cost(layers, [], []) for layers in depths}
    deepest = alone[arguments.layers]
    widths = len(arguments.widths) + 1
    rows = {
        f"{arguments.layers} layers alone": deepest,
        "all depths": cost(arguments.layers, arguments.exit_layers, []),
        "all depths and widths": cost(arguments.layers, arguments.exit_layers, arguments.widths),
        "a model for each depth": tuple(map(sum, zip(*alone.values(), strict=True))),
        "a model for each depth and width": tuple(
            widths * sum(of) for of in zip(*alone.values(), strict=True)
        ),
    }
    print(f"{describe()}\ndepths {depths}, widths {[*arguments.widths, 'all']}, {numbers[0]} pairs")
    for name, (count, seconds) in rows.items():
        line = f"{name:34} {count / 1e15:8.3f} PFLOP {count / deepest[0]:6.3f} ×"
        if arguments.compile:
            line += f"   compiles in {seconds:5.1f} s {seconds / deepest[1]:6.2f} ×"
        print(line)


if __name__ == "__main__":
    main()
