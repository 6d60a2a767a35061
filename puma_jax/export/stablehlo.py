"""A folder that embeds with jax, safetensors and tokenizers, and without puma_jax.

    embed.jax            the function, StableHLO as `jax.export` writes it, one for all platforms
    weights.safetensors  its first argument
    tokenizer.json       text to tokens
    manifest.json        shapes, limits, what ends a text, digests of the other files
    load.py              puts them together: `from load import Embedder`

Batch, text length and image size are symbolic: one function serves all. What follows from the
tokens of a text and the size of an image (the prompt around them, segments, positions, where visual
tokens go) is computed inside it, so that loaders stay small.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from puma_jax.config import ModelConfig, require
from puma_jax.data.images import MOST_ELONGATED
from puma_jax.data.items import Template
from puma_jax.data.prompts import WORDINGS, Prompter
from puma_jax.embedder import Embedder
from puma_jax.files import save_tensors, sha256, write_json
from puma_jax.model import encoder
from puma_jax.model.tree import assemble, named_leaves
from puma_jax.rows import Rows
from puma_jax.typing import Array, Int, UInt8

FORMAT_VERSION = 1
PLATFORMS = ("cpu", "cuda", "tpu")

# Texts and images are padded to these numbers of tokens, or to their largest. More of them would
# mean less padding and more programs to compile. 1 is for no image, 3 also the length of `sizes`.
_LENGTHS = (1, *(3 << doubled for doubled in range(18)))


def write(embedder: Embedder, folder: Path) -> None:
    """Write the artifact. It computes in the dtype that the embedder computes in.

    Args:
        embedder: The model. Host memory holds its weights once, besides what devices hold.
        folder: Exists and is empty.

    Raises:
        ConfigError: The package that `jax.export` writes with is not installed.
    """
    require(
        importlib.util.find_spec("flatbuffers") is not None,
        "jax.export writes with flatbuffers, which is not installed: "
        "pip install 'puma-jax[export]'",
    )
    template = Prompter(embedder.tokenizer, embedder.config).template
    exported = _export(embedder, template)
    (folder / "embed.jax").write_bytes(exported.serialize())
    leaves = named_leaves(embedder.params)
    weights = {name: np.ascontiguousarray(leaf) for name, leaf in leaves.items()}
    save_tensors(weights, folder / "weights.safetensors")
    # The function puts the prompt around a text, and the loader refuses what is too long.
    tokenizer = json.loads(embedder.tokenizer.backend_tokenizer.to_str())
    tokenizer |= dict.fromkeys(("post_processor", "truncation", "padding"))
    write_json(folder / "tokenizer.json", tokenizer)
    shutil.copyfile(Path(__file__).with_name("loader.py"), folder / "load.py")
    manifest = _manifest(embedder, template, exported)
    digests = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    write_json(folder / "manifest.json", manifest | {"sha256": digests})


def one_item_rows(
    template: Template,
    tokens: Int[Array, "rows words"],
    blocks: UInt8[Array, "rows visual side side channels"],
    sizes: Int[Array, "rows 3"],
) -> Rows:
    """Return rows that hold one item each: what `data.items` and `data.packing` make on the host.

    Padding stays where it came in, behind image and text: it is in a segment of its own, and the
    positions of what follows do not count it. Every row ends with the [RET] of its item.

    Args:
        template: Surrounds the items, and knows the config of the model.
        tokens: A text and the sentence that asks for one word, then padding of any kind.
        blocks: The pixels of each visual token of an image, row by row; then padding.
        sizes: How many tokens, rows of blocks and columns of blocks an item has; 0 without image.
    """
    config, merge = template.config, template.config.vision.merge_size
    rows, visual = blocks.shape[:2]
    start, end = (jnp.array(ids, jnp.int32) for ids in (template.start, template.end))
    widths = (len(start), 1, visual, 1, tokens.shape[1], len(end))

    def joined(*parts: Any) -> Array:
        """Return rows of what start, image (between its marks), text and end have."""
        filled = [
            jnp.broadcast_to(part, (rows, width)) for part, width in zip(parts, widths, strict=True)
        ]
        return jnp.concatenate(filled, axis=1)

    words, tall, wide = jnp.split(sizes, 3, axis=1)
    word, block = jnp.arange(tokens.shape[1]), jnp.arange(visual)
    block_at = [block // jnp.maximum(wide, 1), block % jnp.maximum(wide, 1)]
    framed, seen = tall > 0, block < tall * wide
    segments = joined(True, framed, seen, framed, word < words, True)

    # An image's mark, its blocks from `first` on, its other mark `span` later, and the text.
    first = len(start) + 1
    mrope = config.prompt.positions == "mrope"
    span = jnp.maximum(tall, wide) if mrope else tall * wide
    text = len(start) + jnp.where(framed, 2 + span, 0)
    behind = text + words + jnp.arange(len(end))
    positions = [
        joined(jnp.arange(len(start)), len(start), first + at, first + span, text + word, behind)
        for at in ([0 * block, *block_at] if mrope else [block] * 3)
    ]
    marks = config.vision_start_token_id, config.image_token_id, config.vision_end_token_id
    row, length = jnp.arange(rows), segments.shape[1]
    inside = jnp.indices((merge, merge)).reshape(2, -1).T
    return Rows(
        tokens=joined(start, *marks, tokens, end),
        segments=segments.astype(jnp.int32),
        positions=jnp.stack(positions, axis=-1),
        visual=joined(-1, -1, row[:, None] * visual + block, -1, -1, -1),
        patches=_patches(blocks, merge),
        patch_segments=jnp.repeat(seen.astype(jnp.int32), merge**2, axis=1),
        patch_positions=(jnp.stack(block_at, axis=-1)[:, :, None] * merge + inside).reshape(
            rows, visual * merge**2, 2
        ),
        ret=row * length + length - 1,
    )


def _patches(
    blocks: UInt8[Array, "rows visual side side channels"], merge: int
) -> UInt8[Array, "rows patches values"]:
    """Return the patches that blocks are made of, as `data.images.patchify` cuts them."""
    rows, visual, side, _, channels = blocks.shape
    patch = side // merge
    cut = blocks.reshape(rows, visual, merge, patch, merge, patch, channels)
    ordered = cut.transpose(0, 1, 2, 4, 6, 3, 5)
    return ordered.reshape(rows, visual * merge**2, channels * patch**2)


def _export(embedder: Embedder, template: Template) -> jax.export.Exported:
    """Return the embedding function for all platforms, its sizes symbolic."""
    structure, vision = embedder.params, embedder.config.vision
    # Kernels of one platform cannot be exported for the others.
    compute = dataclasses.replace(embedder.compute, attention="xla")

    @jax.jit
    def embed(weights, tokens, blocks, sizes):
        rows = one_item_rows(template, tokens, blocks, sizes)
        return encoder.unit(encoder.encode(assemble(structure, weights), rows, compute))

    batch, words, visual = jax.export.symbolic_shape("batch, words, visual")
    side = vision.patch_size * vision.merge_size
    leaves = named_leaves(structure)
    return jax.export.export(embed, platforms=PLATFORMS)(
        {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in leaves.items()},
        jax.ShapeDtypeStruct((batch, words), jnp.int32),
        jax.ShapeDtypeStruct((batch, visual, side, side, vision.channels), jnp.uint8),
        jax.ShapeDtypeStruct((batch, 3), jnp.int32),
    )


def _manifest(
    embedder: Embedder, template: Template, exported: jax.export.Exported
) -> dict[str, Any]:
    """Return what the loader and its readers must know."""
    config, vision, images = embedder.config, embedder.config.vision, embedder.config.images
    side = vision.patch_size * vision.merge_size
    most_words = config.prompt.max_text_tokens + len(template.ask_both)
    most_visual = images.max_pixels // side**2
    return {
        "format_version": FORMAT_VERSION,
        "model_type": config.family,
        "kept_layers": config.kept_layers,
        "width": embedder.width,
        "dtype": embedder.compute.dtype,
        "platforms": exported.platforms,
        "jax_version": jax.__version__,
        "calling_convention_version": exported.calling_convention_version,
        "arguments": {
            "weights": "name → array, all of weights.safetensors",
            "tokens": "int32 [batch, words]: of a text and its ending, then padding of any kind",
            "blocks": f"uint8 [batch, visual, {side}, {side}, {vision.channels}]: the pixels of "
            "each visual token of an image, row by row, then padding; visual is at least 1",
            "sizes": "int32 [batch, 3]: tokens, rows of blocks, columns of blocks of each item",
        },
        "result": f"float32 [batch, {embedder.width}]: unit vectors",
        "patch_size": vision.patch_size,
        "merge_size": vision.merge_size,
        "max_visual_tokens": most_visual,
        "lengths": sorted({*_LENGTHS, most_words, most_visual}),
        # The loader unpacks these in their order.
        "reading": {
            "endings": _endings(config),
            "max_text_tokens": config.prompt.max_text_tokens,
            "block_side": side,
            "min_pixels": images.min_pixels,
            "max_pixels": images.max_pixels,
            "most_elongated": MOST_ELONGATED,
        },
    }


def _endings(config: ModelConfig) -> list[list[list[str] | None]]:
    """Return what ends a text, found by [has no image][has no text]; None without both.

    Twice each: where tokens are counted for `max_text_tokens`, and where they are made.
    """
    wording = WORDINGS[config.prompt.template]

    def ending(image: bool, text: bool) -> list[str] | None:
        if not (image or text):
            return None
        counted = wording.text_end if text else ""
        return [counted, counted + wording.ask[image, text]]

    return [[ending(image, text) for text in (True, False)] for image in (True, False)]
