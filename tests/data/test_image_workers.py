"""Images read in other processes: the same patches and errors, and no process is left behind."""

import gc
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
from puma_jax.data import image_process, image_workers, images
from puma_jax.errors import ConfigError, ImageError, WorkerError
from tests.reference import VISION, random_image

LIMITS = ImageConfig()
ABANDON = """
import os, signal
from puma_jax.data.image_process import ImageRequest
from puma_jax.data.image_workers import Pool
from puma_jax.config import ImageConfig, VisionConfig

VISION = VisionConfig(layers=1, width=32, heads=2, mlp_width=64, out_width=64)
pool = Pool(2, many=1)
pool.begin([ImageRequest("missing.png", VISION, ImageConfig())])
print(*[worker._process.pid for worker in pool._workers], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def image(source):
    return image_process.ImageRequest(source, VISION, LIMITS)


def started(count):
    """A pool whose processes have all started."""
    pool = image_workers.Pool(count, many=1)
    assert pool.begin([image("a.png")]) is None  # they start, and this thread has to read it
    end = time.monotonic() + 120
    while pool.starting:
        assert time.monotonic() < end
        time.sleep(0.05)
    return pool


@pytest.fixture(scope="module")
def pool():
    pool = started(2)
    yield pool
    processes = [worker._process for worker in pool._workers]
    pool.close()
    assert len(processes) == 2
    assert all(process.returncode is not None for process in processes)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Files of several sizes and formats, and their bytes."""
    folder, sources = tmp_path_factory.mktemp("sources"), []
    for number, (height, width) in enumerate([(60, 90), (200, 56), (90, 300)] * 4):
        path = folder / f"{number}.{'jpg' if number % 2 else 'png'}"
        random_image(height, width, seed=number).save(path)
        sources += [path, path.read_bytes(), str(path)]
    return sources


def assert_patches(found, source):
    patches, grid = images.read_patches(source, VISION, LIMITS)
    np.testing.assert_array_equal(found[0], patches)
    assert found[1] == grid


def test_patches_are_those_of_this_process(pool, sources, monkeypatch):
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda source: pool.read(image(source)), sources))
    for source, patches in zip(sources, found, strict=True):
        assert_patches(patches, source)
    monkeypatch.chdir(sources[0].parent)
    assert_patches(pool.read(image("0.png")), sources[0])


def test_groups_are_read_in_any_order(pool, sources):
    """More groups than processes take at a time, of which some are never asked for."""
    groups = [pool.begin([image(source) for source in sources[n : n + 5]]) for n in range(30)]
    for n in (29, 3, 0, 17):
        for number in (4, 0, 0):
            assert_patches(groups[n].result(number), sources[n + number])
    assert all(worker.groups <= image_process.GROUPS_SENT for worker in pool._workers)


def test_patches_without_room_are_made_here(monkeypatch, sources):
    monkeypatch.setattr(image_process, "BUFFER_BYTES", 2**15)
    pool = started(1)
    group = pool.begin([image(source) for source in sources])
    for number, source in enumerate(sources):
        assert_patches(group.result(number), source)
    assert sum(answer._result.__name__ == "read" for answer in group.answers) > 5
    pool.close()


def test_errors_are_those_of_this_process(pool, tmp_path, monkeypatch):
    whole = tmp_path / "whole.png"
    random_image(60, 90).save(whole)
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole.read_bytes()[:4000])
    for source in (tmp_path / "missing.png", cut, b"no image", tmp_path):
        with pytest.raises(ImageError) as expected:
            images.read_patches(source, VISION, LIMITS)
        with pytest.raises(ImageError) as found:
            pool.read(image(source))
        assert str(found.value) == str(expected.value)
    # Settings of Pillow hold in the processes too.
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert_patches(pool.read(image(cut)), cut)


def test_large_images_are_left_to_threads(pool, tmp_path):
    path = tmp_path / "large.png"
    Image.new("1", (4097, 4096)).save(path)
    with ThreadPoolExecutor(1, "left") as threads:
        group = pool.begin([image(path)], threads)
        monitored = group.result(0)
        assert threads._threads  # one was started, by what was submitted
    assert_patches(monitored, path)


def test_a_process_that_is_killed_is_named():
    pool = started(1)
    process = pool._workers[0]._process
    process.kill()
    process.wait()
    message = rf"^process {process.pid}, which decodes images, was killed by SIGKILL .*read a\.png"
    with pytest.raises(WorkerError, match=message):
        pool.read(image("a.png"))
    assert pool.begin([image("a.png")]) is None  # none is left: this thread reads it
    pool.close()
    gc.collect()  # Python 3.12.1 crashed here on what the error kept of a pipe


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
    monkeypatch.setattr(image_workers, "Worker", lambda: pytest.fail("a process was started"))
    monkeypatch.setenv("PUMA_JAX_IMAGE_WORKERS", "1")
    assert pool.begin([image("a.png")] * 2) is None
    monkeypatch.setenv("PUMA_JAX_IMAGE_WORKERS", "many")
    with pytest.raises(ConfigError, match=r'^PUMA_JAX_IMAGE_WORKERS is "many", expected a number'):
        pool.begin([image("a.png")])
