import tracemalloc
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puma_jax.errors import ConfigError, EvaluationError
from puma_jax.search import topk
from puma_jax.search.topk import top_k
from tests.reference import assert_full_precision

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # SWIG's types have no modules
    import faiss

# NumPy, one device, eight devices.
PLACES = [None, 1, 8]
everywhere = pytest.mark.parametrize("devices", PLACES, ids=["numpy", "one", "eight"])


def search(queries, pool, k, devices):
    return top_k(queries, pool, k, devices=devices and jax.devices()[:devices])


def unit(seed, shape):
    vectors = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def whole_numbers(seed, shape):
    """Vectors whose products are exact and often equal."""
    return np.random.default_rng(seed).integers(-3, 4, shape).astype(np.float32)


def brute_force(queries, pool, k):
    scores = queries.astype(np.float64) @ pool.astype(np.float64).T
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, rows, 1), rows


def in_parts(pool, size):
    return (pool[start : start + size] for start in range(0, len(pool), size))


@everywhere
def test_finds_what_faiss_finds(devices):
    queries, pool = unit(0, (70, 48)), unit(1, (40_000, 48))
    index = faiss.IndexFlatIP(48)
    index.add(pool)
    expected_scores, expected_rows = index.search(queries, 50)
    scores, rows = search(queries, pool, 50, devices)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-6)
    # Rows may only differ where float32 cannot tell the scores apart.
    theirs = np.take_along_axis(queries @ pool.T, expected_rows, 1)
    ours = np.take_along_axis(queries @ pool.T, rows, 1)
    assert (rows == expected_rows).mean() > 0.999
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_eight_devices_find_what_one_finds():
    queries, pool = unit(0, (40, 64)), unit(1, (50_000, 64))
    for eight, one in zip(search(queries, pool, 20, 8), search(queries, pool, 20, 1), strict=True):
        np.testing.assert_array_equal(eight, one)


@everywhere
@pytest.mark.parametrize("size", [None, 1, 777, 30_000])
def test_equal_scores_are_in_the_order_of_rows(devices, size):
    rows_of_pool = 1000 if size == 1 else 40_000
    queries, pool = whole_numbers(0, (33, 6)), whole_numbers(1, (rows_of_pool, 6))
    expected_scores, expected_rows = brute_force(queries, pool, 60)
    scores, rows = search(queries, pool if size is None else in_parts(pool, size), 60, devices)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_array_equal(scores, expected_scores)


@everywhere
def test_the_worst_order_is_no_problem(devices):
    """Each document is better than all before it."""
    pool = np.arange(20_000, dtype=np.float32)[:, None]
    _, rows = search(np.ones((2, 1), np.float32), pool, 3, devices)
    assert rows.tolist() == [[19_999, 19_998, 19_997]] * 2


@everywhere
def test_more_queries_than_are_searched_at_once(devices, monkeypatch):
    monkeypatch.setattr(topk, "_QUERIES", 16)
    queries, pool = whole_numbers(0, (37, 6)), whole_numbers(1, (5000, 6))
    np.testing.assert_array_equal(
        search(queries, pool, 7, devices)[1], brute_force(queries, pool, 7)[1]
    )


@everywhere
def test_a_small_pool_leaves_places_empty(devices):
    scores, rows = search(np.ones((2, 4), np.float32), np.ones((3, 4), np.float32), 5, devices)
    assert rows.tolist() == [[0, 1, 2, -1, -1]] * 2
    assert scores.tolist() == [[4, 4, 4, -np.inf, -np.inf]] * 2


@everywhere
def test_an_empty_pool_and_no_queries(devices):
    some, none = np.ones((2, 4), np.float32), np.zeros((0, 4), np.float32)
    for empty in (none, iter([])):
        scores, rows = search(some, empty, 2, devices)
        assert rows.tolist() == [[-1, -1]] * 2
        assert np.isneginf(scores).all()
    assert search(none, some, 2, devices)[1].shape == (0, 2)


@everywhere
def test_bfloat16_vectors_have_float32_scores(devices):
    queries = jnp.asarray(unit(0, (9, 256)), jnp.bfloat16)
    pool = np.asarray(jnp.asarray(unit(1, (3000, 256)), jnp.bfloat16))
    wide = np.asarray(queries, np.float32), pool.astype(np.float32)
    expected, _ = brute_force(*wide, 20)
    for vectors in (queries, wide[0]):  # of both kinds, and of one
        scores, _ = search(vectors, pool, 20, devices)
        assert scores.dtype == np.float32
        np.testing.assert_allclose(scores, expected, atol=1e-6)


def test_a_file_is_searched_as_an_array_is(tmp_path):
    pool = whole_numbers(1, (9000, 6))
    file = np.memmap(tmp_path / "pool", np.float32, "w+", shape=pool.shape)
    file[:] = pool
    queries = whole_numbers(0, (5, 6))
    np.testing.assert_array_equal(top_k(queries, file, 9)[1], top_k(queries, pool, 9)[1])


def test_memory_does_not_grow_with_the_pool():
    queries, part = unit(0, (64, 32)), unit(1, (5000, 32))

    def peak(parts):
        tracemalloc.start()
        top_k(queries, (part + 0 for _ in range(parts)), 10)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    assert peak(40) < 1.1 * peak(4)


@pytest.mark.parametrize("devices", [1, 8])
def test_devices_are_not_given_the_whole_pool(devices, monkeypatch):
    monkeypatch.setattr(topk, "_DEVICE_TILE", 1024)
    queries, part = unit(0, (8, 32)), unit(1, (1024, 32))
    given, done, waiting = [], [], []

    def wait(results, wait=jax.block_until_ready):
        done.append(results)
        return wait(results)

    def parts():
        for _ in range(60):
            waiting.append(len(given) - len(done))
            given.append(part)
            yield part

    monkeypatch.setattr(jax, "block_until_ready", wait)
    search(queries, parts(), 5, devices)
    # Each device searches one tile and has another one waiting.
    assert max(waiting) == 2 * devices


@everywhere
def test_nothing_moves_to_devices_by_accident(devices):
    queries, pool = unit(0, (8, 16)), unit(1, (20_000, 16))
    with jax.transfer_guard("disallow"):
        assert search(queries, pool, 5, devices)[1].shape == (8, 5)


def test_what_cannot_be_searched_is_said_in_a_line():
    vectors = np.ones((2, 4), np.float32)
    with pytest.raises(ConfigError, match="k is 0, expected at least 1"):
        top_k(vectors, vectors, 0)
    with pytest.raises(ConfigError, match="queries have 4 values and documents 3: embed both"):
        top_k(vectors, iter([vectors[:, :3]]), 1)


@pytest.mark.parametrize("devices", [None, 2])
def test_documents_that_are_not_numbers_are_named(devices):
    queries = np.eye(3, 8, dtype=np.float32)
    pool = np.random.default_rng(0).standard_normal((5000, 8)).astype(np.float32)
    for value in (np.nan, np.inf):
        pool[4321, 1] = value
        some = devices and jax.devices()[:devices]
        with pytest.raises(EvaluationError, match=r"score of document 4321 is not a finite number"):
            top_k(queries, pool, 5, devices=some)


def test_float32_keeps_its_bits_on_devices():
    queries, tile = unit(0, (3, 16)), unit(1, (256, 16))
    best = np.zeros((3, 5), np.float32), np.zeros((3, 5), np.int32)
    lowered = topk._better.lower(*best, queries, tile, np.array([0, 256], np.int32))
    assert_full_precision(lowered.as_text())
