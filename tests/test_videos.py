"""Videos: as transformers reads their frames, in every family."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from puma_jax import Embedder
from puma_jax.config import ImageConfig, PromptConfig
from puma_jax.errors import ImageError, ItemError
from puma_jax.model.hf import open_checkpoint
from tests.reference import image_processor, random_image, token_id

FRAMES = [random_image(64, 96, seed=number) for number in range(5)]
START = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
END = "\nSummarize above image and sentence in one word: <|im_end|>\n<|im_start|>assistant\n[RET]"


def embedder_of(pair, **settings):
    side = 2 * pair.config.vision.patch_size
    limits = ImageConfig(4 * side**2, 30 * side**2)
    return Embedder.load(pair.folder, dtype="float32", images=limits, **settings)


def video_inputs(pair, embedder, frames, fps):
    """Pixels and grid of a video, and its text, by transformers' rules for its family."""
    vision = embedder.config.vision
    read = image_processor(embedder.config.images, vision)(frames, return_tensors="pt")
    grid = read["image_grid_thw"][0]
    size = int(grid.prod())
    pixels = read["pixel_values"].reshape(len(frames), size, 3, 2, -1)[:, :, :, 0]
    pixels = torch.cat([pixels, pixels[-1:]])[: len(frames) // 2 * 2 + len(frames) % 2 * 2]
    pairs = pixels.reshape(-1, 2, size, 3, vision.patch_size**2).permute(0, 2, 3, 1, 4)
    times = len(pairs)
    inputs = {
        "pixel_values_videos": pairs.reshape(times * size, -1),
        "video_grid_thw": torch.tensor([[times, *grid[1:]]]),
    }
    pads = "<|video_pad|>" * (size // 4)
    if pair.config.family == "qwen3_vl":
        last = len(frames) - 1
        seconds = [(2 * n + min(2 * n + 1, last)) / 2 / fps for n in range(times)]
        return inputs, "".join(
            f"<{second:.1f} seconds><|vision_start|>{pads}<|vision_end|>" for second in seconds
        )
    if pair.config.family == "qwen2_5_vl":
        inputs["second_per_grid_ts"] = torch.tensor([2 / fps])
    return inputs, f"<|vision_start|>{pads * times}<|vision_end|>"


@pytest.mark.parametrize(("count", "fps"), [(5, 2.0), (4, 1.5)])
def test_a_video_is_read_as_transformers_reads_it(family, count, fps):
    embedder = embedder_of(family)
    frames = FRAMES[:count]
    still = {"text": "A cat.", "image": FRAMES[0]}
    item = {"text": "A cat.", "video": frames, "fps": fps}
    ours, *beside = embedder.encode([item, "A dog.", still])
    inputs, shown = video_inputs(family, embedder, frames, fps)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(family.folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[RET]"]})
    prompt = f"{START}{shown}A cat.{END}"
    ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
    kinds = 2 * (ids == token_id("<|video_pad|>")).long()
    with torch.no_grad():
        states = family.torch.model(input_ids=ids, mm_token_type_ids=kinds, **inputs)
    theirs = torch.nn.functional.normalize(states.last_hidden_state[0, -1], dim=0).numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    # Images and texts beside a video are what they are without one.
    np.testing.assert_allclose(embedder.encode(["A dog.", still]), beside, rtol=0, atol=1e-6)


@pytest.mark.parametrize("stride", [1, 2])
def test_positions_of_a_video_are_those_of_transformers(family, stride):
    """Those of pooled tokens are the positions of a video of a quarter of the patches."""
    embedder = embedder_of(family)
    limits = dataclasses.replace(embedder.config.images, spatial_pool_stride=stride)
    embedder = Embedder.load(family.folder, images=limits)
    item = embedder.preprocess({"text": "A cat.", "video": FRAMES, "fps": 1.5})
    rows, columns = (item.patch_positions[item.patch_images == 0].max(0) + 1) // stride
    extra = {}
    if family.config.family == "qwen2_5_vl":
        extra["second_per_grid_ts"] = torch.tensor([2 / 1.5])
    theirs, _ = family.torch.model.get_rope_index(
        torch.tensor(item.tokens[None].astype(np.int64)),
        mm_token_type_ids=2 * torch.tensor(item.image_token_mask[None].astype(np.int64)),
        video_grid_thw=torch.tensor([[3, rows, columns]]),
        **extra,
    )
    np.testing.assert_array_equal(item.positions, theirs[:, 0].T.numpy())


def test_the_pace_of_a_video_is_kept_and_says_something(windowed, tmp_path):
    embedder = embedder_of(windowed)
    embedder.save(tmp_path / "saved")
    assert open_checkpoint(tmp_path / "saved").config == embedder.config
    fast, slow = embedder.encode([{"video": FRAMES, "fps": fps} for fps in (2, 0.5)])
    assert np.abs(fast - slow).max() > 1e-4
    (usual,) = embedder.encode([{"video": FRAMES}])
    np.testing.assert_allclose(usual, fast, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("item", "error", "said"),
    [
        ({"video": "a.mp4"}, ItemError, "video is a str, expected a list of its frames"),
        ({"video": FRAMES, "image": FRAMES[0]}, ItemError, "an item has images and a video"),
        ({"video": FRAMES, "fps": 0}, ItemError, "fps is 0, expected frames a second"),
        ({"text": "a", "fps": 2.0}, ItemError, "fps is 2.0, expected frames a second, of an item"),
        ({"video": []}, ItemError, "neither text nor image"),
        ({"video": [3]}, ImageError, "image is a int, expected a path"),
        ({"video": [FRAMES[0], random_image(30, 200)]}, ImageError, "frames of a video have"),
    ],
)
def test_a_bad_video_is_refused_in_one_line(tiny, item, error, said):
    with pytest.raises(error, match=f"^item 0: {said}"):
        embedder_of(tiny, prompt=PromptConfig()).encode([item])
