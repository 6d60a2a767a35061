"""Write and read a folder of vectors: numbered shards, and a manifest once all are complete.

```
job.json        the spec that all shards share: model, corpus, dtype, shape of packed rows
00000/          vectors.safetensors  ids.txt  shard.json (counts, bytes, SHA-256)  [skipped.txt]
00001/          a shard is a folder that is renamed into place once complete
manifest.json   the spec, and the counts and files of every shard
```
int8 vectors are `round(127 v / s)`; the scale s of each vector is its largest magnitude, and is
stored with them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from puma_jax.artifacts import write_json
from puma_jax.errors import VectorsError
from puma_jax.files import save_tensors, sha256
from puma_jax.rows import PackedShape
from puma_jax.typing import Float, Int, ndarray

VectorDType = Literal["float32", "bfloat16", "int8"]

_VECTORS, _IDS, _SKIPPED, _SHARD = "vectors.safetensors", "ids.txt", "skipped.txt", "shard.json"
_JOB, _MANIFEST = "job.json", "manifest.json"


@dataclass(frozen=True)
class EmbeddingSpec:
    """Everything that decides the vectors of a folder; all its shards share one spec."""

    model: str
    """Fingerprint of the model; see `Embedder.fingerprint`."""
    corpus: str
    """Fingerprint of the corpus; see `Corpus.fingerprint`."""
    items: int
    instruction: str | None
    dtype: VectorDType
    width: int
    items_per_shard: int
    shape: dict[str, int]
    """Shape of the packed rows, which rounding depends on."""

    @property
    def shards(self) -> int:
        """Number of shards of the complete folder."""
        return -(-self.items // self.items_per_shard)

    def rows(self, shard: int) -> range:
        """Return the numbers of the items of a shard."""
        first = shard * self.items_per_shard
        return range(first, min(first + self.items_per_shard, self.items))

    def claim(self, folder: Path, shape: Callable[[], dict[str, int]]) -> EmbeddingSpec:
        """Claim a folder for this spec, and return the spec with the row shape of the folder.

        Args:
            folder: Folder that is empty, missing, or already claimed for this spec.
            shape: Returns the row shape for a new folder.

        Raises:
            VectorsError: The folder holds something else.
        """
        path = folder / _JOB
        if not path.exists():
            # A killed run may have left a partial first file.
            if folder.exists() and any(not path.match("*.partial") for path in folder.iterdir()):
                raise VectorsError(f"{folder} is not empty and holds no vectors: choose another")
            folder.mkdir(parents=True, exist_ok=True)
            write_json(path, asdict(dataclasses.replace(self, shape=shape())))
        found = _read_json(path)
        wanted = json.loads(json.dumps(asdict(self)))
        for name in wanted:
            if name != "shape" and found.get(name) != wanted[name]:
                raise VectorsError(
                    f"{folder} holds vectors of another {name} ({_short(found.get(name))} there, "
                    f"{_short(wanted[name])} here): choose another folder, or delete this one"
                )
        return _parse_spec(found, path)

    def digest(self) -> str:
        """Return a digest of the spec, which marks its shards."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


def has_shard(folder: Path, spec: EmbeddingSpec, number: int) -> bool:
    """Return whether a shard exists.

    Raises:
        VectorsError: It has another spec, or a file is missing or of another length.
    """
    shard = folder / f"{number:05}"
    if not shard.exists():
        return False
    found = _read_json(shard / _SHARD)
    if found.get("job") != spec.digest():
        raise VectorsError(f"{shard} does not belong to {folder / _JOB}: delete it and embed again")
    _check_files(shard, found)
    return True


def write_shard(
    folder: Path,
    spec: EmbeddingSpec,
    number: int,
    vectors: Float[ndarray, "n width"],
    ids: Sequence[str],
    skipped: Sequence[str] = (),
) -> None:
    """Write a shard, which appears whole or not at all.

    Args:
        folder: Folder of the vectors.
        spec: Spec of the folder.
        number: Number of the shard, from 0.
        vectors: Vectors in float32; written in the dtype of the spec.
        ids: Ids of the vectors.
        skipped: A line for each item that could not be embedded.
    """
    shard = folder / f"{number:05}"
    unfinished = folder / f".{number:05}.{os.getpid()}.partial"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    save_tensors(_stored(vectors, spec.dtype), unfinished / _VECTORS)
    _write_text(unfinished / _IDS, ids)
    if skipped:
        _write_text(unfinished / _SKIPPED, skipped)
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(unfinished.iterdir())
    }
    write_json(
        unfinished / _SHARD,
        {"job": spec.digest(), "items": len(ids), "skipped": len(skipped), "files": files},
    )
    unfinished.replace(shard)


def finish(folder: Path, spec: EmbeddingSpec) -> bool:
    """Write the manifest if all shards exist, and return whether they do.

    Raises:
        VectorsError: See `has_shard`.
    """
    if not all(has_shard(folder, spec, number) for number in range(spec.shards)):
        return False
    for unfinished in folder.glob(".*.partial"):
        shutil.rmtree(unfinished, ignore_errors=True)  # of runs that were killed
    shards = {
        f"{number:05}": _read_json(folder / f"{number:05}" / _SHARD)
        for number in range(spec.shards)
    }
    total = {name: sum(shard[name] for shard in shards.values()) for name in ("items", "skipped")}
    write_json(folder / _MANIFEST, {"job": asdict(spec), "vectors": total, "shards": shards})
    return True


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
        manifest = _read_json(self.folder / _MANIFEST)
        self.spec = _parse_spec(manifest["job"], self.folder / _MANIFEST)
        self._shards: dict[str, dict[str, Any]] = manifest["shards"]
        for name, shard in self._shards.items():
            _check_files(self.folder / name, shard, verify=verify)
        self._ends = np.cumsum([shard["items"] for shard in self._shards.values()])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def parts(self, rows: int = 4096) -> Iterator[Float[ndarray, "_ width"]]:
        """Yield all vectors in float32, at most `rows` at a time, as `top_k` accepts them."""
        for name in self._shards:
            with _opened(self.folder / name / _VECTORS) as file:
                vectors = file.get_slice("vectors")
                scales = file.get_tensor("scales") if self.spec.dtype == "int8" else None
                items = self._shards[name]["items"]
                for start in range(0, items, rows):
                    here = slice(start, min(start + rows, items))
                    part = np.asarray(vectors[here], np.float32)
                    yield part if scales is None else part * (scales[here, None] / 127)

    def ids(self, rows: Int[ndarray, "n"] | Sequence[int]) -> list[str]:
        """Return the ids of the vectors of some rows."""
        rows = np.asarray(rows)
        shards = np.searchsorted(self._ends, rows, side="right")
        first = np.append(0, self._ends)[shards]
        return [
            self._ids_of[shard][row]
            for shard, row in zip(shards.tolist(), (rows - first).tolist(), strict=True)
        ]

    @cached_property
    def _ids_of(self) -> list[list[str]]:
        return [
            (self.folder / name / _IDS).read_text("utf-8").split("\n")[:-1] for name in self._shards
        ]


def _stored(vectors: ndarray, dtype: VectorDType) -> dict[str, ndarray]:
    """Return the tensors to store for vectors in a dtype."""
    if dtype != "int8":
        kind = np.float32 if dtype == "float32" else ml_dtypes.bfloat16
        return {"vectors": np.ascontiguousarray(vectors, kind)}
    scales = np.abs(vectors).max(1, initial=np.finfo(np.float32).tiny)
    steps = np.rint(vectors * (127 / scales[:, None]))
    return {"vectors": steps.astype(np.int8), "scales": scales.astype(np.float32)}


def _parse_spec(values: dict[str, Any], path: Path) -> EmbeddingSpec:
    """Return the spec that a file holds.

    Raises:
        VectorsError: Its fields are those of another version.
    """
    try:
        PackedShape(**values["shape"])
        return EmbeddingSpec(**values)
    except (KeyError, TypeError) as error:
        raise VectorsError(
            f"{path} is of another version of puma_jax ({error}): choose another folder, or delete "
            "this one"
        ) from None


def _check_files(shard: Path, wanted: dict[str, Any], *, verify: bool = False) -> None:
    for name, said in wanted["files"].items():
        path = shard / name
        found = path.stat().st_size if path.exists() else None
        if found != said["bytes"]:
            state = "missing" if found is None else f"truncated ({found} of {said['bytes']} bytes)"
            raise VectorsError(f"{path} is {state}: delete {shard} and embed again")
        if verify and sha256(path) != said["sha256"]:
            raise VectorsError(f"{path} is damaged: delete {shard} and embed again")


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, "numpy")
    except (SafetensorError, OSError) as error:
        raise VectorsError(f"{path} cannot be read: {error}") from None


def _write_text(path: Path, lines: Sequence[str]) -> None:
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{line}\n" for line in lines)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 16 else f"{text[:12]}..."


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise VectorsError(f"{path} cannot be read: {error}") from None
