"""Put a folder of vectors into a database; a rerun adds, replaces and removes what has changed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from puma_jax.errors import SearchError
from puma_jax.files import sha256_of
from puma_jax.progress import Progress
from puma_jax.schema import shown
from puma_jax.search.exact import document_of
from puma_jax.search.milvus import (
    MAX_FIELDS_BYTES,
    MAX_ID_BYTES,
    MAX_TEXT_BYTES,
    Database,
    Description,
    IndexType,
    Metric,
    StoredDType,
    is_file,
    milvus_errors,
    stored_vectors,
)
from puma_jax.search.records import ItemRecord
from puma_jax.search.shards import Vectors
from puma_jax.typing import ndarray

_ROWS_AT_ONCE = 1000
_BYTES_AT_ONCE = 2**25
"""Servers take messages of 64 MiB."""
_SMALL = 50_000
"""A new index of no more documents is exact by default."""


@dataclass(frozen=True)
class Indexed:
    """The outcome of a call of `index_vectors`."""

    documents: int
    added: int
    replaced: int
    removed: int
    texts_cut: int
    """Texts that are longer than the database keeps, of all documents."""
    index_type: IndexType

    def __str__(self) -> str:
        """Say it in one line."""
        said = f"Nothing to do: all {self.documents:,} documents are in the index"
        if self.added or self.replaced or self.removed:
            said = (
                f"{self.added:,} documents added, {self.replaced:,} replaced, {self.removed:,} "
                f"removed: the index holds {self.documents:,}"
            )
        if self.texts_cut:
            said += f"; {self.texts_cut:,} texts are cut at {MAX_TEXT_BYTES:,} bytes"
        return f"{said} ({self.index_type})"


def index_vectors(
    vectors: Vectors,
    uri: str,
    *,
    collection: str = "items",
    index_type: IndexType | None = None,
    metric: Metric | None = None,
    dtype: StoredDType = "float32",
    progress: bool = True,
) -> Indexed:
    """Make a collection hold the documents of a folder of vectors, and return what was done.

    A document is known by its id, and replaced if the digest stored with it differs from that of
    its text, image, fields and dtype. A rerun after a stop goes on where it stopped.

    Args:
        vectors: The vectors and their items.
        uri: File of Milvus Lite, or address of a server.
        collection: Name of the collection, created if it is missing.
        index_type: How vectors are searched; by default that of the collection, and for a new one
            FLAT, which is exact, up to 50,000 documents, and HNSW above.
        metric: How vectors are compared; by default that of the collection, and for a new one IP,
            or COSINE for int8. Vectors of length 1 have the same scores by both.
        dtype: Dtype of the vectors in the database.
        progress: Whether to show a progress bar.

    Raises:
        ConfigError: The client is not installed.
        SearchError: The database holds something else, refuses, or cannot hold an item.
        VectorsError: A file of the folder is damaged.
    """
    _check_settings(uri, dtype, metric)
    digests, texts_cut = _digests(vectors)
    database = Database.connect(uri, collection)
    try:
        description = _claim(database, vectors, index_type, metric, dtype)
        stored = dict(database.digests())
        rows = [row for row, (one, said) in enumerate(digests.items()) if stored.get(one) != said]
        fresh = np.array(rows, np.int64)
        replaced = sum(stored.get(one, said) != said for one, said in digests.items())
        gone = [one for one in stored if one not in digests]
        with Progress(
            desc="indexing",
            unit="document",
            total=len(digests),
            initial=len(digests) - len(fresh),
            disable=not progress or not len(fresh),
        ) as bar:
            _insert(database, description, vectors, fresh, digests, bar)
        with milvus_errors(uri):
            for start in range(0, len(gone), _ROWS_AT_ONCE):
                client = database.client
                client.delete(collection, ids=gone[start : start + _ROWS_AT_ONCE])
            if len(fresh) or gone:
                database.client.flush(collection)
    finally:
        database.client.close()
    added = len(fresh) - replaced
    return Indexed(len(digests), added, replaced, len(gone), texts_cut, description.index_type)


def _check_settings(uri: str, dtype: StoredDType, metric: Metric | None) -> None:
    if is_file(uri) and not uri.endswith(".db"):
        raise SearchError(
            f"{uri} names no database, expected a file that ends in .db, or the address of a "
            "Milvus server that begins with http:// or https://"
        )
    if is_file(uri) and dtype != "float32":
        raise SearchError(
            f"Milvus Lite holds float32 vectors only, not {dtype}: leave the dtype out, or use a "
            "Milvus server"
        )
    if dtype == "int8" and metric == "IP":
        raise SearchError("int8 vectors are scaled one by one: compare them by COSINE, not IP")


def _digests(vectors: Vectors) -> tuple[dict[str, str], int]:
    """Return the digest of every document by its id, and how many texts will be cut.

    Raises:
        SearchError: Two documents have one id, or the database cannot hold a document.
    """
    digests: dict[str, str] = {}
    texts_cut = 0
    for record in vectors.items():
        if record.id in digests:
            raise SearchError(
                f"{vectors.folder} holds two documents with the id {shown(record.id)}: give each "
                "its own and embed again"
            )
        _check_limits(record)
        texts_cut += len((record.text or "").encode()) > MAX_TEXT_BYTES
        digests[record.id] = _digest(record, vectors)
    return digests, texts_cut


def _check_limits(record: ItemRecord) -> None:
    """Refuse a document that the database cannot hold.

    Raises:
        SearchError: Its id, the path of its image or its fields are too long, or no Unicode.
    """
    for what, value, most in (
        ("id", record.id, MAX_ID_BYTES),
        ("image path", document_of(record).image or "", MAX_TEXT_BYTES),
        ("fields", json.dumps(record.fields, ensure_ascii=False), MAX_FIELDS_BYTES),
    ):
        try:
            found = len(value.encode())
        except UnicodeEncodeError:
            raise SearchError(
                f"{what} of document {shown(record.id)} is no Unicode, expected a name in UTF-8"
            ) from None
        if found > most:
            raise SearchError(
                f"{what} of document {shown(record.id)} takes {found:,} bytes, and the database "
                f"holds at most {most:,}"
            )


def _digest(record: ItemRecord, vectors: Vectors) -> str:
    """Return a digest of all that the database holds of a document."""
    return sha256_of([record.digest, document_of(record).image, vectors.spec.dtype])


def _claim(
    database: Database,
    vectors: Vectors,
    index_type: IndexType | None,
    metric: Metric | None,
    dtype: StoredDType,
) -> Description:
    """Return the description of the collection, which is created, or is that of these vectors.

    Raises:
        SearchError: It holds vectors of another model or corpus, or was made with other settings.
    """
    spec, found = vectors.spec, database.describe()
    wanted = Description(
        model=spec.model,
        instruction=spec.instruction,
        width=spec.width,
        corpus=spec.corpus,
        dtype=dtype,
        index_type=index_type
        or (found.index_type if found else "FLAT" if len(vectors) <= _SMALL else "HNSW"),
        metric=metric or (found.metric if found else "COSINE" if dtype == "int8" else "IP"),
        source=vectors.source,
    )
    if found is None:
        database.create(wanted)
    else:
        for name in ("model", "instruction", "width", "corpus", "dtype", "index_type", "metric"):
            there, here = getattr(found, name), getattr(wanted, name)
            if there != here:
                raise SearchError(
                    f'{database.uri}: collection "{database.collection}" is another index, which '
                    f"differs in {name} ({shown(there)} there, {shown(here)} here): choose another "
                    "--collection or --uri"
                )
        if found != wanted:
            database.update(replace(found, source=wanted.source))
    database.load()
    return wanted


def _insert(
    database: Database,
    description: Description,
    vectors: Vectors,
    rows: ndarray,
    digests: dict[str, str],
    bar: Progress,
) -> None:
    """Add or replace the documents of some rows, which ascend."""
    wanted = {*rows.tolist()}
    records = (record for row, record in enumerate(vectors.items()) if row in wanted)
    for part in vectors.parts(_ROWS_AT_ONCE, only=rows):
        documents = [
            _row(record, vector, digests[record.id])
            for record, vector in zip(
                islice(records, len(part)), stored_vectors(part, description.dtype), strict=True
            )
        ]
        for batch in _batches(documents):
            with milvus_errors(database.uri):
                database.client.upsert(database.collection, batch)
            bar.update(len(batch))


def _batches(documents: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Yield documents in messages that a server takes."""
    batch: list[dict[str, Any]] = []
    size = 0
    for document in documents:
        # Characters take at most 4 bytes in UTF-8, and in JSON 6.
        texts = 4 * len(document["text"] + document["image"]) + 6 * len(str(document["fields"]))
        room = document["vector"].nbytes + texts
        if batch and size + room > _BYTES_AT_ONCE:
            yield batch
            batch, size = [], 0
        batch.append(document)
        size += room
    if batch:
        yield batch


def _row(record: ItemRecord, vector: ndarray, digest: str) -> dict[str, Any]:
    document = document_of(record)
    text = (document.text or "").encode()[:MAX_TEXT_BYTES].decode(errors="ignore")
    return {
        "id": document.id,
        "vector": vector,
        "text": text,
        "image": document.image or "",
        "modality": document.modality,
        "fields": dict(document.fields),
        "digest": digest,
    }
