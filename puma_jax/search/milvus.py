"""An index in Milvus: a local file of Milvus Lite, a server or a cluster, by the same client."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from puma_jax.data.mbeir import Modality
from puma_jax.errors import ConfigError, SearchError
from puma_jax.files import parse_json
from puma_jax.schema import Count, from_json, shown
from puma_jax.search.exact import check_queries, unknown_field
from puma_jax.search.filters import parse_filter
from puma_jax.search.index import Document, Hit
from puma_jax.search.model_source import ModelSource
from puma_jax.search.quantize import to_int8
from puma_jax.typing import Float, ndarray

StoredDType = Literal["float32", "float16", "bfloat16", "int8"]
IndexType = Literal["FLAT", "HNSW", "IVF_FLAT", "AUTOINDEX"]
Metric = Literal["IP", "COSINE"]

MAX_ID_BYTES = 4096
MAX_TEXT_BYTES = 65_535
MAX_FIELDS_BYTES = 65_535
MAX_K = 16_384
"""Limits of Milvus' servers; Milvus Lite keeps to them, too, so that an index can move."""

_PROPERTY = "puma_jax"
_DIGEST_CHARACTERS = 64
_IDS_AT_ONCE = 1000
_COLUMNS = ["id", "text", "image", "modality", "fields"]
_NUMPY = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "int8": np.int8,
}

_INDEX_PARAMS = {
    "HNSW": {"M": 32, "efConstruction": 360},
    "IVF_FLAT": {"nlist": 1024},
}
_EF = 256


@dataclass(frozen=True)
class Description:
    """A description of what a collection holds; stored in its properties."""

    model: str
    """Fingerprint of the model; see `Embedder.fingerprint`."""
    instruction: str | None
    width: Count
    corpus: str
    """Absolute path of the file or folder of items."""
    dtype: StoredDType
    index_type: IndexType
    metric: Metric
    source: ModelSource | None = None


@dataclass(frozen=True)
class Database:
    """A connection to Milvus, and the name of a collection in it."""

    uri: str
    collection: str
    client: Any
    """A `pymilvus.MilvusClient`; several threads may use it at once."""

    @classmethod
    def connect(cls, uri: str, collection: str = "items") -> Database:
        """Return a connection; the environment variable MILVUS_TOKEN logs in at a server.

        Raises:
            ConfigError: The client is not installed.
            SearchError: The server does not answer, or another process has the file open.
        """
        try:
            from pymilvus import MilvusClient
        except ImportError as error:
            raise ConfigError(
                f"Milvus' client cannot be imported ({error}): run pip install -e '.[search]' in "
                "the clone of puma_jax"
            ) from None
        # It prints the traceback of every error that it raises, and we raise it again in one line;
        # Milvus Lite that of every call that it does not know, which the client then does without.
        for name in ("pymilvus", "grpc._server"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        options: dict[str, Any] = {"token": os.environ.get("MILVUS_TOKEN", "")}
        if is_file(uri):
            Path(uri).parent.mkdir(parents=True, exist_ok=True)
            # Milvus Lite hangs up on a client that asks every 10 s whether it is still there.
            options = {"grpc_options": {"grpc.keepalive_time_ms": 2**31 - 1}}
        with milvus_errors(uri, "; another process may have it open" if is_file(uri) else ""):
            return cls(uri, collection, MilvusClient(uri, **options))

    def describe(self) -> Description | None:
        """Return what the collection holds; None if there is none.

        Raises:
            SearchError: It is not an index of ours.
        """
        with milvus_errors(self.uri):
            if not self.client.has_collection(self.collection):
                return None
            properties = self.client.describe_collection(self.collection)["properties"]
        try:
            return from_json(Description, parse_json(properties[_PROPERTY].encode()))
        except (KeyError, ValueError, ConfigError) as error:
            raise SearchError(
                f'{self.uri}: collection "{self.collection}" is not an index of puma_jax '
                f"({error}): choose another collection"
            ) from None

    def create(self, description: Description) -> None:
        """Create the collection, with an index for its vectors."""
        from pymilvus import DataType

        kinds = {
            "float32": DataType.FLOAT_VECTOR,
            "float16": DataType.FLOAT16_VECTOR,
            "bfloat16": DataType.BFLOAT16_VECTOR,
            "int8": DataType.INT8_VECTOR,
        }
        schema = self.client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=MAX_ID_BYTES)
        schema.add_field("vector", kinds[description.dtype], dim=description.width)
        schema.add_field("text", DataType.VARCHAR, max_length=MAX_TEXT_BYTES)
        schema.add_field("image", DataType.VARCHAR, max_length=MAX_TEXT_BYTES)
        schema.add_field("modality", DataType.VARCHAR, max_length=16)
        schema.add_field("fields", DataType.JSON)
        schema.add_field("digest", DataType.VARCHAR, max_length=_DIGEST_CHARACTERS)
        index = self.client.prepare_index_params()
        index.add_index(
            "vector",
            index_type=description.index_type,
            metric_type=description.metric,
            params=_INDEX_PARAMS.get(description.index_type, {}),
        )
        with milvus_errors(self.uri):
            self.client.create_collection(
                self.collection,
                schema=schema,
                index_params=index,
                consistency_level="Strong",
                properties={_PROPERTY: json.dumps(asdict(description))},
            )

    def update(self, description: Description) -> None:
        """Store a description that has changed."""
        with milvus_errors(self.uri):
            self.client.alter_collection_properties(
                self.collection, {_PROPERTY: json.dumps(asdict(description))}
            )

    def load(self) -> None:
        """Load the collection, which a process that opens it must do before it reads."""
        with milvus_errors(self.uri):
            self.client.load_collection(self.collection)

    def digests(self) -> Iterator[tuple[str, str]]:
        """Yield id and digest of every document."""
        with milvus_errors(self.uri):
            rows = self.client.query_iterator(
                self.collection, batch_size=_IDS_AT_ONCE, output_fields=["id", "digest"]
            )
            while batch := rows.next():
                yield from ((row["id"], row["digest"]) for row in batch)
            rows.close()

    def get(self, ids: Sequence[str], columns: Sequence[str]) -> dict[str, Mapping[str, Any]]:
        """Return the rows with these ids."""
        found: dict[str, Mapping[str, Any]] = {}
        for start in range(0, len(ids), _IDS_AT_ONCE):
            some = list(ids[start : start + _IDS_AT_ONCE])
            with milvus_errors(self.uri):
                rows = self.client.get(self.collection, some, output_fields=list(columns))
            found |= {row["id"]: row for row in rows}
        return found


class MilvusIndex:
    """The documents of a collection in Milvus. Implements `search.index.Index`."""

    def __init__(self, uri: str, *, collection: str = "items"):
        """Open a collection.

        Args:
            uri: File of Milvus Lite, or address of a server.
            collection: Name of the collection.

        Raises:
            ConfigError: The client is not installed.
            SearchError: There is no such index, or it cannot be opened.
        """
        missing = f"{uri} holds no index: make one with python -m puma_jax.index"
        if is_file(uri) and not Path(uri).exists():
            raise SearchError(missing)
        self._database = Database.connect(uri, collection)
        described = self._database.describe()
        if described is None:
            raise SearchError(f'{missing} (there is no collection "{collection}")')
        self._description = described
        self.model, self.instruction = described.model, described.instruction
        self.width, self.source = described.width, described.source
        self._database.load()
        self._known_fields: set[str] = set()

    def __len__(self) -> int:
        with milvus_errors(self._database.uri):
            counted = self._database.client.query(
                self._database.collection, filter="", output_fields=["count(*)"]
            )
        return int(counted[0]["count(*)"])

    def search(
        self,
        vectors: Float[ndarray, "queries width"],
        k: int,
        *,
        modality: Modality | None = None,
        filter: str | None = None,  # noqa: A002
    ) -> list[list[Hit]]:
        """Return the k best documents of each query; see `Index.search`."""
        check_queries(vectors, k, self.width)
        if k > MAX_K:
            raise SearchError(f"k is {k:,}, and Milvus finds at most {MAX_K:,}")
        conditions = [] if modality is None else [f"modality == {json.dumps(modality)}"]
        if filter is not None:
            conditions.append(self._condition(filter))
        # More candidates than k: the graph of HNSW is searched until it has seen so many.
        effort = {"params": {"ef": max(_EF, 2 * k)}} if self._index_type == "HNSW" else {}
        with milvus_errors(self._database.uri):
            found = self._database.client.search(
                self._database.collection,
                data=list(stored_vectors(vectors, self._description.dtype)),
                limit=k,
                filter=" and ".join(conditions),
                output_fields=_COLUMNS,
                search_params={"metric_type": self._description.metric, **effort},
            )
        return [
            [Hit(_document(hit["entity"]), float(hit["distance"])) for hit in hits]
            for hits in found
        ]

    def documents(self, ids: Sequence[str]) -> list[Document | None]:
        """Return the documents with these ids; None for an id that the index does not hold."""
        rows = self._database.get(ids, _COLUMNS)
        return [_document(rows[one]) if one in rows else None for one in ids]

    def vectors(self, ids: Sequence[str]) -> Float[ndarray, "n width"]:
        """Return the float32 vectors of these ids; see `Index.vectors`."""
        rows = self._database.get(ids, ["id", "vector"])
        for identifier in ids:
            if identifier not in rows:
                raise SearchError(f"the index holds no document {shown(identifier)}")
        found = [_read_vector(rows[one]["vector"], self._description.dtype) for one in ids]
        return np.array(found, np.float32).reshape(-1, self.width)

    def close(self) -> None:
        """Close the connection."""
        self._database.client.close()

    @property
    def _index_type(self) -> IndexType:
        return self._description.index_type

    def _condition(self, text: str) -> str:
        """Return a filter in Milvus' language, whose fields some document has."""
        found = parse_filter(text)
        for name in sorted(found.names - self._known_fields):
            with milvus_errors(self._database.uri):
                having = self._database.client.query(
                    self._database.collection,
                    filter=f"exists fields[{json.dumps(name, ensure_ascii=False)}]",
                    output_fields=["id"],
                    limit=1,
                )
            if not len(having):
                raise SearchError(unknown_field(name))
            self._known_fields.add(name)
        return found.milvus()


def is_file(uri: str) -> bool:
    """Whether an address is a file of Milvus Lite, not a server."""
    return not uri.startswith(("http://", "https://"))


def stored_vectors(vectors: Float[ndarray, "n width"], dtype: StoredDType) -> ndarray:
    """Return vectors as the store takes them; int8 fills its range, for the metric COSINE."""
    if dtype == "int8":
        return to_int8(vectors)[0]
    return np.ascontiguousarray(vectors, _NUMPY[dtype])


@contextlib.contextmanager
def milvus_errors(uri: str, hint: str = "") -> Iterator[None]:
    """Turn errors of Milvus' client into one line.

    Raises:
        SearchError: Milvus refuses, or does not answer.
    """
    from pymilvus.exceptions import MilvusException

    try:
        yield
    except MilvusException as error:
        said = str(error.message).strip().partition("\n")[0]
        raise SearchError(f"{uri}: Milvus says: {said}{hint}") from error


def _document(row: Mapping[str, Any]) -> Document:
    modality = row["modality"]
    text = row["text"] if "text" in modality else None
    image = row["image"] if "image" in modality else None
    return Document(row["id"], text, image, dict(row["fields"] or {}))


def _read_vector(stored: Any, dtype: StoredDType) -> Float[ndarray, "width"]:
    """Return a vector that the client returned: a list, or bytes of a smaller dtype."""
    while isinstance(stored, list) and len(stored) == 1 and isinstance(stored[0], bytes):
        stored = stored[0]
    if isinstance(stored, bytes):
        stored = np.frombuffer(stored, _NUMPY[dtype])
    vector = np.asarray(stored).astype(np.float32)
    return vector / np.linalg.norm(vector) if dtype == "int8" else vector
