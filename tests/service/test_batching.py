"""Vectors are those of `Embedder.encode`, whatever arrives together, and nothing compiles late."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest

from puma_jax.config import ImageConfig
from puma_jax.data.images import most_patches, patch_counts
from puma_jax.errors import ImageError
from puma_jax.forward import cheapest_shape
from puma_jax.service.batching import Batcher
from puma_jax.service.metrics import Metrics, compilation_count
from puma_jax.service.request_errors import RequestError
from puma_jax.service.settings import ServiceConfig
from puma_jax.service.shapes import serving_shapes
from tests.reference import VISION
from tests.service.serving import COLORS, picture


def mixed_items(count: int, seed: int = 0) -> list[dict]:
    """Texts of all lengths, images of many sizes, and both."""
    rng = np.random.default_rng(seed)
    items = []
    for number in range(count):
        words = "".join(rng.choice(list("abc def"), rng.integers(1, 100)))
        size = tuple(rng.integers(20, 130, 2).tolist())
        image = picture(rng.choice(list(COLORS)), size)
        text = {"text": f"no. {number} {words}"}
        items.append([text, {"image": image}, {**text, "image": image}][number % 3])
    return items


@pytest.fixture
def batcher(embedder):
    made = Batcher(embedder, ServiceConfig(tokens_per_chunk=256), Metrics())
    made.start()
    made.ready.wait()
    yield made
    made.stop()


def test_vectors_are_those_of_encode_whatever_arrives_together(batcher, embedder):
    items = mixed_items(60)
    expected = embedder.encode(items, instruction="Find it.", progress=False)
    compiled = compilation_count()()

    async def all_at_once(groups):
        tasks = [batcher.encode([(item, "Find it.") for item in group], truncate=False)
                 for group in groups]  # fmt: skip
        return np.concatenate([found.vectors for found in await asyncio.gather(*tasks)])

    one_by_one = [asyncio.run(all_at_once([[item]])) for item in items[:12]]
    np.testing.assert_allclose(np.concatenate(one_by_one), expected[:12], rtol=0, atol=1e-6)
    for size in (1, 7, 60):
        groups = [items[start : start + size] for start in range(0, 60, size)]
        found = asyncio.run(all_at_once(groups))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert compilation_count()() == compiled


def test_items_that_arrive_together_share_a_forward_pass(batcher):
    async def together():
        tasks = [batcher.encode([({"text": f"no. {n}"}, None)], truncate=False) for n in range(12)]
        await asyncio.gather(*tasks)

    asyncio.run(together())
    count = batcher.metrics.registry.get_sample_value("puma_batch_items_count")
    total = batcher.metrics.registry.get_sample_value("puma_batch_items_sum")
    assert total == 12
    assert count <= 6


@pytest.mark.parametrize("tokens", [128, 256, 2048, 16384])
def test_every_item_fits_into_a_shape_that_is_compiled(embedder, tokens):
    shapes = serving_shapes(embedder, tokens)
    assert len(shapes) <= 24
    for image in (False, True):
        length, patches = embedder.largest_item(images=int(image))
        assert any(
            shape.length >= length and bool(shape.patch_rows) == image
            and shape.patch_length >= patches for shape in shapes
        )  # fmt: skip
    twice = embedder.largest_item(images=2)
    most = max(serving_shapes(embedder, tokens, 2), key=lambda shape: shape.patch_length)
    assert (most.length >= twice[0], most.patch_length >= twice[1]) == (True, True)
    long, thin = {"text": "word " * 500}, np.zeros((20, 4000, 3), np.uint8)
    for item in (long, {"image": thin}, {**long, "image": thin}):
        with pytest.warns() if "text" in item else contextlib.nullcontext():
            prepared = small(embedder).preprocess(item)
        assert cheapest_shape([prepared], dict.fromkeys(shapes, 1.0)) in shapes


def small(embedder):
    """The same model, whose processor has not warned yet."""
    return embedder.keep_layers(embedder.config.decoder.layers)


@pytest.mark.parametrize("limits", [(4, 300), (1, 2), (4, 16), (50, 50), (1, 1)])
@pytest.mark.parametrize("stride", [1, 2])
def test_no_image_has_more_patches_than_the_bound(limits, stride):
    least, most = (28**2 * area for area in limits)
    config = ImageConfig(min_pixels=least, max_pixels=most, spatial_pool_stride=stride)
    rng = np.random.default_rng(0)
    heights = np.rint(np.exp(rng.uniform(0, np.log(5000), 20_000))).astype(int)
    widths = np.rint(np.clip(heights * np.exp(rng.uniform(-5.29, 5.29, 20_000)), 1, None))
    widths = widths.astype(int)
    fine = np.maximum(heights, widths) <= 200 * np.minimum(heights, widths)
    counts = patch_counts(heights[fine], widths[fine], VISION, config)
    assert counts.max() <= most_patches(VISION, config)


def test_an_item_that_cannot_be_read_is_named_and_spares_other_requests(batcher):
    async def ask():
        bad = [({"text": "a"}, None), ({"image": b"no image"}, None)]
        return await asyncio.gather(
            batcher.encode(bad, truncate=False),
            batcher.encode([({"text": "b"}, None)], truncate=False),
            return_exceptions=True,
        )

    failed, fine = asyncio.run(ask())
    assert isinstance(failed, ImageError)
    assert str(failed).startswith("item 1: image cannot be decoded")
    assert fine.vectors.shape == (1, 64)


def test_requests_beyond_the_queue_are_refused_and_the_rest_are_served(embedder):
    batcher = Batcher(
        embedder, ServiceConfig(max_queue=8, max_items=8, tokens_per_chunk=256), Metrics()
    )
    batcher.ready.set()  # nothing is encoded yet

    async def ask():
        waiting = [
            asyncio.create_task(batcher.encode([({"text": "a"}, None)] * 4, truncate=False))
            for _ in range(2)
        ]
        await asyncio.sleep(0)
        with pytest.raises(RequestError, match="8 items wait, and 1 more exceed the 8") as caught:
            await batcher.encode([({"text": "b"}, None)], truncate=False)
        assert caught.value.status == 429
        assert caught.value.headers["Retry-After"]
        batcher.start()
        return await asyncio.gather(*waiting)

    assert [found.vectors.shape for found in asyncio.run(ask())] == [(4, 64)] * 2
    assert batcher.metrics.registry.get_sample_value("puma_items_waiting") == 0
    batcher.stop()


def test_items_of_a_client_that_has_left_are_not_encoded(embedder):
    batcher = Batcher(embedder, ServiceConfig(tokens_per_chunk=256), Metrics())
    batcher.ready.set()

    async def ask():
        gone = asyncio.create_task(batcher.encode([({"text": "gone"}, None)] * 5, truncate=False))
        await asyncio.sleep(0.3)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        stays = asyncio.create_task(batcher.encode([({"text": "stays"}, None)], truncate=False))
        await asyncio.sleep(0.1)
        batcher.start()
        await stays

    asyncio.run(ask())
    assert batcher.metrics.registry.get_sample_value("puma_batch_items_sum") == 1
    batcher.stop()


def test_parallel_clients_get_their_own_vectors(live, embedder):
    texts = [f"text no. {number}" for number in range(40)]
    expected = embedder.encode(texts, progress=False)

    def ask(text: str) -> list[float]:
        answer = live.post("/v1/embeddings", {"input": text})
        return answer.json()["data"][0]["embedding"]

    with ThreadPoolExecutor(16) as pool:
        found = np.array(list(pool.map(ask, texts)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_a_client_that_leaves_takes_its_items_along(live, monkeypatch):
    """The device is held meanwhile, so that the items are still waiting."""
    held = threading.Event()
    original = live.service.batcher._encode_batch

    def slow(items):
        held.wait(10)
        return original(items)

    monkeypatch.setattr(live.service.batcher, "_encode_batch", slow)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{live.url}/v1/embeddings", json={"input": ["a"] * 20}, timeout=0.5)
    deadline = time.monotonic() + 5
    while live.service.batcher._admitted and time.monotonic() < deadline:
        time.sleep(0.02)
    assert live.service.batcher._admitted == 0
    held.set()
    assert live.post("/v1/embeddings", {"input": "b"}).status_code == 200
