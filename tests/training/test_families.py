"""Every family trains: with a teacher of all its layers, adapters, and the model's own prompt."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from puma_jax import Embedder
from puma_jax.config import ImageConfig, LoraConfig
from puma_jax.data import text_pairs
from puma_jax.errors import LayerSelectionError
from puma_jax.model import lora
from puma_jax.model.encoder import keep_layers
from puma_jax.model.tree import named_leaves, partition
from puma_jax.parallel.mesh import MeshConfig, make_mesh
from puma_jax.parallel.rules import shardings
from puma_jax.rows import PackedShape
from puma_jax.train import load_config
from puma_jax.training import results
from puma_jax.training.config import ScoreDistillConfig
from puma_jax.training.run import run
from puma_jax.training.teacher import make_teacher, split_teacher
from tests import reference
from tests.data.fake_mbeir import write_union
from tests.reference import FLOAT32, encode, pack, random_image
from tests.training.batches import batch_of


@pytest.mark.parametrize("kept", [(0,), (0, 1), (0, 1, 2), (0, 1, 2, 3)])
def test_a_teacher_with_deepstack_is_the_whole_model(deepstack, kept):
    rows = jax.tree.map(lambda leaf: leaf[0], batch_of(deepstack, 4, 1).rows)
    _, student = keep_layers(deepstack.config, deepstack.params, kept)
    student = lora.add_lora(student, LoraConfig(rank=2), jax.random.key(0))
    trained, frozen = partition(student, lora.is_lora)
    teacher = split_teacher(deepstack.params, kept, trained)
    teacher_fn = jax.jit(make_teacher(deepstack.config, kept, FLOAT32, 1))
    np.testing.assert_allclose(
        teacher_fn(teacher, frozen, rows),
        encode(deepstack.params, rows, FLOAT32),
        rtol=0,
        atol=1e-5,
    )


def test_adapters_merge_in_every_family(family):
    adapted = lora.add_lora(family.params, LoraConfig(rank=2, alpha=4.0), jax.random.key(0))
    assert sum(map(lora.is_lora, named_leaves(adapted))) == 14
    adapted = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf + 0.05 if "lora_b" in str(path) else leaf, adapted
    )
    item = family.item("Blue.", random_image(60, 90))
    rows, _ = pack([item], PackedShape(1, 128, 1, 64, 1), family.config.vision)
    merged = encode(lora.merge(adapted), rows, FLOAT32)
    np.testing.assert_allclose(encode(adapted, rows, FLOAT32), merged, rtol=0, atol=1e-5)
    assert np.abs(merged - encode(family.params, rows, FLOAT32)).max() > 0.01


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 8, 1)])
def test_states_of_every_family_do_not_depend_on_the_mesh(family, sizes):
    mesh = make_mesh(MeshConfig(*sizes), jax.devices())
    embedder = Embedder.load(family.folder, dtype="float32", mesh=mesh)
    for leaf, sharding in zip(
        jax.tree.leaves(embedder.params),
        jax.tree.leaves(shardings(embedder.params, mesh, family.config)),
        strict=True,
    ):
        assert leaf.sharding == sharding
    items = [{"text": f"Text {i}.", "image": random_image(60 + 20 * i, 90, i)} for i in range(5)]
    alone = Embedder.load(family.folder, dtype="float32").encode(items)
    np.testing.assert_allclose(embedder.encode(items), alone, rtol=0, atol=1e-5)


@pytest.fixture(autouse=True)
def little_is_timed(monkeypatch):
    monkeypatch.setattr(results, "_MEASURED_ITEMS", 8)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_union(tmp_path_factory.mktemp("mbeir"))


def config_of(folder: Path, root: Path, keep: str, side: int):
    """One stage: the first layers of a model, with adapters, the tower and a teacher."""
    config = load_config(Path(__file__).with_name("tiny_run.py"))(2)
    stage = dataclasses.replace(
        config.stages["cut"], model=str(folder), keep_layers=keep, train_vision=True
    )
    return dataclasses.replace(
        config,
        scratch=None,
        prompt=None,
        images=ImageConfig(side**2, 4 * side**2),
        stages={"cut": stage},
        data=dataclasses.replace(config.data, root=root),
        evaluation=dataclasses.replace(config.evaluation, every_steps=0),
    )


def test_a_selection_that_deepstack_forbids_is_refused_before_the_data_are_built(
    deepstack, root, tmp_path
):
    config = config_of(deepstack.folder, root, "0,2,3", 32)
    with pytest.raises(LayerSelectionError, match="do not begin with 0, 1, 2"):
        run(config, tmp_path / "run")
    assert not list((tmp_path / "run").rglob("*.array_record"))


def test_a_text_decoder_trains_on_texts(tmp_path):
    model = reference.random_model(reference.text_config("llama", layers=3))
    folder = reference.save_folder(model, tmp_path / "llama")
    table = tmp_path / "pairs.csv"
    rows = [f"a text {n},it is {n},it is not {n}\n" for n in range(24)]
    table.write_text("sent0,sent1,hard_neg\n" + "".join(rows))
    text_pairs.main(table=table, out=tmp_path / "pairs")
    config = config_of(folder, tmp_path / "pairs", "2", 28)
    # Pairs of texts have no scores.
    stage = dataclasses.replace(config.stages["cut"], score_distill=ScoreDistillConfig())
    config = dataclasses.replace(config, stages={"cut": stage})
    run(config, tmp_path / "run")
    trained = Embedder.load(tmp_path / "run/cut", dtype="float32")
    assert trained.config.kept_layers == (0, 1)
    base = Embedder.load(folder, dtype="float32").keep_layers(2)
    assert np.abs(trained.encode(["A text."]) - base.encode(["A text."])).max() > 1e-4
