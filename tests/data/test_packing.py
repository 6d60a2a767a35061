"""Packing: every item once, whole, inside its limits and its own segment, whatever the lengths."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puma_jax.data.items import Item
from puma_jax.data.packing import fill, place, place_in, rows_filled, rows_needed
from puma_jax.data.shapes import batch_shape, fitting_shape
from puma_jax.errors import PackingError
from puma_jax.rows import PackedShape
from tests.data.plan_grid import check_packing
from tests.reference import VISION

# The smallest patch there is: three values.
SMALL = dataclasses.replace(VISION, patch_size=1)
SHAPE = PackedShape(rows=4, length=64, patch_rows=4, patch_length=96, slots=24, data_shards=2)


def made_up(number: int, length: int, visual: int) -> Item:
    """An item all of whose values tell which item they belong to."""
    image_token_mask = np.zeros(length, bool)
    image_token_mask[:visual] = True
    return Item(
        tokens=np.full(length, number, np.int32),
        positions=np.arange(length, dtype=np.int32)[:, None].repeat(3, 1),
        image_token_mask=image_token_mask,
        patches=np.full((4 * visual, 3), number % 256, np.uint8),
        patch_positions=np.arange(4 * visual, dtype=np.int32)[:, None].repeat(2, 1),
        patch_images=np.zeros(4 * visual, np.int32),
    )


sizes = st.lists(
    st.tuples(st.integers(1, 64), st.integers(0, 24)).map(lambda s: (s[0], min(s))),
    min_size=1,
    max_size=80,
)


@settings(max_examples=200, deadline=None)
@given(sizes)
def test_every_item_lies_whole_in_one_place(sizes):
    items = [made_up(i + 1, *size) for i, size in enumerate(sizes)]
    lengths = np.array([len(item.tokens) for item in items])
    patches = np.array([len(item.patches) for item in items])
    packing = place(lengths, patches, SHAPE)
    rows = fill(items, packing, SHAPE, SMALL)

    assert (rows.segment_ids > 0).sum() == lengths.sum()
    assert (rows.patch_segment_ids > 0).sum() == patches.sum()
    np.testing.assert_array_equal(rows.segment_ids > 0, rows.tokens > 0)
    shard_rows, shard_patch_rows = SHAPE.rows // 2, SHAPE.patch_rows // 2
    shard_slots = SHAPE.slots // 2
    for i, item in enumerate(items):
        chunk, row, column = packing.chunk[i], packing.row[i], packing.column[i]
        here = rows.tokens[chunk] == i + 1
        assert here.sum() == len(item.tokens)
        assert here[row, column : column + len(item.tokens)].all()
        # A segment id of its own.
        segment = rows.segment_ids[chunk, row][here[row]]
        assert len(set(segment.tolist())) == 1
        assert (rows.segment_ids[chunk, row] == segment[0]).sum() == len(item.tokens)
        # [RET] is found by its slot, inside the data shard.
        shard = row // shard_rows
        slot = packing.slot[i]
        assert slot // shard_slots == shard
        mine = rows.tokens[chunk, shard * shard_rows : (shard + 1) * shard_rows].reshape(-1)
        at = rows.pool_index[chunk, slot]
        assert mine[at] == i + 1
        assert at == len(mine) - 1 or mine[at + 1] != i + 1
        # Visual tokens point at merged patches of this item, in order, inside the data shard.
        pointed = rows.image_token_index[chunk][here][item.image_token_mask]
        assert (rows.image_token_index[chunk][here][~item.image_token_mask] == -1).all()
        part = slice(shard * shard_patch_rows, (shard + 1) * shard_patch_rows)
        merged = rows.patches[chunk, part].reshape(-1, 4, 3)
        order = rows.patch_positions[chunk, part].reshape(-1, 4, 2)
        assert (merged[pointed] == (i + 1) % 256).all()
        np.testing.assert_array_equal(order[pointed].reshape(-1, 2), item.patch_positions)
    for chunk in range(packing.chunks):
        slots = packing.slot[packing.chunk == chunk]
        assert len(set(slots.tolist())) == len(slots)


def test_placement_depends_on_lengths_alone():
    rng = np.random.default_rng(0)
    lengths, patches = rng.integers(1, 64, 50), 4 * rng.integers(0, 20, 50)
    first, second = (place(lengths, patches, SHAPE) for _ in range(2))
    for name, value in vars(first).items():
        np.testing.assert_array_equal(value, getattr(second, name))


@pytest.mark.parametrize(
    ("lengths", "patches", "message"),
    [
        ([65], [0], "item 0 has 65 tokens, a row holds 64: .* larger length, or lower prompt"),
        ([9, 9], [0, 100], "item 1 has 100 patches, a row holds 96: .* or lower images.max_pixels"),
    ],
)
def test_an_item_larger_than_a_row_is_an_error_that_names_settings(lengths, patches, message):
    with pytest.raises(PackingError, match=message):
        place(np.array(lengths), np.array(patches), SHAPE)


@pytest.mark.parametrize(
    ("lengths", "patches", "chunks"),
    [
        ([64] * 5, [0] * 5, 2),  # rows
        ([9] * 9, [96] * 9, 3),  # patch rows
        ([1] * 49, [0] * 49, 3),  # slots
        ([33] * 5, [0] * 5, 2),  # more than half of a row each
    ],
)
def test_items_that_do_not_fit_take_the_fewest_chunks_that_hold_them(lengths, patches, chunks):
    lengths, patches = np.array(lengths), np.array(patches)
    for asked in range(1, 5):
        packing = place(lengths, patches, SHAPE, asked)
        assert packing.chunks == max(asked, chunks)
        check_packing(lengths, patches, packing, SHAPE)
    assert place_in(lengths, patches, SHAPE, chunks - 1) is None


def test_images_in_a_shape_without_patch_rows_are_an_error():
    with pytest.raises(PackingError, match="a row holds 0"):
        place(np.array([9]), np.array([16]), PackedShape(1, 64, 0, 128, 4))


@settings(max_examples=300, deadline=None)
@given(sizes, st.sampled_from([64, 512, 4096]))
def test_a_fitting_shape_fits(sizes, tokens):
    lengths = np.array([length for length, _ in sizes])
    patches = np.array([4 * visual for _, visual in sizes])
    shape = fitting_shape(lengths, patches, tokens)
    packing = place(lengths, patches, shape)
    if lengths.sum() <= tokens:
        assert packing.chunks == 1


def test_a_long_job_of_one_size_wastes_little():
    lengths, patches = np.full(1000, 111), np.full(1000, 324)
    shape = fitting_shape(lengths, patches, 4096)
    packing = place(lengths, patches, shape)
    assert lengths.sum() / (packing.chunks * shape.rows * shape.length) > 0.85
    assert patches.sum() / (packing.chunks * shape.patch_rows * shape.patch_length) > 0.85


@pytest.mark.parametrize("seed", range(3))
def test_batches_of_short_texts_go_into_short_rows(seed):
    """Also where a cell would run out of slots before it runs out of room."""
    rng = np.random.default_rng(seed)
    steps = [np.clip(np.exp(rng.normal(3.3, 0.7, 256)), 8, 128).astype(int) for _ in range(4)]
    shape = batch_shape([(lengths, 0 * lengths) for lengths in steps], 4, 1, (128, 0))
    assert shape.length == 128
    assert max(step.sum() for step in steps) / (4 * shape.rows * shape.length) > 0.9


@pytest.mark.parametrize("size", [60, 350, 700, 1100, 1500])
@pytest.mark.parametrize(("items", "data_shards"), [(7, 1), (60, 1), (300, 1), (300, 8)])
def test_items_of_one_size_find_a_shape_however_much_of_a_row_they_leave(size, items, data_shards):
    """Images of one size, say: rows filled to the sum of their tokens would not hold them."""
    lengths, patches = np.full(items, size), np.full(items, 4 * size)
    shape = batch_shape([(lengths, patches)], 1, data_shards, (size, 4 * size))
    packing = place(lengths, patches, shape)
    assert packing.chunks == 1
    check_packing(lengths, patches, packing, shape)
    if (items, data_shards) == (300, 1):
        assert lengths.sum() > 0.85 * shape.rows * shape.length


@given(st.lists(st.integers(1, 100), max_size=60), st.integers(100, 150))
def test_rows_filled_bounds_rows_needed(sizes, length):
    sizes = np.array(sizes, int)
    assert sizes.sum() / length <= rows_filled(sizes, length) + 1e-9
    assert rows_filled(sizes, length) <= rows_needed(sizes, length) + 1e-9


def test_rows_filled_counts_what_cannot_share_a_row():
    assert rows_filled(np.array([60, 60, 60]), 100) == 3
    assert rows_filled(np.array([60, 60, 60, 40, 40, 40]), 100) == 3
    # Three rows with room for 30 each, that none of the others has use for.
    assert rows_filled(np.array([70, 70, 70, 35, 35, 30]), 100) == pytest.approx(3.7)
