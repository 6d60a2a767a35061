"""Checks of a whole run before its first step: a mistake in the last stage is told at the start."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import jax
from jax.sharding import Mesh

from puma_jax.artifacts import check_output
from puma_jax.config import ModelConfig
from puma_jax.data.builder.sources import pool_files, query_files
from puma_jax.data.mbeir import discover
from puma_jax.data.store import Store
from puma_jax.data.vocabulary import SMALLEST
from puma_jax.errors import ArtifactError, ConfigError, LayerSelectionError
from puma_jax.model import encoder, hf
from puma_jax.model.peft import open_adapted
from puma_jax.parallel import rules
from puma_jax.training.config import TrainConfig
from puma_jax.training.scratch import model_config
from puma_jax.training.stages import kept_layers, with_inputs
from puma_jax.training.workdir import CONFIG_FILE

_MAX_SCRATCH_PARAMETERS = 2**32
"""A larger model from scratch is refused before it takes memory."""


def check_run(config: TrainConfig, workdir: Path, mesh: Mesh, reuse: Path | None = None) -> None:
    """Check all that can be checked before the first step. Nothing is written.

    Args:
        config: Config of the run.
        workdir: Folder of the run.
        mesh: Devices to train on.
        reuse: Workdir of another run whose finished stages may be reused.

    Raises:
        ArtifactError: The workdir cannot be written, or holds something else.
        ConfigError: Settings that do not fit together, the data, the models or the mesh.
        DataError: A benchmark is not a folder in M-BEIR layout, or has nothing to train on.
        CheckpointError: A stage starts from a folder that holds no whole model.
        LayerSelectionError: A stage keeps layers that its base model lacks.
    """
    if not (workdir / CONFIG_FILE).exists():
        check_output(workdir)
    if reuse is not None and not (reuse / CONFIG_FILE).is_file():
        raise ArtifactError(f"--reuse {reuse} is not the workdir of a run: no {CONFIG_FILE}")
    if config.log.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise ConfigError("log.wandb needs Weights & Biases: pip install wandb")
    _check_data(config)
    for name, base in base_configs(config, workdir).items():
        try:
            rules.shardings(encoder.abstract(base), mesh, base)
        except ConfigError as error:
            raise ConfigError(f"stage {name}: {error}") from None


def base_configs(config: TrainConfig, workdir: Path) -> dict[str, ModelConfig]:
    """Return the config of the model that each stage starts from, before its layers are pruned.

    No weights are read.

    Raises:
        CheckpointError: A stage starts from, or has finished with, a folder that holds no whole
            model.
        ConfigError: The sizes of the model from scratch do not fit together, or a stage trains
            widths or depths that its model does not have, or cannot train its adapter further.
        LayerSelectionError: A stage keeps layers that its base model lacks.
    """
    scratch = None if config.scratch is None else _scratch(config)
    made: dict[str | None, ModelConfig | None] = {None: scratch}
    found = {}
    for name, stage in config.stages.items():
        model = made[config.stage_before(name)]
        if stage.model is not None:
            checkpoint, adapter = open_adapted(stage.model, stage.adapter)
            model = checkpoint.config
            if adapter is not None and stage.trains_lora:
                adapter.lora_config(stage.lora.dropout)
        assert model is not None  # a TrainConfig has a model to start from
        model = with_inputs(model, config)
        found[name] = model
        try:
            kept = kept_layers(stage, model.decoder.layers)
        except LayerSelectionError as error:
            raise LayerSelectionError(f"stage {name}: {error}") from None
        if max(stage.loss.widths, default=0) >= model.decoder.width:
            raise ConfigError(
                f"stage {name}: loss.widths {list(stage.loss.widths)} must be below the "
                f"{model.decoder.width} values of a vector"
            )
        if max(stage.loss.exit_layers, default=0) >= len(kept):
            raise ConfigError(
                f"stage {name}: loss.exit_layers {list(stage.loss.exit_layers)} must be below the "
                f"{len(kept)} layers that it keeps"
            )
        if (workdir / name).exists():
            hf.open_checkpoint(workdir / name)
        made[name] = model.with_layers(tuple(model.kept_layers[index] for index in kept))
    return found


def _scratch(config: TrainConfig) -> ModelConfig:
    assert config.scratch is not None
    if config.scratch.vocab_size < SMALLEST:
        raise ConfigError(
            f"scratch.vocab_size {config.scratch.vocab_size} must be at least {SMALLEST}"
        )
    model = model_config(config.scratch, config.images, config.prompt)
    count = sum(leaf.size for leaf in jax.tree.leaves(encoder.abstract(model)))
    if count > _MAX_SCRATCH_PARAMETERS:
        raise ConfigError(
            f"scratch describes a model of {count:,} parameters, more than "
            f"{_MAX_SCRATCH_PARAMETERS:,}: make it smaller, or start from a model that is trained"
        )
    return model


def _check_data(config: TrainConfig) -> None:
    """Check that every stage has a benchmark to train on, and that what is evaluated exists."""
    data, evaluation = config.data, config.evaluation
    benchmark = discover(data.root)
    if data.built is not None:
        Store.open(data.built)
    roots = {stage.data_root or data.root for stage in config.stages.values() if stage.trains}
    if config.scratch is not None:
        roots.add(data.root)
    for root in sorted(roots):
        if data.built is None or root != data.root or config.scratch is not None:
            found = discover(root)
            query_files(found)
            pool_files(found)
    splits = dict.fromkeys(found.split for found in benchmark.sets)
    if evaluation.every_steps and evaluation.split not in splits:
        there = ", ".join(splits) or "none"
        raise ConfigError(
            f"evaluation.every_steps {evaluation.every_steps} evaluates queries of split "
            f"{evaluation.split}, and {data.root} has none (its splits: {there}): choose another "
            "with --evaluation.split, or turn it off with --evaluation.every-steps 0"
        )
