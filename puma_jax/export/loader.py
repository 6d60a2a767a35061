"""Embed texts and images with the model beside this file: `from load import Embedder`."""

import json
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file
from tokenizers import Tokenizer


class Embedder:
    """Makes vectors of {"text": str}, {"image": path, PIL image or uint8 array}, or both."""

    def __init__(self, folder=Path(__file__).parent):
        self.manifest = json.loads(Path(folder, "manifest.json").read_text("utf-8"))
        self.tokenizer = Tokenizer.from_file(str(Path(folder, "tokenizer.json")))
        self.tokenizer.encode_special_tokens = True  # a text cannot forge "<|image_pad|>"
        self.weights = jax.device_put(load_file(Path(folder, "weights.safetensors")))
        exported = jax.export.deserialize(bytearray(Path(folder, "embed.jax").read_bytes()))
        self.function = jax.jit(exported.call)

    def encode(self, items, instruction=None, batch=8):
        """Return unit vectors, float32 [n, width]; the instruction is put before every text."""
        vectors = [np.zeros((0, self.manifest["width"]), np.float32)]
        for at in range(0, len(items), batch):
            part = [self._read(i, items[i], instruction) for i in range(at, len(items))[:batch]]
            vectors.append(self.function(self.weights, *map(self._padded, zip(*part, strict=True))))
        return np.concatenate(vectors)

    def _padded(self, arrays):  # to one of few lengths, each of which is compiled once
        length = next(n for n in self.manifest["lengths"] if n >= max(map(len, arrays)))
        return np.stack([np.resize(array, (length, *array.shape[1:])) for array in arrays])

    def _read(self, number, item, instruction):
        ask, most, unit, low, high, ratio = self.manifest["reading"].values()
        text, image, cut = "", item.get("image"), np.zeros((0, 0, unit, unit, 3), np.uint8)
        for line in (instruction, item.get("text")):
            text = f"{text}\n{(line or '').strip()}".replace("\r", "").strip().strip('"')
            text = text[:1].upper() + text[1:] + ("" if text[-1:] in ".?!" else ".")
        if not text and image is None:
            raise ValueError(f"item {number} has neither text nor image")
        alone, ids = (self.tokenizer.encode(text + end).ids for end in ask[image is None][not text])
        if len(alone) > most:
            raise ValueError(f"item {number}: text of {len(alone)} tokens, over {most}: shorten it")
        if image is not None:
            from PIL import Image

            image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
            image = (Image.open(image) if isinstance(image, str | Path) else image).convert("RGB")
            sides, pixels = np.array(image.size), image.width * image.height
            if sides.max() > ratio * sides.min():
                raise ValueError(f"item {number}: image {image.size} is over {ratio} : 1, crop it")
            area = (near := np.rint(sides / unit)).prod() * unit**2
            less, more = sides / np.sqrt(pixels / high) / unit, sides * np.sqrt(low / pixels) / unit
            grid = np.floor(less) if area > high else np.ceil(more) if area < low else near
            image = np.asarray(image.resize([unit * max(1, int(side)) for side in grid]))
            cut = image.reshape(-1, unit, image.shape[1] // unit, unit, 3).swapaxes(1, 2)
        return np.int32(ids), cut.reshape(-1, unit, unit, 3), np.int32([len(ids), *cut.shape[:2]])  # type: ignore[arg-type]
