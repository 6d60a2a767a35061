"""A checkpoint is restored as it was written, for the job it is of, or not at all."""

import dataclasses
import gc
import importlib.metadata
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puma_jax.errors import CheckpointError
from puma_jax.training.checkpoint import Checkpoints, versions
from puma_jax.training.step import TrainState

ABOUT = {"stage": "cut", "settings": {"optimizer": {"learning_rate": 0.1}}}


def state(step: int) -> TrainState:
    leaves = {"a.kernel": jnp.arange(64, dtype=jnp.float32).reshape(8, 8) * step}
    fields = {field.name: leaves for field in dataclasses.fields(TrainState)}
    return TrainState(**{**fields, "step": jnp.int32(step)})


def open_checkpoints(folder, about=ABOUT):
    return Checkpoints(folder, max_to_keep=2, about=about)


def restored(folder) -> int:
    checkpoints = open_checkpoints(folder)
    found = checkpoints.restore(state(0))
    checkpoints.close()
    np.testing.assert_array_equal(
        found.trained["a.kernel"], state(int(found.step)).trained["a.kernel"]
    )
    return int(found.step)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    checkpoints = open_checkpoints(folder)
    for step in (2, 4, 6):
        checkpoints.save(state(step))
    checkpoints.close()
    return folder


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "checkpoints")


def flip(path, rng=random):
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def test_the_latest_is_restored_and_older_ones_are_deleted(folder):
    assert restored(folder) == 6
    assert sorted(path.name for path in folder.iterdir()) == ["4", "4.json", "6", "6.json"]


def test_a_flipped_bit_in_any_file_falls_back_to_the_step_before(written, folder, capsys):
    names = [path.relative_to(folder) for path in (folder / "6.json", *files_of(folder / "6"))]
    assert len(names) > 5
    for name in names:
        shutil.rmtree(folder)
        shutil.copytree(written, folder)
        flip(folder / name)
        assert restored(folder) == 4, name
        assert "step 6 is damaged" in (line := capsys.readouterr().out)
        assert "training resumes from step 4" in line
        assert line.count("\n") == 1


def test_a_missing_file_falls_back_too(folder):
    files_of(folder / "6")[0].unlink()
    assert restored(folder) == 4


def test_training_goes_on_after_falling_back(folder):
    flip(files_of(folder / "6")[-1])
    checkpoints = open_checkpoints(folder)
    assert checkpoints.latest == 4
    for step in (6, 8):
        checkpoints.save(state(step))
    checkpoints.close()
    assert restored(folder) == 8


def test_a_step_whose_digests_were_not_written_is_not_finished(folder, capsys):
    (folder / "6.json").unlink()
    assert restored(folder) == 4
    assert "step 6 was not finished" in capsys.readouterr().out
    (folder / "4.json").unlink()
    checkpoints = open_checkpoints(folder)
    checkpoints.close()
    assert checkpoints.latest is None
    assert "begins at the start" in capsys.readouterr().out


def test_nothing_is_removed_if_no_step_is_intact(folder):
    for step in ("4", "6"):
        flip(files_of(folder / step)[-1])
    with pytest.raises(CheckpointError, match=r"no step is intact .*: delete the folder"):
        open_checkpoints(folder)
    assert (folder / "4").exists()
    assert (folder / "6").exists()


def test_a_checkpoint_of_another_learning_rate_is_refused(folder):
    other = {"stage": "cut", "settings": {"optimizer": {"learning_rate": 0.2}}}
    with pytest.raises(
        CheckpointError, match=r"differs in settings\.optimizer\.learning_rate \(0\.1 there, 0\.2"
    ):
        open_checkpoints(folder, other)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_leaves_of_another_shape_are_refused(folder):
    like = jax.tree.map(lambda leaf: leaf[:4] if leaf.ndim else leaf, state(0))
    checkpoints = open_checkpoints(folder)
    with pytest.raises(CheckpointError):
        checkpoints.restore(like)
    checkpoints.close()
    gc.collect()  # Orbax leaves reads behind that it does not wait for


def test_a_source_tree_that_is_not_installed_saves_checkpoints(tmp_path, monkeypatch):
    version = importlib.metadata.version

    def of_installed(name: str) -> str:
        if name == "puma-jax":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", of_installed)
    assert versions()["puma-jax"] == "source"
    checkpoints = open_checkpoints(tmp_path / "checkpoints")
    checkpoints.save(state(1))
    checkpoints.close()
    assert restored(tmp_path / "checkpoints") == 1
