"""Processes that decode images for the threads of this one.

Threads share one Python interpreter: two of them use two cores, sixteen use about three. Once many
images were read, every thread hands its image to a process of its own, waits, and takes the patches
out of memory that both share. Few images are read by the threads themselves, as are those that are
in memory already, and large ones, whose memory `data.decode` limits over all threads.

The processes import no model and start no JAX backend. They end with this process, however it ends.
`PUMA_JAX_IMAGE_WORKERS` sets their number, 0 for none; the default is one for each core where there
are four or more.
"""

from __future__ import annotations

import atexit
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from multiprocessing import connection
from pathlib import Path

import numpy as np
from PIL import ImageFile

from puma_jax.config import ImageConfig, VisionConfig
from puma_jax.data import images
from puma_jax.data.decode import ImageSource
from puma_jax.data.threads import usable_cores
from puma_jax.errors import ConfigError, WorkerError
from puma_jax.typing import UInt8, ndarray

BUFFER_BYTES = 2**24
"""Memory for the patches of one image; only what is written to takes up any."""
VARIABLE = "PUMA_JAX_IMAGE_WORKERS"
MANY = 256
"""Images after which processes start to read more of them."""
_MANY_CORES = 4

Patches = tuple[UInt8[ndarray, "patches values"], tuple[int, int]]


def read_patches(source: ImageSource, vision: VisionConfig, limits: ImageConfig) -> Patches:
    """Return what `images.read_patches` does, from another process if many images are read.

    Raises:
        ImageError: As of `images.read_patches`.
        WorkerError: The process that read the image has ended.
        ConfigError: `PUMA_JAX_IMAGE_WORKERS` is no number.
    """
    if isinstance(source, str | os.PathLike | bytes):
        found = _pool.read(source, vision, limits)
        if found is not None:
            return found
    return images.read_patches(source, vision, limits)


class Pool:
    """Processes that start when so many images were read, and those of them that are idle."""

    def __init__(self, count: int | None = None, many: int = MANY):
        """Set how many processes there may be, and after how many images they start."""
        self._count, self._many, self._read = count, many, 0
        self._lock = threading.Lock()
        self._starting: list[_Worker] = []
        self._idle: list[_Worker] = []
        self._started = False

    def read(
        self, source: str | os.PathLike[str] | bytes, vision: VisionConfig, limits: ImageConfig
    ) -> Patches | None:
        """Return the patches of an image; None if this thread has to read it itself."""
        with self._lock:
            self._read += 1
            if self._read >= self._many and not self._started:
                self._started = True
                self._starting = [_Worker() for _ in range(self._workers())]
            for worker in [worker for worker in self._starting if worker.is_ready()]:
                self._starting.remove(worker)
                self._idle.append(worker)
            if not self._idle:
                return None
            worker = self._idle.pop()
        try:
            found = worker.ask(source, vision, limits)
        except BaseException:  # an answer that nobody reads would be taken for the next one
            worker.close()
            raise
        with self._lock:
            self._idle.append(worker)
        return found.result()

    @property
    def starting(self) -> int:
        """How many processes have not started yet."""
        return len(self._starting)

    @property
    def idle(self) -> int:
        """How many processes wait for an image."""
        return len(self._idle)

    def close(self) -> None:
        """End the processes."""
        with self._lock:
            for worker in self._starting + self._idle:
                worker.close()
            self._starting, self._idle = [], []

    def forget(self) -> None:
        """Let go of the processes, which are those of the parent of this forked process."""
        for worker in self._starting + self._idle:
            worker.forget()

    def _workers(self) -> int:
        cores = usable_cores()
        if self._count is not None:
            return self._count
        given = os.environ.get(VARIABLE, "")
        if given and not given.isdecimal():
            raise ConfigError(f'{VARIABLE} is "{given}", expected a number of processes or 0')
        return int(given) if given else (cores if cores >= _MANY_CORES else 0)


class Answer:
    """The answer of a process: patches, an error, or neither for an image it does not read."""

    def __init__(self, patches: Patches | None, error: Exception | None, told: list[Warning]):
        self._patches, self._error, self._told = patches, error, told

    def result(self) -> Patches | None:
        """Return the patches, or raise the error; warnings are given here."""
        for message in self._told:
            warnings.warn(message, stacklevel=4)
        if self._error is not None:
            raise self._error
        return self._patches


class _Worker:
    """One process, see `data.image_worker`."""

    def __init__(self) -> None:
        self._connection, theirs = connection.Pipe()
        with tempfile.TemporaryFile() as file:
            # In memory where the system has such files: patches are not to be written to a disk.
            memory = os.memfd_create("patches") if hasattr(os, "memfd_create") else file.fileno()
            os.truncate(memory, BUFFER_BYTES)
            self._buffer = mmap.mmap(memory, BUFFER_BYTES)
            command = [sys.executable, "-P", "-m", "puma_jax.data.image_worker"]
            # No child of `multiprocessing`, which would run the user's script again. In a group of
            # its own, Ctrl-C does not reach it.
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno()), str(memory)],
                pass_fds=(theirs.fileno(), memory),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                process_group=0,
                env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": _search_path()},
            )
            if memory != file.fileno():
                os.close(memory)
        theirs.close()

    def is_ready(self) -> bool:
        """Return whether the process has started."""
        if not self._connection.poll(0):
            return False
        self._receive("started")
        return True

    def ask(
        self, source: str | os.PathLike[str] | bytes, vision: VisionConfig, limits: ImageConfig
    ) -> Answer:
        """Return what the process finds in an image."""
        name = "an image" if isinstance(source, bytes) else os.fspath(source)
        settings = os.getcwd(), ImageFile.LOAD_TRUNCATED_IMAGES
        try:
            self._connection.send((settings, source, vision, limits))
        except OSError as error:
            raise self._ended(f"before it read {name}") from error
        shape, grid, failed, told = self._receive(f"read {name}")
        if shape is None:
            return Answer(None, failed, told)
        patches = np.frombuffer(self._buffer, np.uint8, int(np.prod(shape))).reshape(shape).copy()
        return Answer((patches, grid), None, told)

    def close(self) -> None:
        """End the process, and wait for its end."""
        self._connection.close()
        self._process.terminate()
        self._process.wait()

    def forget(self) -> None:
        """Close what this process has of it."""
        self._connection.close()
        self._process.returncode = 0  # it is no child of ours to wait for

    def _receive(self, doing: str) -> tuple:
        try:
            return self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._ended(f"while it {doing}") from error

    def _ended(self, when: str) -> WorkerError:
        code = self._process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        return WorkerError(
            f"process {self._process.pid}, which decodes images, {how} {when}: if memory ran out, "
            f"set {VARIABLE} to fewer than the cores, or to 0 for none"
        )


def _search_path() -> str:
    """Return where the process finds this package: it does not start in the same folder."""
    ours = str(Path(images.__file__).parents[2])
    return os.pathsep.join(filter(None, [ours, os.environ.get("PYTHONPATH")]))


_pool = Pool()


def _new_pool() -> None:
    global _pool
    _pool.forget()
    _pool = Pool()


atexit.register(lambda: _pool.close())
os.register_at_fork(after_in_child=_new_pool)
