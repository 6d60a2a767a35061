"""Vectors of golden items from software other than puma_jax: what `verify` compares.

Each function returns one vector per item, in their order. torch and Sentence Transformers are
imported where they are used; a service is asked over HTTP, a StableHLO folder by its own loader.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from puma_jax.artifacts import write_json
from puma_jax.data.images import open_image
from puma_jax.data.prompts import query_text
from puma_jax.data.raw_items import images_of
from puma_jax.data.templates import PROMPT_TEMPLATES
from puma_jax.embedder import Embedder, RawItem
from puma_jax.errors import EvaluationError
from puma_jax.export.golden import GoldenItem, by_instruction
from puma_jax.files import read_json
from puma_jax.model.families import CONFIG_KEY
from puma_jax.typing import Float, ndarray

_SECONDS = 600
_REQUESTS_AT_ONCE = 8
_LONGEST_REASON = 500
# Runs with nothing of puma_jax but the folder.
_RUN_LOADER = """
import json, pathlib, sys
import numpy as np
folder, work = map(pathlib.Path, sys.argv[1:])
sys.path.insert(0, str(folder))
from load import Embedder
embedder = Embedder(folder)
for number, (instruction, items) in enumerate(json.loads((work / "items.json").read_text())["of"]):
    np.save(work / f"{number}.npy", embedder.encode(items, instruction))
"""


def stablehlo(folder: Path, items: Sequence[GoldenItem]) -> Float[ndarray, "n width"]:
    """Return the vectors of a StableHLO folder by its own loader, in a process of its own, on CPU.

    Raises:
        EvaluationError: The loader fails; the message is its last line.
    """
    groups = list(by_instruction(items))
    with tempfile.TemporaryDirectory() as work:
        given = []
        for instruction, numbers in groups:
            own = []
            for number in numbers:
                item = {name: items[number].raw.get(name) for name in ("text", "image")}
                if item["image"] is not None:
                    path = Path(work, f"image-{number}")
                    path.write_bytes(item["image"])
                    item["image"] = str(path)
                own.append(item)
            given.append((instruction, own))
        write_json(Path(work, "items.json"), {"of": given})
        done = subprocess.run(
            [sys.executable, "-P", "-c", _RUN_LOADER, str(folder.absolute()), work],
            capture_output=True,
            text=True,
            cwd=work,
            # An accelerator may be held by this process.
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )
        if done.returncode:
            raise EvaluationError((done.stderr.strip() or "the loader ended").splitlines()[-1])
        parts = [np.load(Path(work, f"{number}.npy")) for number in range(len(groups))]
    return _in_order(parts, groups)


def sentence_transformers(folder: Path, items: Sequence[GoldenItem]) -> Float[ndarray, "n width"]:
    """Return the vectors of Sentence Transformers on CPU, computed in float32.

    Images are given upright and in RGB, as the model card of an export asks for.
    """
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": "float32"})
    groups = list(by_instruction(items))
    parts = []
    for instruction, numbers in groups:
        own = [_for_torch(items[number].raw) for number in numbers]
        found = model.encode(own, prompt=instruction, batch_size=4, show_progress_bar=False)
        parts.append(np.asarray(found, np.float32))
    return _in_order(parts, groups)


def _for_torch(raw: RawItem) -> dict[str, Any]:
    """Return text and images of an item, the images as PIL reads them here."""
    item = {"text": raw["text"]} if "text" in raw else {}
    images = [open_image(image) for image in images_of(raw)]
    if images:
        item["image"] = images[0] if len(images) == 1 else images
    return item


def _in_order(
    parts: Sequence[Float[ndarray, "_ width"]], groups: Sequence[tuple[str | None, list[int]]]
) -> Float[ndarray, "n width"]:
    """Return the vectors of groups of items in the order of the items."""
    order = [number for _, numbers in groups for number in numbers]
    return np.concatenate(parts)[np.argsort(order)]


def transformers(
    folder: Path, embedder: Embedder, items: Sequence[GoldenItem]
) -> Float[ndarray, "n width"]:
    """Return the vectors of transformers' model and processor on CPU, in float32, item by item.

    The prompt is written here as strings and tokenized by transformers; what is pooled is told by
    the config of the embedder.

    Args:
        folder: Hugging Face folder.
        embedder: The same model in puma_jax.
        items: Items to encode.
    """
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = _Prompt(folder, embedder)
    vectors = []
    for item in items:
        inputs = prompt.inputs(item.raw)
        with torch.no_grad():
            states = model(**inputs, use_cache=False).last_hidden_state[0]
        mean = embedder.config.prompt.pooling == "mean"
        state = states.mean(0) if mean else states[-1]
        vectors.append(torch.nn.functional.normalize(state, dim=0).numpy())
    return np.stack(vectors)


class _Prompt:
    """Items as inputs of transformers' models."""

    def __init__(self, folder: Path, embedder: Embedder):
        from transformers import AutoImageProcessor, AutoTokenizer, Qwen2VLImageProcessorPil

        self.config = config = embedder.config
        self.strings = PROMPT_TEMPLATES[config.prompt.template]
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        ret = config.prompt.ret_token if config.prompt.pooling == "ret" else None
        self.end = [] if ret is None else [embedder.tokenizer.get_vocab()[ret]]
        vision, limits = config.vision, config.images
        if not vision.layers:
            return
        if CONFIG_KEY in read_json(folder / "config.json"):
            self.read_image = AutoImageProcessor.from_pretrained(folder, backend="pil")
        else:  # a base model has the limits of its own chats, not those of the embedder
            self.read_image = Qwen2VLImageProcessorPil(
                size={"shortest_edge": limits.min_pixels, "longest_edge": limits.max_pixels},
                patch_size=vision.patch_size,
                merge_size=vision.merge_size,
                temporal_patch_size=vision.temporal_patch_size,
                image_mean=list(vision.image_mean),
                image_std=list(vision.image_std),
            )

    def inputs(self, raw: RawItem) -> dict[str, Any]:
        """Return the token ids of an item, and the pixels of its images."""
        import torch

        config, inputs = self.config, {}
        image: list[int] = []
        if images := [open_image(image) for image in images_of(raw)]:
            inputs = dict(self.read_image(images, return_tensors="pt"))
            for grid in inputs["image_grid_thw"]:
                pads = [config.image_token_id] * (int(grid.prod()) // config.vision.merged)
                image += [config.vision_start_token_id, *pads, config.vision_end_token_id]
        own_turn = bool(self.strings.after_instruction)
        tokens = self._instructed(raw, image) if own_turn else self._worded(raw, image)
        ids = torch.tensor([tokens])
        if config.vision.layers:
            inputs["mm_token_type_ids"] = (ids == config.image_token_id).long()
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **inputs}

    def _worded(self, raw: RawItem, image: list[int]) -> list[int]:
        """Return the tokens of PUMA's prompts, whose instruction is part of the text."""
        strings = self.strings
        text = query_text(raw.get("instruction"), raw.get("text"))
        suffix = strings.suffix[bool(image), bool(text)]
        text += strings.text_end if text else ""
        limit, plain = self.config.prompt.max_text_tokens, self._plain(text)
        if len(plain) > limit:
            body = plain[:limit] + self._plain(suffix)
        else:
            body = self._plain(text + suffix)
        end = self._tokens(strings.generation_prompt) + self.end
        return [*self._tokens(strings.start), *image, *body, *end]

    def _instructed(self, raw: RawItem, image: list[int]) -> list[int]:
        """Return the tokens of a prompt in which an instruction has a turn of its own."""
        strings = self.strings
        text = raw.get("text") or ("" if image else strings.no_text)
        # A tokenizer may add tokens of its own around every text.
        alone = self.tokenizer("a", add_special_tokens=False)["input_ids"][0]
        whole = self.tokenizer("a")["input_ids"]
        at = whole.index(alone)
        before, after = whole[:at], whole[at + 1 :]
        head = [*before, *self._tokens(strings.start)]
        head += self._plain(raw.get("instruction") or strings.instruction)
        head += self._tokens(strings.after_instruction)
        start = "" if image else strings.text_start
        lead = self._tokens(strings.text_start) if image else []
        body = self._plain(start + text)[: self.config.prompt.max_text_tokens]
        tail = [*self._tokens(strings.generation_prompt), *after, *self.end]
        return [*head, *lead, *image, *body, *tail]

    def _tokens(self, text: str) -> list[int]:
        """Return the tokens of a part of the prompt, special tokens among them."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def _plain(self, text: str) -> list[int]:
        """Return the tokens of a text, in which special tokens are plain text."""
        if not text:
            return []
        told = {"add_special_tokens": False, "split_special_tokens": True}
        return self.tokenizer(text, **told)["input_ids"]


def service(
    url: str, items: Sequence[GoldenItem], api_key: str | None = None
) -> Float[ndarray, "n width"]:
    """Return the vectors of a running service, several requests at once.

    Items without an instruction go to /v2/embed, which truncates long texts, the others to
    /v1/embeddings.

    Args:
        url: Address of the service, such as http://127.0.0.1:8000.
        items: Items to encode.
        api_key: Key that is sent as "Authorization: Bearer KEY".

    Raises:
        EvaluationError: The service cannot be reached, or does not answer with a vector.
    """
    base = url.rstrip("/")

    def vector(item: GoldenItem) -> list[float]:
        instruction, content = item.raw.get("instruction"), _parts(item.raw)
        if instruction is None:
            body = {"input_type": "clustering", "truncate": "END", "inputs": [{"content": content}]}
            return _post(f"{base}/v2/embed", body, api_key)["embeddings"]["float"][0]
        messages = [
            {"role": "system", "content": instruction},
            {"role": "user", "content": content},
        ]
        answer = _post(f"{base}/v1/embeddings", {"messages": messages}, api_key)
        return answer["data"][0]["embedding"]

    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        try:
            return np.array(list(pool.map(vector, items)), np.float32)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise EvaluationError(f"{url} answers without vectors: {error!r}") from None


def _parts(raw: RawItem) -> list[dict[str, Any]]:
    """Return an item as the parts of a message."""
    parts: list[dict[str, Any]] = []
    for image in images_of(raw):
        kind = "png" if image.startswith(b"\x89PNG") else "tiff"
        url = f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    if "text" in raw:
        parts.append({"type": "text", "text": raw["text"]})
    return parts


def _post(url: str, body: Mapping[str, Any], api_key: str | None) -> Any:
    headers = {"Content-Type": "application/json"}
    if api_key is not None:
        headers["Authorization"] = f"Bearer {api_key}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        reason = error.read(_LONGEST_REASON).decode(errors="replace").strip()
        raise EvaluationError(f"{url} answers {error.code}: {reason}") from None
    except OSError as error:
        raise EvaluationError(f"{url} cannot be reached: {error}") from None
