"""Images against transformers' Qwen2VLImageProcessorPil: sizes, resampling, order of patches."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from puma_jax.config import ImageConfig
from puma_jax.data.images import open_image, patch_counts, patchify, resized_sizes
from puma_jax.errors import ImageError
from tests.reference import VISION, image_processor, pixel_values, random_image

LIMITS = ImageConfig()
SIZES = [(56, 56), (256, 341), (1, 1), (3, 500), (700, 20), (1000, 1200), (29, 31)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("limits", [LIMITS, ImageConfig(28 * 28, 100 * 28 * 28)])
def test_patches_equal_those_of_the_published_processor(size, limits):
    image = random_image(*size)
    patches, grid = patchify(image, VISION, limits)
    theirs = image_processor(limits)(image, return_tensors="np")
    assert theirs["image_grid_thw"].tolist() == [[1, *grid]]
    # Their float32 steps round a little differently from float64; one grey level is 0.0145.
    np.testing.assert_allclose(
        pixel_values(patches, VISION), theirs["pixel_values"], rtol=0, atol=1e-6
    )


@given(
    st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), min_size=1, max_size=50),
    st.sampled_from([1, 2]),
)
def test_sizes_equal_smart_resize(sizes, stride):
    limits = ImageConfig(spatial_pool_stride=stride)
    heights, widths = np.array(sizes).T
    if any(max(size) > 200 * min(size) for size in sizes):
        with pytest.raises(ImageError, match="too elongated"):
            resized_sizes(heights, widths, VISION, limits)
        return
    theirs = [
        smart_resize(*size, 28 * stride, limits.min_pixels, limits.max_pixels) for size in sizes
    ]
    rows, columns = resized_sizes(heights, widths, VISION, limits)
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == theirs
    counts = patch_counts(np.append(heights, 0), np.append(widths, 0), VISION, limits)
    assert counts.tolist() == [height * width // 196 for height, width in theirs] + [0]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "LA", "1", "YCbCr"])
def test_every_mode_becomes_what_the_published_processor_sees(mode):
    image = random_image(60, 90).convert(mode)
    patches, _ = patchify(open_image(image), VISION, LIMITS)
    theirs = image_processor(LIMITS)(image, return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(pixel_values(patches, VISION), theirs, rtol=0, atol=1e-6)


def test_every_source_gives_the_same_image(tmp_path):
    image = random_image(40, 60)
    file = io.BytesIO()
    image.save(file, "PNG")
    path = tmp_path / "a.png"
    path.write_bytes(file.getvalue())
    for source in (image, path, str(path), file.getvalue(), np.asarray(image)):
        np.testing.assert_array_equal(np.asarray(open_image(source)), np.asarray(image))


def test_what_is_no_image_is_named(tmp_path):
    path = tmp_path / "a.jpg"
    with pytest.raises(ImageError, match="does not exist"):
        open_image(path)
    path.write_bytes(b"not an image")
    with pytest.raises(ImageError, match=r"a\.jpg cannot be decoded"):
        open_image(path)
    file = io.BytesIO()
    random_image(200, 200).save(file, "JPEG")
    with pytest.raises(ImageError, match="image cannot be decoded"):
        open_image(file.getvalue()[:2000])
    with pytest.raises(ImageError, match=r"float64 \[4, 4, 3\], expected uint8"):
        open_image(np.zeros((4, 4, 3)))


@pytest.mark.parametrize(("side", "message"), [(20_000, "bomb"), (9_000, "9000 × 9000 pixels")])
def test_an_image_that_would_fill_the_memory_is_refused(side, message):
    bomb = io.BytesIO()
    Image.new("1", (side, side)).save(bomb, "PNG")
    with pytest.raises(ImageError, match=message):
        open_image(bomb.getvalue())
