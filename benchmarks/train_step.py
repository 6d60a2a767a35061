"""Compare a whole training step with sentence-transformers' gradient cache on torch.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --dtype bfloat16 --layers 12 --width 1536 --pairs 1024 \
        --mini-batch 256 --longest 450    # on a GPU

In bfloat16, both keep weights in float32 and round them for products. Both run on the GPU if there
is one.

Both train all weights of the same Qwen2-VL decoder on the same pairs of texts: forward, backward,
clipping and AdamW, with InfoNCE over the whole batch and equally many items in memory at a time.
Ours packs items into rows; theirs pads each mini-batch to its longest item, as its users do. Loss
and gradient norm are compared first. Then both take steps in turns in one process, together with
the large matrix product that measures the machine's peak.

FLOPs are those of products with weights for tokens that are not padding: 2 for each weight and
token forward, 6 with the backward pass. They exclude attention's own and the second forward pass
of the gradient cache. The last column includes that pass and padding: all products with weights.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import numpy as np
import sentence_transformers
import torch
from forward import device_of_torch, in_turns, wait_for_torch
from machine import describe, square_product, write_json
from packing import padded
from qwen2_vl_2b import decoder_flops
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from puma_jax.config import ComputeConfig, DType, ModelConfig
from puma_jax.data.items import Item, TokenizedTemplate
from puma_jax.data.packing import fill, place
from puma_jax.data.pipeline import Batch
from puma_jax.data.shapes import batch_shape
from puma_jax.model.encoder import Encoder
from puma_jax.model.hf import open_checkpoint
from puma_jax.model.tree import partition
from puma_jax.parallel.mesh import MeshConfig, make_mesh
from puma_jax.training.config import LossConfig, StageConfig
from puma_jax.training.optimizer import learning_rate
from puma_jax.training.stages import is_trained
from puma_jax.training.step import FrozenParams, init_state, make_loss, make_step
from puma_jax.training.transfer import shard_batch

BATCHES = 4
HEAD_DIM = 64

Step = Callable[[], tuple[float, float]]
"""Takes one step and returns its loss and gradient norm."""


def random_model(arguments: argparse.Namespace) -> Qwen2VLForConditionalGeneration:
    """Return a decoder with random weights, and the smallest tower that a checkpoint can have."""
    heads = arguments.width // HEAD_DIM
    torch.manual_seed(0)
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": arguments.vocab_size,
            "hidden_size": arguments.width,
            "intermediate_size": 3 * arguments.width,
            "num_hidden_layers": arguments.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 2,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [8, 12, 12],
            },
            "bos_token_id": None,
            "eos_token_id": None,
        },
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": arguments.width, "num_heads": 2},
        image_token_id=0,
        video_token_id=1,
        vision_start_token_id=2,
        vision_end_token_id=3,
        tie_word_embeddings=True,
    )
    config._attn_implementation = "sdpa"
    return Qwen2VLForConditionalGeneration(config)


def random_items(
    rng: np.random.Generator, pairs: int, longest: int, model: ModelConfig
) -> list[Item]:
    """Return the texts of a batch, queries before candidates, with log-normal lengths."""
    ret = model.decoder.vocab_size - 1
    template = TokenizedTemplate(model, start=(), end=(ret,), suffix_text=(), suffix_both=())
    lengths = np.clip(np.exp(rng.normal(3.3, 0.7, 2 * pairs)), 8, longest).astype(int)
    return [template.assemble(rng.integers(4, ret, length - 1).tolist()) for length in lengths]


def lengths_of(items: Sequence[Item]) -> np.ndarray:
    return np.array([len(item.tokens) for item in items])


def by_length(items: Sequence[Item]) -> list[Item]:
    """Return the same pairs in ascending order of their longest text."""
    lengths = lengths_of(items).reshape(2, -1)
    order = np.argsort(lengths.max(0))
    return [items[i] for i in (*order, *(order + lengths.shape[1]))]


def pack(batches: Sequence[Sequence[Item]], chunks: int, model: ModelConfig) -> list[Batch]:
    """Return the batches in packed rows of one shape that fits all of them."""
    sizes = [
        (lengths_of(items), np.array([len(item.patches) for item in items])) for items in batches
    ]
    largest = tuple(max(int(step[of].max()) for step in sizes) for of in (0, 1))
    shape = batch_shape(sizes, chunks, 1, largest)
    packed = []
    for items, (lengths, patches) in zip(batches, sizes, strict=True):
        packing = place(lengths, patches, shape, chunks)
        slots = packing.chunk * shape.slots + packing.slot
        pairs = len(items) // 2
        packed.append(
            Batch(
                rows=fill(items, packing, shape, model.vision),
                query_slot=slots[:pairs],
                candidate_slot=slots[pairs:],
                modality=np.ones(pairs, np.int32),
                query=np.arange(pairs),
                candidate=np.arange(pairs),
                document=np.arange(pairs, dtype=np.int32),
                prompt=np.full(pairs, -1),
                valid=np.ones(pairs, bool),
            )
        )
    return packed


def puma_jax_step(
    params: Encoder, batches: Sequence[Batch], config: StageConfig, dtype: DType
) -> Step:
    """Return our compiled step, which takes the batches in turn."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    trained, frozen = partition(params, lambda name: is_trained(name, config))
    structure = jax.eval_shape(lambda: params)
    compute = ComputeConfig(dtype=dtype)
    loss = make_loss(config, config.steps, structure, compute, mesh, jax.random.key(0))
    step = jax.jit(make_step(config, config.steps, loss), donate_argnums=0)
    state, frozen_params = init_state(config, config.steps, trained), FrozenParams(frozen)
    on_devices = [shard_batch(batch, config.loss, mesh) for batch in batches]
    compiled = step.lower(state, frozen_params, on_devices[0], None).compile()
    given = itertools.cycle(on_devices)

    def take() -> tuple[float, float]:
        nonlocal state
        state, metrics = jax.block_until_ready(compiled(state, frozen_params, next(given), None))
        return float(metrics["loss"]), float(metrics["gradient_norm"])

    return take


class Decoder(torch.nn.Module):
    """A transformers decoder as the first module of a SentenceTransformer."""

    def __init__(self, decoder: torch.nn.Module):
        super().__init__()
        self.decoder = decoder

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the features with the state of every token."""
        output = self.decoder(
            input_ids=features["input_ids"],
            attention_mask=features["attention_mask"],
            use_cache=False,
        )
        return {**features, "token_embeddings": output.last_hidden_state}


def padded_features(items: Sequence[Item], device: str) -> dict[str, torch.Tensor]:
    """Return one side of a batch as a data collator does; the loss trims it by mini-batch."""
    tokens = [torch.tensor(item.tokens, dtype=torch.long, device=device) for item in items]
    ones = [torch.ones_like(of_item) for of_item in tokens]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(tokens, batch_first=True),
        "attention_mask": pad(ones, batch_first=True),
    }


def sentence_transformers_step(
    decoder: torch.nn.Module,
    batches: Sequence[Sequence[Item]],
    config: StageConfig,
    mini_batch: int,
    dtype: DType,
) -> Step:
    """Return their step, which takes the batches in turn, with the optimizer of transformers."""
    pooling = Pooling(decoder.config.hidden_size, "lasttoken")
    modules = [Decoder(decoder), pooling, Normalize()]
    device = device_of_torch()
    model = SentenceTransformer(modules=modules, device=device)
    features = [
        [
            padded_features(part, device)
            for part in (items[: len(items) // 2], items[len(items) // 2 :])
        ]
        for items in batches
    ]
    return cached_loss_step(model, features, config, mini_batch, dtype)


def cached_loss_step(
    model: SentenceTransformer,
    features: Sequence[Sequence[dict]],
    config: StageConfig,
    mini_batch: int,
    dtype: DType,
) -> Step:
    """Return a step of sentence-transformers on the features of both sides of batches."""
    model.train()
    loss = CachedMultipleNegativesRankingLoss(
        model, scale=1 / config.loss.temperature, mini_batch_size=mini_batch
    )
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    settings = config.optimizer
    optimizer = torch.optim.AdamW(
        trained,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    rate = learning_rate(settings, config.steps)
    rates = iter([float(rate(step)) for step in range(config.steps)])
    given = itertools.cycle(features)

    def take() -> tuple[float, float]:
        optimizer.param_groups[0]["lr"] = next(rates)
        with torch.autocast(device_of_torch(), torch.bfloat16, enabled=dtype == "bfloat16"):
            value = loss([dict(side) for side in next(given)], None)
            value.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        wait_for_torch()
        return float(value.detach()), float(norm)

    return take


def print_ratio(seconds: dict[str, float]) -> None:
    """Print how much faster our step is, if both were timed."""
    if len(seconds) == 2:
        ratio = seconds["sentence-transformers"] / seconds["puma_jax"]
        print(f"\npuma_jax is {ratio:.2f} × sentence-transformers")


def as_json(
    seconds: dict[str, float],
    first: dict[str, tuple[float, float]],
    pairs: int,
    seconds_at_peak: float,
) -> dict[str, dict[str, float]]:
    """Return what was measured of each step.

    Args:
        seconds: Seconds of a step.
        first: Loss and gradient norm of the first step.
        pairs: Pairs in a batch.
        seconds_at_peak: Seconds of a step's model FLOPs at the matrix-product peak.
    """
    return {
        name: {
            "pairs_per_second": pairs / taken,
            "model_flops_of_peak": seconds_at_peak / taken,
            "first_loss": first[name][0],
            "first_gradient_norm": first[name][1],
        }
        for name, taken in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument(
        "--width", type=int, default=512, help=f"decoder width, a multiple of {2 * HEAD_DIM}"
    )
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--pairs", type=int, default=128, help="pairs in a batch")
    parser.add_argument("--mini-batch", type=int, default=64, help="items in memory at a time")
    parser.add_argument(
        "--longest", type=int, default=120, help="most tokens of an item, at least 8"
    )
    parser.add_argument(
        "--sort", action="store_true", help="sort pairs by length, which reduces padding"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument(
        "--only", choices=["puma_jax", "sentence-transformers"], help="run one, with all memory"
    )
    parser.add_argument("--json", type=Path, help="file to write the results to as well")
    arguments = parser.parse_args()
    pairs, mini_batch = arguments.pairs, arguments.mini_batch
    if pairs % mini_batch or arguments.width % (2 * HEAD_DIM):
        parser.error("pairs must divide into mini-batches, width into an even number of heads")
    chunks = 2 * pairs // mini_batch
    config = StageConfig(
        steps=arguments.repeats + 2,  # one to compare, one to warm up
        grad_cache_chunks=chunks,
        loss=LossConfig(kind="info_nce", temperature=0.05),
        trainable="full",
    )
    theirs = random_model(arguments)
    with TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        checkpoint = open_checkpoint(Path(folder))
        model, params = checkpoint.config, checkpoint.read(dtype="float32")
    rng = np.random.default_rng(0)
    batches = [random_items(rng, pairs, arguments.longest, model) for _ in range(BATCHES)]
    if arguments.sort:
        batches = [by_length(items) for items in batches]
    packed = pack(batches, chunks, model)
    lengths = [lengths_of(items) for items in batches]
    useful = {
        "puma_jax": np.mean([np.mean(batch.rows.segment_ids > 0) for batch in packed]),
        "sentence-transformers": np.mean([padded(of, chunks, by_length=False) for of in lengths]),
    }
    tokens = np.mean([of.sum() for of in lengths])
    print(
        f"{describe()}, torch {torch.__version__}, {torch.get_num_threads()} torch threads, "
        f"sentence-transformers {sentence_transformers.__version__}"
    )
    print(
        f"{arguments.layers} layers of width {arguments.width}, {pairs} pairs of "
        f"{tokens / pairs / 2:.0f} tokens an item on average, {chunks} chunks, {arguments.dtype}, "
        f"medians of {arguments.repeats}"
    )
    rows = packed[0].rows.tokens.shape
    print(f"packed into {rows[0]} chunks of {rows[1]} rows of {rows[2]} tokens")

    steps = {}
    if arguments.only != "sentence-transformers":
        steps["puma_jax"] = puma_jax_step(params, packed, config, arguments.dtype)
    if arguments.only != "puma_jax":
        steps["sentence-transformers"] = sentence_transformers_step(
            theirs.model.language_model, batches, config, mini_batch, arguments.dtype
        )
    del params
    first = {name: step() for name, step in steps.items()}
    for name, (loss, norm) in first.items():
        print(f"{name:22} first loss {loss:.6f}, norm of its gradient {norm:.6f}")
    if not arguments.only and not np.allclose(
        *first.values(), rtol=1e-3 if arguments.dtype == "float32" else 5e-2, atol=0
    ):
        parser.exit(1, "these are not the same step\n")

    product, product_flops = square_product(arguments.dtype)
    seconds = in_turns({**steps, "peak": product}, arguments.repeats)
    peak = product_flops / seconds.pop("peak")
    flops = 3 * decoder_flops(model, int(tokens), 0)
    print(f"matrix-product peak {peak / 1e9:.0f} GFLOP/s, {flops / 1e9:.0f} GFLOP a step")
    print()
    print("| | pairs/s | a step | useful tokens | model FLOPs of peak | all products of peak |")
    print("|---|--:|--:|--:|--:|--:|")
    for name, time_taken in seconds.items():
        used = flops / time_taken / peak
        multiplied = used * 4 / 3 / useful[name]  # forward twice, and padding
        print(
            f"| {name} | {pairs / time_taken:.1f} | {time_taken:.2f} s | {useful[name]:.1%} | "
            f"{used:.0%} | {multiplied:.0%} |"
        )
    print_ratio(seconds)
    if arguments.json:
        write_json(arguments.json, as_json(seconds, first, pairs, flops / peak))


if __name__ == "__main__":
    main()
