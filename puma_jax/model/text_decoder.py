"""Families of models that read texts only: a decoder without a vision tower."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from puma_jax.config import ModelConfig, VisionConfig
from puma_jax.model.families import CONFIG_KEY, Family
from puma_jax.model.hub_config import (
    OUTDATED_TEXT,
    decoder_fields,
    decoder_weights,
    read_decoder,
    read_fields,
    renamed,
    saved_fields,
)


def text_family(
    model_type: str,
    name: str,
    *,
    head_dim: int | None = None,
    qkv_bias: bool = False,
    qk_norm: bool = False,
) -> Family:
    """Return the family of a text decoder.

    Args:
        model_type: Its name in config.json.
        name: Its name in the classes of transformers, such as "Qwen2".
        head_dim: What transformers takes where `head_dim` is missing; None divides the width.
        qkv_bias: As in `DecoderConfig`.
        qk_norm: As in `DecoderConfig`.
    """

    def read_config(hf: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> ModelConfig:
        """Return the config that a config.json describes."""
        fields = read_fields(hf, preprocessor)
        decoder = read_decoder(
            fields.text,
            mrope=False,
            norm_eps=1e-6,
            rope_base=1e4,
            head_dim=head_dim,
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
        )
        return fields.model_config(model_type, VisionConfig.none(decoder.width), decoder)

    def write_config(config: ModelConfig, source: Mapping[str, Any]) -> dict[str, Any]:
        """Return the config.json of `config`, see `hub_config.written`."""
        hf = copy.deepcopy(dict(source))
        for outdated in (*OUTDATED_TEXT, "torch_dtype"):
            hf.pop(outdated, None)
        return {
            **hf,
            **decoder_fields(config.decoder, mrope=False),
            "head_dim": config.decoder.head_dim,
            "model_type": model_type,
            "architectures": [f"{name}ForCausalLM"],
            "tie_word_embeddings": True,
            CONFIG_KEY: saved_fields(config),
        }

    return Family(
        tower=None,
        read_config=read_config,
        write_config=write_config,
        write_preprocessor=lambda config, source: {},
        weights=decoder_weights("model."),
        disk_shapes=lambda config: {},
        # A saved model without a head names them without "model.".
        hf_key=renamed({part: f"model.{part}" for part in ("layers.", "embed_tokens.", "norm.")}),
        backbone_key=renamed({"model.": ""}),
        backbone_architecture=f"{name}Model",
        ignored=("lm_head.weight",),
        published={},
    )
