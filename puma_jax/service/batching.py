"""Continuous micro-batching: items of requests that arrive together share a forward pass.

Threads preprocess items, one thread owns the device. It takes all that wait, up to a chunk, packs
them into rows of a shape that was compiled at start, and encodes them. While it works, the next
ones gather. An item that is alone is encoded at once; it waits only while others are preprocessed.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import jax
import numpy as np

from puma_jax.data.items import Item
from puma_jax.data.threads import usable_cores
from puma_jax.embedder import Embedder, RawItem
from puma_jax.errors import EvaluationError, ItemError, LongTextError
from puma_jax.forward import Forward, cheapest_shape, check_vectors
from puma_jax.rows import PackedShape
from puma_jax.service.metrics import Metrics
from puma_jax.service.request_errors import RequestError, overloaded
from puma_jax.service.settings import ServiceConfig
from puma_jax.service.shapes import serving_shapes
from puma_jax.typing import Float, ndarray

_SIDE_OF_WARM_IMAGE = 64
_MEASUREMENTS = 3


@dataclass(frozen=True)
class Encoded:
    """The vectors of the items of a request."""

    vectors: Float[ndarray, "n width"]
    tokens: int
    """Tokens of all items, with prompts and visual tokens."""
    truncated: list[int]
    """Numbers of the items whose text was truncated."""


@dataclass(frozen=True)
class _Waiting:
    """A preprocessed item, and where its vector goes."""

    item: Item
    future: asyncio.Future
    loop: asyncio.AbstractEventLoop


class Batcher:
    """Encodes items of many requests at once. Its methods are called from an event loop."""

    def __init__(self, embedder: Embedder, settings: ServiceConfig, metrics: Metrics):
        """Read the weights; `start` sets the batcher to work.

        Raises:
            CheckpointError: The weights cannot be read.
        """
        self.embedder, self.settings, self.metrics = embedder, settings, metrics
        self._forward = Forward(
            embedder.params, embedder.config.vision, embedder.compute, embedder.mesh
        )
        default = 2048 if jax.default_backend() == "cpu" else 16384
        self.tokens_per_chunk = settings.tokens_per_chunk or default
        most = settings.images_per_item
        self.shapes = serving_shapes(embedder, self.tokens_per_chunk, most)
        self._largest = [embedder.largest_item(images=images) for images in (0, most)]
        self._seconds: dict[PackedShape, float] = {}
        self.ready = threading.Event()
        self.failed = False
        """Whether the device thread has ended early; the log says why."""
        self._pool = ThreadPoolExecutor(usable_cores(), "preprocess")
        self._queue: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._admitted = 0
        self._preprocessing = 0
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)

    def start(self) -> None:
        """Compile all shapes in the thread of the device, then encode; `ready` tells when."""
        self._thread.start()

    def stop(self) -> None:
        """End the threads, once what is being encoded is done."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        self._pool.shutdown(cancel_futures=True)

    async def encode(
        self, items: Sequence[tuple[RawItem, str | None]], *, truncate: bool
    ) -> Encoded:
        """Return the vectors of some items, each with its instruction.

        Cancel the call to withdraw the items that are not yet encoded.

        Args:
            items: Items as `Embedder.preprocess` takes them.
            truncate: Whether to truncate texts of too many tokens, or to refuse them.

        Raises:
            RequestError: The queue has no room for the items, or the service cannot encode.
            ItemError: An item cannot be read; the message names it by its number.
        """
        if self.failed:
            raise RequestError(503, "failed", "the service cannot encode; its log says why")
        if not self.ready.is_set():
            raise RequestError(
                503, "compiling", "programs are being compiled: try again", {"Retry-After": "5"}
            )
        if self._admitted + len(items) > self.settings.max_queue:
            raise overloaded(
                f"{self._admitted} items wait, and {len(items)} more exceed the "
                f"{self.settings.max_queue} that may: try again later"
            )
        self._admitted += len(items)
        self.metrics.waiting.set(self._admitted)
        tasks = [
            asyncio.create_task(self._encode_one(item, instruction, truncate))
            for item, instruction in items
        ]
        try:
            results = await asyncio.gather(*tasks)
        except ItemError as error:
            failed = next(number for number, task in enumerate(tasks) if _has_failed(task))
            raise type(error)(
                f"item {failed}: {error}" if len(items) > 1 else str(error)
            ) from error
        finally:
            for task in tasks:
                task.cancel()
            self._admitted -= len(items)
            self.metrics.waiting.set(self._admitted)
        return Encoded(
            np.stack([vector for vector, _, _ in results]),
            sum(tokens for _, tokens, _ in results),
            [number for number, (_, _, cut) in enumerate(results) if cut],
        )

    async def _encode_one(
        self, raw: RawItem, instruction: str | None, truncate: bool
    ) -> tuple[ndarray, int, bool]:
        """Return the vector of an item, its number of tokens, and whether it was truncated."""
        loop = asyncio.get_running_loop()
        with self._changed:
            self._preprocessing += 1
        waiting = None
        try:
            item, truncated = await loop.run_in_executor(
                self._pool, self._preprocess, raw, instruction, truncate
            )
            waiting = _Waiting(item, loop.create_future(), loop)
        finally:
            with self._changed:
                self._preprocessing -= 1
                if waiting is not None:
                    self._queue.append(waiting)
                self._changed.notify()
        return await waiting.future, len(item.tokens), truncated

    def _preprocess(
        self, raw: RawItem, instruction: str | None, truncate: bool
    ) -> tuple[Item, bool]:
        truncated = False
        try:
            item = self.embedder.preprocess(raw, instruction, truncate=False)
        except LongTextError:
            if not truncate:
                raise
            item, truncated = self.embedder.preprocess(raw, instruction), True
        longest, most_patches = self._largest[len(item.patches) > 0]
        if len(item.patches) > most_patches:
            each = self.embedder.config.patches_per_token
            raise ItemError(
                f"the images of an item have {len(item.patches) // each:,} visual tokens, more "
                f"than the {most_patches // each:,} that are read: send fewer or smaller ones, "
                "or start the service with a larger --service.images-per-item"
            )
        if len(item.tokens) > longest:
            raise LongTextError(
                f"an item has {len(item.tokens):,} tokens with its instruction, more than the "
                f"{longest:,} that are read: shorten the instruction"
            )
        return item, truncated

    def _run(self) -> None:
        """Compile, then encode until the service stops; tell `failed` if that ends early."""
        try:
            self._compile()
            self.ready.set()
            while batch := self._take():
                self._serve(batch)
        except BaseException:  # whatever compiling or running the model trips over
            self.failed = True
            self.ready.set()
            raise

    def _serve(self, batch: list[_Waiting]) -> None:
        """Encode a batch and hand out its vectors, or what went wrong."""
        start = time.perf_counter()
        results: Sequence[ndarray | Exception]
        try:
            results = self._encode_batch([waiting.item for waiting in batch])
        except Exception as error:  # a device that has failed; the next batch may not
            results = [error] * len(batch)
        self.metrics.batch_items.observe(len(batch))
        self.metrics.batch_seconds.observe(time.perf_counter() - start)
        _deliver(batch, results)

    def _compile(self) -> None:
        """Compile the program of every shape, and measure it: the fastest serve what comes."""
        text = self.embedder.preprocess("a")
        gray = np.full((_SIDE_OF_WARM_IMAGE, _SIDE_OF_WARM_IMAGE, 3), 127, np.uint8)
        image = self.embedder.preprocess({"image": gray})
        for shape in self.shapes:
            item = image if shape.patch_rows else text
            if self._stopped:
                return
            seconds = []
            for _ in range(1 + _MEASUREMENTS):
                start = time.perf_counter()
                self._forward.start([item], shape, self.tokens_per_chunk)[1].finish(lambda _: None)
                seconds.append(time.perf_counter() - start)
            self._seconds[shape] = min(seconds[1:])  # the first one compiles

    def _take(self) -> list[_Waiting]:
        """Wait for items, and return as many as one chunk may hold; none if the service stops."""
        batch: list[_Waiting] = []
        while not batch:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._stopped)
                if self._stopped:
                    return []
                # Those that others are about to join wait for them, for a moment.
                self._changed.wait_for(
                    lambda: self._stopped or not self._preprocessing or self._is_full(),
                    self.settings.wait_ms / 1000,
                )
                room = self.tokens_per_chunk
                while self._queue and (not batch or _size(self._queue[0].item) <= room):
                    waiting = self._queue.popleft()
                    if not waiting.future.cancelled():
                        batch.append(waiting)
                        room -= _size(waiting.item)
        return batch

    def _is_full(self) -> bool:
        """Whether the items that wait fill a chunk."""
        sizes = itertools.accumulate(_size(waiting.item) for waiting in self._queue)
        return any(size >= self.tokens_per_chunk for size in sizes)

    def _encode_batch(self, items: Sequence[Item]) -> list[ndarray | Exception]:
        """Return a vector for each item, or the error of those whose vector is not finite."""
        shape = cheapest_shape(items, self._seconds)
        vectors = self._forward.start(items, shape, self.tokens_per_chunk)[1].finish(lambda _: None)
        results: list[ndarray | Exception] = []
        for vector in vectors:
            try:
                check_vectors(vector[None], lambda _: "the item")
                results.append(vector)
            except EvaluationError as error:
                results.append(error)
        return results


def _has_failed(task: asyncio.Task) -> bool:
    return task.done() and not task.cancelled() and task.exception() is not None


def _size(item: Item) -> int:
    """Return how much of a chunk an item takes: tokens or patches, whichever are more."""
    return max(len(item.tokens), len(item.patches))


def _deliver(batch: Sequence[_Waiting], results: Sequence[ndarray | Exception]) -> None:
    """Hand the results of a batch to the event loops that wait for them."""

    def settle(waiting: Sequence[_Waiting], found: Sequence[ndarray | Exception]) -> None:
        for one, result in zip(waiting, found, strict=True):
            if one.future.done():  # cancelled meanwhile
                continue
            if isinstance(result, Exception):
                one.future.set_exception(result)
            else:
                one.future.set_result(result)

    for loop in {waiting.loop for waiting in batch}:
        mine = [number for number, waiting in enumerate(batch) if waiting.loop is loop]
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, [batch[n] for n in mine], [results[n] for n in mine])
