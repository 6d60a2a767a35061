"""Whatever is sent, answers are declared ones, memory stays bounded, and the service lives on."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import io
import json
import random
import resource
import socket
import struct
import time
import zlib

import httpx
import pytest
from PIL import Image

from tests.service.serving import data_url, picture

DECLARED = {200, 400, 404, 408, 413, 415, 429, 503, 504}
_IMAGE = data_url(picture("red", (30, 20)))
_PARTS = [
    {"type": "image_url", "image_url": {"url": _IMAGE}},
    {"type": "text", "text": "in blue"},
]
BODIES = [
    ("/v1/embeddings", {"model": "tiny", "input": ["a", "b"], "encoding_format": "base64"}),
    ("/v1/embeddings", {"messages": [{"role": "user", "content": _PARTS}], "dimensions": 8}),
    ("/v2/embed", {"input_type": "search_query", "texts": ["a"], "embedding_types": ["int8"]}),
    ("/v2/embed", {"input_type": "image", "images": [_IMAGE], "output_dimension": 8}),
    ("/v2/embed", {"input_type": "image", "inputs": [{"content": _PARTS}], "truncate": "END"}),
    ("/search", {"text": "a", "k": 3, "modality": "image", "filter": "price < 3"}),
    ("/search", {"image": _IMAGE, "instruction": "Find it."}),
    ("/search", {"id": "text/red", "k": 2}),
]
# What takes the place of a value. JSON written by hand holds what json.dumps would not.
VALUES = [
    "null", "true", "0", "-1", "1e999", "NaN", "9" * 400, '""', '"a"', '"\\u0000"', '"\\ud800"',
    '"\u202e\x7f"', "[]", "{}", "[[]]", '["a", 1]', '{"a": {}}', "[" * 300 + "]" * 300,
    '"data:image/png;base64,"', '"data:,"', '"http://127.0.0.1/"', '"../../etc/passwd"',
    json.dumps("x" * 5000), '"text/red"', '"price < 2"', json.dumps(_IMAGE),
    json.dumps(_IMAGE[:-9]),
]  # fmt: skip


def places(value: object, path: tuple = ()) -> list[tuple]:
    """The paths of all values within a JSON value."""
    found = [path] if path else []
    if isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            found += places(inner, (*path, name))
    return found


def mutated(body: dict, rng: random.Random) -> bytes:
    """A body with a value replaced, removed, renamed or repeated, or with bytes damaged."""
    body = copy.deepcopy(body)
    path = rng.choice(places(body))
    holder = body
    for name in path[:-1]:
        holder = holder[name]
    last, kind = path[-1], rng.randrange(5)
    if kind == 0:
        del holder[last]
    elif kind == 1 and isinstance(holder, dict):
        holder[rng.choice(["text", "input", "images", "k", "\u00e9", ""])] = holder.pop(last)
    else:
        holder[last] = "@"
    text = json.dumps(body).replace('"@"', rng.choice(VALUES))
    data = bytearray(text.encode("utf-8", "surrogatepass"))
    if kind == 4:
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        del data[rng.randrange(len(data)) :: rng.choice([7, 1000])]
    return bytes(data)


def is_alive(live) -> bool:
    return live.post("/v1/embeddings", {"input": "a"}).status_code == 200


def check_declared(path: str, answer: httpx.Response) -> None:
    assert answer.status_code in DECLARED, (path, answer.status_code, answer.text)
    body = answer.json()
    if answer.status_code != 200:
        message = body["message"] if path == "/v2/embed" else body["error"]["message"]
        assert message
        assert len(message) < 5000
        assert "\n" not in message


async def send_all(live, requests: list[tuple[str, bytes]], at_once: int) -> list[httpx.Response]:
    """Answers to requests, so many of which are under way at a time."""
    limits = httpx.Limits(max_connections=at_once)
    gate = asyncio.Semaphore(at_once)

    async def send(client, path, content):
        async with gate:
            return await client.post(path, content=content)

    headers = {"Content-Type": "application/json"}
    async with httpx.AsyncClient(
        base_url=live.url, headers=headers, limits=limits, timeout=60
    ) as client:
        return await asyncio.gather(*(send(client, *request) for request in requests))


def test_two_thousand_mutated_bodies(live):
    rng = random.Random(0)
    requests = []
    for _ in range(2000):
        path, body = rng.choice(BODIES)
        requests.append((path, mutated(body, rng)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)  # of texts that are truncated
        answers = asyncio.run(send_all(live, requests, 8))
    for (path, _), answer in zip(requests, answers, strict=True):
        check_declared(path, answer)
    statuses = [answer.status_code for answer in answers]
    assert statuses.count(200) > 50
    assert statuses.count(400) > 1000
    assert is_alive(live)


def png(width: int, height: int, chunks: list[tuple[bytes, bytes]]) -> bytes:
    """A PNG file with a header and these chunks."""
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    out = b"\x89PNG\r\n\x1a\n"
    for kind, data in [(b"IHDR", head), *chunks, (b"IEND", b"")]:
        out += struct.pack(">I", len(data)) + kind + data
        out += struct.pack(">I", zlib.crc32(kind + data))
    return out


def bombs() -> list[bytes]:
    """Small files that say they are large, or become large where a decoder believes them."""
    zeros = zlib.compress(bytes(50_000_000), 9)
    gif = io.BytesIO()
    Image.new("L", (6000, 5000)).save(gif, "GIF")
    return [
        png(60_000, 60_000, [(b"IDAT", zeros)]),
        png(2**31 - 1, 2**31 - 1, [(b"IDAT", zeros)]),
        png(8, 8, [(b"IDAT", zeros)]),
        png(8, 8, [(b"zTXt", b"a\0\0" + zeros), (b"IDAT", zlib.compress(bytes(72)))]),
        png(8, 8, [(b"iCCP", b"a\0\0" + zeros), (b"IDAT", zlib.compress(bytes(72)))]),
        png(33_000_000, 1, [(b"IDAT", zeros)]),
        gif.getvalue(),
    ]


def peak_memory() -> int:
    """The most bytes that this process has held."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_decompression_bombs_take_little_memory(live):
    files = bombs()
    assert max(map(len, files)) < 200_000
    before = peak_memory()
    body = {"input_type": "image", "images": None}
    requests = [
        ("/v2/embed", json.dumps({**body, "images": [data_url(file)]}).encode()) for file in files
    ]
    answers = asyncio.run(send_all(live, requests * 4, 8))
    for answer in answers:
        check_declared("/v2/embed", answer)
    assert peak_memory() - before < 1_000_000_000
    assert is_alive(live)


def test_long_texts_and_deep_bodies(live):
    long = "word " * 2_000_000
    requests = [
        ("/v1/embeddings", json.dumps({"input": long}).encode()),
        ("/v1/embeddings", json.dumps({"input": ["a"] * 200_000}).encode()),
        ("/v1/embeddings", json.dumps({"input": [[1] * 1000] * 500}).encode()),
        ("/v2/embed", json.dumps({"input_type": "image", "texts": [long]}).encode()),
        ("/search", json.dumps({"text": "a", "filter": long}).encode()),
        ("/search", json.dumps({"text": "a", "instruction": long}).encode()),
        ("/search", json.dumps({"id": long}).encode()),
        ("/search", json.dumps({"text": "a", "filter": "(" * 90_000}).encode()),
        ("/search", json.dumps({"text": "a", "filter": "not " * 20_000 + "price"}).encode()),
        ("/search", b'{"text": ' + b"[" * 5_000_000),
        ("/search", b'{"text": ' * 100_000),
    ]
    start = time.monotonic()
    for (path, _), answer in zip(requests, asyncio.run(send_all(live, requests, 4)), strict=True):
        check_declared(path, answer)
        assert answer.status_code in (400, 404)
    assert time.monotonic() - start < 60
    assert is_alive(live)


def test_headers_without_end_are_cut_off(live):
    port = int(live.url.rsplit(":", 1)[1])
    before, sent = peak_memory(), 0
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
        with contextlib.suppress(ConnectionError):
            for number in range(20_000):
                line = f"X-{number}: {'x' * 1000}\r\n".encode()
                connection.sendall(line)
                sent += len(line)
    assert sent < 20_000_000
    assert peak_memory() - before < 50_000_000
    assert is_alive(live)


def test_many_more_clients_than_the_queue_holds(live, monkeypatch):
    """200 clients with 8 items each, for a queue of 64."""
    batcher = live.service.batcher
    monkeypatch.setattr(
        batcher, "settings", dataclasses.replace(batcher.settings, max_queue=64, max_items=8)
    )
    request = ("/v1/embeddings", json.dumps({"input": ["a"] * 8}).encode())
    answers = asyncio.run(send_all(live, [request] * 200, 200))
    for answer in answers:
        check_declared("/v1/embeddings", answer)
        if answer.status_code == 429:
            assert int(answer.headers["Retry-After"]) >= 1
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= 8
    assert batcher._admitted == 0
    assert is_alive(live)
