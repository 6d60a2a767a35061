"""Vectors on disk: those of the embedder, whole, and the same bytes however often it was killed."""

import json
import multiprocessing
import random
import shutil
import time

import ml_dtypes
import numpy as np
import pytest

from puma_jax import Embedder
from puma_jax import embed as entry_point
from puma_jax.data import mbeir
from puma_jax.data.mbeir import Candidate
from puma_jax.errors import (
    ArtifactError,
    ConfigError,
    DataError,
    ImageError,
    VectorsError,
)
from puma_jax.search import embedding
from puma_jax.search.corpus import open_corpus
from puma_jax.search.exact import ExactIndex
from puma_jax.search.shards import Vectors
from puma_jax.search.topk import top_k
from tests.data.fake_mbeir import WORDS, image_path, write_images
from tests.reference import random_image

ITEMS = 60
POOL = "cand_pool/local/mbeir_mine_task2_cand_pool.jsonl"


def candidate(number: int) -> Candidate:
    text = " ".join(random.Random(number).choices(WORDS, k=1 + number % 9))
    modality = mbeir.MODALITIES[number % 3]
    return Candidate(
        f"mine:{number}",
        text if "text" in modality else None,
        image_path(number) if "image" in modality else None,
        modality,
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("benchmark")
    write_images(root)
    mbeir.write_candidates(root / POOL, map(candidate, range(ITEMS)))
    return root


@pytest.fixture(scope="module")
def embedder(tiny):
    return Embedder.load(tiny.folder, dtype="float32")


@pytest.fixture(scope="module")
def expected(embedder, root):
    corpus = open_corpus(root / POOL)
    return embedder.encode([corpus.read(row)[1] for row in range(ITEMS)], progress=False)


def embed(tiny, source, out, **options):
    entry_point.main(str(tiny.folder), source, out, items_per_shard=16, **options)


@pytest.fixture(scope="module")
def whole(tiny, root, tmp_path_factory):
    """A folder that nothing interrupted."""
    out = tmp_path_factory.mktemp("vectors") / "whole"
    embed(tiny, root / POOL, out)
    return out


def read(folder, **options):
    return np.concatenate([*Vectors(folder, **options).parts(7)])


def shard(folder, number):
    (found,) = folder.glob(f"{number:05}-*")
    return found


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".lock")
    }


def test_vectors_and_ids_are_those_of_the_items(whole, expected):
    vectors = Vectors(whole, verify=True)
    assert len(vectors) == ITEMS
    assert vectors.ids(range(ITEMS)) == [f"mine:{number}" for number in range(ITEMS)]
    np.testing.assert_allclose(read(whole), expected, rtol=0, atol=1e-6)
    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["vectors"] == {"items": ITEMS, "skipped": 0}
    assert [name[:5] for name in manifest["shards"]] == ["00000", "00001", "00002", "00003"]


def test_the_vectors_can_be_searched(whole, expected):
    scores, rows = top_k(expected[1:3], Vectors(whole).parts(), 10)
    np.testing.assert_allclose(scores, -np.sort(-(expected[1:3] @ expected.T))[:, :10], atol=1e-6)
    assert Vectors(whole).ids(rows[:, 0]) == ["mine:1", "mine:2"]


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_smaller_dtypes_are_the_float32_vectors_rounded(tiny, root, whole, tmp_path, dtype):
    embed(tiny, root / POOL, tmp_path / "small", vectors_dtype=dtype)
    full, small = read(whole), read(tmp_path / "small")
    if dtype == "bfloat16":
        np.testing.assert_array_equal(small, full.astype(ml_dtypes.bfloat16).astype(np.float32))
    else:
        largest = np.abs(full).max(1, keepdims=True)
        assert (np.abs(small - full) <= largest / 254 * 1.001).all()
    size = (shard(tmp_path / "small", 0) / "vectors.safetensors").stat().st_size
    assert size < 0.6 * (shard(whole, 0) / "vectors.safetensors").stat().st_size


def test_fewer_values_are_the_first_ones_and_queries_have_as_many(tiny, root, whole, tmp_path):
    embed(tiny, root / POOL, tmp_path / "short", dimensions=12, vectors_dtype="ubinary")
    first = np.where(read(whole)[:, :12] > 0, 1, -1) / np.sqrt(12)
    np.testing.assert_allclose(read(tmp_path / "short"), first, rtol=1e-6)
    index = ExactIndex(tmp_path / "short")
    assert index.width == 12
    query = Embedder.load(tiny.folder, dtype="float32").encode(["a"], dimensions=index.width)
    (hits,) = index.search(query, 3)
    scores = -np.sort(-(query @ first.T))[0, :3]
    np.testing.assert_allclose([hit.score for hit in hits], scores, atol=1e-6)
    with pytest.raises(ConfigError, match=r"dimensions 65 must be in \[1, 64\]"):
        embed(tiny, root / POOL, tmp_path / "wide", dimensions=65)
    assert not (tmp_path / "wide").exists()


def test_json_lines_and_folders_of_images(tiny, embedder, tmp_path):
    photos = tmp_path / "photos"
    (photos / "b").mkdir(parents=True)
    images = {"b/2.png": random_image(40, 60, 2), "a.jpg": random_image(50, 30, 1)}
    for name, image in images.items():
        image.save(photos / name)
    (photos / "notes.txt").write_text("no image")
    embed(tiny, photos, tmp_path / "of-folder")
    vectors = Vectors(tmp_path / "of-folder")
    assert vectors.ids([0, 1]) == ["a.jpg", "b/2.png"]
    items = [{"image": photos / name} for name in ("a.jpg", "b/2.png")]
    np.testing.assert_allclose(read(tmp_path / "of-folder"), embedder.encode(items), atol=1e-6)

    lines = [
        {"id": "one shoe", "text": "a red shoe", "image": "b/2.png"},
        {"id": "2", "text": "a blue shoe"},
    ]
    (photos / "items.jsonl").write_text("\n".join(map(json.dumps, lines)))
    embed(tiny, photos / "items.jsonl", tmp_path / "of-lines", instruction="Find shoes.")
    assert Vectors(tmp_path / "of-lines").ids([1, 0]) == ["2", "one shoe"]
    items = [{"text": "a red shoe", "image": photos / "b/2.png"}, {"text": "a blue shoe"}]
    np.testing.assert_allclose(
        read(tmp_path / "of-lines"), embedder.encode(items, instruction="Find shoes."), atol=1e-6
    )


def test_killed_ten_times_it_ends_with_the_same_bytes(tiny, root, tmp_path):
    whole, out, chance = tmp_path / "whole", tmp_path / "killed", random.Random(time.time_ns())
    arguments, settings = (str(tiny.folder), root / POOL), {"items_per_shard": 3}
    entry_point.main(*arguments, whole, **settings)
    # Children are forked from a server that has imported everything, and start in little time.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["puma_jax.embed"])

    def start():
        child = context.Process(target=entry_point.main, args=(*arguments, out), kwargs=settings)
        child.start()
        return child

    for _ in range(10):
        child = start()
        enough = len(list(out.glob("0*"))) + chance.randint(0, 2)
        while child.is_alive() and len(list(out.glob("0*"))) < enough:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.1))
        child.kill()
        child.join()
    child = start()
    child.join()
    assert child.exitcode == 0
    assert contents(out) == contents(whole)


def test_several_processes_share_the_shards(tiny, root, whole, tmp_path, capsys):
    out = tmp_path / "parts"
    embed(tiny, root / POOL, out, part="1/2")
    assert "shards of other parts are still missing" in capsys.readouterr().out
    with pytest.raises(VectorsError, match="vectors are unfinished: run the same command again"):
        Vectors(out)
    embed(tiny, root / POOL, out, part="0/2")
    assert contents(out) == contents(whole)
    with pytest.raises(ConfigError, match="part 2/2: parts are 0/2 to 1/2"):
        embed(tiny, root / POOL, out, part="2/2")
    with pytest.raises(ConfigError, match="items per shard are 0, expected at least 1"):
        entry_point.main(str(tiny.folder), root / POOL, out, items_per_shard=0)


def test_vectors_of_another_model_corpus_or_setting_are_not_mixed(tiny, root, whole, tmp_path):
    other = tmp_path / "other"
    Embedder.load(tiny.folder, dtype=None).keep_layers(2).save(other)
    with pytest.raises(ArtifactError, match=r"whole holds vectors .* differs in model"):
        entry_point.main(str(other), root / POOL, whole, items_per_shard=16)
    with pytest.raises(ArtifactError, match="differs in instruction"):
        embed(tiny, root / POOL, whole, instruction="Find it.")
    with pytest.raises(ArtifactError, match="differs in corpus"):
        embed(tiny, root / "mbeir_images", whole)
    with pytest.raises(ArtifactError, match="is not empty and holds no vectors"):
        embed(tiny, root / POOL, root)


@pytest.mark.parametrize("file", ["vectors.safetensors", "ids.txt"])
def test_a_truncated_file_is_found_and_named(tiny, root, whole, tmp_path, file):
    out = tmp_path / "damaged"
    shutil.copytree(whole, out)
    path = shard(out, 1) / file
    path.write_bytes(path.read_bytes()[:-5])
    for opened in (Vectors, lambda out: embed(tiny, root / POOL, out)):
        with pytest.raises(VectorsError, match=rf"00001-\w+/{file} is truncated .* embed again"):
            opened(out)
    shutil.rmtree(shard(out, 1))
    embed(tiny, root / POOL, out)
    assert contents(out) == contents(whole)


def test_a_flipped_bit_and_a_foreign_shard_are_found(tiny, root, whole, tmp_path):
    out = tmp_path / "flipped"
    shutil.copytree(whole, out)
    path = shard(out, 2) / "vectors.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(VectorsError, match=r"00002-\w+/vectors.safetensors is damaged: delete"):
        Vectors(out, verify=True)
    record = json.loads((shard(whole, 2) / "shard.json").read_text())
    (shard(out, 2) / "shard.json").write_text(json.dumps({**record, "job": "another"}))
    with pytest.raises(VectorsError, match=r"00002-\w+ does not belong to .*job\.json: delete it"):
        embed(tiny, root / POOL, out)


def test_vectors_of_another_version_are_refused_by_name(tiny, root, whole, tmp_path):
    out = tmp_path / "older"
    shutil.copytree(whole, out)
    for name in ("job.json", "manifest.json"):
        values = json.loads((out / name).read_text())
        shape = values["job"]["shape"] if "job" in values else values["shape"]
        shape["groups"] = shape.pop("data_shards")
        (out / name).write_text(json.dumps(values))
    with pytest.raises(VectorsError, match=r"older/manifest.json: job.shape.groups is unknown"):
        Vectors(out)
    with pytest.raises(VectorsError, match=r"older/job.json: shape.groups is unknown"):
        embed(tiny, root / POOL, out)


def test_items_that_cannot_be_read_stop_the_run_or_are_noted(tiny, root, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(root, broken)
    (broken / image_path(3)).write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"mine:\d+: .*3.png cannot be decoded"):
        embed(tiny, broken / POOL, tmp_path / "stops")
    embed(tiny, broken / POOL, tmp_path / "skips", on_bad_record="skip")
    lost = [n for n in range(ITEMS) if candidate(n).image == image_path(3)]
    vectors = Vectors(tmp_path / "skips")
    assert vectors.ids(range(len(vectors))) == [f"mine:{n}" for n in range(ITEMS) if n not in lost]
    noted = "".join(path.read_text() for path in sorted(tmp_path.glob("skips/*/skipped.txt")))
    assert [line.split(": ")[0] for line in noted.splitlines()] == [f"mine:{n}" for n in lost]


def test_items_larger_than_all_of_the_sample_are_embedded_too(
    tiny, embedder, root, tmp_path, monkeypatch
):
    monkeypatch.setattr(embedding, "_SAMPLE", 2)
    items = [{"text": "a"}, {"text": "word " * 80}, {"image": image_path(2)}, {"text": "b"}]
    lines = [json.dumps({"id": str(number), **item}) for number, item in enumerate(items)]
    (tmp_path / "items.jsonl").write_text("\n".join(lines))
    embed(tiny, tmp_path / "items.jsonl", tmp_path / "out", images=root)
    items[2] = {"image": root / image_path(2)}
    np.testing.assert_allclose(read(tmp_path / "out"), embedder.encode(items), atol=1e-6)


def test_a_corpus_of_which_nothing_can_be_read_is_named(tiny, tmp_path):
    (tmp_path / "pictures").mkdir()
    for number in range(3):
        (tmp_path / f"pictures/{number}.png").write_bytes(b"no image")
    message = (
        "pictures: none of 3 items looked at can be read; the first of them: 0.png: .* decoded"
    )
    with pytest.raises(DataError, match=message):
        embed(tiny, tmp_path / "pictures", tmp_path / "out", on_bad_record="skip")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"text": "a shoe"}, "items.jsonl:1: id is missing"),
        ({"id": "1"}, "items.jsonl:1: there is neither text nor image"),
        ({"id": "1", "txt": "a shoe"}, 'field "txt" looks like text, which is missing'),
        ({"id": 1, "text": "a shoe"}, "id 1 is not a text"),
        ({"id": "a\nb", "text": "a shoe"}, "holds control characters"),
    ],
)
def test_lines_that_are_no_items_are_named(tmp_path, line, message):
    (tmp_path / "items.jsonl").write_text(json.dumps(line))
    with pytest.raises(DataError, match=message):
        open_corpus(tmp_path / "items.jsonl").read(0)


def test_sources_that_hold_nothing_are_named(tmp_path):
    with pytest.raises(DataError, match="holds no images"):
        open_corpus(tmp_path)
    with pytest.raises(DataError, match="neither a file of JSON lines, a table, nor a folder"):
        open_corpus(tmp_path / "nothing")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no items"):
        open_corpus(tmp_path / "empty.jsonl")
