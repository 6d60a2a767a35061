"""Embed texts and images with the model beside this file: `from load import Embedder`."""

import functools
import hashlib
import json
import runpy
import unicodedata
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file
from tokenizers import Tokenizer


class Embedder:
    """Makes vectors of {"text": str}, {"image": path, bytes, PIL image or uint8 array}, or both."""

    def __init__(self, folder=Path(__file__).parent):
        """Read the model of a folder.

        Raises:
            ValueError: A file is missing, or is not the one that was written.
        """
        self.folder = folder = Path(folder)
        self.manifest = checked_manifest(folder)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.encode_special_tokens = True  # a text cannot forge "<|image_pad|>"
        self.weights = jax.device_put(load_file(folder / "weights.safetensors"))
        exported = jax.export.deserialize(bytearray((folder / "embed.jax").read_bytes()))
        self.function = jax.jit(exported.call)

    def encode(self, items, instruction=None, batch_size=8):
        """Return one unit vector per item, float32 [n, embedding_dim].

        The instruction is put before every item, where the prompt of the model has it.

        Raises:
            ValueError: An item has no such fields, is too long, or its image cannot be read.
        """
        if isinstance(items, str | dict) or batch_size < 1:
            found = f"items {type(items).__name__}, batch_size {batch_size}"
            raise ValueError(f"{found}: expected a list and at least 1")
        vectors = [np.zeros((0, self.manifest["embedding_dim"]), np.float32)]
        for start in range(0, len(items), batch_size):
            batch = [
                self._preprocess(number, items[number], instruction)
                for number in range(start, min(start + batch_size, len(items)))
            ]
            *arrays, sizes = zip(*batch, strict=True)
            padded = map(self._padded, arrays)
            vectors.append(np.asarray(self.function(self.weights, *padded, np.stack(sizes))))
            bad = np.flatnonzero(~np.isfinite(vectors[-1]).all(axis=1))
            if len(bad):
                raise ValueError(f"item {start + bad[0]}: its vector is not finite")
        return np.concatenate(vectors)

    @functools.cached_property
    def _decoded(self):
        """The function that opens an image upright and in RGB; only images need Pillow."""
        return runpy.run_path(str(self.folder / "decode.py"))["decoded"]

    def _padded(self, arrays):
        """Return arrays stacked, padded to one of few lengths, each of which is compiled once."""
        longest = max(len(array) for array in arrays)
        length = next(length for length in self.manifest["lengths"] if length >= longest)
        return np.stack([np.resize(array, (length, *array.shape[1:])) for array in arrays])

    def _preprocess(self, number, item, instruction):
        """Return the tokens of instruction and text, the blocks of the image, and their sizes."""
        fields = item if isinstance(item, dict) else {"": item}
        if fields.keys() - {"text", "image"}:
            found = ", ".join(map(repr, fields)) if fields is item else type(item).__name__
            raise ValueError(f"item {number} has {found}, expected a dict of text, image or both")
        for part in (instruction, fields.get("text")):
            if not isinstance(part, str | None):
                raise ValueError(f"item {number}: {type(part).__name__} is not a text")
        image = fields.get("image")
        asked, text = self._read(instruction, fields.get("text"), image is None)
        if isinstance(image, list | tuple):
            raise ValueError(f"item {number} has {len(image)} images, expected 1 at most")
        if bad := next((c for c in asked + text if "\ud7ff" < c < "\ue000"), ""):
            raise ValueError(f"item {number}: {bad!a} in its text is half a character: remove it")
        if image is None and not text:
            raise ValueError(f"item {number} has neither text nor image")
        tokens = self._tokenize(number, text, image is not None)
        rows = columns = 0
        side = self.manifest["preprocessing"]["block_side"]
        blocks = np.zeros((0, side, side, 3), np.uint8)
        if image is not None:
            try:
                with self._decoded(image) as rgb:
                    pixels = self._resize(rgb)
            except ValueError as error:
                raise ValueError(f"item {number}: {error}") from error
            rows, columns = pixels.shape[0] // side, pixels.shape[1] // side
            blocks = pixels.reshape(rows, side, columns, side, 3).swapaxes(1, 2)
            blocks = blocks.reshape(rows * columns, side, side, 3)
        before = self.tokenizer.encode(asked).ids
        sizes = np.array([len(tokens), rows, columns, len(before)], np.int32)
        return np.array(before, np.int32), np.array(tokens, np.int32), blocks, sizes

    def _read(self, instruction, text, alone):
        """Return an instruction that has a turn of its own, and the text as the model reads it.

        The text of an item without an image is `alone`.
        """
        turn = self.manifest["preprocessing"]["instruction_turn"]
        if turn is None:
            return "", query_text(instruction, text)
        text = text or ""
        if alone:
            text = turn["text_start"] + (text or turn["no_text"])
        return punctuated((instruction or "").strip() or turn["default"]), text

    def _tokenize(self, number, text, has_image):
        """Return the tokens of a text and of the part of the prompt that follows it."""
        config = self.manifest["preprocessing"]
        text_end, suffix = config["suffixes"][0 if has_image else 1][0 if text else 1]
        count = len(self.tokenizer.encode(text + text_end).ids)
        if count > config["max_text_tokens"]:
            limit = config["max_text_tokens"]
            raise ValueError(f"item {number}: text of {count} tokens, over {limit}: shorten it")
        return self.tokenizer.encode(text + suffix).ids

    def _resize(self, image):
        """Return the pixels of an image, resized to whole blocks within the limits on pixels."""
        config = self.manifest["preprocessing"]
        ratio = config["max_aspect_ratio"]
        if max(image.size) > ratio * min(image.size):
            raise ValueError(f"image {image.size} is over {ratio} : 1, crop it")
        return np.asarray(image.resize(resized_size(image.size, config)))


def checked_manifest(folder):
    """Return what manifest.json holds, if all files that are read are those it was written for."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
        digest = manifest.pop("content_sha256")
        content = json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: export the model again") from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise ValueError(f"{path} was changed: export the model again")
    for name in ("decode.py", "embed.jax", "tokenizer.json", "weights.safetensors"):
        try:
            with open(folder / name, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise ValueError(f"{folder / name} cannot be read: {error.strerror}") from error
        if digest != manifest["sha256"][name]:
            raise ValueError(f"{folder / name} is damaged: copy it or export the model again")
    return manifest


def punctuated(instruction):
    """Return an instruction with a full stop, unless it ends with a sign of punctuation."""
    ends = unicodedata.category(instruction[-1]).startswith("P")
    return instruction if ends else instruction + "."


def query_text(instruction, text):
    """Return an instruction and a text as one text, each with a capital letter and a full stop."""
    return normalize_text(f"{normalize_text(instruction or '')}\n{(text or '').strip()}")


def normalize_text(text):
    """Return a text without quotes around it, with a capital letter and a full stop."""
    bare = text.replace("\r", "").strip().strip('"')
    if not bare:
        return ""
    return bare[0].upper() + bare[1:] + ("" if bare.endswith((".", "?", "!")) else ".")


def resized_size(size, config):
    """Return the width and height that an image is resized to: multiples of the block's side.

    The area stays within the limits on pixels, and the aspect ratio is kept as far as it goes.
    """
    side, low, high = config["block_side"], config["min_pixels"], config["max_pixels"]
    sides, area = np.array(size), size[0] * size[1]
    blocks = np.rint(sides / side)
    rounded_area = blocks.prod() * side**2
    if rounded_area > high:
        blocks = np.floor(sides / np.sqrt(area / high) / side)
    elif rounded_area < low:
        blocks = np.ceil(sides * np.sqrt(low / area) / side)
    return [side * max(1, int(count)) for count in blocks]
