"""Random models of transformers, folders of them, and a tokenizer that needs no hub."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from puma_jax.config import ComputeConfig, ImageConfig, LoraConfig, ModelConfig, VisionConfig
from puma_jax.data.images import patchify
from puma_jax.data.items import Item
from puma_jax.data.packing import fill, place
from puma_jax.data.prompts import Processor
from puma_jax.model import encoder, lora
from puma_jax.model.hf import open_checkpoint
from puma_jax.model.tree import partition
from puma_jax.rows import PackedBatch, PackedShape
from puma_jax.training.adapter import write_adapter
from puma_jax.training.config import StageConfig

FLOAT32 = ComputeConfig(dtype="float32")
# All that packing asks of a tower.
VISION = VisionConfig(layers=1, width=32, heads=2, mlp_width=64, out_width=64)
encode = jax.jit(encoder.encode, static_argnames=("compute", "data_shards"))

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
SPECIAL += ("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with Qwen's special tokens: 256 bytes, then the special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    return tokenizer


def token_id(token: str) -> int:
    return byte_tokenizer().convert_tokens_to_ids(token)


def qwen2_vl_config(
    *, width=64, heads=4, kv_heads=2, mlp_width=96, layers=4, sections=(2, 3, 3), tie=True,
    vision_width=32, vision_heads=2, vision_layers=2, mlp_ratio=2,
) -> Qwen2VLConfig:  # fmt: skip
    """A transformers config with the byte tokenizer's vocabulary and some spare rows."""
    return Qwen2VLConfig(
        text_config=_text(width, heads, kv_heads, mlp_width, layers, sections),
        vision_config={
            "depth": vision_layers,
            "embed_dim": vision_width,
            "hidden_size": width,
            "num_heads": vision_heads,
            "mlp_ratio": mlp_ratio,
        },
        tie_word_embeddings=tie,
        **_special_ids(),
    )


def qwen2_5_vl_config(
    *, width=64, heads=4, kv_heads=2, mlp_width=96, layers=4, sections=(2, 3, 3), tie=True,
    vision_width=32, vision_heads=2, vision_layers=3, vision_mlp_width=72, full=(1,), window=112,
) -> Qwen2_5_VLConfig:  # fmt: skip
    """The same of Qwen2.5-VL; the blocks named by `full` attend to whole images."""
    return Qwen2_5_VLConfig(
        text_config=_text(width, heads, kv_heads, mlp_width, layers, sections),
        vision_config=_tower(width, vision_width, vision_heads, vision_layers, vision_mlp_width)
        | {"fullatt_block_indexes": list(full), "window_size": window},
        tie_word_embeddings=tie,
        **_special_ids(),
    )


def qwen3_vl_config(
    *, width=64, heads=4, kv_heads=2, head_dim=24, mlp_width=96, layers=4, sections=(6, 3, 3),
    tie=True, vision_width=32, vision_heads=2, vision_layers=4, vision_mlp_width=72,
    deepstack=(0, 1, 3), table_side=6,
) -> Qwen3VLConfig:  # fmt: skip
    """The same of Qwen3-VL; the blocks named by `deepstack` have features of their own."""
    text = _text(width, heads, kv_heads, mlp_width, layers, sections) | {"head_dim": head_dim}
    text["rope_parameters"]["mrope_interleaved"] = True
    return Qwen3VLConfig(
        text_config=text,
        vision_config=_tower(width, vision_width, vision_heads, vision_layers, vision_mlp_width)
        | {
            "deepstack_visual_indexes": list(deepstack),
            "num_position_embeddings": table_side**2,
        },
        tie_word_embeddings=tie,
        **_special_ids(),
    )


TEXT_CONFIGS = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}


def text_config(model_type: str, *, width=64, layers=4, tie=True, **fields) -> PreTrainedConfig:
    """The same of a family of texts only; heads of Qwen3 need not divide the width."""
    fields = _text(width, 4, 2, 96, layers, ()) | fields
    fields["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e5}
    if model_type == "qwen3":
        fields["head_dim"] = 24
    return TEXT_CONFIGS[model_type](**fields, tie_word_embeddings=tie)


def _text(width, heads, kv_heads, mlp_width, layers, sections) -> dict:
    return {
        "vocab_size": 272,
        "hidden_size": width,
        "intermediate_size": mlp_width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": list(sections),
        },
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _tower(out_width, width, heads, layers, mlp_width) -> dict:
    return {
        "depth": layers,
        "hidden_size": width,
        "num_heads": heads,
        "intermediate_size": mlp_width,
        "out_hidden_size": out_width,
    }


def _special_ids() -> dict:
    names = ("image", "video")
    ids = {f"{name}_token_id": token_id(f"<|{name}_pad|>") for name in names}
    return ids | {
        "vision_start_token_id": token_id("<|vision_start|>"),
        "vision_end_token_id": token_id("<|vision_end|>"),
    }


MODELS = {
    "qwen2_vl": Qwen2VLForConditionalGeneration,
    "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
    "qwen3_vl": Qwen3VLForConditionalGeneration,
    "qwen2": Qwen2ForCausalLM,
    "qwen3": Qwen3ForCausalLM,
    "llama": LlamaForCausalLM,
}


def random_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A model none of whose parameters are zero or one: a missing bias shows."""
    torch.manual_seed(seed)
    model = MODELS[config.model_type](config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                centre = 1.0 if "norm" in name or "ln_q" in name else 0.0
                parameter.copy_(centre + 0.2 * torch.randn_like(parameter))
                if name.endswith("bias"):
                    parameter.copy_(0.2 * torch.randn_like(parameter))
            elif "embed_tokens" in name or "lm_head" in name or "pos_embed" in name:
                parameter.copy_(torch.randn_like(parameter))
            else:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn_like(parameter) * fan_in**-0.5)
    return model


def save_folder(model, folder: Path, **kwargs) -> Path:
    """Save model and tokenizer as transformers does."""
    model.save_pretrained(folder, **kwargs)
    byte_tokenizer().save_pretrained(folder)
    return folder


def save_reranker(
    folder: Path, *, tie: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Save a random Qwen3-VL with a head, and a tokenizer that knows yes and no."""
    model, tokenizer = random_model(qwen3_vl_config(tie=tie), seed=3), byte_tokenizer()
    tokenizer.add_tokens(["yes", "no"])
    with torch.no_grad():  # scores near 0 or 1 would hide differences
        model.lm_head.weight[tokenizer.convert_tokens_to_ids(["yes", "no"])] *= 0.2
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def save_adapter(pair: Pair, folder: Path) -> Path:
    """Write a PEFT folder of an adapter on the decoder, none of whose matrices are zero."""
    config = LoraConfig(rank=2)
    params = lora.add_lora(pair.params, config, jax.random.key(0))
    adapters = partition(params, lora.is_lora)[0].items()
    leaves = {name: leaf + 0.05 for name, leaf in adapters}
    write_adapter(folder, pair.config, leaves, StageConfig(steps=1, lora=config), "base")
    return folder


def bidirectional_copy(source: Path, target: Path) -> Path:
    """Copy a folder, whose decoder now attends both ways, as transformers' config.json says it."""
    target.mkdir(parents=True)
    for file in source.iterdir():
        (target / file.name).symlink_to(file)
    config = json.loads((source / "config.json").read_text())
    config.get("text_config", config)["is_causal"] = False
    (target / "config.json").unlink()
    (target / "config.json").write_text(json.dumps(config))
    return target


def rename_to_later_generation(source: Path, target: Path) -> Path:
    """Copy a single-file folder, its tensors named as transformers ≥ 4.52 wrote them."""
    target.mkdir(parents=True)
    for file in source.glob("*.json"):
        (target / file.name).write_bytes(file.read_bytes())
    renamed = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.startswith("visual."):
            name = f"model.{name}"
        elif name.startswith("model."):
            name = name.replace("model.", "model.language_model.", 1)
        renamed[name] = tensor
    save_file(renamed, target / "model.safetensors", metadata={"format": "pt"})
    return target


def hub_config(folder: Path) -> None:
    """Rewrite config.json flat, as the files of Qwen/Qwen2-VL-* on the hub are."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    text.pop("model_type")
    config |= text
    config["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    config["rope_theta"] = rope["rope_theta"]
    config["torch_dtype"] = config.pop("dtype")
    config["vision_config"].pop("rope_parameters", None)
    path.write_text(json.dumps(config))


def random_image(height: int, width: int, seed: int = 0) -> Image.Image:
    """An RGB image with structure at several scales."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (3, 4, 3), np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    noise = rng.integers(-20, 20, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


@dataclass(frozen=True)
class Pair:
    """The same weights twice: in transformers and in ours, float32."""

    folder: Path
    torch: PreTrainedModel
    config: ModelConfig
    params: encoder.Encoder

    @property
    def processor(self) -> Processor:
        return Processor(byte_tokenizer(), self.config)

    def item(self, text: str = "", *images: Image.Image) -> Item:
        """An item with any number of images."""
        patches = [patchify(image, self.config.vision, self.config.images) for image in images]
        return self.processor.item(text, patches)

    def states(self, items: list[Item], shape: PackedShape) -> np.ndarray:
        """Our state at each item's [RET]."""
        rows, packing = pack(items, shape, self.config.vision)
        return np.asarray(encode(self.params, rows, FLOAT32))[packing.slot]

    def expected(self, item: Item, model=None) -> np.ndarray:
        """The reference's state at the last token of one item, alone and unpadded."""
        return self.all_states(item, model)[-1]

    def all_states(self, item: Item, model=None) -> np.ndarray:
        """The reference's states at all tokens of one item, alone and unpadded."""
        ids = torch.tensor(item.tokens[None].astype(np.int64))
        inputs = {}
        if self.config.vision.layers:
            kinds = torch.tensor(item.image_token_mask[None].astype(np.int64))
            inputs["mm_token_type_ids"] = kinds
        if len(item.patches):
            inputs["pixel_values"] = pixel_values(item.patches, self.config.vision)
            inputs["image_grid_thw"] = grid_thw(item)
        with torch.no_grad():
            output = (model or self.torch).model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                use_cache=False,
                **inputs,
            )
        return output.last_hidden_state[0].numpy()


def pair(config: PreTrainedConfig, folder: Path) -> Pair:
    """Make a random model and read it with ours."""
    model = random_model(config)
    save_folder(model, folder)
    checkpoint = open_checkpoint(folder)
    return Pair(folder, model, checkpoint.config, checkpoint.read(dtype="float32"))


def pack(
    items: list[Item], shape: PackedShape, vision: VisionConfig = VISION
) -> tuple[PackedBatch, object]:
    """Items in the one chunk they fit into."""
    lengths = np.array([len(item.tokens) for item in items])
    patches = np.array([len(item.patches) for item in items])
    packing = place(lengths, patches, shape, 1)
    rows = fill(items, packing, shape, vision)
    return jax.tree.map(lambda a: jax.numpy.asarray(a[0]), rows), packing


def pixel_values(patches: np.ndarray, vision: VisionConfig) -> torch.Tensor:
    """Return the pixel values of transformers' processor for these patches, in float64 inside."""
    mean, std = (np.array(of)[:, None] for of in (vision.image_mean, vision.image_std))
    scaled = (patches.reshape(len(patches), vision.channels, -1) / 255 - mean) / std
    frames = np.repeat(scaled[:, :, None], vision.temporal_patch_size, axis=2)
    return torch.tensor(frames.reshape(len(patches), -1), dtype=torch.float32)


def grid_thw(item: Item) -> torch.Tensor:
    """Frames, rows and columns of patches of each image of an item."""
    images = range(item.patch_images.max() + 1)
    sizes = [item.patch_positions[item.patch_images == image].max(0) + 1 for image in images]
    return torch.tensor(np.array([[1, *size] for size in sizes]))


def pooled_features(
    model: PreTrainedModel, vision: VisionConfig, limits: ImageConfig, images: list[Image.Image]
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The reference's visual tokens, then its DeepStack features, averaged by torch on the grid.

    And the grids of the images, in patches, as if each had a quarter of them.
    """
    unit = 2 * vision.merge_size * vision.patch_size
    sizes = [
        smart_resize(image.height, image.width, unit, limits.min_pixels, limits.max_pixels)
        for image in images
    ]
    resized = [
        image.resize(size[::-1], Image.Resampling.BICUBIC)
        for image, size in zip(images, sizes, strict=True)
    ]
    inputs = image_processor(ImageConfig(1, 2**26), vision)(resized, return_tensors="pt")
    grids = inputs["image_grid_thw"]
    with torch.no_grad():
        found = model.visual(inputs["pixel_values"], grid_thw=grids)
    pooled = []
    for features in (found.pooler_output, *getattr(found, "deepstack_features", [])):
        parts = features.split((grids.prod(1) // vision.merge_size**2).tolist())
        averaged = [
            torch.nn.functional.avg_pool2d(
                part.T.reshape(-1, rows // vision.merge_size, columns // vision.merge_size), 2
            )
            for part, (_, rows, columns) in zip(parts, grids.tolist(), strict=True)
        ]
        pooled.append(torch.cat([part.flatten(1).T for part in averaged]))
    return pooled, grids // torch.tensor([1, 2, 2])


def image_processor(limits: ImageConfig, vision: VisionConfig = VISION) -> Qwen2VLImageProcessorPil:
    """Transformers' processor with our limits."""
    return Qwen2VLImageProcessorPil(
        size={"shortest_edge": limits.min_pixels, "longest_edge": limits.max_pixels},
        patch_size=vision.patch_size,
        merge_size=vision.merge_size,
        temporal_patch_size=vision.temporal_patch_size,
        image_mean=list(vision.image_mean),
        image_std=list(vision.image_std),
    )


def assert_full_precision(program: str) -> None:
    """Assert that a lowered program multiplies float32 as float32, and that it multiplies any.

    Accelerators round the factors of other products to fewer bits; CPUs do not, so that no number
    would show it here.
    """
    products = re.findall(r"stablehlo\.dot_general .*", program)
    ours = [line for line in products if re.search(r": \(tensor<[^>]*f32>", line)]
    assert ours
    assert not [line for line in ours if line.count("HIGHEST") != 2]
