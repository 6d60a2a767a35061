"""What the JSON files of a folder of vectors hold: its spec, its shards, its manifest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from puma_jax.artifacts import claim
from puma_jax.errors import VectorsError
from puma_jax.files import read_object, sha256_of
from puma_jax.rows import PackedShape
from puma_jax.schema import Count, CountOrZero
from puma_jax.search.model_source import ModelSource

JOB = "job.json"
VectorDType = Literal["float32", "bfloat16", "int8", "ubinary"]


@dataclass(frozen=True)
class EmbeddingSpec:
    """Everything but the items that decides the vectors of a folder; its shards share one spec."""

    model: str
    """Fingerprint of the model; see `Embedder.fingerprint`."""
    corpus: str
    """Absolute path of the file or folder of items, or name of a dataset."""
    instruction: str | None
    dtype: VectorDType
    width: Count
    items_per_shard: Count
    shape: PackedShape
    """Shape of the packed rows of one device, which rounding depends on."""

    def rows(self, shard: int, items: int) -> range:
        """Return the numbers of the items of a shard, of a corpus of so many items."""
        first = shard * self.items_per_shard
        return range(first, min(first + self.items_per_shard, items))

    def shards(self, items: int) -> int:
        """Return the number of shards of a corpus of so many items."""
        return -(-items // self.items_per_shard)

    @classmethod
    def claim(
        cls, folder: Path, job: Mapping[str, Any], shape: Callable[[], PackedShape]
    ) -> EmbeddingSpec:
        """Claim a folder for a spec, and return the spec with the row shape of the folder.

        Args:
            folder: Folder that is empty, missing, or already claimed for this spec.
            job: Fields of the spec without its shape.
            shape: Returns the row shape for a new folder.

        Raises:
            ArtifactError: The folder holds something else, or vectors of another spec.
            VectorsError: Its job.json is of another version or damaged.
        """
        if (folder / JOB).exists():
            read_object(folder / JOB, cls, error=VectorsError)
        claim(folder, JOB, job, what="vectors", adopt={"shape": lambda: asdict(shape())})
        return read_object(folder / JOB, cls, error=VectorsError)

    def digest(self) -> str:
        """Return a digest of the spec, which marks its shards."""
        return sha256_of(asdict(self))[:16]


@dataclass(frozen=True)
class FileRecord:
    """Length and SHA-256 of a file of a shard."""

    bytes: CountOrZero
    sha256: str


@dataclass(frozen=True)
class ShardRecord:
    """Content of shard.json."""

    job: str
    """Digest of the spec."""
    items: CountOrZero
    """Vectors in the shard."""
    skipped: CountOrZero
    """Items of the shard that could not be read."""
    files: dict[str, FileRecord]


@dataclass(frozen=True)
class Totals:
    """Numbers of vectors and of items skipped."""

    items: CountOrZero
    skipped: CountOrZero


@dataclass(frozen=True)
class Manifest:
    """Content of manifest.json."""

    job: EmbeddingSpec
    vectors: Totals
    shards: dict[str, ShardRecord] = field(default_factory=dict)
    source: ModelSource | None = None
    """Where the model was loaded from, which may have moved since."""
