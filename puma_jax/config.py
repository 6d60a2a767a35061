"""Every knob of a model: frozen dataclasses, hashable, so that they can be static to `jax.jit`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, get_args

from puma_jax.errors import ConfigError

DType = Literal["float32", "bfloat16"]
Positions = Literal["mrope", "1d"]
Remat = Literal["none", "dots", "full"]
PromptTemplate = Literal["chat", "bare"]

# Mean and deviation of CLIP's training images, which the Qwen2-VL tower inherits.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def require(holds: bool, message: str) -> None:
    """Raise a ConfigError with this message unless the condition holds."""
    if not holds:
        raise ConfigError(message)


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower: a transformer over image patches and the merger behind it."""

    layers: int
    width: int
    heads: int
    mlp_width: int
    out_width: int
    """Width of the decoder that the merged patches are handed to."""
    channels: int = 3
    patch_size: int = 14
    """Side of a square patch, in pixels."""
    temporal_patch_size: int = 2
    """Frames in a patch; a still image is repeated to fill them."""
    merge_size: int = 2
    """`merge_size`² neighbouring patches become one visual token."""
    norm_eps: float = 1e-6
    rope_base: float = 10_000.0
    image_mean: tuple[float, ...] = CLIP_MEAN
    image_std: tuple[float, ...] = CLIP_STD

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads

    @property
    def patch_values(self) -> int:
        """uint8 values of one patch of a still image: channels × side²."""
        return self.channels * self.patch_size**2

    @property
    def merged(self) -> int:
        """Patches in one visual token."""
        return self.merge_size**2


@dataclass(frozen=True)
class DecoderConfig:
    """The language model: `layers` is the number kept, whatever the base model had."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    norm_eps: float = 1e-6
    rope_base: float = 1_000_000.0
    mrope_section: tuple[int, int, int] = (16, 24, 24)
    """How many of the `head_dim / 2` frequencies turn with time, height and width."""


@dataclass(frozen=True)
class ImageConfig:
    """Limits on the size of a resized image, in pixels (arXiv 2507.08064: 4·28² to 300·28²)."""

    min_pixels: int = 4 * 28**2
    max_pixels: int = 300 * 28**2


@dataclass(frozen=True)
class PromptConfig:
    """How an item becomes a sequence of tokens that ends at [RET]."""

    ret_token: str = "[RET]"
    max_text_tokens: int = 450
    """Text is cut at this many tokens, before the sentence that asks for one word."""
    positions: Positions = "mrope"
    """"mrope" is what serving engines compute; "1d" is what the released PUMA code trained with."""
    template: PromptTemplate = "chat"
    """"chat" asks for one word in the turns that the base model was tuned on; "bare" reads the item
    alone: for small models trained from nothing, to whom these turns are only more tokens."""

    def __post_init__(self) -> None:
        """Check what would otherwise fail far from here."""
        known = get_args(PromptTemplate)
        require(
            self.template in known,
            f'prompt.template "{self.template}" is not one of {", ".join(known)}',
        )


@dataclass(frozen=True)
class ModelConfig:
    """A whole model: which family, its two halves, and how items are fed to it."""

    family: str
    vision: VisionConfig
    decoder: DecoderConfig
    image_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    images: ImageConfig = ImageConfig()
    prompt: PromptConfig = PromptConfig()
    kept_layers: tuple[int, ...] = ()
    """Indices, in the uncut base model, of the decoder layers held here."""

    def __post_init__(self) -> None:
        """Fill `kept_layers` for an uncut model and check what the arithmetic relies on."""
        if not self.kept_layers:
            object.__setattr__(self, "kept_layers", tuple(range(self.decoder.layers)))
        decoder, vision = self.decoder, self.vision
        require(
            len(self.kept_layers) == decoder.layers,
            f"kept_layers names {len(self.kept_layers)} layers, decoder.layers is {decoder.layers}",
        )
        require(
            decoder.heads % decoder.kv_heads == 0,
            f"decoder.heads {decoder.heads} is not a multiple of kv_heads {decoder.kv_heads}",
        )
        require(
            2 * sum(decoder.mrope_section) == decoder.head_dim,
            f"mrope_section {decoder.mrope_section} must sum to half of head_dim "
            f"{decoder.head_dim}",
        )
        require(
            vision.width % (4 * vision.heads) == 0,
            f"vision.width {vision.width} must be a multiple of 4 × vision.heads {vision.heads}",
        )
        require(
            vision.out_width == decoder.width,
            f"vision.out_width {vision.out_width} is not decoder.width {decoder.width}",
        )

    def with_layers(self, kept: tuple[int, ...]) -> ModelConfig:
        """Return the config of the same model with only these base layers."""
        decoder = dataclasses.replace(self.decoder, layers=len(kept))
        return dataclasses.replace(self, decoder=decoder, kept_layers=kept)


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on the linears of the decoder (arXiv 2106.09685)."""

    rank: int = 128
    alpha: float = 256.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("query", "key", "value", "out", "gate", "up", "down")

    def __post_init__(self) -> None:
        """Check the ranges that would otherwise fail far from here."""
        require(self.rank >= 1, f"lora rank {self.rank} must be at least 1")
        require(0 <= self.dropout < 1, f"lora dropout {self.dropout} must be in [0, 1)")


@dataclass(frozen=True)
class ComputeConfig:
    """How a forward pass is run; never part of what a checkpoint means."""

    dtype: DType = "bfloat16"
    """Of the activations. Norms, softmax, rope angles and the result are float32 always."""
    attention: str = "auto"
    """An implementation named in `puma_jax.model.attention.IMPLEMENTATIONS`, or "auto": "splash" on
    TPUs for rows that it takes, "xla" for all others."""
    remat: Remat = "none"
    """What the backward pass recomputes in each layer: nothing, all but matmuls, everything."""


@dataclass(frozen=True)
class PlanConfig:
    """Which pairs make up the batch of each step."""

    seed: int = 0
    batch: int = 600
    """Pairs in the global batch (arXiv 2507.08064: 600 in stage 2)."""
    weights: tuple[tuple[str, float], ...] = ()
    """Name of a set and its share of all pairs; empty gives every pair the same chance."""
    one_set_per_batch: bool = False
    """Fill a batch from one set only, in place of mixing all of them."""
    instructions: bool = True
    """Put one of the instructions of its kind before each query."""
    window: int = 32
    """Steps over which long and short items are dealt out evenly."""

    def __post_init__(self) -> None:
        """Check the ranges that would otherwise fail far from here."""
        require(self.batch >= 1, f"plan.batch {self.batch} must be at least 1")
        require(self.window >= 1, f"plan.window {self.window} must be at least 1")
        require(
            not (self.weights and self.one_set_per_batch),
            "plan.weights and plan.one_set_per_batch exclude each other: batches of one set come "
            "in proportion to the sizes of the sets",
        )
