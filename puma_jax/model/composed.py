"""Families made of the decoder of one and the tower of another, such as "llama+qwen2_vl".

Nothing but this package loads such a model. Its config.json holds that of the decoder as
`text_config` and the `vision_config` of the tower, each as its own family writes it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from puma_jax.config import ModelConfig, VisionConfig, require
from puma_jax.errors import UnknownModelError
from puma_jax.model.families import CONFIG_KEY, Family, family_of
from puma_jax.model.hub_config import decoder_fields, or_default, read_fields, saved_fields
from puma_jax.schema import shown

SEPARATOR = "+"
_IDS = ("image_token_id", "vision_start_token_id", "vision_end_token_id")


def composed_family(name: str) -> Family:
    """Return the family of a decoder and a tower, whose names are joined by a plus sign.

    Raises:
        UnknownModelError: The first is no family of decoders without a tower, or the second has no
            tower.
    """
    decoder_name, _, tower_name = name.partition(SEPARATOR)
    decoder, tower = family_of(decoder_name), family_of(tower_name)
    if decoder.tower is not None or tower.tower is None:
        raise UnknownModelError(
            f"model_type {shown(name)} is not a family of texts only and one with a vision tower"
        )

    def read_config(hf: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> ModelConfig:
        """Return the config that a config.json describes, read as each family reads its part."""
        fields = read_fields(hf, preprocessor).model
        text = decoder.read_config(fields.text_config or {}, {}).decoder
        # The tower's family reads the whole of a model, of which the tower alone is used.
        around = decoder_fields(text, mrope=True) | {"head_dim": text.head_dim}
        whole = {"text_config": around, "vision_config": fields.vision_config}
        ids = {key: getattr(fields, key) for key in _IDS}
        model = tower.read_config({**whole, **ids, CONFIG_KEY: hf.get(CONFIG_KEY)}, preprocessor)
        return dataclasses.replace(model, family=name, decoder=text)

    def write_config(config: ModelConfig, source: Mapping[str, Any]) -> dict[str, Any]:
        """Return the config.json of `config`, written as each family writes its part."""
        of_decoder = dataclasses.replace(
            config,
            family=decoder_name,
            vision=VisionConfig.none(config.decoder.width),
            kept_layers=(),
        )
        text = decoder.write_config(of_decoder, or_default(source.get("text_config"), {}))
        del text[CONFIG_KEY]
        of_tower = tower.write_config(config, {"vision_config": source.get("vision_config")})
        return {
            **source,
            "model_type": name,
            "text_config": text,
            "vision_config": of_tower["vision_config"],
            **{key: getattr(config, key) for key in _IDS},
            CONFIG_KEY: saved_fields(config),
        }

    def part(weights: Mapping[str, str], prefix: str) -> dict[str, str]:
        return {name: key for name, key in weights.items() if name.startswith(prefix)}

    return Family(
        tower=tower.tower,
        read_config=read_config,
        write_config=write_config,
        write_preprocessor=tower.write_preprocessor,
        weights=part(decoder.weights, "decoder.") | part(tower.weights, "vision."),
        disk_shapes=tower.disk_shapes,
        hf_key=lambda key: key,
        backbone_key=lambda key: key,
        backbone_architecture=None,
        ignored=(),
        published={},
    )


def check_in_transformers(config: ModelConfig, what: str) -> None:
    """Check that transformers has the family of a model.

    Args:
        config: The model.
        what: What needs it, for the message.

    Raises:
        ConfigError: The model is composed.
    """
    require(
        family_of(config.family).backbone_architecture is not None,
        f"{what} needs a family of transformers, and {config.family} is composed of two: export as "
        "stablehlo",
    )
