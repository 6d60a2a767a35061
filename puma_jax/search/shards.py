"""Write and read a folder of vectors: shards, and a manifest once all of them are complete.

```
job.json          the spec that all shards share: model, corpus, dtype, shape of packed rows
00000-1f0c…/      vectors.safetensors  ids.txt  items.jsonl  shard.json  [skipped.txt]
00001-9a44…/      a shard is a folder that appears whole; its name ends in a digest of its items
manifest.json     the spec, and the shards that hold the corpus
```
items.jsonl records what was read for every item of the shard: id, text, path, size, time and
SHA-256 of the image, and further fields. A rerun compares these with the corpus, and embeds what
differs.

int8 vectors are `round(127 v / s)`; the scale s of each vector is its largest magnitude, and is
stored with them. ubinary vectors are one bit for each value, and stand for values ±1/√width; see
`search.quantize`.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from puma_jax.artifacts import atomic_folder, write_json
from puma_jax.errors import VectorsError
from puma_jax.files import parse_json, read_object, save_tensors, sha256, sha256_of
from puma_jax.schema import from_json
from puma_jax.search.model_source import ModelSource
from puma_jax.search.quantize import from_bits, from_int8, to_bits, to_int8
from puma_jax.search.records import ItemRecord
from puma_jax.search.spec import (
    JOB,
    EmbeddingSpec,
    FileRecord,
    Manifest,
    ShardRecord,
    Totals,
    VectorDType,
)
from puma_jax.typing import Float, Int, ndarray

_VECTORS, _IDS, _ITEMS, _SKIPPED, _SHARD = (
    "vectors.safetensors",
    "ids.txt",
    "items.jsonl",
    "skipped.txt",
    "shard.json",
)
_MANIFEST = "manifest.json"
_NAME = re.compile(r"([0-9]{5,})-[0-9a-f]{8}")


def shard_names(folder: Path) -> dict[int, list[str]]:
    """Return the names of all shards in a folder by their numbers, stale ones included."""
    found: dict[int, list[str]] = {}
    for path in sorted(folder.iterdir()):
        if match := _NAME.fullmatch(path.name):
            found.setdefault(int(match[1]), []).append(path.name)
    return found


def read_shard(folder: Path, name: str, spec: EmbeddingSpec) -> ShardRecord:
    """Return the record of a shard whose files have the right lengths.

    Raises:
        VectorsError: It has another spec, or a file is missing or of another length.
    """
    record = read_object(folder / name / _SHARD, ShardRecord, error=VectorsError)
    if record.job != spec.digest():
        raise VectorsError(
            f"{folder / name} does not belong to {folder / JOB}: delete it and embed again"
        )
    _check_files(folder / name, record)
    return record


def read_items(shard: Path) -> list[ItemRecord]:
    """Return the records of all items of a shard, skipped ones included, in corpus order.

    Raises:
        VectorsError: The file cannot be read, or holds something else.
    """
    path = shard / _ITEMS
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
        return [from_json(ItemRecord, parse_json(line)) for line in lines]
    except OSError as error:
        raise VectorsError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # a ValueError of parse_json, a ConfigError of from_json
        raise VectorsError(f"{path}: {error}: delete {shard} and embed again") from None


def read_tensors(shard: Path) -> dict[str, ndarray]:
    """Return the stored tensors of a shard, as `stored_tensors` makes them.

    Raises:
        VectorsError: The file is damaged.
    """
    with _opened(shard / _VECTORS) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def write_shard(
    folder: Path,
    spec: EmbeddingSpec,
    number: int,
    tensors: dict[str, ndarray],
    records: Sequence[ItemRecord],
) -> str:
    """Write a shard, which appears whole or not at all, and return its name.

    Args:
        folder: Folder of the vectors.
        spec: Spec of the folder.
        number: Number of the shard, from 0.
        tensors: Vectors of the items that are not skipped, from `stored_tensors`.
        records: Records of all items of the shard, in corpus order.

    Raises:
        ArtifactError: The shard cannot be written.
    """
    name = f"{number:05}-{sha256_of([record.digest for record in records])[:8]}"
    embedded = [record for record in records if record.skipped is None]
    skipped = [record.skipped for record in records if record.skipped is not None]
    if (folder / name).exists():  # its items are the same; only the times of their files differ
        shutil.rmtree(folder / name)
    with atomic_folder(folder / name) as partial:
        save_tensors(tensors, partial / _VECTORS)
        _write_lines(partial / _IDS, [record.id for record in embedded])
        _write_lines(partial / _ITEMS, [record.to_json() for record in records])
        if skipped:
            _write_lines(partial / _SKIPPED, skipped)
        files = {
            path.name: FileRecord(path.stat().st_size, sha256(path))
            for path in sorted(partial.iterdir())
        }
        record = ShardRecord(spec.digest(), len(embedded), len(skipped), files)
        write_json(partial / _SHARD, asdict(record))
    return name


def write_manifest(
    folder: Path, spec: EmbeddingSpec, names: Sequence[str], source: ModelSource | None = None
) -> Totals:
    """Write the manifest of these shards, in this order, and return what they hold.

    Shards that are not among them are stale and removed.

    Raises:
        VectorsError: See `read_shard`.
        ArtifactError: The manifest cannot be written.
    """
    shards = {name: read_shard(folder, name, spec) for name in names}
    totals = Totals(
        items=sum(record.items for record in shards.values()),
        skipped=sum(record.skipped for record in shards.values()),
    )
    write_json(folder / _MANIFEST, asdict(Manifest(spec, totals, shards, source)))
    for stale in sorted({*itertools.chain(*shard_names(folder).values())} - {*names}):
        shutil.rmtree(folder / stale, ignore_errors=True)
    return totals


def count_vectors(folder: Path) -> int:
    """Return the number of vectors that the manifest of a folder lists; 0 without one."""
    if not (folder / _MANIFEST).exists():
        return 0
    return read_object(folder / _MANIFEST, Manifest, error=VectorsError).vectors.items


def stored_tensors(vectors: Float[ndarray, "n width"], dtype: VectorDType) -> dict[str, ndarray]:
    """Return the tensors to store for float32 vectors in a dtype."""
    if dtype == "int8":
        steps, scales = to_int8(vectors)
        return {"vectors": steps, "scales": scales}
    if dtype == "ubinary":
        return {"vectors": to_bits(vectors)}
    kind = np.float32 if dtype == "float32" else ml_dtypes.bfloat16
    return {"vectors": np.ascontiguousarray(vectors, kind)}


class Vectors:
    """The vectors of a complete folder, read from its files when needed."""

    def __init__(self, folder: str | os.PathLike[str], *, verify: bool = False):
        """Open a folder and check the lengths of its files.

        Args:
            folder: Folder that `python -m puma_jax.embed` wrote.
            verify: Whether to read all files and compare their SHA-256 with the manifest.

        Raises:
            VectorsError: The folder is not complete, or a file is missing or damaged.
        """
        self.folder = Path(folder)
        if not (self.folder / _MANIFEST).exists():
            state = "unfinished: run the same command again" if self.folder.exists() else "missing"
            raise VectorsError(f"{self.folder / _MANIFEST}: the vectors are {state}")
        manifest = read_object(self.folder / _MANIFEST, Manifest, error=VectorsError)
        self.spec, self.source, self._shards = manifest.job, manifest.source, manifest.shards
        for name, shard in self._shards.items():
            if not _NAME.fullmatch(name) or set(shard.files) < {_VECTORS, _IDS, _ITEMS}:
                raise VectorsError(f"{self.folder / _MANIFEST}: {name} is no shard: embed again")
            _check_files(self.folder / name, shard, verify=verify)
        self._ends = np.cumsum([0, *(shard.items for shard in self._shards.values())])[1:]

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def parts(
        self, rows: int = 4096, *, only: Int[ndarray, "n"] | None = None
    ) -> Iterator[Float[ndarray, "_ width"]]:
        """Yield all vectors in float32, at most `rows` at a time, as `top_k` accepts them.

        Args:
            rows: The most vectors in a part.
            only: Numbers of the vectors to yield, ascending. Shards without any are not read.

        Raises:
            VectorsError: A file is damaged.
        """
        first = 0
        for name, shard in self._shards.items():
            end = first + shard.items
            wanted = None
            if only is not None:
                wanted = only[slice(*np.searchsorted(only, [first, end]))] - first
            first = end
            if wanted is not None and not len(wanted):
                continue
            path = self.folder / name / _VECTORS
            with _opened(path) as file:
                vectors, scales = self._tensors(file, path, shard.items)
                for start in range(0, shard.items, rows):
                    here = slice(start, min(start + rows, shard.items))
                    part = self._float32(vectors[here], None if scales is None else scales[here])
                    if wanted is not None:
                        inside = wanted[slice(*np.searchsorted(wanted, [here.start, here.stop]))]
                        part = part[inside - start]
                    if len(part):
                        yield part

    def ids(self, rows: Int[ndarray, "n"] | Sequence[int]) -> list[str]:
        """Return the ids of the vectors of some rows."""
        rows = np.asarray(rows)
        shards = np.searchsorted(self._ends, rows, side="right")
        first = np.append(0, self._ends)[shards]
        return [
            self._ids_of[shard][row]
            for shard, row in zip(shards.tolist(), (rows - first).tolist(), strict=True)
        ]

    def items(self) -> Iterator[ItemRecord]:
        """Yield the record of the item of every vector, in the order of the vectors."""
        for name in self._shards:
            for record in read_items(self.folder / name):
                if record.skipped is None:
                    yield record

    def _float32(self, stored: ndarray, scales: ndarray | None) -> Float[ndarray, "n width"]:
        """Return the vectors that stored ones stand for."""
        if scales is not None:
            return from_int8(stored, scales)
        if self.spec.dtype == "ubinary":
            return from_bits(stored, self.spec.width)
        return np.asarray(stored, np.float32)

    def _tensors(self, file: Any, path: Path, items: int) -> tuple[Any, ndarray | None]:
        """Return the slice of vectors and the scales of a shard, of the shapes they should have."""
        dtypes = {"float32": "F32", "bfloat16": "BF16", "int8": "I8", "ubinary": "U8"}
        try:
            vectors = file.get_slice("vectors")
            scales = file.get_tensor("scales") if self.spec.dtype == "int8" else None
        except (SafetensorError, OSError) as error:
            raise VectorsError(f"{path} is damaged: {error}: embed again") from None
        width = -(-self.spec.width // 8) if self.spec.dtype == "ubinary" else self.spec.width
        shape, wanted = tuple(vectors.get_shape()), (items, width)
        if shape != wanted or vectors.get_dtype() != dtypes[self.spec.dtype]:
            raise VectorsError(
                f"{path} holds {vectors.get_dtype()} {list(shape)}, the manifest says "
                f"{self.spec.dtype} {list(wanted)}: delete {path.parent} and embed again"
            )
        if scales is not None and scales.shape != (items,):
            raise VectorsError(f"{path} has {scales.shape} scales for {items} vectors: embed again")
        return vectors, scales

    @cached_property
    def _ids_of(self) -> list[list[str]]:
        lists = []
        for name, shard in self._shards.items():
            path = self.folder / name / _IDS
            try:
                ids = path.read_text("utf-8").split("\n")[:-1]
            except (OSError, ValueError) as error:
                raise VectorsError(f"{path} cannot be read: {error}") from None
            if len(ids) != shard.items:
                raise VectorsError(f"{path} holds {len(ids)} ids, expected {shard.items}")
            lists.append(ids)
        return lists


def _check_files(shard: Path, record: ShardRecord, *, verify: bool = False) -> None:
    for name, said in record.files.items():
        path = shard / name
        found = path.stat().st_size if path.is_file() else None
        if found != said.bytes:
            state = "missing" if found is None else f"truncated ({found} of {said.bytes} bytes)"
            raise VectorsError(f"{path} is {state}: delete {shard} and embed again")
        if verify and sha256(path) != said.sha256:
            raise VectorsError(f"{path} is damaged: delete {shard} and embed again")


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, "numpy")
    except (SafetensorError, OSError) as error:
        raise VectorsError(f"{path} cannot be read: {error}") from None


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{line}\n" for line in lines)
