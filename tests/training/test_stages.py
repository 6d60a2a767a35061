"""What a stage says of its data before its first step."""

import dataclasses

import jax
import pytest

from puma_jax.config import ImageConfig, PlanConfig
from puma_jax.data.builder import Settings, build
from puma_jax.data.prompts import Processor
from puma_jax.data.store import Store
from puma_jax.errors import ConfigError
from puma_jax.parallel.mesh import MeshConfig, make_mesh
from puma_jax.training.config import DataConfig, ScoreDistillConfig, StageConfig, TrainConfig
from puma_jax.training.stages import open_data
from tests.data import fake_mbeir
from tests.reference import byte_tokenizer

UNUSED_SCORES = "cand_scores of the training queries are not used: score_distill.weight is 0"


@pytest.fixture(scope="module")
def built(tiny, tmp_path_factory):
    """A benchmark with hard negatives and some scores, its processor, and its training data."""
    folder = tmp_path_factory.mktemp("data")
    root = fake_mbeir.write_union(folder / "mbeir")
    model = dataclasses.replace(tiny.config, images=ImageConfig(4 * 28**2, 9 * 28**2))
    processor = Processor(byte_tokenizer(), model)
    build(Settings(root=root, out=folder / "built", workers=1), processor)
    return root, processor, Store.open(folder / "built")


def opened(tiny, built, count, weight):
    root, processor, store = built
    stage = StageConfig(
        steps=1,
        model=str(tiny.folder),
        plan=PlanConfig(batch_size=4, hard_negatives=count),
        score_distill=ScoreDistillConfig(weight=weight),
    )
    config = TrainConfig(data=DataConfig(root), stages={"one": stage})
    open_data("one", config, processor, store, make_mesh(MeshConfig(), jax.devices()[:1]))


@pytest.mark.parametrize(
    ("count", "weight", "lines"),
    [
        (
            0,
            0.0,
            (
                "neg_cand_list of 4 queries, 8 ids, is not used: plan.hard_negatives is 0",
                UNUSED_SCORES,
            ),
        ),
        (
            2,
            0.5,
            (
                "neg_cand_list of 9 of 13 queries has fewer ids than plan.hard_negatives 2: these "
                "queries take those they have",
                "cand_scores of 13 of 13 queries lack documents of theirs: these documents are "
                "left out of the distillation of scores",
            ),
        ),
    ],
)
def test_a_stage_says_which_negatives_and_scores_it_does_not_use_or_lacks(
    tiny, built, capsys, count, weight, lines
):
    opened(tiny, built, count, weight)
    assert capsys.readouterr().out.splitlines() == [f"one: {line}" for line in lines]


def test_scores_are_not_distilled_from_data_that_have_none(tiny, built):
    root, processor, store = built
    store = Store.open(store.path)
    store.table = dataclasses.replace(store.table, positive_score=None, negative_score=None)
    with pytest.raises(ConfigError, match=r"no training query has cand_scores: write them with"):
        opened(tiny, (root, processor, store), 2, 0.5)
    with pytest.raises(ConfigError, match=r"weight 0\.5 needs plan\.hard_negatives above 0"):
        opened(tiny, built, 0, 0.5)
