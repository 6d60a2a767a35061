"""Smaller vectors find what faiss and Sentence Transformers find with them."""

import faiss
import numpy as np
import pytest
from sentence_transformers.util import quantize_embeddings

from puma_jax.data import mbeir
from puma_jax.errors import ConfigError
from puma_jax.evaluation.evaluation import embed_selection
from puma_jax.evaluation.selection import select
from puma_jax.evaluation.sizes import Size, _Search, evaluate_sizes, sizes_of
from puma_jax.progress import Progress
from puma_jax.search.quantize import from_bits, from_int8, quantize, to_bits, to_int8
from tests.evaluation.small import document, write_set

QUERIES, POOL, WIDTH = 40, 300, 60


def vectors_of(items):
    """Unit vectors of the numbers in texts; a query lies near the document of its number."""
    rows = []
    for item in items:
        kind, number = item["text"].split()[-2:]
        rng = np.random.default_rng(int(number.rstrip(".")))
        vector = rng.normal(size=WIDTH)
        noise = np.random.default_rng(1000 + int(number.rstrip("."))).normal(size=WIDTH)
        rows.append(vector + (1.5 * noise if kind == "query" else 0))
    vectors = np.array(rows, np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    queries = {f"q:{n}": (f"query {n}", [f"d:{n}"]) for n in range(QUERIES)}
    pool = [document(f"d:{n}", f"document {n}") for n in range(POOL)]
    pool.append(document("d:twin", "document 7"))
    return write_set(tmp_path_factory.mktemp("benchmark"), "mine", 1, queries, pool)


@pytest.fixture(scope="module")
def embedded(root):
    return embed_selection(select(mbeir.discover(root), "test"), vectors_of, progress=False)


def shortened(vectors, dimensions):
    first = vectors[:, :dimensions]
    return first / np.linalg.norm(first, axis=1, keepdims=True)


def found_by(embedded, size, depth=10, multiplier=4):
    search = _Search(embedded, size, multiplier)
    with Progress(total=None, disable=True) as bar:
        return search(slice(None), embedded.pool, depth, bar)


@pytest.fixture(scope="module")
def arrays(embedded):
    """Queries and the documents of the pool, every one with its own vector."""
    selection = embedded.selection
    return embedded.queries, embedded.documents[selection.representative[embedded.pool]]


@pytest.mark.parametrize("dimensions", [WIDTH, 24])
def test_int8_finds_what_numpy_finds_with_rounded_documents(embedded, arrays, dimensions):
    queries, documents = (shortened(one, dimensions) for one in arrays)
    scales = np.abs(documents).max(1, keepdims=True)
    rounded = np.rint(documents.astype(np.float64) / scales * 127) * scales / 127
    scores = queries @ rounded.T
    found = found_by(embedded, Size("int8", dimensions))
    np.testing.assert_allclose(found.scores, -np.sort(-scores)[:, :10], atol=1e-6)
    places = np.argsort(embedded.pool)[np.searchsorted(np.sort(embedded.pool), found.rows)]
    np.testing.assert_allclose(np.take_along_axis(scores, places, 1), found.scores, atol=1e-6)


@pytest.mark.parametrize("dimensions", [WIDTH, 24])
def test_bits_find_the_distances_that_faiss_finds(embedded, arrays, dimensions):
    queries, documents = (
        quantize_embeddings(shortened(one, dimensions), "ubinary") for one in arrays
    )
    index = faiss.IndexBinaryFlat(8 * documents.shape[1])
    index.add(documents)
    distances, _ = index.search(queries, 10)
    found = found_by(embedded, Size("ubinary", dimensions))
    np.testing.assert_array_equal((dimensions - found.scores) / 2, distances)


@pytest.mark.parametrize("rescored", ["bits", "float32"])
def test_rescored_documents_are_the_best_of_the_nearest_by_bits(embedded, arrays, rescored):
    size = Size("ubinary", WIDTH, rescored)
    nearest = found_by(embedded, Size("ubinary", WIDTH), depth=40)
    found = found_by(embedded, size)
    queries, documents = arrays
    compared = documents.astype(np.float64)
    if rescored == "bits":
        compared = np.where(documents > 0, 1, -1) / np.sqrt(WIDTH)
    scores = queries.astype(np.float64) @ compared.T
    place_of = {row: place for place, row in enumerate(embedded.pool.tolist())}
    for query in range(QUERIES):
        near = nearest.rows[query].tolist()
        order = sorted(near, key=lambda row: (-np.float32(scores[query, place_of[row]]), row))
        assert found.rows[query].tolist() == order[:10]


def test_float32_of_all_values_is_the_evaluation_itself(embedded):
    whole = embedded.evaluate(progress=False)
    found = evaluate_sizes(embedded, sizes_of((), (), WIDTH), progress=False)
    assert [*found.values()] == [whole]


def test_quantized_vectors_are_those_of_sentence_transformers(arrays):
    documents = arrays[1]
    for precision in ("binary", "ubinary"):
        np.testing.assert_array_equal(
            quantize(documents, precision), quantize_embeddings(documents, precision)
        )
        assert quantize(documents, precision).dtype == (np.int8 if precision == "binary" else "u1")
    steps, scales = to_int8(documents)
    assert np.abs(steps).max(1).tolist() == [127] * len(documents)
    assert np.abs(from_int8(steps, scales) - documents).max() <= scales.max() / 254 * 1.001
    np.testing.assert_array_equal(quantize(documents, "uint8"), steps.astype(int) + 128)
    bits = from_bits(to_bits(documents), WIDTH)
    np.testing.assert_allclose(np.linalg.norm(bits, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(bits > 0, documents > 0)
    zero = np.zeros((1, 8), np.float32)
    np.testing.assert_array_equal(from_int8(*to_int8(zero)), zero)


def test_sizes_that_the_model_lacks_are_refused(embedded):
    for dimensions in (0, WIDTH + 1):
        with pytest.raises(ConfigError, match=rf"dimensions {dimensions} must be in \[1, {WIDTH}"):
            sizes_of(("int8",), (dimensions,), WIDTH)
