"""Folders of photos: every picture is taken once, and what is not taken is counted."""

import io
import json
import os
import sys

import numpy as np
import pytest
from PIL import Image

from puma_jax.errors import DataError
from puma_jax.search.corpus import open_corpus
from tests.reference import random_image


def jpeg():
    file = io.BytesIO()
    random_image(20, 30).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    return folder


def write(folder, *names, content=None):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg() if content is None else content)


def ids(corpus):
    return [corpus.read(number)[0] for number in range(corpus.items)]


def test_what_is_no_picture_is_counted_in_one_line(photos):
    write(photos, "b/1.jpg", "a.PNG", "c.tiff", "no suffix")
    write(photos, "paper.pdf", "film.mpg", "old.eps", "b/film.MPG", "photo.jxl", content=b"%PDF")
    write(photos, "README", ".DS_Store", ".hidden.jpg", content=b"text")
    os.mkfifo(photos / "fifo.jpg")
    corpus = open_corpus(photos)
    assert ids(corpus) == ["a.PNG", "b/1.jpg", "c.tiff", "no suffix"]
    assert corpus.passed_over == (
        f"Passed over in {photos}: .mpg (2), hidden files (2), .eps (1), .jxl (1), .pdf (1), "
        "files without a suffix that are no images (1), pipes, sockets and devices (1)"
    )


def test_many_kinds_of_other_files_stay_one_short_line(photos):
    write(photos, "a.jpg", *(f"{number}.a{number:02}" for number in range(20)))
    assert open_corpus(photos).passed_over.endswith(".a08 (1), .a09 (1), others (10)")


def test_a_folder_of_pictures_alone_has_nothing_to_tell(photos):
    write(photos, "a.jpg", "b/c.jpg")
    assert open_corpus(photos).passed_over == ""


def test_linked_folders_are_read_once(photos, tmp_path):
    outside = tmp_path / "outside"
    write(outside, "1.jpg", "deep/2.jpg")
    write(photos, "z/own.jpg")
    (photos / "a").symlink_to(photos / "z")
    (photos / "b").symlink_to(outside)
    (photos / "c").symlink_to(outside)
    (photos / "z/up").symlink_to(photos)
    (outside / "back").symlink_to(photos)
    corpus = open_corpus(photos)
    assert ids(corpus) == ["b/1.jpg", "b/deep/2.jpg", "z/own.jpg"]
    assert corpus.passed_over.endswith(": links to folders that are read already (4)")


def test_links_that_lead_nowhere_or_in_a_circle_are_counted(photos, tmp_path):
    write(photos, "a.jpg")
    write(tmp_path, "elsewhere.jpg")
    (photos / "linked.jpg").symlink_to(tmp_path / "elsewhere.jpg")
    (photos / "dangling.jpg").symlink_to("nothing.jpg")
    (photos / "one.jpg").symlink_to("two.jpg")
    (photos / "two.jpg").symlink_to("one.jpg")
    corpus = open_corpus(photos)
    assert ids(corpus) == ["a.jpg", "linked.jpg"]
    assert corpus.passed_over.endswith(": broken links (3)")


NAMES = [
    "Screenshot 2024-01-01 at 9.41.00\u202fAM.png",
    "全角\u3000空白.jpg",
    "👩\u200d🚀.jpg",
    "\ue000.jpg",
]


def test_names_that_a_person_can_read_are_ids(photos, tmp_path):
    write(photos, *NAMES)
    assert ids(open_corpus(photos)) == sorted(NAMES)
    lines = [json.dumps({"id": name, "image": f"photos/{name}"}) for name in NAMES]
    (tmp_path / "items.jsonl").write_text("\n".join(lines))
    assert ids(open_corpus(tmp_path / "items.jsonl")) == NAMES


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names themselves")
@pytest.mark.parametrize("name", [b"a\nb.jpg", b"a\xffb.jpg", "a\u2028b.jpg".encode()])
def test_a_name_that_is_no_id_is_refused_and_the_others_are_read(photos, name):
    write(photos, "z.jpg", "0.jpg", os.fsdecode(name))
    corpus = open_corpus(photos)
    assert [corpus.read(number)[0] for number in (0, 2)] == ["0.jpg", "z.jpg"]
    with pytest.raises(
        DataError, match=r"photos: id .* invalid Unicode, .*: rename the file"
    ) as raised:
        corpus.read(1)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("identifier", ["\ud800", "a\tb", "a\u2028b", "a\x85"])
def test_an_id_that_does_not_fit_on_a_line_is_refused(tmp_path, identifier):
    (tmp_path / "items.jsonl").write_text(json.dumps({"id": identifier, "text": "a shoe"}))
    with pytest.raises(
        DataError, match=r"items.jsonl:1: id .* holds control characters or invalid"
    ):
        open_corpus(tmp_path / "items.jsonl").read(0)


def test_heic_files_are_taken_with_the_extra_and_counted_without(photos, monkeypatch):
    write(photos, "a.jpg", "b.HEIC")
    assert ids(open_corpus(photos)) == ["a.jpg", "b.HEIC"]
    monkeypatch.delitem(Image.OPEN, "HEIF")
    for suffix in (".heic", ".heics", ".heif", ".heifs", ".hif"):
        monkeypatch.delitem(Image.EXTENSION, suffix)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    corpus = open_corpus(photos)
    assert ids(corpus) == ["a.jpg"]
    assert corpus.passed_over.endswith(": .heic (1); HEIC needs pip install pillow-heif")


def test_the_fingerprint_is_that_of_names_and_sizes(photos):
    write(photos, "a.jpg", "b.jpg")
    first = open_corpus(photos).fingerprint
    write(photos, "notes.txt", content=b"text")
    assert open_corpus(photos).fingerprint == first
    write(photos, "b.jpg", content=b"longer" * 1000)
    assert open_corpus(photos).fingerprint != first


def test_a_folder_without_pictures_says_what_it_holds(photos):
    write(photos, "a.txt", "b.txt", content=b"text")
    with pytest.raises(DataError, match=r"photos holds no images; it holds \.txt \(2\)$"):
        open_corpus(photos)


def test_a_picture_without_a_suffix_is_read(photos):
    write(photos, "0a1b2c")
    identifier, item, _ = open_corpus(photos).read(0)
    assert identifier == "0a1b2c"
    with Image.open(item["image"]) as image:
        assert np.asarray(image).shape == (20, 30, 3)


def write_items(path, *items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return open_corpus(path)


def test_further_fields_are_kept(tmp_path):
    fields = {"price": 12.5, "sold": False, "sizes": ["S", 3], "note": "Größe", "did": "7"}
    item = {"id": "a", "text": "a shoe", **fields, "nothing": None}
    assert write_items(tmp_path / "items.jsonl", item).read(0).fields == fields


@pytest.mark.parametrize("name", ["img", "imge", "Image", "images"])
def test_a_field_that_looks_like_a_missing_one_is_refused(tmp_path, name):
    corpus = write_items(
        tmp_path / "items.jsonl",
        {"id": "a", "text": "a shoe", name: "a.jpg"},
        {"id": "b", "text": "a shoe", "image": "a.jpg", name: "b.jpg"},
    )
    with pytest.raises(DataError, match=f'items.jsonl:1: field "{name}" looks like image'):
        corpus.read(0)
    (tmp_path / "a.jpg").write_bytes(jpeg())
    assert corpus.read(1).fields == {name: "b.jpg"}


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ({"price": {"now": 3}}, r'field "price" holds \{...\}, expected a text, a number'),
        ({"price": [[1]]}, "expected a text, a number"),
        ({"price": [None]}, "holds null"),
        ({"price": 2**63}, "a number of 64 bits"),
        ({"price": "\ud800"}, "expected a text"),
        ({"": 1}, 'a field is named ""'),
    ],
)
def test_a_field_that_stores_cannot_hold_is_refused(tmp_path, field, said):
    corpus = write_items(tmp_path / "items.jsonl", {"id": "a", "text": "a shoe", **field})
    with pytest.raises(DataError, match=said):
        corpus.read(0)
