"""The configs that come with the project say what the paper says, and run."""

from pathlib import Path

import pytest

from puma_jax.train import load_config
from tests.data.fake_mbeir import write_test_sets, write_union
from tests.training.test_run import run

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_every_config_can_be_read(path):
    assert load_config(path)().stages


def test_the_recipe_is_the_papers():
    config = load_config(CONFIGS / "puma_qwen2vl_7b.py")()
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


def test_the_papers_recipe_runs_on_a_small_model(tiny, tmp_path):
    root = write_test_sets(write_union(tmp_path / "benchmark"))
    flags = [
        *("--model", str(tiny.folder), "--stages.distil.data-root", str(root)),
        *("--stages.distil.keep-layers", "2", "--data.workers", "0"),
        *("--evaluation.every-steps", "0"),  # the sets have no queries of split val
    ]
    for name in ("distil", "mac"):
        flags += [f"--stages.{name}.epochs", "0", f"--stages.{name}.steps", "2"]
        flags += [f"--stages.{name}.grad-cache-chunks", "2", f"--stages.{name}.lora.rank", "4"]
    done = run(tmp_path / "run", root, *flags, config=CONFIGS / "puma_qwen2vl_2b.py")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/mac/model.safetensors").exists()
