"""The search command: one command for a folder, a readable table, JSON, and a page of its own."""

import base64
import html.parser
import io
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from puma_jax import Embedder
from puma_jax import embed as embed_command
from puma_jax.errors import SearchError
from puma_jax.search import __main__ as command
from puma_jax.search.corpus import open_corpus
from puma_jax.search.embedding import embed
from puma_jax.search.index import Document, Hit
from puma_jax.search.model_source import ModelSource
from puma_jax.search.page import results_page
from tests.reference import random_image, save_adapter

# It sets up logging when it is imported, which closes handlers: not while output is captured.
pytest.importorskip("pymilvus", reason="pip install -e '.[search]'")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A corpus of texts and images with fields."""
    folder = tmp_path_factory.mktemp("shop")
    lines = []
    for number in range(6):
        row = {"id": f"n{number}", "text": f"shoe [bold]{number}", "price": number}
        if number % 2:
            random_image(40, 60, number).save(folder / f"{number}.png")
            row["image"] = f"{number}.png"
        lines.append(json.dumps(row) + "\n")
    (folder / "items.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def vectors(shop, tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("vectors") / "v"
    source = ModelSource.of(str(tiny.folder), "float32", None)
    embed(open_corpus(shop / "items.jsonl"), source.load(), out, source=source, progress=False)
    return out


def found(capsys, **given):
    capsys.readouterr()
    command.main(json=True, **given)
    return json.loads(capsys.readouterr().out)["hits"]


def test_it_finds_what_the_vectors_say_for_text_image_and_both(shop, vectors, tiny, capsys):
    embedder = Embedder.load(tiny.folder, dtype="float32")
    corpus = open_corpus(shop / "items.jsonl")
    documents = embedder.encode([corpus.read(row).item for row in range(6)], progress=False)
    image = shop / "3.png"
    for query in ({"text": "a shoe"}, {"image": image}, {"text": "a shoe", "image": image}):
        hits = found(capsys, vectors=vectors, instruction="Find it.", k=4, **query)
        (vector,) = embedder.encode([query], instruction="Find it.", progress=False)
        scores = documents @ vector
        order = np.argsort(-scores)[:4]
        assert [hit["id"] for hit in hits] == [f"n{row}" for row in order]
        np.testing.assert_allclose([hit["score"] for hit in hits], scores[order], atol=1e-6)
    for hit in hits:
        row = int(hit["id"][1])
        assert hit["text"] == f"shoe [bold]{row}"
        assert hit["fields"] == {"price": row}
        assert hit["image"] == (str(shop / f"{row}.png") if row % 2 else None)
        assert hit["modality"] == ("image,text" if row % 2 else "text")


def test_a_filter_and_a_modality_choose_documents(vectors, capsys):
    hits = found(capsys, vectors=vectors, text="shoe", filter="price > 1", modality="text")
    assert sorted(hit["id"] for hit in hits) == ["n2", "n4"]


def test_the_table_is_readable_and_takes_texts_as_they_are(vectors, capsys):
    command.main("a shoe", vectors=vectors)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["id", "score", "modality", "text", "image"]
    rows = [line for line in lines if line.strip().startswith("n")]
    assert len(rows) == 6
    assert all("shoe [bold]" in row for row in rows)
    assert max(map(len, lines)) <= 120
    assert lines[-1].startswith("6 of 6 documents in ")


def test_one_command_embeds_what_is_new_indexes_it_and_answers(tiny, tmp_path, capsys):
    photos, store = tmp_path / "photos", tmp_path / "store"
    photos.mkdir()
    for number in range(3):
        random_image(40, 60, number).save(photos / f"{number}.png")
    given = {
        "items": photos,
        "vectors": store,
        "uri": str(tmp_path / "index.db"),
        "model": str(tiny.folder),
        "image": photos / "1.png",
    }
    assert found(capsys, **given)[0]["id"] == "1.png"
    shutil.copy(photos / "1.png", tmp_path / "query.png")
    (photos / "1.png").unlink()
    random_image(40, 60, 9).save(photos / "9.png")
    given["image"] = tmp_path / "query.png"
    command.main(**given)
    said = capsys.readouterr()
    assert said.err.splitlines() == [
        f"1 of 3 items embedded, 2 kept from before, 1 old vectors removed, in {store}",
        "1 documents added, 0 replaced, 1 removed: the index holds 3 (FLAT), in "
        f"{tmp_path / 'index.db'}",
    ]
    assert "1.png" not in said.out
    exact = found(capsys, vectors=store, text="x")
    indexed = found(capsys, uri=str(tmp_path / "index.db"), text="x")
    assert [hit["id"] for hit in exact] == [hit["id"] for hit in indexed]


def test_another_model_is_refused(vectors, tiny, tmp_path):
    Embedder.load(tiny.folder, dtype="float32").keep_layers(2).save(tmp_path / "other")
    with pytest.raises(SearchError, match="the index was made by another model"):
        command.main("shoe", vectors=vectors, model=str(tmp_path / "other"))


def test_an_index_remembers_the_adapter_of_its_model(shop, tiny, tmp_path, capsys):
    adapter = save_adapter(tiny, tmp_path / "adapter")
    model = str(tiny.folder)
    embed_command.main(
        model, shop / "items.jsonl", tmp_path / "v", dtype="float32", adapter=str(adapter)
    )
    (document,) = Embedder.load(model, dtype="float32", adapter=adapter).encode(["shoe [bold]0"])
    (query,) = Embedder.load(model, dtype="float32", adapter=adapter).encode(["shoe"])
    scores = {hit["id"]: hit["score"] for hit in found(capsys, vectors=tmp_path / "v", text="shoe")}
    np.testing.assert_allclose(scores["n0"], document @ query, atol=1e-6)
    with pytest.raises(SearchError, match="the index was made by another model"):
        command.main("shoe", vectors=tmp_path / "v", model=model)


def test_a_model_that_is_gone_is_named(shop, tiny, tmp_path):
    shutil.copytree(tiny.folder, tmp_path / "model")
    source = ModelSource.of(str(tmp_path / "model"), "float32", None)
    out = tmp_path / "v"
    embed(open_corpus(shop / "items.jsonl"), source.load(), out, source=source, progress=False)
    (tmp_path / "model").rename(tmp_path / "moved")
    with pytest.raises(SearchError, match=r"model, which is gone: give it with --model"):
        command.main("shoe", vectors=out)
    command.main("shoe", vectors=out, model=str(tmp_path / "moved"))  # in the dtype of then


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "there is no query"),
        ({"text": "a"}, "give --uri for an index, or --vectors"),
        ({"text": "a", "uri": "a.db", "vectors": "v"}, "give --uri for an index, or --vectors"),
        ({"text": "a", "items": "photos"}, "--items needs --model"),
        ({"text": "a", "items": "p", "model": "m", "uri": "v"}, "v is no database, expected"),
        ({"image": "nothing.png", "uri": "a.db"}, "nothing.png is not a file"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_done(tmp_path, given, said):
    arguments = [part for name, value in given.items() for part in (f"--{name}", value)]
    done = subprocess.run(
        [sys.executable, "-m", "puma_jax.search", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


class Page(html.parser.HTMLParser):
    """Texts and attributes of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_has_its_pictures_in_it_and_no_markup_of_others(tmp_path):
    random_image(900, 700, 1).save(tmp_path / "a.png")
    bad = "<script>alert(1)</script>"
    hits = [
        Hit(Document("<b>", bad, str(tmp_path / "a.png"), {'"x': bad}), 0.5),
        Hit(Document("gone", None, str(tmp_path / "gone.png")), 0.25),
    ]
    page = results_page(hits, text=f"shoes & {bad}", image=str(tmp_path / "a.png"), about="2 of 3")
    read = Page(page)
    assert not [tag for tag, _ in read.tags if tag == "script"]
    images = [attributes["src"] for tag, attributes in read.tags if tag == "img"]
    assert len(images) == 2
    for source in images:
        kind, _, content = source.partition(",")
        assert kind == "data:image/webp;base64"
        with Image.open(io.BytesIO(base64.b64decode(content))) as image:
            assert max(image.size) == 640
    texts = "".join(read.texts)
    for said in (bad, "<b>", "0.500", "2 of 3", "The image cannot be read.", f'"x: {bad}'):
        assert said in texts
    assert "http" not in page
    assert "prefers-color-scheme: dark" in page


def test_the_command_writes_the_page(vectors, tmp_path, capsys):
    command.main("shoe", vectors=vectors, html=tmp_path / "page.html")
    assert f"the page is {tmp_path / 'page.html'}" in capsys.readouterr().out
    page = Page((tmp_path / "page.html").read_text("utf-8"))
    assert sum(tag == "li" for tag, _ in page.tags) == 6
