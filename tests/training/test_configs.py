"""The configs that come with the project say what the paper says, and run."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from puma_jax import Embedder
from puma_jax.config import ImageConfig
from puma_jax.errors import ConfigError
from puma_jax.model import encoder
from puma_jax.train import load_config
from puma_jax.training.checks import base_configs
from tests.data.fake_mbeir import write_test_sets, write_union
from tests.reference import random_image
from tests.training.test_run import run

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_every_config_can_be_read(path):
    assert load_config(path)().stages


def test_the_recipe_is_the_papers():
    config = load_config(CONFIGS / "puma.py")()
    distil, mac = config.stages["distil"], config.stages["mac"]
    assert (distil.keep_layers, distil.plan.batch_size, mac.plan.batch_size) == ("12", 288, 600)
    assert (distil.epochs, mac.epochs) == (2, 2)
    assert (distil.loss.kind, distil.loss.temperature) == ("info_nce", 0.05)
    assert (distil.distill.weight, distil.distill.scale) == ((0.1, 0.1), 0.05)
    assert (mac.loss.kind, mac.loss.temperature, mac.loss.decay) == ("mac", 0.03, 0.5)
    assert not mac.distill.on
    assert {(stage.lora.rank, stage.lora.alpha) for stage in (distil, mac)} == {(128, 256.0)}
    assert (distil.lora.dropout, mac.lora.dropout) == (0.05, 0.1)
    rates = [stage.optimizer.learning_rate for stage in (distil, mac)]
    assert rates == [2e-4, 3e-4]
    assert (distil.optimizer.first_layer_lr_scale, mac.optimizer.first_layer_lr_scale) == (0.5, 1.0)
    for stage in (distil, mac):
        optimizer = stage.optimizer
        assert (optimizer.beta1, optimizer.beta2, optimizer.eps) == (0.9, 0.98, 1e-7)
        assert (optimizer.warmup_ratio, optimizer.weight_decay) == (0.03, 0.0)


def test_the_recipe_takes_a_base_of_every_family(family, tmp_path):
    side = family.config.vision.patch_size * family.config.vision.merge_size
    config = load_config(CONFIGS / "puma.py")(str(family.folder), "3", side)
    bases = base_configs(config, tmp_path)
    assert bases["distil"].decoder.layers == 4
    assert bases["mac"].kept_layers == (0, 1, 2)
    # The same number of visual tokens, whatever their size.
    assert bases["mac"].images == ImageConfig(4 * side**2, 300 * side**2)
    assert bases["mac"].prompt.max_text_tokens == 450


def test_an_embedder_is_pruned_with_its_own_prompt_by_the_whole_of_it_on_the_benchmark():
    config = load_config(CONFIGS / "puma_qwen3vl_embedding_2b.py")()
    distil = config.stages["distil"]
    assert (config.prompt, config.images, distil.data_root) == (None, None, None)
    assert (distil.keep_layers, distil.plan.instructions) == ("12", True)
    assert distil.distill.on
    mined = load_config(CONFIGS / "puma_qwen3vl_embedding_2b.py")(mined=Path("mined"))
    assert [*mined.stages] == ["distil", "mac", "hard"]
    hard = mined.stages["hard"]
    assert (hard.data_root, hard.plan.hard_negatives, hard.model) == (Path("mined"), 4, None)
    assert (hard.loss, hard.keep_layers, hard.distill.on) == (mined.stages["mac"].loss, "", False)


def test_a_run_may_train_attention_both_ways_without_a_teacher(tiny, tmp_path):
    config = load_config(CONFIGS / "puma.py")(str(tiny.folder))
    with pytest.raises(ConfigError, match="causal false in stage distil with distillation: the te"):
        dataclasses.replace(config, causal=False)
    stages = {"mac": dataclasses.replace(config.stages["mac"], model=str(tiny.folder))}
    alone = dataclasses.replace(config, causal=False, stages=stages)
    base = base_configs(alone, tmp_path)["mac"]
    assert (base.decoder.causal, tiny.config.decoder.causal) == (False, True)
    assert not encoder.abstract(base).decoder.layers.attention.causal


def test_the_curriculum_goes_from_texts_to_mined_negatives(tmp_path, tiny):
    config = load_config(CONFIGS / "curriculum.py")(str(tiny.folder), "2", mined=Path("mined"))
    assert list(config.stages) == ["text", "captions", "mbeir", "hard"]
    assert [stage.model for stage in config.stages.values()] == [str(tiny.folder), None, None, None]
    roots = [Path("data/nli"), Path("data/captions"), None, Path("mined")]
    assert [stage.data_root for stage in config.stages.values()] == roots
    assert [stage.plan.hard_negatives for stage in config.stages.values()] == [0, 0, 0, 4]
    assert {base.kept_layers for base in list(base_configs(config, tmp_path).values())[1:]} == {
        (0, 1)
    }
    # The first three stages of a run with negatives are those of a run without them.
    without = load_config(CONFIGS / "curriculum.py")(str(tiny.folder), "2")
    assert list(without.stages.items()) == list(config.stages.items())[:3]


def small(tmp_path, model):
    """Flags that make two steps of each stage on a small model, with a benchmark."""
    flags = ["--model", str(model), "--evaluation.every-steps", "0"]
    for name in ("distil", "mac"):
        flags += [f"--stages.{name}.epochs", "0", f"--stages.{name}.steps", "2"]
        flags += [f"--stages.{name}.grad-cache-chunks", "2", f"--stages.{name}.lora.rank", "4"]
    return write_test_sets(write_union(tmp_path / "benchmark")), flags


def test_the_papers_recipe_runs_on_a_small_model(tiny, tmp_path):
    root, flags = small(tmp_path, tiny.folder)
    flags += ["--keep-layers", "2", "--stages.distil.data-root", str(root)]
    done = run(tmp_path / "run", root, *flags, config=CONFIGS / "puma.py")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/mac/model.safetensors").exists()
    assert (tmp_path / "run/mac/adapter/adapter_model.safetensors").exists()


def test_the_recipe_of_an_embedder_prunes_it_and_keeps_its_own_prompt(deepstack, tmp_path):
    model = tmp_path / "Qwen3-VL-Embedding-tiny"  # by this name it is recognized
    model.symlink_to(deepstack.folder)
    root, flags = small(tmp_path, model)
    flags += ["--keep-layers", "3", "--mined", str(root), "--stages.mac.steps", "0"]
    flags += ["--stages.hard.epochs", "0", "--stages.hard.steps", "2"]
    flags += ["--stages.hard.grad-cache-chunks", "2", "--stages.hard.lora.rank", "4"]
    recipe = CONFIGS / "puma_qwen3vl_embedding_2b.py"
    done = run(tmp_path / "run", root, *flags, config=recipe)
    assert done.returncode == 0, done.stderr
    trained = Embedder.load(tmp_path / "run/hard", dtype="float32")
    base = Embedder.load(model, dtype="float32").keep_layers(3)
    assert trained.config == base.config
    assert (trained.config.kept_layers, trained.config.prompt.pooling) == ((0, 1, 2), "last")
    items = ["A text.", {"image": random_image(50, 70)}]
    assert np.abs(trained.encode(items) - base.encode(items)).max() > 1e-4
