"""Milvus Lite answers as the exact index does, and keeps what a rerun changes and nothing else."""

import contextlib
import logging
import random
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from puma_jax import index as entry_point
from puma_jax.errors import SearchError
from puma_jax.search import indexing
from puma_jax.search.exact import ExactIndex
from puma_jax.search.filters import parse_filter
from puma_jax.search.indexing import index_vectors
from puma_jax.search.milvus import MAX_TEXT_BYTES, Database, MilvusIndex
from puma_jax.search.open import open_index
from puma_jax.search.records import ItemRecord
from puma_jax.search.shards import Vectors
from tests.search.indexed import records, unit_vectors, write_vectors
from tests.search.test_filters import DOCUMENTS, FILTERS

# It sets up logging when it is imported, which closes handlers: not while output is captured.
pytest.importorskip("pymilvus", reason="pip install -e '.[search]'")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

COUNT = 40


@pytest.fixture(scope="module")
def vectors():
    return unit_vectors(COUNT)


@pytest.fixture(scope="module")
def queries():
    return unit_vectors(5, seed=1)


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    return records(tmp_path_factory.mktemp("corpus"), COUNT)


@pytest.fixture
def folder(tmp_path, vectors, items):
    return write_vectors(tmp_path / "v", vectors, items, instruction="Find.")


def build(folder, **options):
    uri = str(folder.parent / "index.db")
    return index_vectors(Vectors(folder), uri, progress=False, **options)


def opened(folder, **options):
    return MilvusIndex(str(folder.parent / "index.db"), **options)


def content(folder):
    """Everything that the index holds, by id."""
    index = opened(folder)
    ids = [one for one, _ in index._database.digests()]
    found = dict(zip(ids, index.documents(ids), strict=True))
    values = index.vectors(ids)
    count = len(index)
    index.close()
    assert count == len(ids) == len(found)  # nothing is double
    return found, dict(zip(ids, values, strict=True))


def check(folder):
    """Check that the index holds the folder, and nothing else."""
    exact = ExactIndex(folder)
    documents, values = content(folder)
    ids = Vectors(folder).ids(range(len(exact)))
    assert documents == dict(zip(ids, exact.documents(ids), strict=True))
    np.testing.assert_array_equal([values[one] for one in ids], exact.vectors(ids))


def simplified(answers):
    return [
        [(hit.document, pytest.approx(hit.score, abs=1e-6)) for hit in hits] for hits in answers
    ]


@pytest.mark.parametrize("index_type", ["FLAT", "HNSW"])
@pytest.mark.parametrize("metric", ["IP", "COSINE"])
def test_it_answers_as_the_exact_index_does(folder, queries, index_type, metric):
    said = build(folder, index_type=index_type, metric=metric)
    assert str(said) == (
        f"40 documents added, 0 replaced, 0 removed: the index holds 40 ({index_type})"
    )
    check(folder)
    exact, index = ExactIndex(folder), open_index(folder.parent / "index.db")
    assert isinstance(index, MilvusIndex)
    assert (index.model, index.instruction, index.width, len(index)) == (
        exact.model, exact.instruction, exact.width, len(exact),
    )  # fmt: skip
    for given in (
        {},
        {"modality": "image"},
        {"modality": "image,text", "filter": 'price > 5 and color == "green"'},
        {"filter": "price > 1000"},
    ):
        assert simplified(exact.search(queries, 7, **given)) == [
            [(hit.document, hit.score) for hit in hits]
            for hits in index.search(queries, 7, **given)
        ]
    assert index.documents(["nothing", "id/3"]) == exact.documents(["nothing", "id/3"])
    index.close()


@pytest.fixture(scope="module")
def of_filters(tmp_path_factory):
    items = [ItemRecord(name, "text", fields=fields) for name, fields in DOCUMENTS.items()]
    folder = tmp_path_factory.mktemp("filters") / "v"
    write_vectors(folder, unit_vectors(len(items)), items)
    build(folder)
    index = opened(folder)
    yield index
    index.close()


@pytest.mark.parametrize("text", FILTERS)
def test_filters_mean_the_same(of_filters, text):
    if unknown := parse_filter(text).names - {name for one in DOCUMENTS.values() for name in one}:
        with pytest.raises(SearchError, match=f'field "{min(unknown)}", which no document'):
            of_filters.search(unit_vectors(1), 9, filter=text)
        return
    (hits,) = of_filters.search(unit_vectors(1), 9, filter=text)
    assert "".join(sorted(hit.document.id[-1] for hit in hits)) == FILTERS[text]


def random_filter(chance: random.Random, depth: int = 0) -> str:
    """Return a filter over the fields of `DOCUMENTS`, which may compare values of other types."""
    kind = chance.random()
    if depth < 3 and kind < 0.25:
        word = chance.choice(["and", "or", "&&", "||"])
        return f"({random_filter(chance, depth + 1)} {word} {random_filter(chance, depth + 1)})"
    if depth < 3 and kind < 0.4:
        return f"not {random_filter(chance, depth + 1)}"
    name = chance.choice(["price", "color", "sold", "id", 'fields["unit price"]', "sizes"])
    values = ["12", "20.5", "-3", '"red"', "'unknown'", '"hats/3"', '"blue\\n"', "true", "1", '"%"']
    if kind < 0.55:
        some = ", ".join(chance.choices(values, k=chance.randint(1, 3)))
        return f"{name} {chance.choice(['in', 'not in'])} [{some}]"
    if kind < 0.65:
        pattern = chance.choice(["%red", "r_d", "%", "hats/_"])
        return f'{name} like "{pattern}"'
    if kind < 0.7:
        return f"json_contains(sizes, {chance.choice(values)})"
    if kind < 0.85:
        return f"{name} {chance.choice(['==', '!='])} {chance.choice(values)}"
    return f"{name} {chance.choice(['<', '<=', '>', '>='])} {chance.choice(values[:7])}"


def test_random_filters_find_the_same_in_both_stores(of_filters):
    chance, vector = random.Random(0), unit_vectors(1)
    texts: list[str] = []
    while len(texts) < 300:
        text = random_filter(chance)
        with contextlib.suppress(SearchError):  # of an id compared with a number
            parse_filter(text)
            texts.append(text)
    for text in texts:
        (hits,) = of_filters.search(vector, 9, filter=text)
        found = parse_filter(text)
        expected = {name for name, fields in DOCUMENTS.items() if found.matches(name, fields)}
        assert {hit.document.id for hit in hits} == expected, f"{text} is {found.milvus()}"


def test_a_rerun_changes_what_changed(folder, vectors, items, monkeypatch):
    build(folder)
    assert str(build(folder)) == "Nothing to do: all 40 documents are in the index (FLAT)"
    changed = [*items[:3], *items[5:]]  # two are removed
    changed[4] = ItemRecord("id/6", "another text", fields={"price": 1})
    changed.append(ItemRecord("id/new", "new"))
    values = np.concatenate([vectors[:3], vectors[5:], unit_vectors(1, seed=5)])
    write_vectors(folder, values, changed, instruction="Find.")
    upserted = []
    plain = indexing._row
    monkeypatch.setattr(indexing, "_row", lambda *args: upserted.append(args[0].id) or plain(*args))
    assert str(build(folder)).startswith("1 documents added, 1 replaced, 2 removed")
    assert upserted == ["id/6", "id/new"]
    check(folder)


def test_another_model_corpus_or_setting_is_refused_and_nothing_is_lost(
    folder, tmp_path, vectors, items
):
    build(folder)
    before = content(folder)[0]
    for name, options in (("model", {"model": "n" * 64}), ("instruction", {"instruction": None})):
        other = write_vectors(
            tmp_path / name, vectors[:2], items[:2], **{"instruction": "Find."} | options
        )
        with pytest.raises(SearchError, match=f"another index, which differs in {name}"):
            build(other)
    with pytest.raises(SearchError, match=r'differs in index_type \("FLAT" there, "HNSW" here\)'):
        build(folder, index_type="HNSW")
    assert content(folder)[0] == before


def test_an_index_of_nothing_finds_nothing(tmp_path, queries):
    write_vectors(tmp_path / "v", np.zeros((0, 16), np.float32), [])
    assert build(tmp_path / "v").documents == 0
    index = opened(tmp_path / "v")
    assert index.search(queries, 3) == [[]] * 5
    assert len(index) == 0
    index.close()


def test_collections_are_apart(folder, tmp_path, vectors, items):
    build(folder)
    other = write_vectors(tmp_path / "other", vectors[:2], items[:2])
    build(other, collection="others")
    assert len(opened(folder, collection="others").documents(["id/0"])) == 1
    check(folder)


def test_a_long_text_is_cut_and_counted(folder, vectors):
    texts = ["é" * (MAX_TEXT_BYTES // 2 + 5), "e" + "é" * 40_000, "short"]
    items = [ItemRecord(str(number), text) for number, text in enumerate(texts)]
    write_vectors(folder.parent / "long", vectors[:3], items)
    uri = str(folder.parent / "long.db")
    said = index_vectors(Vectors(folder.parent / "long"), uri, progress=False)
    assert "2 texts are cut at 65,535 bytes" in str(said)
    index = MilvusIndex(uri)
    found = [document.text for document in index.documents(["0", "1", "2"])]
    index.close()
    assert found == ["é" * 32_767, "e" + "é" * 32_767, "short"]
    assert "cut" in str(index_vectors(Vectors(folder.parent / "long"), uri, progress=False))


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (ItemRecord("é" * 3000, "text"), "id of document .* takes 6,000 bytes"),
        (ItemRecord("a", "text", fields={"note": "x" * 70_000}), 'fields of document "a" takes'),
        (ItemRecord("id/0", "text"), 'two documents with the id "id/0"'),
    ],
)
def test_what_the_database_cannot_hold_is_refused_before_work(
    tmp_path, vectors, items, record, said
):
    folder = write_vectors(tmp_path / "v", vectors[:2], [items[0], record])
    with pytest.raises(SearchError, match=said):
        build(folder)
    assert not (tmp_path / "index.db").exists()


def test_what_cannot_be_answered_is_said(folder, queries, caplog):
    build(folder)
    index = opened(folder)
    with pytest.raises(SearchError, match='field "weight", which no document'):
        index.search(queries, 3, filter="weight < 3")
    with pytest.raises(SearchError, match="at most 16,384"):
        index.search(queries, 20_000)
    with pytest.raises(SearchError, match='holds no document "nothing"'):
        index.vectors(["id/0", "nothing"])
    database = Database(index._database.uri, "nothing", index._database.client)
    with pytest.raises(SearchError, match=r"index\.db: Milvus says: ") as error:
        database.load()
    assert "\n" not in str(error.value)
    index.close()
    assert not [one for one in caplog.records if one.levelno >= logging.ERROR]


def test_a_database_that_is_missing_foreign_or_in_use_is_named(folder, tmp_path):
    with pytest.raises(SearchError, match=r"no\.db holds no index: make one"):
        open_index(tmp_path / "no.db")
    with pytest.raises(SearchError, match="names no database, expected a file"):
        index_vectors(Vectors(folder), str(tmp_path / "index"))
    with pytest.raises(SearchError, match="holds float32 vectors only, not int8"):
        build(folder, dtype="int8")
    build(folder)
    with pytest.raises(SearchError, match='there is no collection "other"'):
        opened(folder, collection="other")
    code = (
        f"from puma_jax.search.open import open_index; open_index({str(tmp_path / 'index.db')!r})"
    )
    index = opened(folder)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "another process may have it open" in done.stderr.splitlines()[-1]
    index.close()


def test_threads_get_the_same_answers(folder, queries):
    build(folder)
    index = opened(folder)
    expected = index.search(queries, 5, filter="price < 30")
    answers = []
    threads = [
        threading.Thread(
            target=lambda: answers.append(index.search(queries, 5, filter="price < 30"))
        )
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    index.close()
    assert answers == [expected] * 8


def test_killed_again_and_again_nothing_is_lost_or_double(tmp_path):
    count = 2000
    items = [ItemRecord(f"id/{number}", f"text {number}") for number in range(count)]
    folder = write_vectors(tmp_path / "v", unit_vectors(count), items, items_per_shard=500)
    uri = str(tmp_path / "index.db")
    # Small batches, and a word after each, so that kills fall between and within them.
    code = f"""
from puma_jax.search import indexing
from puma_jax.progress import Progress
from puma_jax.search.shards import Vectors
indexing._ROWS_AT_ONCE = 25
plain = Progress.update
Progress.update = lambda *args: print("batch", flush=True) or plain(*args)
print("done", indexing.index_vectors(Vectors({str(folder)!r}), {uri!r}), flush=True)
"""
    batches = 0
    for kill_after in (1, 7, 19):
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(kill_after):
            assert child.stdout.readline() == "batch\n"
            batches += 1
        time.sleep(0.004)
        child.kill()
        child.stdout.close()
        child.wait()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert f"the index holds {count:,}" in done
    # What was in the database before the last run is not done again.
    assert done.count("batch") <= count // 25 - batches + 1
    check(folder)


def test_the_command_says_what_it_did(folder, capsys):
    uri = str(folder.parent / "index.db")
    entry_point.main(folder, uri)
    assert capsys.readouterr().out == (
        f"40 documents added, 0 replaced, 0 removed: the index holds 40 (FLAT), in {uri}\n"
    )
