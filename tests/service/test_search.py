"""Search by text, image, both and id; documents' images; what is wrong with a query is said."""

from __future__ import annotations

import io
import json

import httpx
import numpy as np
import pytest
from PIL import Image

from puma_jax.search.open import open_index
from puma_jax.search.shards import Vectors
from tests.search.indexed import write_vectors
from tests.service.serving import COLORS, INSTRUCTION, data_url, picture, serving


def exact(embedder, vectors, item, k, keep=lambda record: True, instruction=INSTRUCTION):
    """Ids and scores that a product of NumPy finds."""
    stored = Vectors(vectors)
    query = embedder.encode([item], instruction=instruction, progress=False)[0]
    scores = np.concatenate(list(stored.parts())) @ query
    records = list(stored.items())
    best = [row for row in np.argsort(-scores, kind="stable") if keep(records[row])][:k]
    return [records[row].id for row in best], scores[best]


def check(answer, expected):
    ids, scores = expected
    hits = answer.json()["hits"]
    assert [hit["id"] for hit in hits] == ids
    np.testing.assert_allclose([hit["score"] for hit in hits], scores, rtol=0, atol=1e-6)


def test_text_image_and_both_find_what_a_product_finds(live, embedder, vectors):
    image = picture("red", (80, 50))
    for item in ({"text": "a red thing"}, {"image": image}, {"image": image, "text": "in blue"}):
        body = dict(item) | ({"image": data_url(image)} if "image" in item else {})
        check(live.post("/search", {**body, "k": 5}), exact(embedder, vectors, item, 5))


def test_queries_are_as_short_as_the_vectors_of_the_index(embedder, vectors, tmp_path):
    stored = Vectors(vectors)
    first = np.concatenate([*stored.parts()])[:, :12]
    short = first / np.linalg.norm(first, axis=1, keepdims=True)
    folder = write_vectors(
        tmp_path / "short", short, [*stored.items()], dtype="ubinary", model=stored.spec.model
    )
    with serving(embedder, open_index(str(folder))) as live:
        hits = live.post("/search", {"text": "a red thing", "k": 5, "instruction": ""})
    query = embedder.encode(["a red thing"], dimensions=12)[0]
    scores = np.where(first > 0, 1, -1) / np.sqrt(12) @ query
    found = [hit["score"] for hit in hits.json()["hits"]]
    np.testing.assert_allclose(found, -np.sort(-scores)[:5], rtol=0, atol=1e-6)


def test_a_form_with_a_file_is_the_same_query(live, embedder, vectors):
    image = picture("green")
    answer = httpx.post(
        f"{live.url}/search",
        data={"text": "a thing", "k": "4", "modality": "image", "instruction": "Find it."},
        files={"image": ("green.png", image, "image/png")},
    )
    expected = exact(
        embedder, vectors, {"image": image, "text": "a thing"}, 4,
        lambda record: record.text is None, "Find it.",
    )  # fmt: skip
    check(answer, expected)
    assert answer.json()["instruction"] == "Find it."


def test_modality_and_filter_leave_only_what_passes(live, embedder, vectors):
    answer = live.post("/search", {"text": "thing", "modality": "text", "k": 20})
    check(answer, exact(embedder, vectors, {"text": "thing"}, 20, lambda record: not record.image))
    answer = live.post("/search", {"text": "thing", "filter": 'price < 2 or color == "gray"'})
    assert {hit["fields"]["color"] for hit in answer.json()["hits"]} == {"red", "green", "gray"}
    assert live.post("/search", {"text": "thing", "filter": "price > 9"}).json()["hits"] == []


def test_more_like_a_document_finds_others(live, vectors):
    hits = live.post("/search", {"id": "image/red", "k": 30}).json()["hits"]
    assert "image/red" not in [hit["id"] for hit in hits]
    assert len(hits) == 3 * len(COLORS) - 1
    stored = np.concatenate(list(Vectors(vectors).parts()))
    ids = [record.id for record in Vectors(vectors).items()]
    scores = stored @ stored[ids.index("image/red")]
    for hit in hits:
        assert hit["score"] == pytest.approx(scores[ids.index(hit["id"])], abs=1e-6)


def test_an_empty_instruction_is_none(live, embedder, vectors):
    answer = live.post("/search", {"text": "a", "instruction": "", "k": 3})
    check(answer, exact(embedder, vectors, {"text": "a"}, 3, instruction=None))
    assert answer.json()["instruction"] is None


def test_a_truncated_text_is_said(live):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)
        answer = live.post("/search", {"text": "long " * 100})
    assert answer.json()["warnings"] == [
        "the text was truncated to the 120 tokens that the model reads"
    ]


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({}, 400, "the query is empty"),
        ({"text": "  "}, 400, "the query is empty"),
        ({"text": "a", "k": 0}, 400, "k: Input should be greater than or equal to 1"),
        ({"text": "a", "k": 201}, 400, "k is 201, expected 1 to 200"),
        ({"text": "a", "k": "3"}, 400, "k: Input should be a valid integer"),
        ({"text": "a", "modality": "audio"}, 400, "modality"),
        ({"text": "a", "filter": "price <"}, 400, "filter"),
        ({"text": "a", "filter": "prize < 3"}, 400, 'field "prize"'),
        ({"text": "a", "id": "text/red"}, 400, "an id, or a text and an image"),
        ({"id": "text/nope"}, 404, 'nothing with the id "text/nope"'),
        ({"image": "#"}, 400, "not valid base64"),
        ({"image": "https://example.org/a.png"}, 400, "fetches no images"),
    ],
)
def test_what_is_wrong_with_a_query_is_said(live, body, status, said):
    answer = live.post("/search", body)
    assert answer.status_code == status
    assert said in answer.json()["error"]["message"]


def test_forms_that_are_damaged_are_refused(live):
    png = ("a.png", picture("red"), "image/png")
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    for options in (
        {"files": {"other": png}},
        {"files": [("image", png), ("image", png)]},
        {"data": {"k": "many", "text": "a"}, "files": {"image": png}},
        {"data": {"colour": "red"}, "files": {"image": png}},
        {"content": b"--x\r\nnonsense", "headers": kind},
        {"content": b"", "headers": {"Content-Type": "multipart/form-data"}},
        {"content": b"\xff" * 100, "headers": kind},
    ):
        answer = httpx.post(f"{live.url}/search", **options)
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["message"]


def test_images_are_those_of_the_index(live):
    hits = live.post("/search", {"text": "a", "k": 50}).json()["hits"]
    pictured = [hit for hit in hits if hit["image"]]
    assert len(pictured) == 2 * len(COLORS)
    for hit in pictured:
        answer = live.get(hit["image"])
        assert answer.headers["content-type"] == "image/png"
        assert answer.content == picture(hit["fields"]["color"])
        small = live.get(f"{hit['image']}?width=16")
        assert small.headers["content-type"] == "image/webp"
        assert Image.open(io.BytesIO(small.content)).size == (60, 40)  # never made larger
    assert "corpus" not in json.dumps(hits)  # no answer tells where files lie


def test_nothing_but_images_of_the_index_is_served(live, vectors):
    secret = vectors.parent / "corpus" / "secret.png"
    secret.write_bytes(picture("gray"))
    for path in (
        "secret.png", "../corpus/secret.png", "..%2Fcorpus%2Fsecret.png", str(secret),
        "%2e%2e%2f%2e%2e%2fetc/passwd", "/etc/passwd", "text/red", "image/red%00.png", "", "%ff",
    ):  # fmt: skip
        answer = live.get(f"/images/{path}")
        assert answer.status_code == 404, path
        assert answer.json()["error"]["code"] in ("not_found", "no_index")
    assert live.get("/images/image/red?width=0").status_code == 400
    assert live.get("/assets/..%2Fapp.py").status_code == 404


def test_an_image_that_is_gone_or_damaged_is_said(embedder, tmp_path):
    from puma_jax.search.open import open_index
    from tests.service.serving import embed_corpus

    vectors = embed_corpus(embedder, tmp_path)
    (tmp_path / "corpus/red.png").unlink()
    (tmp_path / "corpus/blue.png").write_bytes(b"no image")
    Image.new("RGB", (30, 20)).save(tmp_path / "corpus/green.png", "TIFF")
    with serving(embedder, open_index(vectors)) as live:
        for query in ("", "?width=99"):
            for color, said in (("red", "the file is missing"), ("blue", "it is damaged")):
                answer = live.get(f"/images/image/{color}{query}")
                assert answer.status_code == 404
                assert answer.json()["error"]["message"].endswith(said)
        answer = live.get("/images/image/green")  # what browsers do not show comes as JPEG
        assert answer.headers["content-type"] == "image/jpeg"


def test_a_service_without_an_index_only_embeds(embedder):
    with serving(embedder, None) as live:
        assert live.post("/v1/embeddings", {"input": "a"}).status_code == 200
        for answer in (live.post("/search", {"text": "a"}), live.get("/index")):
            assert answer.status_code == 404
            assert answer.json()["error"]["code"] == "no_index"


def test_the_index_is_described(live):
    assert live.get("/index").json() == {
        "documents": 12, "model": "tiny", "width": 64, "instruction": INSTRUCTION, "max_k": 200,
    }  # fmt: skip
