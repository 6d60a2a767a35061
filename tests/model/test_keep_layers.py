"""A layer slice is an array slice, and the model that is left an ordinary one."""

import copy
import dataclasses

import jax
import numpy as np
import pytest
import torch

from puma_jax.embedder import Embedder
from puma_jax.errors import LayerSelectionError
from puma_jax.export.card import model_card
from puma_jax.model.encoder import UntrainedDepthWarning, abstract, encode_exits, keep_layers
from puma_jax.model.hf import open_checkpoint
from puma_jax.model.tree import named_leaves
from puma_jax.rows import PackedShape
from tests.reference import FLOAT32, encode, pack, random_image

LAYERS = {
    1: [0],
    2: [0, 1],
    4: [0, 1, 2, 3],
    (0, 1, 3): [0, 1, 3],
    (0, -1): [0, 3],
    (2, 0): [2, 0],
}


@pytest.mark.parametrize("keep", LAYERS)
@pytest.mark.parametrize("base", ["tiny", "windowed"])
def test_the_slice_equals_the_reference_with_those_layers_deleted(base, keep, request):
    check_slice(request.getfixturevalue(base), keep)


@pytest.mark.parametrize("keep", [1, 2, 3, 4])
def test_a_slice_of_a_model_with_deepstack_keeps_the_layers_that_are_fed(deepstack, keep):
    check_slice(deepstack, keep)


def check_slice(tiny, keep):
    kept = LAYERS.get(keep, list(range(keep)) if isinstance(keep, int) else keep)
    reference = copy.deepcopy(tiny.torch)
    model = reference.model.language_model
    model.layers = torch.nn.ModuleList(model.layers[i] for i in kept)
    model.config.num_hidden_layers = len(model.layers)
    model.config.layer_types = ["full_attention"] * len(model.layers)
    items = [tiny.item("A red bicycle."), tiny.item("Make it blue.", random_image(90, 200))]
    rows, packing = pack(items, PackedShape(2, 256, 1, 128, 2), tiny.config.vision)

    config, params = keep_layers(tiny.config, tiny.params, keep)
    read = open_checkpoint(tiny.folder).read(keep, dtype="float32")

    assert config.kept_layers == tuple(kept)
    assert config.decoder.layers == len(kept)
    ours = np.asarray(encode(params, rows, FLOAT32))[packing.slot]
    for mine, item in zip(ours, items, strict=True):
        np.testing.assert_allclose(mine, tiny.expected(item, reference), rtol=0, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, params, read)


@pytest.mark.parametrize(("base", "pooling"), [("tiny", "one token"), ("deepstack", "mean")])
def test_one_pass_gives_the_states_of_every_depth(base, pooling, request):
    pair = request.getfixturevalue(base)
    items = [pair.item("A red bicycle."), pair.item("Make it blue.", random_image(90, 200))]
    rows, packing = pack(items, PackedShape(2, 256, 1, 128, 2), pair.config.vision)
    params = jax.tree.map(lambda leaf: leaf, pair.params)
    params.mean_pooling = pooling == "mean"
    states = jax.jit(lambda params, rows: encode_exits(params, rows, FLOAT32, (1, 3)))(params, rows)
    for layers, found in zip((1, 3, 4), states, strict=True):
        _, shallow = keep_layers(pair.config, params, layers)
        expected = encode(shallow, rows, FLOAT32)
        np.testing.assert_allclose(found[packing.slot], expected[packing.slot], rtol=0, atol=1e-6)


def test_depths_that_a_model_was_trained_for_are_known_and_others_are_a_warning(tiny, tmp_path):
    trained = Embedder.load(tiny.folder, dtype="float32")
    trained.config = dataclasses.replace(trained.config, exit_layers=(1, 3))
    trained.save(tmp_path / "saved")
    loaded = Embedder.load(tmp_path / "saved", dtype="float32")
    assert loaded.config.exit_layers == (1, 3)
    assert "first 1, 3 layers alone" in model_card(loaded, "huggingface", "model")
    assert loaded.fingerprint == Embedder.load(tiny.folder, dtype="float32").fingerprint
    assert loaded.keep_layers(3).config.exit_layers == (1,)
    assert loaded.keep_layers(1).config.exit_layers == ()
    for keep in (2, [0, 1, 3], [1, 2]):
        message = r"^the model was trained for its first 1, 3, 4 layers, not for layers [0-9, ]+ of"
        with pytest.warns(UntrainedDepthWarning, match=message):
            loaded.keep_layers(keep)


def test_the_program_does_not_grow_with_depth(family):
    """Compile time is that of one layer: 28 layers lower to as many lines as 12."""
    item = family.item("A.", random_image(60, 60))
    rows, _ = pack([item], PackedShape(1, 128, 1, 64, 1), family.config.vision)

    def lines(layers):
        config = family.config.with_layers(tuple(range(layers)))
        return encode.lower(abstract(config), rows, FLOAT32).as_text().count("\n")

    assert lines(28) == lines(12)


def test_slices_compose_in_terms_of_the_base_model(tiny):
    config, params = keep_layers(tiny.config, tiny.params, [0, 2, 3])
    config, params = keep_layers(config, params, [0, -1])
    assert config.kept_layers == (0, 3)
    _, at_once = keep_layers(tiny.config, tiny.params, [0, 3])
    jax.tree.map(np.testing.assert_array_equal, params, at_once)


def test_the_model_that_was_cut_is_left_as_it_was(tiny):
    before = {name: leaf.shape for name, leaf in named_leaves(tiny.params).items()}
    keep_layers(tiny.config, tiny.params, 1)
    assert {name: leaf.shape for name, leaf in named_leaves(tiny.params).items()} == before


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (0, "keep_layers 0 is out of range: the model has 4 layers"),
        (5, "keep_layers 5 is out of range: the model has 4 layers"),
        ([], "keep_layers is empty: name at least one layer"),
        ([0, 4], "keep_layers names layer 4: the model has layers 0 to 3"),
        ([0, -5], "keep_layers names layer -5: the model has layers 0 to 3"),
        ([1, 2, -3], "keep_layers names layer 1 more than once"),
    ],
)
def test_a_selection_that_cannot_be_is_one_clear_line(tiny, keep, message):
    with pytest.raises(LayerSelectionError) as error:
        keep_layers(tiny.config, tiny.params, keep)
    assert str(error.value) == message


@pytest.mark.parametrize("keep", [[0, 1, 3, 2], [1], [0, 2, 3], [0, -1]])
def test_layers_that_deepstack_feeds_are_kept_in_place_or_the_selection_is_refused(deepstack, keep):
    """The features belong to layers 0, 1 and 2; transformers adds them at the first places."""
    kept = ", ".join(str(index % 4) for index in keep)
    fed = ", ".join(map(str, range(min(len(keep), 3))))
    message = rf"^layers {kept} of the base model do not begin with {fed}, .*: keep these first"
    for select in (
        lambda: keep_layers(deepstack.config, deepstack.params, keep),
        lambda: open_checkpoint(deepstack.folder).read(keep),
        lambda: Embedder.load(deepstack.folder).keep_layers(keep),
    ):
        with pytest.raises(LayerSelectionError, match=message):
            select()
