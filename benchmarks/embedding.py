"""Compare embedding a mixed corpus, from JPEG files to vectors, with sentence-transformers.

    python benchmarks/embedding.py

The model is Qwen2-VL-2B cut to 12 layers, with random weights; both sides read the same exported
folder. A third of the items are texts, a third images, a third both. Printed: the share of host and
device on our side and its FLOPs beside the matrix-product peak, sentence-transformers at each batch
size, and how far bfloat16 vectors are from those of float32.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import numpy as np
import qwen2_vl_2b
import torch
from forward import device_of_torch, wait_for_torch
from machine import alone, describe, square_product, write_json
from pipeline import jpegs
from sentence_transformers import SentenceTransformer
from transformers import Qwen2VLProcessor
from transformers.utils import is_torchvision_available

from puma_jax import Embedder
from puma_jax.config import ComputeConfig, ModelConfig
from puma_jax.export.sentence_transformers import write
from puma_jax.model.encoder import init
from puma_jax.model.flops import forward_flops
from tests.reference import byte_tokenizer


def model(config: ModelConfig, dtype: str) -> Embedder:
    """Return an embedder of random weights, with a tokenizer of bytes."""
    tokenizer = byte_tokenizer()
    ids = {
        f"{field}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for field, token in (
            ("image", "image_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }
    config = dataclasses.replace(config, **ids)
    params = jax.jit(lambda key: init(config, key, dtype))(jax.random.key(0))
    return Embedder(config, params, tokenizer, compute=ComputeConfig(dtype=dtype))


def corpus(count: int, folder: Path) -> list[dict[str, str]]:
    """Write the images, and return the items: texts of log-normal lengths, JPEG files, both."""
    rng = np.random.default_rng(0)
    files = []
    for number, data in enumerate(jpegs(min(count, 256))):
        files.append(folder / f"{number}.jpg")
        files[-1].write_bytes(data)
    items = []
    for number in range(count):
        length = int(np.clip(np.exp(rng.normal(3.7, 0.7)), 8, 300))
        text = "".join(rng.choice(list("abcdefghij klmno"), length))
        item = {"text": text, "image": str(files[number % len(files)])}
        kept = (("text",), ("image",), ("text", "image"))[number % 3]
        items.append({name: item[name] for name in kept})
    return items


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def distance(narrow: np.ndarray, embedder: Embedder, items: list) -> dict[str, float]:
    """Return how far vectors of bfloat16 are from those of the same weights in float32."""
    wide = Embedder(
        embedder.config,
        jax.tree.map(lambda leaf: leaf.astype("float32"), embedder.params),
        embedder.tokenizer,
        compute=ComputeConfig(dtype="float32"),
    ).encode(items, progress=False)
    cosines = (narrow[: len(items)] * wide).sum(1)
    return {"least": float(cosines.min()), "mean": float(cosines.mean())}


def peer_of(embedder: Embedder, folder: Path, dtype: str) -> SentenceTransformer:
    """Return the same model in sentence-transformers, by way of a folder."""
    folder.mkdir()
    write(embedder, folder)
    if not is_torchvision_available():  # which only videos need
        parts = classmethod(lambda cls: ["image_processor", "tokenizer"])
        Qwen2VLProcessor.get_attributes = parts
    return SentenceTransformer(
        str(folder),
        device=device_of_torch(),
        model_kwargs={"dtype": getattr(torch, dtype), "attn_implementation": "sdpa"},
    )


def theirs(peer: SentenceTransformer, items: list, batch_sizes: list[int]) -> dict[str, float]:
    """Return the items per second of sentence-transformers, by batch size."""
    speed = {}
    for batch_size in batch_sizes:

        def encode(some: list = items, size: int = batch_size) -> None:
            peer.encode(some, batch_size=size, show_progress_bar=False)
            wait_for_torch()

        try:
            encode(items[:batch_size])
            with alone():
                speed[str(batch_size)] = len(items) / seconds(encode)
        except torch.OutOfMemoryError:
            break
    return speed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=1536)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--tokens-per-chunk", type=int, default=32768)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--toy", action="store_true", help="a small model, for any machine")
    parser.add_argument("--json", type=Path, help="file to write the results to as well")
    parser.add_argument("--trace", type=Path, help="folder of a profile of prepared items")
    arguments = parser.parse_args()
    config = qwen2_vl_2b.toy() if arguments.toy else qwen2_vl_2b.config(12)
    embedder = model(config, arguments.dtype)
    print(f"{describe()}, torch {torch.__version__}, {arguments.items:,} items, {arguments.dtype}")
    with TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks of libraries on random models
        peer = peer_of(embedder, Path(scratch) / "model", arguments.dtype)
        items = corpus(arguments.items, Path(scratch))

        def encode(given: list) -> np.ndarray:
            return embedder.encode(
                given, tokens_per_chunk=arguments.tokens_per_chunk, progress=False
            )

        vectors = encode(items)  # compiles
        prepared = [embedder.preprocess(item) for item in items]
        product, product_flops = square_product(arguments.dtype)
        product()  # compiles
        with alone():
            taken = {
                "end to end": seconds(lambda: encode(items)),
                "prepared items": seconds(lambda: encode(prepared)),
            }
            peak = product_flops / min(seconds(product) for _ in range(5))
        if arguments.trace:
            with jax.profiler.trace(str(arguments.trace), create_perfetto_trace=True):
                encode(prepared)
        results = {
            "puma_jax": {name: len(items) / time_taken for name, time_taken in taken.items()},
            "sentence-transformers": theirs(peer, items, arguments.batch_sizes),
            "cosine of bfloat16 and float32": distance(vectors, embedder, items[:96]),
        }  # fmt: skip
    tokens, patches = (
        np.array([len(getattr(item, name)) for item in prepared]) for name in ("tokens", "patches")
    )
    flops = forward_flops(embedder.config, tokens, patches).sum()
    used = results["FLOPs of prepared items of peak"] = flops / taken["prepared items"] / peak
    print(f"{tokens.mean():.0f} tokens and {patches.mean():.0f} patches an item on average")
    print(
        f"{flops / len(items) / 1e9:.0f} GFLOP an item: prepared items run at {used:.0%} of the "
        f"matrix-product peak, {peak / 1e12:.1f} TFLOP/s\n"
    )
    print("| | items/s |\n|---|--:|")
    for name, speed in results["puma_jax"].items():
        print(f"| puma_jax, {name} | {speed:.1f} |")
    for size, speed in results["sentence-transformers"].items():
        print(f"| sentence-transformers, batches of {size} | {speed:.1f} |")
    best = max(results["sentence-transformers"].values())
    print(f"\npuma_jax is {results['puma_jax']['end to end'] / best:.2f} × sentence-transformers")
    close = results["cosine of bfloat16 and float32"]
    print(f"cosine with float32: {close['mean']:.5f} on average, {close['least']:.5f} at the least")
    if arguments.json:
        write_json(arguments.json, results)


if __name__ == "__main__":
    main()
