"""A stage that is ready to run, without a run around it."""

from pathlib import Path

import jax

from puma_jax.data.prompts import Processor
from puma_jax.data.tokenizer import load_tokenizer
from puma_jax.model.hf import open_checkpoint
from puma_jax.training.config import TrainConfig
from puma_jax.training.stages import Stage, build_stage, open_data, open_store, with_inputs


def ready_stage(name: str, config: TrainConfig, workdir: Path, mesh: jax.sharding.Mesh) -> Stage:
    """Return a stage that starts from the model it names."""
    stage = config.stages[name]
    checkpoint = open_checkpoint(stage.model)
    model = with_inputs(checkpoint.config, config)
    processor = Processor(load_tokenizer(checkpoint.folder), model)
    store = open_store(config, stage.data_root or config.data.root, processor, workdir)
    data = open_data(name, config, processor, store, mesh)
    return build_stage(name, config, checkpoint, data, {}, workdir, mesh)
