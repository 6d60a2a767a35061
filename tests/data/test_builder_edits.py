"""Building after an edit, from sets whose ids collide, and in places that cannot be written."""

import dataclasses
import errno
import os
import shutil
from pathlib import Path

import pytest

from puma_jax import artifacts
from puma_jax.data import mbeir
from puma_jax.data.builder import Settings, build, shards
from puma_jax.data.mbeir import Candidate
from puma_jax.data.store import Store
from puma_jax.errors import ArtifactError, DataError, ImageError
from tests.data import fake_mbeir
from tests.data.builds import candidates_of, files, ids, positives
from tests.reference import random_image


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return fake_mbeir.write_union(tmp_path_factory.mktemp("mbeir"))


@pytest.fixture(scope="module")
def processor(tiny):
    return tiny.processor


@pytest.fixture
def built(root, processor, tmp_path):
    """A function that builds and opens what it has built."""

    def run(root=root, out=tmp_path / "out", **settings) -> Store:
        build(Settings(root, out, **{"shard_items": 5, "workers": 1} | settings), processor)
        return Store.open(out)

    return run


def edit(path: Path, old: str, new: str) -> None:
    """Replace text in a file; where both are as long, only the time of the file tells."""
    content = path.read_text()
    assert content.count(old) == 1
    path.write_text(content.replace(old, new))


def test_an_edit_is_noticed_and_only_its_shards_are_written_again(root, processor, built, tmp_path):
    mine = shutil.copytree(root, tmp_path / "mine")
    pool, out = mine / fake_mbeir.UNION_POOL, tmp_path / "out"
    settings = Settings(mine, out, shard_items=5, workers=1)

    def times() -> dict[str, int]:
        return {p.name: p.stat().st_mtime_ns for p in out.rglob("*.array_record-*")}

    def built_again(expected: set[str]) -> Store:
        """Build, check which shards are written, and that all is as if built from scratch."""
        before = times()
        summary = build(settings, processor)
        after = times()
        assert {name for name in after if after[name] != before[name]} == expected
        assert summary.written == len(expected)
        fresh = tmp_path / f"fresh{len(list(tmp_path.iterdir()))}"
        build(dataclasses.replace(settings, out=fresh), processor)
        assert files(out) == files(fresh)
        return Store.open(out)

    build(settings, processor)
    built_again(set())
    edit(pool, "a caption no. 4", "A CAPTION NO. 4")
    store = built_again({"candidates-train.array_record-00000-of-00003"})
    assert processor.tokenizer.decode(store.candidate(4).tokens).startswith("A CAPTION NO. 4")
    # Two ids change places: all positives of 9:4 are those of 9:7 now.
    content = pool.read_text().replace('"9:4"', "?").replace('"9:7"', '"9:4"')
    pool.write_text(content.replace("?", '"9:7"'))
    store = built_again({f"candidates-train.array_record-0000{n}-of-00003" for n in (0, 1)})
    assert positives(store, 5) == [7]
    # An image of another size, of the same number of bytes; it is that of 3 candidates, 1 query.
    image = mine / fake_mbeir.image_path(2)
    random_image(30, 50, 0).save(tmp_path / "other.png")
    padding = bytes(max(0, image.stat().st_size - (tmp_path / "other.png").stat().st_size))
    image.write_bytes((tmp_path / "other.png").read_bytes() + padding)
    store = built_again(
        {f"candidates-train.array_record-0000{n}-of-00003" for n in (0, 1)}
        | {"queries-train.array_record-00001-of-00003"}
    )
    assert (store.table.candidate_height[2], store.table.candidate_width[2]) == (30, 50)
    # Instructions are no part of a shard.
    edit(mine / "instructions/query_instructions.tsv", "find a picture", "find one pixel")
    store = built_again(set())
    assert store.instructions.prompts[0][0].text == "find one pixel"
    # A damaged or lost file of the table is written again, too.
    column = out / "table/positive_row.npy"
    column.write_bytes(column.read_bytes()[:-1] + b"?")
    with pytest.raises(DataError, match=r"positive_row.npy is damaged"):
        _ = Store.open(out).table
    built_again(set())


def test_documents_that_come_or_go_leave_no_shard_behind(root, processor, tmp_path):
    mine = shutil.copytree(root, tmp_path / "mine")
    settings = Settings(mine, tmp_path / "out", shard_items=5, workers=1)
    build(settings, processor)
    more = [Candidate(f"9:{n}", f"more {n}", None, "text") for n in range(50, 60)]
    for rows, count in ((more, 5), ([], 3)):
        mbeir.write_candidates(mine / fake_mbeir.UNION_POOL, [*fake_mbeir.candidates(), *rows])
        build(settings, processor)
        build(dataclasses.replace(settings, out=tmp_path / f"fresh{count}"), processor)
        assert files(settings.out) == files(tmp_path / f"fresh{count}")
        assert len(list((settings.out / "candidates").glob("*array_record*"))) == count


def test_a_file_that_changes_while_it_is_built_is_named(root, processor, tmp_path, monkeypatch):
    mine = shutil.copytree(root, tmp_path / "mine")
    settings = Settings(mine, tmp_path / "out", workers=1, on_bad_record="skip")
    write = shards.ShardWriter.write

    def edit_first(writer, shard):
        edit(mine / fake_mbeir.UNION_POOL, "a caption no. 4", "A CAPTION NO. 4")
        return write(writer, shard)

    monkeypatch.setattr(shards.ShardWriter, "write", edit_first)
    with pytest.raises(DataError, match=r"cand_pool.jsonl:5: changed while the data were built"):
        build(settings, processor)
    with pytest.raises(DataError, match="holds no finished build"):
        Store.open(settings.out)


def test_an_id_names_one_document_in_all_pools(built, tmp_path):
    root = fake_mbeir.write_sets(tmp_path / "mbeir")
    other = root / "cand_pool/local/mbeir_other_task1_cand_pool.jsonl"
    # The same document in another pool, however it is written, is one.
    same = Candidate("9:1", '"A caption no. 1."', None, "text")
    mbeir.write_candidates(other, [same, same])
    assert ids(candidates_of(built(root))).count("9:1") == 1
    mbeir.write_candidates(other, [same, Candidate("9:4", "another text", None, "text")])
    message = (
        r'^mbeir_other_task1_cand_pool.jsonl:2: did "9:4" is another document in '
        r"mbeir_coco_task3_cand_pool.jsonl:2: give every document an id of its own"
    )
    with pytest.raises(DataError, match=message):
        built(root, out=tmp_path / "again")
    # Sets of which only one is built collide in the same way.
    with pytest.raises(DataError, match=message):
        built(root, out=tmp_path / "one", sets=("oven",))


def test_equal_contents_have_one_number_whatever_their_ids_and_paths(built, root, tmp_path):
    mine = shutil.copytree(root, tmp_path / "mine")
    shutil.copy(mine / fake_mbeir.image_path(0), mine / "copy.png")
    more = [
        Candidate("8:0", None, "copy.png", "image"),
        Candidate("8:1", "A caption no. 1.", None, "text"),
        Candidate("8:2", "a caption no. 2", None, "text"),
        Candidate("8:3", "a caption no. 1", fake_mbeir.image_path(0), "image,text"),
    ]
    mbeir.write_candidates(mine / fake_mbeir.UNION_POOL, [*fake_mbeir.candidates(), *more])
    for images in ("inline", "path"):
        store = built(mine, out=tmp_path / images, images=images)
        number = dict(zip(ids(candidates_of(store)), store.table.candidate_content, strict=True))
        assert number["8:0"] == number["9:0"]
        assert number["8:1"] == number["9:1"]
        # Rows 0 and 12 would be of one image, too, were there no texts.
        assert len(set(number.values())) == len(number) - 2


def test_a_link_out_of_the_benchmark_is_a_bad_record(built, root, tmp_path):
    mine = shutil.copytree(root, tmp_path / "mine")
    image = mine / fake_mbeir.image_path(2)
    image.unlink()
    image.symlink_to(root / fake_mbeir.image_path(2))
    with pytest.raises(DataError, match=r"jsonl:3: img_path \"mbeir_images/2.png\" leads out of"):
        built(mine)
    built(mine, out=tmp_path / "inside", on_bad_record="skip")
    store = Store.open(built(root, out=tmp_path / "paths", images="path").path, root=mine)
    with pytest.raises(ImageError, match=r"9:6 \(mbeir_images/2.png\): .* leads out of the root"):
        store.image(store.candidate(6))


def test_a_picture_that_breaks_off_is_a_bad_record(built, root, tmp_path):
    mine = shutil.copytree(root, tmp_path / "mine")
    image = mine / fake_mbeir.image_path(2)
    image.write_bytes(image.read_bytes()[:-400])
    with pytest.raises(DataError, match=r"jsonl:3: img_path mbeir_images/2.png cannot be decoded"):
        built(mine)


def test_one_process_at_a_time_writes_a_build(built, root, tmp_path):
    with (
        artifacts.lock(tmp_path / "out"),
        pytest.raises(ArtifactError, match="another process writes"),
    ):
        built()
    built()


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_read(
    root, processor, tmp_path
):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(ArtifactError, match="file"):
            build(Settings(root, out, workers=1), processor)


def test_a_full_disk_is_one_line_and_the_command_goes_on(root, processor, tmp_path, monkeypatch):
    settings = Settings(root, tmp_path / "out", shard_items=5, workers=1)
    replace, written = os.replace, []

    def full_at_the_fifth(source, target):
        written.append(target)
        if len(written) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full_at_the_fifth)
        with pytest.raises(ArtifactError, match=r"written: No space left on device$"):
            build(settings, processor)
    assert not list(settings.out.rglob("*.partial"))
    build(settings, processor)
    build(dataclasses.replace(settings, out=tmp_path / "fresh"), processor)
    assert files(settings.out) == files(tmp_path / "fresh")
