"""Images read in other processes: the same patches and errors, and no process is left behind."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageFile

from puma_jax.config import ImageConfig
from puma_jax.data import image_workers, images
from puma_jax.errors import ConfigError, ImageError, WorkerError
from tests.reference import VISION, random_image

LIMITS = ImageConfig()
ABANDON = """
import os, signal
from puma_jax.data.image_workers import Pool
from puma_jax.config import ImageConfig, VisionConfig

VISION = VisionConfig(layers=1, width=32, heads=2, mlp_width=64, out_width=64)
pool = Pool(2, many=1)
pool.read("missing.png", VISION, ImageConfig())
print(*[worker._process.pid for worker in pool._starting], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def started(count):
    """A pool whose processes have all started."""
    pool = image_workers.Pool(count, many=1)
    assert pool.read("a.png", VISION, LIMITS) is None  # they start, and this thread has to read it
    end = time.monotonic() + 120
    while pool._starting:
        assert time.monotonic() < end
        time.sleep(0.05)
        ready = [worker for worker in pool._starting if worker.is_ready()]
        pool._starting = [worker for worker in pool._starting if worker not in ready]
        pool._idle += ready
    return pool


@pytest.fixture(scope="module")
def pool():
    pool = started(2)
    yield pool
    processes = [worker._process for worker in pool._idle]
    pool.close()
    assert len(processes) == 2
    assert all(process.returncode is not None for process in processes)


def test_patches_are_those_of_this_process(pool, tmp_path, monkeypatch):
    sources = []
    for number, (height, width) in enumerate([(60, 90), (200, 56), (90, 300)] * 4):
        path = tmp_path / f"{number}.{'jpg' if number % 2 else 'png'}"
        random_image(height, width, seed=number).save(path)
        sources += [path, path.read_bytes(), path.name]
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda source: pool.read(source, VISION, LIMITS), sources))
    for source, (patches, grid) in zip(sources, found, strict=True):
        expected = images.read_patches(source, VISION, LIMITS)
        np.testing.assert_array_equal(patches, expected[0])
        assert grid == expected[1]


def test_errors_are_those_of_this_process(pool, tmp_path, monkeypatch):
    whole = tmp_path / "whole.png"
    random_image(60, 90).save(whole)
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole.read_bytes()[:4000])
    for source in (tmp_path / "missing.png", cut, b"no image", tmp_path):
        with pytest.raises(ImageError) as expected:
            images.read_patches(source, VISION, LIMITS)
        with pytest.raises(ImageError) as found:
            pool.read(source, VISION, LIMITS)
        assert str(found.value) == str(expected.value)
    # Settings of Pillow hold in the processes too.
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    expected, _ = images.read_patches(cut, VISION, LIMITS)
    np.testing.assert_array_equal(pool.read(cut, VISION, LIMITS)[0], expected)


def test_large_images_are_left_to_the_threads(pool, tmp_path):
    Image.new("1", (4097, 4096)).save(tmp_path / "large.png")
    assert pool.read(tmp_path / "large.png", VISION, LIMITS) is None


def test_a_process_that_is_killed_is_named():
    pool = started(1)
    process = pool._idle[0]._process
    process.kill()
    process.wait()
    message = rf"^process {process.pid}, which decodes images, was killed by SIGKILL .*read a\.png"
    with pytest.raises(WorkerError, match=message):
        pool.read("a.png", VISION, LIMITS)
    assert pool.read("a.png", VISION, LIMITS) is None  # none is left: this thread reads it
    pool.close()


def test_processes_end_with_the_one_that_started_them():
    done = subprocess.run(
        [sys.executable, "-c", ABANDON], capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = {int(pid) for pid in done.stdout.split()}
    assert len(left) == 2
    end = time.monotonic() + 120
    while left and time.monotonic() < end:
        time.sleep(0.1)
        left = {pid for pid in left if os.path.exists(f"/proc/{pid}/cmdline") and _runs(pid)}
    assert not left


def _runs(pid):
    """Whether a process runs: one that nobody waits for stays in the table when it has ended."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_processes_start_for_many_images_only(monkeypatch):
    pool = image_workers.Pool(many=3)
    monkeypatch.setattr(image_workers, "_Worker", lambda: pytest.fail("a process was started"))
    monkeypatch.setenv("PUMA_JAX_IMAGE_WORKERS", "1")
    assert pool.read("a.png", VISION, LIMITS) is None
    assert pool.read("a.png", VISION, LIMITS) is None
    monkeypatch.setenv("PUMA_JAX_IMAGE_WORKERS", "many")
    with pytest.raises(ConfigError, match=r'^PUMA_JAX_IMAGE_WORKERS is "many", expected a number'):
        pool.read("a.png", VISION, LIMITS)
