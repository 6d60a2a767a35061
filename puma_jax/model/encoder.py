"""The whole model, from packed rows to one vector per item, and layer pruning (`keep_layers`)."""

from __future__ import annotations

import contextlib
import functools
import operator
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from puma_jax.config import ComputeConfig, ModelConfig
from puma_jax.errors import LayerSelectionError
from puma_jax.model.decoder import Decoder, DecoderLayer, Exits
from puma_jax.model.dropout import TokenKeys
from puma_jax.model.families import family_of
from puma_jax.model.vision import pool_tokens
from puma_jax.rows import PackedBatch
from puma_jax.typing import Array, Float, Int, PRNGKeyArray

VisualTokens = tuple[Float[Array, "patch_rows visual width"], ...]
"""What a vision tower computes of rows of patches: visual tokens, and features for later layers."""

# A range of layers that goes further is a typing error, and would take memory as it is listed.
_MOST_LAYERS = 1024


class UntrainedDepthWarning(UserWarning):
    """A model is pruned to layers that it was not trained to do with alone."""


class Encoder(nnx.Module):
    """A vision tower, if the model reads images, and a decoder.

    The module is a pytree: its leaves are the parameters.
    """

    vision: Any

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        tower = family_of(config.family).tower
        self.vision = tower(config.vision, rngs) if tower else None
        self.spatial_pool = config.images.spatial_pool_stride, config.images.spatial_pool_mode
        self.mean_pooling = config.prompt.pooling == "mean"
        self.decoder = Decoder(config.decoder, rngs)


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def init(config: ModelConfig, key: PRNGKeyArray, dtype: str = "float32") -> Encoder:
    """Return a model with random weights of the given dtype."""
    params = Encoder(config, nnx.Rngs(key))
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def abstract(config: ModelConfig, dtype: str = "float32") -> Encoder:
    """Return the model with `jax.ShapeDtypeStruct` leaves, without computing any weights."""
    return jax.eval_shape(lambda: init(config, jax.random.key(0), dtype))


def encode(
    params: Encoder,
    rows: PackedBatch,
    compute: ComputeConfig,
    *,
    data_shards: int = 1,
    dropout_keys: TokenKeys | None = None,
    stacks: Sequence[DecoderLayer] | None = None,
    visual: VisualTokens | None = None,
) -> Float[Array, "slots width"]:
    """Return the state of each item after the final norm, float32 and not normalized.

    It is that of the item's last token, or the mean over the item's tokens in models that pool so.

    Args:
        params: The model.
        rows: The packed items.
        compute: How to run.
        data_shards: Number of parts that the leading axes of `rows` divide into.
        dropout_keys: Keys of LoRA dropout, from `dropout.token_keys`; None drops nothing.
        stacks: Layers to run one stack after the other, in place of the decoder's own.
        visual: Output of `visual_tokens` for these rows; None computes it.
    """
    with _precision(compute):
        x, features = input_embeddings(params, rows, compute, visual, data_shards=data_shards)
        for layers in stacks or [params.decoder.layers]:
            x, _ = params.decoder(
                x, rows.segment_ids, rows.positions, compute, dropout_keys, layers, features
            )
            depth = layers.attention_norm.scale.shape[0]
            if features is not None:
                features = features[depth:] if depth < len(features) else None
        return _finish(params, _pool(params, x, rows, data_shards))


def encode_exits(
    params: Encoder,
    rows: PackedBatch,
    compute: ComputeConfig,
    exit_layers: Sequence[int],
    *,
    data_shards: int = 1,
    dropout_keys: TokenKeys | None = None,
    visual: VisualTokens | None = None,
) -> Float[Array, "exits slots width"]:
    """Return the states of each item after some numbers of layers, and last after all of them.

    Those after n layers are what `encode` returns with the model that `keep_layers(n)` leaves. All
    come from one forward pass; see `encode` for the other arguments.

    Args:
        params: The model.
        rows: The packed items.
        compute: How to run.
        exit_layers: Numbers of layers, each at least 1 and less than the model has, ascending.
        data_shards: Number of parts that the leading axes of `rows` divide into.
        dropout_keys: Keys of LoRA dropout.
        visual: Output of `visual_tokens` for these rows; None computes it.
    """
    pool = functools.partial(_pool, params, rows=rows, data_shards=data_shards)
    with _precision(compute):
        x, features = input_embeddings(params, rows, compute, visual, data_shards=data_shards)
        x, pooled = params.decoder(
            x,
            rows.segment_ids,
            rows.positions,
            compute,
            dropout_keys,
            features=features,
            exits=Exits(tuple(exit_layers), pool),
        )
        assert pooled is not None  # there are exits
        return _finish(params, jnp.concatenate([pooled, pool(x)[None]]))


def _precision(compute: ComputeConfig) -> contextlib.AbstractContextManager[None]:
    """Return a context in which products have the precision that the dtype says.

    "float32" has to mean it on accelerators too, whose default product rounds to fewer bits.
    """
    return jax.default_matmul_precision("highest" if compute.dtype == "float32" else None)


def _pool(
    params: Encoder, x: Float[Array, "rows length width"], rows: PackedBatch, data_shards: int
) -> Float[Array, "slots width"]:
    """Return the pooled state of each item: normed already if it is a mean over tokens."""
    if params.mean_pooling:
        return _means(params.decoder.norm(x.astype(jnp.float32)), rows, data_shards)
    return _take(x, rows.pool_index, data_shards)


def _finish(
    params: Encoder, pooled: Float[Array, "*exits slots width"]
) -> Float[Array, "*exits slots width"]:
    """Return pooled states after the final norm, float32."""
    return pooled if params.mean_pooling else params.decoder.norm(pooled.astype(jnp.float32))


def visual_tokens(params: Encoder, rows: PackedBatch, compute: ComputeConfig) -> VisualTokens:
    """Return what the vision tower computes: visual tokens, and features for later layers.

    Each is `[rows of patches, visual tokens, width]`; there are none without images.
    """
    if params.vision is None or rows.patches.size == 0:
        return ()
    with _precision(compute):
        values = params.vision(rows.patches, rows.patch_segment_ids, rows.patch_positions, compute)
        return tuple(pool_tokens(tokens, *params.spatial_pool) for tokens in values)


def input_embeddings(
    params: Encoder,
    rows: PackedBatch,
    compute: ComputeConfig,
    visual: VisualTokens | None = None,
    *,
    data_shards: int = 1,
) -> tuple[Float[Array, "rows length width"], Float[Array, "features rows length width"] | None]:
    """Return the decoder's inputs, and what it adds after its first layers (None if nothing).

    The inputs are token embeddings, with visual tokens at their placeholders. The features that a
    tower has for later layers (DeepStack, arXiv 2406.04334) are zero everywhere else.
    """
    x = params.decoder.embedding.table[...][rows.tokens].astype(compute.dtype)
    if visual is None:
        visual = visual_tokens(params, rows, compute)
    if not visual:
        return x, None
    index = jnp.maximum(rows.image_token_index, 0).reshape(-1)
    inputs, *features = (
        jnp.where(
            rows.image_token_index[..., None] >= 0,
            _take(values, index, data_shards).reshape(x.shape),
            elsewhere,
        )
        for values, elsewhere in zip(visual, [x] + [0] * (len(visual) - 1), strict=True)
    )
    return inputs, jnp.stack(features) if features else None


def _means(
    states: Float[Array, "rows length width"], rows: PackedBatch, data_shards: int
) -> Float[Array, "slots width"]:
    """Return the mean state of each item. Its tokens need not lie side by side in the row."""

    def of_shard(states: Array, segment_ids: Array, pool_index: Array) -> Array:
        # Ids are unique within a row and at most its length.
        count, length = segment_ids.shape
        number = (jnp.arange(count)[:, None] * (length + 1) + segment_ids).reshape(-1)
        item = number[pool_index]
        states = states.reshape(-1, states.shape[-1])
        sums = jnp.zeros((count * (length + 1), states.shape[-1])).at[number].add(states)
        tokens = jnp.zeros(count * (length + 1)).at[number].add(1)
        return sums[item] / tokens[item][:, None]

    split = (
        values.reshape(data_shards, -1, *values.shape[1:])
        for values in (states, rows.segment_ids, rows.pool_index)
    )
    return jax.vmap(of_shard)(*split).reshape(-1, states.shape[-1])


def l2_normalize(states: Float[Array, "n width"]) -> Float[Array, "n width"]:
    """Return every state scaled to unit length, float32. A zero state stays zero."""
    states = states.astype(jnp.float32)
    norm = jnp.sqrt(jnp.sum(states**2, -1, keepdims=True))
    return states / jnp.maximum(norm, 1e-12)


def keep_layers(
    config: ModelConfig, params: Encoder, keep: int | Sequence[int]
) -> tuple[ModelConfig, Encoder]:
    """Return a model with only some of the decoder layers: one array slice per stacked leaf.

    The final norm, the token table and the vision tower stay as they are, so the result is an
    ordinary model of fewer layers (arXiv 2507.08064, section 3.2).

    Args:
        config: Configuration of the model.
        params: The model.
        keep: A count, for the first layers, or indices in the order to run them; negative
            indices count from the end, so `[*range(11), -1]` keeps the last layer in the last slot.

    Raises:
        LayerSelectionError: `keep` is empty, repeats a layer or names one the model lacks.
    """
    chosen = layer_indices(keep, config.decoder.layers)
    # A shallow copy: the caller's model keeps its layers, the other leaves are shared.
    pruned = jax.tree.map(lambda leaf: leaf, params)
    pruned.decoder.layers = jax.tree.map(lambda leaf: leaf[np.array(chosen)], params.decoder.layers)
    return config.with_layers(tuple(config.kept_layers[index] for index in chosen)), pruned


def warn_if_untrained(config: ModelConfig, kept: tuple[int, ...]) -> None:
    """Warn if a model was trained for some depths, and these base layers are none of them."""
    if config.trained_for(kept):
        return
    depths = ", ".join(map(str, (*config.exit_layers, config.decoder.layers)))
    warnings.warn(
        f"the model was trained for its first {depths} layers, not for layers "
        f"{', '.join(map(str, kept))} of its base model alone",
        UntrainedDepthWarning,
        stacklevel=3,
    )


def layer_indices(keep: int | Sequence[int], layers: int) -> tuple[int, ...]:
    """Return the indices, all ≥ 0, that `keep` selects in a model with `layers` layers.

    Raises:
        LayerSelectionError: See `keep_layers`.
    """
    try:
        count = operator.index(keep)  # type: ignore[arg-type]
    except TypeError:
        chosen = [operator.index(index) for index in keep]  # type: ignore[union-attr]
    else:
        if not 1 <= count <= layers:
            raise LayerSelectionError(
                f"keep_layers {count} is out of range: the model has {layers} layers"
            )
        return tuple(range(count))
    if not chosen:
        raise LayerSelectionError("keep_layers is empty: name at least one layer")
    for index in chosen:
        if not -layers <= index < layers:
            raise LayerSelectionError(
                f"keep_layers names layer {index}: the model has layers 0 to {layers - 1}"
            )
    chosen = [index % layers for index in chosen]
    for index in chosen:
        if chosen.count(index) > 1:
            raise LayerSelectionError(f"keep_layers names layer {index} more than once")
    return tuple(chosen)


def parse_layers(text: str) -> int | list[int]:
    """Return the layers to keep that a text names: a count or a list of indices.

    >>> parse_layers("12")
    12
    >>> parse_layers("0-3,27")
    [0, 1, 2, 3, 27]

    Raises:
        LayerSelectionError: The text is neither.
    """
    try:
        if "," not in text and "-" not in text:
            return int(text)
        layers: list[int] = []
        for part in text.split(","):
            first, _, last = part.partition("-")
            if part.strip():
                start, end = int(first), int(last or first)
                if not start <= end < _MOST_LAYERS:
                    raise ValueError
                layers += range(start, end + 1)
        return layers
    except ValueError:
        raise LayerSelectionError(
            f'keep_layers "{text}" is neither a number nor indices such as 0-10,27'
        ) from None


def _take(
    values: Float[Array, "rows length width"], index: Int[Array, "n"], data_shards: int
) -> Float[Array, "n width"]:
    """Return `values[shard, index]`, each shard gathering from its own part."""
    width = values.shape[-1]
    taken = jnp.take_along_axis(
        values.reshape(data_shards, -1, width), index.reshape(data_shards, -1, 1), axis=1
    )
    return taken.reshape(-1, width)
