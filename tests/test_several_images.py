"""Items of several images: as transformers reads them, wherever they come from."""

import json

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from puma_jax import Embedder
from puma_jax.config import ImageConfig
from puma_jax.errors import DataError, ImageError, ItemError
from puma_jax.search.corpus import open_corpus
from puma_jax.search.embedding import embed
from puma_jax.search.shards import Vectors
from tests.reference import image_processor, random_image

RED, TALL, WIDE = (
    random_image(70, 150),
    random_image(160, 64, seed=1),
    random_image(60, 230, seed=2),
)
ITEMS = [
    {"text": "A cat.", "image": [RED, TALL]},
    {"text": "A cat.", "image": [TALL, RED]},
    {"image": (WIDE, RED, TALL)},
    {"text": "Compare.", "image": [TALL, np.asarray(WIDE), RED]},
    {"text": "A dog.", "image": [RED]},
]


def embedder_of(pair):
    side = 2 * pair.config.vision.patch_size
    limits = ImageConfig(4 * side**2, 30 * side**2)
    return Embedder.load(pair.folder, dtype="float32", images=limits)


def expected_vector(pair, embedder, text, images):
    """The vector by transformers' tokenizer, image processor, positions and model."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(pair.folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[RET]"]})
    inputs = dict(
        image_processor(embedder.config.images, embedder.config.vision)(images, return_tensors="pt")
    )
    pictures = "".join(
        f"<|vision_start|>{'<|image_pad|>' * (int(grid.prod()) // 4)}<|vision_end|>"
        for grid in inputs["image_grid_thw"]
    )
    asked = "image and sentence" if text else "image"
    prompt = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"{pictures}{text}\nSummarize above {asked} in one word: <|im_end|>\n"
        "<|im_start|>assistant\n[RET]"
    )
    ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
    kinds = (ids == pair.config.image_token_id).long()
    with torch.no_grad():
        states = pair.torch.model(input_ids=ids, mm_token_type_ids=kinds, **inputs)
    return torch.nn.functional.normalize(states.last_hidden_state[0, -1], dim=0).numpy()


def test_several_images_are_read_as_transformers_reads_them(family):
    embedder = embedder_of(family)
    ours = embedder.encode([*ITEMS, "A text."])
    for item, vector in zip(ITEMS, ours, strict=False):
        images = [np.asarray(image) for image in item["image"]]
        theirs = expected_vector(family, embedder, item.get("text", ""), images)
        np.testing.assert_allclose(vector, theirs, rtol=0, atol=1e-5)
    assert np.abs(ours[0] - ours[1]).max() > 1e-3, "the order of images says something"
    alone = embedder.encode([{"text": "A dog.", "image": RED}])
    np.testing.assert_allclose(alone[0], ours[4], rtol=0, atol=1e-6)


def test_positions_of_several_images_are_those_of_transformers(family):
    item = embedder_of(family).preprocess(ITEMS[3])
    grids = [
        [1, *item.patch_positions[item.patch_images == number].max(0) + 1] for number in range(3)
    ]
    theirs, _ = family.torch.model.get_rope_index(
        torch.tensor(item.tokens[None].astype(np.int64)),
        mm_token_type_ids=torch.tensor(item.image_token_mask[None].astype(np.int64)),
        image_grid_thw=torch.tensor(np.array(grids)),
    )
    np.testing.assert_array_equal(item.positions, theirs[:, 0].T.numpy())


def test_a_bad_image_of_several_is_refused(tiny):
    embedder = embedder_of(tiny)
    with pytest.raises(ImageError, match=r"^item 0: image is a int, expected a path, bytes, a PIL"):
        embedder.encode([{"image": [RED, 3]}])
    with pytest.raises(ItemError, match=r"^item 0: neither text nor image$"):
        embedder.encode([{"image": []}])


def test_a_corpus_names_a_list_of_images(tiny, tmp_path):
    """A changed image, wherever it is in the list, is embedded again."""
    for name, image in (("red", RED), ("tall", TALL), ("wide", WIDE)):
        image.save(tmp_path / f"{name}.png")
    lines = [
        {"id": "several", "text": "A cat.", "image": ["red.png", "tall.png"]},
        {"id": "one", "image": ["wide.png"]},
    ]
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    embedder, out = embedder_of(tiny), tmp_path / "vectors"
    assert embed(open_corpus(path), embedder, out).embedded == 2
    vectors = Vectors(out)
    expected = embedder.encode([ITEMS[0], {"image": WIDE}])
    found = np.concatenate([*vectors.parts()])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    record = next(iter(vectors.items()))
    assert [image.path for image in record.images] == [
        str(tmp_path / name) for name in ("red.png", "tall.png")
    ]
    assert embed(open_corpus(path), embedder, out).embedded == 0
    RED.save(tmp_path / "tall.png")
    again = embed(open_corpus(path), embedder, out)
    assert (again.embedded, again.removed) == (1, 1)


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (["a.png", ""], "holds an empty image, expected a path"),
        (["a.png", 3], "image 3 is not a path or a stored image"),
        ([["a.png"]], "is not a path or a stored image"),
        (["a.png", "../b.png"], r"\.\./b\.png"),
    ],
)
def test_a_bad_list_of_a_corpus_is_refused(tmp_path, image, said):
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps({"id": "a", "image": image}))
    with pytest.raises(DataError, match=said):
        open_corpus(path).read(0)
