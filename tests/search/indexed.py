"""Folders of vectors of made-up documents, without a model."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from puma_jax.rows import PackedShape
from puma_jax.search.records import ItemRecord, record_item
from puma_jax.search.shards import (
    stored_tensors,
    write_manifest,
    write_shard,
)
from puma_jax.search.spec import EmbeddingSpec, VectorDType

SHAPE = PackedShape(4, 64, 8, 8, 8)
COLORS = ("red", "blue", "green")


def unit_vectors(count: int, width: int = 16, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def records(folder: Path, count: int) -> list[ItemRecord]:
    """Documents of all modalities with and without fields; images are files below the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    image = folder / "picture.png"
    if not image.exists():
        Image.new("RGB", (12, 8), "red").save(image)
    found = []
    for number in range(count):
        item = {"text": f"document {number}"} if number % 3 else {}
        item |= {"image": image} if number % 3 != 1 else {}
        fields = {"price": number, "color": COLORS[number % 3]} if number % 4 else {}
        found.append(record_item(f"id/{number}", item, fields))
    return found


def write_vectors(
    folder: Path,
    vectors: np.ndarray,
    items: list[ItemRecord],
    *,
    dtype: VectorDType = "float32",
    instruction: str | None = None,
    model: str = "m" * 64,
    items_per_shard: int = 7,
) -> Path:
    """Write a folder as `puma_jax.embed` does, over what is there."""
    job = {
        "model": model,
        "corpus": "/corpus",
        "instruction": instruction,
        "dtype": dtype,
        "width": vectors.shape[1],
        "items_per_shard": items_per_shard,
    }
    spec = EmbeddingSpec.claim(folder, job, lambda: SHAPE)
    names = []
    for shard in range(spec.shards(len(items))):
        rows = spec.rows(shard, len(items))
        tensors = stored_tensors(vectors[rows.start : rows.stop], dtype)
        names.append(write_shard(folder, spec, shard, tensors, items[rows.start : rows.stop]))
    write_manifest(folder, spec, names)
    return folder


def as_lines(items: list[ItemRecord]) -> str:
    return "".join(
        json.dumps({"id": item.id, "text": item.text, **item.fields}) + "\n" for item in items
    )
