"""The config of a model: frozen, hashable dataclasses, so that `jax.jit` takes them as static."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from puma_jax.errors import ConfigError, LayerSelectionError
from puma_jax.schema import Count, CountOrZero, NotNegative, Positive, Range, check, shown

DType = Literal["float32", "bfloat16"]
Positions = Literal["mrope", "1d"]
Remat = Literal["none", "dots", "full"]
PromptStyle = Literal["chat", "bare", "instruct"]
Pooling = Literal["ret", "last", "mean"]
PoolMode = Literal["average", "random"]
LoraTarget = Literal["query", "key", "value", "out", "gate", "up", "down"]

# What no model exceeds: a wrong number in a config.json is refused before anything is sized by it.
Layers = Annotated[int, Range(1, 1024)]
Width = Annotated[int, Range(1, 2**20)]
VocabSize = Annotated[int, Range(1, 2**24)]
Side = Annotated[int, Range(1, 256)]
Pixels = Annotated[int, Range(1, 2**26)]

# Mean and deviation of CLIP's training images, which the Qwen2-VL tower inherits.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def require(holds: bool, message: str) -> None:
    """Raise a ConfigError with this message unless the condition holds."""
    if not holds:
        raise ConfigError(message)


def require_ascending(numbers: tuple[int, ...], name: str) -> None:
    """Raise a ConfigError unless each number is larger than the one before it."""
    require(
        sorted(set(numbers)) == list(numbers),
        f"{name} {list(numbers)} must be different numbers, the smallest first",
    )


def option(default: Any) -> Any:
    """Return a field that `repr` shows only where it differs from its default.

    Fingerprints of models are made of `repr`: they outlive the options that new families bring.
    """
    return dataclasses.field(default=default, metadata={"option": True})


class _WithOptions:
    """A dataclass whose `repr` leaves out options at their defaults."""

    def __repr__(self) -> str:
        """Return the fields as `dataclass` shows them, without options at their defaults."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        shown_fields = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in fields
            if field.repr
            and not (field.metadata.get("option") and getattr(self, field.name) == field.default)
        ]
        return f"{type(self).__name__}({', '.join(shown_fields)})"


@dataclass(frozen=True, repr=False)
class VisionConfig(_WithOptions):
    """The vision tower: a transformer over image patches, then the merger of patches."""

    layers: Annotated[int, Range(0, 1024)]
    """Transformer blocks; 0 means that there is no tower, and that the model reads texts only."""
    width: Width
    """Hidden size."""
    heads: Width
    """Attention heads."""
    mlp_width: Width
    """Hidden size of the MLP."""
    out_width: Width
    """Hidden size of the decoder, which the merger projects to."""
    channels: Literal[3] = 3
    """Color channels of an image."""
    patch_size: Side = 14
    """Side of a square patch, in pixels."""
    temporal_patch_size: Side = 2
    """Frames in a patch; a still image is repeated to fill them."""
    merge_size: Side = 2
    """Side of the square of patches that becomes one visual token."""
    norm_eps: Positive = 1e-6
    """Constant added to the variance in layer norms."""
    rope_base: Positive = 10_000.0
    """Base of the rotary frequencies."""
    image_mean: tuple[float, float, float] = CLIP_MEAN
    """Mean of each channel, subtracted from pixels in [0, 1]."""
    image_std: tuple[Positive, Positive, Positive] = CLIP_STD
    """Standard deviation of each channel, which divides them."""
    window_size: CountOrZero = option(0)
    """Side, in patches, of the windows that attention stays in; 0 means the whole image."""
    full_attention_blocks: tuple[CountOrZero, ...] = option(())
    """Blocks that attend to the whole image all the same."""
    position_table_side: Annotated[int, Range(0, 1024)] = option(0)
    """Side of the square table of learned positions; 0 means no table."""
    deepstack_blocks: tuple[CountOrZero, ...] = option(())
    """Blocks after which DeepStack takes features for the first layers of the decoder, in order."""
    # Not in the text that identifies a model: vectors of texts and images do not depend on these.
    tokens_per_second: NotNegative = dataclasses.field(default=0.0, repr=False)
    """Time positions for each second of a video; 0 advances by one from patch to patch."""
    timestamps: bool = dataclasses.field(default=False, repr=False)
    """Whether the time of each patch of a video is a text before it, in place of positions."""

    def __post_init__(self) -> None:
        """Check the fields, and that heads, rotary angles, windows and blocks come out even."""
        check(self, "vision")
        require(
            self.width % (4 * self.heads) == 0,
            f"vision.width {self.width} must be a multiple of 4 × vision.heads {self.heads}",
        )
        require(
            self.window_size % self.merge_size == 0,
            f"vision.window_size {self.window_size} must be a multiple of merge_size "
            f"{self.merge_size}",
        )
        for name in ("full_attention_blocks", "deepstack_blocks"):
            blocks = getattr(self, name)
            require(
                all(block < self.layers for block in blocks) and len({*blocks}) == len(blocks),
                f"vision.{name} {blocks} must name blocks below vision.layers {self.layers}, each "
                "once",
            )

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
        """Patches that the tower merges into one visual token."""
        return self.merge_size**2

    @classmethod
    def none(cls, out_width: int) -> VisionConfig:
        """Return the config of no tower, for a decoder of this width."""
        return cls(layers=0, width=4, heads=1, mlp_width=1, out_width=out_width)


@dataclass(frozen=True, repr=False)
class DecoderConfig(_WithOptions):
    """The language model."""

    vocab_size: VocabSize
    """Rows of the token embedding."""
    width: Width
    """Hidden size."""
    layers: Layers
    """Layers kept, however many the base model has."""
    heads: Width
    """Attention heads."""
    kv_heads: Width
    """Heads of keys and values."""
    head_dim: Width
    """Size of one head."""
    mlp_width: Width
    """Hidden size of the MLP."""
    norm_eps: Positive = 1e-6
    """Constant added to the mean square in RMS norms."""
    rope_base: Positive = 1_000_000.0
    """Base of the rotary frequencies."""
    mrope_section: tuple[CountOrZero, CountOrZero, CountOrZero] = (16, 24, 24)
    """Split of the `head_dim / 2` rotary frequencies into those of time, height and width. All of
    them in time is plain RoPE of one dimension."""
    mrope_interleaved: bool = option(False)
    """Whether time, height and width take turns along the frequencies, as in Qwen3-VL; otherwise
    each has a section of its own."""
    qkv_bias: bool = option(True)
    """Whether the query, key and value projections have a bias."""
    qk_norm: bool = option(False)
    """Whether each head of queries and keys is RMS-normalized before it is rotated."""
    causal: bool = option(True)
    """Whether a token attends only to itself and the tokens before it; otherwise it attends to all
    of its item, as embedders with mean pooling often do."""

    def __post_init__(self) -> None:
        """Check the fields, and what the arithmetic relies on."""
        check(self, "decoder")
        require(
            self.heads % self.kv_heads == 0,
            f"decoder.heads {self.heads} is not a multiple of kv_heads {self.kv_heads}",
        )
        require(
            2 * sum(self.mrope_section) == self.head_dim,
            f"decoder.mrope_section {self.mrope_section} must sum to half of head_dim "
            f"{self.head_dim}",
        )


@dataclass(frozen=True, repr=False)
class ImageConfig(_WithOptions):
    """The size of a resized image, and how many visual tokens it becomes.

    The limits on its size are those of arXiv 2507.08064: 4·28² to 300·28² pixels.
    """

    min_pixels: Pixels = 4 * 28**2
    """Area in pixels that smaller images are enlarged to."""
    max_pixels: Pixels = 300 * 28**2
    """Area in pixels that larger images are reduced to."""
    spatial_pool_stride: Literal[1, 2] = option(1)
    """Side of the squares of visual tokens that become one each behind the tower: 2 leaves a
    quarter of them (arXiv 2602.05275), 1 leaves all."""
    spatial_pool_mode: PoolMode = option("average")
    """One token in place of a square: "average", their mean; "random", one of them, drawn by the
    content of the image, a control that the mean has to beat."""

    def __post_init__(self) -> None:
        """Check the fields."""
        check(self, "images")
        require(
            self.min_pixels <= self.max_pixels,
            f"images.min_pixels {self.min_pixels} is above images.max_pixels {self.max_pixels}",
        )
        require(
            self.spatial_pool_stride > 1 or self.spatial_pool_mode == "average",
            f'images.spatial_pool_mode "{self.spatial_pool_mode}" needs '
            "images.spatial_pool_stride 2: with 1, nothing is pooled",
        )

    def token_side(self, vision: VisionConfig) -> int:
        """Return the side, in pixels, of the square that becomes one visual token."""
        return vision.patch_size * vision.merge_size * self.spatial_pool_stride


@dataclass(frozen=True, repr=False)
class PromptConfig(_WithOptions):
    """How an item becomes a sequence of tokens, and which of their states is its embedding."""

    ret_token: str = "[RET]"
    """Special token that ends every item with pooling "ret"; other poolings have none."""
    max_text_tokens: Annotated[int, Range(1, 2**20)] = 450
    """Tokens of text to keep; longer texts are truncated. The prompt's own tokens do not count."""
    positions: Positions = "mrope"
    """Position ids: "mrope" in time, height and width, as serving engines compute them; "1d" in one
    dimension, as the released PUMA code trained with."""
    template: PromptStyle = "chat"
    """Prompt around an item: "chat" asks for a summary in one word in the chat turns that the base
    model was tuned on; "bare" adds nothing, for small models trained from scratch; "instruct" is
    that of Qwen3-VL-Embedding, a system turn that is the instruction and a user turn that is the
    item as it came."""
    pooling: Pooling = option("ret")
    """State that is the embedding: "ret", that of `ret_token` at the end; "last", that of the
    prompt's last token; "mean", the mean over all tokens of the item and its prompt."""

    def __post_init__(self) -> None:
        """Check the fields."""
        check(self, "prompt")
        require(
            self.ret_token.strip() == self.ret_token != "" and self.ret_token.isprintable(),
            f"prompt.ret_token {shown(self.ret_token)} must be printable, without spaces around it",
        )


@dataclass(frozen=True)
class ModelConfig:
    """A whole model: its family, vision tower, decoder, and input format."""

    family: str
    """Name of a family in `puma_jax.model.families`."""
    vision: VisionConfig
    decoder: DecoderConfig
    image_token_id: CountOrZero
    """Token that stands for one visual token."""
    vision_start_token_id: CountOrZero
    """Token before the visual tokens of an image."""
    vision_end_token_id: CountOrZero
    """Token after the visual tokens of an image."""
    images: ImageConfig = ImageConfig()
    prompt: PromptConfig = PromptConfig()
    kept_layers: tuple[CountOrZero, ...] = ()
    """Indices, in the base model, of the decoder layers kept; empty means all of them."""
    # Not in the text that identifies a model: its vectors do not depend on it.
    widths: tuple[Count, ...] = dataclasses.field(default=(), repr=False)
    """Widths, besides the whole one, that the model was trained for; ascending."""
    exit_layers: tuple[Count, ...] = dataclasses.field(default=(), repr=False)
    """Numbers of first layers, besides all of them, that the model was trained for; ascending."""

    def __post_init__(self) -> None:
        """Fill in `kept_layers` if it is empty, and check that the parts fit together."""
        if not self.kept_layers:
            object.__setattr__(self, "kept_layers", tuple(range(self.decoder.layers)))
        check(self)
        decoder, vision = self.decoder, self.vision
        require(
            len(self.kept_layers) == decoder.layers,
            f"kept_layers names {len(self.kept_layers)} layers, decoder.layers is {decoder.layers}",
        )
        require(
            vision.out_width == decoder.width,
            f"vision.out_width {vision.out_width} is not decoder.width {decoder.width}",
        )
        require_ascending(self.widths, "widths")
        require(
            max(self.widths, default=0) < decoder.width,
            f"widths {list(self.widths)} must be below the {decoder.width} values of a vector",
        )
        require_ascending(self.exit_layers, "exit_layers")
        require(
            max(self.exit_layers, default=0) < decoder.layers,
            f"exit_layers {list(self.exit_layers)} must be below the {decoder.layers} layers of "
            "the decoder",
        )
        for name in ("image_token_id", "vision_start_token_id", "vision_end_token_id"):
            require(
                getattr(self, name) < decoder.vocab_size,
                f"{name} {getattr(self, name)} is beyond the {decoder.vocab_size} rows of the "
                "token table",
            )
        self._check_deepstack()

    @property
    def patches_per_token(self) -> int:
        """Patches in one visual token of the decoder, merged by the tower and pooled."""
        return self.vision.merged * self.images.spatial_pool_stride**2

    def _check_deepstack(self) -> None:
        """Check that each layer that DeepStack feeds, if it is kept, is where it was.

        transformers adds the features after the layers at the first places, whichever they are.
        """
        fed = tuple(range(len(self.vision.deepstack_blocks)))[: len(self.kept_layers)]
        if self.kept_layers[: len(fed)] != fed:
            raise LayerSelectionError(
                f"layers {', '.join(map(str, self.kept_layers))} of the base model do not begin "
                f"with {', '.join(map(str, fed))}, after which this model adds features of images "
                "(DeepStack): keep these first, in order"
            )

    def with_layers(self, kept: tuple[int, ...]) -> ModelConfig:
        """Return the config of the same model with only these base layers.

        Of `exit_layers`, those remain whose layers are still the first ones.

        Raises:
            LayerSelectionError: DeepStack adds features after layers that are not kept in place.
        """
        decoder = dataclasses.replace(self.decoder, layers=len(kept))
        exits = tuple(
            exit_layer
            for exit_layer in self.exit_layers
            if exit_layer < len(kept) and kept[:exit_layer] == self.kept_layers[:exit_layer]
        )
        return dataclasses.replace(self, decoder=decoder, kept_layers=kept, exit_layers=exits)

    def trained_for(self, kept: tuple[int, ...]) -> bool:
        """Return whether the model was trained with these base layers alone, as far as it says.

        A model that was trained for one depth says nothing about others.
        """
        if not self.exit_layers:
            return True
        depths = (*self.exit_layers, len(self.kept_layers))
        return len(kept) in depths and kept == self.kept_layers[: len(kept)]


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on the linears of the decoder (arXiv 2106.09685)."""

    rank: Width = 128
    """Rank of the adapters."""
    alpha: Positive = 256.0
    """Scale of the adapters, whose output is multiplied by alpha / rank."""
    dropout: Annotated[float, Range(0, 1, open_high=True)] = 0.0
    """Probability that an input of an adapter is dropped in training."""
    targets: tuple[LoraTarget, ...] = ("query", "key", "value", "out", "gate", "up", "down")
    """Linears of the decoder that get adapters."""

    def __post_init__(self) -> None:
        """Check the fields."""
        check(self, "lora")
        require(bool(self.targets), "lora.targets is empty: name at least one linear")


@dataclass(frozen=True)
class ComputeConfig:
    """How a forward pass runs; it is not part of a saved model."""

    dtype: DType = "bfloat16"
    """Dtype of the activations. Norms, softmax, rotary angles and the result are always float32."""
    attention: str = "auto"
    """Attention implementation: "xla", "splash" (TPUs), "mosaic", "triton", "cudnn" (NVIDIA GPUs);
    "auto" takes the fastest that this machine runs, and a line at the start says which and why."""
    remat: Remat = "none"
    """Recomputation of each layer in the backward pass: "none", "dots" (all but matrix products),
    or "full"."""

    def __post_init__(self) -> None:
        """Check the fields."""
        check(self, "compute")


@dataclass(frozen=True)
class PlanConfig:
    """The pairs that make up the batch of each step."""

    seed: CountOrZero = 0
    """Seed of the order of pairs, and of the choice of positives, negatives and instructions."""
    batch_size: Count = 600
    """Pairs in the global batch (arXiv 2507.08064: 600 in stage 2)."""
    mixture_weights: tuple[tuple[str, Positive], ...] = ()
    """Names of sets, each with its weight in the mixture; empty samples all pairs equally."""
    homogeneous_batches: bool = False
    """Fill each batch from one set, in place of a mixture of all sets."""
    instructions: bool = True
    """Put an instruction for the query's task before each query."""
    hard_negatives: Annotated[int, Range(0, 1024)] = 0
    """Hard negatives drawn for each query from its neg_cand_list; they are negatives of all queries
    of the batch. A query that has fewer takes those it has."""
    balance_window: Count = 32
    """Steps over which long and short items are spread, so that all batches are of similar size."""

    def __post_init__(self) -> None:
        """Check the fields."""
        check(self, "plan")
        require(
            not (self.mixture_weights and self.homogeneous_batches),
            "plan.mixture_weights and plan.homogeneous_batches exclude each other: batches of one "
            "set come in proportion to the sizes of the sets",
        )
