"""Items prepared ahead of use: the same results and errors, with processes and without."""

import contextlib
import threading

import numpy as np
import pytest
from PIL import Image

from puma_jax.config import ImageConfig
from puma_jax.data import image_workers, images
from puma_jax.data.preparing import prepare, read_patches, run
from puma_jax.errors import ImageError
from tests.data.test_image_workers import started
from tests.reference import VISION, random_image

LIMITS = ImageConfig()


@pytest.fixture(scope="module")
def processes():
    with contextlib.closing(started(2)) as pool:
        yield pool


@pytest.fixture(params=["threads", "processes"])
def either(request, monkeypatch):
    """Whether processes read images, each way."""
    chosen = request.param == "processes"
    pool = request.getfixturevalue("processes") if chosen else image_workers.Pool(0)
    monkeypatch.setattr(image_workers, "_pool", pool)
    return chosen


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    """Lists of images: files, bytes, images in memory, several of them or none."""
    folder, items = tmp_path_factory.mktemp("images"), []
    for number in range(60):
        path = folder / f"{number}.png"
        random_image(56 + number, 60, seed=number).save(path)
        if number % 5 == 0:
            items.append([])
        elif number % 7 == 0:
            items.append([Image.open(path), path])
        elif number % 11 == 0:
            items.append([path] * 20)
        else:
            items.append([path.read_bytes() if number % 2 else path])
    return items


async def patches(sources):
    return [sources, await read_patches(sources, VISION, LIMITS)]


def assert_patches(found, sources):
    assert found[0] is sources
    for (cut, grid), source in zip(found[1], sources, strict=True):
        expected = images.read_patches(source, VISION, LIMITS)
        np.testing.assert_array_equal(cut, expected[0])
        assert grid == expected[1]


def test_results_come_in_order(either, items):
    found = list(prepare(patches, items))
    assert len(found) == len(items)
    for one, sources in zip(found, items, strict=True):
        assert_patches(one, sources)


def test_one_item_alone(either, items):
    for sources in items[:12]:
        assert_patches(run(patches(sources)), sources)


def test_two_threads_share_the_processes(either, items):
    found = [None, None]

    def all_of(number):
        found[number] = list(prepare(patches, items))

    threads = [threading.Thread(target=all_of, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results in found:
        for one, sources in zip(results, items, strict=True):
            assert_patches(one, sources)


def test_the_first_error_in_order_is_raised(either, items):
    missing = [[*items[2]], [*items[1], "missing.png"], ["absent.png"]]
    results = prepare(patches, [*items[:9], *missing, *items])
    for sources in items[:9] + items[2:3]:
        np.testing.assert_equal(next(results)[0], sources)
    with pytest.raises(ImageError, match=r"^missing\.png does not exist$"):
        next(results)


def test_a_coroutine_can_go_on_after_an_error(either, items):
    async def or_none(sources):
        try:
            first = await read_patches(sources, VISION, LIMITS)
        except ImageError:
            return await read_patches(items[1], VISION, LIMITS)
        return first

    found = list(prepare(or_none, [["missing.png"], items[1], b"no item"[:0]]))
    np.testing.assert_array_equal(found[0][0][0], found[1][0][0])
    assert found[2] == []


def test_errors_before_images_come_in_order(either, items):
    async def odd(number):
        if number == 3:
            raise ValueError("odd")
        return len(await read_patches(items[number], VISION, LIMITS))

    results = prepare(odd, [1, 2, 3, 4])
    assert [next(results), next(results)] == [1, 1]
    with pytest.raises(ValueError, match=r"^odd$"):
        next(results)


def test_what_is_not_asked_for_is_dropped(either, items):
    begun = []

    async def counted(sources):
        begun.append(sources)
        return await patches(sources)

    results = prepare(counted, items * 20)
    assert_patches(next(results), items[0])
    results.close()
    assert len(begun) < 100
    for one, sources in zip(prepare(patches, items), items, strict=True):
        assert_patches(one, sources)  # and what comes after is right


def test_threads_run_what_waits(either, items):
    async def thread(sources):
        await read_patches(sources, VISION, LIMITS)
        return threading.current_thread()

    ours = threading.current_thread()
    assert all(one is not ours for one in prepare(thread, items[:20], waits=True))
    assert either == any(one is ours for one in prepare(thread, items[:20]))
