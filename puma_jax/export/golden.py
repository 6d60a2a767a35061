"""Golden items: a fixed set that tells engines apart, and the vectors that exports ship for it.

    golden/items.json            names, texts, instructions and digests of the items
    golden/vectors.safetensors   the first values of their vectors, float32

The items are made in code: texts in several scripts, special tokens of the tokenizer in a text, a
text and an image beyond the limits of the model, images of odd shapes, modes and orientation.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file

from puma_jax.artifacts import write_json
from puma_jax.data.images import open_image
from puma_jax.data.prompts import TextTruncationWarning
from puma_jax.data.raw_items import images_of
from puma_jax.data.templates import PROMPT_TEMPLATES
from puma_jax.embedder import Embedder, RawItem
from puma_jax.errors import ArtifactError
from puma_jax.files import read_object, save_tensors
from puma_jax.schema import Count
from puma_jax.typing import Float, UInt8, ndarray

FOLDER = "golden"
FORMAT_VERSION = 1
SPECIAL_TOKENS = "special tokens"
"""Name of the item whose text holds special tokens, which some engines read as such."""

_INSTRUCTION = "Find an image that matches."
# With 24 items, these keep the folder below 100 kB, whatever the width of the model.
_MOST_VALUES = 960
# Attention over a longer text takes gigabytes; a model whose limit is above does not truncate it.
_LONGEST_TEXT = 1000
_MOST_SPECIAL_TOKENS = 16


@dataclass(frozen=True)
class GoldenItem:
    """An item of the fixed set; its images are the bytes of files."""

    name: str
    raw: RawItem

    @property
    def digest(self) -> str:
        """The SHA-256 of its texts and of its pixels as a person sees them.

        Bytes of files are not part of it, because they differ between versions of Pillow.
        """
        texts = [self.raw.get(name) for name in ("text", "instruction")]
        digest = hashlib.sha256(json.dumps(texts).encode())
        for source in images_of(self.raw):
            image = open_image(source)
            digest.update(f"{image.size}".encode() + image.tobytes())
        return digest.hexdigest()


def golden_items(embedder: Embedder) -> list[GoldenItem]:
    """Return the golden items of a model: those of texts only if it reads no images.

    The model's own limits decide the sizes of the large image and of the long text.
    """
    config = embedder.config
    added = embedder.tokenizer.get_added_vocab()
    special = sorted(added, key=added.__getitem__)[:_MOST_SPECIAL_TOKENS]
    words = min(config.prompt.max_text_tokens, _LONGEST_TEXT)
    texts: dict[str, RawItem] = {
        "English": {"text": "A red bicycle leans against a wall."},
        "European scripts": {"text": "Ça va? Größe, Ευρώπη, велосипед"},
        "Asian scripts": {"text": "自転車 साइकिल 자전거 จักรยาน"},
        "right to left": {"text": "דו-אופן دراجة"},
        "emoji": {"text": "🚲👩‍🔧🇯🇵 e\u0301"},
        "one letter": {"text": " a\n"},
        SPECIAL_TOKENS: {"text": f"What do {' and '.join(special)} mean?"},
        "long text": {"text": "bicycle " * (words + 1)},
        "instruction": {"text": "a bicycle", "instruction": _INSTRUCTION},
    }
    if PROMPT_TEMPLATES[config.prompt.template].no_text:
        texts["empty"] = {"text": ""}
    items = [GoldenItem(name, item) for name, item in texts.items()]
    if config.vision.layers:
        items += _with_images(config.images.max_pixels)
    return items


def _with_images(max_pixels: int) -> list[GoldenItem]:
    """Return the items with an image."""
    color = Image.fromarray(_pixels(90, 120))
    clear = color.copy()
    clear.putalpha(Image.fromarray(_pixels(90, 120)[..., 2]))
    palette = color.quantize(16, dither=Image.Dither.NONE)
    wide = np.asarray(color.convert("L")).astype(np.uint16) * 257
    turned = Image.Exif()
    turned[0x0112] = 6
    side = int((1.3 * max_pixels) ** 0.5)
    images = {
        "image": _file(color),
        "tall image": _file(Image.fromarray(_pixels(300, 10))),
        "tiny image": _file(Image.fromarray(_pixels(2, 3))),
        "large image": _file(Image.fromarray(_pixels(side, side))),
        "palette with transparency": _file(palette, transparency=3),
        "alpha channel": _file(clear),
        "gray": _file(color.convert("L")),
        "CMYK": _file(color.convert("CMYK"), "TIFF"),
        "gray of 16 bits": _file(Image.fromarray(wide)),
        "turned by EXIF": _file(color, exif=turned),
    }
    items = [GoldenItem(name, {"image": image}) for name, image in images.items()]
    both = {"image": images["image"], "text": "make it blue"}
    items.append(GoldenItem("both", both))
    items.append(GoldenItem("both with instruction", {**both, "instruction": _INSTRUCTION}))
    several = [images[name] for name in ("tall image", "image", "gray")]
    items.append(GoldenItem("two images", {"image": several[:2]}))
    items.append(GoldenItem("three images and text", {"image": several[::-1], "text": "Compare."}))
    return items


def _pixels(height: int, width: int) -> UInt8[ndarray, "height width 3"]:
    """Return pixels with gradients and stripes, from whole numbers alone: equal on any machine."""
    y, x = np.indices((height, width))
    return np.stack([y * 255 // height, x * 255 // width, (x + 2 * y) % 32 * 8], 2).astype(np.uint8)


def _file(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """Return the bytes of a file that loses nothing."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def by_instruction(items: Sequence[GoldenItem]) -> Iterator[tuple[str | None, list[int]]]:
    """Yield each instruction with the numbers of its items."""
    own = [item.raw.get("instruction") for item in items]
    for instruction in dict.fromkeys(own):
        yield instruction, [number for number, one in enumerate(own) if one == instruction]


def encode(embedder: Embedder, items: Sequence[GoldenItem]) -> Float[ndarray, "n width"]:
    """Return the vectors of items, encoded together; a truncated text is expected."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TextTruncationWarning)
        return embedder.encode(
            [item.raw for item in items],
            progress=False,
            name=lambda number: f'golden item "{items[number].name}"',
        )


@dataclass(frozen=True)
class _Item:
    """An entry of golden/items.json."""

    name: str
    text: str | None
    instruction: str | None
    image: bool
    digest: str


@dataclass(frozen=True)
class _Listing:
    """The content of golden/items.json."""

    format_version: Count
    width: Count
    values: Count
    items: tuple[_Item, ...]


def write(embedder: Embedder, folder: Path) -> None:
    """Write the golden vectors of an export, computed in float32 from its weights.

    Args:
        embedder: Model that was exported.
        folder: Folder of the export.

    Raises:
        EvaluationError: A vector is not finite, or zero.
    """
    precise = Embedder(
        embedder.config,
        embedder.params,
        embedder.tokenizer,
        compute=dataclasses.replace(embedder.compute, dtype="float32"),
        mesh=embedder.mesh,
    )
    items = golden_items(embedder)
    vectors = encode(precise, items)[:, :_MOST_VALUES]
    listing = {
        "format_version": FORMAT_VERSION,
        "width": embedder.embedding_dim,
        "values": vectors.shape[1],
        "items": [
            {
                "name": item.name,
                "text": item.raw.get("text"),
                "instruction": item.raw.get("instruction"),
                "image": "image" in item.raw,
                "digest": item.digest,
            }
            for item in items
        ],
    }
    (folder / FOLDER).mkdir()
    write_json(folder / FOLDER / "items.json", listing)
    save_tensors(
        {"vectors": np.ascontiguousarray(vectors)}, folder / FOLDER / "vectors.safetensors"
    )


def read(
    folder: Path, items: Sequence[GoldenItem]
) -> tuple[Float[ndarray, "n values"], list[int]] | None:
    """Return golden vectors of a folder, and the numbers of the items they belong to.

    Items that the folder lacks, or that were other ones when it was written, have no number.

    Args:
        folder: Folder of an export.
        items: Golden items of the model.

    Returns:
        None if the folder has no golden vectors.

    Raises:
        ArtifactError: A file is damaged, or of another version of puma_jax.
    """
    path = folder / FOLDER
    if not path.is_dir():
        return None
    listing = read_object(path / "items.json", _Listing)
    if listing.format_version != FORMAT_VERSION:
        raise ArtifactError(
            f"{path / 'items.json'} has format_version {listing.format_version}, expected "
            f"{FORMAT_VERSION}: export the model again"
        )
    try:
        vectors = load_file(path / "vectors.safetensors")["vectors"]
    except (OSError, SafetensorError, KeyError) as error:
        raise ArtifactError(
            f"{path / 'vectors.safetensors'} cannot be read: {error}: export the model again"
        ) from None
    if vectors.shape != (len(listing.items), listing.values) or vectors.dtype != np.float32:
        raise ArtifactError(
            f"{path / 'vectors.safetensors'} holds {vectors.dtype} {list(vectors.shape)}, expected "
            f"float32 {[len(listing.items), listing.values]}: export the model again"
        )
    rows = {(item.name, item.digest): row for row, item in enumerate(listing.items)}
    found = [number for number, item in enumerate(items) if (item.name, item.digest) in rows]
    return vectors[[rows[items[number].name, items[number].digest] for number in found]], found
