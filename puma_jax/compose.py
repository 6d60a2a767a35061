"""Join a text decoder and a vision tower into one model, to be trained.

`python -m puma_jax.compose --decoder SmolLM2-135M --vision new --out composed`
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerFast

from puma_jax import Embedder, cli
from puma_jax.artifacts import check_output
from puma_jax.config import (
    ImageConfig,
    ModelConfig,
    PromptConfig,
    PromptStyle,
    VisionConfig,
    require,
)
from puma_jax.data.tokenizer import load_tokenizer
from puma_jax.model import encoder, hf
from puma_jax.model.composed import SEPARATOR
from puma_jax.model.encoder import Encoder
from puma_jax.model.tree import assemble, named_leaves
from puma_jax.typing import ndarray

NEW = "new"
_IMAGE_TOKENS = ("<|image_pad|>", "<|vision_start|>", "<|vision_end|>")


def main(
    decoder: str,
    vision: str,
    out: Path,
    new_layers: int = 12,
    new_width: int = 384,
    new_heads: int = 6,
    template: PromptStyle = "chat",
    ret_token: str = "[RET]",
    seed: int = 0,
) -> None:
    """Write a model of a text decoder and a vision tower.

    The merger, which projects visual tokens to the width of the decoder, is new unless it fits.
    Special tokens that the tokenizer lacks get new rows of the token table. Positions count tokens
    in one dimension, as those of text decoders do.

    Args:
        decoder: Hugging Face folder or hub id of a qwen2, qwen3 or llama model.
        vision: Hugging Face folder or hub id of a model whose tower to take, or "new" for a new
            tower of the kind that Qwen2-VL has.
        out: Folder to write; must not exist, or be empty.
        new_layers: Transformer blocks of a new tower.
        new_width: Hidden size of a new tower.
        new_heads: Attention heads of a new tower.
        template: Prompt around an item: chat, bare or instruct.
        ret_token: Token that ends every item; added to the tokenizer unless it has it.
        seed: Seed of new weights.
    """
    check_output(out)
    text = hf.open_checkpoint(decoder)
    require(
        not text.config.vision.layers,
        f"--decoder {decoder} is a {text.config.family} with a vision tower of its own: give a "
        "model of texts only",
    )
    seen = None if vision == NEW else hf.open_checkpoint(vision)
    require(
        seen is None or bool(seen.config.vision.layers),
        f"--vision {vision} has no vision tower: give a model that reads images, or {NEW}",
    )
    if seen is None:
        tower = VisionConfig(
            layers=new_layers,
            width=new_width,
            heads=new_heads,
            mlp_width=4 * new_width,
            out_width=text.config.decoder.width,
        )
    else:
        tower = dataclasses.replace(seen.config.vision, out_width=text.config.decoder.width)

    tokenizer = load_tokenizer(text.folder)
    special = [*_IMAGE_TOKENS, *([ret_token] if template != "instruct" else [])]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    prompt = PromptConfig(
        ret_token=ret_token,
        positions="1d",
        template=template,
        pooling="last" if template == "instruct" else "ret",
    )
    tower_family = "qwen2_vl" if seen is None else seen.config.family.split(SEPARATOR)[-1]
    config = _config(
        f"{text.config.family}{SEPARATOR}{tower_family}", text, tower, tokenizer, prompt
    )
    params, new = _params(config, text, seen, seed)
    source = hf.HubConfigs(
        model={"text_config": dict(text.source.model)},
        preprocessor={} if seen is None else seen.source.preprocessor,
    )
    Embedder(config, params, tokenizer, source=source).save(out)
    rows = config.decoder.vocab_size - text.config.decoder.vocab_size
    print(f"{config.family}: {rows} new rows of the token table, new weights: {', '.join(new)}")
    print(f"The model is in {out}")


def _config(
    family: str,
    text: hf.Checkpoint,
    tower: VisionConfig,
    tokenizer: PreTrainedTokenizerFast,
    prompt: PromptConfig,
) -> ModelConfig:
    """Return the config of the model, whose token table has a row for every token."""
    ids = tokenizer.get_vocab()
    image, start, end = (ids[token] for token in _IMAGE_TOKENS)
    rows = max(text.config.decoder.vocab_size, 1 + max(ids.values()))
    side = tower.patch_size * tower.merge_size
    return ModelConfig(
        family=family,
        vision=tower,
        decoder=dataclasses.replace(text.config.decoder, vocab_size=rows),
        image_token_id=image,
        vision_start_token_id=start,
        vision_end_token_id=end,
        images=ImageConfig(4 * side**2, 300 * side**2),
        prompt=prompt,
        kept_layers=text.config.kept_layers,
    )


def _params(
    config: ModelConfig, text: hf.Checkpoint, seen: hf.Checkpoint | None, seed: int
) -> tuple[Encoder, list[str]]:
    """Return the weights, each from the model that has it in its shape, and what is new."""
    dtype = text.dtype
    read = {
        name: leaf
        for name, leaf in named_leaves(text.read(dtype=dtype)).items()
        if name.startswith("decoder.")
    }
    if seen is not None:
        # A single layer of the decoder that is not used.
        whole = named_leaves(seen.read(1, dtype=dtype))
        read |= {name: leaf for name, leaf in whole.items() if name.startswith("vision.")}
    table = "decoder.embedding.table"
    read[table] = _grown(read[table], config.decoder.vocab_size, seed)
    structure = encoder.abstract(config, dtype)
    expected = named_leaves(structure)
    missing = {name for name, leaf in expected.items() if _shape(read.get(name)) != leaf.shape}
    # A merger whose last projection is new has nothing to keep: its first one led elsewhere.
    parts = {_part(name) for name in missing}
    new = {name for name in expected if _part(name) in parts}

    @jax.jit  # what is not used is not drawn
    def draw() -> dict[str, jax.Array]:
        leaves = named_leaves(encoder.init(config, jax.random.key(seed), dtype))
        return {name: leaves[name] for name in new}

    fresh = draw()
    leaves = {name: fresh[name] if name in new else read[name] for name in expected}
    return assemble(structure, leaves), sorted(parts) or ["none"]


def _part(name: str) -> str:
    """Return the part of the model that is new as a whole: the tower or a kind of merger."""
    return ".".join(name.split(".")[:2])


def _shape(leaf: jax.Array | None) -> tuple[int, ...] | None:
    return None if leaf is None else leaf.shape


def _grown(table: jax.Array, rows: int, seed: int) -> jax.Array:
    """Return a token table with more rows, drawn as its own are distributed in each column."""
    values: ndarray = np.asarray(table, np.float32)
    draws = np.random.default_rng(seed).normal(size=(rows - len(values), values.shape[1]))
    added = values.mean(0) + values.std(0) * draws
    return jnp.concatenate([table, jnp.asarray(added, table.dtype)])


if __name__ == "__main__":
    cli.run(main)
