"""Embed a corpus into a folder of vectors, shard by shard; a rerun embeds only what is missing."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from puma_jax.artifacts import lock
from puma_jax.data.items import Item
from puma_jax.data.lines import OnBadRecord
from puma_jax.data.preparing import prepare, run
from puma_jax.data.raw_items import RawItem, images_of
from puma_jax.data.threads import in_threads
from puma_jax.embedder import Embedder
from puma_jax.errors import ConfigError, DataError, ItemError, PumaError
from puma_jax.parallel import multihost
from puma_jax.parallel.mesh import data_shards
from puma_jax.progress import Progress
from puma_jax.rows import PackedShape
from puma_jax.search.corpus import Corpus, CorpusItem
from puma_jax.search.model_source import ModelSource
from puma_jax.search.records import ItemRecord, is_unchanged, record_item
from puma_jax.search.shards import (
    count_vectors,
    read_items,
    read_shard,
    read_tensors,
    shard_names,
    stored_tensors,
    write_manifest,
    write_shard,
)
from puma_jax.search.spec import EmbeddingSpec, VectorDType
from puma_jax.search.stored_images import FOLDER, keep_image, remove_unused_images

_SAMPLE = 1024


@dataclass(frozen=True)
class Embedded:
    """The outcome of a call of `embed`."""

    items: int
    """Items of this part of the corpus."""
    embedded: int
    """Items that were embedded now."""
    updated: int
    """Items kept from before whose further fields have changed."""
    skipped: int
    """Items of this part that could not be read."""
    removed: int
    """Vectors removed, of items that the corpus no longer has or that were embedded anew."""
    complete: bool
    """Whether all shards of the corpus exist, those of other parts included."""

    def __str__(self) -> str:
        """Say it in one line."""
        if not (self.embedded or self.updated or self.skipped or self.removed):
            return f"Nothing to do: all {self.items:,} items are embedded"
        kept = self.items - self.skipped - self.embedded
        parts = [f"{self.embedded:,} of {self.items:,} items embedded"]
        parts += [f"{kept:,} kept from before"] * (kept > 0)
        parts += [f"fields of {self.updated:,} updated"] * (self.updated > 0)
        parts += [f"{self.skipped:,} skipped (see skipped.txt in the shards)"] * (self.skipped > 0)
        parts += [f"{self.removed:,} old vectors removed"] * (self.removed > 0)
        return ", ".join(parts)


def embed(
    corpus: Corpus,
    embedder: Embedder,
    folder: Path,
    *,
    instruction: str | None = None,
    vectors_dtype: VectorDType = "float32",
    dimensions: int | None = None,
    items_per_shard: int = 16384,
    on_bad_record: OnBadRecord = "error",
    part: tuple[int, int] = (0, 1),
    source: ModelSource | None = None,
    progress: bool = True,
) -> Embedded:
    """Embed the items of a corpus that a folder lacks, and return what was done.

    A shard whose items are still what was read is kept. Of any other, items that have a vector in
    the folder keep it, wherever they stood: an item is the same if its id, its text and the bytes
    of its image are. Vectors of items that the corpus no longer has are removed at the end.

    The bytes of a new folder depend on the items alone: each shard is packed by itself, into rows
    of one shape for the whole corpus. They do not depend on where a run was killed.

    Args:
        corpus: Items to embed.
        embedder: The model.
        folder: Folder of the vectors, see `search.shards`; created if it is missing.
        instruction: Instruction before the text of every item, for queries; None for documents.
        vectors_dtype: Dtype of the vectors on disk.
        dimensions: Number of values in a vector, see `Embedder.encode`; None for all.
        items_per_shard: Items in a shard, which is the most that a kill loses.
        on_bad_record: "error" stops at an item that cannot be read, "skip" notes it in its shard.
        part: Number of this process and number of processes, which take shards in turn.
        source: Where the model was loaded from, for the manifest.
        progress: Whether to show a progress bar.

    Raises:
        ConfigError: `part` or `dimensions` is out of range, or `items_per_shard` is below 1.
        ArtifactError: The folder is another job's, another process writes it, or it cannot be
            written.
        VectorsError: A shard is damaged.
        DataError, ItemError: An item cannot be read, and `on_bad_record` is "error".
        EvaluationError: A vector is not finite, or zero.
    """
    number, parts = part
    if not 0 <= number < parts:
        raise ConfigError(f"part {number}/{parts}: parts are 0/{parts} to {parts - 1}/{parts}")
    if items_per_shard < 1:
        raise ConfigError(f"items per shard are {items_per_shard}, expected at least 1")
    embedder.check_dimensions(dimensions)
    with lock(folder, f"part-{number}-of-{parts}" if parts > 1 else ""):
        work = _Work(corpus, embedder, instruction, on_bad_record, folder)
        job = {
            "model": embedder.fingerprint,
            "corpus": corpus.address,
            "instruction": instruction,
            "dtype": vectors_dtype,
            "width": dimensions or embedder.embedding_dim,
            "items_per_shard": items_per_shard,
        }
        spec = EmbeddingSpec.claim(folder, job, work.shape)
        shards = _Shards(folder, spec, work)
        ours = range(number, spec.shards(corpus.items), parts)
        current = {shard: name for shard in ours if (name := shards.current(shard)) is not None}
        rows = [len(spec.rows(shard, corpus.items)) for shard in ours]
        missing = [shard for shard in ours if shard not in current]
        embedded = updated = 0
        bar = Progress(
            desc="embedding",
            unit="item",
            total=sum(rows),
            initial=sum(len(spec.rows(shard, corpus.items)) for shard in current),
            disable=not progress or not missing,
        )
        with bar:
            for shard in missing:
                current[shard], fresh, changed = shards.write(shard, bar)
                embedded += fresh
                updated += changed
        skipped = sum(read_shard(folder, name, spec).skipped for name in current.values())
        multihost.on_process_zero(lambda: None)  # wait for the shards of other processes
        before = count_vectors(folder)
        complete = _finish(shards, spec.shards(corpus.items), current, source)
        removed = max(0, before + embedded - count_vectors(folder)) if complete and before else 0
    return Embedded(sum(rows), embedded, updated, skipped, removed, complete)


def _finish(
    shards: _Shards, count: int, current: dict[int, str], source: ModelSource | None
) -> bool:
    """Write the manifest if the shards of all parts exist, and return whether they do."""
    names = []
    for number in range(count):
        name = current.get(number) or shards.current(number)
        if name is None:
            return False
        names.append(name)
    multihost.on_process_zero(lambda: _complete(shards.folder, shards.spec, names, source))
    return True


def _complete(
    folder: Path, spec: EmbeddingSpec, names: list[str], source: ModelSource | None
) -> None:
    """Write the manifest, and remove what no shard in it needs."""
    write_manifest(folder, spec, names, source)
    if (folder / FOLDER).is_dir():
        records = itertools.chain.from_iterable(read_items(folder / name) for name in names)
        remove_unused_images(folder, records)


@dataclass(frozen=True)
class _Work:
    """Reads and embeds items of a corpus."""

    corpus: Corpus
    embedder: Embedder
    instruction: str | None
    on_bad_record: OnBadRecord
    folder: Path
    """Where images go that the corpus stores in its rows."""

    def read(self, row: int) -> CorpusItem:
        """Return the item of a row, whose images are files.

        Raises:
            DataError: The row is bad.
        """
        found = self.corpus.read(row)
        images = images_of(found.item)
        if not any(isinstance(image, bytes) for image in images):
            return found
        kept = [
            keep_image(self.folder, image) if isinstance(image, bytes) else image
            for image in images
        ]
        return found._replace(item={**found.item, "image": kept[0] if len(kept) == 1 else kept})

    def shape(self) -> PackedShape:
        """Return the shape of packed rows of one device for the corpus, from a sample of items.

        An item that is larger than all of the sample is no error: `Embedder.encode` takes rows of
        another shape for it.

        Raises:
            DataError: No item of the sample can be read.
        """
        rows = np.unique(np.linspace(0, self.corpus.items - 1, _SAMPLE).astype(int))
        with tempfile.TemporaryDirectory() as scratch:  # the folder is not yet claimed
            sample = _Preprocessed(replace(self, folder=Path(scratch)), rows.tolist())
            items = list(sample)
        if not items:
            raise DataError(
                f"{self.corpus.source}: none of {len(rows):,} items looked at can be read; the "
                f"first of them: {sample.records[int(rows[0])].skipped}"
            )
        return self.embedder.shape_for(items).with_data_shards(1)

    def encode(
        self, rows: Sequence[int], spec: EmbeddingSpec, bar: Progress
    ) -> tuple[dict[int, np.ndarray], dict[int, ItemRecord]]:
        """Return the vectors of some items by row, and the records of all of them."""
        devices = data_shards(self.embedder.mesh) if self.embedder.mesh else 1
        shape = spec.shape.with_data_shards(devices)
        # Shuffled, so that long items, short ones and images fill rows of one shape evenly.
        order = np.random.default_rng(0).permutation(rows)
        items = _Preprocessed(self, order.tolist(), bar)
        vectors = self.embedder.encode(
            items,
            dimensions=spec.width,
            shape=shape,
            progress=False,
            name=lambda number: f'item "{items.records[items.rows[number]].id}"',
        )
        return dict(zip(items.rows, vectors, strict=True)), items.records

    def recorded(self, row: int) -> tuple[ItemRecord, RawItem | PumaError]:
        """Return the record of a row, and the item or the error that prevents it."""
        try:
            identifier, item, fields = self.read(row)
        except DataError as error:
            return ItemRecord("", skipped=str(error)), error
        try:
            return record_item(identifier, item, fields), item
        except ItemError as error:
            return _skipped(ItemRecord(identifier), error)

    async def preparing(
        self, recorded: tuple[ItemRecord, RawItem | PumaError]
    ) -> tuple[ItemRecord, Item | PumaError]:
        """Return the record of a row, and the preprocessed item or the error that prevents it."""
        record, item = recorded
        if isinstance(item, PumaError):
            return record, item
        try:
            while True:
                found = await self.embedder.preparing(item, self.instruction)
                if is_unchanged(record, record.id, item):
                    return record, found
                record = record_item(record.id, item, record.fields)
        except ItemError as error:
            return _skipped(record, error)


def _skipped(record: ItemRecord, error: ItemError) -> tuple[ItemRecord, ItemError]:
    named = type(error)(f"{record.id}: {error}")
    return replace(record, skipped=str(named)), named


@dataclass(frozen=True)
class _Shards:
    """Shards of a folder, compared with the corpus."""

    folder: Path
    spec: EmbeddingSpec
    work: _Work
    known: dict[str, tuple[str, int, ItemRecord]] = field(default_factory=dict)
    """Shard, place and record of every vector of stale shards, by id, once it is needed."""

    def current(self, number: int) -> str | None:
        """Return the name of the shard of this number that holds what the corpus does now."""
        rows = self.spec.rows(number, self.work.corpus.items)
        for name in shard_names(self.folder).get(number, []):
            read_shard(self.folder, name, self.spec)
            records = read_items(self.folder / name)
            if len(records) == len(rows) and all(
                in_threads(lambda both: self._is_current(*both), zip(rows, records, strict=True))
            ):
                return name
        return None

    def write(self, number: int, bar: Progress) -> tuple[str, int, int]:
        """Write a shard; return its name, and counts of items embedded and of fields updated."""
        rows = list(self.spec.rows(number, self.work.corpus.items))
        kept = self._kept(rows)
        updated = sum(
            record.digest != self.known[record.id][2].digest for *_, record in kept.values()
        )
        bar.update(len(kept))
        fresh = [row for row in rows if row not in kept]
        vectors, records = self.work.encode(fresh, self.spec, bar)
        new = stored_tensors(
            np.array([*vectors.values()], np.float32).reshape(-1, self.spec.width), self.spec.dtype
        )
        place = {row: number for number, row in enumerate(vectors)}
        old = {name: read_tensors(self.folder / name) for name, _, _ in kept.values()}

        def stored(row: int, tensor: str) -> Any:
            if row in place:
                return new[tensor][place[row]]
            name, at, _ = kept[row]
            return old[name][tensor][at]

        embedded = [row for row in rows if row in kept or row in place]
        tensors = {
            tensor: np.stack([stored(row, tensor) for row in embedded]) if embedded else values
            for tensor, values in new.items()
        }
        records |= {row: record for row, (_, _, record) in kept.items()}
        ordered = [records[row] for row in rows]
        name = write_shard(self.folder, self.spec, number, tensors, ordered)
        return name, len(vectors), updated

    def _is_current(self, row: int, record: ItemRecord) -> bool:
        """Return whether a row is what was recorded; skipped rows stay so only if asked to."""
        if record.skipped is not None:
            if self.work.on_bad_record == "error":
                return False
            found, _ = run(self.work.preparing(self.work.recorded(row)))
            return found.content == record.content
        try:
            identifier, item, fields = self.work.read(row)
            # As texts: to Python, true and 1 are equal.
            same = str(record.fields) == str(fields)
            return same and is_unchanged(record, identifier, item)
        except DataError:
            return False

    def _kept(self, rows: Sequence[int]) -> dict[int, tuple[str, int, ItemRecord]]:
        """Return where the folder holds the vectors of some rows already."""
        if not self.known:
            for name in itertools.chain(*shard_names(self.folder).values()):
                embedded = [r for r in read_items(self.folder / name) if r.skipped is None]
                for place, record in enumerate(embedded):
                    self.known[record.id] = name, place, record
        kept = {}
        for row in rows:
            try:
                identifier, item, fields = self.work.read(row)
            except DataError:
                continue
            found = self.known.get(identifier)
            if found is not None and is_unchanged(found[2], identifier, item):
                kept[row] = found[0], found[1], record_item(identifier, item, fields)
        return kept


@dataclass
class _Preprocessed:
    """Items preprocessed while they are iterated over, with the records of all rows read."""

    work: _Work
    wanted: list[int]
    bar: Progress | None = None
    rows: list[int] = field(default_factory=list)
    """Rows that were yielded."""
    records: dict[int, ItemRecord] = field(default_factory=dict)
    """Records of the rows that were yielded or skipped."""

    def __iter__(self) -> Iterator[Item]:
        # Threads hash the files ahead, because one thread may run the coroutines.
        found = prepare(self.work.preparing, in_threads(self.work.recorded, self.wanted))
        for row, (record, item) in zip(self.wanted, found, strict=True):
            if self.bar is not None:
                self.bar.update()
            self.records[row] = record
            if not isinstance(item, PumaError):
                self.rows.append(row)
                yield item
            elif self.work.on_bad_record == "error":
                raise item
