"""A folder that embeds without puma_jax: jax, safetensors and tokenizers are enough.

    embed.jax            the embedding function, StableHLO by `jax.export`, for all platforms
    weights.safetensors  weights, the first argument of the function
    tokenizer.json       tokenizer
    manifest.json        shapes, limits, suffixes of the prompt, digests of the other files
    load.py              loader: `from load import Embedder`
    decode.py            decoder of images, a copy of `data.decode`

Batch size, text length and image size are symbolic: one function serves all. It computes whatever
follows from the tokens of a text and the size of an image (the prompt around them, segment ids,
positions, places of image tokens), so that loaders stay small.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from puma_jax.artifacts import write_json
from puma_jax.config import ModelConfig, require
from puma_jax.data import decode
from puma_jax.data.images import MOST_ELONGATED
from puma_jax.data.items import TokenizedTemplate
from puma_jax.data.positions import patch_positions
from puma_jax.data.prompts import Processor
from puma_jax.data.templates import PROMPT_TEMPLATES
from puma_jax.embedder import Embedder
from puma_jax.files import save_tensors, sha256
from puma_jax.model import encoder
from puma_jax.model.tree import assemble, named_leaves
from puma_jax.rows import PackedBatch
from puma_jax.typing import Array, Int, UInt8

FORMAT_VERSION = 4
PLATFORMS = ("cpu", "cuda", "tpu")

# Texts and images are padded to one of these numbers of tokens, or to the limits. More numbers mean
# less padding and more programs to compile. 1 stands for no image or no instruction.
_LENGTHS = (1, *(3 << doubled for doubled in range(18)))


def write(embedder: Embedder, folder: Path) -> None:
    """Write the folder. Its function computes in the dtype of the embedder.

    Args:
        embedder: Model to export. Its weights take host memory once, besides that of devices.
        folder: Folder to write, which exists and is empty.

    Raises:
        ConfigError: flatbuffers, which `jax.export` needs, is not installed, or the model reads
            texts only, or draws visual tokens at random.
    """
    require(
        embedder.config.vision.layers > 0,
        "a model of texts only is not supported in StableHLO, whose function takes images: export "
        "as huggingface",
    )
    require(
        embedder.config.images.spatial_pool_mode == "average",
        "visual tokens drawn at random (images.spatial_pool_mode) are not supported in StableHLO, "
        "whose function does not draw: export as huggingface",
    )
    require(
        importlib.util.find_spec("flatbuffers") is not None,
        "jax.export needs flatbuffers, which is not installed: run pip install -e '.[export]' in "
        "the clone of puma_jax",
    )
    template = Processor(embedder.tokenizer, embedder.config).template
    exported = _export(embedder, template)
    (folder / "embed.jax").write_bytes(exported.serialize())
    leaves = named_leaves(embedder.params)
    weights = {name: np.ascontiguousarray(leaf) for name, leaf in leaves.items()}
    save_tensors(weights, folder / "weights.safetensors")
    # The function adds the prompt, and the loader refuses texts that are too long.
    tokenizer = json.loads(embedder.tokenizer.backend_tokenizer.to_str())
    tokenizer |= dict.fromkeys(("post_processor", "truncation", "padding"))
    write_json(folder / "tokenizer.json", tokenizer)
    shutil.copyfile(Path(__file__).with_name("loader.py"), folder / "load.py")
    shutil.copyfile(decode.__file__, folder / "decode.py")
    manifest = _manifest(embedder, template, exported)
    digests = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    # Read back, for lists where JSON has no tuples.
    manifest = json.loads(json.dumps(manifest | {"sha256": digests}))
    content = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(content.encode()).hexdigest()
    write_json(folder / "manifest.json", manifest | {"content_sha256": digest})


def one_item_rows(
    template: TokenizedTemplate,
    instructions: Int[Array, "rows asked"],
    tokens: Int[Array, "rows words"],
    blocks: UInt8[Array, "rows visual side side channels"],
    sizes: Int[Array, "rows 4"],
) -> PackedBatch:
    """Return packed rows of one item each, as `data.items` and `data.packing` make on the host.

    Padding stays where it is, in a segment of its own, and positions do not count it. Every row
    ends with the last token of its item.

    Args:
        template: Prompt around every item, and config of the model.
        instructions: Tokens of an instruction that has a turn of its own, then padding of any kind.
        tokens: Tokens of a text and of the suffix of the prompt, then padding of any kind.
        blocks: Pixels of each visual token of an image, pooled ones as a whole, row by row; then
            padding.
        sizes: Number of tokens, rows of blocks, columns of blocks, and tokens of the instruction; 0
            rows without an image.
    """
    config, vision = template.config, template.config.vision
    merge, stride = vision.merge_size, config.images.spatial_pool_stride
    rows, visual = blocks.shape[:2]
    start, after, before, end = (
        jnp.array(ids or (), jnp.int32)
        for ids in (template.start, template.after_instruction, template.before_image, template.end)
    )
    lead = [len(start), instructions.shape[1], len(after), len(before)]
    widths = [*lead, 1, visual, 1, tokens.shape[1], len(end)]

    def joined(*parts: Any) -> Array:
        """Return rows joined from all parts of an item; an image lies between two marks."""
        filled = [
            jnp.broadcast_to(part, (rows, width)) for part, width in zip(parts, widths, strict=True)
        ]
        return jnp.concatenate(filled, axis=1)

    words, tall, wide, asked = jnp.split(sizes, 4, axis=1)
    word, block = jnp.arange(tokens.shape[1]), jnp.arange(visual)
    block_at = [block // jnp.maximum(wide, 1), block % jnp.maximum(wide, 1)]
    framed, seen = tall > 0, block < tall * wide
    given = jnp.arange(instructions.shape[1]) < asked
    segment_ids = joined(True, given, True, framed, framed, seen, framed, word < words, True)
    segment_ids = segment_ids.astype(jnp.int32)

    # A count of the tokens, but blocks have theirs from `first` on, and what follows an image goes
    # on `span` later.
    first = len(start) + asked + len(after) + len(before) + 1
    mrope = config.prompt.positions == "mrope"
    later = (jnp.maximum(tall, wide) if mrope else tall * wide) - tall * wide
    count = jnp.cumsum(segment_ids, axis=1) - 1 + joined(0, 0, 0, 0, 0, 0, later, later, later)
    is_block = joined(False, False, False, False, False, True, False, False, False)
    positions = [
        jnp.where(is_block, joined(0, 0, 0, 0, 0, first + at, 0, 0, 0), count)
        for at in ([0 * block, *block_at] if mrope else [block] * 3)
    ]
    marks = config.vision_start_token_id, config.image_token_id, config.vision_end_token_id
    row, length = jnp.arange(rows), segment_ids.shape[1]
    inside = patch_positions(merge * stride, merge * stride, merge, stride)
    index = joined(-1, -1, -1, -1, -1, row[:, None] * visual + block, -1, -1, -1)
    return PackedBatch(
        tokens=joined(start, instructions, after, before, *marks, tokens, end),
        segment_ids=segment_ids,
        positions=jnp.stack(positions, axis=-1),
        image_token_index=index,
        patches=_patches(blocks, merge, stride),
        patch_segment_ids=jnp.repeat(seen.astype(jnp.int32), len(inside), axis=1),
        patch_positions=(
            jnp.stack(block_at, axis=-1)[:, :, None] * (merge * stride) + inside
        ).reshape(rows, visual * len(inside), 2),
        pool_index=row * length + length - 1,
    )


def _patches(
    blocks: UInt8[Array, "rows visual side side channels"], merge: int, stride: int
) -> UInt8[Array, "rows patches values"]:
    """Return the patches of blocks, in the order of `data.images.patchify`."""
    rows, visual, side, _, channels = blocks.shape
    patch = side // (merge * stride)
    cut = blocks.reshape(rows, visual, *(stride, merge, patch) * 2, channels)
    ordered = cut.transpose(0, 1, 2, 5, 3, 6, 8, 4, 7)
    return ordered.reshape(rows, visual * (merge * stride) ** 2, channels * patch**2)


def _export(embedder: Embedder, template: TokenizedTemplate) -> jax.export.Exported:
    """Return the embedding function for all platforms, its sizes symbolic."""
    structure, vision = embedder.params, embedder.config.vision
    # Kernels of a single platform cannot be exported for all.
    compute = dataclasses.replace(embedder.compute, attention="xla")

    @jax.jit
    def embed(weights, instructions, tokens, blocks, sizes):
        rows = one_item_rows(template, instructions, tokens, blocks, sizes)
        return encoder.l2_normalize(encoder.encode(assemble(structure, weights), rows, compute))

    batch, asked, words, visual = jax.export.symbolic_shape("batch, asked, words, visual")
    side = embedder.config.images.token_side(vision)
    leaves = named_leaves(structure)
    return jax.export.export(embed, platforms=PLATFORMS)(
        {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in leaves.items()},
        jax.ShapeDtypeStruct((batch, asked), jnp.int32),
        jax.ShapeDtypeStruct((batch, words), jnp.int32),
        jax.ShapeDtypeStruct((batch, visual, side, side, vision.channels), jnp.uint8),
        jax.ShapeDtypeStruct((batch, 4), jnp.int32),
    )


def _manifest(
    embedder: Embedder, template: TokenizedTemplate, exported: jax.export.Exported
) -> dict[str, Any]:
    """Return the manifest: what the loader needs, and what describes the function."""
    config, vision, images = embedder.config, embedder.config.vision, embedder.config.images
    side = images.token_side(vision)
    most_words = config.prompt.max_text_tokens + len(template.suffix_both)
    most_visual = images.max_pixels // side**2
    return {
        "format_version": FORMAT_VERSION,
        "model_type": config.family,
        "kept_layers": config.kept_layers,
        "embedding_dim": embedder.embedding_dim,
        "dtype": embedder.compute.dtype,
        "platforms": exported.platforms,
        "jax_version": jax.__version__,
        "calling_convention_version": exported.calling_convention_version,
        "arguments": {
            "weights": "name → array, all of weights.safetensors",
            "instructions": "int32 [batch, asked]: an instruction with a turn of its own, then "
            "padding of any kind; asked is at least 1",
            "tokens": "int32 [batch, words]: a text and its suffix, then padding of any kind",
            "blocks": f"uint8 [batch, visual, {side}, {side}, {vision.channels}]: the pixels of "
            "each visual token of an image, row by row, then padding; visual is at least 1",
            "sizes": "int32 [batch, 4]: tokens, rows of blocks, columns of blocks, tokens of the "
            "instruction of each item",
        },
        "result": f"float32 [batch, {embedder.embedding_dim}]: unit vectors",
        "patch_size": vision.patch_size,
        "merge_size": vision.merge_size,
        "spatial_pool_stride": images.spatial_pool_stride,
        "max_visual_tokens": most_visual,
        "lengths": sorted({*_LENGTHS, most_words, most_visual}),
        "preprocessing": {
            "suffixes": _suffixes(config),
            "instruction_turn": _instruction_turn(config),
            "max_text_tokens": config.prompt.max_text_tokens,
            "block_side": side,
            "min_pixels": images.min_pixels,
            "max_pixels": images.max_pixels,
            "max_aspect_ratio": MOST_ELONGATED,
        },
    }


def _instruction_turn(config: ModelConfig) -> dict[str, str] | None:
    """Return how texts are read beside an instruction that has a turn of its own.

    None stands for a prompt whose instructions are part of the text.
    """
    prompt = PROMPT_TEMPLATES[config.prompt.template]
    if not prompt.after_instruction:
        return None
    return {
        "default": prompt.instruction,
        "text_start": prompt.text_start,
        "no_text": prompt.no_text,
    }


def _suffixes(config: ModelConfig) -> list[list[list[str] | None]]:
    """Return the strings that follow a text, indexed by [has no image][has no text].

    Each entry has two: the first for counting tokens against `max_text_tokens`, the second for the
    tokens that the function reads. It is None for neither image nor text.
    """
    prompt = PROMPT_TEMPLATES[config.prompt.template]

    def suffix(image: bool, text: bool) -> list[str] | None:
        if not (image or text):
            return None
        text_end = prompt.text_end if text else ""
        return [text_end, text_end + prompt.suffix[image, text]]

    return [[suffix(image, text) for text in (True, False)] for image in (True, False)]
