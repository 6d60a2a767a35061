"""A folder that `sentence_transformers.SentenceTransformer` loads, from version 6.0.

It holds what `Embedder.save` writes, a chat template that words an item as `data.prompts` does, and
the description of three standard modules: Transformer, Pooling at the last token, Normalize. No
code travels along:

    model = SentenceTransformer(folder)
    model.encode("a red bicycle")
    model.encode({"image": "bicycle.png"})
    model.encode({"image": "bicycle.png", "text": "make it blue"}, prompt="Find the changed image.")

A `prompt` is the instruction: Sentence Transformers hands it to the template as a system message.
Loading takes torchvision, as transformers' processor of Qwen2-VL does: install
`sentence-transformers[image]`.

Vectors equal those of `Embedder.encode`, but for

- texts of more than `PromptConfig.max_text_tokens`: a template cannot count, they are read whole;
- texts that hold special tokens, such as "<|im_end|>", which are taken at their word. To make them
  plain text, though not always split as ours, takes transformers 5.23 and `encode(...,
  processing_kwargs={"chat_template": {"sanitize_control_tokens": True}})`;
- texts that begin with a quotation mark and a line's end, which is read with the line before;
- PIL images with transparent pixels, which transformers lays on white, and files with an EXIF
  orientation, which it turns.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from puma_jax.config import require
from puma_jax.data.prompts import WORDINGS
from puma_jax.embedder import Embedder
from puma_jax.files import write_json
from puma_jax.model.hf import read_json

_STATES = {"method": "forward", "method_output_name": "last_hidden_state"}
_TRANSFORMER = {
    "transformer_task": "feature-extraction",
    "modality_config": {
        "text": _STATES,
        "image": _STATES,
        "message": {**_STATES, "format": "structured"},
    },
    "module_output_name": "token_embeddings",
    # With flash attention, texts would stand in one row, which Qwen2-VL cannot read.
    "unpad_inputs": False,
    # Pillow shall resize, as it does for us: of torchvision's values, one in 200 differs by 1. The
    # new name of this option, `backend`, is refused by the processor of videos.
    "processor_kwargs": {"use_fast": False},
}

# `query_text` and `Prompter.item` in Jinja. What is encoded comes as a message, a prompt as a
# system message before it.
_TEMPLATE = r"""
{%- macro normalise(text) -%}
  {%- set bare = text.replace('\r', '').strip().strip('"') -%}
  {%- if bare -%}
    {{- bare[0].upper() + bare[1:] -}}
    {{- '' if bare.endswith(('.', '?', '!')) else '.' -}}
  {%- endif -%}
{%- endmacro -%}
{%- set item = namespace(instruction='', text='', texts=0, images=0) -%}
{%- for message in messages -%}
  {%- set content = message['content'] -%}
  {%- for part in ([{'type': 'text', 'text': content}] if content is string else content) -%}
    {%- if part['type'] == 'image' -%}
      {%- set item.images = item.images + 1 -%}
    {%- elif message['role'] == 'system' -%}
      {%- set item.instruction = part['text'] -%}
    {%- else -%}
      {%- set item.text = part['text'] or '' -%}
      {%- set item.texts = item.texts + 1 -%}
    {%- endif -%}
  {%- endfor -%}
{%- endfor -%}
{%- if item.texts > 1 or item.images > 1 -%}
  {{- raise_exception('an item is one text, one image, or one of both') -}}
{%- endif -%}
{%- set text = normalise(normalise(item.instruction) + '\n' + item.text.strip()) -%}
{%- if not text and not item.images -%}
  {{- raise_exception('an item has neither text nor image') -}}
{%- endif -%}
{{- start -}}
{%- if item.images -%}
  {{- image -}}
{%- endif -%}
{%- if text -%}
  {{- text + text_end + (ask_both if item.images else ask_text) -}}
{%- else -%}
  {{- ask_image -}}
{%- endif -%}
{{- end -}}
"""


def write(embedder: Embedder, folder: Path) -> None:
    """Write a model for Sentence Transformers, which `Embedder.load` opens as well.

    Args:
        embedder: The model.
        folder: Exists and is empty.

    Raises:
        ConfigError: The model was trained with positions that transformers does not compute.
        CheckpointError: The folder cannot be written.
    """
    positions = embedder.config.prompt.positions
    require(
        positions == "mrope",
        f'prompt.positions is "{positions}", but Sentence Transformers computes "mrope" only: '
        "encode with puma_jax.Embedder, or train with mrope",
    )
    embedder.save(folder, headless=True)
    _finish_tokenizer(folder / "tokenizer_config.json", embedder.config.prompt.ret_token)
    (folder / "chat_template.jinja").write_text(chat_template(embedder), "utf-8")
    _write_modules(folder, embedder.width)


def chat_template(embedder: Embedder) -> str:
    """Return the Jinja template that words items as this model was trained to read them."""
    config = embedder.config
    wording = WORDINGS[config.prompt.template]
    image = [config.vision_start_token_id, config.image_token_id, config.vision_end_token_id]
    words = {
        "start": wording.start,
        "image": "".join(embedder.tokenizer.convert_ids_to_tokens(image)),
        "text_end": wording.text_end,
        "ask_text": wording.ask[False, True],
        "ask_image": wording.ask[True, False],
        "ask_both": wording.ask[True, True],
        "end": wording.turn + config.prompt.ret_token,
    }
    # A string in JSON is one in Jinja.
    literals = {name: json.dumps(value, ensure_ascii=False) for name, value in words.items()}
    lines = [f"{{%- set {name} = {literal} -%}}" for name, literal in literals.items()]
    return "\n".join(lines) + _TEMPLATE


def _finish_tokenizer(path: Path, ret_token: str) -> None:
    """Give a tokenizer what batches ask for, and leave the folder one template only."""
    config = read_json(path)
    config.pop("chat_template", None)
    # Padding is never read, so any token will do.
    config["pad_token"] = config.get("pad_token") or ret_token
    write_json(path, config)


def _write_modules(folder: Path, width: int) -> None:
    """Write which modules an item goes through, and the config of each."""
    pooling = {"embedding_dimension": width, "pooling_mode": "lasttoken", "include_prompt": True}
    modules: list[tuple[str, str, str, dict[str, Any]]] = [
        ("base.modules.transformer.Transformer", "", "sentence_bert_config.json", _TRANSFORMER),
        ("sentence_transformer.modules.pooling.Pooling", "1_Pooling", "config.json", pooling),
        ("base.modules.normalize.Normalize", "2_Normalize", "config.json", {}),
    ]
    listed = []
    for number, (kind, path, name, config) in enumerate(modules):
        (folder / path).mkdir(exist_ok=True)
        write_json(folder / path / name, config)
        kind = f"sentence_transformers.{kind}"
        listed.append({"idx": number, "name": str(number), "path": path, "type": kind})
    (folder / "modules.json").write_text(json.dumps(listed, indent=2) + "\n", "utf-8")
    write_json(
        folder / "config_sentence_transformers.json",
        {
            "model_type": "SentenceTransformer",
            # The instructions of `encode_query` and `encode_document`, where none is given.
            "prompts": {"query": "", "document": ""},
            "similarity_fn_name": "cosine",
        },
    )
