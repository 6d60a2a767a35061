"""OpenAI's own client works, and what is refused is refused in OpenAI's shape."""

from __future__ import annotations

import base64
import re

import httpx
import numpy as np
import openai
import pytest

from tests.service.serving import data_url, picture


@pytest.fixture
def client(live):
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_the_client_gets_the_vectors_of_encode(client, embedder):
    texts = ["a red thing", "ein Fahrrad 🚲", "x" * 50]
    expected = embedder.encode(texts, progress=False)
    # By default the client asks for base64, and decodes it.
    for options in ({}, {"encoding_format": "float"}):
        answer = client.embeddings.create(model="tiny", input=texts, **options)
        found = np.array([one.embedding for one in answer.data])
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
        assert [one.index for one in answer.data] == [0, 1, 2]
    assert answer.model == "tiny"
    tokens = sum(len(embedder.preprocess(text).tokens) for text in texts)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == tokens
    one = client.embeddings.create(model="tiny", input=texts[0]).data[0].embedding
    np.testing.assert_allclose(one, expected[0], rtol=0, atol=1e-6)


def test_fewer_dimensions_are_the_first_values_at_length_one(client, embedder):
    whole = embedder.encode(["a"], progress=False)[0]
    answer = client.embeddings.create(model="tiny", input="a", dimensions=10)
    expected = whole[:10] / np.linalg.norm(whole[:10])
    np.testing.assert_allclose(answer.data[0].embedding, expected, rtol=0, atol=1e-6)
    with pytest.raises(openai.BadRequestError, match="65 dimensions are asked for, the model has"):
        client.embeddings.create(model="tiny", input="a", dimensions=65)


def test_an_image_comes_in_the_messages_of_a_chat(live, embedder):
    image = picture("red")
    parts = [
        {"type": "image_url", "image_url": {"url": data_url(image)}},
        {"type": "text", "text": "the same in blue"},
    ]
    user = {"role": "user", "content": parts}
    system = {"role": "system", "content": "Find an image."}
    expected = embedder.encode(
        [{"image": image, "text": "the same in blue"}], instruction="Find an image.", progress=False
    )
    for body in (
        {"messages": [system, user]},
        {"messages": [user], "instruction": "Find an image."},
    ):
        answer = live.post("/v1/embeddings", {"model": "tiny", **body}).json()
        found = np.array([answer["data"][0]["embedding"]])
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_more_images_than_fit_are_refused_with_what_to_do(live):
    part = {"type": "image_url", "image_url": {"url": data_url(picture("red"))}}
    message = {"role": "user", "content": [part] * 40}
    answer = live.post("/v1/embeddings", {"messages": [message]})
    assert answer.status_code == 400
    said = r"^the images of an item have [0-9]+ visual tokens, more than the [0-9]+ .* larger --ser"
    assert re.match(said, answer.json()["error"]["message"])


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_other_models_and_token_ids_are_refused(client):
    with pytest.raises(openai.NotFoundError, match='model is "gpt", this service has "tiny"'):
        client.embeddings.create(model="gpt", input="a")
    for tokens in ([1, 2], [[1, 2]]):
        with pytest.raises(openai.BadRequestError, match="token ids") as caught:
            client.embeddings.create(model="tiny", input=tokens)
    assert caught.value.code == "token_ids_not_supported"
    assert caught.value.type == "invalid_request_error"


def test_a_text_that_cannot_be_read_whole_is_refused_and_named(client):
    with pytest.raises(
        openai.BadRequestError, match=r"item 1: a text has 51[0-9] tokens, the mode"
    ):
        client.embeddings.create(model="tiny", input=["short", "long " * 102])


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"input": []}, "has 0 items, expected 1 to 256"),
        ({"input": ["a"] * 257}, "has 257 items, expected 1 to 256"),
        ({"input": ""}, "neither text nor image"),
        ({"input": ["a", "  "]}, "item 1: an item has neither text nor image"),
        ({"input": 3}, "input"),
        ({"input": ["a", None]}, "input"),
        ({"input": "a", "dimensions": 0}, "0 dimensions"),
        ({"input": "a", "dimensions": 1.5}, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "dimension": 3}, "dimension: Extra inputs are not permitted"),
        ({}, "either input or messages"),
        ({"input": "a", "messages": []}, "either input or messages"),
        ({"messages": []}, "holds 0 of the user"),
        ({"messages": [{"role": "user", "content": "a"}] * 2}, "holds 2 of the user"),
        ({"input": "x" * 100_001}, "100,001 characters, more than the 100,000"),
    ],
)
def test_what_is_wrong_with_a_request_is_said(live, body, said):
    answer = live.post("/v1/embeddings", body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "code"}
    assert said in error["message"]


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://127.0.0.1:1/a.png", "the service fetches no images"),
        ("file:///etc/passwd", "the service fetches no images"),
        ("data:image/png,abc", "expected data:image/...;base64"),
        ("data:image/png;base64,####", "not valid base64"),
        (data_url(b"no image"), "cannot be decoded"),
        (data_url(base64.b64decode("R0lGODlhAQABAAAAACw=")), "cannot be decoded"),
    ],
)
def test_images_that_are_not_read_are_refused(live, url, said):
    part = {"type": "image_url", "image_url": {"url": url}}
    answer = live.post("/v1/embeddings", {"messages": [{"role": "user", "content": [part]}]})
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


def test_a_body_that_is_no_json_is_refused(live):
    for body, kind, status in (
        (b"{", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b'{"input": "\xff"}', "application/json", 400),
        (b'{"input": NaN}', "application/json", 400),
        (b'{"input": "\\ud800"}', "application/json", 400),
        (b'{"input": "a"}', "text/plain", 415),
        (b"", "application/json", 400),
    ):
        answer = httpx.post(
            f"{live.url}/v1/embeddings", content=body, headers={"Content-Type": kind}
        )
        assert answer.status_code == status, answer.text
        assert answer.json()["error"]["message"]
