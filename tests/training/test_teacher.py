"""The teacher is the whole model, and takes memory only for what the student does not have."""

import jax
import numpy as np
import pytest

from puma_jax.model import lora
from puma_jax.model.encoder import keep_layers
from puma_jax.model.tree import named_leaves, partition
from puma_jax.training.teacher import make_teacher, split_teacher
from tests.reference import FLOAT32, encode
from tests.training.batches import batch_of


@pytest.fixture(scope="module")
def rows(tiny):
    return jax.tree.map(lambda leaf: leaf[0], batch_of(tiny, 4, 1).rows)


@pytest.mark.parametrize("kept", [(0, 1), (1, 3), (0, 3), (2, 0), (0, 1, 2, 3)])
@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_its_states_are_those_of_the_whole_model(tiny, rows, kept, trainable):
    _, student = keep_layers(tiny.config, tiny.params, kept)
    if trainable == "lora":
        student = lora.add_lora(student, lora.LoraConfig(rank=2), jax.random.key(0))
    trained, frozen = partition(
        student,
        lambda name: lora.is_lora(name) if trainable == "lora" else name.startswith("decoder"),
    )
    teacher = split_teacher(tiny.params, kept, trained)
    teacher_fn = jax.jit(make_teacher(tiny.config, kept, FLOAT32, 1))
    np.testing.assert_allclose(
        teacher_fn(teacher, frozen, rows), encode(tiny.params, rows, FLOAT32), rtol=0, atol=1e-5
    )


def test_with_adapters_it_adds_only_the_layers_that_were_cut(tiny):
    _, student = keep_layers(tiny.config, tiny.params, 1)
    student = lora.add_lora(student, lora.LoraConfig(rank=2), jax.random.key(0))
    trained, _ = partition(student, lora.is_lora)
    teacher = split_teacher(tiny.params, (0,), trained)
    assert teacher.initial_params == {}
    layers = named_leaves(tiny.params.decoder.layers)
    removed = sum(leaf.size for leaf in teacher.removed.values())
    assert removed == sum(leaf.size for leaf in layers.values()) * 3 // 4
