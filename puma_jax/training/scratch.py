"""A base model from scratch: random weights, and a tokenizer trained on the training data."""

from __future__ import annotations

from pathlib import Path

import jax

from puma_jax.config import DecoderConfig, ImageConfig, ModelConfig, PromptConfig, VisionConfig
from puma_jax.data.vocabulary import train_tokenizer
from puma_jax.embedder import Embedder
from puma_jax.model import encoder
from puma_jax.training.config import ScratchConfig


def write_base(
    folder: Path,
    config: ScratchConfig,
    root: Path,
    images: ImageConfig,
    prompt: PromptConfig,
    seed: int,
) -> None:
    """Write a Hugging Face folder of a small Qwen2-VL with random float32 weights.

    Args:
        folder: Folder to write; it must not exist, or be empty.
        config: Sizes of the model and of its vocabulary.
        root: Benchmark in M-BEIR layout; the tokenizer is trained on its texts.
        images: Limits on image sizes.
        prompt: Prompt of the model.
        seed: Seed of the weights.

    Raises:
        ConfigError: The sizes do not fit together.
        DataError: The benchmark cannot be read.
    """
    tokenizer = train_tokenizer(root, config.vocab_size)
    head_dim = config.width // config.heads
    # Time, height and width rotate 2, 3 and 3 of every 8 frequencies, as in Qwen2-VL.
    space = 3 * head_dim // 16
    sections = (head_dim // 2 - 2 * space, space, space)
    ids = tokenizer.get_added_vocab()
    model = ModelConfig(
        family="qwen2_vl",
        vision=VisionConfig(
            layers=config.vision_layers,
            width=config.vision_width,
            heads=config.vision_heads,
            mlp_width=4 * config.vision_width,
            out_width=config.width,
        ),
        decoder=DecoderConfig(
            vocab_size=config.vocab_size,
            width=config.width,
            layers=config.layers,
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_dim=head_dim,
            mlp_width=config.mlp_width,
            mrope_section=sections,
        ),
        image_token_id=ids["<|image_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        images=images,
        prompt=prompt,
    )
    params = encoder.init(model, jax.random.key(seed))
    Embedder(model, params, tokenizer).save(folder)
