"""A process that decodes images, as this one sees it: groups go there, patches come back.

What runs there is `data.image_worker`.
"""

from __future__ import annotations

import functools
import mmap
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ImageFile

from puma_jax.config import ImageConfig, VisionConfig
from puma_jax.data import images
from puma_jax.data.decode import ImageSource
from puma_jax.errors import WorkerError
from puma_jax.typing import UInt8, ndarray

BUFFER_BYTES = 2**25
"""Memory for the patches of a group; only what is written to takes up any."""
GROUPS_SENT = 2
"""Groups that a process has to read at most."""
VARIABLE = "PUMA_JAX_IMAGE_WORKERS"
"""Environment variable with the number of processes."""

Patches = tuple[UInt8[ndarray, "patches values"], tuple[int, int]]


class ImageRequest(NamedTuple):
    """An image to be read."""

    source: ImageSource
    vision: VisionConfig
    limits: ImageConfig

    def read(self) -> Patches:
        """Return its patches and their grid, read by this thread; see `images.read_patches`."""
        return images.read_patches(*self)

    @property
    def is_file(self) -> bool:
        """Whether a process can read it: a path, or the bytes of a file."""
        return isinstance(self.source, str | os.PathLike | bytes)

    @property
    def name(self) -> str:
        """Its path, or "an image"."""
        return "an image" if isinstance(self.source, bytes) else str(self.source)


class Group:
    """Images that a process reads together."""

    def __init__(self, worker: Worker, members: Sequence[ImageRequest], left: Executor | None):
        """Note who reads them; see `Pool.begin`."""
        self.members = members
        self.answers: list[Answer] = []
        self._worker, self._left = worker, left

    def result(self, number: int) -> Patches:
        """Return the patches of one of the images, once they are there.

        Raises:
            ImageError: As of `images.read_patches`.
            WorkerError: The process has ended.
        """
        if not self.answers:
            self._worker.wait_for(self)
        return self.answers[number].result()

    def answer(self, answers: Sequence[Answer | None]) -> None:
        """Take the answers of the process, None for an image that it leaves to this one."""
        self.answers = [
            self._own(member) if answer is None else answer
            for member, answer in zip(self.members, answers, strict=True)
        ]

    def _own(self, member: ImageRequest) -> Answer:
        read = self._left.submit(member.read).result if self._left is not None else member.read
        return Answer(read)


class Answer:
    """Patches of an image, or an error, with the warnings that came with either."""

    def __init__(self, result: Callable[[], Patches], told: Sequence[Warning] = ()):
        """Set what returns or raises it."""
        self._result, self._told = result, told

    def result(self) -> Patches:
        """Return the patches, or raise the error; warnings are given here."""
        for message in self._told:
            warnings.warn(message, stacklevel=4)
        return self._result()


class Worker:
    """One process, see `data.image_worker`."""

    def __init__(self) -> None:
        self.connection, theirs = Pipe()
        size = GROUPS_SENT * BUFFER_BYTES
        with tempfile.TemporaryFile() as file:
            # In memory where the system has such files: patches are not to be written to a disk.
            memory = os.memfd_create("patches") if hasattr(os, "memfd_create") else file.fileno()
            os.truncate(memory, size)
            self._buffer = mmap.mmap(memory, size)
            command = [sys.executable, "-P", "-m", "puma_jax.data.image_worker"]
            # No child of `multiprocessing`, which would run the user's script again. In a group of
            # its own, Ctrl-C does not reach it.
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno()), str(memory), str(BUFFER_BYTES)],
                pass_fds=(theirs.fileno(), memory),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                process_group=0,
                env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": _search_path()},
            )
            if memory != file.fileno():
                os.close(memory)
        theirs.close()
        self._lock = threading.Lock()
        self._sent: deque[Group] = deque()
        self._has_started = False
        self.is_over = False

    @property
    def groups(self) -> int:
        """How many groups the process has to read."""
        return len(self._sent)

    def is_running(self) -> bool:
        """Return whether the process has started, and has not ended."""
        if not self._has_started and not self.is_over and self.connection.poll(0):
            self._has_started = True
            try:
                self.connection.recv()
            except (EOFError, OSError) as error:
                raise self._ended("while it started") from error
        return self._has_started and not self.is_over

    def begin(self, members: Sequence[ImageRequest], left: Executor | None) -> Group:
        """Send images, once there is room for their patches."""
        group = Group(self, members, left)
        settings = os.getcwd(), ImageFile.LOAD_TRUNCATED_IMAGES
        # Not `send`: the error of a broken pipe would keep its buffer, in a cycle that crashes the
        # garbage collector of Python 3.12.1.
        message = pickle.dumps((settings, [tuple(member) for member in members]))
        with self._lock:
            while len(self._sent) >= GROUPS_SENT:
                self._receive()
            self._sent.append(group)
            try:
                self.connection.send_bytes(message)
            except OSError as error:
                ended = self._ended(f"before it read {members[0].name}")
                self._fail(ended)
                raise ended from error
            except BaseException:  # what was sent in part can be followed by nothing
                self._fail(self._closed())
                raise
        return group

    def take_answers(self) -> None:
        """Receive the answers that are there, unless another thread waits for them."""
        if self._lock.acquire(blocking=False):
            try:
                while self._sent and self.connection.poll(0):
                    self._receive()
            finally:
                self._lock.release()

    def wait_for(self, group: Group) -> None:
        """Receive answers until those of a group are there."""
        with self._lock:
            while not group.answers:
                self._receive()

    def close(self) -> None:
        """End the process, and wait for its end."""
        self.is_over = True
        self.connection.close()
        self._process.terminate()
        self._process.wait()

    def forget(self) -> None:
        """Close what this process has of it."""
        self.connection.close()
        self._process.returncode = 0  # it is no child of ours to wait for

    def _receive(self) -> None:
        """Receive the answers to the group that was sent first."""
        try:
            found = self.connection.recv()
        except (EOFError, OSError) as error:
            ended = self._ended(f"while it read {self._sent[0].members[0].name}")
            ended.__cause__ = error
            self._fail(ended)
            return
        except BaseException:  # an answer that nobody reads would be taken for the next one
            self._fail(self._closed())
            raise
        self._sent.popleft().answer([self._answer(*one) for one in found])

    def _answer(
        self,
        place: int,
        shape: tuple[int, int] | None,
        grid: tuple[int, int] | None,
        failed: Exception | None,
        told: Sequence[Warning],
    ) -> Answer | None:
        if failed is not None:
            return Answer(functools.partial(_raise, failed), told)
        if shape is None or grid is None:
            return None
        patches = np.frombuffer(self._buffer, np.uint8, shape[0] * shape[1], place)
        found = patches.reshape(shape).copy(), grid
        return Answer(lambda: found, told)

    def _fail(self, error: WorkerError) -> None:
        """End the process, and answer all that was sent to it with an error."""
        self.close()
        while self._sent:
            group = self._sent.popleft()
            group.answer([Answer(functools.partial(_raise, error)) for _ in group.members])

    def _closed(self) -> WorkerError:
        return WorkerError("the process that decoded images was stopped")

    def _ended(self, when: str) -> WorkerError:
        self.is_over = True
        code = self._process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        return WorkerError(
            f"process {self._process.pid}, which decodes images, {how} {when}: if memory ran out, "
            f"set {VARIABLE} to fewer than the cores, or to 0 for none"
        )


def _raise(error: Exception) -> Patches:
    raise error


def _search_path() -> str:
    """Return where the process finds this package: it does not start in the same folder."""
    ours = str(Path(images.__file__).parents[2])
    return os.pathsep.join(filter(None, [ours, os.environ.get("PYTHONPATH")]))
