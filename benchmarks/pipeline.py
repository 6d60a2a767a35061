"""Measure how fast JPEGs become patches, and items rows of tokens and patches, by cores.

    python benchmarks/pipeline.py

Patches are made beside transformers' on one core, in turns: ours are uint8, which the device
normalizes; the normalized values are compared, too. Then whole items, read from files, are prepared
as `encode`, `embed` and training do it, by one core, two, four, ...: in threads, around processes
that read the images, and by as many processes that know nothing of each other, which is what the
machine can do at most. Each of these is a process bound to its cores, and they take turns.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import jax.numpy as jnp
import numpy as np
import qwen2_vl_2b
from machine import write_json
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

from puma_jax import Embedder
from puma_jax.config import ImageConfig
from puma_jax.data.image_process import VARIABLE
from puma_jax.data.image_workers import MANY, pool
from puma_jax.data.images import open_image, patchify
from puma_jax.data.preparing import prepare
from puma_jax.model.encoder import abstract
from puma_jax.model.vision import normalize

sys.path.append(str(Path(__file__).parents[1]))  # where the tests are, from any folder

from tests.reference import byte_tokenizer

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


def measure(folder: Path, repeats: int) -> None:
    """Prepare items as `Embedder.encode` does; print the items per second of each repeat."""
    tokenizer = byte_tokenizer()
    embedder = Embedder(qwen2_vl_2b.config(), abstract(qwen2_vl_2b.config()), tokenizer)
    files = sorted(folder.glob("*.jpg"))
    items = [{"text": "a photo of a thing " * 4, "image": str(file)} for file in files] * 5

    def prepare_all() -> None:
        for _ in prepare(embedder.preparing, items):
            pass

    for _ in range(-(-MANY // len(items))):
        prepare_all()  # many images start the processes that help to read more
    while pool().starting:
        time.sleep(0.1)
    for _ in range(repeats):
        start = time.perf_counter()
        prepare_all()
        print(len(items) / (time.perf_counter() - start), flush=True)


def start(folder: Path, cores: list[int], workers: int, repeats: int) -> subprocess.Popen:
    """Start a process that prepares items on some cores, with so many for its images."""
    command = [sys.executable, __file__, "--prepare", str(folder), "--repeats", str(repeats)]
    return subprocess.Popen(
        command,
        env={**os.environ, VARIABLE: str(workers), "JAX_PLATFORMS": "cpu"},
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
        stdout=subprocess.PIPE,
        text=True,
    )


def medians(*processes: subprocess.Popen) -> float:
    """Return the median items per second of processes at the same time, added up."""
    found = [[float(line) for line in process.communicate()[0].split()] for process in processes]
    return sum(statistics.median(rates) for rates in found)


def scaling(folder: Path, turns: int, counts: list[int]) -> dict[int, dict[str, float]]:
    """Return the items per second of each way to use so many cores."""
    usable = sorted(os.sched_getaffinity(0))
    rates: dict[int, dict[str, list[float]]] = {}
    for _ in range(turns):
        for count in counts:
            cores = usable[:count]
            of_count = rates.setdefault(count, {"threads": [], "processes": [], "apart": []})
            of_count["threads"].append(medians(start(folder, cores, 0, 3)))
            of_count["processes"].append(medians(start(folder, cores, count, 3)))
            apart = [start(folder, [core], 0, 3) for core in cores]
            of_count["apart"].append(medians(*apart))
    return {
        count: {name: statistics.median(found) for name, found in of_count.items()}
        for count, of_count in rates.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--turns", type=int, default=3, help="runs of each way to use cores")
    every = len(os.sched_getaffinity(0))
    doubled = [2**n for n in range(every.bit_length()) if 2**n < every]
    parser.add_argument(
        "--cores",
        type=int,
        nargs="+",
        default=[*doubled, every],
        help="numbers of cores, the first of which others are compared with (default: 1, 2, 4, "
        "..., and all)",
    )
    parser.add_argument("--json", type=Path, help="file to write the results to as well")
    parser.add_argument("--prepare", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not all(1 <= count <= every for count in arguments.cores):
        parser.error(f"--cores is {arguments.cores}, expected 1 to {every}")
    if arguments.prepare is not None:
        measure(arguments.prepare, arguments.repeats)
        return
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

    with TemporaryDirectory() as folder:
        for number, data in enumerate(files):
            (Path(folder) / f"{number}.jpg").write_bytes(data)
        speeds = scaling(Path(folder), arguments.turns, arguments.cores)
    print(
        "\n| cores | threads, items/s | × {0} | with processes, items/s | × {0} "
        "| apart, items/s | × {0} |\n|--:|--:|--:|--:|--:|--:|--:|".format(
            "one core" if arguments.cores[0] == 1 else f"{arguments.cores[0]} cores"
        )
    )
    first = speeds[arguments.cores[0]]["threads"]
    for count, of_count in speeds.items():
        cells = (f"{rate:.0f} | {rate / first:.2f}" for rate in of_count.values())
        print(f"| {count} | {' | '.join(cells)} |")

    if arguments.json:
        write_json(arguments.json, {"images": speed, "items": speeds})

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
