"""Cohere's own client works; types of vectors are held against sentence-transformers."""

from __future__ import annotations

import cohere
import httpx
import numpy as np
import pytest

from tests.service.serving import INSTRUCTION, data_url, picture


@pytest.fixture
def client(live):
    with httpx.Client() as http:
        yield cohere.ClientV2(api_key="none", base_url=live.url, httpx_client=http)


def close(found, expected):
    np.testing.assert_allclose(np.array(found), expected, rtol=0, atol=1e-6)


def test_texts_images_and_both_are_those_of_encode(client, embedder):
    red, blue = picture("red"), picture("blue", (90, 50), "JPEG")
    images = [data_url(red), data_url(blue, "jpeg")]
    answer = client.embed(model="tiny", input_type="search_document", texts=["a", "b"])
    close(answer.embeddings.float_, embedder.encode(["a", "b"], progress=False))
    assert answer.texts == ["a", "b"]
    answer = client.embed(model="tiny", input_type="image", images=images)
    close(
        answer.embeddings.float_,
        embedder.encode([{"image": red}, {"image": blue}], progress=False),
    )
    assert [(image.width, image.height) for image in answer.images] == [(60, 40), (90, 50)]
    parts = [
        {"type": "text", "text": "in blue"},
        {"type": "image_url", "image_url": {"url": images[0]}},
    ]
    answer = client.embed(
        model="tiny",
        input_type="search_document",
        inputs=[
            {"content": parts},
            {"content": parts[:1]},
            {"content": parts[1:]},
            {"content": [*parts, {"type": "image_url", "image_url": {"url": images[1]}}]},
        ],
    )
    items = [{"image": red, "text": "in blue"}, "in blue", {"image": red}]
    items.append({"image": [red, blue], "text": "in blue"})
    close(answer.embeddings.float_, embedder.encode(items, progress=False))
    assert answer.meta.api_version.version == "2"
    assert answer.meta.billed_units.images == 4


def test_queries_have_the_instruction_of_the_service(client, embedder):
    answer = client.embed(model="tiny", input_type="search_query", texts=["a"])
    close(answer.embeddings.float_, embedder.encode(["a"], instruction=INSTRUCTION, progress=False))


def test_types_of_vectors_are_those_of_the_field(client, embedder):
    from sentence_transformers.util import quantize_embeddings

    kinds = ["float", "int8", "uint8", "binary", "ubinary", "base64"]
    texts = [f"no. {number}" for number in range(8)]
    answer = client.embed(
        model="tiny", input_type="clustering", texts=texts, embedding_types=kinds,
        output_dimension=40,
    )  # fmt: skip
    found = answer.embeddings
    vectors = embedder.encode(texts, progress=False)[:, :40]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    close(found.float_, vectors)
    for kind in ("binary", "ubinary"):
        expected = quantize_embeddings(vectors, kind)
        np.testing.assert_array_equal(np.array(getattr(found, kind)), expected)
    int8, uint8 = np.array(found.int8), np.array(found.uint8)
    assert np.abs(int8).max(1).tolist() == [127] * 8
    np.testing.assert_array_equal(uint8, int8 + 128)
    lengths = np.linalg.norm(int8, axis=1, keepdims=True)
    np.testing.assert_allclose(int8 / lengths, vectors, rtol=0, atol=0.01)


@pytest.mark.filterwarnings("ignore::puma_jax.data.prompts.TextTruncationWarning")  # once a model
def test_texts_are_truncated_only_where_that_is_allowed_and_said(live, embedder):
    expected = embedder.encode(["long " * 102], progress=False)
    body = {"input_type": "search_document", "texts": ["a", "long " * 102]}
    answer = live.post("/v2/embed", {**body, "truncate": "NONE"})
    assert answer.status_code == 400
    assert answer.json()["message"].startswith("item 1: a text has 51")
    answer = live.post("/v2/embed", body).json()
    close(answer["embeddings"]["float"][1:], expected)
    assert answer["meta"]["warnings"] == ["the texts of these items were truncated: 1"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"texts": ["a"]}, "input_type: Field required"),
        ({"input_type": "other", "texts": ["a"]}, "input_type"),
        ({"input_type": "image"}, "expected one of texts, images and inputs, found 0"),
        ({"input_type": "image", "texts": ["a"], "images": []}, "found 2"),
        ({"input_type": "image", "texts": []}, "has 0 items"),
        ({"input_type": "image", "texts": ["a"], "embedding_types": ["bit"]}, "embedding_types"),
        ({"input_type": "image", "texts": ["a"], "output_dimension": 99}, "99 dimensions"),
        ({"input_type": "image", "texts": ["a"], "truncate": "START"}, "truncate"),
        ({"input_type": "image", "inputs": [{"content": []}]}, "neither text nor image"),
        ({"input_type": "image", "images": ["http://localhost/a.png"]}, "fetches no images"),
    ],
)
def test_what_is_wrong_is_said_in_coheres_shape(live, body, said):
    answer = live.post("/v2/embed", body)
    assert answer.status_code == 400
    assert set(answer.json()) == {"message"}
    assert said in answer.json()["message"]
