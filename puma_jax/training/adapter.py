"""The adapters that a stage trained, as a folder that PEFT loads on the transformers model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from puma_jax.artifacts import write_json, write_text
from puma_jax.config import ModelConfig
from puma_jax.files import save_tensors
from puma_jax.model import peft
from puma_jax.model.families import family_of
from puma_jax.model.hub_config import saved_fields
from puma_jax.training.config import StageConfig


def write_adapter(
    folder: Path,
    config: ModelConfig,
    leaves: Mapping[str, Any],
    stage: StageConfig,
    base: str,
) -> None:
    """Write a PEFT folder, for the class of transformers that has a language-model head.

    Args:
        folder: Folder to write; it must not exist.
        config: Config of the adapted model.
        leaves: The stacked leaves A and B by name, see `tree.named_leaves`.
        stage: Config of the stage that trained them.
        base: Folder or hub id of the model that the stage started from.
    """
    family = family_of(config.family)
    modules: set[str] = set()
    tensors = {}
    for name, leaf in leaves.items():
        path, _, side = name.rpartition(".")
        # PEFT names modules, which are those of the class without a head, in its "model".
        key = "model." + family.backbone_key(family.weights[f"{path}.kernel"])
        module = key.removesuffix(".weight")
        modules.add(module)
        for layer, matrix in enumerate(np.asarray(leaf)):
            tensor = f"base_model.model.{module.format(layer)}.lora_{side[-1].upper()}.weight"
            tensors[tensor] = np.ascontiguousarray(matrix.T)
    folder.mkdir()
    save_tensors(tensors, folder / peft.WEIGHTS, {"format": "pt"})
    # A list of names such as gate_proj would name linears of some towers as well.
    pattern = "|".join(r"\d+".join(map(re.escape, name.split("{}"))) for name in sorted(modules))
    lora = stage.lora
    described = {
        "peft_type": "LORA",
        "task_type": None,
        # On the whole of a pruned model, the adapter would be in the wrong layers.
        "base_model_name_or_path": None if stage.keep_layers else base,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": pattern,
        "bias": "none",
        "inference_mode": True,
    }
    write_json(folder / peft.CONFIG, described)
    causal = config.decoder.causal
    write_json(folder / peft.MODEL, saved_fields(config) | {"causal": causal})
    pooled = config.images.spatial_pool_stride > 1
    readme = _readme(base, stage.keep_layers, causal=causal, pooled=pooled)
    write_text(folder / "README.md", readme)


def _readme(base: str, keep_layers: str, *, causal: bool, pooled: bool) -> str:
    """Return a page that says what the adapter is of, and how it is loaded."""
    model = "pruned" if keep_layers else base
    prune = f"""
It belongs on layers {keep_layers} of that model, counted as by:

```sh
python -m puma_jax.prune --model {base} --keep-layers {keep_layers} --out pruned
```
"""
    texts_only = """
The model pools visual tokens, which transformers does not do: there, only texts have the vectors
that they have in puma_jax.
"""
    both_ways = "base.config.get_text_config().is_causal = False  # as it was trained\n"
    return f"""# Adapter

An adapter (LoRA) in the format of PEFT that puma_jax trained on {base}.
{prune if keep_layers else ""}
```python
from puma_jax import Embedder

model = Embedder.load("{model}", adapter=".")
```

In transformers, PEFT puts it on the class with a language-model head:

```python
from peft import PeftModel
from transformers import AutoModelForImageTextToText

base = AutoModelForImageTextToText.from_pretrained("{model}")
{"" if causal else both_ways}model = PeftModel.from_pretrained(base, ".")
```
{texts_only if pooled else ""}"""
