"""Measure how fast JPEGs become patches: on one core beside transformers, and on more cores.

    python benchmarks/pipeline.py

Both preprocess the same JPEGs of 256 pixels on the short side, in turns, on one core. Ours gives
uint8 patches, which the device normalizes; the normalized values are compared, too. Then threads
alone and threads with a process each, as `encode`, `embed` and `serve` use them, take 1, 2, 4, ...
cores in turns.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import jax.numpy as jnp
import numpy as np
import qwen2_vl_2b
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

from puma_jax.config import ImageConfig
from puma_jax.data.image_workers import Pool
from puma_jax.data.images import open_image, patchify, read_patches
from puma_jax.model.vision import normalize

LIMITS = ImageConfig()
VISION = qwen2_vl_2b.config().vision


def jpegs(count: int) -> list[bytes]:
    """Return JPEG files of 256 × 256 to 256 × 384 pixels, with structure at several scales."""
    rng = np.random.default_rng(0)
    files = []
    for number in range(count):
        width = 256 + 16 * (number % 9)
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
        smooth = np.asarray(coarse.resize((width, 256), Image.Resampling.BICUBIC), np.int16)
        noisy = np.clip(smooth + rng.integers(-12, 12, smooth.shape), 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(noisy).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def scaling(files: list[bytes], repeats: int) -> dict[str, dict[int, float]]:
    """Return the items per second of threads alone, and with processes, by number of cores."""
    cores = os.cpu_count() or 1
    counts = sorted({*(2**n for n in range(cores.bit_length()) if 2**n <= cores), cores})
    seconds: dict[str, dict[int, list[float]]] = {"threads": {}, "processes": {}}
    with closing(Pool(cores, many=1)) as pool:

        def by_process(file: bytes) -> None:
            if pool.read(file, VISION, LIMITS) is None:
                read_patches(file, VISION, LIMITS)

        while pool.starting or pool.idle < cores:
            by_process(files[0])
        for _ in range(repeats):
            for count in counts:
                with ThreadPoolExecutor(count) as threads:
                    for name, read in (
                        ("threads", lambda file: read_patches(file, VISION, LIMITS)),
                        ("processes", by_process),
                    ):
                        start = time.perf_counter()
                        list(threads.map(read, files))
                        taken = time.perf_counter() - start
                        seconds[name].setdefault(count, []).append(taken)
    return {
        name: {count: len(files) / statistics.median(taken) for count, taken in of_name.items()}
        for name, of_name in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    files = jpegs(arguments.images)
    processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": LIMITS.min_pixels, "longest_edge": LIMITS.max_pixels}
    )

    def ours() -> list[np.ndarray]:
        return [patchify(open_image(file), VISION, LIMITS)[0] for file in files]

    def theirs() -> list[np.ndarray]:
        opened = [Image.open(io.BytesIO(file)).convert("RGB") for file in files]
        return [processor(image, return_tensors="np")["pixel_values"] for image in opened]

    def decode_alone() -> None:
        for file in files:
            open_image(file)

    times: dict[str, list[float]] = {}
    for _ in range(arguments.repeats):
        for run in (ours, theirs, decode_alone):
            start = time.perf_counter()
            run()
            times.setdefault(run.__name__, []).append(time.perf_counter() - start)
    speed = {name: arguments.images / statistics.median(seconds) for name, seconds in times.items()}
    print(f"{arguments.images} JPEGs, 256 pixels on the short side, one core, medians")
    print(
        f"puma_jax      {speed['ours']:7.0f} items/s   (uint8, {ours()[0][0].nbytes} bytes a patch)"
    )
    print(f"transformers  {speed['theirs']:7.0f} items/s   ({theirs()[0][0].nbytes} bytes a patch)")
    print(f"ratio         {speed['ours'] / speed['theirs']:7.2f} ×")
    print(f"decoding JPEG alone, an upper bound for both: {speed['decode_alone']:.0f} items/s")

    speeds = scaling(files, arguments.repeats)
    print(
        "\n| cores | threads alone, items/s | × one core | with processes, items/s | × one core |"
    )
    print("|--:|--:|--:|--:|--:|")
    one = speeds["threads"][1]
    for count, alone in speeds["threads"].items():
        helped = speeds["processes"][count]
        print(f"| {count} | {alone:.0f} | {alone / one:.2f} | {helped:.0f} | {helped / one:.2f} |")

    worst = 0.0
    for patches, values in zip(ours(), theirs(), strict=True):
        mine = np.asarray(
            normalize(jnp.asarray(patches[None]), VISION.image_mean, VISION.image_std)
        )[0]
        frame = values.reshape(len(patches), VISION.channels, 2, -1)[:, :, 0]
        worst = max(worst, float(np.abs(mine - frame.reshape(mine.shape)).max()))
    print(f"largest difference of normalized pixels: {worst:.1e} (one gray level is 1.5e-02)")


if __name__ == "__main__":
    main()
