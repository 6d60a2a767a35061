"""A base model from scratch: random weights, and a tokenizer trained on the training data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import jax

from puma_jax.config import DecoderConfig, ImageConfig, ModelConfig, PromptConfig, VisionConfig
from puma_jax.data.lines import OnBadRecord
from puma_jax.data.vocabulary import train_tokenizer
from puma_jax.embedder import Embedder
from puma_jax.model import encoder
from puma_jax.training.config import ScratchConfig


def write_base(
    folder: Path,
    config: ScratchConfig,
    root: Path,
    images: ImageConfig | None,
    prompt: PromptConfig | None,
    seed: int,
    on_bad_record: OnBadRecord = "error",
) -> None:
    """Write a Hugging Face folder of a small Qwen2-VL with random float32 weights.

    Args:
        folder: Folder to write; it must not exist, or be empty.
        config: Sizes of the model and of its vocabulary.
        root: Benchmark in M-BEIR layout; the tokenizer is trained on its texts.
        images: Limits on image sizes; None for the defaults.
        prompt: Prompt of the model; None for the default.
        seed: Seed of the weights.
        on_bad_record: "error" stops at a bad record of the benchmark, "skip" leaves it out.

    Raises:
        ConfigError: The sizes do not fit together.
        DataError: The benchmark cannot be read.
    """
    tokenizer = train_tokenizer(root, config.vocab_size, on_bad_record)
    model = model_config(config, images, prompt, tokenizer.get_added_vocab())
    Embedder(model, encoder.init(model, jax.random.key(seed)), tokenizer).save(folder)


def model_config(
    config: ScratchConfig,
    images: ImageConfig | None,
    prompt: PromptConfig | None,
    ids: Mapping[str, int] | None = None,
) -> ModelConfig:
    """Return the config of a model from scratch.

    Args:
        config: Sizes of the model and of its vocabulary.
        images: Limits on image sizes; None for the defaults.
        prompt: Prompt of the model; None for the default.
        ids: Ids of special tokens by their text; None where only sizes matter.

    Raises:
        ConfigError: The sizes do not fit together.
    """
    head_dim = config.width // config.heads
    # Time, height and width rotate 2, 3 and 3 of every 8 frequencies, as in Qwen2-VL.
    space = 3 * head_dim // 16
    sections = (head_dim // 2 - 2 * space, space, space)
    image, start, end = (
        ids[f"<|{name}|>"] if ids else number
        for number, name in enumerate(("image_pad", "vision_start", "vision_end"))
    )
    return ModelConfig(
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
        image_token_id=image,
        vision_start_token_id=start,
        vision_end_token_id=end,
        images=images or ImageConfig(),
        prompt=prompt or PromptConfig(),
    )
