"""Items are prepared ahead of use: by threads, or around processes that read their images.

Code that prepares an item is a coroutine, which awaits `read_patches` where it needs images. That
leaves open who reads them: the thread that runs it, or, once there are processes for it
(`data.image_workers`), one of these, while this thread goes on with other items.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, Generic, NamedTuple, TypeVar

from puma_jax.config import ImageConfig, VisionConfig
from puma_jax.data import image_workers
from puma_jax.data.decode import ImageSource
from puma_jax.data.image_process import GROUPS_SENT, ImageRequest, Patches
from puma_jax.data.image_workers import GROUP
from puma_jax.data.threads import AHEAD, executor

T = TypeVar("T")
U = TypeVar("U")


class _Images(NamedTuple):
    """Images whose patches a coroutine awaits."""

    images: Sequence[ImageRequest]

    def __await__(self) -> Generator[_Images, list[Patches], list[Patches]]:
        return (yield self)

    def read(self) -> list[Patches]:
        """Read them one after the other, in processes if there are any."""
        pool = image_workers.pool()
        return [pool.read(image) for image in self.images]


Preparing = Coroutine[_Images, Any, U]
"""A coroutine that prepares an item."""


async def read_patches(
    sources: Iterable[ImageSource], vision: VisionConfig, limits: ImageConfig
) -> list[Patches]:
    """Return the patches of images and their grids, see `images.patchify`.

    Raises:
        ImageError: As of `images.read_patches`, for the first image that cannot be read.
        WorkerError: The process that read an image has ended.
        ConfigError: `PUMA_JAX_IMAGE_WORKERS` is no number.
    """
    images = [ImageRequest(source, vision, limits) for source in sources]
    return await _Images(images) if images else []


def run(coroutine: Preparing[U]) -> U:
    """Return the result of a coroutine, whose images are read when it awaits them."""
    try:
        images = coroutine.send(None)
    except StopIteration as end:
        return end.value
    return _resume(coroutine, images, images.read)


def prepare(
    function: Callable[[T], Preparing[U]], items: Iterable[T], *, waits: bool = False
) -> Iterator[U]:
    """Yield the result of a coroutine for each item, in order, made ahead of use.

    At least 64 items are under way, so items are read a little early. The first error in the order
    of the items is raised, and what was not begun is dropped.

    Args:
        function: Returns the coroutine of an item, which must not wait for `prepare` or
            `in_threads`: all threads could come to wait.
        items: Read as they are needed.
        waits: Whether the coroutines wait for something besides images, such as files of a bucket.
            Threads run them then.
    """
    ahead: _Ahead[Any] = _Ahead(waits)
    try:
        for item in items:
            ahead.begin(function, item)
            if len(ahead) > max(AHEAD, ahead.most):
                yield ahead.next()
        while len(ahead):
            yield ahead.next()
    finally:
        ahead.cancel()


class _Ahead(Generic[U]):
    """Items under way, in order."""

    def __init__(self, waits: bool):
        """Set whether threads run the coroutines, whoever reads the images."""
        self._pool, self._waits = image_workers.pool(), waits
        self._waiting: deque[Future[U] | _Begun[U]] = deque()
        self._unsent: list[_Begun[U]] = []
        self.most = 0
        """Number of items that keeps all processes at work."""

    def __len__(self) -> int:
        return len(self._waiting)

    def begin(self, function: Callable[[T], Preparing[U]], item: T) -> None:
        """Begin an item: in a thread, or here as far as its images, if processes read them."""
        running = 0 if self._waits else self._pool.running
        self.most = (GROUPS_SENT * running + 1) * GROUP if running else 0
        if running:
            self._waiting.append(self._begun(function(item)))
        else:
            self._waiting.append(executor().submit(lambda: run(function(item))))
        if sum(len(one.images.images) for one in self._unsent) >= GROUP:
            self._send()

    def _begun(self, coroutine: Preparing[U]) -> Future[U] | _Begun[U]:
        done = Future[U]()
        try:
            images = coroutine.send(None)
        except StopIteration as end:
            done.set_result(end.value)
        except Exception as error:
            done.set_exception(error)
        else:
            if not all(image.is_file for image in images.images):
                return executor().submit(_resume, coroutine, images, images.read)
            self._unsent.append(_Begun(coroutine, images))
            return self._unsent[-1]
        return done

    def next(self) -> U:
        """Return the result that is next."""
        item = self._waiting.popleft()
        if item in self._unsent:
            self._send()
        return item.result()

    def cancel(self) -> None:
        """Drop what is left."""
        for item in self._waiting:
            item.cancel()

    def _send(self) -> None:
        """Hand images that wait for it to processes."""
        places = [(one, image) for one in self._unsent for image in one.images.images]
        self._unsent.clear()
        for start in range(0, len(places), GROUP):
            some = places[start : start + GROUP]
            group = self._pool.begin([image for _, image in some], executor())
            for number, (one, image) in enumerate(some):
                read = image.read if group is None else functools.partial(group.result, number)
                one.reads.append(read)


class _Begun(Generic[U]):
    """A coroutine that awaits images, which processes read."""

    def __init__(self, coroutine: Preparing[U], images: _Images):
        """Note what it awaits."""
        self.coroutine, self.images = coroutine, images
        self.reads: list[Callable[[], Patches]] = []
        """Functions that return the patches of each image; none before they are sent."""

    def result(self) -> U:
        """Return the result, once the images are there."""
        return _resume(self.coroutine, self.images, lambda: [read() for read in self.reads])

    def cancel(self) -> None:
        """Drop it."""
        self.coroutine.close()


def _resume(coroutine: Preparing[U], images: _Images, read: Callable[[], list[Patches]]) -> U:
    """Answer what a coroutine awaits, to its end, and return its result."""
    while True:
        try:
            try:
                patches = read()
            except Exception as error:
                images = coroutine.throw(error)
            else:
                images = coroutine.send(patches)
        except StopIteration as end:
            return end.value
        read = images.read
