import dataclasses
import json
import multiprocessing
import os
import pickle
import random
import re
import shutil
import threading
import urllib.parse
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from puma_jax.data.builder import Settings, build
from puma_jax.data.images import open_image
from puma_jax.data.prompts import Processor, prompt_fingerprint
from puma_jax.data.store import Store
from puma_jax.errors import CheckpointError, DataError, ImageError, PumaError
from tests.data import fake_mbeir
from tests.reference import byte_tokenizer

QUERIES, CANDIDATES = 13, 12


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return fake_mbeir.write_union(tmp_path_factory.mktemp("mbeir"))


@pytest.fixture(scope="module")
def folder(root, tiny, tmp_path_factory):
    """Built data with images inline, in shards of five."""
    out = tmp_path_factory.mktemp("store") / "inline"
    build(Settings(root, out, shard_items=5, workers=1), tiny.processor)
    return out


@pytest.fixture
def store(folder):
    return Store.open(folder)


def fields(record):
    """The parts of a record that can be compared."""
    return [
        value.tolist() if isinstance(value, np.ndarray) else value
        for value in vars(record).values()
    ]


def test_rows_are_read_in_any_order(store):
    qids = [query.qid for query in fake_mbeir.queries()]
    for row in (12, 0, 7, 7):
        assert store.query(np.int64(row)).id == qids[row]
    assert store.query(-1).id == qids[-1]
    with pytest.raises(IndexError):
        store.query(QUERIES)
    with pytest.raises(IndexError):
        store.candidate(CANDIDATES)


def test_images_are_decoded(store, root, tiny, folder, tmp_path):
    build(Settings(root, tmp_path / "paths", images="path", workers=1), tiny.processor)
    expected = open_image(root / fake_mbeir.image_path(3))
    for one in (store, Store.open(tmp_path / "paths"), Store.open(tmp_path / "paths", root=root)):
        np.testing.assert_array_equal(one.image(one.candidate(3)), expected)
    elsewhere = Store.open(tmp_path / "paths", root=tmp_path)
    with pytest.raises(ImageError, match=r"9:3 \(mbeir_images/3.png\): .*3.png does not exist"):
        elsewhere.image(elsewhere.candidate(3))
    with pytest.raises(ImageError, match="9:1: there is no image"):
        store.image(store.candidate(1))
    damaged = dataclasses.replace(store.candidate(0), image=b"\xff\xd8")
    with pytest.raises(ImageError, match="9:0: image cannot be decoded"):
        store.image(damaged)


def test_threads_may_share_a_store(store):
    expected = [fields(store.query(row)) for row in range(QUERIES)]
    with ThreadPoolExecutor(8) as pool:
        read = pool.map(store.query, [*range(QUERIES)] * 20)
        assert [fields(record) for record in read] == expected * 20


def test_other_processes_read_a_pickled_store(store):
    expected = [fields(store.candidate(row)) for row in range(CANDIDATES)]
    assert len(store.table.query_task) == QUERIES
    assert len(pickle.dumps(store)) < 5000  # neither table nor readers travel
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        read = pool.map(store.candidate, range(CANDIDATES), chunksize=1)
        assert [fields(record) for record in read] == expected


def test_a_forked_process_opens_readers_of_its_own(store, monkeypatch):
    parent = fields(store.query(3))
    (readers,) = store._sources.values()
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert fields(store.query(3)) == parent
    assert len({id(source) for source in store._sources.values()} - {id(readers)}) == 1


def test_the_tokenizer_and_the_cut_must_be_those_of_the_model(store, tiny, tmp_path):
    store.check(prompt_fingerprint(tiny.processor))
    # [RET] is in the tokenizer of a model that was saved, and not in that of its base.
    tiny.processor.save_tokenizer(tmp_path, {})
    store.check(
        prompt_fingerprint(Processor(type(byte_tokenizer()).from_pretrained(tmp_path), tiny.config))
    )
    other = byte_tokenizer()
    other.add_tokens(["one more"])
    vocabulary = dataclasses.replace(tiny.config.decoder, vocab_size=300)
    config = dataclasses.replace(tiny.config, decoder=vocabulary)
    with pytest.raises(CheckpointError, match=r"built with tokenizer [0-9a-f]{64}, the model has"):
        store.check(prompt_fingerprint(Processor(other, config)))
    prompt = dataclasses.replace(tiny.config.prompt, max_text_tokens=20)
    config = dataclasses.replace(tiny.config, prompt=prompt)
    with pytest.raises(CheckpointError, match="max_text_tokens 450, the model has 20: build the"):
        store.check(prompt_fingerprint(Processor(byte_tokenizer(), config)))
    prompt = dataclasses.replace(tiny.config.prompt, template="bare")
    config = dataclasses.replace(tiny.config, prompt=prompt)
    with pytest.raises(CheckpointError, match="template chat, the model has bare: build the"):
        store.check(prompt_fingerprint(Processor(byte_tokenizer(), config)))


def test_a_build_of_another_version_is_not_read(folder, tmp_path):
    content = json.loads((folder / "build.json").read_text()) | {"version": 1}
    (tmp_path / "build.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"build.json is of version 1 of the format, expected 2: "):
        Store.open(tmp_path)


def test_bare_items_are_built_and_read(root, tiny, tmp_path):
    prompt = dataclasses.replace(tiny.config.prompt, template="bare")
    processor = Processor(byte_tokenizer(), dataclasses.replace(tiny.config, prompt=prompt))
    build(Settings(root, tmp_path / "bare", workers=1), processor)
    store = Store.open(tmp_path / "bare")
    store.check(prompt_fingerprint(processor))
    text, image = store.query(0), store.query(4)
    assert processor.tokenizer.decode(text.tokens) == "a thing no. 0.\n"
    assert text.text_length == len(text.tokens) == store.table.query_text_length[0]
    assert len(image.tokens) == len(image.plain_tokens) == 0 == store.table.query_tokens[4]
    assert processor.tokenizer.decode(store.candidate(1).tokens) == "A caption no. 1.\n"


def test_what_is_missing_or_damaged_is_named(root, tiny, tmp_path):
    with pytest.raises(DataError, match="none holds no finished build: run python -m puma_jax"):
        Store.open(tmp_path / "none")
    out = tmp_path / "out"
    build(Settings(root, out, shard_items=5, workers=1), tiny.processor)
    shard = out / "queries/queries-train.array_record-00001-of-00003"
    shard.write_bytes(shard.read_bytes()[:70_000])
    store = Store.open(out)
    assert store.query(0).id == "9:10"
    with pytest.raises(DataError, match="out: row 5 of queries cannot be read: Corrupted"):
        store.query(5)
    (out / "instructions.json").write_text("{}")
    with pytest.raises(DataError, match=r"instructions.json is damaged, it is not what was built"):
        _ = Store.open(out).instructions


@pytest.mark.parametrize("name", ["build.json", "instructions.json", "table/positive_start.npy"])
def test_damage_to_what_is_read_is_noticed(folder, tmp_path, name):
    """Two hundred mutations: an error of ours, or what was built."""
    copied = shutil.copytree(folder, tmp_path / "copy")
    expected = Store.open(folder)
    whole = (folder / name).read_bytes()
    chance = random.Random(0)
    for _ in range(200):
        (copied / name).write_bytes(damaged(whole, chance))
        try:
            store = Store.open(copied)
            assert store.instructions == expected.instructions
            for column, values in vars(store.table).items():
                np.testing.assert_array_equal(values, getattr(expected.table, column))
            assert fields(store.query(3)) == fields(expected.query(3))
        except PumaError:
            continue


def damaged(content, chance):
    """Content with a byte changed, bytes lost, bytes doubled, or a number changed."""
    at, size = chance.randrange(len(content)), chance.choice([1, 1, 2, 40])
    return chance.choice(
        [
            content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :],
            content[:at] + content[at + size :],
            content[:at] + content[at : at + size] + content[at:],
            content[:at],
            re.sub(
                rb"\d+",
                chance.choice([b"-1", b"0", b"7", b"1e9", b"null", b"[]"]),
                content,
                count=1,
            ),
            content[:at] + re.sub(rb"[0-9]", b"3", content[at:], count=1),
        ]
    )


class Bucket(DirFileSystem):
    """A local folder that answers as Google Cloud Storage does to fsspec."""

    protocol = ("gcs", "gs")
    folder = ""

    def __init__(self, **_):
        super().__init__(path=self.folder, fs=LocalFileSystem())

    def open(self, path, mode="rb", **options):
        return super().open(path.removeprefix("gs://bucket/"), mode, **options)

    def exists(self, path, **options):
        return super().exists(path.removeprefix("gs://bucket/"), **options)


@pytest.fixture
def bucket(folder, monkeypatch):
    """A bucket with built data, for fsspec and for array_record's own client."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            name = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).partition("/o/")[2]
            content = (folder.parent / name).read_bytes()
            first, last = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers["Range"]).groups()
            # "-9" asks for the last 9 bytes, "9-" for all but the first 9.
            start = int(first) if first else max(0, len(content) - int(last))
            end = min(len(content), int(last) + 1) if first and last else len(content)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
            self.send_header("Content-Length", str(end - start))
            self.end_headers()
            self.wfile.write(content[start:end])

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", address)
    monkeypatch.setattr(Bucket, "folder", str(folder.parent))
    known = fsspec.registry.get("gcs")
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    yield f"gs://bucket/{Path(folder).name}"
    fsspec.register_implementation("gcs", known, clobber=True)
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_store_is_read_from_a_bucket(bucket, store):
    remote = Store.open(bucket)
    for row in (0, 6, 12):
        assert fields(remote.query(row)) == fields(store.query(row))
    np.testing.assert_array_equal(
        remote.image(remote.candidate(2)), store.image(store.candidate(2))
    )
    for name, column in vars(store.table).items():
        np.testing.assert_array_equal(getattr(remote.table, name), column)
    assert remote.instructions == store.instructions
