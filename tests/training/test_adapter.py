"""A stage goes on with an adapter of PEFT, and leaves one that peft loads."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import peft
import pytest
from safetensors.numpy import load_file
from transformers import Qwen2VLForConditionalGeneration

from puma_jax import Embedder
from puma_jax.errors import CheckpointError, ConfigError
from puma_jax.train import load_config
from puma_jax.training import results
from puma_jax.training.config import DistillConfig, StageConfig
from puma_jax.training.run import run
from tests.data.fake_mbeir import write_union
from tests.model.test_peft import QV, adapted, states
from tests.reference import random_image

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """An adapter of peft, and the run of a stage that trains it further on two of four layers."""
    folder = tmp_path_factory.mktemp("run")
    adapted(tiny.torch, folder / "in", target_modules=QV, use_rslora=True)
    root = write_union(folder / "mbeir")
    config = load_config(Path(__file__).with_name("tiny_run.py"))()
    stage = dataclasses.replace(
        config.stages["cut"],
        steps=2,
        model=str(tiny.folder),
        adapter=str(folder / "in"),
        keep_layers="2",
        grad_cache_chunks=1,
        distill=DistillConfig(),
        optimizer=dataclasses.replace(config.stages["cut"].optimizer, learning_rate=1e-3),
    )
    config = dataclasses.replace(
        config,
        scratch=None,
        stages={"cut": stage},
        data=dataclasses.replace(config.data, root=root),
        evaluation=dataclasses.replace(config.evaluation, every_steps=0),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "_MEASURED_ITEMS", 8)
        run(config, folder / "run")
    Embedder.load(tiny.folder, dtype=None).keep_layers(2).save(folder / "pruned")
    return folder


def test_training_begins_at_the_given_adapter(trained):
    before, after = (
        load_file(trained / name / "adapter_model.safetensors")
        for name in ("in", "run/cut/adapter")
    )
    assert set(after) == {name for name in before if "layers.0" in name or "layers.1" in name}
    for name, matrix in after.items():
        # Adam moves a weight by about the learning rate in each of the two steps.
        assert 1e-5 < np.abs(matrix - before[name]).max() < 3e-3


def test_peft_loads_the_adapter_that_a_stage_leaves(tiny, trained):
    embedder = Embedder.load(trained / "run/cut", dtype="float32")
    pair = dataclasses.replace(tiny, config=embedder.config)
    model = Qwen2VLForConditionalGeneration.from_pretrained(trained / "pruned", dtype="float32")
    model = peft.PeftModel.from_pretrained(model.eval(), trained / "run/cut/adapter")
    item = pair.item("Make it blue.", random_image(60, 90))
    expected = pair.expected(item, model.base_model.model.eval())
    np.testing.assert_allclose(
        states(pair, embedder.params, item), expected, rtol=0, atol=1e-5 * np.abs(expected).max()
    )


def test_an_adapter_and_its_base_are_the_model_of_the_stage(tiny, trained):
    model = Embedder.load(trained / "run/cut", dtype="float32")
    found = Embedder.load(trained / "pruned", dtype="float32", adapter=trained / "run/cut/adapter")
    assert found.config == model.config  # prompt and image limits included
    for leaf, expected in zip(*map(jax.tree.leaves, (found.params, model.params)), strict=True):
        np.testing.assert_allclose(leaf, expected, rtol=0, atol=1e-6)
    with pytest.raises(CheckpointError, match=r"layers 0,1 of its base .*prune --keep-layers 0,1$"):
        Embedder.load(tiny.folder, adapter=trained / "run/cut/adapter")


def test_an_adapter_is_not_trained_with_a_teacher_that_lacks_it():
    with pytest.raises(ConfigError, match="its teacher would lack it; merge it first"):
        StageConfig(steps=1, model="m", adapter="a", distill=DistillConfig(weight=(0.5, 0.1)))
    with pytest.raises(ConfigError, match=r"adapter a needs stage\.model"):
        StageConfig(steps=1, adapter="a")
