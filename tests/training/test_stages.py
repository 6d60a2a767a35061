"""What a stage says of its data before its first step."""

import dataclasses

import jax
import pytest

from puma_jax.config import ImageConfig, PlanConfig
from puma_jax.data.builder import Settings, build
from puma_jax.data.prompts import Processor
from puma_jax.data.store import Store
from puma_jax.parallel.mesh import MeshConfig, make_mesh
from puma_jax.training.config import DataConfig, StageConfig, TrainConfig
from puma_jax.training.stages import open_data
from tests.data import fake_mbeir
from tests.reference import byte_tokenizer


@pytest.mark.parametrize(
    ("count", "line"),
    [
        (0, "neg_cand_list of 4 queries, 8 ids, is not used: plan.hard_negatives is 0"),
        (
            2,
            "neg_cand_list of 9 of 13 queries has fewer ids than plan.hard_negatives 2: these "
            "queries take those they have",
        ),
    ],
)
def test_a_stage_says_which_hard_negatives_it_does_not_use_or_lacks(
    tiny, tmp_path, capsys, count, line
):
    root = fake_mbeir.write_union(tmp_path / "mbeir")
    model = dataclasses.replace(tiny.config, images=ImageConfig(4 * 28**2, 9 * 28**2))
    processor = Processor(byte_tokenizer(), model)
    build(Settings(root=root, out=tmp_path / "built", workers=1), processor)
    store = Store.open(tmp_path / "built")
    plan = PlanConfig(batch_size=4, hard_negatives=count)
    stages = {"one": StageConfig(steps=1, model=str(tiny.folder), plan=plan)}
    config = TrainConfig(data=DataConfig(root), stages=stages)
    capsys.readouterr()
    open_data("one", config, processor, store, make_mesh(MeshConfig(), jax.devices()[:1]))
    assert capsys.readouterr().out == f"one: {line}\n"
