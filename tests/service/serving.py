"""A small service in a thread of its own, on a port of this machine."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import uvicorn
from PIL import Image

from puma_jax import Embedder
from puma_jax.config import ImageConfig, PromptConfig
from puma_jax.search.corpus import open_corpus
from puma_jax.search.embedding import embed
from puma_jax.search.index import Index
from puma_jax.serve import bound_socket
from puma_jax.service.app import create_app
from puma_jax.service.server import server_config
from puma_jax.service.settings import ServiceConfig
from puma_jax.service.state import Service

COLORS = {"red": (200, 30, 40), "green": (30, 160, 60), "blue": (40, 60, 200), "gray": (128,) * 3}
INSTRUCTION = "Find what is meant."


def small_embedder(folder: Path) -> Embedder:
    """A float32 model whose texts and images are small, so that few programs are compiled."""
    return Embedder.load(
        folder,
        dtype="float32",
        images=ImageConfig(max_pixels=16 * 28**2),
        prompt=PromptConfig(max_text_tokens=120),
    )


def picture(color: str, size: tuple[int, int] = (60, 40), form: str = "PNG") -> bytes:
    """A file of an image of one color with a darker half."""
    image = Image.new("RGB", size, COLORS[color])
    image.paste((0, 0, 0), (0, 0, size[0] // 2, size[1]))
    out = io.BytesIO()
    image.save(out, form)
    return out.getvalue()


def data_url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def write_corpus(folder: Path) -> Path:
    """JSON lines of texts, images, and both, with fields to filter by."""
    folder.mkdir()
    lines = []
    for price, color in enumerate(COLORS):
        (folder / f"{color}.png").write_bytes(picture(color))
        shared = {"color": color, "price": price}
        lines += [
            {"id": f"text/{color}", "text": f"A {color} thing.", **shared},
            {"id": f"image/{color}", "image": f"{color}.png", **shared},
            {"id": f"both/{color}", "text": f"It is {color}.", "image": f"{color}.png", **shared},
        ]
    path = folder / "items.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def embed_corpus(embedder: Embedder, folder: Path) -> Path:
    """Vectors of `write_corpus`."""
    items = write_corpus(folder / "corpus")
    embed(open_corpus(items), embedder, folder / "vectors", items_per_shard=64)
    return folder / "vectors"


@dataclass(frozen=True)
class Live:
    """A service that answers."""

    url: str
    service: Service
    server: uvicorn.Server

    def post(self, path: str, body: object, **options) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=30, **options)

    def get(self, path: str, **options) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=30, **options)


@contextmanager
def serving(
    embedder: Embedder, index: Index | None, key: str | None = None, **settings
) -> Iterator[Live]:
    """Serve a model and an index until the block ends."""
    chosen = {"port": 0, "name": "tiny", "tokens_per_chunk": 256, "instruction": INSTRUCTION}
    config = ServiceConfig(**chosen | settings)
    service = Service(embedder, index, str(config.name), config)
    with bound_socket(config) as listener:
        server = uvicorn.Server(server_config(create_app(service, key)))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        port = listener.getsockname()[1]
        thread.start()
        try:
            while not service.batcher.ready.is_set():
                time.sleep(0.01)
                assert thread.is_alive()
            assert not service.batcher.failed
            while not server.started:
                time.sleep(0.01)
            yield Live(f"http://127.0.0.1:{port}", service, server)
        finally:
            server.should_exit = True
            thread.join(20)
