"""A folder that `sentence_transformers.SentenceTransformer` loads, from version 6.0.

It holds the files of `Embedder.save`, a chat template that writes the prompt of `data.prompts`, and
the configs of three standard modules: Transformer, Pooling (the last token or the mean), Normalize.
It holds no code:

    model = SentenceTransformer(folder)
    model.encode("a red bicycle")
    model.encode({"image": "bicycle.png"})
    model.encode({"image": "bicycle.png", "text": "make it blue"}, prompt="Find the changed image.")
    model.encode({"image": ["front.png", "back.png"]})

A `prompt` is the instruction: Sentence Transformers passes it to the template as a system message.
Loading needs torchvision, because transformers' processor of Qwen2-VL does: install
`sentence-transformers[image]`.

Vectors equal those of `Embedder.encode`, except for

- texts of more than `PromptConfig.max_text_tokens`: a template cannot count tokens, so that they
  are read whole;
- texts that contain special tokens, such as "<|im_end|>", which are read as special tokens. From
  transformers 5.23 on, `encode(..., processing_kwargs={"chat_template":
  {"sanitize_control_tokens": True}})` reads them as plain text, though not always tokenized as
  here;
- with PUMA's prompts, texts that begin with a quotation mark and a line break, which is read with
  the line before;
- images given as paths that have an alpha channel, which transformers drops, and images given as
  PIL images that have an EXIF orientation, which it does not apply. A PIL image that
  `ImageOps.exif_transpose(Image.open(path))` returns is read as here;
- gray images of 16 bits, which transformers turns white, and PNG files in gray of 2 or 4 bits, or
  in RGB of 16 bits, with a transparent color, which it takes for one of 8 bits.
"""

from __future__ import annotations

import json
import sys
import unicodedata
from pathlib import Path
from typing import Any

from puma_jax.artifacts import write_json, write_text
from puma_jax.config import require
from puma_jax.data.templates import PROMPT_TEMPLATES
from puma_jax.embedder import Embedder
from puma_jax.files import as_json, read_json
from puma_jax.model.composed import check_in_transformers

_STATES = {"method": "forward", "method_output_name": "last_hidden_state"}
_TRANSFORMER = {
    "transformer_task": "feature-extraction",
    "modality_config": {
        "text": _STATES,
        "image": _STATES,
        "message": {**_STATES, "format": "structured"},
    },
    "module_output_name": "token_embeddings",
    # With flash attention, texts would be packed into one row, which Qwen2-VL cannot read.
    "unpad_inputs": False,
    # Pillow resizes, as in `data.images`: one in 200 of torchvision's values differs by 1. The
    # processor of videos refuses `backend`, the new name of this option.
    "processor_kwargs": {"use_fast": False},
}

# `Processor.item` in Jinja. An item comes as a message, its prompt as a system message before it.
_ITEM = r"""
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
{%- if item.texts > 1 -%}
  {{- raise_exception('an item is one text, images, or both') -}}
{%- endif -%}
"""
# `query_text`, and the prompts whose instruction is part of the text.
_WORDED = r"""
{%- macro normalize_text(text) -%}
  {%- set bare = text.replace('\r', '').strip().strip('"') -%}
  {%- if bare -%}
    {{- bare[0].upper() + bare[1:] -}}
    {{- '' if bare.endswith(('.', '?', '!')) else '.' -}}
  {%- endif -%}
{%- endmacro -%}
{%- set text = normalize_text(normalize_text(item.instruction) + '\n' + item.text.strip()) -%}
{%- if not text and not item.images -%}
  {{- raise_exception('an item has neither text nor image') -}}
{%- endif -%}
{{- start + image * item.images -}}
{%- if text -%}
  {{- text + text_end + (suffix_both if item.images else suffix_text) -}}
{%- else -%}
  {{- suffix_image -}}
{%- endif -%}
{{- end -}}
"""
# The prompt in which an instruction has a turn of its own.
_INSTRUCTED = r"""
{%- set asked = item.instruction.strip() or instruction -%}
{{- start + asked + ('' if asked[-1] in punctuation else '.') + after_instruction + text_start -}}
{{- image * item.images + (item.text or ('' if item.images else no_text)) + end -}}
"""


def write(embedder: Embedder, folder: Path) -> None:
    """Write a model for Sentence Transformers; `Embedder.load` opens the folder, too.

    Args:
        embedder: Model to export.
        folder: Folder to write, which exists and is empty.

    Raises:
        ConfigError: The model was trained with positions that transformers does not compute, it
            pools visual tokens, or it reads texts only.
        CheckpointError: The folder cannot be written.
    """
    prompt = embedder.config.prompt
    check_in_transformers(embedder.config, "Sentence Transformers")
    require(
        embedder.config.vision.layers > 0,
        "a model of texts only is not supported for Sentence Transformers: export as huggingface",
    )
    positions = prompt.positions
    require(
        positions == "mrope",
        f'prompt.positions is "{positions}", but Sentence Transformers computes "mrope" only: '
        "encode with puma_jax.Embedder, or train with mrope",
    )
    stride = embedder.config.images.spatial_pool_stride
    require(
        stride == 1,
        f"images.spatial_pool_stride is {stride}, but Sentence Transformers does not pool visual "
        "tokens: encode with puma_jax.Embedder, or export as stablehlo",
    )
    embedder.save(folder, backbone=True)
    _finish_tokenizer(folder / "tokenizer_config.json", embedder)
    (folder / "chat_template.jinja").write_text(chat_template(embedder), "utf-8")
    mode = "mean" if prompt.pooling == "mean" else "lasttoken"
    _write_modules(folder, embedder.embedding_dim, mode)


def chat_template(embedder: Embedder) -> str:
    """Return the Jinja template of the prompt that this model was trained with."""
    config = embedder.config
    prompt = PROMPT_TEMPLATES[config.prompt.template]
    image = [config.vision_start_token_id, config.image_token_id, config.vision_end_token_id]
    words = {
        "start": prompt.start,
        "image": "".join(embedder.tokenizer.convert_ids_to_tokens(image)),
        "end": prompt.generation_prompt + _ret_token(embedder),
    }
    if prompt.after_instruction:
        words |= {
            "instruction": prompt.instruction,
            "after_instruction": prompt.after_instruction,
            "text_start": prompt.text_start,
            "no_text": prompt.no_text,
            "punctuation": _punctuation(),
        }
    else:
        words |= {
            "text_end": prompt.text_end,
            "suffix_text": prompt.suffix[False, True],
            "suffix_image": prompt.suffix[True, False],
            "suffix_both": prompt.suffix[True, True],
        }
    # A string in JSON is one in Jinja.
    literals = {name: json.dumps(value, ensure_ascii=False) for name, value in words.items()}
    lines = [f"{{%- set {name} = {literal} -%}}" for name, literal in literals.items()]
    return "\n".join(lines) + _ITEM + (_INSTRUCTED if prompt.after_instruction else _WORDED)


def _punctuation() -> str:
    """Return all signs of punctuation in Unicode, which Jinja cannot tell from letters."""
    signs = (chr(number) for number in range(sys.maxunicode + 1))
    return "".join(sign for sign in signs if unicodedata.category(sign).startswith("P"))


def _ret_token(embedder: Embedder) -> str:
    """Return the token that ends every item, empty for a model that has none."""
    prompt = embedder.config.prompt
    return prompt.ret_token if prompt.pooling == "ret" else ""


def _finish_tokenizer(path: Path, embedder: Embedder) -> None:
    """Add a padding token to a tokenizer config, and remove its own chat template."""
    config = read_json(path)
    config.pop("chat_template", None)
    # Padding is never read, so that any token will do.
    tokenizer = embedder.tokenizer
    any_token = _ret_token(embedder) or tokenizer.convert_ids_to_tokens(0)
    config["pad_token"] = config.get("pad_token") or any_token
    write_json(path, config)


def _write_modules(folder: Path, width: int, mode: str) -> None:
    """Write the list of modules, and the config of each, that of pooling with this mode."""
    pooling = {"embedding_dimension": width, "pooling_mode": mode, "include_prompt": True}
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
    write_text(folder / "modules.json", as_json(listed))
    write_json(
        folder / "config_sentence_transformers.json",
        {
            "model_type": "SentenceTransformer",
            # Default instructions of `encode_query` and `encode_document`.
            "prompts": {"query": "", "document": ""},
            "similarity_fn_name": "cosine",
        },
    )
