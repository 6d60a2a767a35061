"""Videos in: frames are joined into patches of several frames, and numbered in time.

Families differ in how a prompt shows them. Qwen2-VL and Qwen2.5-VL read a video as one image with a
time axis. Qwen3-VL reads a series of images, each after the time it was taken at, as text.
"""

from __future__ import annotations

from collections.abc import Sequence

import einops
import numpy as np

from puma_jax.config import ImageConfig, VisionConfig
from puma_jax.data.decode import ImageSource
from puma_jax.data.items import Visuals
from puma_jax.data.preparing import read_patches
from puma_jax.data.raw_items import Parts
from puma_jax.errors import ImageError


async def read_visuals(parts: Parts, vision: VisionConfig, limits: ImageConfig) -> Visuals:
    """Return the images of an item, or its video.

    Raises:
        ImageError: One of them cannot be read, or frames of a video differ in size.
    """
    if parts.frames:
        return await read_video(parts.frames, parts.fps, vision, limits)
    return Visuals(await read_patches(parts.images, vision, limits))


async def read_video(
    frames: Sequence[ImageSource], fps: float, vision: VisionConfig, limits: ImageConfig
) -> Visuals:
    """Return the patches of a video, and how they are shown.

    Each frame is resized as an image is. The last frame is repeated to fill its patch.

    Args:
        frames: Images, in order.
        fps: Frames for each second of the video.
        vision: The tower.
        limits: Limits on the size of a frame.

    Raises:
        ImageError: A frame cannot be read, or frames differ in size.
    """
    cut = await read_patches(frames, vision, limits)
    sizes = sorted({grid for _, grid in cut})
    if len(sizes) > 1:
        raise ImageError(f"frames of a video have {sizes} patches, expected frames of one size")
    depth = vision.temporal_patch_size
    times = [number / fps for number in range(len(cut))]
    missing = -len(cut) % depth
    cut, times = cut + cut[-1:] * missing, times + times[-1:] * missing
    joined = einops.rearrange(
        np.stack([patches for patches, _ in cut]),
        "(time frame) patch (channel pixel) -> time patch (channel frame pixel)",
        frame=depth,
        channel=vision.channels,
    )
    if not vision.timestamps:
        step = vision.tokens_per_second * depth / fps if vision.tokens_per_second else 1.0
        return Visuals([(np.concatenate(joined), sizes[0])], time_step=step)
    middles = [(times[n] + times[n + depth - 1]) / 2 for n in range(0, len(times), depth)]
    captions = [f"<{seconds:.1f} seconds>" for seconds in middles]
    return Visuals([(patches, sizes[0]) for patches in joined], captions)
