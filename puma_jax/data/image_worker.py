"""The program of a process that decodes images; `data.image_process` alone starts it."""

from __future__ import annotations

import itertools
import mmap
import os
import signal
import sys
import warnings
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from PIL import ImageFile

from puma_jax.data.decode import LARGE_PIXELS
from puma_jax.data.images import image_size, read_patches

_SECONDS_BETWEEN_LOOKS = 5


def main(descriptor: int, memory: int, size: int) -> None:
    """Answer groups until the other end closes, or the process that started this one is gone.

    Args:
        descriptor: Of the connection that groups come from and answers go to.
        memory: Descriptor of the memory for patches, that of one group behind that of another.
        size: Bytes of the memory for a group.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other process ends this one
    parent, connection = os.getppid(), Connection(descriptor)
    buffer = np.frombuffer(mmap.mmap(memory, 0), np.uint8)
    starts = itertools.cycle(range(0, len(buffer), size))
    connection.send(())
    while True:
        # A fork of the other process may hold the other end open.
        while not connection.poll(_SECONDS_BETWEEN_LOOKS):
            if os.getppid() != parent:
                return
        try:
            settings, group = connection.recv()
            start = next(starts)
            answers, end = [], start + size
            for image in group:
                answers.append(_answer(buffer[:end], start, settings, *image))
                _, shape, *_ = answers[-1]
                start += shape[0] * shape[1] if shape else 0
            connection.send(answers)
        except (EOFError, OSError):
            return


def _answer(
    buffer: np.ndarray,
    start: int,
    settings: tuple[str, bool],
    source: Any,
    vision: Any,
    limits: Any,
) -> tuple[int, tuple[int, ...] | None, Any, Exception | None, list[Any]]:
    """Return where the patches are in the buffer, their shape and grid; an error; the warnings.

    No shape and no error leave the image to the other process.
    """
    shape = grid = failed = None
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            folder, ImageFile.LOAD_TRUNCATED_IMAGES = settings
            if folder != os.getcwd():
                os.chdir(folder)
            height, width = image_size(source)
            if height * width <= LARGE_PIXELS:
                patches, found = read_patches(source, vision, limits)
                if patches.size <= len(buffer) - start:
                    buffer[start : start + patches.size] = patches.ravel()
                    shape, grid = patches.shape, found
        except Exception as error:
            failed = error
    return start, shape, grid, failed, [warning.message for warning in told]


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
