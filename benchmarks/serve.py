"""Compare the service with sentence-transformers behind FastAPI: latency and requests per second.

    python benchmarks/serve.py --model runs/demo-quick/pruned
    python benchmarks/serve.py --model DIR --requests 500 --clients 1 8 32 --images 0.5

Both serve the same weights in float32, each in a process of its own, and are loaded in turns by the
same clients, each of which sends its next request when the last is answered. A request has one
item: a text, or an image of 200 × 150 pixels as PNG in base64 with a text. The peer is the plainest
service that one would write: a function that calls `encode` on the item of its request. Before
anything is measured, the vectors of both are compared.

Printed: median and 99th percentile of the latency, and requests per second; medians of the turns.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import machine
import numpy as np
from PIL import Image

WORDS = ("a", "red", "blue", "small", "large", "bicycle", "cat", "house", "of", "the", "with", "on")


def requests_of(count: int, share_of_images: float, seed: int = 0) -> list[dict[str, str]]:
    """Return items, a share of which have an image beside their text."""
    rng = np.random.default_rng(seed)
    items = []
    for _ in range(count):
        item = {"text": " ".join(rng.choice(WORDS, rng.integers(3, 20)))}
        if rng.random() < share_of_images:
            out = io.BytesIO()
            pixels = rng.integers(0, 256, (15, 20, 3)).astype(np.uint8)
            Image.fromarray(pixels).resize((200, 150)).save(out, "PNG")
            item["image"] = base64.b64encode(out.getvalue()).decode()
        items.append(item)
    return items


def serve_peer(folder: str, port: int) -> None:
    """Serve a folder of sentence-transformers, one `encode` for each request."""
    import fastapi
    import uvicorn
    from sentence_transformers import SentenceTransformer
    from transformers import Qwen2VLProcessor
    from transformers.utils import is_torchvision_available

    if not is_torchvision_available():  # its processor of videos, which nothing here needs, does
        parts = classmethod(lambda cls: ["image_processor", "tokenizer"])
        Qwen2VLProcessor.get_attributes = parts
    model = SentenceTransformer(folder)
    app = fastapi.FastAPI()

    @app.post("/embed")
    def embed(item: dict[str, str]) -> dict[str, list[float]]:
        given: dict[str, object] = {"text": item["text"]}
        if "image" in item:
            given["image"] = Image.open(io.BytesIO(base64.b64decode(item["image"])))
        return {"embedding": model.encode(given, show_progress_bar=False).tolist()}

    @app.get("/ready")
    def ready() -> str:
        return "ready"

    uvicorn.run(app, port=port, log_level="warning")


def our_body(item: dict[str, str]) -> dict[str, object]:
    """Return the body of a request to our service."""
    content: list[dict[str, object]] = [{"type": "text", "text": item["text"]}]
    if "image" in item:
        url = {"url": f"data:image/png;base64,{item['image']}"}
        content.append({"type": "image_url", "image_url": url})
    return {"input_type": "search_document", "inputs": [{"content": content}]}


async def load(
    port: int, path: str, bodies: list[bytes], clients: int
) -> tuple[list[float], list[bytes], float]:
    """Return the seconds that every request took, its answer, and the seconds that all took.

    The clients are as light as can be, because they share the machine with the services.
    """
    left = iter(enumerate(bodies))
    seconds = [0.0] * len(bodies)
    answers = [b""] * len(bodies)

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for number, body in left:
            start = time.perf_counter()
            head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
            writer.write(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
            lines = (await reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
            length = next(line for line in lines if line.startswith(b"content-length:"))
            answers[number] = await reader.readexactly(int(length.split(b":")[1]))
            seconds[number] = time.perf_counter() - start
            if b" 200 " not in lines[0]:
                sys.exit(f"{path} answered {lines[0].decode()}: {answers[number].decode()[:300]}")
        writer.close()

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return seconds, answers, time.perf_counter() - start


def vector_in(answer: bytes) -> list[float]:
    """Return the vector in an answer of either service."""
    found = json.loads(answer)
    return found["embedding"] if "embedding" in found else found["embeddings"]["float"][0]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def running(command: list[str], port: int) -> Iterator[None]:
    """Run a service until the block ends; the block begins once it is ready."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            if process.poll() is not None:
                sys.exit(f"{' '.join(command)} has ended with {process.returncode}")
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/ready").status_code == 200:
                    break
            time.sleep(0.2)
        yield
    finally:
        process.terminate()
        process.wait(30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="runs/demo-quick/pruned", help="folder of the model")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=200, help="in each turn")
    parser.add_argument("--images", type=float, default=0.5, help="share of items with an image")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--peer", nargs=2, metavar=("FOLDER", "PORT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        serve_peer(arguments.peer[0], int(arguments.peer[1]))
        return
    items = requests_of(arguments.requests, arguments.images)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        exported = Path(folder) / "exported"
        export = ["-m", "puma_jax.export", "sentence-transformers", "--model", arguments.model]
        subprocess.run(
            [sys.executable, *export, "--dtype", "float32", "--out", str(exported)],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        ports = free_port(), free_port()
        ours = ["-m", "puma_jax.serve", "--model", arguments.model, "--dtype", "float32"]
        ours += ["--service.port", str(ports[0])]
        theirs = [os.path.abspath(__file__), "--peer", str(exported), str(ports[1])]
        stack.enter_context(running([sys.executable, *ours], ports[0]))
        stack.enter_context(running([sys.executable, *theirs], ports[1]))
        loads = {
            "puma_jax": (ports[0], "/v2/embed", [encoded(our_body(item)) for item in items]),
            "peer": (ports[1], "/embed", [encoded(item) for item in items]),
        }
        images = sum("image" in item for item in items)
        compare(loads, images, arguments.clients, arguments.turns)


def encoded(body: object) -> bytes:
    return json.dumps(body).encode()


def compare(
    loads: dict[str, tuple[int, str, list[bytes]]], images: int, clients: list[int], turns: int
) -> None:
    """Print latency and throughput of both services for each number of clients."""
    vectors = [
        np.array([vector_in(answer) for answer in asyncio.run(load(*given, 4))[1]])
        for given in loads.values()
    ]
    cosines = np.einsum("nd,nd->n", *vectors)
    print(
        f"{machine.describe()}: {len(cosines)} requests a turn, {images} of them with an image, "
        f"medians of {turns} turns; least cosine between the vectors of both {cosines.min():.6f}"
    )
    print("clients  service      p50 ms    p99 ms   requests/s     ratio")
    for count in clients:
        found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in loads}
        for _ in range(turns):
            for name, given in loads.items():
                seconds, _, total = asyncio.run(load(*given, count))
                p50, p99 = np.percentile(seconds, [50, 99])
                found[name].append((1000 * p50, 1000 * p99, len(seconds) / total))
        rows = {
            name: [statistics.median(turn[column] for turn in measured) for column in range(3)]
            for name, measured in found.items()
        }
        for name, (p50, p99, rate) in rows.items():
            print(
                f"{count:7}  {name:9}  {p50:9.1f} {p99:9.1f}  {rate:11.1f}  "
                f"{rate / rows['peer'][2]:7.2f} ×",
                flush=True,
            )


if __name__ == "__main__":
    main()
