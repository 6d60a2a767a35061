"""Load a checkpoint of Qwen2-VL-2B's full size, pruned to 12 layers, and embed 16 mixed items.

    python benchmarks/load_model.py --tokenizer DIR

Random weights are written once (bf16, several shards, 4.4 GB) to --checkpoint. Loading runs in a
separate process, so that the peak memory it prints is that of loading alone.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import qwen2_vl_2b
from machine import describe, peak_memory
from PIL import Image
from safetensors.numpy import save_file

from puma_jax import Embedder
from puma_jax.model import hf
from puma_jax.model.encoder import abstract
from puma_jax.model.families import family_of
from puma_jax.model.tree import named_leaves

SHARD_BYTES = 2**30


def make_checkpoint(folder: Path, tokenizer: Path) -> None:
    """Write random weights shard by shard, with the names and shapes of the published ones."""
    folder.mkdir(parents=True)
    config = qwen2_vl_2b.config()
    rng = np.random.default_rng(0)
    shards: list[dict[str, np.ndarray]] = [{}]
    room = SHARD_BYTES
    for name, shape in hf.tensor_shapes(config).items():
        values = rng.standard_normal(shape, np.float32) * np.float32(0.02)
        values = values.astype(ml_dtypes.bfloat16)
        if values.nbytes > room and shards[-1]:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = values
        room -= values.nbytes
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    hf.write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    written = family_of("qwen2_vl").write_config(config, {}) | {"dtype": "bfloat16"}
    hf.write_json(folder / "config.json", written)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / file, folder)


def items() -> list[dict[str, object]]:
    """Return sixteen items of all three kinds; images have 256 pixels on the short side."""
    rng = np.random.default_rng(0)
    mixed: list[dict[str, object]] = []
    for i in range(16):
        item: dict[str, object] = {}
        if i % 3 != 1:
            item["text"] = "a red bicycle leaning on a wall " * (1 + i % 4)
        if i % 3 != 0:
            pixels = rng.integers(0, 256, (256, 256 + 32 * (i % 4), 3), np.uint8)
            item["image"] = Image.fromarray(pixels)
        mixed.append(item)
    return mixed


def load_and_embed(checkpoint: Path, dtype: str) -> None:
    """Print the time and memory to load the pruned model and to embed with it."""
    config = qwen2_vl_2b.config(layers=12)
    kept = sum(leaf.size for leaf in named_leaves(abstract(config)).values())
    kept_bytes = kept * (2 if dtype == "bfloat16" else 4)
    start = time.perf_counter()
    embedder = Embedder.load(checkpoint, dtype=dtype).keep_layers(12)
    jax.block_until_ready(embedder.params)
    loaded = time.perf_counter() - start
    limit = 1.3 * kept_bytes + 1e9
    memory = peak_memory()
    print(f"{describe()}, weights and activations {dtype}")
    print(f"kept weights   {kept / 1e9:.2f} B parameters, {kept_bytes / 1e9:.2f} GB")
    print(f"time to load   {loaded:.1f} s ({kept_bytes / 1e9 / loaded:.2f} GB/s)")
    verdict = (
        f"{'within' if memory <= limit else 'OVER'} 1.3 × weights + 1 GB = {limit / 1e9:.2f} GB"
    )
    print(f"peak memory    {memory / 1e9:.2f} GB, {verdict}")
    for run in ("first call, with compilation", "second call"):
        start = time.perf_counter()
        vectors = embedder.encode(
            items(), instruction="Find an image that matches.", progress=False
        )
        seconds = time.perf_counter() - start
        print(f"embed 16 items {16 / seconds:.2f} items/s ({seconds:.1f} s, {run})")
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3)
    print(f"peak memory    {peak_memory() / 1e9:.2f} GB after embedding")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tokenizer", type=Path, required=True, help="folder of a Qwen2-VL tokenizer"
    )
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/random-qwen2-vl-2b"))
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    arguments = parser.parse_args()
    if os.environ.get("LOAD_ONLY"):
        load_and_embed(arguments.checkpoint, arguments.dtype)
        return
    if not (arguments.checkpoint / "tokenizer.json").exists():
        shutil.rmtree(arguments.checkpoint, ignore_errors=True)
        print("writing 4.4 GB of random weights ...", flush=True)
        make_checkpoint(arguments.checkpoint, arguments.tokenizer)
    subprocess.run([sys.executable, *sys.argv], env={**os.environ, "LOAD_ONLY": "1"}, check=True)


if __name__ == "__main__":
    main()
