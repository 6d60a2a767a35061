"""Stands for a Milvus server: takes what the real client sends, and answers what it would return.

Every call must fit the signature of `pymilvus.MilvusClient`. Rows pass through the client's own
encoding into messages, and out of it through its own decoding.
"""

from __future__ import annotations

import inspect

import ml_dtypes
import numpy as np
from pymilvus import DataType, MilvusClient
from pymilvus.client import entity_helper
from pymilvus.client.prepare import Prepare
from pymilvus.client.types import HybridExtraList

NUMPY = {
    DataType.FLOAT_VECTOR: np.float32,
    DataType.FLOAT16_VECTOR: np.float16,
    DataType.BFLOAT16_VECTOR: ml_dtypes.bfloat16,
    DataType.INT8_VECTOR: np.int8,
}


class Server:
    """Collections in memory."""

    def __init__(self):
        self.connections: list[tuple[str, str]] = []
        self.calls: list[str] = []
        self.collections: dict[str, Collection] = {}

    def client(self, uri, token=""):
        self.connections.append((uri, token))
        return Client(self)


class Collection:
    def __init__(self, schema, index, properties, consistency_level):
        self.fields = schema.to_dict()["fields"]
        self.index = next(iter(index)).to_dict()
        self.properties = properties
        assert consistency_level == "Strong"  # what was written is found at once
        self.loaded = False
        self.rows: dict[str, dict] = {}
        self.limits = {
            field["name"]: field["params"]["max_length"]
            for field in self.fields
            if field["type"] == DataType.VARCHAR
        }
        self.dtype = NUMPY[next(f["type"] for f in self.fields if f["name"] == "vector")]

    def upsert(self, rows):
        for row in rows:
            for name, limit in self.limits.items():
                assert len(row[name].encode()) <= limit, "a server counts bytes"
            self.rows[row["id"]] = row

    def returned(self, ids, columns):
        """Rows as the client returns them."""
        rows = [self.rows[one] for one in ids]
        if not rows:
            return []
        sent = Prepare.row_upsert_param("items", rows, "", self.fields).fields_data
        sent = [field for field in sent if field.field_name in columns]
        found: list[dict] = [{} for _ in rows]
        lazy = [f for f in sent if entity_helper.extract_row_data_from_fields_data_v2(f, found)]
        return HybridExtraList(lazy, found, extra={})

    def vectors(self):
        return np.array([row["vector"] for row in self.rows.values()]).astype(np.float32)


class Client:
    """A client of a server; see `MilvusClient` for what its methods do."""

    def __init__(self, server):
        self._server = server

    def __getattribute__(self, name):
        method = super().__getattribute__(name)
        if name.startswith("_"):
            return method
        real = inspect.signature(getattr(MilvusClient, name))
        of_class = not isinstance(inspect.getattr_static(MilvusClient, name), classmethod)

        def call(*args, **options):
            real.bind(*([None] * of_class), *args, **options)
            self._server.calls.append(name)
            return method(*args, **options)

        return call

    def create_schema(self, **options):
        return MilvusClient.create_schema(**options)

    def prepare_index_params(self):
        return MilvusClient.prepare_index_params()

    def has_collection(self, name):
        return name in self._server.collections

    def describe_collection(self, name):
        return {"properties": self._server.collections[name].properties}

    def create_collection(self, name, *, schema, index_params, properties, consistency_level):
        self._server.collections[name] = Collection(
            schema, index_params, properties, consistency_level
        )

    def load_collection(self, name):
        self._server.collections[name].loaded = True

    def upsert(self, name, rows):
        self._server.collections[name].upsert(rows)

    def delete(self, name, *, ids):
        for one in ids:
            del self._server.collections[name].rows[one]

    def flush(self, name):
        pass

    def get(self, name, ids, *, output_fields):
        collection = self._server.collections[name]
        assert collection.loaded
        return collection.returned([one for one in ids if one in collection.rows], output_fields)

    def query_iterator(self, name, *, batch_size, output_fields):
        collection = self._server.collections[name]
        assert collection.loaded
        return Iterator(collection, batch_size, output_fields)

    def query(self, name, *, filter, output_fields):  # noqa: A002
        assert (filter, output_fields) == ("", ["count(*)"])
        return [{"count(*)": len(self._server.collections[name].rows)}]

    def search(self, name, *, data, limit, filter, output_fields, search_params):  # noqa: A002
        collection = self._server.collections[name]
        assert filter == ""
        assert search_params["metric_type"] == collection.index["metric_type"]
        assert all(query.dtype == collection.dtype for query in data)
        Prepare.search_requests_with_expr("items", "vector", search_params, limit, data=data)
        stored, queries = collection.vectors(), np.array(data).astype(np.float32)
        if search_params["metric_type"] == "COSINE":
            stored = stored / np.linalg.norm(stored, axis=1, keepdims=True)
            queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
        answers = []
        for scores in queries @ stored.T:
            best = np.argsort(-scores)[:limit]
            rows = collection.returned([[*collection.rows][row] for row in best], output_fields)
            answers.append(
                [
                    {"distance": scores[row], "entity": found}
                    for row, found in zip(best, rows, strict=True)
                ]
            )
        return answers

    def close(self):
        pass


class Iterator:
    def __init__(self, collection, size, columns):
        self._ids = [*collection.rows]
        self._collection, self._size, self._columns = collection, size, columns

    def next(self):
        some, self._ids = self._ids[: self._size], self._ids[self._size :]
        return self._collection.returned(some, self._columns)

    def close(self):
        pass
