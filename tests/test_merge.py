"""`python -m puma_jax.merge`: the mean of models and of checkpoints, as NumPy computes it."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from puma_jax import Embedder, merge
from puma_jax.config import ComputeConfig, LoraConfig
from puma_jax.errors import ArtifactError, CheckpointError, ConfigError
from puma_jax.model import averaging
from puma_jax.model.hf import open_checkpoint
from puma_jax.model.tree import named_leaves
from puma_jax.training.checkpoint import Checkpoints
from puma_jax.training.config import DataConfig, StageConfig, TrainConfig
from puma_jax.training.step import TrainState
from puma_jax.training.workdir import claim_run, model_digest

WEIGHTS = (3.0, 1.0, 4.0)


@pytest.fixture(scope="module")
def models(tiny, tmp_path_factory):
    """Three models of one shape, saved by us, and their tensors."""
    folders, tensors = [], []
    for number in range(3):
        folder = tmp_path_factory.mktemp("models") / f"model-{number}"
        Embedder.load(tiny.folder, dtype="float32").save(folder)
        found = load_file(folder / "model.safetensors")
        rng = np.random.default_rng(number)
        noisy = {
            name: values + 0.1 * rng.normal(size=values.shape).astype(np.float32)
            for name, values in found.items()
        }
        save_file(noisy, folder / "model.safetensors", {"format": "pt"})
        folders.append(str(folder))
        tensors.append(noisy)
    return folders, tensors


def test_the_mean_is_that_of_numpy(models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(averaging, "_ROWS_AT_ONCE", 7)
    folders, tensors = models
    merge.main(tmp_path / "out", tuple(folders), weights=WEIGHTS)
    assert "0.375 × " in capsys.readouterr().out
    found = load_file(tmp_path / "out/model.safetensors")
    assert found.keys() == tensors[0].keys()
    for name, values in found.items():
        stack = np.stack([one[name] for one in tensors]).astype(np.float64)
        expected = np.average(stack, axis=0, weights=WEIGHTS)
        np.testing.assert_allclose(values, expected, rtol=6e-8, err_msg=name)
    vectors = Embedder.load(tmp_path / "out", dtype="float32").encode(["A red bicycle."])
    np.testing.assert_allclose(np.linalg.norm(vectors), 1, atol=1e-6)
    said = json.loads((tmp_path / "out" / merge.MANIFEST).read_text())["mean_of"]
    assert [*said.values()] == [3 / 8, 1 / 8, 4 / 8]


def test_memory_does_not_hold_the_models(models, tmp_path):
    """No leaf is read before it is asked for, and then one layer of it."""
    checkpoints = [open_checkpoint(folder) for folder in models[0][:2]]
    config, asked = checkpoints[0].config, []

    class Watched:
        def read_part(self, name, index, leaf):
            asked.append((name, index))
            return checkpoints[0].read_part(name, index, leaf)

    mean = named_leaves(averaging.mean(config, [Watched(), checkpoints[1]], [0.5, 0.5], "bfloat16"))
    leaf = mean["decoder.layers.mlp.up.kernel"]
    assert leaf.nbytes == 2 * 4 * 64 * 96
    assert not asked
    assert leaf[2].shape == (64, 96)
    assert asked == [("decoder.layers.mlp.up.kernel", (slice(2, 3), slice(0, 64), slice(None)))]


def damaged(folder, tmp_path, file, **fields):
    """Return a copy of a model with other fields in a JSON file."""
    copy = shutil.copytree(folder, tmp_path / "other")
    content = json.loads((copy / file).read_text())
    for name, value in fields.items():
        *path, last = name.split("__")
        part = content
        for key in path:
            part = part[key]
        part[last] = value
    (copy / file).write_text(json.dumps(content))
    return str(copy)


def test_models_that_are_not_alike_are_refused(models, deepstack, tmp_path):
    first = models[0][0]
    prompt = damaged(first, tmp_path, "config.json", puma_jax__prompt__template="bare")
    differs = r'other differs from .* in prompt.template \("bare" there'
    with pytest.raises(CheckpointError, match=differs):
        merge.main(tmp_path / "out", (first, prompt))
    with pytest.raises(CheckpointError, match=r"differs from .* in family"):
        merge.main(tmp_path / "out", (first, str(deepstack.folder)))
    shutil.rmtree(prompt)
    Embedder.load(first, dtype="float32").keep_layers(3).save(prompt)
    with pytest.raises(CheckpointError, match=r"in (decoder.layers|kept_layers)"):
        merge.main(tmp_path / "out", (first, prompt))
    shutil.rmtree(prompt)
    other = damaged(first, tmp_path, "tokenizer.json", normalizer={"type": "NFC"})
    with pytest.raises(CheckpointError, match="has another tokenizer than"):
        merge.main(tmp_path / "out", (first, other))
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_weighted_is_refused(models, tmp_path):
    folders = tuple(models[0])
    for weights in ((1.0,), (1.0, 2.0, 0.0), (1.0, 2.0, float("nan"))):
        with pytest.raises(ConfigError, match="3 numbers above 0"):
            merge.main(tmp_path / "out", folders, weights=weights)
    with pytest.raises(ConfigError, match="at least two, each of them once"):
        merge.main(tmp_path / "out", folders[:1] * 2)
    with pytest.raises(ConfigError, match="either --models, or --workdir"):
        merge.main(tmp_path / "out")
    with pytest.raises(ConfigError, match="needs a --stage"):
        merge.main(tmp_path / "out", folders, last=2)
    (tmp_path / "there").write_text("")
    with pytest.raises(ConfigError, match=r"--workdir .*/nowhere is not a folder"):
        merge.main(tmp_path / "out", workdir=tmp_path / "nowhere", stage="mac", last=2)
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(ArtifactError, match="is not empty"):
        merge.main(tmp_path, folders)


def test_only_widths_and_exits_that_all_models_have_remain(models):
    folders = models[0]
    configs = [open_checkpoint(folder).config for folder in folders[:2]]
    widths = ((8, 16, 32), (16, 32, 48))
    configs = [
        dataclasses.replace(config, widths=of_one, exit_layers=exits)
        for config, of_one, exits in zip(configs, widths, ((1, 2), (2, 3)), strict=True)
    ]
    merged = averaging.mean_config(configs, folders[:2])
    assert (merged.widths, merged.exit_layers) == ((16, 32), (2,))
    assert averaging.left_out(configs, merged) == [
        "widths 8, 48: left out, as not all models were trained for them",
        "exit_layers 1, 3: left out, as not all models were trained for them",
    ]


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A run with checkpoints of adapters on two of four layers and of a trained tower."""
    workdir = tmp_path_factory.mktemp("run")
    stage = StageConfig(
        steps=9,
        model=str(tiny.folder),
        keep_layers="0,2",
        train_vision=True,
        lora=LoraConfig(rank=4, alpha=8.0, targets=("query", "down")),
    )
    compute = ComputeConfig(dtype="float32")
    config = TrainConfig(DataConfig(workdir), stages={"mac": stage}, compute=compute)
    claim_run(workdir, config)
    leaves = named_leaves(tiny.params)
    about = {"base": model_digest(tiny.folder)}
    checkpoints = Checkpoints(workdir / "checkpoints/mac", max_to_keep=3, about=about)
    trained = {}
    for step in (2, 4, 6):
        rng = np.random.default_rng(step)
        trained[step] = {
            "log_scale": np.float32(1),
            "vision.merger.up.kernel": leaves["vision.merger.up.kernel"] + step,
            "decoder.layers.attention.query.lora_a": rng.normal(size=(2, 64, 4)),
            "decoder.layers.attention.query.lora_b": rng.normal(size=(2, 4, 64)),
            "decoder.layers.mlp.down.lora_a": rng.normal(size=(2, 96, 4)),
            "decoder.layers.mlp.down.lora_b": rng.normal(size=(2, 4, 64)),
        }
        state = {name: jnp.asarray(leaf, jnp.float32) for name, leaf in trained[step].items()}
        checkpoints.save(TrainState(jnp.int32(step), state, {"moment": state}))
    checkpoints.close()
    return workdir, trained


def test_checkpoints_are_averaged_with_their_adapters_merged(tiny, run, tmp_path, capsys):
    workdir, trained = run
    merge.main(tmp_path / "out", workdir=workdir, stage="mac", last=2, weights=(1.0, 3.0))
    assert "0.25 × step 4, 0.75 × step 6" in capsys.readouterr().out
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.config.kept_layers == (0, 2)
    found = named_leaves(checkpoint.read(dtype="float32"))
    for name, leaf in named_leaves(tiny.params).items():
        expected = np.asarray(leaf, np.float64)
        if name.startswith("decoder.layers."):
            expected = expected[[0, 2]]
        a, b = (name.replace("kernel", f"lora_{side}") for side in "ab")
        for step, weight in ((4, 0.25), (6, 0.75)):
            if a in trained[step]:
                expected = expected + weight * 2.0 * trained[step][a] @ trained[step][b]
            elif name in trained[step]:
                expected = expected + weight * step
        np.testing.assert_allclose(found[name], expected, rtol=1e-6, atol=2e-6, err_msg=name)


def test_checkpoints_that_are_not_there_or_of_another_base_are_refused(run, tmp_path):
    workdir = shutil.copytree(run[0], tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"steps 2, 4, 6; asked for 4, 8: keep more with"):
        merge.main(tmp_path / "out", workdir=workdir, stage="mac", steps=(4, 8))
    with pytest.raises(CheckpointError, match="asked for the last 4: keep more with"):
        merge.main(tmp_path / "out", workdir=workdir, stage="mac", last=4)
    with pytest.raises(ConfigError, match='no stage "deep", only mac'):
        merge.main(tmp_path / "out", workdir=workdir, stage="deep")
    (workdir / "checkpoints/mac/4.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"steps 2, 6; step 4 is damaged \(4.json\); asked"):
        merge.main(tmp_path / "out", workdir=workdir, stage="mac", steps=(4, 6))
    config = json.loads((workdir / "config.json").read_text())
    other = shutil.copytree(config["stages"]["mac"]["model"], tmp_path / "base")
    (other / "added.txt").write_text("")
    config["stages"]["mac"]["model"] = str(other)
    (workdir / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"base is not the model that the checkpoints in .*mac"
    ):
        merge.main(tmp_path / "out", workdir=workdir, stage="mac")
