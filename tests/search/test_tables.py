"""Tables are read as pandas, pyarrow and datasets read them, and change as other corpora do."""

import datetime
import decimal
import io
import json
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from puma_jax import Embedder
from puma_jax.data import arrow
from puma_jax.data.tabular import open_table
from puma_jax.errors import ConfigError, DataError
from puma_jax.search.corpus import Columns, open_corpus
from puma_jax.search.embedding import embed
from puma_jax.search.shards import Vectors
from tests.reference import random_image

pyarrow = pytest.importorskip("pyarrow", reason="pip install -e '.[tables]'")
datasets = pytest.importorskip("datasets", reason="pip install -e '.[tables]'")
import pandas as pd  # noqa: E402
import pyarrow.parquet as parquet  # noqa: E402


def png(seed):
    file = io.BytesIO()
    random_image(40, 60, seed).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def shop(tmp_path):
    folder = tmp_path / "shop"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(png(number))
    return folder


ROWS = [
    {"sku": "007", "title": 'a "red"\nshoe, new', "file": "0.png", "price": 12, "ok": True,
     "size": 9.5, "code": "01", "note": "Größe"},
    {"sku": "008", "title": "123", "file": None, "price": None, "ok": False, "size": 8.0,
     "code": "2", "note": None},
    {"sku": "9", "title": None, "file": "2.png", "price": -3, "ok": None, "size": 1e-3,
     "code": "3", "note": "x"},
]  # fmt: skip
COLUMNS = Columns("sku", "title", "file")


def read_all(corpus):
    return [corpus.read(row) for row in range(corpus.items)]


def expected(folder):
    found = []
    for row in ROWS:
        item = {"text": row["title"], "image": row["file"] and folder / row["file"]}
        fields = {name: row[name] for name in ("price", "ok", "size", "code", "note")}
        found.append(
            (
                row["sku"],
                {name: value for name, value in item.items() if value},
                {name: value for name, value in fields.items() if value is not None},
            )
        )
    return found


def check_types(found):
    assert type(found[0].fields["price"]) is int
    assert type(found[1].fields["size"]) is float
    assert type(found[0].fields["ok"]) is bool
    assert found[0].fields["code"] == "01"


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet", "dataset"])
def test_every_table_gives_the_same_items(shop, suffix):
    path = shop / f"items{suffix}"
    frame = pd.DataFrame(ROWS)
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=2)
    elif suffix == "dataset":
        datasets.Dataset.from_list(ROWS).save_to_disk(path)
    else:
        frame["price"] = frame["price"].astype("Int64")
        frame["ok"] = frame["ok"].astype("boolean")
        frame.to_csv(path, sep="\t" if suffix == ".tsv" else ",", index=False)
    corpus = open_corpus(path, shop, COLUMNS)
    assert [tuple(item) for item in read_all(corpus)] == expected(shop)
    check_types(read_all(corpus))
    assert corpus.notes() == ["Kept as fields, not embedded: price, ok, size, code, note"]


def test_rows_of_csv_are_those_that_pandas_reads(tmp_path):
    path = tmp_path / "items.csv"
    path.write_bytes(
        b'\xef\xbb\xbfid,text,"odd ""name"""\r\n'
        b'1,"two\r\nlines, and ""marks""",a\r\n\r\n2,plain,\r\n3,"last",z'
    )
    frame = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    items = read_all(open_corpus(path))
    assert [
        (item.id, item.item["text"], item.fields.get('odd "name"', "")) for item in items
    ] == list(frame.itertuples(index=False, name=None))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "items.csv:1: the first row must give each column a name of its own"),
        ("id,id\n1,2\n", "a name of its own"),
        ("id,\n1,2\n", r'neither a column "text" nor "image"; columns are "id"'),
        (",,\n1,2,3\n", "a name of its own"),
        ("number,text\n1,a\n", r'has no column "id"; columns are "number", "text": .* with --id'),
        ("id,title\n1,a\n", r'neither a column "text" nor "image"; columns are "id", "title"'),
        ("id,text\n", "holds no items"),
        ("id,text\n1,a,b\n", "items.csv:2: 3 columns, but the first row names 2"),
        ('id,text\n1,a\n2,"open\n3,b\n', "items.csv:3: not CSV"),
        ("id,text\n1,\n", r"items.csv, row 1: there is neither text nor image"),
        ("id,text\n,a\n", "row 1: id is missing"),
        ("id,text,img\n1,,a.png\n", 'row 1: field "img" looks like image'),
        ("id,image\n1,../../x.png\n", "row 1: .* leads out of the root"),
    ],
)
def test_what_is_no_table_of_items_is_named(tmp_path, content, said):
    (tmp_path / "items.csv").write_text(content)
    with pytest.raises(DataError, match=said) as error:
        read_all(open_corpus(tmp_path / "items.csv"))
    assert "\n" not in str(error.value)


def test_columns_of_other_names_must_exist_and_leave_no_doubt(tmp_path):
    (tmp_path / "items.csv").write_text("id,sku,text\n1,2,a\n")
    with pytest.raises(DataError, match=r'no column "title"; .* holds the text with --text'):
        open_corpus(tmp_path / "items.csv", columns=Columns(text="title"))
    with pytest.raises(DataError, match='field "id" is not the id of the item, which is in "sku"'):
        open_corpus(tmp_path / "items.csv", columns=Columns(id="sku")).read(0)
    with pytest.raises(DataError, match="a folder of images, which has no columns"):
        open_corpus(tmp_path, columns=Columns(id="sku"))


def test_values_of_parquet_become_plain_or_are_left_out_and_said(tmp_path):
    row = {
        "id": 7,
        "text": "a",
        "day": datetime.date(2026, 1, 2),
        "nan": float("nan"),
        "tags": ["x", "y"],
        "price": decimal.Decimal("1.50"),
        "raw": b"bytes",
        "nested": {"a": 1},
    }
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "items.parquet")
    corpus = open_corpus(tmp_path / "items.parquet")
    assert corpus.passed_over.endswith(": raw (binary), nested (struct<a: int64>)")
    item = corpus.read(0)
    assert item.id == "7"
    assert item.fields == {"day": "2026-01-02", "tags": ["x", "y"], "price": 1.5}


@pytest.mark.parametrize("damage", [slice(0, 100), slice(4, None)])
def test_a_damaged_parquet_file_is_named(tmp_path, damage):
    path = tmp_path / "items.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    path.write_bytes(path.read_bytes()[damage])
    with pytest.raises(DataError, match=r"items\.parquet cannot be read: ") as error:
        read_all(open_corpus(path, columns=COLUMNS))
    assert "\n" not in str(error.value)


def test_threads_read_row_groups_that_do_not_fit_in_memory_together(tmp_path, monkeypatch):
    rows = [{"id": str(number), "text": f"text {number}"} for number in range(500)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=20)
    monkeypatch.setattr(arrow, "_CACHED_BYTES", 1)
    corpus = open_corpus(tmp_path / "a.parquet")
    wrong = []

    def read(seed):
        for row in np.random.default_rng(seed).permutation(500).tolist():
            if corpus.read(row).item != {"text": f"text {row}"}:
                wrong.append(row)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_dataset_of_several_splits_asks_for_one(tmp_path):
    part = datasets.Dataset.from_list([{"id": "1", "text": "a"}])
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(tmp_path / "data")
    with pytest.raises(DataError, match="has the splits train, test: name one of them"):
        open_corpus(tmp_path / "data")
    assert open_corpus(tmp_path / "data" / "test").read(0).id == "1"
    with pytest.raises(DataError, match="nobody/nothing cannot be read"):
        open_corpus("hf:nobody/nothing")


@pytest.mark.parametrize(
    ("name", "package"), [("a.parquet", "pyarrow.parquet"), ("hf:a/b", "datasets")]
)
def test_a_package_that_is_missing_is_named_with_what_to_install(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=r"cannot be imported .* pip install -e '\.\[tables\]'"):
        open_table(Path(name), ())


def test_a_dataset_on_the_hub_is_asked_for_by_name_and_split(tmp_path, monkeypatch):
    part = datasets.Dataset.from_list([{"id": "1", "text": "a"}])
    asked = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, split: asked.append((name, split)) or part
    )
    monkeypatch.chdir(tmp_path)
    for source in ("hf:user/photos:test", "hf:user/photos"):
        corpus = open_corpus(source)
        assert corpus.address == source
        assert corpus.read(0).item == {"text": "a"}
    assert asked == [("user/photos", "test"), ("user/photos", None)]


@pytest.mark.parametrize("kind", ["dataset", ".parquet"])
def test_stored_images_are_embedded_kept_as_files_and_follow_changes(tiny, tmp_path, kind):
    embedder = Embedder.load(tiny.folder, dtype="float32")
    path, out = tmp_path / f"items{kind}", tmp_path / "out"

    def write(*seeds):
        rows = {"id": [str(seed) for seed in seeds], "image": [png(seed) for seed in seeds]}
        data = datasets.Dataset.from_dict(rows)
        data = data.cast_column("image", datasets.Image())
        if kind == "dataset":
            shutil.rmtree(path, ignore_errors=True)
            data.save_to_disk(path)
        else:
            data.to_parquet(path)

    def run():
        return embed(open_corpus(path), embedder, out, items_per_shard=2, progress=False)

    def check(*seeds):
        expected = embedder.encode([{"image": png(seed)} for seed in seeds], progress=False)
        found = np.concatenate([*Vectors(out).parts()])
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
        files = [record.image.path for record in Vectors(out).items()]
        for seed, file in zip(seeds, files, strict=True):
            with Image.open(file) as image:
                np.testing.assert_array_equal(np.asarray(image), random_image(40, 60, seed))
        assert {str(one) for one in out.glob("images/*/*")} == {*files}

    write(1, 2, 3)
    assert run().embedded == 3
    check(1, 2, 3)
    assert str(run()).startswith("Nothing to do")
    write(1, 4, 3)
    said = run()
    assert (said.embedded, said.removed) == (1, 1)
    check(1, 4, 3)
