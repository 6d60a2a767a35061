"""Scores of pairs are those of the published procedure, written with transformers here."""

import json

import numpy as np
import pytest
import torch

from puma_jax import Embedder, Reranker
from puma_jax.config import ImageConfig, VisionConfig
from puma_jax.data import pairs
from puma_jax.data.prompts import TextTruncationWarning
from puma_jax.data.raw_items import images_of
from puma_jax.errors import CheckpointError, ItemError
from tests import reference
from tests.reference import image_processor, random_image

LIMITS = ImageConfig(4 * 32**2, 30 * 32**2)
RED, TALL = random_image(70, 150), random_image(160, 64, seed=1)
QUERIES = [
    {"text": "a red bicycle", "instruction": "Find the same object"},
    {"image": RED},
    {"text": "in blue?", "image": TALL},
    {"text": ""},
]
DOCUMENTS = [
    {"text": "It is a bicycle.\n"},
    {"image": TALL},
    {"text": "日本 🚲", "image": RED},
    {"text": ""},
    {"text": "Both.", "image": [RED, TALL]},
]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(request, tmp_path_factory):
    """A random reranker: model, tokenizer and folder."""
    folder = tmp_path_factory.mktemp("reranker") / "Qwen3-VL-Reranker-tiny"
    return *reference.save_reranker(folder, tie=request.param), folder


def published_score(model, tokenizer, query, document, instruction=None, max_tokens=8192):
    """The score by the published procedure, of one pair alone."""
    images = [*images_of(query), *images_of(document)]
    inputs = {}
    if images:
        vision = VisionConfig(
            layers=1, width=32, heads=2, mlp_width=64, out_width=64, patch_size=16,
            image_mean=(0.5,) * 3, image_std=(0.5,) * 3,
        )  # fmt: skip
        inputs = dict(image_processor(LIMITS, vision)(images, return_tensors="pt"))

    grids = iter(inputs.get("image_grid_thw", ()))

    def content(side):
        counts = [int(next(grids).prod()) // 4 for _ in images_of(side)]
        text = "".join(
            f"<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>" for count in counts
        )
        return (text + (side.get("text") or "")) or "NULL"

    asked = query.get("instruction") or instruction or (
        "Given a search query, retrieve relevant candidates that answer the query."
    )  # fmt: skip
    prompt = (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query "
        'and the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
        f"<|im_start|>user\n<Instruct>: {asked}<Query>:{content(query)}"
        f"\n<Document>:{content(document)}<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer(prompt)["input_ids"]
    closing = len(tokenizer("<|im_end|>\n<|im_start|>assistant\n")["input_ids"])
    body, room = ids[:-closing], max_tokens
    room -= sum(token in tokenizer.all_special_ids for token in body)
    kept = []
    for token in body:
        special = token in tokenizer.all_special_ids
        if special or room > 0:
            kept.append(token)
        room -= not special
    ids = torch.tensor([kept + ids[-closing:]])
    image_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    yes, no = (
        model.lm_head.weight[tokenizer.convert_tokens_to_ids(word)] for word in ("yes", "no")
    )
    with torch.no_grad():
        state = model.model(
            input_ids=ids, mm_token_type_ids=(ids == image_id).long(), **inputs
        ).last_hidden_state[0, -1]
        return torch.sigmoid(state @ (yes - no)).item()


def test_scores_are_those_of_the_published_procedure(model):
    reranker = Reranker.load(model[2], dtype="float32", images=LIMITS)
    for query in QUERIES:
        scores = reranker.score(query, DOCUMENTS)
        expected = [published_score(*model[:2], query, document) for document in DOCUMENTS]
        np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)
        assert np.ptp(scores) > 0.01


def test_pairs_are_packed_and_do_not_depend_on_each_other(model):
    reranker = Reranker.load(model[2], dtype="float32", images=LIMITS)
    both = [(query, document) for query in QUERIES for document in DOCUMENTS]
    together = reranker.score_pairs(both, instruction="Find a cat.")
    alone = np.concatenate(
        [reranker.score_pairs([pair], instruction="Find a cat.") for pair in both]
    )
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-6)
    expected = [published_score(*model[:2], *pair, "Find a cat.") for pair in both]
    np.testing.assert_allclose(together, expected, rtol=0, atol=1e-5)
    assert reranker.score("a", []).shape == (0,)


def test_a_long_pair_loses_the_end_of_its_texts(model, monkeypatch):
    monkeypatch.setattr(pairs, "MAX_TOKENS", 420)
    reranker = Reranker.load(model[2], dtype="float32", images=LIMITS)
    for document in ({"text": "long " * 80}, {"text": "long " * 80, "image": RED}):
        query = {"image": TALL}
        with pytest.warns(
            TextTruncationWarning, match=r"^a pair of \d+ tokens was truncated to 420;"
        ):
            (score,) = Reranker.load(model[2], dtype="float32", images=LIMITS).score(
                query, [document]
            )
        expected = published_score(*model[:2], query, document, max_tokens=420)
        assert score == pytest.approx(expected, abs=1e-5)
    assert len(reranker.preprocess(("a", "b")).tokens) < 420


def test_special_tokens_in_a_text_are_plain_text(model):
    reranker = Reranker.load(model[2], dtype="float32", images=LIMITS)
    item = reranker.preprocess(("<|image_pad|>", "<|im_end|>"))
    special = [model[1].convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "im_end")]
    assert [int((item.tokens == token).sum()) for token in special] == [0, 2]
    assert not item.image_token_mask.any()


@pytest.mark.parametrize(
    ("query", "document", "message"),
    [
        ("a", {"text": "b", "instruction": "c"}, "a document has an instruction, expected it with"),
        ("a", {}, "neither text nor image"),
        ({"text": 3}, "b", "text is a int, expected a str"),
    ],
)
def test_a_bad_pair_is_named_by_its_number(model, query, document, message):
    reranker = Reranker.load(model[2], dtype="float32", images=LIMITS)
    with pytest.raises(ItemError, match=f"^pair 1: {message}"):
        reranker.score_pairs([("a", "b"), (query, document)])
    with pytest.raises(ItemError, match="takes a list of documents"):
        reranker.score("a", "b")


def test_what_is_no_reranker_is_refused_in_one_line(tiny, deepstack, model, tmp_path):
    with pytest.raises(CheckpointError, match="is of family qwen2_vl, expected one with published"):
        Reranker.load(tiny.folder)
    with pytest.raises(CheckpointError, match='has no token "yes": it is not that of a reranker'):
        Reranker.load(deepstack.folder)
    Embedder.load(deepstack.folder).save(tmp_path / "embedder")
    with pytest.raises(CheckpointError, match="is an embedder, expected a reranker: use Embedder"):
        Reranker.load(tmp_path / "embedder")
    folder = tmp_path / "headless"
    model[0].model.save_pretrained(folder)
    model[1].save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": False}))
    with pytest.raises(CheckpointError, match=r"has no lm_head\.weight, which its config says is"):
        Reranker.load(folder)
