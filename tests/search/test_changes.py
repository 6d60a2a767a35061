"""A corpus that changes: only what is new or different is embedded, and nothing old stays."""

import json
import os
import shutil

import numpy as np
import pytest

from puma_jax import Embedder
from puma_jax import embed as entry_point
from puma_jax.artifacts import lock
from puma_jax.errors import ArtifactError, DataError, VectorsError
from puma_jax.search.corpus import open_corpus
from puma_jax.search.shards import Vectors
from tests.reference import random_image


@pytest.fixture(scope="module")
def embedder(tiny):
    return Embedder.load(tiny.folder, dtype="float32")


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(6):
        random_image(40, 60, number).save(folder / f"{number}.png")
    return folder


def embed(tiny, source, out, capsys, **options):
    """Embed in shards of two, and return the first line printed of what was done."""
    capsys.readouterr()
    entry_point.main(str(tiny.folder), source, out, items_per_shard=2, **options)
    return capsys.readouterr().out.splitlines()[-2]


def check(out, source, embedder):
    """Check that the folder holds the vectors of the corpus as it is, and no others."""
    corpus = open_corpus(source)
    named = [corpus.read(row) for row in range(corpus.items)]
    vectors = Vectors(out, verify=True)
    assert vectors.ids(range(len(vectors))) == [found.id for found in named]
    expected = embedder.encode([found.item for found in named], progress=False)
    np.testing.assert_allclose(np.concatenate([*vectors.parts()]), expected, rtol=0, atol=1e-6)
    shards = json.loads((out / "manifest.json").read_text())["shards"]
    assert sorted(path.name for path in out.glob("0*")) == sorted(shards)


def replace_image(path, number, *, keep_size=False):
    """Put another picture in the place of one; of the same length and time if asked to."""
    before = path.stat()
    random_image(40, 60, number).save(path)
    if keep_size:
        content = path.read_bytes()
        room = before.st_size - len(content)
        path.write_bytes(content + b"\0" * max(room, 0))


def test_a_rerun_says_that_there_is_nothing_to_do(tiny, photos, tmp_path, embedder, capsys):
    out = tmp_path / "out"
    assert embed(tiny, photos, out, capsys) == "6 of 6 items embedded"
    assert embed(tiny, photos, out, capsys) == "Nothing to do: all 6 items are embedded"
    for path in photos.iterdir():
        os.utime(path)  # another time, the same content
    assert embed(tiny, photos, out, capsys) == "Nothing to do: all 6 items are embedded"
    check(out, photos, embedder)


@pytest.mark.parametrize("keep_size", [False, True])
def test_a_replaced_image_is_embedded_anew(tiny, photos, tmp_path, embedder, capsys, keep_size):
    out = tmp_path / "out"
    embed(tiny, photos, out, capsys)
    replace_image(photos / "3.png", 33, keep_size=keep_size)
    assert embed(tiny, photos, out, capsys) == (
        "1 of 6 items embedded, 5 kept from before, 1 old vectors removed"
    )
    check(out, photos, embedder)


def test_only_added_items_are_embedded_wherever_they_come(tiny, photos, tmp_path, embedder, capsys):
    out = tmp_path / "out"
    embed(tiny, photos, out, capsys)
    random_image(40, 60, 7).save(photos / "0a.png")
    random_image(40, 60, 8).save(photos / "9.png")
    assert embed(tiny, photos, out, capsys) == "2 of 8 items embedded, 6 kept from before"
    check(out, photos, embedder)


def test_removed_items_are_gone(tiny, photos, tmp_path, embedder, capsys):
    out = tmp_path / "out"
    embed(tiny, photos, out, capsys)
    for number in (0, 3, 4):
        (photos / f"{number}.png").unlink()
    assert embed(tiny, photos, out, capsys) == (
        "0 of 3 items embedded, 3 kept from before, 3 old vectors removed"
    )
    check(out, photos, embedder)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_kept_vectors_keep_their_bits(tiny, photos, tmp_path, capsys, dtype):
    out = tmp_path / "out"
    embed(tiny, photos, out, capsys, vectors_dtype=dtype)
    before = np.concatenate([*Vectors(out).parts()])
    (photos / "0.png").unlink()
    embed(tiny, photos, out, capsys, vectors_dtype=dtype)
    np.testing.assert_array_equal(np.concatenate([*Vectors(out).parts()]), before[1:])


def test_lines_follow_their_texts_and_images(tiny, photos, tmp_path, embedder, capsys):
    out, source = tmp_path / "out", photos / "items.jsonl"
    items = [{"id": str(n), "image": f"{n}.png", "text": f"shoe {n}"} for n in range(5)]

    def write():
        source.write_text("".join(json.dumps(item) + "\n" for item in items))

    write()
    assert embed(tiny, source, out, capsys) == "5 of 5 items embedded"
    replace_image(photos / "2.png", 22)  # the file of lines stays as it is
    assert embed(tiny, source, out, capsys) == (
        "1 of 5 items embedded, 4 kept from before, 1 old vectors removed"
    )
    check(out, source, embedder)
    items[4]["text"] = "boot"
    items[0], items[1] = items[1], items[0]
    write()
    assert embed(tiny, source, out, capsys) == (
        "1 of 5 items embedded, 4 kept from before, 1 old vectors removed"
    )
    check(out, source, embedder)


def test_fields_alone_are_updated_and_nothing_is_embedded(
    tiny, tmp_path, embedder, capsys, monkeypatch
):
    out, source = tmp_path / "out", tmp_path / "items.jsonl"

    def write(**last):
        items = [{"id": str(n), "text": f"shoe {n}", "price": n} for n in range(3)]
        items[2] |= last
        source.write_text("".join(json.dumps(item) + "\n" for item in items))

    write()
    embed(tiny, source, out, capsys)
    monkeypatch.setattr(Embedder, "preprocess", None)  # nothing may be embedded
    for fields in ({"price": 3.5}, {"price": 2, "sizes": ["S", "M"]}, {"price": True}):
        write(**fields)
        said = embed(tiny, source, out, capsys)
        assert said == "0 of 3 items embedded, 3 kept from before, fields of 1 updated"
        assert [record.fields for record in Vectors(out).items()] == [
            {"price": 0},
            {"price": 1},
            fields,
        ]


def test_other_images_for_half_a_folder_do_not_mix(tiny, photos, tmp_path, embedder, capsys):
    out, source, others = tmp_path / "out", tmp_path / "items.jsonl", tmp_path / "others"
    others.mkdir()
    items = [{"id": str(n), "image": f"{n}.png"} for n in range(4)]
    source.write_text("".join(json.dumps(item) + "\n" for item in items))
    for number in range(4):
        random_image(40, 60, 50 + number).save(others / f"{number}.png")
    embed(tiny, source, out, capsys, images=photos, part="0/2")
    assert embed(tiny, source, out, capsys, images=others) == "4 of 4 items embedded"
    corpus = open_corpus(source, others)
    expected = embedder.encode([corpus.read(row)[1] for row in range(4)], progress=False)
    np.testing.assert_allclose(np.concatenate([*Vectors(out).parts()]), expected, atol=1e-6)


def test_skipped_items_are_counted_and_embedded_once_they_are_mended(
    tiny, photos, tmp_path, embedder, capsys
):
    out, good = tmp_path / "out", (photos / "3.png").read_bytes()
    (photos / "3.png").write_bytes(b"no image")
    said = embed(tiny, photos, out, capsys, on_bad_record="skip")
    assert said == "5 of 6 items embedded, 1 skipped (see skipped.txt in the shards)"
    said = embed(tiny, photos, out, capsys, on_bad_record="skip")
    assert (
        said
        == "0 of 6 items embedded, 5 kept from before, 1 skipped (see skipped.txt in the shards)"
    )
    with pytest.raises(DataError.__mro__[1], match=r"3\.png"):
        embed(tiny, photos, out, capsys)  # a shard made with skip does not pass for a whole one
    (photos / "3.png").write_bytes(good)
    assert embed(tiny, photos, out, capsys) == "1 of 6 items embedded, 5 kept from before"
    check(out, photos, embedder)


def test_a_corpus_of_which_nothing_can_be_read_is_an_error_of_one_line(tiny, tmp_path, capsys):
    source = tmp_path / "items.jsonl"
    source.write_text("no json\n" * 5)
    with pytest.raises(DataError, match="none of 5 items looked at can be read"):
        embed(tiny, source, tmp_path / "out", capsys, on_bad_record="skip")


def test_a_second_process_on_the_same_folder_is_refused(tiny, photos, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    with lock(tmp_path / "out"), pytest.raises(ArtifactError, match="another process writes"):
        embed(tiny, photos, tmp_path / "out", capsys)


def test_the_shape_of_rows_does_not_depend_on_the_machine(tiny, photos, tmp_path, capsys):
    """Machines with other numbers of devices share one folder."""
    from puma_jax.parallel.mesh import MeshConfig

    out = tmp_path / "out"
    embed(tiny, photos, out, capsys, part="0/2", mesh=MeshConfig(data=2, fsdp=1, tensor=4))
    embed(tiny, photos, out, capsys, part="1/2")
    assert len(Vectors(out)) == 6


@pytest.mark.parametrize("name", ["job.json", "manifest.json", "shard.json", "items.jsonl"])
def test_a_damaged_file_is_named(tiny, photos, tmp_path, capsys, name):
    out = tmp_path / "out"
    embed(tiny, photos, out, capsys)
    path = next(out.rglob(name))
    for content in (b"{}", b"[1]", b"\xff", path.read_bytes().replace(b":", b";", 1)):
        path.write_bytes(content)
        with pytest.raises((VectorsError, ArtifactError), match=name.replace(".", r"\.")) as error:
            Vectors(out) if name == "manifest.json" else embed(tiny, photos, out, capsys)
        assert "\n" not in str(error.value)


def test_a_copied_folder_of_photos_is_another_corpus(tiny, photos, tmp_path, capsys):
    embed(tiny, photos, tmp_path / "out", capsys)
    shutil.copytree(photos, tmp_path / "copy")
    with pytest.raises(ArtifactError, match="differs in corpus"):
        embed(tiny, tmp_path / "copy", tmp_path / "out", capsys)
