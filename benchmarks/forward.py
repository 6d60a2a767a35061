"""Compare forward speed at Qwen2-VL-2B's widths with transformers on torch: decoder and tower.

    python benchmarks/forward.py
    python benchmarks/forward.py --dtype bfloat16 --layers 12 --length 2048 --rows 8    # on a GPU

Both run weights of the same shapes on the same tokens, in turns in one process, so that other load
on the machine affects both alike, and also the large matrix product that measures the machine's
peak. torch uses the same kind of device as jax. Printed: median time, FLOP/s, fraction of peak.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import qwen2_vl_2b
import torch
from machine import alone, describe, square_product, write_json
from transformers import Qwen2VLConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2VisionTransformerPretrainedModel,
    Qwen2VLTextModel,
)

from puma_jax.config import ComputeConfig
from puma_jax.data.positions import patch_positions, sequential_positions
from puma_jax.model.encoder import init


def in_turns(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the median seconds of each run; runs alternate, so that noise affects all alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()  # compiles
    with alone():
        for _ in range(repeats):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def device_of_torch() -> str:
    """Return the torch device of the kind that jax uses."""
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


def wait_for_torch() -> None:
    """Wait until torch has finished all computations."""
    if device_of_torch() == "cuda":
        torch.cuda.synchronize()


def report(
    what: str, flops: float, runs: dict[str, Callable[[], object]], repeats: int, dtype: str
) -> dict[str, float]:
    """Time the runs and the matrix-product peak; print and return the FLOP/s of each."""
    product, product_flops = square_product(dtype)
    seconds = in_turns({**runs, "peak": product}, repeats)
    peak = product_flops / seconds.pop("peak")
    print(f"{what:8} matrix-product peak {peak / 1e9:.0f} GFLOP/s")
    for name, time_taken in seconds.items():
        speed = flops / time_taken
        rates = f"{speed / 1e9:6.1f} GFLOP/s  {speed / peak:4.0%} of peak"
        print(f"{what:8} {name:6} {time_taken:7.3f} s  {rates}")
    print(f"{what:8} puma_jax is {seconds['torch'] / seconds['jax']:.2f} × torch")
    return {"peak": peak, **{name: flops / taken for name, taken in seconds.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--layers", type=int, default=2, help="layers of the decoder and of the tower"
    )
    parser.add_argument("--length", type=int, default=512, help="tokens or patches in a row")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--toy", action="store_true", help="a small model, for any machine")
    parser.add_argument("--json", type=Path, help="file to write the results to as well")
    arguments = parser.parse_args()
    dtype, compute = arguments.dtype, ComputeConfig(dtype=arguments.dtype)
    on = {"device": device_of_torch(), "dtype": getattr(torch, dtype)}
    layers, length, rows = arguments.layers, arguments.length, arguments.rows
    config = qwen2_vl_2b.toy() if arguments.toy else qwen2_vl_2b.config(layers, layers)
    layers = config.decoder.layers
    width = config.decoder.width
    params = init(config, jax.random.key(0), dtype)
    theirs = Qwen2VLConfig(
        text_config={
            "vocab_size": 1000,
            "hidden_size": width,
            "intermediate_size": config.decoder.mlp_width,
            "num_hidden_layers": layers,
            "num_attention_heads": config.decoder.heads,
            "num_key_value_heads": config.decoder.kv_heads,
            "rope_parameters": {
                "rope_theta": config.decoder.rope_base,
                "mrope_section": list(config.decoder.mrope_section),
            },
            "bos_token_id": None,
            "eos_token_id": None,
        },
        vision_config={
            "depth": config.vision.layers,
            "embed_dim": config.vision.width,
            "num_heads": config.vision.heads,
            "mlp_ratio": config.vision.mlp_width // config.vision.width,
            "hidden_size": width,
        },
    )
    theirs._attn_implementation = "sdpa"
    print(f"{describe()}, torch {torch.__version__}, {torch.get_num_threads()} torch threads")
    print(f"{layers} layers, {rows} rows of {length}, {dtype}, medians of {arguments.repeats}")

    x = np.random.default_rng(0).normal(size=(rows, length, width)).astype(np.float32)
    x_jax, x_torch = jnp.asarray(x, dtype), torch.tensor(x, **on)
    segment_ids = jnp.ones((rows, length), jnp.int32)
    positions = jnp.asarray(np.tile(sequential_positions(length), (rows, 1, 1)))
    decode = jax.jit(lambda p, x: p.norm(p(x, segment_ids, positions, compute)[0]))
    decoder = Qwen2VLTextModel(theirs.text_config).eval().to(**on)

    def torch_decoder() -> None:
        with torch.inference_mode():
            decoder(inputs_embeds=x_torch, use_cache=False)
        wait_for_torch()

    flops = qwen2_vl_2b.decoder_flops(config, rows * length, length)
    runs = {
        "jax": lambda: decode(params.decoder, x_jax).block_until_ready(),
        "torch": torch_decoder,
    }
    results = {}
    results["decoder"] = report("decoder", flops, runs, arguments.repeats, dtype)

    side = 2 * int((length / 4) ** 0.5)
    patches = np.random.default_rng(0).integers(0, 256, (rows, side * side, 588), np.uint8)
    where = jnp.asarray(np.tile(patch_positions(side, side, 2), (rows, 1, 1)))
    images = jnp.ones((rows, side * side), jnp.int32)
    see = jax.jit(lambda p, x: p(x, images, where, compute))
    tower = Qwen2VisionTransformerPretrainedModel(theirs.vision_config).eval().to(**on)
    pixels = torch.tensor(
        np.repeat(patches.reshape(-1, 3, 1, 196) / 255, 2, axis=2).reshape(-1, 1176),
        **on,
    )
    grid = torch.tensor([[1, side, side]] * rows, device=on["device"])
    patches_jax = jnp.asarray(patches)

    def torch_tower() -> None:
        with torch.inference_mode():
            tower(pixels, grid_thw=grid)
        wait_for_torch()

    flops = qwen2_vl_2b.vision_flops(config, rows * side * side, side * side)
    runs = {
        "jax": lambda: jax.block_until_ready(see(params.vision, patches_jax)),
        "torch": torch_tower,
    }
    results["tower"] = report("tower", flops, runs, arguments.repeats, dtype)
    if arguments.json:
        write_json(arguments.json, results)


if __name__ == "__main__":
    main()
