"""Processes that decode images for this one.

Threads share one Python interpreter: two of them use two cores, sixteen use about three. Once many
images were read, groups of them are handed to processes, which put the patches into memory that
both sides share. A process has two groups, so that it never waits for the next one. Few images are
read by the threads of this process, as are those that are in memory already, and large ones, whose
memory `data.decode` limits over all threads.

The processes import no model and start no JAX backend. They end with this process, however it ends.
`PUMA_JAX_IMAGE_WORKERS` sets their number, 0 for none; the default is one for each core where there
are four or more.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Executor
from multiprocessing import connection

from puma_jax.data.image_process import (
    GROUPS_SENT,
    VARIABLE,
    Group,
    ImageRequest,
    Patches,
    Worker,
)
from puma_jax.data.threads import usable_cores
from puma_jax.errors import ConfigError

GROUP = 8
"""Images that are handed to a process together."""
MANY = 256
"""Images after which processes start to read more of them."""
_MANY_CORES = 4


class Pool:
    """Processes that start when so many images were read."""

    def __init__(self, count: int | None = None, many: int = MANY):
        """Set how many processes there may be, and after how many images they start."""
        self._count, self._many, self._read = count, many, 0
        self._lock = threading.Lock()
        self._workers: list[Worker] | None = None

    def begin(self, group: Sequence[ImageRequest], left: Executor | None = None) -> Group | None:
        """Hand images to a process; return None if this one has to read them itself.

        It waits while every process has two groups already.

        Args:
            group: Images that are files.
            left: Reads what the process leaves to this one, large images above all, as soon as
                that is known; None for the thread that asks for them.

        Raises:
            WorkerError: The process has ended.
            ConfigError: `PUMA_JAX_IMAGE_WORKERS` is no number.
        """
        with self._lock:
            self._read += len(group)
            if self._read >= self._many and self._workers is None:
                self._workers = [Worker() for _ in range(self._number())]
            running = self._running()
        if not running or not group:
            return None
        return _least_busy(running).begin(group, left)

    def read(self, image: ImageRequest) -> Patches:
        """Return the patches of an image, which a process reads if there are any.

        Raises:
            ImageError: As of `images.read_patches`.
            WorkerError: The process that read the image has ended.
            ConfigError: `PUMA_JAX_IMAGE_WORKERS` is no number.
        """
        group = self.begin([image]) if image.is_file else None
        return image.read() if group is None else group.result(0)

    @property
    def starting(self) -> int:
        """How many processes have not started yet."""
        return sum(not worker.is_over for worker in self._workers or ()) - self.running

    @property
    def running(self) -> int:
        """How many processes read images."""
        with self._lock:
            return len(self._running())

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers or ():
            worker.close()

    def forget(self) -> None:
        """Let go of the processes, which are those of the parent of this forked process."""
        for worker in self._workers or ():
            worker.forget()

    def _running(self) -> list[Worker]:
        return [worker for worker in self._workers or () if worker.is_running()]

    def _number(self) -> int:
        cores = usable_cores()
        if self._count is not None:
            return self._count
        given = os.environ.get(VARIABLE, "")
        if given and not given.isdecimal():
            raise ConfigError(f'{VARIABLE} is "{given}", expected a number of processes or 0')
        return int(given) if given else (cores if cores >= _MANY_CORES else 0)


def _least_busy(workers: Sequence[Worker]) -> Worker:
    """Return the process with the fewest groups; wait while all have as many as they may."""
    while True:
        for worker in workers:
            worker.take_answers()
        free = min(workers, key=lambda worker: worker.groups)
        if free.groups < GROUPS_SENT:
            return free
        # Another thread may have taken the answers meanwhile.
        connection.wait([worker.connection for worker in workers], timeout=0.1)


def pool() -> Pool:
    """Return the processes of this one."""
    return _pool


_pool = Pool()


def _new_pool() -> None:
    global _pool
    _pool.forget()
    _pool = Pool()


atexit.register(lambda: _pool.close())
os.register_at_fork(after_in_child=_new_pool)
