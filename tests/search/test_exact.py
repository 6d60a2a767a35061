"""The exact index finds what a plain sort of all inner products finds."""

import threading
import time

import faiss
import numpy as np
import pytest

from puma_jax.errors import SearchError, VectorsError
from puma_jax.search import exact
from puma_jax.search.exact import ExactIndex
from puma_jax.search.open import open_index
from puma_jax.search.topk import top_k
from tests.search.indexed import records, unit_vectors, write_vectors

COUNT = 40


@pytest.fixture(scope="module")
def vectors():
    return unit_vectors(COUNT)


@pytest.fixture(scope="module")
def queries():
    return unit_vectors(5, seed=1)


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    return records(tmp_path_factory.mktemp("corpus"), COUNT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, vectors, items):
    return write_vectors(
        tmp_path_factory.mktemp("vectors") / "v", vectors, items, instruction="Find."
    )


@pytest.fixture(params=["in memory", "from files"])
def index(request, folder, monkeypatch):
    if request.param == "from files":
        monkeypatch.setattr(exact, "_HELD_BYTES", 0)
    with_index = ExactIndex(folder)
    yield with_index
    with_index.close()


def test_it_is_top_k(index, vectors, queries):
    scores, rows = top_k(queries, vectors, 7)
    found = index.search(queries, 7)
    assert [[hit.document.id for hit in hits] for hits in found] == [
        [f"id/{row}" for row in of_query] for of_query in rows
    ]
    assert [[hit.score for hit in hits] for hits in found] == scores.tolist()
    peer = faiss.IndexFlatIP(16)
    peer.add(vectors)
    np.testing.assert_array_equal(peer.search(queries, 7)[1], rows)


def test_it_says_what_it_holds(index):
    assert (index.model, index.instruction, index.width) == ("m" * 64, "Find.", 16)
    assert len(index) == COUNT


def plain(vectors, items, query, keep):
    rows = [row for row, item in enumerate(items) if keep(item)]
    return [f"id/{row}" for row in sorted(rows, key=lambda row: -float(vectors[row] @ query))]


@pytest.mark.parametrize(
    ("given", "keep"),
    [
        ({"filter": "price < 20"}, lambda item: item.fields.get("price", 99) < 20),
        ({"filter": 'id in ["id/3"]'}, lambda item: item.id == "id/3"),
        ({"modality": "text"}, lambda item: item.image is None),
        ({"modality": "image"}, lambda item: item.text is None),
        (
            {"modality": "image,text", "filter": 'color == "green"'},
            lambda item: bool(item.image and item.text and item.fields.get("color") == "green"),
        ),
        ({"filter": "price > 1000"}, lambda item: False),
    ],
)
def test_filters_and_modalities_leave_the_others_in_order(
    index, vectors, items, queries, given, keep
):
    for query, hits in zip(queries, index.search(queries, COUNT, **given), strict=True):
        assert [hit.document.id for hit in hits] == plain(vectors, items, query, keep)


def test_documents_are_those_of_the_corpus(index, items):
    found = index.documents([item.id for item in items])
    for document, item in zip(found, items, strict=True):
        assert (document.text, document.fields) == (item.text, item.fields)
        assert document.image == (item.image and item.image.path)
    assert index.documents(["nothing", "id/0"])[0] is None
    assert [document.modality for document in found[:3]] == ["image", "text", "image,text"]


def test_vectors_come_in_the_order_asked_for(index, vectors):
    found = index.vectors(["id/7", "id/39", "id/7", "id/0"])
    np.testing.assert_array_equal(found, vectors[[7, 39, 7, 0]])
    assert index.vectors([]).shape == (0, 16)
    with pytest.raises(SearchError, match='holds no document "nothing"'):
        index.vectors(["nothing"])


def test_what_cannot_be_answered_is_said(index, queries):
    with pytest.raises(SearchError, match='field "weight", which no document of the index has'):
        index.search(queries, 3, filter="weight < 3")
    with pytest.raises(SearchError, match="k is 0"):
        index.search(queries, 0)
    with pytest.raises(SearchError, match="the query has 8 values and the index 16"):
        index.search(queries[:, :8], 3)


def test_threads_get_the_same_answers(index, queries):
    """To rounding: a product of more queries at once may add in another order."""
    expected = index.search(queries, 5, filter="price < 30")
    answers = []
    threads = [
        threading.Thread(
            target=lambda: answers.append(index.search(queries, 5, filter="price < 30"))
        )
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 8
    for answer in answers:
        assert_same_hits(answer, expected)


def assert_same_hits(found, expected):
    """The same documents in the same order, and their scores to rounding."""
    assert [[hit.document for hit in hits] for hits in found] == [
        [hit.document for hit in hits] for hits in expected
    ]
    for hits, same in zip(found, expected, strict=True):
        np.testing.assert_allclose(
            [hit.score for hit in hits], [hit.score for hit in same], rtol=0, atol=1e-6
        )


def test_an_index_of_nothing_finds_nothing(tmp_path, queries):
    write_vectors(tmp_path / "v", np.zeros((0, 16), np.float32), [])
    index = ExactIndex(tmp_path / "v")
    assert index.search(queries, 3) == [[]] * 5
    assert len(index) == 0


def test_an_id_that_two_documents_have_is_refused(tmp_path, vectors, items):
    write_vectors(tmp_path / "v", vectors[:3], [items[0], items[1], items[0]])
    with pytest.raises(SearchError, match='holds 2 documents with the id "id/0"'):
        ExactIndex(tmp_path / "v")


def test_an_address_is_opened_or_refused(folder, tmp_path):
    assert isinstance(open_index(folder), ExactIndex)
    with pytest.raises(SearchError, match="nothing is no index, expected a folder"):
        open_index(tmp_path / "nothing")
    with pytest.raises(VectorsError, match=r"manifest\.json"):
        open_index(tmp_path)


def test_calls_that_wait_share_one_pass_and_get_their_own_answers(index, queries, monkeypatch):
    """Other filters and other k beside, and one that cannot be answered."""
    passes, go = [], threading.Event()

    def slow_top_k(vectors, pool, k):
        go.wait()
        passes.append(len(vectors))
        return top_k(vectors, pool, k)

    calls = [{"k": 1 + n % 5} for n in range(8)] + [{"k": 3, "filter": "price < 20"}] * 3
    expected = [index.search(queries[n % 5 :][:1], **call) for n, call in enumerate(calls)]
    monkeypatch.setattr(exact, "top_k", slow_top_k)
    found = {}

    def ask(n, call):
        found[n] = index.search(queries[n % 5 :][:1], **call)

    threads = [threading.Thread(target=ask, args=each) for each in enumerate(calls)]
    for thread in threads:
        thread.start()
    with pytest.raises(SearchError, match="holds NaN or infinity"):
        index.search(queries * np.float32("nan"), 3)
    while len(index._waiting) < len(calls):
        time.sleep(0.001)
    go.set()
    for thread in threads:
        thread.join()
    assert sum(passes) == len(calls)
    assert len(passes) <= 3  # the first, the others without a filter, those with one
    for n, hits in enumerate(expected):
        assert_same_hits(found[n], hits)
