"""Compare a step of the paper's second stage, with images, with sentence-transformers on torch.

    python benchmarks/stage2_step.py    # on a GPU

The model is Qwen2-VL-2B cut to 12 layers, with random weights; both sides read the same exported
folder and train adapters on the decoder (rank 128) from the same first values. A third of the items
are texts, a third images, a third both. Both compute InfoNCE over the whole batch with a gradient
cache; preparing items is left out on both sides. Loss and gradient norm of the first step are
printed, and compared unless `--only` is given.

FLOPs are those that a step cannot do without: the tower once, for it is frozen; the decoder forward
and the gradients of its inputs; adapters three times. Padding, and all that a gradient cache
computes again, is not counted.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np
import qwen2_vl_2b
import torch
from embedding import corpus, model, peer_of
from forward import device_of_torch, in_turns
from machine import describe, square_product, write_json
from peft import LoraConfig as PeftConfig
from peft import inject_adapter_in_model
from train_step import Step, as_json, cached_loss_step, pack, print_ratio, puma_jax_step

from puma_jax import Embedder
from puma_jax.config import LoraConfig
from puma_jax.data.items import Item
from puma_jax.model.encoder import Encoder
from puma_jax.model.flops import forward_flops
from puma_jax.model.lora import add_lora, is_lora
from puma_jax.model.tree import named_leaves
from puma_jax.training.config import LossConfig, StageConfig

BATCHES = 2
LINEARS = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
"""Linears of a decoder layer, here and in transformers."""


def model_flops(embedder: Embedder, batches: Sequence[Sequence[Item]], params: Encoder) -> float:
    """Return the FLOPs that a step cannot do without, the mean of the batches."""
    tokens = np.array([len(item.tokens) for items in batches for item in items])
    patches = np.array([len(item.patches) for items in batches for item in items])
    both = forward_flops(embedder.config, tokens, patches).sum()
    decoder = forward_flops(embedder.config, tokens, np.zeros_like(patches)).sum()
    adapters = sum(leaf.size for name, leaf in named_leaves(params).items() if is_lora(name))
    return float(both + decoder + 6 * adapters * tokens.sum()) / len(batches)


def adapt(peer: Any, lora: LoraConfig, params: Encoder) -> None:
    """Add the same adapters as ours to sentence-transformers' model."""
    targets = "|".join(name.replace(".", r"\.") for name in LINEARS.values())
    inject_adapter_in_model(
        PeftConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=0.0,
            target_modules=rf".*language_model\.layers\.\d+\.({targets})",
        ),
        peer[0].auto_model,
    )
    leaves = {name: np.asarray(leaf) for name, leaf in named_leaves(params).items()}
    for name, weight in peer.named_parameters():
        if ".lora_A." not in name:
            continue
        weight.data = weight.data.float()
        layer = int(name.split(".layers.")[1].split(".")[0])
        ours = next(key for key, module in LINEARS.items() if module in name)
        part = "attention" if "self_attn" in name else "mlp"
        matrix = leaves[f"decoder.layers.{part}.{ours}.lora_a"][layer]
        weight.data.copy_(torch.tensor(matrix.T))
    for name, weight in peer.named_parameters():
        if ".lora_B." in name:
            weight.data = weight.data.float()


def sentence_transformers_step(
    peer: Any, batches: Sequence[Sequence[dict]], config: StageConfig, mini_batch: int, dtype: str
) -> Step:
    """Return their step, which takes the batches in turn."""
    device = device_of_torch()
    prepared = []
    for items in batches:
        sides = items[: len(items) // 2], items[len(items) // 2 :]
        of_sides = [peer.preprocess(list(side)) for side in sides]
        prepared.append(
            [
                {k: v.to(device) if hasattr(v, "to") else v for k, v in features.items()}
                for features in of_sides
            ]
        )
    return cached_loss_step(peer, prepared, config, mini_batch, dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=256, help="pairs in a batch")
    parser.add_argument("--mini-batch", type=int, default=64, help="items in memory at a time")
    parser.add_argument(
        "--peer-mini-batch", type=int, help="the same for the peer, if it has less memory for more"
    )
    parser.add_argument("--rank", type=int, default=128, help="rank of the adapters")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--toy", action="store_true", help="a small model, for any machine")
    parser.add_argument(
        "--only", choices=["puma_jax", "sentence-transformers"], help="run one, with all memory"
    )
    parser.add_argument("--json", type=Path, help="file to write the results to as well")
    arguments = parser.parse_args()
    pairs, mini_batch = arguments.pairs, arguments.mini_batch
    if pairs % mini_batch:
        parser.error("--pairs must divide into mini-batches")
    chunks = 2 * pairs // mini_batch
    config = StageConfig(
        steps=100,
        grad_cache_chunks=chunks,
        loss=LossConfig(kind="info_nce", temperature=0.05),
        trainable="lora",
        lora=LoraConfig(rank=arguments.rank, alpha=2.0 * arguments.rank),
    )
    embedder = model(
        qwen2_vl_2b.toy() if arguments.toy else qwen2_vl_2b.config(12), arguments.dtype
    )
    params = add_lora(embedder.params, config.lora, jax.random.key(1))
    print(
        f"{describe()}, torch {torch.__version__}, {pairs} pairs, {chunks} chunks, "
        f"{arguments.dtype}, medians of {arguments.repeats}"
    )
    with TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks of libraries on random models
        every = corpus(BATCHES * 2 * pairs, Path(scratch))
        batches = [every[n * 2 * pairs : (n + 1) * 2 * pairs] for n in range(BATCHES)]
        prepared = [[embedder.preprocess(item) for item in items] for items in batches]
        steps = {}
        if arguments.only != "puma_jax":
            peer = peer_of(embedder, Path(scratch) / "model", arguments.dtype)
            adapt(peer, config.lora, params)
            their_mini_batch = arguments.peer_mini_batch or mini_batch
            steps["sentence-transformers"] = sentence_transformers_step(
                peer, batches, config, their_mini_batch, arguments.dtype
            )
        if arguments.only != "sentence-transformers":
            packed = pack(prepared, chunks, embedder.config)
            rows = packed[0].rows
            print(
                f"chunks of {'×'.join(map(str, rows.tokens.shape[1:]))} tokens and "
                f"{'×'.join(map(str, rows.patches.shape[1:3]))} patches"
            )
            steps["puma_jax"] = puma_jax_step(params, packed, config, arguments.dtype)
        flops = model_flops(embedder, prepared, params)
        del params
        first = {name: step() for name, step in steps.items()}
        for name, (loss, norm) in first.items():
            print(f"{name:22} first loss {loss:.5f}, norm of its gradient {norm:.5f}")
        close = 2e-3 if arguments.dtype == "float32" else 5e-2
        if not arguments.only and not np.allclose(*first.values(), rtol=close, atol=0):
            parser.exit(1, "these are not the same step\n")
        product, product_flops = square_product(arguments.dtype)
        seconds = in_turns({**steps, "peak": product}, arguments.repeats)
    peak = product_flops / seconds.pop("peak")
    print(f"matrix-product peak {peak / 1e9:.0f} GFLOP/s, {flops / 1e9:.0f} GFLOP a step\n")
    print("| | pairs/s | a step | model FLOPs of peak |\n|---|--:|--:|--:|")
    for name, taken in seconds.items():
        print(f"| {name} | {pairs / taken:.1f} | {taken:.3f} s | {flops / taken / peak:.0%} |")
    print_ratio(seconds)
    if arguments.json:
        write_json(arguments.json, as_json(seconds, first, pairs, flops / peak))


if __name__ == "__main__":
    main()
