"""What is written for other tools is read by them, and holds what the folder of vectors does."""

import hashlib
import json

import faiss
import numpy as np
import pandas as pd
import pytest

from puma_jax.errors import ArtifactError, ConfigError
from puma_jax.export import __main__ as entry_point
from puma_jax.export.vectors import write_vectors
from puma_jax.search.exact import ExactIndex
from puma_jax.search.records import ItemRecord
from puma_jax.search.shards import Vectors
from tests.search.indexed import records, unit_vectors
from tests.search.indexed import write_vectors as write_folder

COUNT = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    here = tmp_path_factory.mktemp("exported")
    items = records(here / "corpus", COUNT - 1)
    mixed = {"price": 2.5, "vector": "of a field", "tags": ["a"], "mixed": 1}
    items.append(ItemRecord("last\u00e9", "text", fields=mixed))
    items[1] = ItemRecord(items[1].id, "text", fields={"tags": [], "mixed": "one", "sold": True})
    return write_folder(here / "v", unit_vectors(COUNT), items)


def write(folder, out, kind, **options):
    written = write_vectors(Vectors(folder), out, kind, progress=False, **options)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest == written
    assert (manifest["vectors"], manifest["width"], manifest["model"]) == (COUNT, 16, "m" * 64)
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert files == {*manifest["files"], "manifest.json"}
    for name, said in manifest["files"].items():
        content = (out / name).read_bytes()
        assert said == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return manifest


def check_columns(table, folder):
    """Check all columns of a table of Arrow."""
    index = ExactIndex(folder)
    ids = Vectors(folder).ids(range(COUNT))
    documents = index.documents(ids)
    kind = table.schema.field("vector").type
    assert (str(kind.value_type), kind.list_size) == ("float", 16)
    assert table["id"].to_pylist() == ids
    np.testing.assert_array_equal(
        np.array(table["vector"].to_pylist(), np.float32), unit_vectors(COUNT)
    )
    for name in ("text", "image", "modality"):
        assert table[name].to_pylist() == [getattr(one, name) for one in documents]
    types = {field.name: str(field.type) for field in table.schema}
    assert types["price"] == "double"
    assert types["sold"] == "bool"
    assert types["tags"].startswith("list<")
    assert types["mixed"] == "string"
    for name in ("price", "color", "tags", "sold"):
        assert table[name].to_pylist() == [one.fields.get(name) for one in documents]
    assert table["field_vector"].to_pylist()[-1] == "of a field"
    assert table["mixed"].to_pylist()[1] == '"one"'
    assert table["mixed"].to_pylist()[-1] == "1"


@pytest.mark.parametrize("rows_per_file", [1000, 7, 40])
def test_parquet_is_read_by_pyarrow_and_pandas(folder, tmp_path, rows_per_file):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pip install -e '.[tables]'")
    out = tmp_path / "out"
    manifest = write(folder, out, "parquet", rows_per_file=rows_per_file)
    assert manifest["as_json_text"] == ["mixed"]
    parts = [len(parquet.read_table(path)) for path in sorted(out.glob("*.parquet"))]
    assert parts == [min(rows_per_file, COUNT - first) for first in range(0, COUNT, rows_per_file)]
    check_columns(parquet.read_table(sorted(out.glob("*.parquet"))), folder)
    frame = pd.read_parquet(sorted(out.glob("*.parquet")))
    np.testing.assert_array_equal(np.stack(frame["vector"]), unit_vectors(COUNT))


def test_lance_is_read_and_searched(folder, tmp_path):
    lance = pytest.importorskip("lance", reason="pip install -e '.[tables]'")
    write(folder, tmp_path / "out", "lance", rows_per_file=10)
    dataset = lance.dataset(str(tmp_path / "out/vectors.lance"))
    assert len(dataset.get_fragments()) == 4
    check_columns(dataset.to_table(), folder)
    query = unit_vectors(1, seed=1)[0]
    found = dataset.to_table(nearest={"column": "vector", "q": query, "k": 5, "metric": "dot"})
    (hits,) = ExactIndex(folder).search(query[None], 5)
    assert found["id"].to_pylist() == [hit.document.id for hit in hits]


def check_items(folder, out):
    ids = Vectors(folder).ids(range(COUNT))
    assert (out / "ids.txt").read_text("utf-8").splitlines() == ids
    lines = [json.loads(line) for line in (out / "items.jsonl").read_text("utf-8").splitlines()]
    for line, document in zip(lines, ExactIndex(folder).documents(ids), strict=True):
        assert line["fields"] == document.fields
        assert (line["id"], line["text"], line["image"], line["modality"]) == (
            document.id,
            document.text,
            document.image,
            document.modality,
        )


@pytest.mark.parametrize("rows_per_file", [1000, 7])
def test_npy_is_read_by_numpy(folder, tmp_path, rows_per_file):
    out = tmp_path / "out"
    write(folder, out, "npy", rows_per_file=rows_per_file)
    parts = [np.load(path, mmap_mode="r") for path in sorted(out.glob("*.npy"))]
    assert [len(part) for part in parts] == [
        min(rows_per_file, COUNT - first) for first in range(0, COUNT, rows_per_file)
    ]
    np.testing.assert_array_equal(np.concatenate(parts), unit_vectors(COUNT))
    check_items(folder, out)


def read_bin(path, dtype):
    """Read a file as the tools of big-ann-benchmarks do."""
    count, width = np.fromfile(path, "<u4", 2)
    return np.fromfile(path, dtype, offset=8).reshape(count, width)


def test_fbin_is_read_and_searched_by_faiss(folder, tmp_path):
    write(folder, tmp_path / "out", "fbin")
    found = read_bin(tmp_path / "out/vectors.fbin", "<f4")
    np.testing.assert_array_equal(found, unit_vectors(COUNT))
    index = faiss.IndexFlatIP(16)
    index.add(found)
    assert index.search(found, 1)[1][:, 0].tolist() == list(range(COUNT))
    check_items(folder, tmp_path / "out")


def test_u8bin_says_how_it_was_rounded_and_keeps_the_order_of_distances(folder, tmp_path):
    said = write(folder, tmp_path / "out", "u8bin")
    assert (said["offset"], said["metric"]) == (128, "L2")
    stored = read_bin(tmp_path / "out/vectors.u8bin", np.uint8)
    values = (stored.astype(np.float32) - said["offset"]) * (said["scale"] / 127)
    vectors = unit_vectors(COUNT)
    assert np.abs(values - vectors).max() <= said["scale"] / 254 * 1.001
    distances = ((stored[:, None].astype(int) - stored[None].astype(int)) ** 2).sum(-1)
    nearest = np.argsort(distances, axis=1)[:, :3]
    exact = np.argsort(-(vectors @ vectors.T), axis=1)[:, :3]
    assert (nearest == exact).mean() > 0.95
    check_items(folder, tmp_path / "out")


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_smaller_vectors_are_written_as_the_numbers_they_stand_for(tmp_path, dtype):
    items = records(tmp_path / "corpus", 5)
    folder = write_folder(tmp_path / "v", unit_vectors(5), items, dtype=dtype)
    said = write_vectors(Vectors(folder), tmp_path / "out", "npy", progress=False)
    assert said["stored_as"] == dtype
    found = np.load(tmp_path / "out/vectors-00000.npy")
    np.testing.assert_array_equal(found, np.concatenate([*Vectors(folder).parts()]))


def test_a_folder_appears_whole_or_not_at_all(folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr("puma_jax.export.vectors._write_items", None)
    with pytest.raises(TypeError):
        write_vectors(Vectors(folder), out, "npy", progress=False)
    assert not list(tmp_path.iterdir())
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(ArtifactError, match="is not empty"):
        write_vectors(Vectors(folder), out, "npy", progress=False)
    with pytest.raises(ConfigError, match="rows per file are 0"):
        write_vectors(Vectors(folder), tmp_path / "other", "npy", rows_per_file=0)


def test_the_command_writes_vectors_or_says_what_it_lacks(folder, tmp_path, capsys):
    entry_point.main("vectors", out=tmp_path / "out", vectors=folder, format="fbin")
    assert capsys.readouterr().out == f"fbin: 40 vectors of 16 values in {tmp_path / 'out'}\n"
    with pytest.raises(ConfigError, match="vectors need --vectors"):
        entry_point.main("vectors", out=tmp_path / "other", vectors=folder)
    with pytest.raises(ConfigError, match="stablehlo needs --model"):
        entry_point.main("stablehlo", out=tmp_path / "other")
