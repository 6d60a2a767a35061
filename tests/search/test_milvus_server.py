"""A Milvus server: what is sent fits its client's contract and its limits, in every dtype."""

import sys

import numpy as np
import pytest

# It sets up logging when it is imported, which closes handlers: not while output is captured.
pytest.importorskip("pymilvus", reason="pip install -e '.[search]'")

from puma_jax.errors import ConfigError, SearchError
from puma_jax.search.exact import ExactIndex
from puma_jax.search.indexing import index_vectors
from puma_jax.search.milvus import MAX_TEXT_BYTES, MilvusIndex
from puma_jax.search.open import open_index
from puma_jax.search.records import ItemRecord
from puma_jax.search.shards import Vectors
from tests.search.indexed import records, unit_vectors, write_vectors
from tests.search.milvus_server import Server

COUNT, WIDTH = 40, 64
URI = "http://localhost:19530"


@pytest.fixture
def server(monkeypatch):
    server = Server()
    monkeypatch.setattr("pymilvus.MilvusClient", server.client)
    return server


@pytest.fixture
def folder(tmp_path):
    items = records(tmp_path / "corpus", COUNT - 1)
    items.append(ItemRecord("long", "é" * MAX_TEXT_BYTES))
    return write_vectors(tmp_path / "v", unit_vectors(COUNT, WIDTH), items)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [("float32", 0), ("float16", 1e-3), ("bfloat16", 4e-3), ("int8", 8e-3)],
)
def test_every_dtype_is_sent_found_and_read_back(server, folder, dtype, tolerance):
    said = index_vectors(Vectors(folder), URI, dtype=dtype, progress=False)
    assert (said.added, said.texts_cut) == (COUNT, 1)
    exact, index = ExactIndex(folder), open_index(URI)
    assert isinstance(index, MilvusIndex)
    assert len(index) == COUNT
    ids = Vectors(folder).ids(range(COUNT))
    np.testing.assert_allclose(index.vectors(ids), exact.vectors(ids), rtol=0, atol=tolerance)
    assert index.documents([*ids[:-1], "nothing"]) == exact.documents([*ids[:-1], "nothing"])
    queries = unit_vectors(3, WIDTH, seed=1)
    for found, right in zip(index.search(queries, 40), exact.search(queries, 40), strict=True):
        scores = {hit.document.id: hit.score for hit in right}
        for hit in found:
            assert hit.score == pytest.approx(scores[hit.document.id], abs=4 * tolerance + 1e-6)
    assert server.collections["items"].index["metric_type"] == (
        "COSINE" if dtype == "int8" else "IP"
    )


def test_a_rerun_sends_what_changed(server, folder):
    index_vectors(Vectors(folder), URI, progress=False)
    server.calls.clear()
    assert "Nothing to do" in str(index_vectors(Vectors(folder), URI, progress=False))
    assert not {"upsert", "delete", "create_collection"} & {*server.calls}
    items = records(folder.parent / "corpus", COUNT - 2)
    items[3] = ItemRecord(items[3].id, "new text")
    write_vectors(folder, unit_vectors(COUNT, WIDTH)[:-2], items)
    said = index_vectors(Vectors(folder), URI, progress=False)
    assert (said.added, said.replaced, said.removed) == (0, 1, 2)


def test_messages_stay_below_the_limit_of_servers(server, folder, monkeypatch):
    monkeypatch.setattr("puma_jax.search.indexing._BYTES_AT_ONCE", 2000)
    index_vectors(Vectors(folder), URI, progress=False)
    assert server.calls.count("upsert") > 5
    assert len(server.collections["items"].rows) == COUNT


def test_the_token_of_the_environment_logs_in(server, folder, monkeypatch):
    monkeypatch.setenv("MILVUS_TOKEN", "root:secret")
    index_vectors(Vectors(folder), URI, progress=False)
    assert server.connections == [(URI, "root:secret")]


def test_large_indexes_are_graphs_by_default(server, folder, monkeypatch):
    monkeypatch.setattr("puma_jax.search.indexing._SMALL", 10)
    index_vectors(Vectors(folder), URI, progress=False)
    index = server.collections["items"].index
    assert (index["index_type"], index["M"]) == ("HNSW", 32)


def test_a_server_that_does_not_answer_is_named_in_one_line():
    with pytest.raises(SearchError, match=r"http://127\.0\.0\.1:1: Milvus says: Fail") as error:
        open_index("http://127.0.0.1:1")
    assert "\n" not in str(error.value)


def test_a_client_that_is_missing_is_named_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[search\]'"):
        open_index(URI)


def test_int8_is_compared_by_its_angle(server, folder):
    with pytest.raises(SearchError, match="compare them by COSINE"):
        index_vectors(Vectors(folder), URI, dtype="int8", metric="IP", progress=False)
